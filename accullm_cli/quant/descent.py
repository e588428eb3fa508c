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

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from accullm_cli.quant.compiled import ROWS_PER_TASK, compiled
from accullm_cli.quant.grid import Grid

# Sweeps over a row; fewer where one changes nothing.
SWEEPS = 4
# Rows whose slopes are kept up to date together where rows feed each other, and sweeps over all of these blocks.
ROWS_IN_STEP = 16
ROUNDS = 2


@compiled
def _descend_rows(  # type: ignore[no-untyped-def]
    first, last, error, product, slope, hessian, ridge, fisher, scale, group, movable, largest, sweeps, codes
):
    """Rows `first` to `last`. slope: G P of these rows alone; the same memory as their P where there is no G."""
    columns, rows_feed = error.shape[1], fisher.shape[0] > 0
    lowest = largest - largest  # 0 of the weights' type
    for n in range(first, last):
        for _ in range(sweeps):
            moved_any = False
            for k in range(columns):
                step = scale[n, group[k]]
                curvature = (hessian[k, k] + ridge) * step
                if rows_feed:
                    curvature *= fisher[n, n]
                if not movable[k] or not curvature > lowest:
                    continue
                steps = np.rint(slope[n - first, k] / curvature)
                if steps == lowest:
                    continue
                before = codes[n, k] + lowest
                code = min(max(before + steps, lowest), largest)
                moved = (code - before) * step
                if moved == lowest:
                    continue
                moved_any = True
                codes[n, k] = np.uint8(code)
                error[n, k] -= moved
                for j in range(columns):
                    product[n, j] -= moved * hessian[k, j]
                product[n, k] -= moved * ridge
                if rows_feed:
                    for m in range(first, last):
                        weight = fisher[m, n] * moved
                        for j in range(columns):
                            slope[m - first, j] -= weight * hessian[k, j]
                        slope[m - first, k] -= weight * ridge
            if not moved_any:
                break


def descend(
    codes: torch.Tensor,
    error: torch.Tensor,
    grid: Grid,
    hessian: torch.Tensor,
    ridge: float,
    movable: torch.Tensor,
    fisher: torch.Tensor | None = None,
) -> None:
    """Change codes, one at a time, as long as that lowers tr(G E (H + ridge) E^T).

    Args:
        codes: uint8 [N, K]; changed in place.
        error: E = W* - Q, [N, K] in the working dtype; likewise.
        hessian: H, [K, K].
        movable: bool [K], the columns on the grid.
        fisher: G, [N, N], positive definite; None for the identity: rows do not feed each other then.
    """
    assert codes.is_contiguous(), "codes are changed in place"
    assert error.is_contiguous(), "errors are changed in place"
    count = len(codes)
    product = error @ hessian + ridge * error
    group = torch.arange(codes.shape[1]) // grid.columns_per_group
    tensors = (hessian, hessian.new_tensor(ridge), hessian.new_empty(0, 0) if fisher is None else fisher, grid.scale)
    matrix, damping, rows, scale = (tensor.contiguous().numpy() for tensor in tensors)
    largest = scale.dtype.type(grid.largest_code)

    def work(first: int, last: int, slope: torch.Tensor, sweeps: int) -> None:
        _descend_rows(
            first, last, error.numpy(), product.numpy(), slope.numpy(), matrix, damping[()], rows, scale,
            group.numpy(), movable.numpy(), largest, sweeps, codes.numpy(),
        )  # fmt: skip

    if fisher is not None:
        for _ in range(ROUNDS):
            for first in range(0, count, ROWS_IN_STEP):
                last = min(first + ROWS_IN_STEP, count)
                work(first, last, fisher[first:last] @ product, SWEEPS // ROUNDS)
        return
    starts = range(0, count, ROWS_PER_TASK)
    ends = [min(start + ROWS_PER_TASK, count) for start in starts]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(lambda first, last: work(first, last, product[first:last], SWEEPS), starts, ends))
