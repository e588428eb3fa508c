"""Stochastic rounding: published random numbers, repeatable codes, and outputs whose mean is the unrounded output."""

from __future__ import annotations

import pytest
import torch

from accullm_cli.quant.philox import philox, uniform
from accullm_cli.quant.rounding import RoundedLinear, RoundingOptions, round_linears
from tests.quant.references import Problem, correlated_problem, plan_of

SEEDS = 1000


# -- the generator -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_words(counter, key, expected):
    """Known answers of Random123 (kat_vectors, philox4x32-10)."""
    words = [torch.tensor([int(word, 16)]) for word in counter.split()]
    low, high = (int(word, 16) for word in key.split())
    found = philox((words[0], words[1], words[2], words[3]), (low, high))
    assert " ".join(f"{int(word):08x}" for word in found) == expected


def philox_in_integers(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32-10 in Python's own integers."""
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(b >> 32) ^ counter[1] ^ key[0], b % 2**32, (a >> 32) ^ counter[3] ^ key[1], a % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


@pytest.mark.parametrize("seed", [0, 7, 2**32, 2**63 - 1, 2**64 - 1])
def test_each_weight_gets_its_own_word(seed):
    columns = torch.tensor([5, 0, 4000])
    found = uniform(seed, 2**32 - 1, columns, rows=7)
    for i, column in enumerate(columns.tolist()):
        for row in range(7):
            words = philox_in_integers([row // 4, column, 2**32 - 1, 0], [seed % 2**32, seed >> 32])
            assert float(found[i, row]) == (words[row % 4] >> 8) / 2**24


def test_numbers_are_uniform_below_one():
    numbers = uniform(3, 1, torch.arange(64), rows=1000).double().flatten()
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    counts = torch.histc(numbers, 16, 0, 1)
    # Chi-square with 15 degrees of freedom: above 37.7 once in 1000.
    assert float(((counts - 4000) ** 2 / 4000).sum()) < 37.7


# -- codes -------------------------------------------------------------------------------------------------


def round_stochastically(problem: Problem, seed: int, bits: int = 4, name: str = "a", **plan) -> RoundedLinear:
    plans = {name: plan_of(problem, bits=bits, group_size=8, name=name, **plan)}
    options = RoundingOptions("stochastic", seed=seed)
    return round_linears({name: problem.weight}, plans, options, torch.bfloat16, problem.hessian)[name]


def test_a_seed_gives_the_same_codes_again_and_others_other_codes():
    problem = correlated_problem(8, 40, 100, seed=1)
    seeds = (0, 1, 2**32, 2**63 - 1)
    codes = [round_stochastically(problem, seed).linear.codes for seed in seeds]
    for i, seed in enumerate(seeds):
        assert torch.equal(codes[i], round_stochastically(problem, seed).linear.codes)
        assert all((codes[i] != other).float().mean() > 0.1 for other in codes[:i])


def test_two_linears_of_one_seed_get_different_numbers():
    problem = correlated_problem(8, 40, 100, seed=1)
    first, second = (round_stochastically(problem, 0, name=name).linear.codes for name in ("q_proj", "k_proj"))
    assert (first != second).float().mean() > 0.1


def test_uncorrelated_features_go_to_one_of_the_two_neighbours_in_proportion():
    # 4000 equal weights between two that span the range of 14 codes, one less than there are: scale 1, position 5.25.
    weight = torch.tensor([[0.0, 5.25, 14.0]], dtype=torch.float64).expand(4000, 3)
    hessian = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).diag()
    problem = Problem(weight, weight, weight)
    linear = round_linears(
        {"a": weight}, {"a": plan_of(problem)}, RoundingOptions("stochastic"), torch.float32, hessian
    )["a"].linear
    assert linear.scales.unique().tolist() == [1.0]
    assert linear.codes[:, 0].unique().tolist() == [0]
    assert linear.codes[:, 2].unique().tolist() == [14]
    assert linear.codes[:, 1].unique().tolist() == [5, 6]
    # Binomial: one standard error of the share is 0.0068.
    assert float((linear.codes[:, 1] == 6).double().mean()) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_no_weight_needs_clamping(bits, symmetric):
    for seed in range(5):
        problem = correlated_problem(16, 40, 20, seed=seed)
        assert round_stochastically(problem, seed, bits=bits, symmetric=symmetric).records == ()


def test_weights_beyond_the_largest_scale_are_clamped_and_recorded():
    problem = correlated_problem(2, 4, 20, seed=0)
    weight = torch.tensor([[1e7, 0.0, 1.0, 2.0], [0.0, 0.0, -1e7, -1e7]], dtype=torch.float64)
    result = round_stochastically(Problem(weight, problem.original, problem.quantized), 0)
    assert result.records == (
        "2 of 2 scales lie outside of what can be stored, 5.96e-08 to 6.55e+04, and were clamped",
        "3 weights lie outside the grid of stochastic rounding and were clamped",
    )


# -- no bias -----------------------------------------------------------------------------------------------


def errors(problem: Problem, bits: int, symmetric: bool, method: str) -> torch.Tensor:
    """Rounding errors of the weight over the seeds: [SEEDS, N, K]."""
    plans = {"a": plan_of(problem, bits, 8, symmetric)}
    return torch.stack(
        [
            round_linears(
                {"a": problem.weight},
                plans,
                RoundingOptions(method, target="original", seed=seed),
                torch.bfloat16,
                problem.hessian,
            )["a"].linear.dequantize()
            - problem.weight
            for seed in range(SEEDS if method == "stochastic" else 1)
        ]
    ).double()


def hotelling(mean: torch.Tensor, samples: torch.Tensor) -> float:
    """Sum over rows of Hotelling's T^2 of a mean [N, D] under the covariances of samples [S, N, D].

    Rows are rounded independently, so without bias it is near chi-square with N * D degrees of freedom.
    """
    centered = samples - samples.mean(0)
    covariance = torch.einsum("snd,sne->nde", centered, centered) / len(samples)
    # A weight that lies almost on the grid hardly varies in 1000 samples; with the ridge it cannot decide alone.
    covariance += 1e-3 * covariance.diagonal(dim1=1, dim2=2).mean() * torch.eye(covariance.shape[1])
    solved = torch.linalg.solve(covariance, mean[..., None])[..., 0]
    return len(samples) * float((mean * solved).sum())


def chi_square_limit(degrees: int) -> float:
    """Four standard deviations above the mean."""
    return degrees + 4 * (2 * degrees) ** 0.5


# Rows, columns, tokens, bits, symmetric. With fewer tokens than columns every error that can be is fed forward, up to
# whole codes at a time: the case in which codes leave the grid.
CASES = [(4, 16, 200, 4, False), (4, 16, 200, 3, True), (8, 24, 8, 4, False), (4, 16, 50, 2, False)]


@pytest.mark.parametrize(("rows", "columns", "tokens", "bits", "symmetric"), CASES)
def test_mean_output_converges_to_the_unrounded_output(rows, columns, tokens, bits, symmetric):
    problem = correlated_problem(rows, columns, tokens, seed=columns)
    inputs = torch.linalg.qr(problem.quantized.T).Q  # an orthonormal basis of all inputs, [K, D]
    samples = errors(problem, bits, symmetric, "stochastic") @ inputs
    degrees = rows * inputs.shape[1]
    assert hotelling(samples.mean(0), samples) < chi_square_limit(degrees)

    nearest = errors(problem, bits, symmetric, "nearest")[0] @ inputs
    assert hotelling(nearest, samples) > 100 * degrees


def test_bias_falls_with_the_root_of_the_number_of_seeds():
    problem = correlated_problem(8, 16, 200, seed=3)
    samples = errors(problem, 4, False, "stochastic") @ problem.quantized[:32].T
    deviation = float(samples.var(0).mean().sqrt())
    for count in (10, 30, 100, 300, 1000):
        groups = samples.split(count)
        bias = float(torch.stack([group.mean(0) for group in groups]).square().mean().sqrt())
        assert bias == pytest.approx(deviation / count**0.5, rel=0.3)

    nearest = errors(problem, 4, False, "nearest")[0] @ problem.quantized[:32].T
    assert float(nearest.square().mean().sqrt()) > 10 * deviation / SEEDS**0.5


def test_mean_of_every_weight_converges_to_the_weight():
    # Rows are independent, so 4000 equal rows under one seed stand for 4000 seeds; few tokens, so feedback is strong.
    base = correlated_problem(1, 24, 8, seed=5)
    problem = Problem(base.weight.expand(4000, -1), base.original, base.quantized)
    for bits in (2, 3, 4):
        samples = round_stochastically(problem, 11, bits=bits).linear.dequantize().double() - problem.weight
        standard_error = samples.std(0) / 4000**0.5
        assert float((samples.mean(0) / standard_error).abs().max()) < 4


def test_mean_converges_with_outliers_that_stay_as_they_are():
    base = correlated_problem(1, 24, 100, seed=6)
    problem = Problem(base.weight.expand(4000, -1), base.original, base.quantized)
    linear = round_stochastically(problem, 11, outliers=(3, 4, 20)).linear
    samples = (linear.dequantize().double() - problem.weight)[:, [k for k in range(24) if k not in (3, 4, 20)]]
    assert float((samples.mean(0) / samples.std(0)).abs().max()) * 4000**0.5 < 4
