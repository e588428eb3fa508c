"""Uniform grids: one scale and zero point per output row and group of input features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeVar

import torch

from accullm_cli.quant.linear import is_trellis, of_table, spread
from accullm_cli.quant.scales import StorableScales
from accullm_cli.quant.viterbi import nearest_chains

ANY_SCALE = StorableScales()

# Fractions of the full range that the search tries. On a 4-bit grid the best range for Gaussian-like weights lies
# at 0.8 to 1.0 of the largest; below 0.6 clipping always loses.
SEARCHED_RANGES = tuple(1.0 - 0.02 * step for step in range(21))
# Weights that a pass of many small steps takes at once: its dozen temporaries stay in the processor's cache (for
# [8192, 3072] a third of the time), and weigh nothing beside a block.
CHUNK_ELEMENTS = 1 << 18
# The same on a GPU, where small steps cost their launches; some 64 MB each.
CHUNK_ELEMENTS_OF_A_GPU = 1 << 24


AnyGrid = TypeVar("AnyGrid", bound="Grid")


@dataclass(frozen=True)
class Grid:
    """The values that the weights of one linear may take: (code - zero) * scale, or levels[code] * scale.

    This one has whole zero points, from 0 to 2**bits - 1. A way to store other zero points, or scales that hang on each
    other, has a class of its own below this one, with its own `fitted`; rounding takes any real numbers for both.

    scale: [N, G], in the working dtype, each one that can be stored; here positive, for rounding of either sign.
    zero: [N, G], in the working dtype.
    storable: the scales that it may have.
    levels: 2**bits ascending numbers, a table in place of steps of one size; zero points are not used then. Twice as
        many of a trellis (see quant.trellis), whose codes are places in this table.
    """

    scale: torch.Tensor
    zero: torch.Tensor
    bits: int
    columns_per_group: int
    symmetric: bool
    storable: StorableScales = ANY_SCALE
    levels: tuple[float, ...] | None = None

    @property
    def largest_code(self) -> int:
        return 2**self.bits - 1

    @property
    def is_trellis(self) -> bool:
        return is_trellis(self.levels, self.bits)

    def round_to_nearest(self, weight: torch.Tensor) -> torch.Tensor:
        """Codes (whole numbers in the working dtype) of the nearest grid values to `weight` [N, K].

        Of a trellis those of the nearest columns.
        """
        count = weight.shape[1]
        scale, zero = self.per_column(count)
        table = self.table()
        if table is not None and self.is_trellis:
            return nearest_chains(weight, scale, table).to(weight.dtype)
        if table is not None:
            return torch.bucketize((weight / scale).contiguous(), (table[1:] + table[:-1]) / 2).to(weight.dtype)
        return (weight / scale + zero).round_().clamp_(0, self.largest_code)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """The weights [N, K] that codes stand for."""
        return self.points(codes) * spread(self.scale, self.columns_per_group, codes.shape[1])

    def points(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes [N, K] stand for, in steps of the scale."""
        table = self.table()
        if table is not None:
            return of_table(table, codes)
        return codes.to(self.scale.dtype) - spread(self.zero, self.columns_per_group, codes.shape[1])

    def table(self) -> torch.Tensor | None:
        """The levels as a tensor [2**bits] beside the scales; None where codes are steps."""
        if self.levels is None:
            return None
        return torch.tensor(self.levels, dtype=self.scale.dtype, device=self.scale.device)

    def rows(self: AnyGrid, part: slice) -> AnyGrid:
        """The grid of some rows."""
        return replace(self, **{name: tensor[part] for name, tensor in self._tensors().items()})  # type: ignore[arg-type]

    def joined(self: AnyGrid, parts: Sequence[AnyGrid]) -> AnyGrid:
        """The grid of all rows, whose parts have changed."""
        every = [part._tensors() for part in parts]
        return replace(self, **{name: torch.cat([own[name] for own in every]) for name in every[0]})  # type: ignore[arg-type]

    def of_columns(self: AnyGrid, index: torch.Tensor) -> AnyGrid:
        """The grid of some columns, int64 [n], each of them a group."""
        group = index // self.columns_per_group
        own = {name: tensor[:, group] for name, tensor in self._tensors().items()}
        return replace(self, columns_per_group=1, **own)  # type: ignore[arg-type]

    def where(self: AnyGrid, chosen: torch.Tensor, other: AnyGrid) -> AnyGrid:
        """This grid in the groups that are `chosen`, bool [N, G], and the other one elsewhere."""
        others = other._tensors()
        mixed = {name: torch.where(chosen, own, others[name]) for name, own in self._tensors().items()}
        return replace(self, **mixed)  # type: ignore[arg-type]

    def per_column(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of every weight: two tensors [N, count]."""
        size = self.columns_per_group
        return spread(self.scale, size, count), spread(self.zero, size, count)

    def fitted(
        self: AnyGrid,
        error: torch.Tensor,
        codes: torch.Tensor,
        on_grid: torch.Tensor,
        hessian: torch.Tensor,
        ridge: float,
    ) -> AnyGrid:
        """A grid that can be stored, of less Hessian-weighted error for given codes; here, with other scales.

        Args:
            error: [N, K], W* - Q as it is on this grid; used up.
            codes: uint8 [N, K].
            on_grid: bool [K], the columns that it holds.
            hessian: [K, K].
        """
        steps = self.points(codes)
        steps[:, ~on_grid] = 0
        scale = fitted_scales(self.scale, error, steps, hessian, ridge, self.columns_per_group, self.storable)
        return replace(self, scale=scale)

    def _tensors(self) -> dict[str, torch.Tensor]:
        """What it has of each row and group, by field."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}


def minmax_grid(
    weight: torch.Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    storable: StorableScales = ANY_SCALE,
    ignored: torch.Tensor | None = None,
    margin: float = 0,
    first_zero: int = 0,
) -> Grid:
    """The grid that spans each group's range.

    Args:
        weight: [N, K], float32 or float64 (the working dtype).
        group_size: columns that share a scale; -1 for all of them. The last group may be shorter.
        symmetric: put the zero point at 2**(bits-1); otherwise it is the code nearest to the value 0, and the
            range includes 0.
        storable: the scales that the grid may have.
        ignored: bool [K], columns that the grid need not hold (outlier features).
        margin: codes kept free at either end. With 0.5 no weight lies outside the first and last code, however zero
            point and scale are rounded; stochastic rounding needs that.
        first_zero: the least zero point that may be stored; the range grows downwards where it takes that.
    """
    low, high, size = group_range(weight, group_size, ignored)
    return _grid_of_range(low, high, bits, size, symmetric, storable, margin, first_zero)


def spanning_scales(
    weight: torch.Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    ignored: torch.Tensor | None = None,
    margin: float = 0,
) -> torch.Tensor:
    """The scale at which a grid spans each group's range, before it is rounded; 0 for zeros: [N, G].

    Args:
        (as for `minmax_grid`)
    """
    low, high, _ = group_range(weight, group_size, ignored)
    return _spanning(low, high, bits, symmetric, margin)


def searched_grid(
    weight: torch.Tensor,
    importance: torch.Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    storable: StorableScales = ANY_SCALE,
    ignored: torch.Tensor | None = None,
    first_zero: int = 0,
    ignored_weight: float = 0,
) -> Grid:
    """For each group the range, a fraction of the full one, with the least importance-weighted rounding error.

    Args:
        importance: [K], weight of a column's squared error; the Hessian's diagonal (the input's second moment).
        ignored_weight: how much of that the columns have that the grid need not hold; with any, fractions of the
            range of all columns are tried, too.
        (others: as for `minmax_grid`)
    """
    column_weight = importance.to(weight.dtype)
    if ignored is not None:
        column_weight = torch.where(ignored, column_weight * ignored_weight, column_weight)
    parts: list[Grid] = []
    for part in row_chunks(weight):
        ranges = [group_range(part, group_size, without) for without in (ignored, *([None] if ignored_weight else []))]
        candidates = (
            _grid_of_range(low * fraction, high * fraction, bits, size, symmetric, storable, first_zero=first_zero)
            for (low, high, size), fraction in product(ranges, SEARCHED_RANGES)
        )
        parts.append(best_grid(part, column_weight, candidates))
    return parts[0].joined(parts)


def best_grid(weight: torch.Tensor, column_weight: torch.Tensor, candidates: Iterable[AnyGrid]) -> AnyGrid:
    """In each group that of several grids whose nearest values have the least error, weighted by columns."""
    best: AnyGrid | None = None
    for candidate in candidates:
        error = weight - candidate.values(candidate.round_to_nearest(weight))
        error = sum_groups(error.square_().mul_(column_weight), candidate.columns_per_group, weight.shape[1])
        if best is None:
            best, best_error = candidate, error
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = candidate.where(better, best)
    assert best is not None
    return best


def fitted_scales(
    scale: torch.Tensor,
    error: torch.Tensor,
    steps: torch.Tensor,
    hessian: torch.Tensor,
    ridge: float,
    columns_per_group: int,
    storable: StorableScales = ANY_SCALE,
) -> torch.Tensor:
    """Scales of less Hessian-weighted error for given codes: [N, G].

    A row's weights are linear in its scales, so with the codes fixed its loss e (H + ridge) e^T is quadratic in them.
    One group after the other is put at its minimum, rounded as it is stored, and left as it was where that is no gain.

    Args:
        scale: [N, G].
        error: [N, K], W* - Q as it is with these scales; at the end, in place, as it is with the new ones.
        steps: [N, K], code - zero point; 0 in columns that the grid does not hold.
        hessian: [K, K].
    """
    scale = scale.clone()
    for group in range(scale.shape[1]):
        columns = slice(group * columns_per_group, (group + 1) * columns_per_group)
        own = steps[:, columns]
        # Of e (H + ridge) e^T along this scale; H is symmetric, and its rows lie together.
        slope = ((error @ hessian[columns].T + ridge * error[:, columns]) * own).sum(1)
        curvature = ((own @ hessian[columns, columns] + ridge * own) * own).sum(1)
        wanted = scale[:, group] + slope / curvature.clamp(min=torch.finfo(scale.dtype).tiny)
        difference = storable.round(wanted) - scale[:, group]
        gains = difference * (difference * curvature - 2 * slope) < 0
        difference = torch.where(gains, difference, 0)
        scale[:, group] += difference
        error[:, columns] -= difference[:, None] * own
    return scale


def row_chunks(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The rows of [N, K] in parts of about CHUNK_ELEMENTS, as views."""
    elements = CHUNK_ELEMENTS_OF_A_GPU if weight.is_cuda else CHUNK_ELEMENTS
    return weight.split(max(1, elements // weight.shape[1]))


def _grid_of_range(
    low: torch.Tensor,
    high: torch.Tensor,
    bits: int,
    columns_per_group: int,
    symmetric: bool,
    storable: StorableScales,
    margin: float = 0,
    first_zero: int = 0,
) -> Grid:
    """The grid that spans [low, high] in each group; both [N, G]."""
    if first_zero and not symmetric:
        low = torch.minimum(low, -high * first_zero / (2**bits - 1 - first_zero))
    scale = _spanning(low, high, bits, symmetric, margin)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    # With a margin never below what was asked for.
    scale = storable.round_up(scale) if margin else storable.round(scale)
    if symmetric:
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        zero = (-low / scale + margin).round_().clamp_(first_zero, 2**bits - 1)
    return Grid(scale, zero, bits, columns_per_group, symmetric, storable)


def _spanning(low: torch.Tensor, high: torch.Tensor, bits: int, symmetric: bool, margin: float) -> torch.Tensor:
    """The scale at which a grid spans [low, high]."""
    steps = 2**bits - 1 - 2 * margin
    return 2 * torch.maximum(-low, high) / steps if symmetric else (high - low) / steps


def group_range(
    weight: torch.Tensor, group_size: int, ignored: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Each group's smallest and largest weight, 0 included, [N, G] both; and the columns in a group."""
    if ignored is not None:
        weight = weight.masked_fill(ignored, 0)
    rows, count = weight.shape
    size = count if group_size == -1 else group_size
    # Zeros fill up a last short group: they are inside every range.
    padded = torch.nn.functional.pad(weight, (0, -count % size)).view(rows, -1, size)
    return padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0), size


def sum_groups(values: torch.Tensor, size: int, count: int) -> torch.Tensor:
    """Sum [N, K] over groups: [N, G]."""
    return torch.nn.functional.pad(values, (0, -count % size)).view(len(values), -1, size).sum(-1)
