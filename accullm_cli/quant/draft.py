"""A linear as it is rounded so far, and its two improvements: scales fitted to codes, and codes moved one at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from accullm_cli.quant.compiled import COMPILED
from accullm_cli.quant.descent import descend
from accullm_cli.quant.feedback import ROWS_TOGETHER
from accullm_cli.quant.grid import Grid, fitted_scales
from accullm_cli.quant.loops import Loops


@dataclass(frozen=True)
class Draft:
    """Q, and the loss tr(E (H + ridge) E^T) that it is judged by, E = W* - Q; all on one device.

    Q is what the codes stand for on the grid, and `kept` in the columns of the outliers.
    """

    target: torch.Tensor  # W*, [N, K] in the working dtype
    grid: Grid
    codes: torch.Tensor  # uint8 [N, K]
    outliers: torch.Tensor  # int64 [n]
    kept: torch.Tensor  # [N, n]
    hessian: torch.Tensor  # H, [K, K]
    ridge: float

    def fitted(self) -> Draft:
        """With scales of less loss for the same codes."""
        scales = []
        for part in self._parts():
            own, steps, error = self._errors(part)
            size, storable = own.columns_per_group, own.storable
            scales.append(fitted_scales(own.scale, error, steps, self.hessian, self.ridge, size, storable))
        return replace(self, grid=replace(self.grid, scale=torch.cat(scales)))

    def descend(self, fisher: torch.Tensor | None = None, loops: Loops = COMPILED) -> None:
        """Change codes in place, one at a time, as long as that lowers the loss.

        Args:
            fisher: G, [N, N], for tr(G E (H + ridge) E^T); None for the identity.
        """
        movable = torch.ones(self.target.shape[1], dtype=torch.bool, device=self.target.device)
        movable[self.outliers] = False
        for part in self._parts() if fisher is None else [slice(None)]:
            own, _, error = self._errors(part)
            descend(self.codes[part], error, own, self.hessian, self.ridge, movable, fisher, loops)

    def _parts(self) -> list[slice]:
        """Some rows at a time, as errors are as large as weights; on a GPU, where small steps are slow, all of them."""
        count = len(self.target)
        together = count if self.target.is_cuda else ROWS_TOGETHER
        return [slice(start, start + together) for start in range(0, count, together)]

    def _errors(self, rows: slice) -> tuple[Grid, torch.Tensor, torch.Tensor]:
        """Of some rows: their grid, code - zero point (0 in outlier columns), and E; [R, K] both."""
        own = self.grid.rows(rows)
        scale, zero = own.per_column(self.target.shape[1])
        steps = self.codes[rows].to(self.target.dtype) - zero
        steps[:, self.outliers] = 0
        error = self.target[rows] - steps * scale
        error[:, self.outliers] -= self.kept[rows].to(self.target.dtype)
        return own, steps, error.contiguous()
