"""Divergence against plain float64 references written out token by token, and its laws."""

import itertools
import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accullm_cli.errors import AccullmError
from accullm_cli.measure import divergence
from accullm_cli.measure.divergence import HISTOGRAM_EDGES, Divergence, histogram


def window(seed: int, tokens: int = 12, vocabulary: int = 31, noise: float = 0.5):
    """Original, artifact and floor logits float32 [tokens, vocabulary], and token ids."""
    generator = torch.Generator().manual_seed(seed)
    original = 4 * torch.randn(tokens, vocabulary, generator=generator)
    artifact = original + noise * torch.randn(tokens, vocabulary, generator=generator)
    floor = original.bfloat16().float()
    return original, artifact, torch.randint(vocabulary, (tokens,), generator=generator), floor


def measured(*windows) -> divergence.Fidelity:
    accumulator = Divergence()
    for original, artifact, tokens, floor in windows:
        accumulator.add(original, artifact, tokens, floor)
    return accumulator.finish("default", seed=0)


def probabilities(row) -> list[float]:
    largest = max(row)
    exponentials = [math.exp(logit - largest) for logit in row]
    total = math.fsum(exponentials)
    return [value / total for value in exponentials]


def kl_reference(original: torch.Tensor, other: torch.Tensor) -> list[float]:
    """Per position, term by term in float64."""
    result = []
    for first, second in zip(original.double().tolist(), other.double().tolist(), strict=True):
        p, q = probabilities(first), probabilities(second)
        result.append(math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)))
    return result


def perplexity_reference(windows: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """exp of the mean over every predicted token of every window."""
    losses = [
        -math.log(probabilities(row)[token])
        for logits, tokens in windows
        for row, token in zip(logits.double().tolist()[:-1], tokens.tolist()[1:], strict=True)
    ]
    return math.exp(math.fsum(losses) / len(losses))


def test_kl_of_every_token_is_that_of_the_reference():
    accumulator = Divergence()
    windows = [window(seed) for seed in range(3)]
    for entry in windows:
        accumulator.add(*entry)
    for kept, (original, artifact, _, _) in zip(accumulator._kl, windows, strict=True):
        assert kept.tolist() == pytest.approx(kl_reference(original, artifact), rel=1e-4, abs=1e-6)


def test_kl_of_near_models_with_a_large_vocabulary_is_exact_to_5e_minus_8():
    generator = torch.Generator().manual_seed(1)
    original = 3 * torch.randn(4, 50_000, generator=generator)
    artifact = original + 1e-3 * torch.randn(4, 50_000, generator=generator)
    accumulator = Divergence()
    accumulator.add(original, artifact, torch.zeros(4, dtype=torch.long))
    assert accumulator._kl[0].tolist() == pytest.approx(kl_reference(original, artifact), rel=0, abs=5e-8)


def test_kl_is_of_the_artifact_from_the_original_and_not_the_other_way_round():
    original = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    artifact = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    fidelity = measured(*[(original, artifact, torch.tensor([0, 1]), original)] * 2)
    assert fidelity.mean_kl.value == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75), rel=1e-6)


