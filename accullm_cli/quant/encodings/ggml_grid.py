"""The grids of GGUF's blocks: scales of either sign, which in super-blocks are integers times one float16."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from accullm_cli.quant.encodings.ggml_layout import BlockType
from accullm_cli.quant.grid import Grid
from accullm_cli.quant.linear import of_table, spread
from accullm_cli.quant.scales import LARGEST_SCALE, SMALLEST_SCALE, round_offset

# Of a curvature along a scale: where the offset moves too, no more is left of it if both do the same.
NEXT_TO_NOTHING = 1e-5


@dataclass(frozen=True)
class BlockGrid(Grid):
    """The values point * scale + offset that blocks can hold; see `BlockType`.

    half: [N, blocks], the float16 of the scales; integers: [N, G]. `scale` is their product.
    half_offset: [N, blocks], the float16 of the offsets; lifts: [N, G]. offset: [N, G], their product.
    """

    kind: BlockType = field(kw_only=True)
    half: torch.Tensor = field(kw_only=True)
    integers: torch.Tensor = field(kw_only=True)
    half_offset: torch.Tensor = field(kw_only=True)
    lifts: torch.Tensor = field(kw_only=True)
    offset: torch.Tensor = field(kw_only=True)

    @classmethod
    def of(
        cls,
        kind: BlockType,
        half: torch.Tensor,
        integers: torch.Tensor,
        half_offset: torch.Tensor,
        lifts: torch.Tensor,
    ) -> BlockGrid:
        """The grid of these numbers, all of which can be stored."""
        count = integers.shape[1]
        scale = spread(half, kind.groups_of_block, count) * integers
        offset = spread(half_offset, kind.groups_of_block, count) * lifts
        zero = -offset / scale if kind.has_offset else torch.full_like(scale, kind.zero)
        return cls(
            scale, zero, kind.bits, kind.group, not kind.has_offset, levels=kind.levels, kind=kind, half=half,
            integers=integers, half_offset=half_offset, lifts=lifts, offset=offset,
        )  # fmt: skip

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        count, size = codes.shape[1], self.columns_per_group
        values = self.points(codes) * spread(self.scale, size, count)
        return values + spread(self.offset, size, count) if self.kind.has_offset else values

    def points(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes stand for, in steps of the scale above the offset."""
        return points_of(codes, self.kind, self.scale.dtype)

    def fitted(
        self, error: torch.Tensor, codes: torch.Tensor, on_grid: torch.Tensor, hessian: torch.Tensor, ridge: float
    ) -> BlockGrid:
        """See `Grid.fitted`. In each block the integers of one sub-block after the other, and then the float16s.

        Scale and offset go to their minimum at once and onto what can be stored one after the other, and stay where
        that is no gain.
        """
        kind = self.kind
        half, integers, half_offset, lifts = (
            part.clone() for part in (self.half, self.integers, self.half_offset, self.lifts)
        )
        for block in range(half.shape[1]):
            columns = slice(block * kind.block, (block + 1) * kind.block)
            groups = slice(block * kind.groups_of_block, (block + 1) * kind.groups_of_block)
            inner, own_error = hessian[columns, columns], error[:, columns]
            ones = on_grid[columns].to(error.dtype).expand_as(own_error)
            points, level = self.points(codes[:, columns]) * ones, ones if kind.has_offset else torch.zeros_like(ones)
            # Half of what the loss falls by, for each unit that a weight of the block grows by.
            pull = error @ hessian[columns].T + ridge * own_error
            scale, offset = half[:, block], half_offset[:, block]
            for place in range(kind.groups_of_block if kind.is_super else 0):
                own = slice(place * kind.group, (place + 1) * kind.group)
                integer, lift = integers[:, groups.start + place], lifts[:, groups.start + place]
                loss = _Loss.along(pull[:, own], points[:, own], level[:, own], inner[own, own], ridge)
                more = kind.integer(integer + loss.scale_step() / nonzero(scale)) - integer
                higher = kind.lift(lift + loss.offset_step(more * scale) / nonzero(offset)) - lift
                falls = loss.falls(more * scale, higher * offset)
                integer += more.mul_(falls)
                lift += higher.mul_(falls)
                change = (more * scale)[:, None] * points[:, own] + (higher * offset)[:, None] * level[:, own]
                own_error[:, own] -= change
                pull -= change @ inner[own]
                pull[:, own] -= ridge * change
            along, level = (
                part * spread(own[:, groups], kind.group, kind.block)
                for part, own in ((points, integers), (level, lifts))
            )
            loss = _Loss.along(pull, along, level, inner, ridge)
            larger = stored_scale(scale + loss.scale_step(), kind) - scale
            higher = round_offset(offset + loss.offset_step(larger), "float16") - offset
            falls = loss.falls(larger, higher)
            scale += larger.mul_(falls)
            offset += higher.mul_(falls)
            own_error -= larger[:, None] * along + higher[:, None] * level
        return BlockGrid.of(kind, half, integers, half_offset, lifts)


@dataclass(frozen=True)
class _Loss:
    """The loss of some rows, quadratic in what a scale and an offset grow by; all [N]."""

    by_scale: torch.Tensor
    by_offset: torch.Tensor
    of_scale: torch.Tensor
    of_both: torch.Tensor
    of_offset: torch.Tensor

    @classmethod
    def along(
        cls, pull: torch.Tensor, along: torch.Tensor, level: torch.Tensor, hessian: torch.Tensor, ridge: float
    ) -> _Loss:
        """Where the scale grows, the weights do so by `along`, and by `level` with the offset; all [N, columns]."""
        pulled, lifted = (part @ hessian + ridge * part for part in (along, level))
        products = (pull, along), (pull, level), (pulled, along), (lifted, along), (lifted, level)
        return cls(*((one * other).sum(1) for one, other in products))

    def scale_step(self) -> torch.Tensor:
        """Where the scale goes, if the offset goes to its best as well; nowhere, if both do the same."""
        share = self.of_both / nonzero(self.of_offset)
        free = self.of_scale - share * self.of_both
        step = (self.by_scale - share * self.by_offset) / nonzero(free)
        return torch.where(free > self.of_scale * NEXT_TO_NOTHING, step, 0)

    def offset_step(self, scale_step: torch.Tensor) -> torch.Tensor:
        """Where the offset goes with that."""
        return (self.by_offset - self.of_both * scale_step) / nonzero(self.of_offset)

    def falls(self, scale_step: torch.Tensor, offset_step: torch.Tensor) -> torch.Tensor:
        """Whether it is less after these steps."""
        by_itself = scale_step * (scale_step * self.of_scale - 2 * self.by_scale)
        rest = offset_step * (offset_step * self.of_offset + 2 * scale_step * self.of_both - 2 * self.by_offset)
        return by_itself + rest < 0


def points_of(codes: torch.Tensor, kind: BlockType, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What codes stand for, in steps of the scale above the offset."""
    if kind.levels is not None:
        return of_table(torch.tensor(kind.levels, dtype=dtype, device=codes.device), codes)
    return codes.to(dtype) - kind.zero


def stored_scale(scale: torch.Tensor, kind: BlockType) -> torch.Tensor:
    """The nearest float16, of either sign; 0 for a table of levels alone, of which none is 0."""
    least = SMALLEST_SCALE if kind.levels is None else 0.0
    rounded = scale.abs().clamp(least, LARGEST_SCALE).to(torch.float16).to(scale.dtype)
    return torch.where(scale < 0, -rounded, rounded)


def nonzero(number: torch.Tensor) -> torch.Tensor:
    """What can be divided by: 1 for 0."""
    return torch.where(number == 0, 1, number)
