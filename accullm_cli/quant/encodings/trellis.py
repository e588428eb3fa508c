"""Groups with a scale alone, whose codes are a trellis: value = levels[place] * scale (see quant.trellis).

A table is its own mirror image and has 0 twice, so that either half of it (the even and the odd places) has one, and
is the other's negative: 15 numbers say all of that of 4 bits, and no scale needs a sign. The levels are the ones of
least squared error for normal weights in groups of 64, found as those of `levels` are: chains and their scales in
turns, then each level the mean of what it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from accullm_cli.quant.encodings.levels import LevelGroups, LevelSearch
from accullm_cli.quant.linear import of_table
from accullm_cli.quant.viterbi import nearest_chains

if TYPE_CHECKING:
    from accullm_cli.quant.plan import LinearPlan

# By bits: the levels above 0, of 8 bits.
ABOVE: Mapping[int, tuple[int, ...]] = {
    2: (44, 70, 127),
    3: (19, 28, 43, 57, 75, 96, 127),
    4: (9, 13, 20, 26, 32, 38, 45, 52, 60, 68, 78, 88, 99, 114, 127),
    5: (
        *(3, 5, 7, 9, 11, 13, 16, 18, 20, 22, 25, 27, 29, 32, 34, 37),
        *(39, 42, 45, 48, 51, 55, 59, 63, 67, 73, 79, 85, 93, 101, 127),
    ),
}
# By bits and group size, as `levels.RELATIVE_DAMAGE`, over the error of integer codes in groups of the same size.
RELATIVE_DAMAGE: Mapping[int, Mapping[int, float]] = {
    2: {32: 13.1, 64: 11.2, 128: 9.8},
    3: {32: 3.20, 64: 2.87, 128: 2.58},
    4: {32: 0.77, 64: 0.71, 128: 0.67},
    5: {32: 0.20, 64: 0.18, 128: 0.17},
}
SEARCHED = {2: (0.6, 1.2), 3: (0.7, 1.2), 4: (0.8, 1.2), 5: (0.85, 1.2)}
# How often chains and scales are fitted to each other before there is feedback.
FITS = 3


class TrellisSearch(LevelSearch):
    """Begins with what the halves of a table say, and fits scales and chains to each other in turns."""

    signed: ClassVar[bool] = False

    def choices(self, levels: tuple[int, ...]) -> Sequence[tuple[int, ...]]:
        """Every second level, either half as likely."""
        return levels[::2], levels[1::2]

    def best(self, first: float, last: float) -> tuple[torch.Tensor, torch.Tensor]:
        scale, energy = super().best(first, last)
        for _ in range(FITS):
            step = torch.where(scale == 0, 1, scale)[..., None].expand_as(self.weight)
            places = nearest_chains(self.weight.flatten(1), step.flatten(1), self.table)
            scale, energy = self.fitted([of_table(self.table, places).view_as(self.weight)], scale)
        return scale, energy


class TrellisGroups(LevelGroups):
    """2 to 5 bits in groups of any size, the last of which may be shorter."""

    name = "trellis"
    table_bits: ClassVar[int] = 6
    searched: ClassVar[Mapping[int, tuple[float, float]]] = SEARCHED
    search: ClassVar[type[LevelSearch]] = TrellisSearch

    def levels(self, row: LinearPlan) -> tuple[int, ...]:
        above = ABOVE[row.bits]
        return (*(-level for level in above[::-1]), 0, 0, *above)

    def relative_damage(self, row: LinearPlan) -> float:
        """See `Encoding.relative_damage`; as measured, in groups of the size that is nearest."""
        measured, size = RELATIVE_DAMAGE[row.bits], row.in_features if row.group_size == -1 else row.group_size
        return measured[min(measured, key=lambda own: abs(math.log(own / size)))]
