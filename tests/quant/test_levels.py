"""Tables of levels: against Lloyd's conditions, brute force and plain arithmetic in float64."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accullm_cli.errors import AccullmError
from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.encodings.levels import LEVELS, RELATIVE_DAMAGE
from accullm_cli.quant.grid import Grid
from accullm_cli.quant.linear import QuantizedLinear
from accullm_cli.quant.plan import LinearPlan
from accullm_cli.quant.rounding import RoundingOptions, round_linears
from accullm_cli.quant.scales import LARGEST_RATIO, StorableScales
from tests.quant.references import correlated_problem

ENCODING = ENCODINGS["levels"]
WIDTHS = sorted(LEVELS)


def row(
    rows: int, columns: int, bits: int = 4, group_size: int = 32, outliers: tuple[int, ...] = (), scale_bits: int = 7
) -> LinearPlan:
    return LinearPlan("a", rows, columns, bits, group_size, True, outliers, scale_bits=scale_bits, encoding="levels")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def values_by_hand(codes: torch.Tensor, scale: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    size = codes.shape[1] if group_size == -1 else group_size
    columns = range(codes.shape[1])
    weights = [
        [LEVELS[bits][int(codes[n, k])] * float(scale[n, k // size]) for k in columns] for n in range(len(codes))
    ]
    return torch.tensor(weights, dtype=torch.float64)


WEIGHT = draw(500, 64)


@cache
def best_by_force(bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each row of WEIGHT the least squared error that any of many scales has, that scale, and its levels."""
    table, weight = torch.tensor(LEVELS[bits], dtype=torch.float64), WEIGHT
    largest = weight.abs().amax(1) / 127
    best = torch.full_like(largest, torch.inf)
    best_scale, best_levels = torch.zeros_like(largest), torch.zeros_like(weight)
    for fraction in torch.linspace(0.4 if bits < 4 else 0.7, 1.25, 111, dtype=torch.float64).tolist():
        for sign in (1, -1):
            scale = (sign * fraction * largest)[:, None]
            levels = table[torch.searchsorted((table[1:] + table[:-1]) / 2, weight / scale)]
            error = (weight - levels * scale).square().sum(1)
            better = error < best
            best = torch.where(better, error, best)
            best_scale = torch.where(better, scale[:, 0], best_scale)
            best_levels = torch.where(better[:, None], levels, best_levels)
    return best, best_scale, best_levels


# -- the table ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", WIDTHS)
def test_levels_ascend_within_eight_bits_and_one_is_zero(bits: int) -> None:
    levels = LEVELS[bits]
    assert len(levels) == 2**bits
    assert list(levels) == sorted({*levels})
    assert 0 in levels
    assert levels[-1] == 127 == max(map(abs, levels))
    assert all(float(torch.tensor(float(level)).bfloat16()) == level for level in levels)


@pytest.mark.parametrize(("bits", "slack"), [(3, 1.0), (4, 1.0), (5, 1.5)])
def test_each_level_is_the_mean_of_what_is_rounded_to_it(bits: int, slack: float) -> None:
    """Lloyd's condition for a table of least error, but for the level that has to be 0."""
    _, scale, levels = best_by_force(bits)
    wanted = (WEIGHT / scale[:, None]).flatten()
    importance = scale.square()[:, None].expand_as(WEIGHT).flatten()
    for level in LEVELS[bits]:
        own = levels.flatten() == level
        mean = float((wanted * importance)[own].sum() / importance[own].sum())
        assert abs(mean - level) < (slack if level else 4)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_error_over_that_of_integer_codes_is_as_the_planner_takes_it(bits: int) -> None:
    error, _, _ = best_by_force(bits)
    integer = LinearPlan("a", 500, 64, 4, 64, False)
    grid, _ = ENCODINGS["integer"].grid(WEIGHT, integer, "float16", torch.ones(64))
    other = (grid.values(grid.round_to_nearest(WEIGHT)) - WEIGHT).square().sum()
    assert float(error.sum() / other) == pytest.approx(RELATIVE_DAMAGE[bits], rel=0.03)
    assert ENCODING.relative_damage(row(1, 1, bits)) == RELATIVE_DAMAGE[bits]


