"""Whether two ways to run one model agree: their next-token distributions, but for the order of float32 sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Float32 sums in another order change a log-probability by some 1e-5 nats, and mistakes of reading by far more. What is
# large is rounded more coarsely: a float32 has 7 digits, of which the sums of a deep model leave 5.
TOLERANCE = 1e-3
RELATIVE_TOLERANCE = 1e-5
# Positions that are compared at once.
ROWS = 8


@dataclass(frozen=True)
class Difference:
    """The largest difference between two models' log-probabilities, in nats: at which position, of which token."""

    nats: float
    position: int
    token: int
    tolerance: float

    @property
    def is_arithmetic(self) -> bool:
        return self.nats <= self.tolerance

    def __str__(self) -> str:
        return f"{self.nats:.3g} nats for token {self.token} at position {self.position}"


def largest_difference(ours: torch.Tensor, other: torch.Tensor) -> Difference:
    """Of two models' logits [T, vocabulary] on the same tokens; one that is not finite differs infinitely."""
    if ours.shape != other.shape:
        return Difference(torch.inf, 0, 0, TOLERANCE)
    scale = float(other[other.isfinite()].abs().amax()) if bool(other.isfinite().any()) else 0.0
    nats, position, token = -1.0, 0, 0
    # A few rows at a time: in float64 those of a large vocabulary take more memory than all else.
    for start in range(0, len(ours), ROWS):
        rows = slice(start, start + ROWS)
        first, second = ours[rows].double().log_softmax(-1), other[rows].double().log_softmax(-1)
        difference = (first - second).abs()
        difference[first == second] = 0  # also where both rule a token out
        difference[difference.isnan()] = torch.inf
        if (largest := float(difference.max())) > nats:
            row, token = divmod(int(difference.argmax()), difference.shape[1])
            nats, position = largest, start + row
    return Difference(nats, position, token, max(TOLERANCE, RELATIVE_TOLERANCE * scale))
