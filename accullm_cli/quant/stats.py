"""What calibration keeps of the original model: light statistics per distinct input, and Gram matrices per block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    """Accumulates the light statistics of one input over batches, on the device of its rows."""

    def __init__(self, features: int, device: torch.device | None = None) -> None:
        self.tokens = 0
        self._square_sum = torch.zeros(features, dtype=torch.float64, device=device)
        self._maximum = torch.zeros(features, device=device)
        self._beyond = torch.zeros(features, dtype=torch.int64, device=device)

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
    """Accumulates, over batches, the Hessian of the linears that read one input, and what pulls their weights.

    With X the rows of that input in the full-precision model [T, K], Y those in the model quantized so far [T, K], and
    O and P what the two models make of a linear's output (see `add_output`), as long as this linear is not rounded:
    the Hessian is Y^T Y / T [K, K], and a linear's pull is Y^T (O - P) / T [K, N]. Where tokens have weights w, these
    are Y^T diag(w) Y / sum(w) and Y^T diag(w) (O - P) / sum(w).

    Args:
        features: K.
        with_drift: O and P are X W^T and Y W^T. Then all linears share Y^T (X - Y) / T [K, K], the drift.
        outputs: for each linear whose outputs are given by `add_output`, their number N.
        device: of all rows and sums.
    """

    def __init__(
        self,
        features: int,
        with_drift: bool = False,
        outputs: Mapping[str, int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        def zeros(columns: int) -> torch.Tensor:
            return torch.zeros(features, columns, dtype=dtype, device=device)

        self.tokens = 0
        self._weight = 0.0
        self._held_out: list[torch.Tensor] = []
        self._hessian: torch.Tensor | None = zeros(features)
        self._drift = zeros(features) if with_drift else None
        self._pulls = {name: zeros(count) for name, count in (outputs or {}).items()}

    def add(
        self,
        quantized_rows: torch.Tensor,
        original_rows: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        held_out: torch.Tensor | None = None,
    ) -> None:
        """Add rows [T, K] of both streams (of the quantized one alone where drift is not kept).

        Args:
            weights: of the tokens, [T]; all 1 by default.
            held_out: int64 [n], which of the rows `take_held_out` returns, too.
        """
        assert self._hessian is not None, "the Hessian was taken"
        rows = quantized_rows.to(self._hessian.dtype)
        self.tokens += len(rows)
        self._weight += len(rows) if weights is None else float(weights.sum())
        drift = None if original_rows is None or self._drift is None else original_rows.to(rows.dtype) - rows
        if weights is not None:
            root = weights.to(rows.dtype).sqrt()[:, None]
            rows, drift = rows * root, None if drift is None else drift * root
        if held_out is not None:
            self._held_out.append(rows[held_out])
        for start, end in _strips(len(self._hessian)):  # what lies below the diagonal is its mirror image
            self._hessian[start:end, start:].addmm_(rows[:, start:end].T, rows[:, start:])
        if self._drift is not None and drift is not None:
            self._drift.addmm_(rows.T, drift)

    def add_output(
        self,
        name: str,
        quantized_rows: torch.Tensor,
        difference: torch.Tensor,
        weights: torch.Tensor | None = None,
    ) -> None:
        """Add to the pull of one linear.

        Args:
            quantized_rows, weights: Y, [T, K], and [T]; also given to `add`.
            difference: O - P, [T, N].
        """
        pull = self._pulls[name]
        wanted = difference.to(pull.dtype)
        if weights is not None:
            wanted = wanted * weights.to(pull.dtype)[:, None]
        pull.addmm_(quantized_rows.to(pull.dtype).T, wanted)

    def take_hessian(self) -> torch.Tensor | None:
        """The Hessian; None where there was no row. It is scaled in place and given away, as it may be large."""
        hessian, self._hessian = self._hessian, None
        if hessian is None or not self.tokens:
            return None
        for start, end in _strips(len(hessian)):
            hessian[end:, start:end] = hessian[start:end, end:].T
        return hessian.div_(self._weight)

    def take_held_out(self) -> torch.Tensor | None:
        """Rows Z [n, K] of which Z^T Z is their part of the Hessian; None where there are none. They are given away."""
        rows, self._held_out = self._held_out, []
        return torch.cat(rows).div_(self._weight**0.5) if sum(map(len, rows)) else None

    def take_pulls(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The pull of each linear of weight [N, K]; of those alone for which it is known. The drift is dropped."""
        drift = self.take_drift()
        own, self._pulls = self._pulls, {}
        if not self.tokens:
            return {}
        pulls = {name: own[name].div_(self._weight) for name in weights if name in own}
        if drift is not None:
            pulls |= {name: drift @ weight.T for name, weight in weights.items() if name not in own}
        return pulls

    def take_drift(self) -> torch.Tensor | None:
        """The drift; None where it is not kept, or there was no row. It is given away."""
        drift, self._drift = self._drift, None
        return None if drift is None or not self.tokens else drift.div_(self._weight)


def _strips(count: int) -> Iterator[tuple[int, int]]:
    """Columns of a symmetric matrix that are summed up together, each with all columns behind them."""
    # A matrix of a sixth the width is wide enough for full speed; a sixth then saves 42 % of the products.
    width = max(256, -(-count // 6))
    return ((start, min(start + width, count)) for start in range(0, count, width))
