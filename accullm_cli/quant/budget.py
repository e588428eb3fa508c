"""A plan under one budget: the bits of every linear and its outlier features, each bit where it saves the most loss."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.plan import KEPT_BITS, LinearPlan, Plan

# log2 of the prices per bit, over what the dearest feature can save: from one that no bit is worth to one that all are.
PRICES = (-200.0, 0.0)
# Halvings of that interval.
HALVINGS = 60
# log2 of the prices of a unit of time, over that of a bit in the plan that is too slow, and halvings of that interval.
TOLLS = (-20.0, 20.0)
TOLL_HALVINGS = 14
# Than the fastest plan, where that is too slow.
MORE_TIME = 0.02
# How often what is too dear is kept, and the others go on: each time what is left over is smaller.
TURNS = 8
# Points of the curve of loss against bits, for each halving of the price.
POINTS_PER_OCTAVE = 2
# What is decided already, of linears that are chosen for together.
_Kept = Mapping[tuple[str, ...], Mapping[str, LinearPlan]]


@dataclass(frozen=True)
class Choices:
    """What there is to choose from.

    At a price per bit, each linear (or all that must be alike) takes the way to be stored and the outlier features
    whose loss and price together are least (Lagrange multipliers for discrete choices: Everett, Operations Research 11,
    1963). So nowhere does a bit save much more than elsewhere.

    plans: the linears; what is not chosen here is kept. One without losses is kept as it is.
    losses: for each linear and each group size that it may get, [K], the loss that rounding each input feature to
        MEASURED_BITS is expected to cause, in one unit for all linears. At other widths it changes as the square of
        the grid's step.
    widths: the bits that a linear may get.
    largest_fraction: of a linear's input features that may be outliers.
    most_outliers: of a linear, where that is less than its fraction.
    all_or_none: whether a linear has just as many as it may have, or none.
    rows: for each linear the ways in which it may be stored, without outliers; of one that is not in here, every width
        with every group size that it has losses for.
    partners: linears that must be stored alike, but for their outliers. One without losses follows the others.
    stored_bytes: of a linear without outliers; each of these takes `LinearPlan.outlier_bytes` more.
    time_of: what a runtime takes over a linear, outliers aside; in any unit.
    format, has_larger_groups: for a refusal: whose ways these are, and whether it has larger groups.
    """

    plans: Mapping[str, LinearPlan]
    losses: Mapping[str, Mapping[int, torch.Tensor]]
    widths: Sequence[int]
    largest_fraction: float
    rows: Mapping[str, Sequence[LinearPlan]] = field(default_factory=dict)
    partners: Sequence[tuple[str, ...]] = ()
    stored_bytes: Callable[[LinearPlan], int] = lambda plan: plan.stored_bytes
    time_of: Callable[[LinearPlan], float] = lambda plan: 0.0
    most_outliers: Mapping[str, int] = field(default_factory=dict)
    all_or_none: bool = False
    format: str = ""
    has_larger_groups: bool = True

    def within(self, bits_per_weight: float) -> Plan:
        """The plan of least expected loss that takes no more: that of the lowest price at which it fits.

        Args:
            bits_per_weight: everything stored for the linears, over their weights.

        Raises:
            AccullmError: the smallest plan takes more.
        """
        smallest = self.bits_per_weight(self.smallest())
        if smallest > bits_per_weight:
            raise AccullmError(
                f"an average of {bits_per_weight:g} bits cannot be had{f' in {self.format}' if self.format else ''}: "
                f"the smallest plan takes {math.ceil(smallest * 1000) / 1000:.3f}, scales included",
                "--bits",
                "give more"
                + (", or larger groups" if self.has_larger_groups else "")
                + (", or keep fewer" if self._keeps_some() else ""),
            )
        return self.fitting(lambda plan: self.bits_per_weight(plan) <= bits_per_weight)

    def fitting(self, fits: Callable[[Plan], bool], most_time: float = math.inf) -> Plan:
        """The plan of the lowest price at which it fits; the smallest, where none does.

        Where that one takes too much time, time has a price, too: the lowest at which it does not. Where all plans that
        fit take too much, it may take a little more than the fastest of them.

        Args:
            fits: whether a plan takes no more bytes than it may.
            most_time: of all linears, see `time_of`.
        """
        found, price = self._lowest(fits, 0.0)
        if self._time(found) <= most_time:
            return found
        # The largest matrix (an embedding may be a quarter of the file) is one step where prices need many small ones.
        largest = max(self._together(), key=lambda names: sum(self.plans[name].weights for name in names))
        every = [self._with_one_way(way) for way in self._ways(largest)]
        floors = [own._loss(own._lowest(fits, 0.0, turns=1)[0]) for own in every]
        found, _ = self._lowest(fits, price * 2.0 ** TOLLS[1], most_time)
        most_time = max(most_time, (1 + MORE_TIME) * self._time(found))
        for floor, own in sorted(zip(floors, every, strict=True), key=lambda entry: entry[0]):
            if floor >= self._loss(found):
                break
            plan = own._in_time(fits, most_time, price)
            if fits(plan) and self._time(plan) <= most_time and self._loss(plan) < self._loss(found):
                found = plan
        return found

    def _with_one_way(self, way: Mapping[str, LinearPlan]) -> Choices:
        """The same choices where some linears have none."""
        return replace(self, rows={**self.rows, **{name: [row] for name, row in way.items()}})

    def _in_time(self, fits: Callable[[Plan], bool], most_time: float, price: float) -> Plan:
        """The plan of the lowest price of time at which it is in time, in units of a price per bit."""
        low, high = TOLLS
        for _ in range(TOLL_HALVINGS):
            middle = (low + high) / 2
            plan, _ = self._lowest(fits, price * 2.0**middle, most_time, turns=1)
            low, high = (low, middle) if self._time(plan) <= most_time else (middle, high)
        return self._lowest(fits, price * 2.0**high, most_time)[0]

    def _lowest(
        self, fits: Callable[[Plan], bool], toll: float, most_time: float = math.inf, turns: int = TURNS
    ) -> tuple[Plan, float]:
        """The plan of the lowest price per bit at which it fits, with that price.

        What is too dear at any lower price (of an embedding, say, a quarter of the file) may leave room. It stays as
        it is, and the others go on to lower prices, as long as all of them together do not take too much time.

        Args:
            toll: the price of a unit of time. turns: one finds a price, less finely; the others spend what is left.
        """
        kept: dict[tuple[str, ...], dict[str, LinearPlan]] = {}
        found, price, low, high = self.smallest(), 1.0, *PRICES
        may = fits
        for turn in range(turns):
            lower = None
            for _ in range(HALVINGS if turns > 1 else HALVINGS // 2):
                middle = (low + high) / 2
                plan = self._at_price(middle, kept, toll)
                if may(plan):
                    high, found = middle, plan
                else:
                    low, lower = middle, plan
            if turn == 0:
                price = self._dearest * 2.0**high
                in_time = self._time(found) <= most_time
                may = (lambda plan: fits(plan) and self._time(plan) <= most_time) if in_time else fits
            if lower is None:
                break
            for names in self._together():
                own, dearer = ({name: plan.linears[name] for name in names} for plan in (found, lower))
                if own != dearer:
                    plan = Plan({**found.linears, **dearer})
                    if may(plan):
                        found, own = plan, dearer
                    kept[names] = own
            low = PRICES[0]
        return found, price

    def _time(self, plan: Plan) -> float:
        return sum(map(self.time_of, plan.linears.values()))

    def _loss(self, plan: Plan) -> float:
        return sum(self.loss_of(plan).values())

    def _keeps_some(self) -> bool:
        return any(plan.bits == KEPT_BITS for plan in self.plans.values())

    def bits_per_weight(self, plan: Plan) -> float:
        """Everything stored for the linears, in bits, over their weights."""
        stored = sum(map(self.stored_bytes, plan.linears.values()))
        return 8 * stored / sum(linear.weights for linear in plan.linears.values())

    def smallest(self) -> Plan:
        """The plan of the fewest bits."""
        least: dict[str, LinearPlan] = {}
        for names in self._together():
            sizes = [(sum(self.stored_bytes(row) for row in way.values()), way) for way in self._ways(names)]
            least |= min(sizes, key=lambda choice: choice[0])[1]
        return Plan({**self.plans, **least})

    def largest(self) -> Plan:
        """The plan that is best where bits cost nothing."""
        return self._at(0.0)

    def curve(self, most: float = math.inf) -> tuple[tuple[float, float], ...]:
        """(bits per weight, expected loss), from the smallest plan to the largest, or the first of `most` bits."""
        points: dict[float, float] = {}
        price, end = PRICES[1], min(most, self.bits_per_weight(self.largest()))
        while price >= PRICES[0]:
            plan = self._at_price(price)
            points[bits := self.bits_per_weight(plan)] = sum(self.loss_of(plan).values())
            if bits >= end:
                break
            price -= 1 / POINTS_PER_OCTAVE
        return tuple(sorted(points.items()))

    def loss_of(self, plan: Plan) -> dict[str, float]:
        """The expected loss of each linear under a plan; of those alone for which it is known."""
        found = {}
        for name, by_size in self.losses.items():
            linear = plan.linears[name]
            rest = by_size[linear.group_size].double().clone()
            rest[list(linear.outlier_index)] = 0
            found[name] = float(rest.sum()) * _growth(linear)
        return found

    def _at_price(self, exponent: float, kept: _Kept = MappingProxyType({}), toll: float = 0.0) -> Plan:
        """The plan at a price of 2**exponent of what the dearest feature can save, for each bit."""
        return self._at(self._dearest * 2.0**exponent, kept, toll)

    @cached_property
    def _dearest(self) -> float:
        return max((float(loss.max()) for by_size in self.losses.values() for loss in by_size.values()), default=0.0)

    def _at(self, price: float, kept: _Kept = MappingProxyType({}), toll: float = 0.0) -> Plan:
        """The plan at a price for each bit, and a toll for each unit of time; `kept` are not chosen for."""
        chosen: dict[str, LinearPlan] = {}
        for names in self._together():
            chosen |= kept[names] if names in kept else self._best(names, price, toll)
        return Plan({**self.plans, **chosen})

    def _together(self) -> Iterator[tuple[str, ...]]:
        """Names that are chosen for at once: partners, and each linear that has none."""
        alone = dict.fromkeys(self.losses)
        for partners in self.partners:
            names = tuple(name for name in partners if self.plans[name].bits != KEPT_BITS)
            if any(name in self.losses for name in names):
                yield names
            for name in names:
                alone.pop(name, None)
        for name in alone:
            yield (name,)

    def _ways(self, names: tuple[str, ...]) -> list[dict[str, LinearPlan]]:
        """The ways to store some linears alike, without outliers."""
        rows = [{_scheme(row): row for row in self._rows(name)} for name in names]
        common = [scheme for scheme in rows[0] if all(scheme in own for own in rows)]
        return [{name: own[scheme] for name, own in zip(names, rows, strict=True)} for scheme in common]

    def _rows(self, name: str) -> Sequence[LinearPlan]:
        """The ways to store a linear, without outliers."""
        if name in self.rows:
            return self.rows[name]
        plan = self.plans[name]
        return [
            replace(plan, bits=bits, group_size=size, outlier_index=())
            for size in self.losses[name]
            for bits in self.widths
        ]

    def _best(self, names: tuple[str, ...], price: float, toll: float) -> dict[str, LinearPlan]:
        """The cheapest choice for some linears that are stored alike: loss + price * bits + toll * time."""
        least, chosen = math.inf, []
        for way in self._options[names]:
            counts = [option.count(price, self.all_or_none) for option in way]
            cost = sum(option.cost(count, price, toll) for option, count in zip(way, counts, strict=True))
            if cost < least:
                least, chosen = cost, list(zip(way, counts, strict=True))
        return {option.row.name: option.with_outliers(count) for option, count in chosen}

    @cached_property
    def _options(self) -> dict[tuple[str, ...], list[list[_Option]]]:
        """For linears that are stored alike each way to store them, with what it takes to judge it at a price."""
        ranked = {
            (name, size): _Ranked.of(loss, self._largest_count(name))
            for name, by_size in self.losses.items()
            for size, loss in by_size.items()
        }
        nothing = _Ranked((), (), (0.0,))
        return {
            names: [
                [
                    _Option(
                        row,
                        self.stored_bytes(row),
                        self.time_of(row),
                        _growth(row),
                        ranked.get((name, row.group_size), nothing),
                    )
                    for name, row in way.items()
                ]
                for way in self._ways(names)
            ]
            for names in self._together()
        }

    def _largest_count(self, name: str) -> int:
        """How many outlier features a linear may have."""
        largest = int(self.largest_fraction * self.plans[name].in_features)
        most = self.most_outliers.get(name, largest)
        if self.all_or_none:
            return most if most <= largest else 0
        return min(most, largest)


@dataclass(frozen=True)
class _Ranked:
    """The features of a linear that may be outliers, by descending loss.

    order: the features. falling: their losses, negated. rest: the loss of all other features, with none of these an
    outlier, with the first, with the first two, ...
    """

    order: tuple[int, ...]
    falling: tuple[float, ...]
    rest: tuple[float, ...]

    @classmethod
    def of(cls, loss: torch.Tensor, count: int) -> _Ranked:
        """Of losses [K], at most `count` of which may be outliers."""
        losses, order = torch.sort(loss.double(), descending=True, stable=True)
        rest = torch.cat([losses.flip(0).cumsum(0).flip(0), losses.new_zeros(1)])
        return cls(tuple(order[:count].tolist()), tuple((-losses[:count]).tolist()), tuple(rest[: count + 1].tolist()))


@dataclass(frozen=True)
class _Option:
    """One way to store a linear.

    row: without outliers. stored_bytes, time: of the row. growth: of its losses at its width.
    """

    row: LinearPlan
    stored_bytes: int
    time: float
    growth: float
    ranked: _Ranked

    def count(self, price: float, all_or_none: bool) -> int:
        """How many outlier features save more than their bits cost."""
        most, of_one = len(self.ranked.order), 8 * price * self.row.outlier_bytes
        if all_or_none:
            saved = (self.ranked.rest[0] - self.ranked.rest[most]) * self.growth
            return most if saved > of_one * most else 0
        return bisect_left(self.ranked.falling, -of_one / self.growth)

    def cost(self, count: int, price: float, toll: float) -> float:
        """Loss, price of the bits and of the time, with so many outlier features."""
        bits = 8 * (self.stored_bytes + self.row.outlier_bytes * count)
        return self.ranked.rest[count] * self.growth + price * bits + toll * self.time

    def with_outliers(self, count: int) -> LinearPlan:
        return self.row if not count else replace(self.row, outlier_index=tuple(sorted(self.ranked.order[:count])))


def _scheme(row: LinearPlan) -> tuple[object, ...]:
    """What is alike in linears that are stored alike."""
    return row.encoding, row.bits, row.group_size, row.scale_bits, row.symmetric


def _growth(row: LinearPlan) -> float:
    """What a loss measured at MEASURED_BITS is multiplied by for another way to store a linear."""
    return ENCODINGS[row.encoding].relative_damage(row)
