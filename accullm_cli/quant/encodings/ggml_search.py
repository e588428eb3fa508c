"""The numbers of GGUF's blocks with the least importance-weighted error of the nearest values.

First every sub-block by itself, with any scale and offset: many ranges are tried, each with the numbers that are best
for the codes it gives (least squares). Then the integers and float16s that come nearest to these, and in turns the
integers whose nearest values have the least error, and the float16s that are best for the codes. Nothing is taken that
does not lower the error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from accullm_cli.quant.encodings.ggml_grid import NEXT_TO_NOTHING, BlockGrid, nonzero, stored_scale
from accullm_cli.quant.encodings.ggml_layout import BlockType
from accullm_cli.quant.linear import spread
from accullm_cli.quant.scales import LARGEST_SCALE, round_offset

# How often codes, integers and float16s are fitted to each other.
ROUNDS = 2
# Ranges that are tried: the whole one, and those that are shorter (or longer) by so many codes. Near to the whole one,
# every fifth of a code has other weights lie near to values.
SHORTER = (0.0, *(0.2 * count for count in range(-5, 9) if count), *(1.9 + 0.5 * count for count in range(11)))
SHORTEST = 0.45
# A float16 is tried at which the largest number that it has to give has the largest integer, or up to so much less.
SPARED_INTEGERS = 12

Numbers = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class _Sums:
    """Over a sub-block's points p and weights x, weighted by importance; [N, G]. The last two are 0 without offsets."""

    square: torch.Tensor  # of p^2
    product: torch.Tensor  # of p x
    point: torch.Tensor  # of p
    one: torch.Tensor  # of 1
    weight: torch.Tensor  # of x

    @property
    def curvature(self) -> torch.Tensor:
        """Half of what the error's slope along the scale grows by, where the offset follows."""
        return (self.square - self.point.square() / nonzero(self.one)).clamp(min=0)

    def offset(self, scale: torch.Tensor) -> torch.Tensor:
        """The best one with a scale."""
        return (self.weight - scale * self.point) / nonzero(self.one)


