"""Grids against per-group loops in float64, and what every grid must keep to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.grid import SEARCHED_RANGES, Grid, fitted_scales, minmax_grid, searched_grid
from accullm_cli.quant.plan import LinearPlan
from accullm_cli.quant.scales import StorableScales, round_scale

SHAPES = [(2, 4, -1), (3, 10, 4), (1, 1, 8), (4, 33, 16), (2, 6, 1)]


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def groups_of(columns: int, group_size: int) -> list[slice]:
    size = columns if group_size == -1 else group_size
    return [slice(start, min(start + size, columns)) for start in range(0, columns, size)]


def range_by_hand(weights: np.ndarray, bits: int, symmetric: bool, fraction: float) -> tuple[float, float]:
    """Scale and zero point of one group."""
    low, high = fraction * min(weights.min(), 0), fraction * max(weights.max(), 0)
    largest = 2**bits - 1
    scale = float(np.float16((2 * max(-low, high) if symmetric else high - low) / largest))
    return scale, float(2 ** (bits - 1)) if symmetric else float(np.clip(np.rint(-low / scale), 0, largest))


def error_by_hand(weights: np.ndarray, importance: np.ndarray, scale: float, zero: float, bits: int) -> float:
    codes = np.clip(np.rint(weights / scale + zero), 0, 2**bits - 1)
    return float((importance * (weights - (codes - zero) * scale) ** 2).sum())


# -- the whole range ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_grid_spans_the_range_of_each_group(rows, columns, group_size, symmetric, bits):
    weight = normal(rows, columns)
    grid = minmax_grid(weight, bits, group_size, symmetric)
    slices = groups_of(columns, group_size)
    assert grid.scale.shape == grid.zero.shape == (rows, len(slices))
    for row in range(rows):
        for group, part in enumerate(slices):
            expected = range_by_hand(weight[row, part].numpy(), bits, symmetric, 1.0)
            assert (float(grid.scale[row, group]), float(grid.zero[row, group])) == expected


@settings(deadline=None)
@given(
    st.integers(2, 8),
    st.booleans(),
    st.integers(0, 2**31),
    st.floats(-3, 3),
    st.sampled_from([-1, 3, 4]),
    st.sampled_from(["float16", "bfloat16"]),
)
@example(6, True, 6, 1e-6, 3, "float16")
def test_every_weight_lies_half_a_step_from_its_value(bits, symmetric, seed, shift, group_size, scale_dtype):
    weight = normal(3, 10, seed) + shift
    grid = minmax_grid(weight, bits, group_size, symmetric, StorableScales(scale_dtype))
    scale, _ = grid.per_column(10)
    # A stored scale may be smaller than the range asks for, by half a step of its significand.
    # Steps of the smallest float16 are all alike, 2**-24.
    lost = (2**bits - 1) * (2.0**-25 / scale).clamp(min=2.0**-9 if scale_dtype == "bfloat16" else 2.0**-11) * 2
    values = grid.values(grid.round_to_nearest(weight))
    assert ((weight - values).abs() <= scale * (0.5 + lost)).all()


@settings(deadline=None)
@given(
    st.integers(2, 8),
    st.booleans(),
    st.integers(0, 2**31),
    st.floats(-3, 3),
    st.sampled_from(["float16", "bfloat16"]),
)
def test_half_a_code_of_margin_keeps_every_weight_between_first_and_last_code(
    bits, symmetric, seed, shift, scale_dtype
):
    weight = normal(3, 10, seed) + shift
    grid = minmax_grid(weight, bits, 4, symmetric, StorableScales(scale_dtype), margin=0.5)
    scale, zero = grid.per_column(10)
    position = weight / scale + zero
    assert position.min() >= 0
    assert position.max() <= grid.largest_code


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_symmetric_zero_point_is_the_middle_and_others_are_codes(bits):
    weight = normal(5, 16)
    assert minmax_grid(weight, bits, 4, True).zero.unique().tolist() == [2 ** (bits - 1)]
    assert searched_grid(weight, torch.ones(16), bits, 4, True).zero.unique().tolist() == [2 ** (bits - 1)]
    for grid in (
        minmax_grid(weight + 1.5, bits, 4, False),
        searched_grid(weight - 1.5, torch.ones(16), bits, 4, False),
    ):
        assert torch.equal(grid.zero, grid.zero.round())
        assert grid.zero.min() >= 0
        assert grid.zero.max() <= grid.largest_code


@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_of_zero_are_exact_on_every_grid(symmetric):
    weight = normal(4, 12)
    weight[:, ::3] = 0
    for grid in (minmax_grid(weight, 4, 4, symmetric), searched_grid(weight, torch.ones(12), 4, 4, symmetric)):
        assert (grid.values(grid.round_to_nearest(weight))[:, ::3] == 0).all()


def test_a_group_of_zeros_has_scale_one():
    grid = minmax_grid(torch.zeros(1, 4), 4, 4, False)
    assert (grid.scale.tolist(), grid.zero.tolist()) == ([[1.0]], [[0.0]])


def test_ignored_columns_do_not_widen_the_range():
    weight = normal(3, 8)
    ignored = torch.arange(8) == 5
    smaller = weight.clone()
    smaller[:, 5] = 0
    weight[:, 5] = 1000
    ones = torch.ones(8)
    for symmetric in (False, True):
        for with_outlier, without in (
            (minmax_grid(weight, 4, 4, symmetric, ignored=ignored), minmax_grid(smaller, 4, 4, symmetric)),
            (
                searched_grid(weight, ones, 4, 4, symmetric, ignored=ignored),
                searched_grid(smaller, ones * ~ignored, 4, 4, symmetric),
            ),
        ):
            assert torch.equal(with_outlier.scale, without.scale)
            assert torch.equal(with_outlier.zero, without.zero)


def test_codes_are_the_nearest_by_hand():
    grid = Grid(torch.tensor([[0.5, 2.0]]), torch.tensor([[3.0, 0.0]]), 3, 3, False)
    weight = torch.tensor([[-9.0, -0.6, 0.2, 1.1, 5.1]])
    # -0.6 / 0.5 + 3 = 1.8; 0.2 / 0.5 + 3 = 3.4; 1.1 / 2 = 0.55; 5.1 / 2 = 2.55
    assert grid.round_to_nearest(weight).tolist() == [[0, 2, 3, 1, 3]]
    assert grid.values(grid.round_to_nearest(weight)).tolist() == [[-1.5, -0.5, 0.0, 2.0, 6.0]]


# -- the searched range ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_search_finds_the_best_range_of_each_group(rows, columns, group_size, symmetric, bits):
    weight = normal(rows, columns, seed=1) * 1.3 + 0.2
    importance = normal(1, columns, seed=2)[0].exp()
    grid = searched_grid(weight, importance, bits, group_size, symmetric)
    for row in range(rows):
        for group, part in enumerate(groups_of(columns, group_size)):
            own, weights = importance[part].numpy(), weight[row, part].numpy()
            tried = [range_by_hand(weights, bits, symmetric, fraction) for fraction in SEARCHED_RANGES]
            errors = [error_by_hand(weights, own, *candidate, bits) for candidate in tried]
            found = (float(grid.scale[row, group]), float(grid.zero[row, group]))
            # Ranges that end at the same float16 scale tie; their sums may differ in the last bit.
            assert found in tried
            assert error_by_hand(weights, own, *found, bits) == pytest.approx(min(errors), rel=1e-9, abs=1e-18)


@pytest.mark.parametrize("symmetric", [False, True])
def test_search_loses_no_more_than_the_whole_range_in_any_group(symmetric):
    weight, importance = normal(16, 64, seed=3), normal(1, 64, seed=4)[0].exp()

    def errors(grid: Grid) -> torch.Tensor:
        lost = weight - grid.values(grid.round_to_nearest(weight))
        return (importance * lost.square()).view(16, 4, 16).sum(-1)

    searched = errors(searched_grid(weight, importance, 4, 16, symmetric))
    whole = errors(minmax_grid(weight, 4, 16, symmetric))
    assert (searched <= whole).all()
    assert searched.sum() < 0.95 * whole.sum()


def test_search_serves_the_important_column():
    # The large weight spoils the grid for the others; unless it is the one that matters, it gets clipped.
    weight = torch.tensor([[0.11, -0.13, 0.37, -0.31, 0.23, 1.0, -0.41, 0.29]], dtype=torch.float64)
    light, heavy = torch.ones(8), torch.ones(8)
    light[5], heavy[5] = 0.0, 1e6
    clipped = searched_grid(weight, light, 3, 8, False)
    kept = searched_grid(weight, heavy, 3, 8, False)
    lost = [float((weight - grid.values(grid.round_to_nearest(weight)))[0, 5].abs()) for grid in (clipped, kept)]
    assert lost[0] > 0.1
    assert lost[1] < 0.02


def test_search_with_no_importance_at_all_keeps_the_whole_range():
    weight = normal(2, 8)
    grid = searched_grid(weight, torch.zeros(8), 4, 4, False)
    assert torch.equal(grid.scale, minmax_grid(weight, 4, 4, False).scale)


# -- scales that can be stored -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "dtype", "expected"),
    [
        (0.0, "float16", 2.0**-24),
        (1e-30, "bfloat16", 2.0**-24),
        (1e9, "float16", 65504.0),
        (1e9, "bfloat16", 65280.0),
        (65500.0, "bfloat16", 65280.0),
        (1.0, "bfloat16", 1.0),
        (1.0 + 2**-10, "float16", 1.0 + 2**-10),
        (1.0 + 2**-10, "bfloat16", 1.0),
        (1.0 + 3 * 2**-9, "bfloat16", 1.0 + 2**-7),
        (0.1, "float16", 0.0999755859375),
        (0.1, "bfloat16", 0.10009765625),
    ],
)
def test_scales_are_rounded_to_what_can_be_stored(scale, dtype, expected):
    assert round_scale(torch.tensor([scale], dtype=torch.float64), dtype).tolist() == [expected]


@settings(deadline=None)
@given(
    st.floats(-44, 38),
    st.integers(0, 2**31),
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from(["float16", "bfloat16"]),
    st.sampled_from([0, 0.5]),
)
def test_scales_of_tiny_and_huge_weights_can_be_stored(exponent, seed, bits, symmetric, scale_dtype, margin):
    weight = (normal(2, 12, seed).clamp(-3, 3) * 10.0**exponent).float().clamp(-3e38, 3e38)
    for grid in (
        minmax_grid(weight, bits, 4, symmetric, StorableScales(scale_dtype), margin=margin),
        searched_grid(weight, torch.ones(12), bits, 4, symmetric, StorableScales(scale_dtype)),
    ):
        assert grid.scale.isfinite().all()
        assert (grid.scale > 0).all()
        assert torch.equal(grid.scale.half().float(), grid.scale)
        if scale_dtype == "bfloat16":
            assert torch.equal(grid.scale.bfloat16().float(), grid.scale)
        codes = grid.round_to_nearest(weight)
        assert codes.isfinite().all()
        assert codes.min() >= 0
        assert codes.max() <= grid.largest_code


# -- fitted ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.sampled_from([1, 3, 8, 20]), st.sampled_from(["float16", "bfloat16"]))
def test_a_fitted_scale_never_costs_anything_and_can_be_stored(seed, size, scale_dtype):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(30, 20, generator=generator, dtype=torch.float64)
    hessian = rows.T @ rows
    weight = normal(3, 20, seed)
    grid = minmax_grid(weight, 3, size, False, StorableScales(scale_dtype))
    codes = torch.randint(0, 8, (3, 20), generator=generator).double()
    steps = codes - grid.per_column(20)[1]

    def loss(scale: torch.Tensor) -> torch.Tensor:
        error = weight - steps * scale.repeat_interleave(size, 1)[:, :20]
        return ((error @ hessian + 2.5 * error) * error).sum(1)

    error = weight - grid.values(codes)
    before = grid.scale.clone()
    fitted = fitted_scales(grid.scale, error, steps, hessian, 2.5, size, StorableScales(scale_dtype))
    assert torch.equal(grid.scale, before)
    assert (loss(fitted) <= loss(grid.scale) * (1 + 1e-12)).all()
    assert torch.equal(round_scale(fitted, scale_dtype), fitted)


def test_a_group_whose_codes_are_all_zero_keeps_its_scale():
    scale = torch.tensor([[0.5, 0.25]])
    steps = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    error = torch.tensor([[0.3, 0.1, 0.2, 0.2]])
    fitted = fitted_scales(scale, error, steps, torch.eye(4), 0.0, 2)
    assert fitted[0, 0] == 0.5
    assert fitted[0, 1] == pytest.approx(0.45, rel=1e-3)


# -- zero points from 1 --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 8), st.sampled_from([3, 8, -1]), st.booleans(), st.floats(-3, 3), st.integers(0, 99))
def test_zero_points_from_1_hold_what_others_hold(
    bits: int, group_size: int, searches: bool, mean: float, seed: int
) -> None:
    weight = torch.randn(4, 13, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean
    weight[0] = weight[0].abs()
    weight[1] = 0
    row = LinearPlan("a", 4, 13, bits, group_size, False, encoding="integer from 1")
    importance = torch.ones(13) if searches else None
    grid, sentences = ENCODINGS["integer from 1"].grid(weight, row, "float16", importance)
    assert sentences == []
    assert grid.zero.min() >= 1
    assert grid.zero.max() <= 2**bits - 1
    assert torch.equal(grid.zero, grid.zero.round())
    if not searches:
        # The range takes a step more where it was all on one side: nothing is further away than half a step, and what
        # the zero point and the scale lost when they were rounded.
        scale, _ = grid.per_column(13)
        left = (weight - grid.values(grid.round_to_nearest(weight))).abs()
        assert (left <= scale * (1 + 2**bits * 2**-11)).all()
        if group_size == -1:
            plain, _ = ENCODINGS["integer"].grid(weight, row, "float16")
            both_sides = -weight.amin(1) * (2**bits - 2) >= weight.amax(1).clamp(min=1e-9)
            for found, expected in ((grid.scale, plain.scale), (grid.zero, plain.zero)):
                assert torch.equal(found[both_sides], expected[both_sides])


def test_a_group_of_positive_weights_begins_one_step_below_zero() -> None:
    weight = torch.tensor([[0.0, 1.0, 2.0, 14.0]], dtype=torch.float64)
    row = LinearPlan("a", 1, 4, 4, -1, False, encoding="integer from 1")
    grid, _ = ENCODINGS["integer from 1"].grid(weight, row, "float16")
    assert (float(grid.scale), float(grid.zero)) == (1.0, 1.0)
    assert grid.round_to_nearest(weight).tolist() == [[1.0, 2.0, 3.0, 15.0]]
