"""Outlier features beside a linear: against brute force and plain sums in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accullm_cli.errors import AccullmError
from accullm_cli.quant import rounding
from accullm_cli.quant.correction import DAMPING, CorrectedLinear, read_linear, store_linear, without_correction
from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.plan import LinearPlan
from accullm_cli.quant.rounding import RoundingOptions, round_linears
from tests.quant.references import correlated_problem

ROWS = 6


def row(columns: int, outliers: tuple[int, ...], bits: int = 4, encoding: str = "integer", symmetric: bool = False):
    return LinearPlan("a", ROWS, columns, bits, 16, symmetric, outliers, encoding=encoding, adapter="peft")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(plan: LinearPlan, weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16):
    """The linear, its grid, and the source's weights of the outliers."""
    outliers = torch.tensor(plan.outlier_index, dtype=torch.int64)
    ignored = torch.zeros(plan.in_features, dtype=torch.bool)
    ignored[outliers] = True
    grid, _ = ENCODINGS[plan.encoding].grid(weight, plan, "float16", None, ignored)
    kept = weight[:, outliers].to(dtype)
    codes = grid.round_to_nearest(weight).to(torch.uint8)
    codes[:, outliers] = 0
    return store_linear(grid, codes, plan, outliers, kept), grid, kept


schemes = st.sampled_from([("integer", False), ("integer", True), ("affine", False)])
outlier_sets = st.sets(st.integers(0, 39), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(schemes, st.integers(2, 8), outlier_sets, st.floats(1e-4, 100), st.floats(0, 30), st.integers(0, 99))
def test_corrected_columns_are_the_originals_up_to_the_rounding_of_the_correction(
    scheme: tuple[str, bool], bits: int, outliers: set[int], size: float, strength: float, seed: int
) -> None:
    index = sorted(outliers)
    weight = draw(ROWS, 40, seed=seed) * size
    weight[:, index] *= 1 + strength
    plan = row(40, tuple(index), bits, *scheme)
    linear, _, kept = stored(plan, weight)
    base = without_correction(linear).dequantize().double()
    # As a runtime adds it: a row of A for each feature, with its only 1 where the feature is.
    selector = torch.zeros(len(index), 40, dtype=torch.float64)
    for number, feature in enumerate(index):
        selector[number, feature] = 1
    assert isinstance(linear, CorrectedLinear)
    total = base + linear.correction.double() @ selector
    lost = kept.double() - base[:, index]
    bound = 2.0**-11 * lost.abs() + 2.0**-25
    # Of what was lost, float32 holds 24 bits before it is rounded to float16.
    bound += 2.0**-24 * kept.double().abs()
    assert ((total[:, index] - kept.double()).abs() <= bound).all()
    others = [column for column in range(40) if column not in outliers]
    assert torch.equal(total[:, others], base[:, others])
    own = linear.dequantize().double()
    assert ((own - total).abs() <= 2.0**-24 * total.abs()).all()


@pytest.mark.parametrize("scheme", [("integer", False), ("integer", True), ("affine", False)])
@pytest.mark.parametrize("count", [1, 3])
def test_without_the_correction_the_last_outlier_has_the_code_of_least_loss(
    scheme: tuple[str, bool], count: int
) -> None:
    """All others as they are, every code that it could have is tried. Small features make up for much of the others."""
    problem = correlated_problem(ROWS, 48, 200, seed=5)
    outliers = tuple(sorted(problem.hessian.diagonal().argsort()[:count].tolist()))
    plan = row(48, outliers, 5, *scheme)
    found = round_linears({"a": problem.weight}, {"a": plan}, RoundingOptions(), torch.bfloat16, problem.hessian)["a"]
    base = without_correction(found.linear).dequantize(torch.float64)
    own = problem.hessian.diagonal()[list(outliers)].double()
    last = outliers[int(own.argmin())]
    damped = problem.hessian.double().clone()
    damped.diagonal().add_(DAMPING * own.mean())
    # The grid of its group, from the values that its columns have.
    stored = without_correction(found.linear)
    values = torch.stack([grid_values(stored, code)[:, last] for code in range(32)], 1)  # [N, 32]
    error = problem.weight.double() - base
    losses = []
    for code in range(32):
        changed = error.clone()
        changed[:, last] = problem.weight[:, last].double() - values[:, code]
        losses.append(((changed @ damped) * changed).sum(1))
    chosen = (values - base[:, last, None]).abs().argmin(1)
    least = torch.stack(losses, 1)
    assert (least.gather(1, chosen[:, None]).squeeze(1) <= least.amin(1) * (1 + 1e-4)).all()
    nearest = (values - problem.weight[:, last, None]).abs().argmin(1)
    assert not torch.equal(chosen, nearest)


def grid_values(linear: object, code: int) -> torch.Tensor:
    """What a code stands for in each place of a linear, float64 [N, K]."""
    codes = torch.full_like(linear.codes, code)  # type: ignore[attr-defined]
    return replace(linear, codes=codes).dequantize(torch.float64)  # type: ignore[type-var]


@pytest.mark.parametrize("encoding", ["integer", "affine"])
def test_a_grid_counts_outliers_that_an_adapter_holds_a_little(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They lie far beyond the others, which gain from a fine grid."""
    problem = correlated_problem(ROWS, 48, 200, seed=6)
    weight = problem.weight.clone()
    weight[:, 7] *= 3
    plans = {"a": row(48, (7,), 4, encoding)}

    def losses() -> tuple[float, float]:
        found = round_linears({"a": weight}, plans, RoundingOptions(), torch.bfloat16, problem.hessian)["a"].linear
        errors = [weight - own.dequantize() for own in (found, without_correction(found))]
        both = [float(((error @ problem.hessian) * error).sum()) for error in errors]
        return both[0], both[1]

    beside, alone = losses()
    monkeypatch.setattr(rounding, "BESIDE_WEIGHT", 0.0)
    beside_before, alone_before = losses()
    assert alone < 0.5 * alone_before
    assert beside < 2 * beside_before


def test_what_a_reader_has_rounded_is_not_rounded_again() -> None:
    linear, _, _ = stored(row(40, (3, 17)), draw(ROWS, 40))
    assert isinstance(linear, CorrectedLinear)
    rounded = linear.base.dequantize(torch.bfloat16)
    expected = rounded.double()
    expected[:, [3, 17]] += linear.correction.double()
    found = linear.added_to(rounded)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=2**-24, atol=0)
    assert not torch.equal(found, linear.dequantize(torch.bfloat16).float())


def test_a_shard_gives_it_back() -> None:
    plan = row(40, (3, 17, 39))
    linear, _, _ = stored(plan, draw(ROWS, 40))
    tensors = linear.to_tensors()
    assert {"outlier_index", "outlier_correction"} < tensors.keys()
    assert "outlier_weight" not in tensors
    again = read_linear(tensors, plan)
    assert isinstance(again, CorrectedLinear)
    assert torch.equal(again.dequantize(), linear.dequantize())
    assert (again.outlier_index.dtype, again.correction.dtype) == (torch.int32, torch.float16)


def test_without_outliers_there_is_nothing_beside_it() -> None:
    plan = row(40, ())
    linear, _, _ = stored(plan, draw(ROWS, 40))
    assert not isinstance(linear, CorrectedLinear)
    assert not isinstance(read_linear(linear.to_tensors(), plan), CorrectedLinear)


def test_a_plan_without_an_adapter_keeps_outliers_in_the_linear() -> None:
    plan = replace(row(40, (3, 17)), adapter="")
    linear, _, kept = stored(plan, draw(ROWS, 40))
    assert torch.equal(linear.dequantize()[:, [3, 17]], kept.float())
    assert {"outlier_index", "outlier_weight"} < linear.to_tensors().keys()


def test_an_outlier_costs_a_row_of_ones_and_zeros_and_16_bits_a_weight() -> None:
    plan = row(40, (3, 17))
    without = replace(plan, outlier_index=())
    assert plan.stored_bytes - without.stored_bytes == 2 * (40 + 2 * ROWS)
    assert replace(plan, adapter="").stored_bytes - without.stored_bytes == 2 * (2 * ROWS + 4)


def test_a_column_that_float16_cannot_correct_is_refused() -> None:
    weight = draw(ROWS, 40)
    weight[2, 5] = 1e6
    with pytest.raises(AccullmError) as caught:
        stored(row(40, (5,)), weight)
    assert caught.value.line() == "a: an outlier feature's weights are beyond what float16 holds; use --outliers 0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outlier_correction": torch.zeros(ROWS, 3)}, "tensor outlier_correction has shape [6, 3], expected [6, 2]"),
        ({"outlier_index": torch.tensor([3, 40])}, "tensor outlier_index names feature 40 of 40"),
        ({"outlier_index": torch.tensor([9, 3])}, "tensor outlier_index is not ascending"),
    ],
)
def test_a_shard_that_does_not_fit_is_refused(change: dict[str, torch.Tensor], message: str) -> None:
    plan = row(40, (3, 17))
    linear, _, _ = stored(plan, draw(ROWS, 40))
    with pytest.raises(AccullmError) as caught:
        read_linear(linear.to_tensors() | change, plan)
    assert caught.value.line() == message


@pytest.mark.parametrize("mode", ["untouched", "compensating"])
@pytest.mark.parametrize("method", ["nearest", "feedback"])
def test_the_rest_is_rounded_as_beside_outliers_in_the_file(
    mode: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same grid."""
    monkeypatch.setattr(rounding, "BESIDE_WEIGHT", 0.0)
    problem = correlated_problem(ROWS, 48, 200, seed=3)
    plan = replace(LinearPlan("a", ROWS, 48, 3, 16, False, (2, 30)), adapter="peft")
    options = RoundingOptions(method=method, outlier_mode=mode)  # type: ignore[arg-type]
    found = {}
    for adapter in ("", "peft"):
        plans = {"a": replace(plan, adapter=adapter)}
        found[adapter] = round_linears({"a": problem.weight}, plans, options, torch.bfloat16, problem.hessian)["a"]
    inside, beside = found[""].linear.dequantize(), found["peft"].linear.dequantize()
    rest = [column for column in range(48) if column not in (2, 30)]
    assert torch.equal(inside[:, rest], beside[:, rest])
    lost = inside[:, [2, 30]] - without_correction(found["peft"].linear).dequantize()[:, [2, 30]]
    assert lost.abs().max() > 0.01
    assert ((inside - beside)[:, [2, 30]].abs() <= 2**-11 * lost.abs() + 2**-22).all()
    if method == "feedback":
        assert found[""].relative_error == pytest.approx(found["peft"].relative_error, rel=1e-3)
