"""Confidence intervals: their coverage on data whose truth is known, and the pieces against independent references."""

import math
from statistics import NormalDist

import numpy
import pytest
import torch

from accullm_cli.errors import AccullmError
from accullm_cli.measure.statistics import (
    bootstrap_mean,
    bootstrap_quantile,
    cluster_bootstrap,
    draw_windows,
    expanded_tail,
    mcnemar,
    paired_difference,
    student_t_quantile,
    wilson,
)

REPETITIONS = 300


def clustered_values(generator: torch.Generator, windows: int = 24, tokens: int = 64) -> list[torch.Tensor]:
    """Skewed values whose windows differ, as KL does; their true mean is `TRUE_MEAN`."""
    window_effect = 0.5 * torch.randn(windows, 1, generator=generator, dtype=torch.float64)
    token_noise = 0.5 * torch.randn(windows, tokens, generator=generator, dtype=torch.float64)
    return list((window_effect + token_noise).exp())


TRUE_MEAN = math.exp((0.5**2 + 0.5**2) / 2)  # of a lognormal


def coverage(interval) -> float:
    """How often interval(values, seed) -> (low, high) holds the true mean."""
    generator = torch.Generator().manual_seed(20)
    held = 0
    for repetition in range(REPETITIONS):
        low, high = interval(clustered_values(generator), repetition)
        held += low <= TRUE_MEAN <= high
    return held / REPETITIONS


def test_interval_of_the_mean_holds_the_true_mean_in_95_percent_of_repetitions():
    def by_window(values, seed):
        estimate = bootstrap_mean(values, seed)
        return estimate.low, estimate.high

    assert 0.90 <= coverage(by_window) <= 0.98


def test_interval_that_takes_tokens_as_independent_misses_the_true_mean_too_often():
    def by_token(values, seed):
        tokens = torch.cat(values)
        half = 1.96 * tokens.std().item() / math.sqrt(len(tokens))
        return tokens.mean().item() - half, tokens.mean().item() + half

    assert coverage(by_token) < 0.70


def test_interval_of_eight_windows_is_not_too_narrow():
    """A plain percentile interval of eight normal values holds their mean in 89% of repetitions only."""
    generator = torch.Generator().manual_seed(5)
    held = 0
    for repetition in range(1000):
        estimate = bootstrap_mean(list(torch.randn(8, 1, generator=generator, dtype=torch.float64)), repetition)
        held += estimate.low <= 0 <= estimate.high
    assert 0.92 <= held / 1000 <= 0.98


def test_mean_weighs_windows_by_their_tokens():
    values = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0])]
    assert bootstrap_mean(values, seed=0).value == 4.0


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 0.999])
def test_quantile_is_the_smallest_value_that_the_share_does_not_exceed(share):
    generator = numpy.random.default_rng(3)
    windows = [generator.exponential(size=size) for size in (100, 350, 250)]
    expected = numpy.quantile(numpy.concatenate(windows), share, method="inverted_cdf")
    assert bootstrap_quantile([torch.from_numpy(window) for window in windows], share, seed=0).value == expected


def test_quantile_is_not_moved_by_the_rounding_of_its_share():
    # 0.07 * 100 is 7.000000000000001 in floating point.
    values = torch.arange(1, 101, dtype=torch.float64)
    assert bootstrap_quantile([values[:40], values[40:]], 0.07, seed=0).value == 7.0


def test_quantile_interval_is_that_of_brute_force_resampling():
    generator = numpy.random.default_rng(4)
    windows = [generator.exponential(scale=1 + number % 3, size=50) for number in range(12)]
    found = bootstrap_quantile([torch.from_numpy(window) for window in windows], 0.9, seed=7)
    counts = draw_windows(12, seed=7, resamples=2000).numpy().astype(int)
    replicates = [
        numpy.quantile(
            numpy.concatenate([numpy.repeat(w, c) for w, c in zip(windows, row, strict=True)]),
            0.9,
            method="inverted_cdf",
        )
        for row in counts
    ]
    tail = expanded_tail(12)
    expected = numpy.quantile(replicates, [tail, 1 - tail])
    assert (found.low, found.high) == pytest.approx(tuple(expected), rel=1e-12)


def test_mean_interval_is_that_of_brute_force_resampling():
    generator = numpy.random.default_rng(4)
    windows = [generator.exponential(size=20 + number) for number in range(10)]
    found = bootstrap_mean([torch.from_numpy(window) for window in windows], seed=7)
    counts = draw_windows(10, seed=7, resamples=2000).numpy().astype(int)
    replicates = [
        numpy.concatenate([numpy.repeat(w, c) for w, c in zip(windows, row, strict=True)]).mean() for row in counts
    ]
    tail = expanded_tail(10)
    expected = numpy.quantile(replicates, [tail, 1 - tail])
    assert (found.low, found.high) == pytest.approx(tuple(expected), rel=1e-12)