def test_figures_are_those_of_the_reference():
    windows = [window(seed, tokens) for seed, tokens in enumerate((20, 33, 17))]
    fidelity = measured(*windows)
    kl_by_window = [kl_reference(original, artifact) for original, artifact, _, _ in windows]
    every_kl = numpy.concatenate(kl_by_window)
    assert fidelity.tokens == 70
    assert fidelity.windows == 3
    assert fidelity.mean_kl.value == pytest.approx(every_kl.mean(), rel=1e-5)
    assert fidelity.kl_max == pytest.approx(every_kl.max(), rel=1e-5)
    assert fidelity.kl_p99.value == pytest.approx(numpy.quantile(every_kl, 0.99, method="inverted_cdf"), rel=1e-5)
    assert fidelity.kl_p999.value == pytest.approx(numpy.quantile(every_kl, 0.999, method="inverted_cdf"), rel=1e-5)
    assert fidelity.kl_of_window == pytest.approx([numpy.mean(values) for values in kl_by_window], rel=1e-5)
    floor = [value for original, _, _, rounded in windows for value in kl_reference(original, rounded)]
    assert fidelity.mean_kl_floor.value == pytest.approx(numpy.mean(floor), rel=1e-2)
    agreed = [a.argmax() == b.argmax() for o, q, _, _ in windows for a, b in zip(o.numpy(), q.numpy(), strict=True)]
    assert fidelity.top1_agreement.value == pytest.approx(numpy.mean(agreed), rel=1e-12)
    assert 0 < numpy.mean(agreed) < 1
    original = perplexity_reference([(logits, tokens) for logits, _, tokens, _ in windows])
    assert fidelity.perplexity_original.value == pytest.approx(original, rel=1e-5)
    artifact = perplexity_reference([(logits, tokens) for _, logits, tokens, _ in windows])
    assert fidelity.perplexity.value == pytest.approx(artifact, rel=1e-5)


def test_percentiles_of_many_tokens_are_those_of_the_reference():
    windows = [window(seed, tokens=1000, vocabulary=4) for seed in range(2)]
    fidelity = measured(*windows)
    every_kl = sorted(value for original, artifact, _, _ in windows for value in kl_reference(original, artifact))
    assert fidelity.kl_p99.value == pytest.approx(every_kl[1980 - 1], rel=1e-4)
    assert fidelity.kl_p999.value == pytest.approx(every_kl[1998 - 1], rel=1e-4)
    assert fidelity.kl_max == pytest.approx(every_kl[-1], rel=1e-4)


def test_position_predicts_the_next_token():
    """A model that is certain of the next token has perplexity 1; of its own token, a large one."""
    tokens = torch.tensor([3, 1, 4, 0, 2])
    certain_of_next = 50 * torch.nn.functional.one_hot(tokens.roll(-1), 5).float()
    certain_of_own = 50 * torch.nn.functional.one_hot(tokens, 5).float()
    fidelity = measured(*[(certain_of_next, certain_of_own, tokens, certain_of_next)] * 2)
    assert fidelity.perplexity_original.value == pytest.approx(1.0)
    assert fidelity.perplexity.value == pytest.approx(math.exp(50))


def test_chunks_of_rows_change_nothing(monkeypatch):
    windows = [window(seed, tokens=13) for seed in range(2)]
    whole = measured(*windows)
    monkeypatch.setattr(divergence, "_CHUNK_ELEMENTS", 31 * 4)  # 4 rows at a time: 4, 4, 4 and the last alone
    assert measured(*windows) == whole


def test_tied_logits_count_as_their_first_token():
    original = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0], [3.0, 0.0, 3.0], [4.0, 4.0, 4.0]])
    artifact = torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, 1.0], [3.0, 0.0, 2.0], [0.0, 0.0, 1.0]])
    fidelity = measured(*[(original, artifact, torch.tensor([0, 1, 0, 2]), original)] * 2)
    assert fidelity.top1_agreement.value == 0.75


def test_half_precision_logits_are_measured_in_float32():
    windows = [window(seed) for seed in range(2)]
    halves = [(original.bfloat16(), artifact.half(), tokens, floor) for original, artifact, tokens, floor in windows]
    expected = [value for o, a, _, _ in halves for value in kl_reference(o, a)]
    assert measured(*halves).mean_kl.value == pytest.approx(numpy.mean(expected), rel=1e-5)


def test_windows_without_floor_take_no_part_in_it():
    accumulator = Divergence()
    for seed in range(4):
        original, artifact, tokens, floor = window(seed)
        accumulator.add(original, artifact, tokens, floor if seed < 2 else None)
    expected = [v for seed in range(2) for v in kl_reference(window(seed)[0], window(seed)[3])]
    assert accumulator.finish("default", 0).mean_kl_floor.value == pytest.approx(numpy.mean(expected), rel=1e-2)


