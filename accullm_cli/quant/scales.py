"""Scales as they are stored: any float16, or one of the few in a linear's table.

Before a weight is rounded, its group's scale is rounded to what can be stored, so that no later step changes a value:
a table then costs no accuracy but what a slightly larger or smaller scale does, which is next to nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

# The smallest positive float16, so that a group of tiny weights keeps a scale it can be divided by.
SMALLEST_SCALE = 2.0**-24
LARGEST_SCALE = 65504.0
LARGEST_BFLOAT16_SCALE = 65280.0  # that float16 holds too
# Of a table's largest value over its smallest: groups with less than a thousandth of the largest scale round to zeros
# next to others, whatever theirs is.
LARGEST_RATIO = 1024.0
# How finely the density of a linear's scales is told, over how many of these bins it is smoothed, and how much of its
# largest it has at least.
DENSITY_BINS = 256
SMOOTHED = 9
LEAST_DENSITY = 1e-3
# Of the logarithms of scales that are all alike.
LEAST_WIDTH = 1e-6


@dataclass(frozen=True)
class StorableScales:
    """The scales that one linear may have.

    dtype: "float16", or "bfloat16" for scales that are exact in both.
    table: float16 [2**scale bits], ascending; None where any scale may be stored.
    signed: scales of either sign; a table has each of its magnitudes twice.
    """

    dtype: str = "float16"
    table: torch.Tensor | None = None
    signed: bool = False

    def round(self, scale: torch.Tensor) -> torch.Tensor:
        """The nearest of them (in a table: by their ratio), in the dtype of `scale`; never zero."""
        if self.signed:
            return torch.copysign(self._magnitudes().round(scale.abs()), scale)
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

    def around(self, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a table the two next to each scale in magnitude, of its sign; the last one twice for what lies beyond."""
        table = self._magnitudes().table
        assert table is not None
        table = table.to(scale.dtype)
        place = torch.searchsorted(table, scale.abs()).clamp_(max=len(table) - 1)
        lower, upper = table[(place - 1).clamp_(min=0)], table[place]
        return torch.copysign(lower, scale), torch.copysign(upper, scale)

    def _magnitudes(self) -> StorableScales:
        table = self.table
        return StorableScales(self.dtype, None if table is None else table[len(table) // 2 :]) if self.signed else self

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

    def table_of(self, scale: torch.Tensor, energy: torch.Tensor, bits: int) -> StorableScales:
        """A table of 2**bits for the scales [N, G] that groups would have without; of signed ones half as many
        magnitudes, each twice.

        A group loses its energy times the square of its scale's relative error. So in logarithms, from the smallest to
        the largest, magnitudes lie as the cube root of the energy at a place (Panter and Dite, Proceedings of the IRE
        39, 1951). The table is made on the CPU, so that it is the same on every device.

        Args:
            scale: 0 for groups that do not count. energy: [N, G], 0 or more.
        """
        places, energy = scale.abs().cpu().double(), energy.cpu().double()
        counts = places > 0
        places, energy = places[counts].log(), energy[counts]
        count = 2 ** (bits - 1 if self.signed else bits)
        if not len(places):
            places, energy = places.new_zeros(1), places.new_ones(1)
        high = float(places.max())
        low = max(float(places.min()), high - math.log(LARGEST_RATIO))
        bins = ((places - low) * (DENSITY_BINS / max(high - low, LEAST_WIDTH))).clamp_(0, DENSITY_BINS - 1).long()
        density = energy.new_zeros(DENSITY_BINS).index_add_(0, bins, energy)
        smooth = torch.nn.functional.avg_pool1d(density[None], SMOOTHED, 1, SMOOTHED // 2, count_include_pad=False)[0]
        parts = (
            (smooth + (LEAST_DENSITY * smooth.max()).clamp(min=torch.finfo(smooth.dtype).tiny)).pow_(1 / 3).cumsum(0)
        )
        parts = torch.cat([parts.new_zeros(1), parts / parts[-1]])
        wanted = torch.linspace(0, 1, count, dtype=torch.float64)
        bin = torch.searchsorted(parts, wanted).clamp_(1, DENSITY_BINS)
        within = (wanted - parts[bin - 1]) / (parts[bin] - parts[bin - 1])
        magnitudes = (low + (high - low) * (bin - 1 + within) / DENSITY_BINS).exp()
        table = round_scale(magnitudes, self.dtype).to(torch.float16)
        if self.signed:
            table = torch.cat([-table.flip(0), table])
        return replace(self, table=table.to(scale.device))

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
