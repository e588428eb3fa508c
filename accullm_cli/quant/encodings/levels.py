"""Groups with a scale alone, whose codes are places in a table of levels: value = levels[code] * scale.

Weights are nearly normal, so that a grid of equal steps spends as many codes on its empty ends as on its middle. Levels
that lie closer where most weights are lose less: those of NF4 (arXiv 2305.14314) put as many weights on each, which is
not what loses least; these here are the ones of least squared error (Lloyd, IEEE Transactions on Information Theory 28,
1982; Max, IRE Transactions 6, 1960) for normal weights in groups of 64, each of which has its best scale, of either
sign. One level is 0, and all are whole numbers of 8 bits, which every compute format holds exactly.

A table is the same for all linears. No zero point is stored: the levels reach further on one side, and the sign of a
group's scale says on which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn.functional import pad

from accullm_cli.quant.encodings.integer import IntegerZero
from accullm_cli.quant.grid import Grid, group_range, row_chunks
from accullm_cli.quant.linear import QuantizedLinear, zero_place
from accullm_cli.quant.scales import StorableScales

if TYPE_CHECKING:
    from accullm_cli.quant.plan import LinearPlan

# By bits; the last one is the largest in magnitude.
LEVELS: Mapping[int, tuple[int, ...]] = {
    2: (-78, 0, 53, 127),
    3: (-100, -59, -28, 0, 22, 47, 78, 127),
    4: (-115, -90, -71, -56, -41, -28, -14, 0, 11, 22, 34, 47, 60, 75, 95, 127),
    5: (
        *(-125, -108, -97, -89, -81, -74, -66, -59, -52, -45, -37, -30, -23, -16, -8, 0),
        *(6, 12, 19, 26, 33, 40, 47, 54, 61, 68, 76, 83, 91, 100, 111, 127),
    ),
}
# Of normal weights in groups of 64: the squared error, over that of integer codes of MEASURED_BITS with a zero point,
# both on the grid that their search finds.
RELATIVE_DAMAGE = {2: 15.1, 3: 3.6, 4: 0.87, 5: 0.22}
# What the last level stands for, over the largest weight of its group: the search tries so many from one to the other.
# With fewer bits clipping pays more.
SEARCHED = {2: (0.5, 1.1), 3: (0.65, 1.15), 4: (0.75, 1.2), 5: (0.8, 1.2)}
CANDIDATES = 8
# Places further out than this have the last level as their nearest, on either side.
REACH = 128


class LevelSearch:
    """The scales of least importance-weighted error for some rows, each group by itself.

    With its nearest levels p for a scale, the best scale of a group is (w . p) / (p . p), whose error is
    w . w - (w . p)^2 / (p . p), products weighted by importance: so a few scales are enough to begin with.
    """

    signed: ClassVar[bool] = True  # whether the levels reach further on one side

    def __init__(
        self,
        weight: torch.Tensor,
        importance: torch.Tensor,
        held: Sequence[torch.Tensor | None],
        group_size: int,
        levels: tuple[int, ...],
    ) -> None:
        """Takes weights [R, K], the weight of each column's squared error [K], and bool [K] or None for each range to
        try: the columns without which it is that of a group."""
        count = weight.shape[1]
        size = count if group_size == -1 else group_size
        self.signs = (1, -1) if self.signed else (1,)
        self.weight = pad(weight, (0, -count % size)).unflatten(1, (-1, size))
        self.weighted = self.weight * pad(importance, (0, -count % size)).view(-1, size)
        self.importance = pad(importance, (0, -count % size)).view(-1, size)
        ranges = [group_range(weight, group_size, without)[:2] for without in held]
        self.largest = [torch.maximum(high, -low) / levels[-1] for low, high in ranges]
        low, high = ranges[0]
        # The longer end of the levels is where the largest weight is.
        spanning = torch.maximum(self.largest[0], torch.minimum(high, -low) / -levels[0])
        if self.signed:
            spanning = torch.where(high >= -low, spanning, -spanning)
        self.spanning = spanning, torch.ones_like(spanning)
        # Levels are whole numbers, so that between two halves all places have one nearest level.
        halves = torch.arange(-2 * REACH, 2 * REACH, dtype=weight.dtype, device=weight.device) / 2 + 0.5
        self.table = torch.tensor(levels, dtype=weight.dtype, device=weight.device)
        self.nearest = []
        for own in self.choices(levels):
            table = torch.tensor(own, dtype=weight.dtype, device=weight.device)
            self.nearest.append(table[torch.bucketize(halves, (table[1:] + table[:-1]) / 2)])

    def choices(self, levels: tuple[int, ...]) -> Sequence[tuple[int, ...]]:
        """What a weight may have to choose from; the error is the sum of all, as if each weight were there so often."""
        return (levels,)

    def best(self, first: float, last: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The best scales, of any size and sign (0 for zeros), and the energy of what they hold: [R, G] both.

        Args:
            first, last: what the last level stands for, over the largest weight, where the search begins and ends.
        """
        best: tuple[torch.Tensor, torch.Tensor] | None = None
        for largest, step, sign in product(self.largest, range(CANDIDATES), self.signs):
            fraction = first + (last - first) * step / (CANDIDATES - 1)
            found = self._refitted(largest * (sign * fraction))
            best = found if best is None else _better(found, best)
        assert best is not None
        return best

    def stored(self, scale: torch.Tensor, storable: StorableScales) -> torch.Tensor:
        """For each scale that of the two next to it in a table whose error is less."""
        lower, upper = storable.around(scale)
        return torch.where(self._error(lower) <= self._error(upper), lower, upper)

    def _points(self, scale: torch.Tensor) -> list[torch.Tensor]:
        """The levels that are nearest, of each table: [R, G, size]."""
        scale = torch.where(scale == 0, 1, scale)
        places = (self.weight * (2 / scale)[..., None]).ceil_().clamp_(1 - 2 * REACH, 2 * REACH)
        number = places.add_(2 * REACH - 1).int()
        return [nearest[number] for nearest in self.nearest]

    def _refitted(self, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The best scale for the levels that are nearest at this one, and what it takes off the energy of the error."""
        return self.fitted(self._points(scale), scale)

    def fitted(self, every: list[torch.Tensor], scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The best scale for some levels, [R, G, size] each, used up; and what it takes off the energy of the error."""
        along, square = torch.zeros_like(scale), torch.zeros_like(scale)
        for points in every:
            along += (self.weighted * points).sum(-1)
            square += points.square_().mul_(self.importance).sum(-1)
        fitted = torch.where(square > 0, along / square, scale)
        return fitted, along * fitted

    def _error(self, scale: torch.Tensor) -> torch.Tensor:
        error = torch.zeros_like(scale)
        for points in self._points(scale):
            error += points.mul_(scale[..., None]).sub_(self.weight).square_().mul_(self.importance).sum(-1)
        return error


def _better(
    found: tuple[torch.Tensor, torch.Tensor], best: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of two scales for each group, with their energies, the one that holds more."""
    better = found[1] > best[1]
    return torch.where(better, found[0], best[0]), torch.where(better, found[1], best[1])


class LevelGroups(IntegerZero):
    """2 to 5 bits in groups of any size, the last of which may be shorter."""

    name = "levels"
    rounds_at_random: ClassVar[bool] = False
    table_bits: ClassVar[int] = 7  # 64 magnitudes, as without a sign
    searched: ClassVar[Mapping[int, tuple[float, float]]] = SEARCHED
    search: ClassVar[type[LevelSearch]] = LevelSearch

    def levels(self, row: LinearPlan) -> tuple[int, ...]:
        return LEVELS[row.bits]

    def problem(self, row: LinearPlan) -> str:
        if row.bits not in self.searched:
            return f"is to have {row.bits} bits, and {self.name} has {min(self.searched)} to {max(self.searched)}"
        if not row.symmetric:
            return f"is to have zero points, and {self.name} has none"
        return super().problem(row)

    def relative_damage(self, row: LinearPlan) -> float:
        """See `Encoding.relative_damage`; as measured, for levels have no step."""
        return RELATIVE_DAMAGE[row.bits]

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
        assert not margin, "levels are not rounded at random"
        columns = torch.ones_like(weight[0]) if importance is None else importance.to(weight.dtype)
        if ignored is not None:
            columns = torch.where(ignored, columns * ignored_weight, columns)
        # Of all columns too, where those that need not be held count for something.
        held = [ignored, *([None] if ignored_weight else [])]
        parts = row_chunks(weight)

        def search(part: torch.Tensor) -> LevelSearch:
            return self.search(part, columns, held, row.group_size, self.levels(row))

        span = self.searched[row.bits]
        found = [search(part).spanning if importance is None else search(part).best(*span) for part in parts]
        scale, energy = (torch.cat(own) for own in zip(*found, strict=True))
        storable = StorableScales(scale_dtype, signed=self.search.signed)
        wanted, (low, high), sentences = scale, storable.range, []
        if row.scale_bits < 16:
            storable = storable.table_of(scale, energy, row.scale_bits)
            low, _ = storable.range
        clamped = int(((wanted != 0) & ((wanted.abs() < low) | (wanted.abs() > high))).sum())
        if clamped:
            of = f"{clamped} of {scale.numel()} scales"
            sentences.append(f"{of} lie outside of what can be stored, {low:.3g} to {high:.3g}, and were clamped")
        if row.scale_bits < 16 and importance is not None:
            pairs = zip(parts, wanted.split(len(parts[0])), strict=True)
            scale = torch.cat([search(part).stored(own, storable) for part, own in pairs])
        scale = storable.round(scale)
        size = weight.shape[1] if row.group_size == -1 else row.group_size
        levels = tuple(map(float, self.levels(row)))
        return Grid(scale, torch.zeros_like(scale), row.bits, size, True, storable, levels), sentences

    def store(
        self, grid: Grid, codes: torch.Tensor, row: LinearPlan, outliers: torch.Tensor, kept: torch.Tensor
    ) -> QuantizedLinear:
        """See `Encoding.store`. The codes of outlier features are that of the level 0."""
        codes[:, outliers] = zero_place(self.levels(row))
        return QuantizedLinear(
            codes=codes,
            scales=grid.scale.to(torch.float16),
            scale_table=grid.storable.table,
            zeros=None,
            outlier_index=outliers.to(torch.int32),
            outlier_weight=kept.contiguous(),
            bits=row.bits,
            group_size=row.group_size,
            levels=self.levels(row),
        )

    def from_tensors(self, tensors: Mapping[str, torch.Tensor], row: LinearPlan) -> QuantizedLinear:
        return QuantizedLinear.from_tensors(tensors, row.in_features, row.bits, row.group_size, self.levels(row))
