"""Rounding with error feedback against the textbook's GPTQ, least squares and brute force, element by element."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from accullm_cli.quant.feedback import COLUMN_BLOCK, Factor, corrected_target, factor_hessian, round_with_feedback
from accullm_cli.quant.grid import Grid
from accullm_cli.quant.linear import QuantizedLinear
from accullm_cli.quant.rounding import RoundingOptions, round_linears
from tests.quant.references import (
    Problem,
    correlated_problem,
    least_squares_target,
    output_loss,
    plan_of,
    scale_and_zero,
    textbook_gptq,
)

# Codes are compared on a grid that is not changed after rounding; "fit" has tests of its own.
ORIGINAL = RoundingOptions(target="original", grid="search")
# The order by size of the outliers below differs from their order by index: feature 2 is the largest, 11 the smallest.
OUTLIERS = (2, 5, 7, 11)


def with_outliers(problem: Problem) -> Problem:
    """Make features 5, 7, 11 and 2 large, in this rising order of size but for 11, the smallest of the four."""
    gain = torch.ones(problem.weight.shape[1], dtype=torch.float64)
    gain[[11, 5, 7, 2]] = torch.tensor([20.0, 30.0, 40.0, 50.0], dtype=torch.float64)
    size = problem.hessian.diagonal().sqrt()
    return Problem(problem.weight, problem.original / size * gain, problem.quantized / size * gain)


def rounded(problem: Problem, options: RoundingOptions, source_dtype=torch.bfloat16, pull=None, **plan):
    layout = plan_of(problem, **plan)
    pulls = None if pull is None else {"a": pull}
    results = round_linears({"a": problem.weight}, {"a": layout}, options, source_dtype, problem.hessian, pulls)
    return results["a"].linear


def assert_codes_equal(linear: QuantizedLinear, expected: np.ndarray, outliers: tuple[int, ...] = ()) -> None:
    """Every code, but for those of the outliers, which the reference does not have."""
    rest = [column for column in range(expected.shape[1]) if column not in outliers]
    assert linear.codes[:, rest].tolist() == expected[:, rest].astype(int).tolist()


# -- equal to GPTQ ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "columns", "bits", "group_size", "symmetric"),
    [
        (1, 1, 4, -1, False),
        (3, 2, 2, -1, True),
        (5, 7, 3, 4, False),
        (8, 33, 4, 16, False),
        (4, COLUMN_BLOCK, 4, 32, True),
        (4, COLUMN_BLOCK + 1, 5, -1, False),
        (7, 300, 4, 128, False),
        (5, 300, 2, 64, True),
        (3, 257, 6, 100, False),
        (2, 150, 7, 150, True),
        (2, 160, 8, 1, False),
    ],
)
@pytest.mark.parametrize("grid", ["search", "minmax"])
def test_feedback_equals_textbook_gptq(rows, columns, bits, group_size, symmetric, grid):
    problem = correlated_problem(rows, columns, 2 * columns, seed=columns)
    options = RoundingOptions(target="original", grid=grid)
    linear = rounded(problem, options, bits=bits, group_size=group_size, symmetric=symmetric)
    codes, _ = textbook_gptq(
        problem.weight.numpy(), problem.hessian.numpy(), *scale_and_zero(linear), bits, options.damping
    )
    assert_codes_equal(linear, codes)


@pytest.mark.parametrize("damping", [0.001, 0.1, 1.0])
def test_damping_is_a_fraction_of_the_mean_diagonal(damping):
    problem = correlated_problem(6, 40, 30, seed=1)
    linear = rounded(problem, RoundingOptions(target="original", grid="search", damping=damping), group_size=16)
    codes, _ = textbook_gptq(problem.weight.numpy(), problem.hessian.numpy(), *scale_and_zero(linear), 4, damping)
    assert_codes_equal(linear, codes)


@pytest.mark.parametrize("columns", [40, 300])
def test_untouched_outliers_leave_the_rest_to_its_own_hessian(columns):
    # The outliers are up to 50 times as large as the rest: neither their columns nor their size may reach it.
    problem = with_outliers(correlated_problem(6, columns, 2 * columns, seed=2))
    linear = rounded(problem, ORIGINAL, group_size=16, outliers=OUTLIERS)
    codes, _ = textbook_gptq(
        problem.weight.numpy(), problem.hessian.numpy(), *scale_and_zero(linear), 4, 0.01, OUTLIERS
    )
    assert_codes_equal(linear, codes, OUTLIERS)


@pytest.mark.parametrize("columns", [40, 300])
def test_compensating_outliers_take_the_rest_of_the_update(columns):
    problem = with_outliers(correlated_problem(6, columns, 2 * columns, seed=3))
    options = RoundingOptions(target="original", grid="search", outlier_mode="compensating")
    linear = rounded(problem, options, group_size=16, outliers=OUTLIERS)
    codes, kept = textbook_gptq(
        problem.weight.numpy(), problem.hessian.numpy(), *scale_and_zero(linear), 4, 0.01, OUTLIERS, True
    )
    assert_codes_equal(linear, codes, OUTLIERS)
    assert linear.outlier_index.tolist() == list(OUTLIERS)
    assert linear.outlier_weight.dtype == torch.bfloat16
    assert linear.outlier_weight.double().tolist() == kept.tolist()
    # They did take something up, or nothing was tested.
    assert (linear.outlier_weight != problem.weight[:, list(OUTLIERS)].bfloat16()).any(0).all()


@pytest.mark.parametrize("mode", ["untouched", "compensating"])
def test_corrected_rounding_equals_gptq_of_the_least_squares_target(mode):
    problem = with_outliers(correlated_problem(5, 140, 300, seed=4))
    options = RoundingOptions(outlier_mode=mode, grid="search")
    linear = rounded(problem, options, pull=problem.pull, group_size=32, outliers=OUTLIERS)
    last = mode == "compensating"
    target = least_squares_target(problem, options.damping, () if last else OUTLIERS)
    codes, kept = textbook_gptq(
        target, problem.hessian.numpy(), *scale_and_zero(linear), 4, options.damping, OUTLIERS, last
    )
    assert_codes_equal(linear, codes, OUTLIERS)
    if last:
        assert linear.outlier_weight.double().tolist() == kept.tolist()


def test_float32_loses_next_to_nothing_against_float64():
    problem = correlated_problem(16, 300, 600, seed=5)
    layout = plan_of(problem, group_size=64)
    losses = []
    for dtype in (torch.float64, torch.float32):
        result = round_linears(
            {"a": problem.weight.to(dtype)}, {"a": layout}, ORIGINAL, torch.bfloat16, problem.hessian.to(dtype)
        )
        losses.append(output_loss(problem.weight, result["a"].linear.dequantize(), problem.hessian))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


# -- the corrected target ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [12, 200])
@pytest.mark.parametrize("mode", ["untouched", "compensating"])
@pytest.mark.parametrize("outliers", [(), OUTLIERS])
def test_corrected_target_is_the_least_squares_solution(tokens, mode, outliers):
    problem = with_outliers(correlated_problem(4, 30, tokens, seed=6))
    factor = factor_hessian(problem.hessian, 0.01, outliers, mode == "compensating")
    target = corrected_target(problem.weight, problem.pull, factor)
    fixed = outliers if mode == "untouched" else ()
    expected = torch.from_numpy(least_squares_target(problem, 0.01, fixed))
    torch.testing.assert_close(target, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(target[:, list(fixed)], problem.weight[:, list(fixed)])
    assert (target - problem.weight).abs().max() > 0.01


def test_correction_brings_the_output_nearer_to_the_originals():
    problem = correlated_problem(8, 48, 500, seed=7)
    wanted = problem.original @ problem.weight.T
    corrected, plain = (
        rounded(problem, RoundingOptions(target=target), pull=problem.pull, group_size=16).dequantize().double()
        for target in ("corrected", "original")
    )
    error = (wanted - problem.quantized @ corrected.T).square().sum()
    assert error < (wanted - problem.quantized @ plain.T).square().sum()


# -- less loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("bits", [2, 4])
def test_feedback_loses_less_than_nearest(seed, bits):
    problem = correlated_problem(12, 140, 300, seed=seed)
    losses = [
        output_loss(
            problem.weight,
            rounded(problem, RoundingOptions(method, target="original"), bits=bits, group_size=32).dequantize(),
            problem.hessian,
        )
        for method in ("feedback", "nearest")
    ]
    assert losses[0] < 0.7 * losses[1]


def least_loss(weight: torch.Tensor, hessian: torch.Tensor, linear: QuantizedLinear) -> tuple[float, list[int]]:
    """The best of all codes for one row on a linear's grid."""
    scale, zero = (torch.from_numpy(values) for values in scale_and_zero(linear))
    choices = list(itertools.product(range(2**linear.bits), repeat=weight.shape[1]))
    lost = weight - (torch.tensor(choices, dtype=torch.float64) - zero) * scale
    losses = ((lost @ hessian) * lost).sum(1)
    best = int(losses.argmin())
    return float(losses[best]), list(choices[best])