class BlockSearch:
    """The search for some rows.

    Args:
        weight: [N, K]. importance: [K], 0 in columns that the grid need not hold.
    """

    def __init__(self, kind: BlockType, weight: torch.Tensor, importance: torch.Tensor) -> None:
        self.kind = kind
        self.weight = weight.view(len(weight), -1, kind.group)
        self.importance = importance.view(-1, kind.group)
        held = self.importance > 0
        low, high = (
            torch.where(held, self.weight, end).amin(-1) if end > 0 else torch.where(held, self.weight, end).amax(-1)
            for end in (torch.inf, -torch.inf)
        )
        some = held.any(-1)
        low, high = torch.where(some, low, 0), torch.where(some, high, 0)
        # The offsets of super-blocks are never above 0, and points of a zero code are always held.
        self.low = low.clamp(max=0) if kind.is_super or not kind.has_offset else low
        self.high = high if kind.has_offset else high.clamp(min=0)
        levels = kind.levels or [code - kind.zero for code in range(2**kind.bits)]
        self.levels = torch.tensor(levels, dtype=weight.dtype, device=weight.device)
        if kind.levels is not None:
            # Levels are whole numbers, so that between two halves all places have one nearest level.
            self.halves = (2 * int(levels[0]), 2 * int(levels[-1]))
            places = torch.arange(self.halves[0], self.halves[1] + 1, dtype=weight.dtype, device=weight.device) / 2
            middles = (self.levels[1:] + self.levels[:-1]) / 2
            self.nearest = self.levels[torch.bucketize(places, middles)]

    def beyond(self) -> int:
        """How many blocks hold weights that no float16 reaches."""
        most = LARGEST_SCALE * max(map(abs, self.kind.integers))
        if self.kind.has_offset:
            deepest = LARGEST_SCALE * max(map(abs, self.kind.lifts))
            out = (self.low.abs() > deepest) | (self.high - self.low > most * (2**self.kind.bits - 1))
        else:
            out = torch.maximum(-self.low, self.high) > most * float(self.levels.abs().max())
        return int(out.unflatten(1, (-1, self.kind.groups_of_block)).any(-1).sum())

    def spanning(self) -> BlockGrid:
        """A grid that spans the range of every sub-block, as far as it can be stored."""
        numbers = next(self._ranges([1.0]))
        return self._stored(numbers, self._sums(self._points(*numbers)))

    def best(self) -> BlockGrid:
        """The grid of the least error that is found."""
        numbers = self._best_of_any()
        grid = self._stored(numbers, self._sums(self._points(*numbers)))
        for _ in range(ROUNDS):
            if self.kind.is_super:
                grid = self._with_better_integers(grid)
            grid = self._with_better_halves(grid)
        return grid

    # -- any scale and offset --------------------------------------------------------------------------

    def _best_of_any(self) -> Numbers:
        """The best scale and offset of each sub-block, storable or not."""
        fractions = [1 - codes / (2**self.kind.bits - 1) for codes in SHORTER]
        best: tuple[torch.Tensor, ...] | None = None
        for numbers in self._ranges([fraction for fraction in fractions if fraction > SHORTEST]):
            found = self._refitted(*numbers)
            best = found if best is None else _better(found, best)
        assert best is not None
        for _ in range(ROUNDS):
            best = _better(self._refitted(best[0], best[1]), best)
        return best[0], best[1]

    def _ranges(self, fractions: Sequence[float]) -> Iterator[Numbers]:
        """Scales and offsets at which the codes span a part of the range."""
        largest = 2**self.kind.bits - 1
        if self.kind.has_offset:
            for fraction in fractions:
                cut = (self.high - self.low) * (1 - fraction)
                ends = [(self.low * fraction, self.high * fraction)]
                if fraction != 1:
                    ends += [(self.low + cut, self.high), (self.low, self.high - cut)]
                for low, high in ends:
                    scale = (high - low) / largest
                    yield torch.where(scale > 0, scale, 1), low
            return
        first, last = float(self.levels[0]), float(self.levels[-1])
        for sign, one, other in ((1, first, last), (-1, -last, -first)):
            scale = torch.maximum(self.low / one, self.high / other)
            if self.kind.levels is None:  # whose zero code holds zeros at any scale; a table's levels need one of 0
                scale = torch.where(scale > 0, scale, 1)
            for fraction in fractions:
                yield sign * fraction * scale, torch.zeros_like(scale)

    def _refitted(self, scale: torch.Tensor, offset: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The best scale and offset for the codes that these give, and the error."""
        points = self._points(scale, offset)
        sums = self._sums(points)
        curvature = sums.curvature
        best = (sums.product - sums.point * sums.weight / nonzero(sums.one)) / nonzero(curvature)
        # Where all codes are alike, or a sub-block has no weights to hold, there is none.
        usable = curvature > sums.square * NEXT_TO_NOTHING
        best = torch.where(usable & ((best > 0) | (not self.kind.has_offset)), best, scale)
        lift = sums.offset(best)
        if self.kind.has_offset and self.kind.is_super:
            above = lift > 0
            alone = sums.product / nonzero(sums.square)
            best, lift = torch.where(above & (alone > 0), alone, best), lift.clamp(max=0)
        return best, lift, self._error(points, best, lift)

    # -- what can be stored ----------------------------------------------------------------------------

    def _stored(self, numbers: Numbers, sums: _Sums) -> BlockGrid:
        """The storable numbers that are nearest in what they cost."""
        kind, (scale, offset) = self.kind, numbers
        # A sub-block of zeros asks for no scale. One of equal weights hardly does: its offset, too, could hold them.
        wanted = torch.where((sums.square > 0) | (not kind.is_super), scale, 0)
        curvature = torch.maximum(sums.curvature, sums.square * NEXT_TO_NOTHING)
        half = _common(wanted, curvature, kind.integers, kind.groups_of_block, partial(stored_scale, kind=kind))
        integers = kind.integer(wanted / nonzero(self._spread(half)))
        lifted = offset - sums.point / nonzero(sums.one) * (integers * self._spread(half) - wanted)
        lifted = lifted.clamp(max=0) if kind.is_super else lifted
        half_offset = _common(lifted, sums.one, kind.lifts, kind.groups_of_block, _stored_offset)
        lifts = kind.lift(lifted / nonzero(self._spread(half_offset)))
        return BlockGrid.of(kind, half, integers, half_offset, lifts)

    def _with_better_integers(self, grid: BlockGrid) -> BlockGrid:
        """Those around the best for the codes; each sub-block takes what leaves the least error."""
        kind, half, half_offset = self.kind, self._spread(grid.half), self._spread(grid.half_offset)
        points = self._points(grid.scale, grid.offset)
        best: tuple[torch.Tensor, ...] = grid.integers, grid.lifts, self._error(points, grid.scale, grid.offset)
        scale, _, _ = self._refitted(grid.scale, grid.offset)
        sums = self._sums(points)
        for more in (-1, 0, 1):
            integers = kind.integer((scale / nonzero(half)).round() + more)
            lift = sums.offset(integers * half) / nonzero(half_offset)
            for lifts in {0: (lift,), 1: (lift.floor(), lift.ceil())}[int(kind.has_offset)]:
                own = kind.lift(lifts)
                error = self._error(
                    self._points(integers * half, own * half_offset), integers * half, own * half_offset
                )
                best = _better((integers, own, error), best)
        return BlockGrid.of(kind, grid.half, best[0], grid.half_offset, best[1])

    def _with_better_halves(self, grid: BlockGrid) -> BlockGrid:
        """Those that are best for the codes, in blocks where that leaves less error."""
        kind = self.kind
        points = self._points(grid.scale, grid.offset)
        sums = self._sums(points)

        def of_blocks(values: torch.Tensor) -> torch.Tensor:
            return values.unflatten(1, (-1, kind.groups_of_block)).sum(-1)

        square, both = (
            of_blocks(grid.integers.square() * sums.square),
            of_blocks(grid.integers * grid.lifts * sums.point),
        )
        one, product = of_blocks(grid.lifts.square() * sums.one), of_blocks(grid.integers * sums.product)
        weight = of_blocks(grid.lifts * sums.weight)
        free = square - both.square() / nonzero(one)
        half = torch.where(
            free > square * NEXT_TO_NOTHING, (product - both * weight / nonzero(one)) / nonzero(free), grid.half
        )
        half = stored_scale(half, kind)
        half_offset = _stored_offset(torch.where(one > 0, (weight - half * both) / nonzero(one), grid.half_offset))
        other = BlockGrid.of(kind, half, grid.integers, half_offset, grid.lifts)
        before = of_blocks(self._error(points, grid.scale, grid.offset))
        after = of_blocks(self._error(self._points(other.scale, other.offset), other.scale, other.offset))
        return BlockGrid.of(
            kind, torch.where(after < before, half, grid.half), grid.integers,
            torch.where(after < before, half_offset, grid.half_offset), grid.lifts,
        )  # fmt: skip

    # -- sums ------------------------------------------------------------------------------------------

    def _points(self, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """What the nearest codes stand for, in steps of the scale: [N, G, group]."""
        place = self.weight - offset[..., None] if self.kind.has_offset else self.weight
        place = place / nonzero(scale[..., None])
        if self.kind.levels is not None:
            index = (place * 2).ceil_().clamp_(*self.halves).sub_(self.halves[0]).to(torch.int32)
            return self.nearest.index_select(0, index.flatten()).view_as(place)
        return place.round_().clamp_(self.levels[0], self.levels[-1])

    def _error(self, points: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """The weighted square of what is left, [N, G]."""
        left = torch.addcmul(self.weight, points, scale[..., None], value=-1)
        if self.kind.has_offset:
            left -= offset[..., None]
        return left.square_().mul_(self.importance).sum(-1)

    def _sums(self, points: torch.Tensor) -> _Sums:
        weighted = points * self.importance
        square, product = (points * weighted).sum(-1), (self.weight * weighted).sum(-1)
        if not self.kind.has_offset:
            none = torch.zeros_like(square)
            return _Sums(square, product, none, none, none)
        one = self.importance.sum(-1).expand_as(square)
        return _Sums(square, product, weighted.sum(-1), one, (self.weight * self.importance).sum(-1))

    def _spread(self, of_blocks: torch.Tensor) -> torch.Tensor:
        return spread(of_blocks, self.kind.groups_of_block, self.weight.shape[1])


def _better(new: tuple[torch.Tensor, ...], old: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """In every sub-block that of less error, which comes last; the old one where only a last bit makes a difference.

    Codes that are all one more, with an offset that is one step less, stand for the same values.
    """
    better = new[-1] < old[-1] * (1 - NEXT_TO_NOTHING)
    return tuple(torch.where(better, *pair) for pair in zip(new, old, strict=True))


def _common(
    wanted: torch.Tensor,
    curvature: torch.Tensor,
    integers: tuple[int, int],
    together: int,
    stored: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The float16 of each block whose multiples by integers come nearest to its sub-blocks' numbers: [N, blocks].

    Args:
        wanted: [N, G]. curvature: [N, G], what the square of a deviation costs.
        together: sub-blocks of a block.
        stored: the nearest float16 that may be stored.
    """
    wanted, curvature = wanted.unflatten(1, (-1, together)), curvature.unflatten(1, (-1, together))
    least, most = integers
    if least == most:  # 1, or 0 of what is not there
        return stored(least * wanted[..., 0])
    largest = wanted.gather(-1, wanted.abs().argmax(-1, keepdim=True))
    best: tuple[torch.Tensor, ...] | None = None
    for integer in [least + spared for spared in range(SPARED_INTEGERS)] + [
        most - spared for spared in range(SPARED_INTEGERS)
    ]:
        if least <= integer <= most and integer != 0:
            own = (wanted / nonzero(stored(largest / integer))).round_().clamp_(least, most)
            square, product = (curvature * own * own).sum(-1), (curvature * own * wanted).sum(-1)
            half = stored(torch.where(square > 0, product / nonzero(square), largest[..., 0] / integer))
            own = (wanted / nonzero(half)[..., None]).round_().clamp_(least, most)
            cost = (curvature * (wanted - own * half[..., None]).square()).sum(-1)
            best = (half, cost) if best is None else _better((half, cost), best)
    assert best is not None
    return best[0]


def _stored_offset(offset: torch.Tensor) -> torch.Tensor:
    return round_offset(offset, "float16")