# -- the grid ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("searches", [True, False])
@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(WIDTHS), st.sampled_from([3, 8, 32, -1]), st.integers(1, 40), st.sampled_from([4, 7, 16]),
    st.sampled_from(["float16", "bfloat16"]), st.floats(-2, 2), st.integers(0, 99),
)  # fmt: skip
def test_all_values_can_be_stored_and_codes_are_those_of_the_nearest(
    searches: bool, bits: int, group_size: int, columns: int, scale_bits: int, dtype: str, mean: float, seed: int
) -> None:
    weight = draw(3, columns, seed=seed) + mean
    plan = row(3, columns, bits, group_size, scale_bits=scale_bits)
    grid, sentences = ENCODING.grid(weight, plan, dtype, draw(columns, seed=seed + 1).square() if searches else None)
    assert sentences == [] or (scale_bits < 16 and "scales lie outside of what can be stored" in sentences[0])
    assert torch.equal(grid.scale.half().double(), grid.scale)
    if dtype == "bfloat16":
        assert torch.equal(grid.scale.bfloat16().double(), grid.scale)
    table = grid.storable.table
    assert (table is None) == (scale_bits == 16)
    if table is not None:
        assert len(table) == 2**scale_bits
        assert torch.equal(table, -table.flip(0))
        assert torch.isin(grid.scale, table.double()).all()
    codes = grid.round_to_nearest(weight)
    assert torch.equal(grid.values(codes), values_by_hand(codes, grid.scale, bits, group_size))
    every = torch.stack(
        [values_by_hand(torch.full_like(codes, code), grid.scale, bits, group_size) for code in range(2**bits)]
    )
    nearest = (every - weight).abs().amin(0)
    torch.testing.assert_close((grid.values(codes) - weight).abs(), nearest, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_search_is_within_a_few_percent_of_brute_force(bits: int) -> None:
    least, _, _ = best_by_force(bits)
    for scale_bits in (16, 7):
        grid, _ = ENCODING.grid(WEIGHT, row(500, 64, bits, 64, scale_bits=scale_bits), "float16", torch.ones(64))
        error = (grid.values(grid.round_to_nearest(WEIGHT)) - WEIGHT).square().sum(1)
        assert float((error / least).mean()) < (1.02 if bits < 5 else 1.035)


def test_the_sign_of_a_scale_says_which_end_reaches_further() -> None:
    weight = draw(2, 64, seed=2)
    weight[0, 7], weight[1, 9] = 4.5, -4.5
    for importance in (torch.ones(64), None):
        grid, _ = ENCODING.grid(weight, row(2, 64, 4, 64), "float16", importance)
        assert grid.scale[0, 0] > 0 > grid.scale[1, 0]


def test_a_grid_without_importance_holds_the_whole_range() -> None:
    weight = draw(50, 32, seed=3)
    grid, _ = ENCODING.grid(weight, row(50, 32, scale_bits=16), "float16")
    ends = torch.stack([grid.scale * LEVELS[4][0], grid.scale * LEVELS[4][-1]])
    assert (ends.amin(0) <= weight.amin(1, keepdim=True) * (1 - 2**-10)).all()
    assert (ends.amax(0) >= weight.amax(1, keepdim=True) * (1 - 2**-10)).all()


def test_outlier_features_do_not_stretch_a_grid_unless_they_count() -> None:
    weight, ignored = draw(4, 64, seed=4), torch.zeros(64, dtype=torch.bool)
    plain, _ = ENCODING.grid(weight, row(4, 64), "float16", torch.ones(64), ignored)
    weight[:, 5], ignored[5] = 1000, True
    without, _ = ENCODING.grid(weight, row(4, 64), "float16", torch.ones(64), ignored)
    assert float((without.scale.abs() / plain.scale.abs()).max()) < 1.2
    counted, _ = ENCODING.grid(weight, row(4, 64), "float16", torch.ones(64), ignored, ignored_weight=0.1)
    assert (counted.scale[:, 0].abs() > 100 * plain.scale[:, 0].abs()).all()


def test_groups_of_zeros_are_zeros_and_dead_inputs_do_no_harm() -> None:
    weight = draw(3, 64, seed=5)
    weight[1, :32] = 0
    importance = torch.ones(64)
    importance[32:] = 0
    grid, sentences = ENCODING.grid(weight, row(3, 64), "float16", importance)
    values = grid.values(grid.round_to_nearest(weight))
    assert sentences == []
    assert not values[1, :32].any()
    assert float((values - weight).abs().max()) < 1
    zeros, _ = ENCODING.grid(torch.zeros(2, 64), row(2, 64), "float16", torch.ones(64))
    assert not zeros.values(zeros.round_to_nearest(torch.zeros(2, 64))).any()


def test_scales_that_cannot_be_stored_are_said() -> None:
    weight = draw(2, 32, seed=6)
    weight[1] *= 1e8
    _, sentences = ENCODING.grid(weight, row(2, 32, scale_bits=16), "float16", torch.ones(32))
    assert sentences == ["1 of 2 scales lie outside of what can be stored, 5.96e-08 to 6.55e+04, and were clamped"]


def test_scales_far_below_the_largest_of_a_table_are_said() -> None:
    weight = draw(3, 32, seed=6)
    weight[1] *= 1e-5
    grid, sentences = ENCODING.grid(weight, row(3, 32), "float16", torch.ones(32))
    assert len(sentences) == 1
    assert sentences[0].startswith("1 of 3 scales lie outside of what can be stored, ")
    assert float(grid.scale.abs().max() / grid.scale.abs().min()) <= 1.001 * LARGEST_RATIO
    assert ENCODING.grid(weight[[0, 2]], row(2, 32), "float16", torch.ones(32))[1] == []


def test_fitted_scales_are_of_the_table_and_lose_less() -> None:
    weight, hessian = draw(8, 64, seed=7), draw(64, 64, seed=8)
    hessian = hessian @ hessian.T / 64
    grid, _ = ENCODING.grid(weight, row(8, 64), "float16", hessian.diagonal())
    codes = grid.round_to_nearest(weight)
    error = weight - grid.values(codes)
    before = float(((error @ hessian) * error).sum())
    fitted = grid.fitted(error.clone(), codes, torch.ones(64, dtype=torch.bool), hessian, 0.0)
    after = weight - fitted.values(codes)
    assert grid.storable.table is not None
    assert torch.isin(fitted.scale, grid.storable.table.double()).all()
    assert float(((after @ hessian) * after).sum()) < before


# -- tables of scales --------------------------------------------------------------------------------------


def scale_error(storable: StorableScales, scale: torch.Tensor, energy: torch.Tensor) -> float:
    return float((energy * (storable.round(scale) / scale - 1).square()).sum())


def test_a_table_lies_where_the_energy_is() -> None:
    scale, energy = draw(4000, 1, seed=9).mul(0.4).exp(), draw(4000, 1, seed=10).exp()
    even = StorableScales().with_table(float(scale.min()), float(scale.max()), 6)
    own = StorableScales(signed=True).table_of(scale, energy, 7)
    assert own.table is not None
    assert len(own.table) == 128
    assert scale_error(own, scale, energy) < 0.6 * scale_error(even, scale, energy)
    flat = StorableScales(signed=True).table_of(scale, torch.ones_like(energy), 7)
    assert scale_error(own, scale, energy) < scale_error(flat, scale, energy)


def test_a_table_of_scales_of_which_there_are_few_or_none() -> None:
    for scale in (torch.full((3, 2), 0.25), torch.zeros(3, 2)):
        for energy in (torch.ones(3, 2), torch.zeros(3, 2)):
            storable = StorableScales(signed=True).table_of(scale, energy, 4)
            assert storable.table is not None
            assert len(storable.table) == 16
            assert bool(storable.table.isfinite().all())
            if scale.any():
                assert torch.equal(storable.round(-scale), -scale)


def test_a_table_has_no_scale_far_below_its_largest() -> None:
    table = StorableScales(signed=True).table_of(torch.tensor([[1e-7, 1.0, 0.5]]), torch.ones(1, 3), 6).table
    assert table is not None
    assert float(table[32]) >= 0.99 / LARGEST_RATIO


def test_the_scales_around_one() -> None:
    storable = StorableScales(table=torch.tensor([-2.0, -1.0, 1.0, 2.0]).half(), signed=True)
    lower, upper = storable.around(torch.tensor([-1.3, 1.3, 0.2, 5.0, -5.0]))
    assert lower.tolist() == [-1, 1, 1, 1, -1]
    assert upper.tolist() == [-2, 2, 1, 2, -2]
    assert storable.round(torch.tensor([-1.3, -1.5, 9.0, 0.0])).tolist() == [-1, -2, 2, 1]


# -- what is stored ----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(WIDTHS), st.sampled_from([3, 8, -1]), st.integers(1, 40), st.sampled_from([4, 7, 16]))
def test_a_linear_reads_back_and_takes_the_bytes_that_were_planned(
    bits: int, group_size: int, columns: int, scale_bits: int
) -> None:
    weight = draw(3, columns, seed=columns)
    outliers = (columns // 2,)
    plan = row(3, columns, bits, group_size, outliers, scale_bits)
    ignored = torch.zeros(columns, dtype=torch.bool)
    ignored[list(outliers)] = True
    grid, _ = ENCODING.grid(weight, plan, "float16", torch.ones(columns), ignored)
    codes = grid.round_to_nearest(weight).to(torch.uint8)
    kept = weight[:, outliers].bfloat16()
    stored = ENCODING.store(grid, codes, plan, torch.tensor(outliers), kept)
    assert isinstance(stored, QuantizedLinear)
    wanted = values_by_hand(codes, grid.scale, bits, group_size)
    assert not wanted[:, outliers].any()  # what a reader adds that multiplies outliers by themselves
    wanted[:, outliers] = kept.double()
    assert torch.equal(stored.dequantize().double(), wanted)
    tensors = stored.to_tensors()
    assert set(tensors) <= {*ENCODING.suffixes} - {"qzeros"}
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) == plan.stored_bytes
    back = ENCODING.from_tensors(tensors, plan)
    assert torch.equal(back.dequantize(), stored.dequantize())
    assert back.to_tensors().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in back.to_tensors().items())


