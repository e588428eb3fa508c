"""Scales as they are stored: any float16, or one of the few in a linear's table.

Before a weight is rounded, its group's scale is rounded to what can be stored, so that no later step changes a value:
a table then costs no accuracy but what a slightly larger or smaller scale does, which is next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# The smallest positive float16, so that a group of tiny weights keeps a scale it can be divided by.
SMALLEST_SCALE = 2.0**-24
LARGEST_SCALE = 65504.0
LARGEST_BFLOAT16_SCALE = 65280.0  # that float16 holds too
# Of a table's largest value over its smallest: groups with less than a thousandth of the largest scale round to zeros
# next to others, whatever theirs is.
LARGEST_RATIO = 1024.0


@dataclass(frozen=True)
class StorableScales:
    """The scales that one linear may have.

    dtype: "float16", or "bfloat16" for scales that are exact in both.
    table: float16 [2**scale bits], ascending; None where any scale may be stored.
    """

    dtype: str = "float16"
    table: torch.Tensor | None = None

    def round(self, scale: torch.Tensor) -> torch.Tensor:
        """The nearest of them (in a table: by their ratio), in the dtype of `scale`; never zero."""
        if self.table is None:
            return round_scale(scale, self.dtype)
        table = self.table.double()
        return table[torch.bucketize(scale.double(), (table[1:] * table[:-1]).sqrt())].to(scale.dtype)

    def round_up(self, scale: torch.Tensor) -> torch.Tensor:
        """The next larger one, or the largest of the table."""
        if self.table is not None:
            table = self.table.double()
            return table[torch.searchsorted(table, scale.double()).clamp_(max=len(table) - 1)].to(scale.dtype)
        rounded = round_scale(scale, self.dtype)
        # One step of the stored dtype's significand: what is then rounded down is still no smaller than it was.
        step = 2.0**-7 if self.dtype == "bfloat16" else 2.0**-10
        return torch.where(rounded < scale, round_scale(scale * (1 + step), self.dtype), rounded)

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest scale that is stored as it is, but for its rounding; others are clamped."""
        if self.table is not None:
            largest = float(self.table[-1])
            return max(largest / LARGEST_RATIO, SMALLEST_SCALE), largest
        return SMALLEST_SCALE, LARGEST_BFLOAT16_SCALE if self.dtype == "bfloat16" else LARGEST_SCALE

    def table_for(self, spanning: torch.Tensor, bits: int, smallest_range: float = 1.0) -> StorableScales:
        """A table of 2**bits scales for a weight, from `smallest_range` of its smallest group's to its largest's.

        Args:
            spanning: from `spanning_scales`; groups without any weight but 0 do not count.
        """
        scale = spanning[spanning > 0]
        if not len(scale):
            return self.with_table(1.0, 1.0, bits, spanning.device)
        return self.with_table(smallest_range * float(scale.min()), float(scale.max()), bits, spanning.device)

    def with_table(
        self, smallest: float, largest: float, bits: int, device: torch.device | None = None
    ) -> StorableScales:
        """A table of 2**bits scales in equal ratios between these two, both included.

        Args:
            device: where the table is wanted; it is made on the CPU, so that it is the same on every one.
        """
        largest = float(self.round_up(torch.tensor(largest, dtype=torch.float64)))
        smallest = max(smallest, largest / LARGEST_RATIO)
        exponents = torch.linspace(0, 1, 2**bits, dtype=torch.float64)
        table = self.round(smallest * (largest / smallest) ** exponents)
        return StorableScales(self.dtype, table.to(torch.float16).to(device))


def round_scale(scale: torch.Tensor, scale_dtype: str) -> torch.Tensor:
    """`scale` rounded to values that float16 holds (and bfloat16, where that is asked for), never zero."""
    rounded = scale.clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float16)
    if scale_dtype == "bfloat16":
        # A bfloat16 has fewer digits than a normal float16 and more than a subnormal one: this order is exact in both.
        rounded = rounded.to(torch.bfloat16).clamp(max=LARGEST_BFLOAT16_SCALE).to(torch.float16)
    return rounded.to(scale.dtype)


def round_offset(offset: torch.Tensor, dtype: str) -> torch.Tensor:
    """`offset` rounded to values that float16 holds (and bfloat16, where that is asked for), of either sign, or 0."""
    if dtype == "bfloat16":
        # What of it float16 holds as a subnormal has fewer digits than a bfloat16, so that the result is exact in both.
        offset = offset.clamp(-LARGEST_BFLOAT16_SCALE, LARGEST_BFLOAT16_SCALE).to(torch.bfloat16).to(offset.dtype)
    return offset.clamp(-LARGEST_SCALE, LARGEST_SCALE).to(torch.float16).to(offset.dtype)
