"""Weights of tokens by the size of their inputs."""

from __future__ import annotations

import pytest
import torch

from accullm_cli.quant import token_weights
from accullm_cli.quant.token_weights import STEPS, TokenWeights, shared_weights


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    """Inputs [count, 4] whose norms span some four octaves."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator) * torch.exp2(4 * torch.rand(count, 1, generator=generator))


def test_the_function_behind_noisy_squares_is_found() -> None:
    """|g|^2 is 1 / |x|^2 times a square of a normal number; means over steps are near the truth's own up to 1."""
    rows = tokens(20_000)
    norms = rows.square().sum(1)
    noise = torch.randn(len(rows), generator=torch.Generator().manual_seed(1)).square()
    found = TokenWeights.fitted(norms, noise / norms).of(rows)
    truth = ((1 / norms) / (1 / norms).median()).clamp_max(1)
    middle = (norms > norms.quantile(0.1)) & (norms < norms.quantile(0.9))
    assert float((found[middle] / truth[middle]).log().abs().quantile(0.9)) < 0.3
    assert float(found.median()) == float(found.max()) == 1


def test_few_tokens_that_stand_far_out_have_a_step_of_their_own() -> None:
    rows = torch.cat([tokens(1000), 1e4 * torch.ones(8, 4)])
    squares = torch.cat([torch.ones(1000), torch.full((8,), 1e-6)])
    found = TokenWeights.fitted(rows.square().sum(1), squares)
    assert float(found.of(rows[-1:])) < 0.12  # eight of a millionth and one of the mean
    assert float(found.of(rows[:1000]).min()) > 0.9


def test_few_tokens_that_have_most_of_the_squared_gradient_count_no_more_than_others() -> None:
    rows = torch.cat([tokens(1000), 1e4 * torch.ones(10, 4)])
    squares = torch.cat([torch.ones(1000), torch.full((10,), 1e6)])
    found = TokenWeights.fitted(rows.square().sum(1), squares).of(rows)
    assert float(found.sum().square() / found.square().sum()) > 500  # as many tokens of one weight would count


@pytest.mark.parametrize("count", [1, 2, 17, 1000])
def test_quantiles_are_those_of_torch(count: int) -> None:
    values, shares = tokens(count)[:, 0], torch.linspace(0, 1, STEPS + 1)
    torch.testing.assert_close(token_weights._quantiles(values, shares), torch.quantile(values, shares))


def test_tokens_of_one_size_all_count_alike() -> None:
    rows = torch.ones(50, 3) + 1e-4 * torch.rand(50, 3, generator=torch.Generator().manual_seed(2))
    found = TokenWeights.fitted(rows.square().sum(1), torch.rand(50, generator=torch.Generator().manual_seed(0)))
    assert found.of(rows).tolist() == pytest.approx([1.0] * 50)
    assert found.of(torch.zeros(1, 3)).isfinite().all()


def test_a_mean_of_functions_is_the_mean_of_their_values() -> None:
    rows = tokens(3000)
    norms = rows.square().sum(1)
    own = [
        TokenWeights.fitted(norms[part], norms[part] ** power) for part, power in ((slice(500), 1), (slice(900), -1))
    ]
    expected = torch.stack([weights.of(rows) for weights in own]).mean(0)
    torch.testing.assert_close(TokenWeights.mean(own).of(rows), expected)


def test_what_shares_an_input_shares_weights() -> None:
    norms = tokens(200).square().sum(1)
    first, second = TokenWeights.fitted(norms, norms), TokenWeights.fitted(norms, 1 / norms)
    found = shared_weights({"q": first, "k": second, "o": first}, [("q", "k"), ("o",), ("up",)])
    assert found.keys() == {"q", "o"}
    assert found["o"] is first
    assert len(found["q"].weights) == len(found["q"].edges) + 1 <= 4 * STEPS
