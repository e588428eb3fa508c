"""Groups with a scale and a real offset: value = code * scale + offset, both numbers of 16 bits.

A whole zero point puts a value of every group at exactly 0; a real offset may lie anywhere, so that a group spans its
own range and no more. Both are fitted to given codes at once, by least squares under the Hessian, and put onto numbers
of 16 bits one after the other, so that the offset makes up for what the scale lost when it was rounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.quant.encodings.base import OUTLIER_SUFFIXES, Encoding
from accullm_cli.quant.grid import Grid, row_chunks, sum_groups
from accullm_cli.quant.linear import ELEMENTS_TOGETHER, spread
from accullm_cli.quant.packing import pack, packed_length, unpack
from accullm_cli.quant.scales import StorableScales, round_offset

if TYPE_CHECKING:
    from accullm_cli.quant.plan import LinearPlan

WIDTHS = range(2, 9)
# Of a group's largest magnitude, the least scale: below that, a step is smaller than the offset's last bit in bfloat16.
SMALLEST_STEP = 2.0**-9
# Of a group's range, where the search starts, and how often codes and numbers are fitted to each other from there. On
# matrices of two models at 3 and 4 bits, the 81 ranges that were tried before took three times as long, for 3% more of
# the error that is searched for and the same (0.2% more) of that which is left after rounding with feedback.
STARTING_RANGES = (1.0, 0.9, 0.8)
TURNS = 4


@dataclass(frozen=True)
class AffineGrid(Grid):
    """The values code * scale + offset.

    offset: [N, G], in the working dtype, each one that can be stored. `zero` is -offset / scale.
    """

    offset: torch.Tensor = field(kw_only=True)

    @classmethod
    def of(
        cls, scale: torch.Tensor, offset: torch.Tensor, bits: int, columns_per_group: int, storable: StorableScales
    ) -> AffineGrid:
        """The grid with these scales and offsets, [N, G] both, that can be stored."""
        return cls(scale, -offset / scale, bits, columns_per_group, False, storable, offset=offset)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        count, size = codes.shape[1], self.columns_per_group
        return codes * spread(self.scale, size, count) + spread(self.offset, size, count)

    def fitted(
        self, error: torch.Tensor, codes: torch.Tensor, on_grid: torch.Tensor, hessian: torch.Tensor, ridge: float
    ) -> AffineGrid:
        """See `Grid.fitted`: one group after the other gets the scale and offset of least error, if that is a gain."""
        scale, offset = self.scale.clone(), self.offset.clone()
        for group in range(scale.shape[1]):
            columns = slice(group * self.columns_per_group, (group + 1) * self.columns_per_group)
            ones = on_grid[columns].to(error.dtype)
            own = codes[:, columns].to(error.dtype) * ones
            # Of e (H + ridge) e^T, along both numbers: the slopes, and the curvatures of either and of both at once.
            pull = error @ hessian[columns].T + ridge * error[:, columns]
            pulled = own @ hessian[columns, columns] + ridge * own
            by_scale, by_offset = (pull * own).sum(1), pull @ ones
            of_scale, of_both = (pulled * own).sum(1), pulled @ ones
            of_offset = ones @ hessian[columns, columns] @ ones + ridge * ones.sum()
            if not float(of_offset) > 0:  # no column of the group is on the grid
                continue
            curvatures = of_scale, of_both, of_offset
            better = _least_squares(scale[:, group], offset[:, group], by_scale, by_offset, *curvatures, self.storable)
            more, shift = better[0] - scale[:, group], better[1] - offset[:, group]
            change = more * (more * of_scale - 2 * by_scale) + shift * (shift * of_offset - 2 * by_offset)
            gains = change + 2 * more * shift * of_both < 0
            more, shift = torch.where(gains, more, 0), torch.where(gains, shift, 0)
            scale[:, group] += more
            offset[:, group] += shift
            error[:, columns] -= more[:, None] * own + shift[:, None] * ones
        return replace(self, scale=scale, offset=offset, zero=-offset / scale)


@dataclass(frozen=True)
class AffineLinear:
    """A weight [N, K] as codes, group scales and group offsets, and outlier input features.

    The dequantized weight is code * scale + offset, computed in float32 and rounded once; the columns of the outlier
    features are replaced by `outlier_weight`. Their own codes are the nearest to it, for readers without outliers.
    """

    codes: torch.Tensor  # uint8 [N, K], each below 2**bits
    scales: torch.Tensor  # float16 [N, G], G = ceil(K / group size)
    offsets: torch.Tensor  # float16 [N, G]
    outlier_index: torch.Tensor  # int32 [n], ascending
    outlier_weight: torch.Tensor  # source dtype [N, n]
    bits: int
    group_size: int  # -1: one group per row

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that the artifact stands for: [N, K] in `dtype`."""
        weight = self.without_outliers(dtype)
        weight[:, self.outlier_index.long()] = self.outlier_weight.to(dtype)
        return weight

    def without_outliers(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What a reader makes of the codes, that knows nothing of outliers: [N, K] in `dtype`."""
        count = self.codes.shape[1]
        size = count if self.group_size == -1 else self.group_size
        weight = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        together = max(1, ELEMENTS_TOGETHER // count)
        for start in range(0, len(weight), together):
            rows = slice(start, start + together)
            scale, offset = (spread(part[rows].float(), size, count) for part in (self.scales, self.offsets))
            weight[rows] = self.codes[rows].float().mul_(scale).add_(offset)
        return weight

    def to(self, device: torch.device) -> AffineLinear:
        """The same linear on a device."""
        moved = {name: part.to(device) for name, part in vars(self).items() if isinstance(part, torch.Tensor)}
        return replace(self, **moved)  # type: ignore[arg-type]

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of a shard, by suffix."""
        tensors = {"qweight": pack(self.codes, self.bits), "scales": self.scales, "offsets": self.offsets}
        if len(self.outlier_index):
            tensors |= {"outlier_index": self.outlier_index, "outlier_weight": self.outlier_weight}
        return tensors


class AffineGroups(Encoding):
    """2 to 8 bits in groups of any size, the last of which may be shorter."""

    name = "affine"
    suffixes = ("qweight", "scales", "offsets", *OUTLIER_SUFFIXES)

    def problem(self, row: LinearPlan) -> str:
        if row.bits not in WIDTHS:
            return f"is to have {row.bits} bits"
        if row.group_size < 1 and row.group_size != -1:
            return f"is to have group size {row.group_size}"
        if row.symmetric or row.scale_bits != 16:
            return "is to have no offset, or scales that are not of 16 bits"
        return ""

    def stored_bytes(self, row: LinearPlan) -> int:
        return row.out_features * (packed_length(row.in_features, row.bits) + 2 * 2 * row.groups)

    def grid(
        self,
        weight: torch.Tensor,
        row: LinearPlan,
        scale_dtype: str,
        importance: torch.Tensor | None = None,
        ignored: torch.Tensor | None = None,
        margin: float = 0,
        ignored_weight: float = 0,
    ) -> tuple[AffineGrid, list[str]]:
        size = row.in_features if row.group_size == -1 else row.group_size
        column_weight = None if importance is None else importance.to(weight.dtype)
        if column_weight is not None and ignored is not None:
            column_weight = torch.where(ignored, column_weight * ignored_weight, column_weight)
        parts, clamped, storable = [], 0, StorableScales(scale_dtype)
        for part in row_chunks(weight):
            low, high = _range(part, size, ignored)
            beyond = torch.maximum(low.abs(), high.abs()) > storable.range[1]
            clamped += int(beyond.sum())
            if column_weight is None:
                parts.append(_spanning(low, high, row.bits, size, storable, margin))
                continue
            ranges = [(low, high), *([_range(part, size, None)] if ignored_weight else [])]
            parts.append(_searched(part, column_weight, ranges, row.bits, size, storable))
        sentences = []
        if clamped:
            of = f"{clamped} of {row.out_features * row.groups} groups"
            largest = f"{storable.range[1]:.3g}"
            sentences.append(f"{of} hold weights beyond {largest}, which offsets cannot, and were clamped")
        return parts[0].joined(parts), sentences

    def store(
        self, grid: Grid, codes: torch.Tensor, row: LinearPlan, outliers: torch.Tensor, kept: torch.Tensor
    ) -> AffineLinear:
        assert isinstance(grid, AffineGrid)
        group = outliers // grid.columns_per_group
        nearest = (kept.to(grid.scale.dtype) / grid.scale[:, group] + grid.zero[:, group]).round_()
        codes[:, outliers] = nearest.clamp_(0, grid.largest_code).to(torch.uint8)
        return AffineLinear(
            codes=codes,
            scales=grid.scale.to(torch.float16),
            offsets=grid.offset.to(torch.float16),
            outlier_index=outliers.to(torch.int32),
            outlier_weight=kept.contiguous(),
            bits=row.bits,
            group_size=row.group_size,
        )

    def from_tensors(self, tensors: Mapping[str, torch.Tensor], row: LinearPlan) -> AffineLinear:
        index = tensors.get("outlier_index", torch.zeros(0, dtype=torch.int32))
        groups = (row.out_features, row.groups)
        shapes = {"qweight": (row.out_features, packed_length(row.in_features, row.bits)), "scales": groups}
        shapes |= {"offsets": groups} | ({"outlier_weight": (row.out_features, len(index))} if len(index) else {})
        for suffix, shape in shapes.items():
            if suffix not in tensors:
                raise AccullmError(f"tensor {suffix} is missing")
            if tensors[suffix].shape != shape:
                found = list(tensors[suffix].shape)
                raise AccullmError(f"tensor {suffix} has shape {found}, expected {list(shape)}")
        return AffineLinear(
            codes=unpack(tensors["qweight"], row.bits, row.in_features),
            scales=tensors["scales"],
            offsets=tensors["offsets"],
            outlier_index=index,
            outlier_weight=tensors.get("outlier_weight", tensors["scales"].new_zeros(row.out_features, 0)),
            bits=row.bits,
            group_size=row.group_size,
        )


def _range(weight: torch.Tensor, size: int, ignored: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Each group's smallest and largest weight, [N, G] both; 0 and 0 of a group without any."""
    rows, count = weight.shape
    ends = []
    for end in (float("inf"), float("-inf")):
        own = weight if ignored is None else weight.masked_fill(ignored, end)
        padded = torch.nn.functional.pad(own, (0, -count % size), value=end).view(rows, -1, size)
        found = padded.amin(-1) if end > 0 else padded.amax(-1)
        ends.append(torch.where(found.isinf(), 0, found))
    return ends[0], ends[1]


def _searched(
    weight: torch.Tensor,
    column_weight: torch.Tensor,
    ranges: Sequence[tuple[torch.Tensor, torch.Tensor]],
    bits: int,
    columns_per_group: int,
    storable: StorableScales,
) -> AffineGrid:
    """In each group the grid of least error, weighted by columns, of those that alternating least squares comes to.

    Codes are those of the nearest value, scale and offset the best for the codes, and so on, from several ranges.

    Args:
        ranges: smallest and largest weight of each group, [N, G] both: what it starts from fractions of.
    """

    def summed(values: torch.Tensor) -> torch.Tensor:
        return sum_groups(values, columns_per_group, weight.shape[1])

    of_offset = summed(column_weight.expand_as(weight))
    best: AffineGrid | None = None
    for (low, high), fraction in product(ranges, STARTING_RANGES):
        cut = (high - low) * (1 - fraction) / 2
        grid = _spanning(low + cut, high - cut, bits, columns_per_group, storable)
        for turn in range(TURNS + 1):
            codes = grid.round_to_nearest(weight)
            error = weight - grid.values(codes)
            pull = error * column_weight
            loss = summed(error.mul_(pull))
            if best is None:
                best, least_loss = grid, loss
            else:
                better = loss < least_loss
                least_loss = torch.where(better, loss, least_loss)
                best = grid.where(better, best)
            if turn == TURNS:
                break
            by_offset, by_scale = summed(pull), summed(pull.mul_(codes))
            of_both, of_scale = summed(torch.mul(codes, column_weight, out=pull)), summed(pull.mul_(codes))
            curvatures = of_scale, of_both, of_offset
            found = _least_squares(grid.scale, grid.offset, by_scale, by_offset, *curvatures, storable)
            grid = AffineGrid.of(*found, bits, columns_per_group, storable)
    assert best is not None
    return best


def _least_squares(
    scale: torch.Tensor,
    offset: torch.Tensor,
    by_scale: torch.Tensor,
    by_offset: torch.Tensor,
    of_scale: torch.Tensor,
    of_both: torch.Tensor,
    of_offset: torch.Tensor,
    storable: StorableScales,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and offset of least squared error for given codes, as they are stored; all of one shape.

    The offset is that for the scale as it was rounded. Where all codes are alike, both do the same: the scale stays.

    Args:
        by_scale, by_offset: half of what the squared error loses for a unit of either.
        of_scale, of_both, of_offset: half of its second derivatives.
    """
    tiny = torch.finfo(scale.dtype).tiny
    of_offset = of_offset.clamp(min=tiny)
    free = of_scale - of_both.square() / of_offset
    wanted = (by_scale - of_both * by_offset / of_offset) / free.clamp(min=tiny)
    wanted = torch.where(free > of_scale * 1e-5, wanted, 0)
    rounded = storable.round((scale + wanted).clamp(min=offset.abs() * SMALLEST_STEP))
    shift = (by_offset - of_both * (rounded - scale)) / of_offset
    return rounded, round_offset(offset + shift, storable.dtype)


def _spanning(
    low: torch.Tensor,
    high: torch.Tensor,
    bits: int,
    columns_per_group: int,
    storable: StorableScales,
    margin: float = 0,
) -> AffineGrid:
    """The grid whose first code is at `low` and last at `high`, [N, G] both, or `margin` codes beyond."""
    least = torch.maximum(low.abs(), high.abs()) * SMALLEST_STEP
    scale = torch.maximum((high - low) / (2**bits - 1 - 2 * margin), least)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    scale = storable.round_up(scale) if margin else storable.round(scale)
    # Centred, so that a scale that was rounded takes as much from either end. Where the range is next to nothing, the
    # first code is at its lower end instead (or the one that `margin` leaves free).
    spare = 2**bits - 1 - (high - low) / scale
    first = torch.where(spare < 2 * margin + 1, spare / 2, math.ceil(margin))
    offset = round_offset(low - first * scale, storable.dtype)
    return AffineGrid.of(scale, offset, bits, columns_per_group, storable)
