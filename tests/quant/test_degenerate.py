"""Inputs with dead, equal or missing rows: rounding neither fails nor leaves NaN, and says what it did."""

from __future__ import annotations

import itertools

import pytest
import torch

from accullm_cli.errors import EXIT_USAGE, AccullmError
from accullm_cli.quant.feedback import NumericalError
from accullm_cli.quant.grid import searched_grid
from accullm_cli.quant.linear import QuantizedLinear
from accullm_cli.quant.rounding import RoundedLinear, RoundingOptions, round_linears
from tests.quant.references import Problem, correlated_problem, plan_of

METHODS = ("nearest", "feedback", "stochastic")
MODES = ("untouched", "compensating")


def rounded(problem: Problem, options: RoundingOptions, pull: torch.Tensor | None = None, **plan) -> RoundedLinear:
    """In float32, as the quantize stage does."""
    weights, plans = {"a": problem.weight.float()}, {"a": plan_of(problem, **plan)}
    pulls = None if pull is None else {"a": pull}
    return round_linears(weights, plans, options, torch.bfloat16, problem.hessian.float(), pulls)["a"]


def assert_sound(linear: QuantizedLinear) -> None:
    assert linear.dequantize().isfinite().all()
    assert (linear.scales > 0).all()
    assert linear.scales.isfinite().all()
    assert linear.codes.max() < 2**linear.bits
    assert linear.zeros is None or linear.zeros.max() < 2**linear.bits


def degenerate(name: str) -> Problem:
    problem = correlated_problem(6, 12, 40, seed=0)
    weight, rows = problem.weight, problem.quantized.clone()
    if name == "dead features":
        rows[:, [0, 3, 11]] = 0
    elif name == "dead input":
        rows[:] = 0
    elif name == "equal features":
        rows = rows[:, [0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3]]
    elif name == "one token":
        rows = rows[:1]
    elif name == "one feature":
        weight, rows = weight[:, :1], rows[:, :1]
    elif name == "one row":
        weight = weight[:1]
    elif name == "zero weights":
        weight = torch.zeros_like(weight)
    elif name == "a constant row":
        weight = weight.clone()
        weight[2] = 0.3
    elif name == "a huge feature":
        rows[:, 5] *= 1e6
    return Problem(weight, 1.01 * rows, rows)


