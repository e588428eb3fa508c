"""What calibration keeps of the original model: light statistics per distinct input, and Gram matrices per block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

# LLM.int8() (arXiv 2208.07339) calls an input feature an outlier where its magnitude reaches this.
LLM_INT8_THRESHOLD = 6.0


@dataclass(frozen=True)
class InputStats:
    """One distinct input of K features, shared by one or more linears.

    linears: the names of the linears that read this input.
    tokens: number of rows it was measured on; 0 for an expert that calibration never reached.
    damage: for each linear and candidate group size, ||w - nearest(w)||^2 per column at 4 bits, asymmetric.
    """

    linears: tuple[str, ...]
    tokens: int
    second_moment: torch.Tensor  # float32 [K], mean of x^2
    absolute_maximum: torch.Tensor  # float32 [K]
    share_beyond_threshold: torch.Tensor  # float32 [K], share of tokens with |x| > 6
    damage: Mapping[str, Mapping[int, torch.Tensor]]  # linear -> group size -> float32 [K]


class FeatureMoments:
    """Accumulates the light statistics of one input over batches."""

    def __init__(self, features: int) -> None:
        self.tokens = 0
        self._square_sum = torch.zeros(features, dtype=torch.float64)
        self._maximum = torch.zeros(features)
        self._beyond = torch.zeros(features, dtype=torch.int64)

    def add(self, rows: torch.Tensor) -> None:
        """Add rows [T, K]."""
        if not len(rows):
            return
        magnitude = rows.float().abs()
        self.tokens += len(rows)
        self._square_sum += magnitude.square().sum(0, dtype=torch.float64)
        self._maximum = torch.maximum(self._maximum, magnitude.amax(0))
        self._beyond += (magnitude > LLM_INT8_THRESHOLD).sum(0)

    def finish(self, linears: tuple[str, ...], damage: Mapping[str, Mapping[int, torch.Tensor]]) -> InputStats:
        tokens = max(self.tokens, 1)
        return InputStats(
            linears,
            self.tokens,
            (self._square_sum / tokens).float(),
            self._maximum,
            self._beyond.float() / tokens,
            damage,
        )


class GramMatrices:
    """Accumulates, over batches, the Hessian of a linear's output error and its coupling to earlier layers' error.

    With X the rows of the full-precision model [T, K] and Y those of the model quantized so far [T, K]:
    the Hessian is Y^T Y / T and the drift Y^T (X - Y) / T, both [K, K]. Where Y is X, drift is zero and not kept.
    """

    def __init__(self, features: int, with_drift: bool, dtype: torch.dtype = torch.float32) -> None:
        self.tokens = 0
        self._hessian: torch.Tensor | None = torch.zeros(features, features, dtype=dtype)
        self._drift = torch.zeros(features, features, dtype=dtype) if with_drift else None

    def add(self, quantized_rows: torch.Tensor, original_rows: torch.Tensor | None = None) -> None:
        """Add rows [T, K] of both streams (of the quantized one alone where drift is not kept)."""
        assert self._hessian is not None, "the Hessian was taken"
        rows = quantized_rows.to(self._hessian.dtype)
        self.tokens += len(rows)
        self._hessian.addmm_(rows.T, rows)
        if self._drift is not None and original_rows is not None:
            self._drift.addmm_(rows.T, original_rows.to(rows.dtype) - rows)

    def take_hessian(self) -> torch.Tensor | None:
        """The Hessian; None where there was no row. It is scaled in place and given away, as it may be large."""
        hessian, self._hessian = self._hessian, None
        return self._scaled(hessian)

    def take_drift(self) -> torch.Tensor | None:
        """As `take_hessian`, for the drift; None, too, where it is not kept."""
        drift, self._drift = self._drift, None
        return self._scaled(drift)

    def _scaled(self, total: torch.Tensor | None) -> torch.Tensor | None:
        return None if total is None or not self.tokens else total.div_(self.tokens)
