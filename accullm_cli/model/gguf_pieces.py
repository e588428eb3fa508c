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
    groups: so many groups, and in each so many heads of queries in front of one of keys and one of values; the piece
        has the queries of all groups first, then the keys, then the values.
    shift: added to each value.
    """

    name: str
    rows: tuple[int, int] | None = None
    heads: int = 0
    groups: tuple[int, int] | None = None
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


def _order(rows: int, piece: Piece) -> torch.Tensor | None:
    """The rows of a parameter in the order in which a piece has them; None where that is the same."""
    if piece.heads:
        return torch.arange(rows).view(piece.heads, 2, -1).transpose(1, 2).flatten()
    if piece.groups is not None:
        groups, queries = piece.groups
        parts = torch.arange(rows).view(groups, queries + 2, -1).split([queries, 1, 1], 1)
        return torch.cat([part.flatten() for part in parts])
    return None


def piece_of(values: torch.Tensor, piece: Piece, dim: int) -> torch.Tensor:
    """A piece of a parameter, whose rows are along `dim`."""
    if piece.rows is not None:
        values = values.narrow(dim, piece.rows[0], piece.rows[1] - piece.rows[0])
    if (order := _order(values.shape[dim], piece)) is not None:
        values = values.index_select(dim, order)
    return values.float() + piece.shift if piece.shift else values


def whole_of(pieces: Sequence[torch.Tensor], of: Sequence[Piece], dim: int) -> torch.Tensor:
    """The inverse: a parameter from its pieces."""
    found = []
    for values, piece in zip(pieces, of, strict=True):
        if (order := _order(values.shape[dim], piece)) is not None:
            values = values.index_select(dim, order.argsort())
        found.append(values - piece.shift if piece.shift else values)
    return found[0] if len(found) == 1 else torch.cat(found, dim)
