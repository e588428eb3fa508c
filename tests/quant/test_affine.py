"""Groups with a real offset: against least squares, brute force and plain arithmetic in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accullm_cli.errors import AccullmError
from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.encodings.affine import AffineGrid, AffineLinear
from accullm_cli.quant.loops import CodeTile, round_tile
from accullm_cli.quant.plan import LinearPlan
from accullm_cli.quant.rounding import RoundingOptions, round_linears
from accullm_cli.quant.scales import StorableScales
from tests.quant.references import correlated_problem

AFFINE = ENCODINGS["affine"]


def row(rows: int, columns: int, bits: int = 4, group_size: int = 32, outliers: tuple[int, ...] = ()) -> LinearPlan:
    return LinearPlan("a", rows, columns, bits, group_size, False, outliers, encoding="affine")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spread_by_hand(per_group: torch.Tensor, size: int, count: int) -> torch.Tensor:
    return per_group[:, [column // size for column in range(count)]]


# -- the grid ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("searches", [True, False])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
@settings(deadline=None, max_examples=20)
@given(st.integers(2, 8), st.sampled_from([3, 8, 32, -1]), st.integers(1, 40), st.floats(-40, 40), st.integers(0, 99))
def test_all_values_can_be_stored_and_codes_are_those_of_the_nearest(
    searches: bool, scale_dtype: str, bits: int, group_size: int, columns: int, mean: float, seed: int
) -> None:
    weight = draw(3, columns, seed=seed) + mean
    importance = draw(columns, seed=seed + 1).square() if searches else None
    grid, sentences = AFFINE.grid(weight, row(3, columns, bits, group_size), scale_dtype, importance)
    assert sentences == []
    assert isinstance(grid, AffineGrid)
    for number in (grid.scale, grid.offset):
        assert torch.equal(number.half().double(), number)
        if scale_dtype == "bfloat16":
            assert torch.equal(number.bfloat16().double(), number)
    size = columns if group_size == -1 else group_size
    scale, offset = (spread_by_hand(part, size, columns) for part in (grid.scale, grid.offset))
    every = torch.stack([code * scale + offset for code in range(2**bits)])
    nearest = (every - weight).abs().amin(0)
    codes = grid.round_to_nearest(weight)
    assert torch.equal(grid.values(codes), codes * scale + offset)
    torch.testing.assert_close((grid.values(codes) - weight).abs(), nearest, rtol=1e-9, atol=1e-12)
    if not searches:
        # Nothing is further away than half a step, but for what the offset lost (a bfloat16 has 8 bits).
        assert ((weight - grid.values(codes)).abs() <= 0.5 * scale * (1 + 2**-6) + offset.abs() * 2**-8).all()


def test_a_grid_of_equal_weights_holds_them() -> None:
    weight = torch.full((2, 8), 0.37, dtype=torch.float64)
    weight[1] = 0
    grid, _ = AFFINE.grid(weight, row(2, 8, 3, 8), "bfloat16", torch.ones(8))
    torch.testing.assert_close(grid.values(grid.round_to_nearest(weight)), weight, rtol=2**-9, atol=0)


def test_a_search_is_no_worse_than_the_whole_range_and_does_not_look_at_outliers() -> None:
    weight = draw(6, 64, seed=3)
    weight[:, [5, 40]] *= 100
    importance, ignored = draw(64, seed=4).square(), torch.zeros(64, dtype=torch.bool)
    ignored[[5, 40]] = True

    def error(importance_or_none: torch.Tensor | None) -> torch.Tensor:
        grid, _ = AFFINE.grid(weight, row(6, 64), "float16", importance_or_none, ignored)
        lost = (weight - grid.values(grid.round_to_nearest(weight))).square() * importance
        return lost.masked_fill(ignored, 0).view(6, 2, 32).sum(-1)

    assert (error(importance) <= error(None)).all()
    assert error(importance).sum() < 0.8 * error(None).sum()
    assert error(None).max() < 1  # a range with outliers would have steps of 20


def weighted_error(grid: AffineGrid, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    left = (weight - grid.values(grid.round_to_nearest(weight))).square() * importance
    padded = torch.nn.functional.pad(left, (0, -left.shape[1] % grid.columns_per_group))
    return padded.view(len(left), -1, grid.columns_per_group).sum(-1)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 8), st.sampled_from([5, 8, -1]), st.integers(0, 999))
def test_a_search_leaves_no_group_worse_than_its_whole_range_does(bits: int, group_size: int, seed: int) -> None:
    weight, importance = draw(4, 19, seed=seed) + 0.5, draw(19, seed=seed + 1).square()
    searched, _ = AFFINE.grid(weight, row(4, 19, bits, group_size), "bfloat16", importance)
    spanning, _ = AFFINE.grid(weight, row(4, 19, bits, group_size), "bfloat16")
    found, whole = (weighted_error(grid, weight, importance) for grid in (searched, spanning))
    assert (found <= whole * (1 + 1e-12)).all()


def test_a_search_comes_near_to_the_best_of_all_codes() -> None:
    """All 4^5 codes of one group, each with its best real scale and offset."""
    ratios = []
    for seed in range(12):
        weight, importance = draw(1, 5, seed=seed) + 0.7, draw(5, seed=seed + 50).square()
        grid, _ = AFFINE.grid(weight, row(1, 5, 2, -1), "float16", importance)
        root, best = importance.sqrt().numpy(), float("inf")
        for codes in itertools.product(range(4), repeat=5):
            matrix = np.stack([root * np.array(codes), root], 1)
            wanted = root * weight[0].numpy()
            left = wanted - matrix @ np.linalg.lstsq(matrix, wanted, rcond=None)[0]
            best = min(best, float(left @ left))
        found = float(weighted_error(grid, weight, importance))
        assert found >= best * (1 - 1e-9)
        ratios.append(found / best)
    assert np.median(ratios) < 1.2


def test_weights_that_no_offset_can_hold_are_clamped_and_on_record() -> None:
    weight = torch.full((1, 4), 1e6, dtype=torch.float64)
    grid, sentences = AFFINE.grid(weight, row(1, 4, 4, 4), "float16")
    assert sentences == ["1 of 1 groups hold weights beyond 6.55e+04, which offsets cannot, and were clamped"]
    assert torch.isfinite(grid.offset.half()).all()


# -- the fit -----------------------------------------------------------------------------------------------


def fitted_by_hand(
    inputs: np.ndarray, target: np.ndarray, codes: np.ndarray, dtype: torch.dtype
) -> tuple[float, float]:
    """Scale and offset of one group by least squares; the offset once more for the scale as it is stored."""

    def stored(value: float) -> float:
        return float(torch.tensor(value, dtype=torch.float64).to(dtype))

    step, level, wanted = inputs @ codes, inputs @ np.ones_like(codes), inputs @ target
    (scale, _), *_ = np.linalg.lstsq(np.stack([step, level], 1), wanted, rcond=None)
    scale = stored(scale)
    return scale, stored(level @ (wanted - scale * step) / (level @ level))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(5))
def test_scale_and_offset_are_those_of_least_squares(dtype: torch.dtype, seed: int) -> None:
    inputs, target = draw(60, 12, seed=seed), 2 * draw(4, 12, seed=seed + 100) + 1
    codes = torch.randint(0, 16, (4, 12), generator=torch.Generator().manual_seed(seed))
    codes = (codes + 3 * target).round().clamp(0, 15).to(torch.uint8)
    storable = StorableScales(str(dtype).removeprefix("torch."))
    start = AffineGrid.of(torch.full((4, 1), 0.5).double(), torch.zeros(4, 1).double(), 4, 12, storable)
    on_grid = torch.ones(12, dtype=torch.bool)
    error = target - start.values(codes.double())
    grid = start.fitted(error, codes, on_grid, inputs.T @ inputs, 0.0)
    for index in range(4):
        expected = fitted_by_hand(inputs.numpy(), target[index].numpy(), codes[index].double().numpy(), dtype)
        assert (float(grid.scale[index]), float(grid.offset[index])) == expected
    torch.testing.assert_close(error, target - grid.values(codes.double()), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 999), st.sampled_from([4, 7, -1]), st.sampled_from([(), (2,), (0, 1, 2, 3)]))
def test_a_fit_loses_nothing_and_says_what_is_left(seed: int, group_size: int, outliers: tuple[int, ...]) -> None:
    inputs, target = draw(40, 13, seed=seed), draw(5, 13, seed=seed + 1)
    hessian, ridge = inputs.T @ inputs / 40, 0.03
    grid, _ = AFFINE.grid(target, row(5, 13, 3, group_size), "bfloat16", torch.ones(13))
    codes = grid.round_to_nearest(target).to(torch.uint8)
    on_grid = torch.ones(13, dtype=torch.bool)
    on_grid[list(outliers)] = False

    def loss(grid: AffineGrid) -> torch.Tensor:
        left = (target - grid.values(codes.double())).masked_fill(~on_grid, 0)
        return ((left @ hessian) * left).sum(1) + ridge * left.square().sum(1)

    error = (target - grid.values(codes.double())).masked_fill(~on_grid, 0)
    fitted = grid.fitted(error, codes, on_grid, hessian, ridge)
    assert (loss(fitted) <= loss(grid) * (1 + 1e-9)).all()
    left = (target - fitted.values(codes.double())).masked_fill(~on_grid, 0)
    torch.testing.assert_close(error, left, rtol=0, atol=1e-12)
    torch.testing.assert_close(fitted.zero * fitted.scale, -fitted.offset, rtol=1e-12, atol=0)


def test_where_all_codes_are_alike_the_scale_stays_and_the_offset_is_fitted() -> None:
    target = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    grid = AffineGrid.of(torch.ones(1, 1).double(), torch.zeros(1, 1).double(), 2, 4, StorableScales())
    codes = torch.full((1, 4), 2, dtype=torch.uint8)
    fitted = grid.fitted(target - 2, codes, torch.ones(4, dtype=torch.bool), torch.eye(4).double(), 0.0)
    assert (float(fitted.scale), float(fitted.offset)) == (1.0, 0.5)


# -- the loops ---------------------------------------------------------------------------------------------


def test_the_loop_takes_any_zero_point() -> None:
    """One weight after the other, as the formula says, for zero points that are no codes, or beyond them."""
    wanted, upper = draw(5, 9, seed=1), torch.eye(9).double() + 0.3 * draw(9, 9, seed=2).triu(1)
    scale = torch.tensor([[0.3, 0.21]]).double().repeat(5, 1)
    zero = torch.tensor([[1.37, -2.6], [9.9, 4.5], [0.0, 3.2], [-0.4, 17.1], [7.5, 7.4]]).double()
    group = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 0])
    fed = torch.zeros(5, 9, dtype=torch.float64)
    tile = CodeTile(wanted=wanted, fed=fed, upper=upper, scale=scale, group=group, zero=zero, largest_code=7)
    codes, error = round_tile(tile)
    for n in range(5):
        lost: list[float] = []
        for k in range(9):
            step, middle = float(scale[n, group[k]]), float(zero[n, group[k]])
            value = float(wanted[n, k]) + sum(lost[i] * float(upper[i, k]) for i in range(k))
            code = min(max(round(value / step + middle), 0), 7)
            lost.append(float(wanted[n, k]) - (code - middle) * step)
            assert int(codes[n, k]) == code
        assert error[n].tolist() == pytest.approx(lost, abs=1e-12)


# -- rounding, whole ---------------------------------------------------------------------------------------


def loss_of(weight: torch.Tensor, linear: AffineLinear, hessian: torch.Tensor) -> float:
    left = weight - linear.dequantize(torch.float64)
    return float(((left @ hessian) * left).sum())


def test_rounding_comes_near_to_the_best_of_all_codes() -> None:
    """All 4^5 codes of one row, each with its best real scale and offset."""
    ratios = []
    for seed in range(12):
        inputs, weight = draw(30, 5, seed=seed) @ draw(5, 5, seed=seed + 50), draw(1, 5, seed=seed + 99) + 0.7
        hessian = inputs.T @ inputs / 30
        options = RoundingOptions(damping=1e-4)
        found = round_linears({"a": weight}, {"a": row(1, 5, 2, -1)}, options, torch.float64, hessian)["a"].linear
        best = float("inf")
        for codes in itertools.product(range(4), repeat=5):
            matrix = np.stack([inputs.numpy() @ np.array(codes, dtype=float), inputs.numpy().sum(1)], 1)
            wanted = inputs.numpy() @ weight[0].numpy()
            left = wanted - matrix @ np.linalg.lstsq(matrix, wanted, rcond=None)[0]
            best = min(best, float(left @ left) / 30)
        assert loss_of(weight, found, hessian) >= best * (1 - 1e-9)
        ratios.append(loss_of(weight, found, hessian) / best)
    assert np.median(ratios) < 2


@pytest.mark.parametrize("method", ["feedback", "nearest"])
def test_weights_far_from_zero_lose_less_than_with_a_whole_zero_point(method: str) -> None:
    problem = correlated_problem(8, 64, 200, seed=2)
    weight = problem.weight + 4
    losses = {}
    for encoding in ("integer", "affine"):
        plan = replace(row(8, 64), encoding=encoding)
        options = RoundingOptions(method=method, scale_dtype="bfloat16")
        found = round_linears({"a": weight}, {"a": plan}, options, torch.float64, problem.hessian)["a"].linear
        losses[encoding] = loss_of(weight, found, problem.hessian)
    assert losses["affine"] < 0.5 * losses["integer"]


def test_stochastic_rounding_leaves_no_weight_outside_its_grid() -> None:
    problem = correlated_problem(16, 64, 200, seed=3)
    options = RoundingOptions(method="stochastic")
    found = round_linears({"a": problem.weight}, {"a": row(16, 64)}, options, torch.float64, problem.hessian)["a"]
    assert found.records == ()


def test_outliers_keep_their_weights_and_their_codes_are_the_nearest() -> None:
    problem = correlated_problem(8, 64, 200, seed=4)
    plan = row(8, 64, outliers=(3, 40))
    found = round_linears({"a": problem.weight}, {"a": plan}, RoundingOptions(), torch.float32, problem.hessian)
    linear = found["a"].linear
    assert torch.equal(linear.dequantize()[:, [3, 40]], problem.weight[:, [3, 40]].float())
    plain = linear.without_outliers(torch.float64)
    scale = spread_by_hand(linear.scales.double(), 32, 64)[:, [3, 40]]
    offset = spread_by_hand(linear.offsets.double(), 32, 64)[:, [3, 40]]
    every = torch.stack([code * scale + offset for code in range(16)])
    nearest = (every - problem.weight[:, [3, 40]]).abs().amin(0)
    torch.testing.assert_close((plain - problem.weight)[:, [3, 40]].abs(), nearest, rtol=1e-4, atol=1e-5)


# -- what is stored ----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 70), st.integers(2, 8), st.sampled_from([1, 8, 32, 64, -1]), st.booleans())
def test_tensors_read_back_and_take_the_bytes_that_were_planned(
    rows: int, columns: int, bits: int, group_size: int, with_outlier: bool
) -> None:
    plan = row(rows, columns, bits, group_size, (columns // 2,) if with_outlier else ())
    weight = draw(rows, columns, seed=rows + columns).float()
    found = round_linears({"a": weight}, {"a": plan}, RoundingOptions(method="nearest"), torch.bfloat16)["a"].linear
    tensors = found.to_tensors()
    assert sum(tensor.nbytes for tensor in tensors.values()) == plan.stored_bytes
    read = AFFINE.from_tensors(tensors, plan)
    assert torch.equal(read.dequantize(), found.dequantize())
    assert torch.equal(read.codes, found.codes)
    groups = 1 if group_size == -1 else -(-columns // group_size)
    assert found.scales.shape == found.offsets.shape == (rows, groups)
    assert found.scales.dtype == found.offsets.dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda tensors: tensors.pop("offsets"), "tensor offsets is missing"),
        (
            lambda tensors: tensors.update(scales=tensors["scales"][:, :1]),
            "tensor scales has shape [2, 1], expected [2, 2]",
        ),
    ],
)
def test_damaged_tensors_are_refused(change, line: str) -> None:
    plan = row(2, 64)
    weight = {"a": draw(2, 64).float()}
    found = round_linears(weight, {"a": plan}, RoundingOptions(method="nearest"), torch.bfloat16)
    tensors = found["a"].linear.to_tensors()
    change(tensors)
    with pytest.raises(AccullmError) as error:
        AFFINE.from_tensors(tensors, plan)
    assert error.value.line() == line


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, ""),
        ({"bits": 9}, "is to have 9 bits"),
        ({"group_size": 0}, "is to have group size 0"),
        ({"symmetric": True}, "is to have no offset, or scales that are not of 16 bits"),
        ({"scale_bits": 6}, "is to have no offset, or scales that are not of 16 bits"),
    ],
)
def test_what_cannot_be_stored_like_this(changes: dict[str, object], problem: str) -> None:
    assert AFFINE.problem(replace(row(2, 64), **changes)) == problem
