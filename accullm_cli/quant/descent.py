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

import torch

from accullm_cli.quant.compiled import COMPILED, sweep
from accullm_cli.quant.grid import Grid
from accullm_cli.quant.loops import Loops, Sweep

# Sweeps over a row; fewer where one changes nothing.
SWEEPS = 4
# Rows whose slopes are kept up to date together where rows feed each other, and sweeps over all of these blocks.
ROWS_IN_STEP = 16
ROUNDS = 2


def descend(
    codes: torch.Tensor,
    error: torch.Tensor,
    grid: Grid,
    hessian: torch.Tensor,
    ridge: float,
    movable: torch.Tensor,
    fisher: torch.Tensor | None = None,
    loops: Loops = COMPILED,
) -> None:
    """Change codes, one at a time, as long as that lowers tr(G E (H + ridge) E^T).

    Where rows feed each other, their blocks are a chain, and within a block all weights are: too little at a time for a
    GPU, so that the sweeps run on the CPU wherever the tensors are.

    Args:
        codes: uint8 [N, K]; changed in place.
        error: E = W* - Q, [N, K] in the working dtype; likewise.
        hessian: H, [K, K].
        movable: bool [K], the columns on the grid.
        fisher: G, [N, N], positive definite; None for the identity: rows do not feed each other then.
    """
    assert codes.is_contiguous(), "codes are changed in place"
    assert error.is_contiguous(), "errors are changed in place"
    product = error @ hessian + ridge * error
    if fisher is None:
        loops.sweep(Sweep(codes, error, product, hessian, ridge, grid, movable, SWEEPS))
        return
    hessian = hessian.cpu()
    for _ in range(ROUNDS):
        for start in range(0, len(codes), ROWS_IN_STEP):
            own = slice(start, start + ROWS_IN_STEP)
            slope = fisher[own] @ product
            rows = Sweep(codes[own], error[own], slope, hessian, ridge, grid.rows(own), movable, SWEEPS // ROUNDS)
            sweep(rows, product[own], fisher[own, own])
