"""A plan under one budget: the bits of every linear and its outlier features, each bit where it saves the most loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.quant.plan import LinearPlan, Plan

# The width that losses are given for.
MEASURED_BITS = 4
# Halvings of the interval of prices, which spans a factor of 2**200 around the dearest and the cheapest bit.
HALVINGS = 60


def plan_within(
    plans: Mapping[str, LinearPlan],
    losses: Mapping[str, torch.Tensor],
    bits_per_weight: float,
    widths: Sequence[int],
    largest_fraction: float,
) -> dict[str, LinearPlan]:
    """The plan of least expected loss that takes no more than `bits_per_weight`.

    At a price per bit, each linear for itself takes the width and the outlier features whose loss and price together
    are least; the lowest price at which all of it fits the budget is found by bisection (Lagrange multipliers for
    discrete choices: Everett, Operations Research 11, 1963). So nowhere does a bit save much more than elsewhere.

    Args:
        plans: the linears; their group size and symmetry are kept. One without losses is kept as it is.
        losses: [K], the loss that rounding each input feature to MEASURED_BITS is expected to cause, in one unit for
            all linears. At other widths it changes as the square of the grid's step.
        bits_per_weight: everything stored for the linears, over their weights.
        widths: the bits that a linear may get.
        largest_fraction: of a linear's input features that may be outliers.

    Raises:
        AccullmError: the smallest plan takes more.
    """

    def at_price(price: float) -> Plan:
        chosen = {name: _best(plans[name], loss, price, widths, largest_fraction) for name, loss in losses.items()}
        return Plan({**plans, **chosen})

    least = {name: replace(plans[name], bits=min(widths), outlier_index=()) for name in losses}
    smallest = Plan({**plans, **least})
    if smallest.bits_per_weight > bits_per_weight:
        raise AccullmError(
            f"an average of {bits_per_weight:g} bits cannot be had: the smallest plan takes "
            f"{smallest.bits_per_weight:.3f}, scales included",
            "--bits",
            "give more, or larger groups",
        )
    dearest = max((float(loss.max()) for loss in losses.values()), default=0.0)
    low, high = -200.0, 0.0  # log2 of the price over what no bit can save
    found = smallest
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        plan = at_price(dearest * 2.0**middle)
        if plan.bits_per_weight > bits_per_weight:
            low = middle
        else:
            high, found = middle, plan
    return dict(found.linears)


def _best(
    plan: LinearPlan, loss: torch.Tensor, price: float, widths: Sequence[int], largest_fraction: float
) -> LinearPlan:
    """The cheapest choice for one linear: loss + price * bits."""
    of_an_outlier = price * 8 * (plan.source_itemsize * plan.out_features + 4)
    most = int(largest_fraction * plan.in_features)
    choices: list[tuple[float, LinearPlan]] = []
    for bits in widths:
        step = (2**MEASURED_BITS - 1) / (2**bits - 1)
        left, order = torch.sort(loss.double() * step**2, descending=True, stable=True)
        count = min(int((left > of_an_outlier).sum()), most)
        chosen = replace(plan, bits=bits, outlier_index=tuple(sorted(order[:count].tolist())))
        choices.append((float(left[count:].sum()) + price * 8 * chosen.stored_bytes, chosen))
    return min(choices, key=lambda choice: choice[0])[1]
