"""Feedback across rows and columns against both sums written out, and against brute force, in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from accullm_cli.quant import feedback
from accullm_cli.quant.feedback import factor_hessian, round_with_feedback
from accullm_cli.quant.grid import Grid, minmax_grid
from accullm_cli.quant.rounding import ROW_DAMPING, RoundingOptions, round_linears
from tests.quant.references import Problem, correlated_problem, plan_of, rounding_order, scale_and_zero

DAMPING = 0.05
ORIGINAL = RoundingOptions(target="original", grid="minmax", damping=DAMPING)


def fisher_of(rows: int, seed: int) -> torch.Tensor:
    """Of outputs that share a few causes and differ in size, [N, N]."""
    return correlated_problem(1, rows, 3 * rows, seed).hessian


def unit_upper(matrix: np.ndarray, order: list[int], damping: float) -> tuple[np.ndarray, np.ndarray]:
    """U and the diagonal of S with matrix + damping = U S U^T in this order, by eliminating the last one first."""
    rest = matrix[np.ix_(order, order)] + damping * np.diag(matrix).mean() * np.eye(len(order))
    upper, sizes = np.eye(len(order)), np.zeros(len(order))
    for k in reversed(range(len(order))):
        sizes[k] = rest[k, k]
        upper[:k, k] = rest[:k, k] / sizes[k]
        rest = rest[:k, :k] - sizes[k] * np.outer(upper[:k, k], upper[:k, k])
    return upper, sizes


def rounded_by_hand(problem: Problem, fisher: torch.Tensor, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """Codes [N, K] at 4 bits: every weight from its value and both sums over all that was rounded before it."""
    hessian, g = problem.hessian.numpy(), fisher.numpy()
    columns, rows = rounding_order(hessian, (), True), rounding_order(g, (), True)
    u, _ = unit_upper(hessian, columns, DAMPING)
    v, _ = unit_upper(g, rows, ROW_DAMPING)
    wanted = problem.weight.numpy()[np.ix_(rows, columns)]
    scale, zero = scale[np.ix_(rows, columns)], zero[np.ix_(rows, columns)]
    error, codes = np.zeros_like(wanted), np.zeros_like(wanted)
    for n, k in itertools.product(range(len(rows)), range(len(columns))):
        # Of V^T e U at (n, k), all but e_nk itself.
        fed = v[: n + 1, n] @ error[: n + 1, : k + 1] @ u[: k + 1, k]
        codes[n, k] = np.clip(np.rint((wanted[n, k] + fed) / scale[n, k] + zero[n, k]), 0, 15)
        error[n, k] = wanted[n, k] - (codes[n, k] - zero[n, k]) * scale[n, k]
    found = np.zeros_like(codes)
    found[np.ix_(rows, columns)] = codes
    return found


def kronecker_loss(error: torch.Tensor, fisher: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(G e H e^T)."""
    return float(torch.trace(fisher @ error @ hessian @ error.T))


@pytest.mark.parametrize(
    ("rows", "columns", "row_block", "column_block"),
    [(1, 5, 256, 128), (6, 1, 256, 128), (9, 20, 256, 128), (20, 30, 7, 8), (16, 9, 4, 3), (5, 40, 1, 1)],
)
def test_every_code_follows_from_all_errors_above_and_before_it(rows, columns, row_block, column_block, monkeypatch):
    monkeypatch.setattr(feedback, "ROW_BLOCK", row_block)
    monkeypatch.setattr(feedback, "COLUMN_BLOCK", column_block)
    problem, fisher = correlated_problem(rows, columns, 2 * columns, seed=rows), fisher_of(rows, seed=columns)
    plan = plan_of(problem, group_size=16)
    linear = round_linears(
        {"a": problem.weight}, {"a": plan}, ORIGINAL, torch.bfloat16, problem.hessian, fishers={"a": fisher}
    )["a"].linear
    expected = rounded_by_hand(problem, fisher, *scale_and_zero(linear))
    assert linear.codes.tolist() == expected.astype(int).tolist()


@pytest.mark.parametrize("row_block", [3, 256])
def test_outputs_that_do_not_depend_on_each_other_feed_nothing(row_block, monkeypatch):
    monkeypatch.setattr(feedback, "ROW_BLOCK", row_block)
    problem = correlated_problem(8, 40, 100, seed=1)
    fisher = torch.diag(torch.arange(1.0, 9.0, dtype=torch.float64))
    codes = [
        round_linears(
            {"a": problem.weight}, {"a": plan_of(problem)}, ORIGINAL, torch.bfloat16, problem.hessian, fishers=fishers
        )["a"].linear.codes.tolist()
        for fishers in ({"a": fisher}, None)
    ]
    assert codes[0] == codes[1]


