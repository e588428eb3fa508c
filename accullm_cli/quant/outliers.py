"""Which input features stay in 16 bits: those whose rounding costs the most output error."""

from __future__ import annotations

import torch


def expected_loss(second_moment: torch.Tensor, damage: torch.Tensor) -> torch.Tensor:
    """The error that rounding each input feature is expected to cause: E[x_j^2] * ||Delta w_j||^2.

    This is the sensitivity of OWQ (arXiv 2306.02272, equation 4), with the feature's actual rounding error.

    Args:
        second_moment: [K], mean of x_j^2; or of g^2 x_j^2, see `stages.gradients.load_sensitivities`.
        damage: [K], squared norm of the change that rounding makes to column j.
    """
    return second_moment * damage


def choose_outliers(loss: torch.Tensor, fraction: float) -> tuple[int, ...]:
    """The features with the largest loss, round(fraction * K) of them, ascending. Ties go to the lower index."""
    count = round(fraction * len(loss))
    order = torch.argsort(loss, descending=True, stable=True)
    return tuple(sorted(order[:count].tolist()))