def test_what_levels_are_not_is_said() -> None:
    wide = row(2, 8, bits=6)
    assert ENCODING.problem(wide) == "is to have 6 bits, and levels has 2 to 5"
    shifted = LinearPlan("a", 2, 8, 4, 8, False, encoding="levels")
    assert ENCODING.problem(shifted) == "is to have zero points, and levels has none"
    assert ENCODING.problem(row(2, 8, group_size=0)) == "is to have group size 0"
    assert ENCODING.problem(row(2, 8)) == ""
    with pytest.raises(AccullmError, match="tensor qscales is missing"):
        ENCODING.from_tensors(
            {"qweight": torch.zeros(2, 4, dtype=torch.uint8), "scale_table": torch.ones(128)}, row(2, 8)
        )


# -- rounding ----------------------------------------------------------------------------------------------


def test_no_single_code_of_a_rounded_linear_can_be_improved() -> None:
    problem = correlated_problem(6, 32, 96, seed=0)
    weight, hessian = problem.weight, problem.hessian
    plan = row(6, 32, 4, 16, outliers=(3,))
    options = RoundingOptions(damping=0.01)
    rounded = round_linears({"a": weight}, {"a": plan}, options, torch.float64, hessian)["a"].linear
    assert isinstance(rounded, QuantizedLinear)
    ridge = 0.01 * float(hessian.diagonal()[[k for k in range(32) if k != 3]].mean())
    damped = hessian + ridge * torch.eye(32, dtype=torch.float64)

    def loss(codes: torch.Tensor) -> torch.Tensor:
        values = values_by_hand(codes, rounded.scales, 4, 16)
        values[:, 3] = rounded.outlier_weight[:, 0].double()
        error = weight - values
        return ((error @ damped) * error).sum(1)

    base = loss(rounded.codes)
    for k, code in itertools.product([k for k in range(32) if k != 3], range(16)):
        other = rounded.codes.clone()
        other[:, k] = code
        assert (loss(other) >= base * (1 - 1e-6)).all()


