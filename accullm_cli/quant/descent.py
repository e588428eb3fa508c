"""Coordinate descent over codes: what rounding in one pass leaves to be gained by changing one code at a time.

Feedback decides each code once, knowing nothing of the rounding errors that come after it. The loss of what came out,
tr(G E H E^T) with E = W* - Q (see quant.rounding), is quadratic in every single weight: with P = E H and the slope
G P, moving weight (n, k) by d steps of size s changes it by

    -2 d s (G P)_nk + d^2 s^2 G_nn H_kk,

least at the whole number next to (G P)_nk / (s G_nn H_kk). Moving there never loses, and sweeping over all weights ends
where no single code can be improved (QuantEase, arXiv 2309.01885, does this instead of feedback). Some 3% of the codes
move, which makes it cheap beside the pass before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from accullm_cli.quant.feedback import ROWS_TOGETHER, factor_hessian
from accullm_cli.quant.grid import Grid
from accullm_cli.quant.loops import COMPILED, ChainDescent, CodeDescent, Descent, Loops, RowFeedback
from accullm_cli.quant.trellis import SEGMENT

# Sweeps over a row; fewer where one changes nothing.
SWEEPS = 4
# Rows whose slopes are kept up to date together where rows feed each other, and sweeps over all of these blocks.
ROWS_IN_STEP = 16
ROUNDS = 2


@dataclass
class Draft:
    """A linear as it is rounded so far, and the loss tr(G E (H + ridge) E^T) of E = W* - Q; all on one device.

    Q is what the codes stand for on the grid, and `kept` in the columns of the outliers.
    """

    target: torch.Tensor  # W*, [N, K] in the working dtype
    grid: Grid
    codes: torch.Tensor  # uint8 [N, K], contiguous
    outliers: torch.Tensor  # int64 [n]
    kept: torch.Tensor  # [N, n]
    hessian: torch.Tensor  # H, [K, K]
    ridge: float

    def fit_scales(self) -> None:
        """Give the grid scales of less loss for the same codes, G being the identity."""
        on_grid = self._on_grid()
        fitted = []
        for part in self._parts():
            grid, error = self._errors(part)
            fitted.append(grid.fitted(error, self.codes[part], on_grid, self.hessian, self.ridge))
        self.grid = self.grid.joined(fitted)

    def descend(self, fisher: torch.Tensor | None = None, loops: Loops = COMPILED) -> None:
        """Change codes in place, one at a time, as long as that lowers the loss.

        Where rows feed each other, their blocks are a chain, and within a block all weights are.

        Args:
            fisher: G, [N, N], positive definite; None for the identity: rows do not feed each other then.
        """
        make: Callable[..., Descent] = ChainDescent if self.grid.is_trellis else CodeDescent
        task = partial(make, hessian=self.hessian, ridge=self.ridge, movable=self._on_grid(), levels=self.grid.table())
        if fisher is None:
            for part in self._parts():
                grid, error = self._errors(part)
                product = error @ self.hessian + self.ridge * error
                loops.descend(task(codes=self.codes[part], error=error, product=product, grid=grid, sweeps=SWEEPS))
            return
        _, error = self._errors(slice(None))
        product = error @ self.hessian + self.ridge * error
        for part, rows in _segments(product, fisher) if self.grid.is_trellis else _blocks(product, fisher):
            loops.descend(task(
                codes=self.codes[part], error=error[part], product=product[part], grid=self.grid.rows(part), rows=rows,
                sweeps=1 if self.grid.is_trellis else SWEEPS // ROUNDS,
            ))  # fmt: skip

    def _parts(self) -> list[slice]:
        """Some rows at a time, as errors are as large as weights; on a GPU, where small steps are slow, all of them."""
        count = len(self.target)
        together = count if self.target.is_cuda else ROWS_TOGETHER
        return [slice(start, start + together) for start in range(0, count, together)]

    def _on_grid(self) -> torch.Tensor:
        """The columns whose weights are values of the grid, bool [K]."""
        on_grid = torch.ones(self.target.shape[1], dtype=torch.bool, device=self.target.device)
        on_grid[self.outliers] = False
        return on_grid

    def _errors(self, rows: slice) -> tuple[Grid, torch.Tensor]:
        """Of some rows: their grid and E, [R, K]."""
        grid = self.grid.rows(rows)
        values = grid.values(self.codes[rows].to(self.target.dtype))
        values[:, self.outliers] = self.kept[rows].to(self.target.dtype)
        return grid, (self.target[rows] - values).contiguous()


def _blocks(product: torch.Tensor, fisher: torch.Tensor) -> Iterator[tuple[slice, tuple[torch.Tensor, torch.Tensor]]]:
    """Some rows after the others, with their slope as it is by then and their part of G."""
    for start in ROUNDS * list(range(0, len(product), ROWS_IN_STEP)):
        part = slice(start, start + ROWS_IN_STEP)
        yield part, (fisher[part] @ product, fisher[part, part])


def _segments(product: torch.Tensor, fisher: torch.Tensor) -> Iterator[tuple[slice, RowFeedback]]:
    """The segments of a trellis, one after the other.

    A column is best moved by d = P / (H_kk + ridge), whatever G is, and what it then misses, r, costs r G r^T. With
    the rows of other segments as they are, that is (r + G_ss^-1 G_so r_o) G_ss (r + ...)^T and a constant. A second
    sweep over a segment would gain some 0.3% of the loss.
    """
    parts = [slice(start, start + SEGMENT) for start in range(0, len(product), SEGMENT)]
    factors = [factor_hessian(fisher[part, part], 0.0, kind="Fisher matrix", sorts=False) for part in parts]
    for part, factor in ROUNDS * list(zip(parts, factors, strict=True)):
        from_others = fisher[part] @ product - fisher[part, part] @ product[part]
        slope = torch.cholesky_solve(from_others.flip(0), factor.cholesky).flip(0)
        yield part, RowFeedback(slope, factor.feedback(0, len(slope)), factor.variances)