def test_feedback_lies_between_nearest_and_the_best_of_all_codes():
    better = best = 0
    for seed in range(40):
        problem = correlated_problem(1, 2 + seed % 5, 50, seed=100 + seed)
        feedback, nearest = (
            rounded(problem, RoundingOptions(method, target="original", grid="minmax", damping=1e-9), bits=2)
            for method in ("feedback", "nearest")
        )
        assert torch.equal(feedback.scales, nearest.scales)
        loss = output_loss(problem.weight, feedback.dequantize(), problem.hessian)
        optimum, _ = least_loss(problem.weight, problem.hessian, feedback)
        assert loss >= optimum * (1 - 1e-9)
        better += loss <= output_loss(problem.weight, nearest.dequantize(), problem.hessian) * (1 + 1e-9)
        best += loss <= optimum * (1 + 1e-9)
    assert better >= 36
    assert best >= 20


@pytest.mark.parametrize("seed", range(5))
def test_features_that_are_not_correlated_are_rounded_to_nearest(seed):
    problem = correlated_problem(1, 6, 50, seed=seed)
    hessian = problem.hessian.diagonal().diag()
    options = RoundingOptions(target="original", grid="minmax")
    linear = round_linears({"a": problem.weight}, {"a": plan_of(problem, bits=2)}, options, torch.float32, hessian)[
        "a"
    ].linear
    scale, zero = scale_and_zero(linear)
    nearest = np.clip(np.rint(problem.weight.numpy() / scale + zero), 0, 3).astype(int)
    assert linear.codes.tolist() == nearest.tolist()
    assert linear.codes[0].tolist() == least_loss(problem.weight, hessian, linear)[1]