@pytest.mark.parametrize("mode", ["untouched", "compensating"])
@pytest.mark.parametrize("grid", ["fit", "search"])
def test_the_loss_falls(mode, grid):
    """Over ten problems, by far more than single ones differ."""
    options = RoundingOptions(target="original", grid=grid, damping=DAMPING, outlier_mode=mode)
    ratios = []
    for seed in range(10):
        problem, fisher = correlated_problem(24, 32, 100, seed), fisher_of(24, seed + 100)
        losses = []
        for fishers in ({"a": fisher}, {}):
            plan = plan_of(problem, bits=3, group_size=16, outliers=(3, 17))
            linear = round_linears(
                {"a": problem.weight}, {"a": plan}, options, torch.float32, problem.hessian, fishers=fishers
            )["a"].linear
            losses.append(kronecker_loss(problem.weight - linear.dequantize().double(), fisher, problem.hessian))
        ratios.append(losses[0] / losses[1])
    assert np.mean(ratios) < 0.7


def test_it_comes_near_the_best_of_all_codes():
    """2 by 3 weights on a grid of 2 bits, all 4096 choices; in the geometric mean over 80 problems."""
    every = torch.tensor(list(itertools.product(range(4), repeat=6)), dtype=torch.float64).view(-1, 2, 3)
    ratios = []
    for seed in range(80):
        problem, fisher = correlated_problem(2, 3, 20, seed), fisher_of(2, seed + 50)
        grid = minmax_grid(problem.weight, 2, -1, False)
        columns, rows = factor_hessian(problem.hessian, 1e-9), factor_hessian(fisher, 1e-9)
        error = problem.weight - (every - grid.zero[None]) * grid.scale[None]
        best = float(torch.einsum("mn,bnk,kl,bml->b", fisher, error, problem.hessian, error).min())
        choices = (
            round_with_feedback(problem.weight, grid, torch.empty(2, 0), columns, rows)[0],
            round_with_feedback(problem.weight, grid, torch.empty(2, 0), columns)[0],
            grid.round_to_nearest(problem.weight),
        )
        losses = [kronecker_loss(problem.weight - grid.values(c.double()), fisher, problem.hessian) for c in choices]
        ratios.append([loss / best for loss in losses])
    both, columns_alone, nearest = np.exp(np.log(ratios).mean(0))
    assert min(ratios)[0] > 1 - 1e-9
    assert both < 1.1
    assert columns_alone > 1.2
    assert nearest > 1.35


def test_by_hand():
    """Rows depend on each other as columns do: half of (e + a) goes down, all of e to the right."""
    grid = Grid(torch.ones(2, 1).double(), torch.zeros(2, 1).double(), 2, 2, False)
    columns = feedback.Factor(torch.tensor([0, 1]), torch.tensor([[1.0, 1.0], [0.0, 1.0]]).double().flip(0, 1), 0, 0)
    rows = feedback.Factor(torch.tensor([0, 1]), torch.tensor([[1.0, 0.5], [0.0, 1.0]]).double().flip(0, 1), 0, 0)
    target = torch.tensor([[0.4, 0.3], [0.4, 0.4]], dtype=torch.float64)
    # Row 0: 0.4 becomes 0, e = 0.4; 0.3 + 0.4 becomes 1, e = -0.7, and e + a = -0.3.
    # Row 1: 0.4 + 0.2 becomes 1, e = -0.6; 0.4 - 0.6 - 0.15 becomes 0.
    codes, _, _ = round_with_feedback(target, grid, torch.empty(2, 0), columns, rows)
    assert codes.tolist() == [[0, 1], [1, 0]]


def test_stochastic_rounding_does_without():
    problem = correlated_problem(6, 20, 50, seed=2)
    options = RoundingOptions("stochastic", target="original")
    codes = [
        round_linears(
            {"a": problem.weight}, {"a": plan_of(problem)}, options, torch.float32, problem.hessian, fishers=fishers
        )["a"].linear.codes.tolist()
        for fishers in ({"a": fisher_of(6, 1)}, {})
    ]
    assert codes[0] == codes[1]
