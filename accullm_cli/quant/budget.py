"""A plan under one budget: the bits of every linear and its outlier features, each bit where it saves the most loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.quant.plan import LinearPlan, Plan

# The width that losses are given for.
MEASURED_BITS = 4
# log2 of the prices per bit, over what the dearest feature can save: from one that no bit is worth to one that all are.
PRICES = (-200.0, 0.0)
# Halvings of that interval.
HALVINGS = 60
# Points of the curve of loss against bits, for each halving of the price.
POINTS_PER_OCTAVE = 2


@dataclass(frozen=True)
class Choices:
    """What there is to choose from.

    At a price per bit, each linear for itself takes the width, the group size and the outlier features whose loss and
    price together are least (Lagrange multipliers for discrete choices: Everett, Operations Research 11, 1963). So
    nowhere does a bit save much more than elsewhere.

    plans: the linears; what is not chosen here is kept. One without losses is kept as it is.
    losses: for each linear and each group size that it may get, [K], the loss that rounding each input feature to
        MEASURED_BITS is expected to cause, in one unit for all linears. At other widths it changes as the square of
        the grid's step.
    widths: the bits that a linear may get.
    largest_fraction: of a linear's input features that may be outliers.
    """

    plans: Mapping[str, LinearPlan]
    losses: Mapping[str, Mapping[int, torch.Tensor]]
    widths: Sequence[int]
    largest_fraction: float

    def within(self, bits_per_weight: float) -> Plan:
        """The plan of least expected loss that takes no more: that of the lowest price at which it fits.

        Args:
            bits_per_weight: everything stored for the linears, over their weights.

        Raises:
            AccullmError: the smallest plan takes more.
        """
        found = self.smallest()
        if found.bits_per_weight > bits_per_weight:
            raise AccullmError(
                f"an average of {bits_per_weight:g} bits cannot be had: the smallest plan takes "
                f"{found.bits_per_weight:.3f}, scales included",
                "--bits",
                "give more, or larger groups" + (", or keep fewer" if self._keeps_some() else ""),
            )
        low, high = PRICES
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            plan = self._at_price(middle)
            if plan.bits_per_weight > bits_per_weight:
                low = middle
            else:
                high, found = middle, plan
        return found

    def _keeps_some(self) -> bool:
        return any(plan.bits == 16 for plan in self.plans.values())

    def smallest(self) -> Plan:
        """The plan of the fewest bits."""
        least = {}
        for name, by_size in self.losses.items():
            own = [
                replace(self.plans[name], bits=min(self.widths), group_size=size, outlier_index=()) for size in by_size
            ]
            least[name] = min(own, key=lambda plan: plan.stored_bytes)
        return Plan({**self.plans, **least})

    def largest(self) -> Plan:
        """The plan that is best where bits cost nothing."""
        return self._at(0.0)

    def curve(self, most: float = math.inf) -> tuple[tuple[float, float], ...]:
        """(bits per weight, expected loss), from the smallest plan to the largest, or the first of `most` bits."""
        points: dict[float, float] = {}
        price, end = PRICES[1], min(most, self.largest().bits_per_weight)
        while price >= PRICES[0]:
            plan = self._at_price(price)
            points[plan.bits_per_weight] = sum(self.loss_of(plan).values())
            if plan.bits_per_weight >= end:
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
            found[name] = float(rest.sum()) * _growth(linear.bits)
        return found

    def _at_price(self, exponent: float) -> Plan:
        """The plan at a price of 2**exponent of what the dearest feature can save, for each bit."""
        dearest = max((float(loss.max()) for by_size in self.losses.values() for loss in by_size.values()), default=0.0)
        return self._at(dearest * 2.0**exponent)

    def _at(self, price: float) -> Plan:
        """The plan at a price for each bit."""
        chosen = {name: self._best(self.plans[name], by_size, price) for name, by_size in self.losses.items()}
        return Plan({**self.plans, **chosen})

    def _best(self, plan: LinearPlan, losses: Mapping[int, torch.Tensor], price: float) -> LinearPlan:
        """The cheapest choice for one linear: loss + price * bits."""
        of_an_outlier = price * 8 * (plan.source_itemsize * plan.out_features + 4)
        most = int(self.largest_fraction * plan.in_features)
        choices: list[tuple[float, LinearPlan]] = []
        for size, loss in losses.items():
            sorted_loss, order = torch.sort(loss.double(), descending=True, stable=True)
            for bits in self.widths:
                left = sorted_loss * _growth(bits)
                count = min(int((left > of_an_outlier).sum()), most)
                outliers = tuple(sorted(order[:count].tolist()))
                chosen = replace(plan, bits=bits, group_size=size, outlier_index=outliers)
                choices.append((float(left[count:].sum()) + price * 8 * chosen.stored_bytes, chosen))
        return min(choices, key=lambda choice: choice[0])[1]


def _growth(bits: int) -> float:
    """What a loss measured at MEASURED_BITS is multiplied by at another width: the square of the step's growth."""
    return float(((2**MEASURED_BITS - 1) / (2**bits - 1)) ** 2)