def test_intervals_hold_their_values_and_are_not_points():
    fidelity = measured(*[window(seed, noise=0.1 * (1 + seed)) for seed in range(6)])
    for name in (
        "perplexity_original",
        "perplexity",
        "mean_kl",
        "kl_p99",
        "kl_p999",
        "top1_agreement",
        "mean_kl_floor",
    ):
        figure = getattr(fidelity, name)
        assert figure.low <= figure.value <= figure.high, name
        assert figure.low < figure.high, name


def test_hopeless_artifact_has_a_finite_perplexity():
    original, _, tokens, floor = window(0)
    hopeless = torch.full_like(original, -1e30)
    hopeless[:, 0] = 1e30
    fidelity = measured(*[(original, hopeless, tokens.clamp(min=1), floor)] * 2)
    assert math.isfinite(fidelity.perplexity.value)
    assert fidelity.perplexity.value > 1e300


# -- histogram -----------------------------------------------------------------------------------------------


def test_histogram_has_four_bins_per_decade_from_1e_minus_6_to_10():
    assert list(HISTOGRAM_EDGES[::4]) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0])
    ratios = [b / a for a, b in itertools.pairwise(HISTOGRAM_EDGES)]
    assert ratios == pytest.approx([10**0.25] * 28)


def test_histogram_counts_each_token_in_the_bin_that_ends_at_or_above_it():
    bins = dict(histogram(torch.tensor([0.0, 1e-7, 1e-6, 2e-6, 0.05, 1.0, 1.5, 10.0], dtype=torch.float64)))
    found = {edge: count for edge, count in bins.items() if count}
    assert list(found.values()) == [3, 1, 1, 1, 1, 1]
    assert list(found) == pytest.approx([1e-6, 10**-5.5, 10**-1.25, 1.0, 10**0.25, 10.0])


def test_histogram_ends_at_the_largest_value_where_that_is_beyond_10_nats():
    bins = histogram(torch.tensor([0.5, 12.0, 25.0], dtype=torch.float64))
    assert bins[-1] == (25.0, 2)
    assert sum(count for _, count in bins) == 3


# -- laws ----------------------------------------------------------------------------------------------------

logits = st.lists(st.lists(st.floats(-30, 30, width=32), min_size=5, max_size=5), min_size=2, max_size=6).map(
    lambda rows: torch.tensor(rows, dtype=torch.float32)
)


@settings(max_examples=60, deadline=None)
@given(logits, st.integers(0, 10**6))
def test_kl_is_never_negative(original, seed):
    artifact = original + torch.randn(original.shape, generator=torch.Generator().manual_seed(seed)) * 1e-3
    tokens = torch.zeros(len(original), dtype=torch.long)
    accumulator = Divergence()
    accumulator.add(original, artifact, tokens, original)
    assert (accumulator._kl[0] >= 0).all()


@settings(max_examples=40, deadline=None)
@given(logits)
def test_identical_logits_have_no_divergence_and_agree(original):
    fidelity = measured(*[(original, original.clone(), torch.zeros(len(original), dtype=torch.long), original)] * 2)
    assert (fidelity.mean_kl.value, fidelity.mean_kl.high, fidelity.kl_max) == (0.0, 0.0, 0.0)
    assert fidelity.top1_agreement.value == fidelity.top1_agreement.low == 1.0
    assert fidelity.perplexity == fidelity.perplexity_original


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(-20, 20))
def test_adding_a_constant_to_the_logits_changes_nothing(seed, shift):
    original, artifact, tokens, floor = window(seed)
    shifted = measured(*[(original + shift, artifact - shift, tokens, floor)] * 2)
    assert shifted.mean_kl.value == pytest.approx(
        measured(*[(original, artifact, tokens, floor)] * 2).mean_kl.value, rel=1e-4
    )


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(5)))
def test_order_of_windows_changes_no_value(order):
    windows = [window(seed, tokens=8 + seed) for seed in range(5)]
    straight, permuted = measured(*windows), measured(*[windows[number] for number in order])
    for name in (
        "perplexity_original",
        "perplexity",
        "mean_kl",
        "kl_p99",
        "kl_p999",
        "top1_agreement",
        "mean_kl_floor",
    ):
        assert getattr(permuted, name).value == pytest.approx(getattr(straight, name).value, rel=1e-12), name
    assert permuted.kl_histogram == straight.kl_histogram
    assert permuted.kl_of_window == tuple(straight.kl_of_window[number] for number in order)