def test_an_error_moves_into_the_next_column():
    # By hand: 0.4 rounds to 0 and 0.9 of that error goes on, so that the second 0.4 becomes 0.76 and rounds to 1.
    # (0, 1) loses 0.4^2 + 0.6^2 - 2*0.9*0.4*0.6 = 0.088; nearest's (0, 0) loses 0.608; no other pair is below 0.088.
    grid = Grid(torch.ones(1, 1).double(), torch.zeros(1, 1).double(), 2, 2, False)
    feedback = torch.tensor([[1.0, 0.9], [0.0, 1.0]], dtype=torch.float64)
    factor = Factor(torch.tensor([0, 1]), feedback.flip(0, 1), 0.01, 0.0)  # the Cholesky factor of S = 1
    target = torch.tensor([[0.4, 0.4]], dtype=torch.float64)
    codes, kept, clamped = round_with_feedback(target, grid, torch.empty(1, 0), factor)
    assert codes.tolist() == [[0, 1]]
    assert kept.shape == (1, 0)
    assert clamped == 0


# -- fitted scales -----------------------------------------------------------------------------------------


def fitted_by_hand(
    target: np.ndarray,
    rounded: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    codes: np.ndarray,
    size: int,
    outliers: tuple[int, ...],
    hessian: np.ndarray,
) -> np.ndarray:
    """Each row's scales in turn at the minimum of the loss, by a fit of the whole loss at three points: [N, K]."""
    scale = scale.copy()
    for row in range(len(target)):
        for start in range(0, target.shape[1], size):
            columns = [c for c in range(start, min(start + size, target.shape[1])) if c not in outliers]

            def loss(value: float, row: int = row, columns: list[int] = columns) -> float:
                weights = rounded[row].copy()
                every = [c for c in range(target.shape[1]) if c not in outliers]
                weights[every] = (codes[row, every] - zero[row, every]) * scale[row, every]
                weights[columns] = (codes[row, columns] - zero[row, columns]) * value
                error = target[row] - weights
                return float(error @ hessian @ error)

            now = scale[row, columns[0]]
            step = 0.1 * now
            curve, slope, _ = np.polyfit([-step, 0.0, step], [loss(now - step), loss(now), loss(now + step)], 2)
            best = float(np.float16(now - slope / (2 * curve)))
            if loss(best) < loss(now):
                scale[row, start : start + size] = best
    return scale


