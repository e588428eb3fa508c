"""Groups with a scale and a whole zero point: value = (code - zero) * scale.

A scale is a float16 (or a value that bfloat16 holds as well), or its place in a table that the linear has; a zero point
is one of the codes, and not stored where it is the middle one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch

from accullm_cli.quant.encodings.base import OUTLIER_SUFFIXES, Encoding
from accullm_cli.quant.grid import SEARCHED_RANGES, Grid, minmax_grid, searched_grid, spanning_scales
from accullm_cli.quant.linear import QuantizedLinear
from accullm_cli.quant.packing import packed_length
from accullm_cli.quant.scales import StorableScales

if TYPE_CHECKING:
    from accullm_cli.quant.plan import LinearPlan

WIDTHS = range(2, 9)


class IntegerZero(Encoding):
    """2 to 8 bits in groups of any size, the last of which may be shorter; symmetric or not."""

    name = "integer"
    suffixes = ("qweight", "scales", "qscales", "scale_table", "qzeros", *OUTLIER_SUFFIXES)
    first_zero: ClassVar[int] = 0

    def problem(self, row: LinearPlan) -> str:
        if row.bits not in WIDTHS:
            return f"is to have {row.bits} bits"
        if row.group_size < 1 and row.group_size != -1:
            return f"is to have group size {row.group_size}"
        return ""

    def stored_bytes(self, row: LinearPlan) -> int:
        zeros = 0 if row.symmetric else packed_length(row.groups, row.bits)
        scales = packed_length(row.groups, row.scale_bits)
        table = 0 if row.scale_bits == 16 else 2 * 2**row.scale_bits
        return row.out_features * (packed_length(row.in_features, row.bits) + scales + zeros) + table

    def grid(
        self,
        weight: torch.Tensor,
        row: LinearPlan,
        scale_dtype: str,
        importance: torch.Tensor | None = None,
        ignored: torch.Tensor | None = None,
        margin: float = 0,
        ignored_weight: float = 0,
    ) -> tuple[Grid, list[str]]:
        scheme = row.bits, row.group_size, row.symmetric
        storable = StorableScales(scale_dtype)
        scale = spanning_scales(weight, *scheme, ignored, margin)
        if row.scale_bits < 16:
            storable = storable.table_for(scale, row.scale_bits, 1.0 if importance is None else SEARCHED_RANGES[-1])
        low, high = storable.range
        clamped = int((((scale > 0) & (scale < low)) | (scale > high)).sum())
        sentences = []
        if clamped:
            of = f"{clamped} of {scale.numel()} scales"
            sentences.append(f"{of} lie outside of what can be stored, {low:.3g} to {high:.3g}, and were clamped")
        if importance is None:
            return minmax_grid(weight, *scheme, storable, ignored, margin, self.first_zero), sentences
        return searched_grid(weight, importance, *scheme, storable, ignored, self.first_zero, ignored_weight), sentences

    def store(
        self, grid: Grid, codes: torch.Tensor, row: LinearPlan, outliers: torch.Tensor, kept: torch.Tensor
    ) -> QuantizedLinear:
        """See `Encoding.store`. The codes of outlier features become the zero point, so that they add exactly 0."""
        codes[:, outliers] = grid.zero[:, outliers // grid.columns_per_group].to(torch.uint8)
        return QuantizedLinear(
            codes=codes,
            scales=grid.scale.to(torch.float16),
            scale_table=grid.storable.table,
            zeros=None if row.symmetric else grid.zero.to(torch.uint8),
            outlier_index=outliers.to(torch.int32),
            outlier_weight=kept.contiguous(),
            bits=row.bits,
            group_size=row.group_size,
        )

    def from_tensors(self, tensors: Mapping[str, torch.Tensor], row: LinearPlan) -> QuantizedLinear:
        return QuantizedLinear.from_tensors(tensors, row.in_features, row.bits, row.group_size)


class PositiveZero(IntegerZero):
    """The same with zero points from 1, for readers that store them less one: of 0 they would make something else."""

    name = "integer from 1"
    first_zero = 1
