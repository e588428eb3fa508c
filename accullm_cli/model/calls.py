"""What a model passes to its blocks: the same for every text, but for what comes along in the stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from accullm_cli.model.dry_pass import Path


@dataclass(frozen=True)
class Call:
    """What the model passes to one block, None in the places of what depends on the tokens.

    extras: the places of the values beside the hidden states that depend on them, and the numbers of the extras there.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    extras: Mapping[Path, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """What a stream [windows, tokens, features] consists of: hidden states, and behind them the extras.

    Extras are what blocks are passed beside the hidden states and depends on the tokens, such as embeddings of their
    own. They come along unchanged.
    shapes: of each, hidden states first, without windows and tokens. dtypes: likewise, as the model passes it.
    """

    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]

    @staticmethod
    def of(values: Sequence[torch.Tensor]) -> Layout:
        return Layout(tuple(value.shape[2:] for value in values), tuple(value.dtype for value in values))

    @property
    def features(self) -> int:
        """Of the hidden states alone."""
        return self.shapes[0].numel()

    def join(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """One stream of all values. Token ids and the like are exact up to 2**24 in float32."""
        rows = [value.reshape(*value.shape[:2], -1) for value in values]
        return rows[0] if len(rows) == 1 else torch.cat([row.float() for row in rows], dim=-1)

    def split(self, stream: torch.Tensor) -> list[torch.Tensor]:
        """The values of a stream."""
        if len(self.shapes) == 1:
            return [stream.view(*stream.shape[:2], *self.shapes[0])]
        parts = stream.split([shape.numel() for shape in self.shapes], dim=-1)
        return [
            part.reshape(*part.shape[:2], *shape).to(dtype)
            for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)
        ]


def is_alike(a: Any, b: Any) -> bool:
    """Whether two calls pass the same values."""
    if isinstance(a, Call):
        return a.extras == b.extras and is_alike(a.args, b.args) and is_alike(dict(a.kwargs), dict(b.kwargs))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(is_alike(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_alike(a[key], b[key]) for key in a)
    return a is b or type(a) is type(b)
