"""Confidence intervals for figures measured on windows of text.

The tokens of one window share a topic and a context, so they are correlated, and an interval that treats them as
independent is far too narrow. The window is therefore the unit that is resampled (the cluster bootstrap).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.measure.result import Estimate

RESAMPLES = 2000
CONFIDENCE = 0.95

# A statistic of resampled windows: takes how often each window was drawn, float64 [R, W], and returns float64 [R].
Statistic = Callable[[torch.Tensor], torch.Tensor]

# Elements of a temporary in the quantile's cumulative sums: 8 MB.
_CHUNK_ELEMENTS = 1 << 20


def cluster_bootstrap(statistic: Statistic, windows: int, seed: int, resamples: int = RESAMPLES) -> Estimate:
    """A statistic of `windows` windows with its 95% confidence interval.

    The interval is the expanded percentile interval (Hesterberg 2014, arXiv 1411.5279): the plain one is too narrow
    for few windows, as it lacks both the n/(n-1) of a variance and Student's t.

    Raises:
        AccullmError: there are fewer than two windows.
    """
    if windows < 2:
        raise AccullmError(
            "a confidence interval needs at least 2 windows of text", "validation", "give more text or shorter windows"
        )
    value = statistic(torch.ones(1, windows, dtype=torch.float64)).item()
    replicates = statistic(draw_windows(windows, seed, resamples))
    tail = expanded_tail(windows)
    low, high = torch.quantile(replicates, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    # A percentile interval can miss the value it belongs to where the statistic is strongly skewed; ours never does.
    return Estimate(value, min(low, value), max(high, value))


def draw_windows(windows: int, seed: int, resamples: int) -> torch.Tensor:
    """How often each window is drawn when `windows` are drawn with replacement: float64 [resamples, windows]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(windows, (resamples, windows), generator=generator)
    counts = torch.zeros(resamples, windows, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones(resamples, windows, dtype=torch.float64))


def expanded_tail(windows: int) -> float:
    """The share of bootstrap replicates to leave out at either end: Phi(-sqrt(n / (n-1)) * t), with n windows."""
    spread = math.sqrt(windows / (windows - 1)) * student_t_quantile(windows - 1)
    return NormalDist().cdf(-spread)


def student_t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t for which |T| <= t with probability `confidence`, for Student's T of `degrees` degrees of freedom."""
    low, high = 0.0, math.pi / 2  # of theta = atan(t / sqrt(degrees)), in which the search has bounds
    while high - low > 1e-14:
        middle = (low + high) / 2
        low, high = (middle, high) if _student_within(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _student_within(theta: float, degrees: int) -> float:
    """P(|T| <= sqrt(degrees) * tan(theta)): Abramowitz and Stegun 26.7.3 (odd degrees) and 26.7.4 (even)."""
    odd = degrees % 2
    term = math.cos(theta) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= math.cos(theta) ** 2 * (k - 1) / k
        total += term
    return 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total


def bootstrap_mean(values_by_window: Sequence[torch.Tensor], seed: int) -> Estimate:
    """The mean over all tokens: one tensor of values per window, which may differ in length."""
    sums = torch.stack([values.sum(dtype=torch.float64) for values in values_by_window])
    sizes = torch.tensor([len(values) for values in values_by_window], dtype=torch.float64)
    return cluster_bootstrap(lambda counts: (counts @ sums) / (counts @ sizes), len(sums), seed)


def bootstrap_quantile(values_by_window: Sequence[torch.Tensor], share: float, seed: int) -> Estimate:
    """The smallest value that at least `share` of all tokens do not exceed (no interpolation)."""
    lengths = torch.tensor([len(values) for values in values_by_window])
    values, order = torch.cat(list(values_by_window)).double().sort()
    window_of = torch.arange(len(lengths)).repeat_interleave(lengths)[order]
    rows = max(1, _CHUNK_ELEMENTS // len(values))

    def quantile(counts: torch.Tensor) -> torch.Tensor:
        found = []
        for start in range(0, len(counts), rows):
            at_or_below = counts[start : start + rows].index_select(1, window_of)
            torch.cumsum(at_or_below, 1, out=at_or_below)
            # The tolerance undoes the rounding of a product: 0.07 * 100 is 7.000000000000001.
            needed = (share * at_or_below[:, -1:] - 1e-6).ceil()
            found.append(values[torch.searchsorted(at_or_below, needed).squeeze(1)])
        return torch.cat(found)

    return cluster_bootstrap(quantile, len(lengths), seed)


def paired_difference(first: Sequence[float], second: Sequence[float], seed: int) -> Estimate:
    """Mean of first - second over the same windows, as for the `kl_of_window` of two artifacts.

    Pairing takes out what makes a window hard for both, so it finds differences that two separate intervals hide: they
    differ where the interval does not hold 0. Windows count equally.
    """
    if len(first) != len(second):
        raise AccullmError(
            f"{len(first)} windows cannot be paired with {len(second)}",
            "compare",
            "measure both artifacts on the same text with the same number of windows",
        )
    difference = torch.tensor(first, dtype=torch.float64) - torch.tensor(second, dtype=torch.float64)
    return bootstrap_mean(list(difference.unsqueeze(1)), seed)


def wilson(successes: int, trials: int) -> Estimate:
    """A share of independent trials with its 95% interval (Wilson 1927, https://doi.org/10.2307/2276774).

    Raises:
        ValueError: there are no trials.
    """
    if not 0 <= successes <= trials or not trials:
        raise ValueError(f"{successes} of {trials} is no share")
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # Rounding must not leave the value outside of its own interval.
    return Estimate(share, min(max(0.0, centre - half), share), max(min(1.0, centre + half), share))


def mcnemar(lost: int, won: int) -> float:
    """How likely a split of so many changed items is, or a less even one, if losing and winning are equally likely.

    The exact two-sided test of paired proportions (McNemar 1947): a binomial tail, doubled.
    """
    changed = lost + won
    tail = sum(math.comb(changed, count) for count in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / 2**changed)
