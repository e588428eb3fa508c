"""Statistics accumulated in batches against sums over all rows in float64."""

from __future__ import annotations

import pytest
import torch

from accullm_cli.quant.stats import FeatureMoments, GramMatrices

BATCHES = (1, 5, 0, 30, 14)


def rows(seed: int, features: int = 6, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(sum(BATCHES), features, generator=generator) * 4).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moments_are_those_of_all_rows(dtype):
    x = rows(0, dtype=dtype)
    moments = FeatureMoments(6)
    for batch in x.split(BATCHES):
        moments.add(batch)
    stats = moments.finish(("q", "k"), {})
    exact = x.double()
    assert (stats.linears, stats.tokens) == (("q", "k"), 50)
    torch.testing.assert_close(stats.second_moment.double(), exact.square().mean(0), rtol=1e-6, atol=0)
    assert torch.equal(stats.absolute_maximum.double(), exact.abs().amax(0))
    torch.testing.assert_close(
        stats.share_beyond_threshold.double(), (exact.abs() > 6).double().mean(0), rtol=1e-6, atol=0
    )
    assert stats.second_moment.dtype == stats.absolute_maximum.dtype == torch.float32


def test_the_threshold_itself_does_not_count():
    moments = FeatureMoments(3)
    moments.add(torch.tensor([[6.0, 6.001, -7.0], [0.0, -6.0, -6.5]]))
    assert moments.finish((), {}).share_beyond_threshold.tolist() == [0.0, 0.5, 1.0]


def test_an_input_that_no_token_reached_has_zero_tokens_and_no_nan():
    stats = FeatureMoments(2).finish((), {})
    assert stats.tokens == 0
    for tensor in (stats.second_moment, stats.absolute_maximum, stats.share_beyond_threshold):
        assert tensor.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("features", [6, 257, 700])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_gram_matrices_are_those_of_all_rows(features, dtype, tolerance):
    original, quantized = rows(1, features).bfloat16(), rows(2, features).bfloat16()
    difference = rows(3, 5).bfloat16()
    weight = rows(4, features)[:7].to(dtype)
    gram = GramMatrices(features, with_drift=True, outputs={"o": 5}, dtype=dtype)
    for y, x, d in zip(*(part.split(BATCHES) for part in (quantized, original, difference)), strict=True):
        gram.add(y, x)
        gram.add_output("o", y, d)
    X, Y = original.double(), quantized.double()
    assert gram.tokens == 50
    hessian, pulls = gram.take_hessian(), gram.take_pulls({"q": weight, "o": weight})
    assert hessian is not None
    assert torch.equal(hessian, hessian.T)
    assert hessian.dtype == pulls["q"].dtype == pulls["o"].dtype == dtype
    bound = 50 * tolerance
    torch.testing.assert_close(hessian.double(), Y.T @ Y / 50, rtol=0, atol=bound)
    torch.testing.assert_close(
        pulls["q"].double(), Y.T @ (X - Y) @ weight.double().T / 50, rtol=0, atol=bound * 4 * features
    )
    torch.testing.assert_close(pulls["o"].double(), Y.T @ difference.double() / 50, rtol=0, atol=bound)


def test_tokens_count_by_their_weights():
    original, quantized, difference = rows(1), rows(2), rows(3, 5)
    weights, weight = rows(5, 1).square().flatten(), rows(4)[:7]
    gram = GramMatrices(6, with_drift=True, outputs={"o": 5})
    parts = (part.split(BATCHES) for part in (quantized, original, difference, weights))
    for y, x, d, w in zip(*parts, strict=True):
        gram.add(y, x, w)
        gram.add_output("o", y, d, w)
    X, Y, d, w = original.double(), quantized.double(), difference.double(), weights.double()[:, None] / weights.sum()
    hessian, pulls = gram.take_hessian(), gram.take_pulls({"q": weight, "o": weight})
    assert hessian is not None
    torch.testing.assert_close(hessian.double(), Y.T @ (w * Y), rtol=0, atol=1e-3)
    torch.testing.assert_close(pulls["q"].double(), Y.T @ (w * (X - Y)) @ weight.double().T, rtol=0, atol=1e-2)
    torch.testing.assert_close(pulls["o"].double(), Y.T @ (w * d), rtol=0, atol=1e-3)


def test_pulls_are_known_only_where_asked_for():
    gram = GramMatrices(6)
    gram.add(rows(1), rows(2))
    assert gram.take_pulls({"a": torch.ones(2, 6)}) == {}


def test_a_pull_of_one_output_leaves_the_other_linears_without():
    gram = GramMatrices(6, outputs={"a": 3})
    gram.add(rows(1))
    gram.add_output("a", rows(1), rows(2, 3))
    assert gram.take_pulls({"a": torch.ones(3, 6), "b": torch.ones(2, 6)}).keys() == {"a"}


def test_without_rows_there_are_no_gram_matrices():
    gram = GramMatrices(2, with_drift=True, outputs={"a": 3})
    assert gram.tokens == 0
    assert gram.take_hessian() is None
    assert gram.take_pulls({"a": torch.ones(3, 2), "b": torch.ones(3, 2)}) == {}
