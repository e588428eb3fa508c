"""Tensors of a GGUF file as pieces of a model's parameters, and how rows are moved between the two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Piece:
    """A tensor of a GGUF file as rows of a parameter.

    rows: the first row and the one behind the last, in a stack those of each expert; None for all.
    heads: rows belong to so many heads, and those of each head come in pairs of its halves; 0 leaves them in order.
    shift: added to each value.
    """

    name: str
    rows: tuple[int, int] | None = None
    heads: int = 0
    shift: float = 0.0

    def shape(self, of: Sequence[int]) -> tuple[int, ...]:
        """The tensor's shape, by that of the parameter."""
        if self.rows is None:
            return tuple(of)
        rows = self.rows[1] - self.rows[0]
        return (*of[:-2], rows, of[-1]) if len(of) > 1 else (rows,)

    def is_shape(self, stored: Sequence[int], of: Sequence[int]) -> bool:
        """Whether a tensor of this shape is the piece: ggml leaves out dimensions of 1 in front."""
        return _without_ones(stored) == _without_ones(self.shape(of))


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    first = next((place for place, size in enumerate(shape) if size != 1), len(shape))
    return tuple(shape[first:])


def _order(rows: int, heads: int) -> torch.Tensor:
    """The rows of a parameter in the order in which a piece has them: of each head the halves' rows in turn."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def piece_of(values: torch.Tensor, piece: Piece, dim: int) -> torch.Tensor:
    """A piece of a parameter, whose rows are along `dim`."""
    if piece.rows is not None:
        values = values.narrow(dim, piece.rows[0], piece.rows[1] - piece.rows[0])
    if piece.heads:
        values = values.index_select(dim, _order(values.shape[dim], piece.heads))
    return values.float() + piece.shift if piece.shift else values


def whole_of(pieces: Sequence[torch.Tensor], of: Sequence[Piece], dim: int) -> torch.Tensor:
    """The inverse: a parameter from its pieces."""
    found = []
    for values, piece in zip(pieces, of, strict=True):
        if piece.heads:
            values = values.index_select(dim, _order(values.shape[dim], piece.heads).argsort())
        found.append(values - piece.shift if piece.shift else values)
    return found[0] if len(found) == 1 else torch.cat(found, dim)