NAMES = (
    "dead features",
    "dead input",
    "equal features",
    "one token",
    "one feature",
    "one row",
    "zero weights",
    "a constant row",
    "a huge feature",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_degenerate_inputs_are_rounded(name, method):
    problem = degenerate(name)
    count = problem.weight.shape[1]
    sets = ((), (0,)) if count == 1 else ((), (3, 5), tuple(range(count)))
    for mode, outliers, symmetric in itertools.product(MODES, sets, (False, True)):
        options = RoundingOptions(method, mode)
        result = rounded(problem, options, problem.pull.float(), group_size=5, outliers=outliers, symmetric=symmetric)
        assert_sound(result.linear)
        assert result.records == ()


@pytest.mark.parametrize("method", METHODS)
def test_a_dead_feature_is_rounded_to_nearest(method):
    # It gets no feedback, since it is correlated with nothing, and its error goes nowhere.
    problem = degenerate("dead features")
    linear = rounded(problem, RoundingOptions(method, grid="minmax"), symmetric=True).linear
    if method == "stochastic":
        neighbours = (problem.weight / linear.scales.double() + 8).floor()
        assert torch.isin(linear.codes[:, [0, 3, 11]] - neighbours[:, [0, 3, 11]], torch.tensor([0.0, 1.0])).all()
    else:
        nearest = (problem.weight.float() / linear.scales.float() + 8).round().clamp(0, 15)
        assert linear.codes[:, [0, 3, 11]].tolist() == nearest[:, [0, 3, 11]].int().tolist()


def test_relative_error_of_an_output_that_is_always_zero_is_unknown():
    assert rounded(degenerate("dead input"), RoundingOptions()).relative_error is None


def test_equal_features_share_one_error():
    # Twelve copies of one input: only the sum of their weights matters, and feedback keeps it to half a code.
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(50, 1, generator=generator, dtype=torch.float64)
    problem = Problem(torch.randn(8, 12, generator=generator, dtype=torch.float64), one, one.expand(-1, 12))
    linear = rounded(problem, RoundingOptions(target="original", grid="minmax", damping=1e-4)).linear
    lost = (problem.weight - linear.dequantize().double()).sum(1).abs()
    assert (lost <= 0.51 * linear.scales[:, 0].double()).all()


@pytest.mark.parametrize("method", METHODS)
def test_without_a_hessian_rounding_is_nearest_and_recorded(method):
    problem = correlated_problem(4, 12, 10, seed=1)
    plan = plan_of(problem, group_size=8, outliers=(2,))
    result = round_linears({"a": problem.weight}, {"a": plan}, RoundingOptions(method), torch.bfloat16)["a"]
    expected = (
        () if method == "nearest" else ("no calibration token reached its input: rounded to nearest without data",)
    )
    assert result.records == expected
    assert result.relative_error is None
    # The grid is nearest's, too.
    ignored = torch.arange(12) == 2
    grid = searched_grid(problem.weight, torch.ones(12), 4, 8, False, ignored=ignored)
    codes = grid.round_to_nearest(problem.weight)
    codes[:, 2] = grid.zero[:, 0]
    assert result.linear.scales.tolist() == grid.scale.tolist()
    assert result.linear.codes.tolist() == codes.tolist()


# -- damping -----------------------------------------------------------------------------------------------


def indefinite(excess: float) -> torch.Tensor:
    """Diagonal 1, smallest eigenvalue -excess."""
    return torch.tensor([[1.0, 1.0 + excess], [1.0 + excess, 1.0]])


@pytest.mark.parametrize(
    ("excess", "damping", "raised"),
    [(0.05, 0.01, "0.1"), (0.5, 0.01, "1"), (0.5, 0.3, "1"), (0.05, 0.0, "0.1"), (5e-6, 0.0, "1e-05")],
)
def test_raised_damping_is_recorded(excess, damping, raised):
    weight = torch.tensor([[0.3, -0.7]])
    plan = plan_of(Problem(weight, weight, weight))
    result = round_linears(
        {"a": weight}, {"a": plan}, RoundingOptions(damping=damping), torch.float32, indefinite(excess)
    )
    assert result["a"].records == (f"Hessian not positive definite: damping raised to {raised}",)
    assert_sound(result["a"].linear)


def test_damping_that_suffices_is_not_recorded():
    weight = torch.tensor([[0.3, -0.7]])
    plan = plan_of(Problem(weight, weight, weight))
    result = round_linears({"a": weight}, {"a": plan}, RoundingOptions(damping=0.1), torch.float32, indefinite(0.05))
    assert result["a"].records == ()


def refusal(**arguments) -> str:
    weight = torch.tensor([[0.3, -0.7]])
    plan = plan_of(Problem(weight, weight, weight), name="layers.0.q_proj")
    with pytest.raises(AccullmError) as caught:
        round_linears({plan.name: weight}, {plan.name: plan}, RoundingOptions(), torch.float32, **arguments)
    assert caught.value.exit_code == EXIT_USAGE
    return caught.value.line()


def test_a_hessian_that_no_damping_helps_is_refused():
    expected = "layers.0.q_proj: the Hessian cannot be factored at any damping up to its mean; use more samples"
    assert refusal(hessian=indefinite(2.0)) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(value):
    broken = torch.eye(2)
    broken[0, 1] = value
    hint = "check the calibration text and model"
    expected = "layers.0.q_proj: the {} holds NaN or Inf in 1 of its {} entries; " + hint
    assert refusal(hessian=broken) == expected.format("Hessian", 4)
    pull = {"layers.0.q_proj": broken[:, 1:]}
    assert refusal(hessian=torch.eye(2), pulls=pull) == expected.format("pull of earlier errors", 2)
    fisher = {"layers.0.q_proj": torch.full((1, 1), value)}
    assert refusal(hessian=torch.eye(2), fishers=fisher) == expected.format("Fisher matrix", 1)


def test_what_cannot_be_factored_is_named_and_kept():
    """For linears that share an input all of them; for a Fisher matrix the one whose it is."""
    weight = torch.tensor([[0.3, -0.7]])
    plans = {name: plan_of(Problem(weight, weight, weight), name=name) for name in ("q_proj", "k_proj")}
    weights = dict.fromkeys(plans, weight)
    with pytest.raises(NumericalError) as caught:
        round_linears(weights, plans, RoundingOptions(), torch.float32, indefinite(2.0))
    end = "cannot be factored at any damping up to its mean; use more samples"
    assert caught.value.line() == f"q_proj, k_proj: the Hessian {end}"
    assert (caught.value.kind, caught.value.matrix.tolist()) == ("Hessian", indefinite(2.0).tolist())
    fishers = {"k_proj": torch.tensor([[-1.0]])}
    with pytest.raises(NumericalError) as caught:
        round_linears(weights, plans, RoundingOptions(), torch.float32, torch.eye(2), fishers=fishers)
    assert caught.value.line() == f"k_proj: the Fisher matrix {end}"
    assert (caught.value.kind, caught.value.matrix.tolist()) == ("Fisher matrix", [[-1.0]])


def test_a_target_that_overflows_is_refused():
    """A pull that is finite, over a Hessian as small as float32 can hold, is no weight any more."""
    weight = torch.tensor([[0.3, -0.7]])
    plan = plan_of(Problem(weight, weight, weight), name="q_proj")
    pulls = {"q_proj": torch.full((2, 1), 1e10)}
    with pytest.raises(NumericalError) as caught:
        round_linears(
            {"q_proj": weight}, {"q_proj": plan}, RoundingOptions(), torch.float32, 1e-30 * torch.eye(2), pulls
        )
    start = "q_proj: the corrected target holds NaN or Inf in 2 of its 2 entries"
    assert caught.value.line() == f"{start}; check the calibration text and model"


# -- scales beyond what is stored --------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("size", "options", "plan", "expected"),
    [
        (1e7, {}, {}, "4 of 8 scales lie outside of what can be stored, 5.96e-08 to 6.55e+04"),
        (1e7, {"scale_dtype": "bfloat16"}, {}, "4 of 8 scales lie outside of what can be stored, 5.96e-08 to 6.53e+04"),
        (1e-9, {}, {}, "4 of 8 scales lie outside of what can be stored, 5.96e-08 to 6.55e+04"),
        (1e-5, {}, {"scale_bits": 6}, "4 of 8 scales lie outside of what can be stored, "),
        (1e-2, {}, {"scale_bits": 6}, None),
        (1e-2, {}, {}, None),
    ],
)
def test_clamped_scales_are_recorded(method, size, options, plan, expected):
    """Two of four rows have one tiny (or huge) group, two have two."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(4, 16, generator=generator) + 0.5
    weight[:2, :8] *= size
    weight[2, :] *= size
    plan = plan_of(Problem(weight, weight, weight), group_size=8, **plan)
    result = round_linears({"a": weight}, {"a": plan}, RoundingOptions(method, **options), torch.float32, torch.eye(16))
    clamps = [record for record in result["a"].records if "scales" in record]
    assert len(clamps) == (expected is not None)
    for clamp in clamps:
        assert clamp.startswith(expected)
        assert clamp.endswith(", and were clamped")


def test_groups_of_zeros_are_not_clamped():
    weight = torch.zeros(2, 8)
    weight[0, :4] = 1
    plan = plan_of(Problem(weight, weight, weight), group_size=4, scale_bits=6)
    assert round_linears({"a": weight}, {"a": plan}, RoundingOptions(), torch.float32, torch.eye(8))["a"].records == ()


# -- outliers as they are ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_untouched_outliers_are_kept_bit_for_bit(dtype, method, symmetric):
    problem = correlated_problem(5, 20, 60, seed=2)
    source = problem.weight.to(dtype)
    source[:, 4] = torch.tensor([65504.0, -0.0, 6e-8, 1e-3, -3.0]).to(dtype)  # beyond the grid, -0 and subnormal
    plan = plan_of(problem, group_size=8, symmetric=symmetric, outliers=(1, 4, 19))
    linear = round_linears(
        {"a": source.float()},
        {"a": plan},
        RoundingOptions(method, target="original"),
        dtype,
        problem.hessian.float(),
    )["a"].linear
    kept = source[:, [1, 4, 19]]
    assert linear.outlier_weight.dtype == dtype
    assert linear.outlier_weight.view(torch.uint8).tolist() == kept.contiguous().view(torch.uint8).tolist()
    assert linear.outlier_index.tolist() == [1, 4, 19]
    assert linear.outlier_index.dtype == torch.int32
    for column, group in ((1, 0), (4, 0), (19, 2)):
        zero = [8] * 5 if linear.zeros is None else linear.zeros[:, group].tolist()
        assert linear.codes[:, column].tolist() == zero
    # The grid spans the rest alone.
    assert linear.scales.max() < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compensating_outliers_are_rounded_to_the_sources_dtype(dtype):
    problem = correlated_problem(5, 20, 60, seed=2)
    options = RoundingOptions(outlier_mode="compensating", target="original")
    plan = plan_of(problem, group_size=8, outliers=(1, 4, 19))
    linear = round_linears({"a": problem.weight}, {"a": plan}, options, dtype, problem.hessian)["a"].linear
    assert linear.outlier_weight.dtype == dtype
    assert (linear.outlier_weight.double() - problem.weight[:, [1, 4, 19]]).abs().max() > 0.01