def test_every_resample_draws_as_many_windows_as_there_are():
    counts = draw_windows(7, seed=1, resamples=500)
    assert counts.sum(1).tolist() == [7.0] * 500
    # Each window is drawn once on average; 3500 draws put the mean within 0.15 of it (4 standard errors are 0.17).
    assert counts.mean(0).tolist() == pytest.approx([1.0] * 7, abs=0.17)


def test_same_seed_gives_the_same_interval_and_another_seed_another():
    values = [torch.arange(5.0) * (number + 1) for number in range(9)]
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


# From printed tables of Student's t, two-sided 95%.
@pytest.mark.parametrize(
    ("degrees", "table"), [(1, 12.706), (2, 4.303), (3, 3.182), (7, 2.365), (15, 2.131), (30, 2.042), (120, 1.980)]
)
def test_student_t_quantile_is_that_of_the_tables(degrees, table):
    assert student_t_quantile(degrees) == pytest.approx(table, abs=5e-4)


def test_with_many_windows_the_interval_leaves_out_2_5_percent_at_either_end():
    assert expanded_tail(4000) == pytest.approx(NormalDist().cdf(-1.959964), abs=1e-4)


def test_with_five_windows_the_tail_is_that_of_the_published_formula():
    # t of 4 degrees of freedom from a printed table.
    assert expanded_tail(5) == pytest.approx(NormalDist().cdf(-math.sqrt(5 / 4) * 2.776445), rel=1e-5)


def test_interval_always_holds_its_value():
    # A figure that is 0 where every window is drawn once and negative in every other resample.
    estimate = cluster_bootstrap(lambda counts: -(counts - 1).square().sum(1), windows=12, seed=0)
    assert (estimate.value, estimate.high) == (0.0, 0.0)
    assert estimate.low < -2


def test_paired_difference_finds_what_separate_intervals_hide():
    hardness = [0.01 * 2**number for number in range(10)]  # windows differ by a factor of 500
    first = [kl * 1.05 for kl in hardness]
    separate = [bootstrap_mean([torch.tensor([kl]) for kl in artifact], seed=0) for artifact in (first, hardness)]
    assert separate[0].low < separate[1].high
    difference = paired_difference(first, hardness, seed=0)
    assert difference.value == pytest.approx(0.05 * sum(hardness) / 10)
    assert difference.low > 0


def test_paired_difference_of_equal_artifacts_is_exactly_zero():
    estimate = paired_difference([0.1, 0.2, 0.4], [0.1, 0.2, 0.4], seed=0)
    assert (estimate.value, estimate.low, estimate.high) == (0.0, 0.0, 0.0)


def test_windows_of_different_texts_cannot_be_paired():
    with pytest.raises(AccullmError) as error:
        paired_difference([0.1, 0.2], [0.1, 0.2, 0.3], seed=0)
    assert error.value.line() == (
        "compare: 2 windows cannot be paired with 3; measure both artifacts on the same text with the same number of "
        "windows"
    )


def test_one_window_has_no_interval():
    with pytest.raises(AccullmError) as error:
        bootstrap_mean([torch.ones(5)], seed=0)
    assert error.value.line() == (
        "validation: a confidence interval needs at least 2 windows of text; give more text or shorter windows"
    )


# -- shares of items ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # scipy 1.17.1: scipy.stats.binomtest(successes, trials).proportion_ci(method="wilson")
        (0, 10, 0.0, 0.27753279986288926),
        (10, 10, 0.7224672001371109, 1.0),
        (198, 200, 0.9642782382838232, 0.9972533418664556),
        (1, 3, 0.06149194472039626, 0.7923403991979523),
        (777, 1000, 0.7501681060278987, 0.8017118697711035),
    ],
)
def test_wilsons_interval(successes: int, trials: int, low: float, high: float) -> None:
    found = wilson(successes, trials)
    assert found.value == successes / trials
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize(("successes", "trials"), [(1, 0), (0, 0), (4, 3), (-1, 3)])
def test_what_is_no_share_has_no_interval(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match=f"{successes} of {trials} is no share"):
        wilson(successes, trials)


@pytest.mark.parametrize(
    ("lost", "won", "p"),
    [  # scipy 1.17.1: scipy.stats.binomtest(min(lost, won), lost + won, 0.5).pvalue
        (0, 0, 1.0),
        (5, 1, 0.21875),
        (1, 5, 0.21875),
        (10, 10, 1.0),
        (12, 3, 0.03515625),
        (30, 12, 0.007915897334896727),
        (7, 0, 0.015625),
    ],
)
def test_mcnemars_exact_test(lost: int, won: int, p: float) -> None:
    assert mcnemar(lost, won) == pytest.approx(p, rel=1e-12)
