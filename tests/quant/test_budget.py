"""The plan under a budget against all plans there are, and what the field expects of one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accullm_cli.errors import AccullmError
from accullm_cli.quant.budget import Choices
from accullm_cli.quant.plan import LinearPlan, Plan

WIDTHS = (3, 4, 5, 6, 8)


def linear(name: str, rows: int = 32, columns: int = 64, **changes: object) -> LinearPlan:
    return replace(LinearPlan(name, rows, columns, 4, 16, False), **changes)


def plan_within(
    plans: dict[str, LinearPlan], losses: dict[str, torch.Tensor], bits: float, widths: tuple[int, ...], fraction: float
) -> dict[str, LinearPlan]:
    by_size = {name: {plans[name].group_size: loss} for name, loss in losses.items()}
    return dict(Choices(plans, by_size, widths, fraction).within(bits).linears)


def loss_of(plan: LinearPlan, loss: torch.Tensor) -> float:
    """What is left of the loss under a plan: outliers save theirs, and a step of half the size a quarter."""
    rest = loss.clone().double()
    rest[list(plan.outlier_index)] = 0
    return float(rest.sum()) * (15 / (2**plan.bits - 1)) ** 2


def best_at_a_price(all_plans: Iterable[Iterable[tuple[int, float]]], most: int) -> float:
    """The loss of the largest plan of at most so many bytes that is the best at some price per byte.

    By brute force: the last corner of the lower convex hull of (bytes, loss), which comes before that size.
    """
    sizes_and_losses = ((sum(size for size, _ in own), sum(loss for _, loss in own)) for own in map(list, all_plans))
    corners: list[tuple[int, float]] = []
    for size, loss in sorted(sizes_and_losses):
        if corners and loss >= corners[-1][1]:
            continue
        while len(corners) > 1:
            (before, high), (last, low) = corners[-2:]
            if (low - high) * (size - before) < (loss - high) * (last - before):
                break
            corners.pop()
        corners.append((size, loss))
    return [loss for size, loss in corners if size <= most][-1]


def random_losses(names: tuple[str, ...], columns: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.exp(2 * torch.randn(columns, generator=generator))
        * 10.0 ** float(torch.randn(1, generator=generator))
        for name in names
    }


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 999), st.floats(4.6, 8), st.floats(0, 0.1))
def test_no_plan_of_the_same_size_is_much_better(seed: int, budget: float, fraction: float) -> None:
    """All widths of three linears, and all counts of the best outliers: 5^3 times 7^3 plans at most.

    A price cannot reach every budget, so what is left over may not be used in the best of all ways.
    """
    names = ("a", "b", "c")
    plans = {name: linear(name) for name in names}
    losses = random_losses(names, 64, seed)
    found = plan_within(plans, losses, budget, WIDTHS, fraction)
    used = Plan(found).bits_per_weight
    assert used <= budget
    reached = sum(loss_of(found[name], losses[name]) for name in names)
    choices: dict[str, list[tuple[int, float]]] = {}
    for name in names:
        order = torch.argsort(losses[name], descending=True).tolist()
        own = [
            replace(plans[name], bits=bits, outlier_index=tuple(sorted(order[:count])))
            for bits, count in itertools.product(WIDTHS, range(int(fraction * 64) + 1))
        ]
        choices[name] = [(plan.stored_bytes, loss_of(plan, losses[name])) for plan in own]
    best = best_at_a_price(itertools.product(*choices.values()), int(budget * 3 * 32 * 64 / 8))
    assert reached <= best * (1 + 1e-9)


def test_a_linear_that_matters_more_gets_more_bits() -> None:
    plans = {name: linear(name) for name in "abc"}
    losses = {"a": torch.ones(64), "b": 16 * torch.ones(64), "c": torch.ones(64) / 16}
    found = plan_within(plans, losses, 5.4, WIDTHS, 0.0)
    assert found["a"].bits < found["b"].bits
    assert found["c"].bits < found["a"].bits
    assert all(plan.outlier_index == () for plan in found.values())


def test_a_feature_that_matters_a_thousand_times_more_is_an_outlier() -> None:
    losses = {"a": torch.ones(64), "b": torch.ones(64)}
    losses["a"][[5, 40]] = 1000.0
    found = plan_within({"a": linear("a"), "b": linear("b")}, losses, 6.0, WIDTHS, 0.05)
    assert found["a"].outlier_index == (5, 40)
    assert found["b"].outlier_index == ()


def test_a_linear_without_loss_gets_least() -> None:
    found = plan_within(
        {"a": linear("a"), "b": linear("b")}, {"a": torch.zeros(64), "b": torch.ones(64)}, 5.5, WIDTHS, 0.1
    )
    assert (found["a"].bits, found["a"].outlier_index) == (3, ())
    assert found["b"].bits > 4


def test_without_any_loss_the_plan_is_the_smallest() -> None:
    found = plan_within({"a": linear("a")}, {"a": torch.zeros(64)}, 8.0, WIDTHS, 0.1)
    assert found["a"].bits == 3


def test_layout_and_name_are_kept() -> None:
    plan = linear("a", group_size=-1, symmetric=True)
    found = plan_within({"a": plan}, {"a": torch.ones(64)}, 7.0, WIDTHS, 0.0)["a"]
    assert replace(found, bits=4) == plan


def test_a_budget_that_no_plan_meets_is_refused() -> None:
    with pytest.raises(AccullmError) as caught:
        plan_within({"a": linear("a")}, {"a": torch.ones(64)}, 3.5, WIDTHS, 0.1)
    # 3 bits, a 16-bit scale and a 3-bit zero point for each 16 weights, rows of zero points filled up to bytes.
    assert caught.value.line() == (
        "--bits: an average of 3.5 bits cannot be had: the smallest plan takes 4.250, scales included; "
        "give more, or larger groups"
    )


def test_only_the_widths_asked_for_are_used() -> None:
    losses = random_losses(("a", "b", "c"), 64, seed=1)
    found = plan_within({name: linear(name) for name in "abc"}, losses, 5.6, (4,), 0.1)
    assert {plan.bits for plan in found.values()} == {4}
    assert sum(len(plan.outlier_index) for plan in found.values()) > 0


def test_a_linear_of_unknown_loss_is_kept_and_counted() -> None:
    kept = linear("b", bits=8)
    found = plan_within({"a": linear("a"), "b": kept}, {"a": torch.ones(64)}, 7.4, WIDTHS, 0.0)
    assert found["b"] == kept
    assert list(found) == ["a", "b"]
    assert Plan(found).bits_per_weight <= 7.4
    assert found["a"].bits == 4


def test_the_curve_is_that_of_the_plans() -> None:
    """Every point is what the plan within its bits takes and costs; loss falls where bits rise."""
    names = ("a", "b", "c")
    losses = random_losses(names, 64, seed=2)
    choices = Choices({name: linear(name) for name in names}, {name: {16: losses[name]} for name in names}, WIDTHS, 0.1)
    curve = choices.curve()
    assert len(curve) > 10
    assert curve[0][0] == choices.smallest().bits_per_weight
    assert {plan.bits for plan in choices.within(curve[-1][0]).linears.values()} == {8}
    assert all(later[0] > earlier[0] and later[1] < earlier[1] for earlier, later in itertools.pairwise(curve))
    for bits, loss in curve:
        plan = choices.within(bits)
        assert plan.bits_per_weight == bits
        own = sum(loss_of(plan.linears[name], losses[name]) for name in names)
        assert own == pytest.approx(sum(choices.loss_of(plan).values()), rel=1e-12)
        assert own <= loss * (1 + 1e-9)


def test_a_curve_of_one_width_goes_on_to_the_most_outliers() -> None:
    """By its first plan everything has the largest width, and yet there is more to spend on."""
    names = ("a", "b", "c")
    losses = random_losses(names, 64, seed=2)
    choices = Choices({name: linear(name) for name in names}, {name: {16: losses[name]} for name in names}, (4,), 0.1)
    curve = choices.curve()
    assert curve[0][0] == choices.smallest().bits_per_weight
    assert curve[-1][0] == choices.largest().bits_per_weight
    assert {len(plan.outlier_index) for plan in choices.largest().linears.values()} == {6}
    assert len(curve) > 10
    assert all(later[0] > earlier[0] and later[1] < earlier[1] for earlier, later in itertools.pairwise(curve))
    middle = curve[len(curve) // 2][0]
    assert choices.curve(middle) == curve[: len(curve) // 2 + 1]


def test_a_curve_with_nothing_to_spend_on_is_a_point() -> None:
    choices = Choices({"a": linear("a")}, {"a": {16: torch.ones(64)}}, (4,), 0.0)
    assert [bits for bits, _ in choices.curve()] == [choices.smallest().bits_per_weight]


def test_the_group_size_is_chosen_too() -> None:
    """Smaller groups where they save more than their scales cost, larger ones where they cost next to nothing."""
    losses = {"a": {8: torch.ones(64), 32: 8 * torch.ones(64)}, "b": {8: torch.ones(64), 32: 1.01 * torch.ones(64)}}
    choices = Choices({name: linear(name) for name in "ab"}, losses, (4,), 0.0)
    found = choices.within(5.9)
    assert (found.linears["a"].group_size, found.linears["b"].group_size) == (8, 32)
    assert choices.loss_of(found) == pytest.approx({"a": 64, "b": 64.64})
    assert {plan.group_size for plan in choices.smallest().linears.values()} == {32}


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.floats(4.6, 8))
def test_partners_are_stored_alike_and_no_such_plan_of_the_same_size_is_much_better(seed: int, budget: float) -> None:
    """Against all plans in which a and b have one width and one group size."""
    plans = {"a": linear("a"), "b": linear("b", rows=16), "c": linear("c")}
    losses = {
        name: {size: loss * size**0.5 for size in (16, 32)}
        for name, loss in random_losses(("a", "b", "c"), 64, seed).items()
    }
    choices = Choices(plans, losses, WIDTHS, 0.0, partners=(("a", "b"),))
    found = choices.within(budget)
    assert found.linears["a"].bits == found.linears["b"].bits
    assert found.linears["a"].group_size == found.linears["b"].group_size

    def total(own: dict[str, LinearPlan]) -> float:
        return sum(loss_of(plan, losses[name][plan.group_size]) for name, plan in own.items())

    schemes = list(itertools.product(WIDTHS, (16, 32)))
    every = []
    for (bits, size), (other_bits, other_size) in itertools.product(schemes, schemes):
        own = {name: replace(plans[name], bits=bits, group_size=size) for name in "ab"}
        own["c"] = replace(plans["c"], bits=other_bits, group_size=other_size)
        every.append([(sum(plan.stored_bytes for plan in own.values()), total(own))])
    best = best_at_a_price(every, int(budget * 80 * 64 / 8))
    assert total(dict(found.linears)) <= best * (1 + 1e-9)


def test_a_partner_of_unknown_loss_follows_the_others() -> None:
    plans = {name: linear(name) for name in "abc"}
    losses = {"a": {16: 100 * torch.ones(64)}, "c": {16: torch.ones(64)}}
    rows = {"b": [replace(plans["b"], bits=bits) for bits in WIDTHS]}
    found = Choices(plans, losses, WIDTHS, 0.0, rows, (("a", "b"),)).within(6.9).linears
    assert found["a"].bits == found["b"].bits > found["c"].bits


def test_bytes_are_those_of_the_format_that_is_planned_for() -> None:
    """Where each linear takes half a bit a weight more, less is left for its weights."""
    plans, losses = {"a": linear("a")}, {"a": {16: torch.ones(64)}}
    whole = Choices(plans, losses, WIDTHS, 0.0, stored_bytes=lambda plan: plan.stored_bytes + 128)
    assert Choices(plans, losses, WIDTHS, 0.0).within(7.5).linears["a"].bits == 6
    found = whole.within(7.5)
    assert found.linears["a"].bits == 5
    assert whole.bits_per_weight(found) == 8 * (found.linears["a"].stored_bytes + 128) / 2048


# -- outliers in an adapter --------------------------------------------------------------------------------


def in_adapter(name: str, **changes: object) -> LinearPlan:
    return linear(name, adapter="peft", **changes)


def test_an_outlier_is_weighed_against_what_it_takes() -> None:
    """A feature takes 8 * (2 * 32 + 4) = 544 bits in the file and 8 * (64 + 2 * 32) = 1024 in an adapter."""
    loss = torch.full((64,), 0.01)
    loss[:6] = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5, 0.3])
    counts = {}
    for plan in (linear("a"), in_adapter("a")):
        choices = Choices({"a": plan}, {"a": {16: loss}}, (4,), 0.1)
        bits = choices.bits_per_weight(choices.smallest()) + 2112 / (32 * 64)
        found = choices.within(bits)
        counts[plan.adapter] = len(found.linears["a"].outlier_index)
        assert choices.bits_per_weight(found) <= bits
    assert counts == {"": 3, "peft": 2}


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 999), st.floats(4.6, 8), st.integers(0, 6), st.booleans())
def test_no_plan_with_limited_outliers_is_much_better(seed: int, budget: float, most: int, all_or_none: bool) -> None:
    """As above, with at most so many features in "a" and "b", or just as many or none, and none in "c"."""
    names = ("a", "b", "c")
    plans = {name: in_adapter(name) for name in names}
    losses = random_losses(names, 64, seed)
    limits = {"a": most, "b": most, "c": 0}
    choices = Choices(
        plans, {name: {16: losses[name]} for name in names}, WIDTHS, 0.1, most_outliers=limits, all_or_none=all_or_none
    )
    found = choices.within(budget).linears
    reached, used = sum(loss_of(found[name], losses[name]) for name in names), Plan(found).bits_per_weight
    assert used <= budget
    options: dict[str, list[LinearPlan]] = {}
    for name in names:
        order = torch.sort(losses[name].double(), descending=True, stable=True).indices.tolist()
        counts = {0, limits[name]} if all_or_none else range(limits[name] + 1)
        assert len(found[name].outlier_index) in counts
        options[name] = [
            replace(plans[name], bits=bits, outlier_index=tuple(sorted(order[:count])))
            for bits in WIDTHS
            for count in counts
        ]
    every = (
        [(row.stored_bytes, loss_of(row, losses[row.name])) for row in rows]
        for rows in itertools.product(*options.values())
    )
    assert reached <= best_at_a_price(every, int(budget * 3 * 32 * 64 / 8)) * (1 + 1e-9)


def test_what_one_linear_is_too_large_for_goes_to_the_others() -> None:
    """A step of the large one takes 16 times what one of a small one does."""
    plans = {"large": linear("large", rows=512), "a": linear("a"), "b": linear("b")}
    losses = {"large": {16: 4 * torch.ones(64)}, "a": {16: 0.01 * torch.ones(64)}, "b": {16: 0.02 * torch.ones(64)}}
    choices = Choices(plans, losses, (4, 8), 0.0)
    smallest = choices.bits_per_weight(choices.smallest())
    step = 4 + 4 / 16  # of a weight and of its zero point
    of_small = step * 32 / 576
    found = choices.within(smallest + 2.5 * of_small).linears
    assert {name: plan.bits for name, plan in found.items()} == {"large": 4, "a": 8, "b": 8}
    found = choices.within(smallest + 1.5 * of_small).linears
    assert {name: plan.bits for name, plan in found.items()} == {"large": 4, "a": 4, "b": 8}
    assert choices.within(smallest + step * 512 / 576 + 0.5 * of_small).linears["large"].bits == 8


# -- time ----------------------------------------------------------------------------------------------------------

# Of a weight, by its bits: the narrow ones are quick, and one in the middle is slowest of all.
PACES = {3: 1.3, 4: 1.0, 5: 2.0, 6: 1.2, 8: 1.7}


def lower_bound(ways: np.ndarray, most_bytes: float, most_time: float) -> float:
    """A loss that no plan within both limits goes below: the best one by weak duality, on a grid of prices.

    Args:
        ways: [linears, ways, 3]: loss, bytes and time. The last linear is large, so that each way of it is one case.
    """
    prices = np.concatenate([[0.0], np.exp2(np.arange(-24, 4, 0.5))])
    loss, octets, time = np.moveaxis(ways[:-1], 2, 0)
    bounds = [
        (loss + price * octets + toll * time).min(1).sum()
        + (ways[-1] @ [1, price, toll] - price * most_bytes - toll * most_time)
        for price, toll in itertools.product(prices, prices)
    ]
    return float(np.max(bounds, 0).min())


@pytest.mark.parametrize(("seed", "matters"), itertools.product(range(4), (1, 4, 16)))
def test_no_plan_as_small_and_as_fast_is_much_better(seed: int, matters: int) -> None:
    """Of forty linears that matter alike, and one that is a quarter of all weights."""
    generator = torch.Generator().manual_seed(seed)
    plans = {f"layer{number:02d}": linear(f"layer{number:02d}") for number in range(40)}
    plans["embedding"] = linear("embedding", rows=480)
    scales = {name: float(2 ** (2 * torch.rand(1, generator=generator))) for name in plans}
    losses = {name: scale * (1 + torch.rand(64, generator=generator)) for name, scale in scales.items()}
    losses["embedding"] *= matters
    weights = sum(plan.weights for plan in plans.values())
    by_size = {name: {16: loss} for name, loss in losses.items()}
    choices = Choices(plans, by_size, WIDTHS, 0.0, time_of=lambda row: PACES[row.bits] * row.weights)
    most_bytes, most_time = (5.2 + seed / 4) * weights / 8, (1.15 + seed / 10) * weights
    found = choices.fitting(lambda plan: plan.bits_per_weight <= 8 * most_bytes / weights, most_time)
    assert sum(row.stored_bytes for row in found.linears.values()) <= most_bytes
    assert sum(map(choices.time_of, found.linears.values())) <= most_time
    ways = np.array([
        [
            (loss_of(row, losses[name]), row.stored_bytes, choices.time_of(row))
            for row in (replace(plan, bits=width) for width in WIDTHS)
        ]
        for name, plan in plans.items()
    ])  # fmt: skip
    reached = sum(loss_of(found.linears[name], losses[name]) for name in plans)
    assert reached <= 1.06 * lower_bound(ways, most_bytes, most_time)


def test_time_has_no_price_where_there_is_enough() -> None:
    plans, losses = {name: linear(name) for name in "abc"}, random_losses(("a", "b", "c"), 64, 3)
    by_size = {name: {16: loss} for name, loss in losses.items()}
    choices = Choices(plans, by_size, WIDTHS, 0.0, time_of=lambda row: PACES[row.bits] * row.weights)

    def fits(plan: Plan) -> bool:
        return plan.bits_per_weight <= 6.1

    assert choices.fitting(fits, 1e9) == choices.fitting(fits) == choices.within(6.1)


def test_where_every_plan_is_too_slow_it_is_little_slower_than_the_fastest() -> None:
    plans, losses = {name: linear(name) for name in "abc"}, random_losses(("a", "b", "c"), 64, 3)
    by_size = {name: {16: loss} for name, loss in losses.items()}
    choices = Choices(plans, by_size, WIDTHS, 0.0, time_of=lambda row: PACES[row.bits] * row.weights)
    found = choices.fitting(lambda plan: plan.bits_per_weight <= 6.1, 1.0)
    assert {row.bits for row in found.linears.values()} == {4}
