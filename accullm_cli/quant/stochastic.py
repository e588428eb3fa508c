"""Stochastic rounding whose mean is the unrounded weight, with error feedback and on a grid that ends.

A position p on the grid is rounded to floor(p + u), u uniform in [0, 1): its mean is p, as long as no code leaves the
grid. Fed errors have mean zero, so feedback alone adds no bias. But clamping the codes at the grid's ends does, and
feedback can be several codes large where inputs are strongly correlated. So a weight near an end receives only a share
of its feedback, one that is fixed before any random number is drawn: a fixed share of mean zero has mean zero.
"""

from __future__ import annotations

import torch

# The share is chosen so that so many standard deviations of the feedback fit into the grid. The standard deviation is
# bounded by that of the worst case, errors of half a code either way, so that even the tails rarely need cutting.
DEVIATIONS = 3.0


def feedback_share(
    position: torch.Tensor, scale: torch.Tensor, feedback: torch.Tensor, largest_code: int
) -> torch.Tensor:
    """The share of its feedback that each weight may receive: [M, N], from 0 to 1.

    With e U = -n, where n_k is the rounding error of column k and U the feedback matrix, what column k receives is the
    sum over i < k of n_i (U^-1)_ik; a rounding error's variance is at most scale^2 / 4.

    Args:
        position: [M, N], the targets in codes, without feedback; columns in the order they are rounded.
        scale: [M, N].
        feedback: U, [M, M], unit upper triangular.
    """
    identity = torch.eye(len(feedback), dtype=feedback.dtype, device=feedback.device)
    inverse = torch.linalg.solve_triangular(feedback, identity, upper=True, unitriangular=True)
    variance = inverse.triu_(1).square_().T @ scale.square().div_(4)
    deviation = variance.sqrt_().div_(scale)
    return (room(position, largest_code) / (DEVIATIONS * deviation).clamp_(min=1e-30)).clamp_(0, 1)


def room(position: torch.Tensor, largest_code: int) -> torch.Tensor:
    """Distance to the nearer end of the grid, in codes; 0 outside."""
    return torch.minimum(position, largest_code - position).clamp_(min=0)