# -- refusals ------------------------------------------------------------------------------------------------


def refusal(*arguments) -> str:
    accumulator = Divergence()
    accumulator.add(*window(0))
    with pytest.raises(AccullmError) as error:
        accumulator.add(*arguments)
    assert accumulator.windows == 1, "a refused window must not count"
    return error.value.line()


def test_another_vocabulary_is_refused():
    original, artifact, tokens, floor = window(0)
    assert refusal(original, artifact[:, :-1], tokens, floor) == (
        "validation window 2: the artifact's vocabulary has 30 tokens, the original's 31; compare an artifact with the "
        "model that it was made from"
    )


def test_token_outside_the_vocabulary_is_refused():
    original, artifact, tokens, floor = window(0)
    tokens[3] = 31
    assert refusal(original, artifact, tokens, floor) == (
        "validation window 2: token 31 lies outside the vocabulary of 31; use the tokenizer that came with the model"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("place", "line"),
    [
        (0, "the original's logits hold NaN or Inf; look for damaged weights in the source"),
        (1, "the artifact's logits hold NaN or Inf; run accullm verify on the artifact"),
        (3, "the logits of the original rounded to bfloat16 hold NaN or Inf; look for damaged weights in the source"),
    ],
)
def test_logits_that_are_not_finite_are_refused(place, line, value):
    arguments = list(window(0))
    arguments[place][5, 7] = value
    assert refusal(*arguments) == f"validation window 2: {line}"


@pytest.mark.parametrize("sizes", [(12,), (5, 7), (1,) * 12, (11, 1)])
def test_logits_that_come_in_parts_count_as_those_of_the_window(sizes):
    original, artifact, tokens, floor = window(4)
    whole, parted = Divergence(), Divergence()
    for accumulator in (whole, parted):
        accumulator.add(*window(3))
    whole.add(original, artifact, tokens, floor)
    parted.add_parts(zip(original.split(sizes), artifact.split(sizes), floor.split(sizes), strict=True), tokens)
    assert parted.finish("default", 0) == whole.finish("default", 0)


def test_a_window_whose_parts_leave_off_is_a_fault():
    original, artifact, tokens, floor = window(0)
    with pytest.raises(ValueError, match="validation window 1: logits and tokens must be of one length"):
        Divergence().add_parts([(original[:5], artifact[:5], floor[:5])], tokens)


def test_one_window_is_refused():
    accumulator = Divergence()
    accumulator.add(*window(0))
    with pytest.raises(AccullmError) as error:
        accumulator.finish("held-out.txt", seed=0)
    assert error.value.line() == (
        "held-out.txt: a confidence interval needs at least 2 windows of text, not 1; give more text or shorter windows"
    )


def test_kl_without_noise_floor_is_a_fault():
    accumulator = Divergence()
    for seed in range(2):
        accumulator.add(*window(seed)[:3])
    with pytest.raises(ValueError, match="no window came with floor_logits"):
        accumulator.finish("default", seed=0)


def test_tokens_of_another_length_are_a_fault():
    original, artifact, tokens, floor = window(0)
    with pytest.raises(ValueError, match="validation window 1: logits and tokens must be of one length"):
        Divergence().add(original, artifact, tokens[:-1], floor)