def descended_by_hand(
    target: np.ndarray,
    rounded: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    codes: np.ndarray,
    outliers: tuple[int, ...],
    hessian: np.ndarray,
) -> np.ndarray:
    """Each code in turn the best of all sixteen, the others being what they are; four times over a row: [N, K]."""
    codes = codes.copy()
    every = [c for c in range(target.shape[1]) if c not in outliers]
    for row in range(len(target)):
        for column in 4 * every:

            def loss(code: int, row: int = row, column: int = column) -> float:
                tried, weights = codes[row].copy(), rounded[row].copy()
                tried[column] = code
                weights[every] = ((tried - zero[row]) * scale[row])[every]
                error = target[row] - weights
                return float(error @ hessian @ error)

            codes[row, column] = min(range(16), key=loss)
    return codes


@pytest.mark.parametrize("mode", ["untouched", "compensating"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_and_scales_are_fitted_to_each_other(mode, symmetric):
    problem = with_outliers(correlated_problem(5, 44, 120, seed=11))
    size, damping = 16, 0.05
    options = {"target": "original", "outlier_mode": mode, "damping": damping}
    plan = {"group_size": size, "outliers": OUTLIERS, "symmetric": symmetric}
    searched = rounded(problem, RoundingOptions(grid="search", **options), **plan)
    scale, zero = scale_and_zero(searched)
    weight, last = problem.weight.numpy(), mode == "compensating"
    taking_part = [c for c in range(44) if last or c not in OUTLIERS]
    ridge = damping * float(problem.hessian.diagonal()[taking_part].mean())
    damped = problem.hessian.numpy() + ridge * np.eye(44)
    values = weight.copy()

    def round_all() -> np.ndarray:
        codes, kept = textbook_gptq(weight, problem.hessian.numpy(), scale, zero, 4, damping, OUTLIERS, last)
        values[:, list(OUTLIERS)] = kept if last else weight[:, list(OUTLIERS)]
        return codes

    scale = fitted_by_hand(weight, values, scale, zero, round_all(), size, OUTLIERS, damped)
    codes = once = round_all()
    for _ in range(2):
        codes = descended_by_hand(weight, values, scale, zero, codes, OUTLIERS, damped)
        scale = fitted_by_hand(weight, values, scale, zero, codes, size, OUTLIERS, damped)
    assert last or (codes != once).any()  # four compensating columns leave too little to be gained
    linear = rounded(problem, RoundingOptions(grid="fit", **options), source_dtype=torch.float64, **plan)
    if last:  # the reference keeps them in bfloat16
        linear = rounded(problem, RoundingOptions(grid="fit", **options), **plan)
    assert_codes_equal(linear, codes, OUTLIERS)
    found, zeros = scale_and_zero(linear)
    assert found.tolist() == scale.tolist()
    assert zeros.tolist() == zero.tolist()
    assert (found != scale_and_zero(searched)[0]).mean() > 0.5


@pytest.mark.parametrize("seed", range(6))
def test_fitted_scales_lose_less_than_searched_ones(seed):
    problem = correlated_problem(12, 140, 300, seed=seed)
    searched, fitted = (
        output_loss(
            problem.weight,
            rounded(problem, RoundingOptions(target="original", grid=grid), group_size=32).dequantize(),
            problem.hessian,
        )
        for grid in ("search", "fit")
    )
    assert fitted < 0.97 * searched


# -- what is measured and shared ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["nearest", "feedback"])
def test_relative_error_is_that_of_the_outputs(method):
    problem = correlated_problem(6, 20, 64, seed=8)
    result = round_linears(
        {"a": problem.weight}, {"a": plan_of(problem)}, RoundingOptions(method), torch.float32, problem.hessian
    )["a"]
    wanted = problem.quantized @ problem.weight.T
    lost = wanted - problem.quantized @ result.linear.dequantize().double().T
    assert result.relative_error == pytest.approx(float(lost.norm() / wanted.norm()), rel=1e-9)


@pytest.mark.parametrize("mode", ["untouched", "compensating"])
def test_linears_rounded_together_equal_linears_rounded_alone(mode):
    problem = with_outliers(correlated_problem(24, 150, 300, seed=9))
    hessian = problem.hessian.float()
    weights = dict(zip("qkv", problem.weight.float().split((8, 4, 12)), strict=True))
    pulls = dict(zip("qkv", problem.pull.float().split((8, 4, 12), dim=1), strict=True))
    sets = {"q": OUTLIERS, "k": (), "v": OUTLIERS}
    plans = {
        name: plan_of(Problem(weight, weight, weight), group_size=64, outliers=sets[name], name=name)
        for name, weight in weights.items()
    }
    options = RoundingOptions(outlier_mode=mode)

    def round_some(names: str) -> dict[str, dict[str, torch.Tensor]]:
        chosen = {name: weights[name] for name in names}
        own = {name: pulls[name] for name in names}
        results = round_linears(chosen, plans, options, torch.bfloat16, hessian, own)
        assert list(results) == list(names)
        return {name: result.linear.to_tensors() for name, result in results.items()}

    together = round_some("qkv")
    for names in ("vkq", "q", "k", "v"):
        for name, tensors in round_some(names).items():
            assert tensors.keys() == together[name].keys()
            for suffix, tensor in tensors.items():
                assert torch.equal(tensor, together[name][suffix]), (names, name, suffix)


# -- scales from a table ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["nearest", "feedback", "stochastic"])
@pytest.mark.parametrize("grid", ["minmax", "search", "fit"])
def test_every_scale_is_in_the_table_and_the_loss_is_what_it_was(method: str, grid: str) -> None:
    """Rows of very different size, so that the table has to reach far. A table of 64 costs less than one step of it."""
    problem = correlated_problem(24, 96, 400, seed=3)
    size = torch.logspace(0, 1.2, 24, dtype=torch.float64)[:, None]
    problem = Problem(problem.weight * size, problem.original, problem.quantized)
    options = RoundingOptions(method=method, grid=grid, target="original")
    plan = {"group_size": 16, "outliers": (5, 40)}
    free = rounded(problem, options, **plan)
    found = rounded(problem, options, **plan, scale_bits=6)
    assert found.scale_table is not None
    assert found.scale_bits == 6
    assert set(found.scales.flatten().tolist()) <= set(found.scale_table.tolist())
    assert free.scale_table is None
    loss, without = (output_loss(problem.weight, one.dequantize(), problem.hessian) for one in (found, free))
    assert loss < 1.1 * without


def test_the_codes_are_those_of_the_scales_that_are_stored() -> None:
    """Read back from its tensors, the linear is the textbook's GPTQ on the scales of the table."""
    problem = correlated_problem(8, 64, 200, seed=4)
    linear = rounded(problem, ORIGINAL, group_size=16, scale_bits=6)
    read = QuantizedLinear.from_tensors(linear.to_tensors(), 64, 4, 16)
    codes, _ = textbook_gptq(problem.weight.numpy(), problem.hessian.numpy(), *scale_and_zero(read), 4, 0.01)
    assert_codes_equal(read, codes)
