"""What feedback is damped by: the loss that is expected on rows which the Hessian does not know."""

from __future__ import annotations

import pytest
import torch

from accullm_cli.quant import feedback
from accullm_cli.quant.feedback import DAMPINGS, damping_for, factor_hessian
from accullm_cli.quant.plan import LinearPlan
from accullm_cli.quant.rounding import TARGET_DAMPING, RoundingOptions, round_linears
from accullm_cli.quant.stats import GramMatrices

FEATURES = 24


def rows_of(count: int, seed: int, features: int = FEATURES) -> torch.Tensor:
    """Correlated inputs, some features larger than others: float64 [count, features]."""
    mixing = torch.randn(features, features, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    sizes = torch.linspace(0.2, 3, features, dtype=torch.float64)
    noise = torch.randn(count, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (noise @ (mixing / features**0.5 + 0.3 * torch.eye(features, dtype=torch.float64))) * sizes


def split(train: int, held: int) -> tuple[torch.Tensor, torch.Tensor]:
    """H of all rows, and those that are held out, scaled alike."""
    rows = rows_of(train + held, 1)
    return rows.T @ rows / len(rows), rows[train:] / len(rows) ** 0.5


@pytest.mark.parametrize("outliers", [(), (3, 17)])
def test_the_expected_loss_is_the_mean_over_noise_that_is_fed_forward(outliers: tuple[int, ...]) -> None:
    hessian, held_out = split(500, 100)
    factor = factor_hessian(hessian, 0.1, outliers)
    count = len(factor.order)
    # Column after column, as rounding does it: the error is what noise leaves, less what was fed to it.
    whole = factor.feedback(0, count)
    noise = torch.randn(40_000, count, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    error = torch.zeros_like(noise)
    for column in range(count):
        error[:, column] = noise[:, column] - error[:, :column] @ whole[:column, column]
    loss = (error @ held_out[:, factor.order].T).square().sum(1).mean()
    assert factor.expected_loss(held_out) == pytest.approx(float(loss), rel=0.02)


def test_columns_without_noise_of_their_own_cost_nothing() -> None:
    hessian, held_out = split(500, 100)
    factor = factor_hessian(hessian, 0.1, (3, 17), compensating=True)
    whole = factor.feedback(0, FEATURES)
    inverse = torch.linalg.inv(whole)[:-2]
    expected = ((inverse @ held_out[:, factor.order].T) ** 2).sum()
    assert factor.expected_loss(held_out, 2) == pytest.approx(float(expected))


@pytest.mark.parametrize("held", [5, FEATURES, 300])
def test_the_choice_is_that_of_the_rows_however_many_there_are(held: int) -> None:
    """More rows than features become as many as features."""
    hessian, held_out = split(60, held)
    losses = {
        damping: factor_hessian(hessian - held_out.T @ held_out, damping, (3,)).expected_loss(held_out)
        for damping in DAMPINGS
    }
    expected = max(damping for damping in DAMPINGS if losses[damping] <= feedback.MARGIN * min(losses.values()))
    assert damping_for(hessian, held_out, (3,)) == expected


def test_rows_of_few_directions_and_a_massive_feature_choose_as_in_float64() -> None:
    """Their Gram matrix has no inverse, and float32 holds little of it beside the massive one."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(600, 8, generator=draw, dtype=torch.float64)
    rows = rows @ torch.randn(8, 96, generator=draw, dtype=torch.float64)
    rows[:, 3] *= 3000
    hessian, held_out = rows.T @ rows / 600, rows[400:] / 600**0.5
    assert damping_for(hessian.float(), held_out.float()) == damping_for(hessian, held_out)


def test_where_nothing_else_is_left_that_can_be_factored_damping_is_the_largest() -> None:
    _, held_out = split(60, 40)
    less = held_out.T @ held_out - 10 * torch.eye(FEATURES, dtype=torch.float64)
    assert damping_for(less, held_out) == DAMPINGS[-1]


def test_little_text_is_damped_more_than_much() -> None:
    few = damping_for(*split(8, 200))
    many = damping_for(*split(20_000, 2000))
    assert many == DAMPINGS[0]
    assert few > many


def test_the_damping_is_the_one_of_least_loss_on_other_rows() -> None:
    """By brute force: noise is fed forward with each, and the error meets the rows."""
    hessian, held_out = split(60, 400)
    rest = hessian - held_out.T @ held_out
    losses = {}
    for damping in DAMPINGS:
        damped = rest + damping * rest.diagonal().mean() * torch.eye(FEATURES, dtype=torch.float64)
        order = torch.argsort(rest.diagonal(), descending=True)
        damped = damped[order][:, order]
        upper = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
        inverse = torch.linalg.inv(upper / upper.diagonal())
        losses[damping] = float(((inverse @ held_out[:, order].T) ** 2).sum())
    least = min(losses.values())
    assert damping_for(hessian, held_out) == max(damping for damping in DAMPINGS if losses[damping] <= 1.02 * least)


def test_held_out_rows_are_their_part_of_the_hessian() -> None:
    rows, weights = rows_of(50, 2).float(), torch.rand(50, generator=torch.Generator().manual_seed(3)) + 0.5
    gram = GramMatrices(FEATURES)
    gram.add(rows[:30], weights=weights[:30], held_out=torch.tensor([4, 9]))
    gram.add(rows[30:], weights=weights[30:], held_out=torch.tensor([0]))
    held = gram.take_held_out()
    assert held is not None
    chosen = torch.tensor([4, 9, 30])
    expected = (rows[chosen].T * weights[chosen]) @ rows[chosen] / weights.sum()
    torch.testing.assert_close(held.T @ held, expected)
    assert gram.take_held_out() is None
    assert GramMatrices(FEATURES).take_held_out() is None


def test_the_target_and_the_feedback_have_a_damping_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    hessian, held_out = split(2000, 300)
    draw = torch.Generator().manual_seed(7)
    weight, pull = torch.randn(16, FEATURES, generator=draw), 0.1 * torch.randn(FEATURES, 16, generator=draw)
    plan = LinearPlan("a", 16, FEATURES, 4, 8, False, (2,))
    asked: list[float] = []

    def noted(hessian: torch.Tensor, damping: float, *rest: object, **named: object) -> feedback.Factor:
        asked.append(damping)
        return factor_hessian(hessian, damping, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr("accullm_cli.quant.rounding.factor_hessian", noted)

    def rounded(damping: float | None, held: torch.Tensor | None, pulls: dict[str, torch.Tensor]) -> torch.Tensor:
        asked.clear()
        options = RoundingOptions(damping=damping)
        found = round_linears({"a": weight}, {"a": plan}, options, torch.float32, hessian.float(), pulls, held_out=held)
        return found["a"].linear.dequantize(torch.float32)

    chosen = damping_for(hessian.float(), held_out.float(), (2,))
    assert chosen != TARGET_DAMPING
    rounded(None, held_out.float(), {"a": pull})
    assert asked == [TARGET_DAMPING, chosen]
    rounded(None, held_out.float(), {})
    assert asked == [chosen]
    rounded(0.2, held_out.float(), {"a": pull})
    assert asked == [0.2]
    without = rounded(None, None, {"a": pull})
    assert asked == [TARGET_DAMPING]
    assert torch.equal(without, rounded(TARGET_DAMPING, None, {"a": pull}))