def test_levels_lose_less_than_integer_codes_in_fewer_bits() -> None:
    problem = correlated_problem(64, 128, 512, seed=1)
    weights = {"a": problem.weight}
    losses, sizes = {}, {}
    for name, symmetric, scale_bits in (("levels", True, 7), ("integer", False, 6)):
        plan = LinearPlan("a", 64, 128, 4, 64, symmetric, scale_bits=scale_bits, encoding=name)
        rounded = round_linears(weights, {"a": plan}, RoundingOptions(), torch.float32, problem.hessian)["a"]
        losses[name] = rounded.relative_error
        sizes[name] = plan.stored_bytes - 2 * 2**scale_bits  # the table, which a large linear does not feel
    assert losses["levels"] is not None
    assert losses["integer"] is not None
    assert losses["levels"] ** 2 < 0.95 * losses["integer"] ** 2
    assert sizes["levels"] < sizes["integer"]


def test_a_grid_of_levels_keeps_its_class_and_table_in_parts() -> None:
    grid, _ = ENCODING.grid(draw(6, 64), row(6, 64), "float16", torch.ones(64))
    parts = [grid.rows(slice(start, start + 2)) for start in (0, 2, 4)]
    joined = grid.joined(parts)
    assert type(joined) is Grid
    assert torch.equal(joined.scale, grid.scale)
    assert joined.storable is grid.storable
