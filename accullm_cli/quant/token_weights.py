"""How much a token counts in the sums for a linear: by how much the loss depends on what the linear makes there.

A change of a linear's outputs by d [T, N] costs about sum_t d_t F_t d_t^T / 2 nats, F_t = E[g_t g_t^T] the Fisher
matrix of the outputs at token t. With F_t = w_t G the best rounding is that of the Hessian sum_t w_t y_t y_t^T
instead of sum_t y_t y_t^T (GuidedQuant, arXiv 2505.07004, weighs tokens by their gradients for groups of outputs).
The squared gradient of a single token is one draw of a very noisy number, and only some windows have one. What it
depends on most can be seen from the token's input: in models with massive activations (arXiv 2402.17762) a few tokens
have inputs a thousand times as large, and behind a norm they count a million times less. So w is taken to be a
function of |y_t|^2, the mean of |g_t|^2 over the tokens with inputs of about that size. And no token counts more than
the median one does: a few tokens can have most of the squared gradient, and the text would be rounded for them alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

# Steps of the function: so many with equally many tokens each, and as many again of equal ratio, for the few that stand
# far out.
STEPS = 16
# Edges are multiples of this in log |y|^2: behind some norms all inputs are of one size but for the last digits.
RESOLUTION = 0.05
# Norms below count as this one.
SMALLEST = 1e-20


@dataclass(frozen=True)
class TokenWeights:
    """A step function of the squared norm of a token's input.

    edges: float32 [B - 1], ascending, of log |y|^2.
    weights: float32 [B]; 1 for the median of the tokens that it was fitted to, and at most 1.
    """

    edges: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def fitted(cls, norms: torch.Tensor, squares: torch.Tensor) -> TokenWeights:
        """The step function of some tokens.

        Args:
            norms: |x_t|^2, [T], T at least 1.
            squares: the mean square of the gradient with respect to one output there, [T]; not all 0.
        """
        size = _logarithms(norms)
        inner = torch.linspace(0, 1, STEPS + 1)[1:-1]
        even = torch.lerp(size.min(), size.max(), inner)
        edges = torch.unique(torch.round(torch.cat([_quantiles(size, inner), even]) / RESOLUTION)) * RESOLUTION
        step = torch.bucketize(size, edges)
        count = torch.bincount(step, minlength=len(edges) + 1).double()
        total = torch.bincount(step, weights=squares.double(), minlength=len(edges) + 1)
        mean = squares.double().mean()
        # As if each step had one more token, of the mean: few tokens say little, and none nothing.
        weights = (total / mean + 1) / (count + 1)
        return cls(edges, (weights / weights[step].median()).clamp_max(1).float())

    @classmethod
    def mean(cls, of: Sequence[TokenWeights]) -> TokenWeights:
        """The mean of several functions, for linears that share their sums."""
        edges = torch.unique(torch.cat([own.edges for own in of]))
        # A step of the mean lies within one step of each; the last is open.
        inside = torch.cat([edges, edges.new_full((1,), torch.inf)])
        values = [own.weights[torch.bucketize(inside, own.edges)] for own in of]
        return cls(edges, torch.stack(values).mean(0))

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """The weight of each token, [T], for its input: rows [T, K]."""
        return self.weights[torch.bucketize(_logarithms(rows.square().sum(1)), self.edges)]


def shared_weights(weights: Mapping[str, TokenWeights], groups: Sequence[tuple[str, ...]]) -> dict[str, TokenWeights]:
    """For the first linear of each group what its linears have together; of groups alone where one has weights."""
    found = {}
    for group in groups:
        known = [weights[name] for name in group if name in weights]
        if known:
            found[group[0]] = known[0] if len(known) == 1 else TokenWeights.mean(known)
    return found


def _quantiles(values: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """As torch.quantile, which refuses more than 16 million values."""
    ordered, place = values.sort().values, shares * (len(values) - 1)
    return torch.lerp(ordered[place.floor().long()], ordered[place.ceil().long()], place.frac())


def _logarithms(norms: torch.Tensor) -> torch.Tensor:
    return norms.float().clamp_min(SMALLEST).log()
