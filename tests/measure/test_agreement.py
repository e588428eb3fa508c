"""The largest difference between two models' next-token distributions."""

from __future__ import annotations

import math

import pytest
import torch

from accullm_cli.measure.agreement import largest_difference


def test_the_largest_difference_is_found_with_its_place() -> None:
    ours = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]).log()
    other = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]).log() + 3  # a constant changes no distribution
    difference = largest_difference(ours, other)
    assert difference.nats == pytest.approx(math.log(2), abs=1e-6)
    assert (difference.position, difference.token) in {(1, 1), (1, 2)}
    assert not difference.is_arithmetic
    assert str(difference).startswith("0.693 nats for token ")


@pytest.mark.parametrize(("change", "same"), [(9e-4, True), (1.2e-3, False)])
def test_what_sums_in_another_order_do_is_arithmetic(change: float, same: bool) -> None:
    ours = torch.zeros(1, 100_000)
    other = ours.clone()
    other[0, 7] += change
    assert largest_difference(ours, other).is_arithmetic == same


def test_large_logits_are_rounded_more_coarsely() -> None:
    ours = torch.tensor([[1000.0, 0.0]])
    assert largest_difference(ours, ours + torch.tensor([[0.0, 0.009]])).is_arithmetic
    assert not largest_difference(ours, ours + torch.tensor([[0.0, 0.02]])).is_arithmetic


def test_a_token_that_both_rule_out_does_not_differ() -> None:
    logits = torch.tensor([[0.0, 1.0, -math.inf]])
    assert largest_difference(logits, logits.clone()).nats == 0


@pytest.mark.parametrize("wrong", [[[0.0, math.nan]], [[0.0, math.inf]], [[0.0, 0.0, 0.0]], [[math.nan, math.nan]]])
def test_what_is_not_finite_or_of_another_shape_differs_infinitely(wrong: list[list[float]]) -> None:
    difference = largest_difference(torch.zeros(1, 2), torch.tensor(wrong))
    assert difference.nats == math.inf
    assert not difference.is_arithmetic
