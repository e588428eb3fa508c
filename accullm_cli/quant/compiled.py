"""The inner loops of rounding, compiled by numba for the CPU.

The machine code is kept beside this file, or in the user's cache directory, so that only the first run waits for it
(some five seconds). Nothing in rounding is reordered or fused, so that the same numbers come out on every CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numba
import numpy as np
import torch

from accullm_cli.quant.loops import Loops, Sweep, Tile
from accullm_cli.quant.philox import uniform

# Rows that a thread takes at once where rows do not depend on each other.
ROWS_PER_TASK = 64
# What lets a compiler add up several parts of a sum at once, with fused multiplications; the same program still gives
# the same numbers on the same CPU.
SUMS_IN_ANY_ORDER = frozenset({"reassoc", "contract", "nsz"})


def compiled(function: Callable[..., Any], freedom: frozenset[str] = frozenset(), inlined: bool = False) -> Any:
    """`function` as machine code, kept on disk where there is a place to write to.

    Args:
        freedom: what the compiler may do to its floating-point operations, in LLVM's words.
        inlined: make it part of every compiled function that calls it.
    """
    make = partial(numba.njit, nogil=True, fastmath=set(freedom), forceinline=inlined)
    try:
        return make(cache=True)(function)
    except RuntimeError:  # no directory to keep it in
        return make()(function)


@compiled
def stochastic_code(position, fed, share, noise, largest):  # type: ignore[no-untyped-def]
    """The code of one weight, whole but of the weight's type; see quant.stochastic.

    Args:
        position: the target in codes, without feedback.
        fed: the feedback in codes.
        share: what part of it the weight may receive, from `feedback_share`.
        noise: uniform in [0, 1).
    """
    # Beyond the tails that the share allows for, the feedback is cut on both sides alike, which leaves its mean.
    lowest = largest - largest  # 0 of the weight's type
    limit = max(min(position, largest - position), lowest)
    received = min(max(fed * share, -limit), limit)
    return min(max(np.floor(position + received + noise), lowest), largest)


@compiled
def _round_rows(  # type: ignore[no-untyped-def]
    first, last, wanted, fed, upper, row_fed, row_upper, scale, zero, group, largest, share, noise, codes, error
):
    columns, stochastic, rows_feed = wanted.shape[1], share.shape[0] > 0, row_upper.shape[0] > 0
    lowest = largest - largest  # 0 of the weights' type
    for n in range(first, last):
        if rows_feed:
            for m in range(n):
                weight = row_upper[m, n]
                for k in range(columns):
                    row_fed[n, k] += weight * (error[m, k] + fed[m, k])
        for k in range(columns):
            step, offset = scale[n, group[k]], zero[n, group[k]]
            feedback = fed[n, k]
            if rows_feed:
                feedback += row_fed[n, k]
            if stochastic:
                position = wanted[n, k] / step + offset
                code = stochastic_code(position, feedback / step, share[n, k], noise[n, k], largest)
            else:
                code = min(max(np.rint((wanted[n, k] + feedback) / step + offset), lowest), largest)
            codes[n, k] = np.uint8(code)
            lost = wanted[n, k] - (code - offset) * step
            error[n, k] = lost
            for j in range(k + 1, columns):
                fed[n, j] += lost * upper[k, j]


def round_tile(tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a tile with the feedback inside of it; see `Loops`. What is on another device comes here and goes back."""
    fed = tile.fed.cpu().contiguous()
    none = fed.new_empty(0, 0)
    row_fed, row_upper = tile.rows or (none, none)
    tensors = (tile.wanted, fed, tile.upper, row_fed, row_upper, tile.scale, tile.zero, tile.group)
    arrays = [_array(tensor) for tensor in tensors]
    largest = arrays[0].dtype.type(tile.largest_code)
    share = noise = none
    if tile.chance is not None:
        chance = tile.chance
        share, noise = chance.share, uniform(chance.seed, chance.stream, chance.features, len(fed)).to(fed.dtype).T
    codes, error = torch.empty(fed.shape, dtype=torch.uint8), torch.empty_like(fed)
    rest = [_array(tensor) for tensor in (share, noise, codes, error)]

    def work(first: int, last: int) -> None:
        _round_rows(first, last, *arrays, largest, *rest)

    if tile.rows is not None:
        work(0, len(fed))
    else:
        _share_out(work, len(fed))
    if fed is not tile.fed:
        tile.fed.copy_(fed)
    return codes.to(tile.fed.device), error.to(tile.fed.device)


@compiled
def _sweep_rows(  # type: ignore[no-untyped-def]
    codes, error, product, slope, hessian, ridge, fisher, scale, group, movable, largest, sweeps
):
    """slope: G P of these rows; the same memory as `product`, P, where there is no G."""
    rows, columns, rows_feed = error.shape[0], error.shape[1], fisher.shape[0] > 0
    lowest = largest - largest  # 0 of the weights' type
    for n in range(rows):
        for _ in range(sweeps):
            moved_any = False
            for k in range(columns):
                step = scale[n, group[k]]
                curvature = (hessian[k, k] + ridge) * step
                if rows_feed:
                    curvature *= fisher[n, n]
                if not movable[k] or not curvature > lowest:
                    continue
                steps = np.rint(slope[n, k] / curvature)
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
                    for m in range(rows):
                        weight = fisher[m, n] * moved
                        for j in range(columns):
                            slope[m, j] -= weight * hessian[k, j]
                        slope[m, k] -= weight * ridge
            if not moved_any:
                break


def sweep(rows: Sweep, product: torch.Tensor | None = None, fisher: torch.Tensor | None = None) -> None:
    """Move codes one at a time; see `Loops`. What is on another device comes here and goes back.

    Args:
        product, fisher: where these rows feed each other: their P = E (H + ridge), [N, K], changed in place, and their
            G, [N, N]. The slope is that of G P then.
    """
    changed = rows.codes, rows.error, rows.slope if product is None else product
    codes, error, own_product = (tensor.cpu() for tensor in changed)
    slope = own_product if product is None else rows.slope.cpu()
    group = torch.arange(codes.shape[1]) // rows.grid.columns_per_group
    weights = slope.new_empty(0, 0) if fisher is None else fisher
    constants = (rows.hessian, slope.new_tensor(rows.ridge), weights, rows.grid.scale, group, rows.movable)
    hessian, ridge, among, scale, groups, movable = (_array(tensor) for tensor in constants)
    largest = scale.dtype.type(rows.grid.largest_code)

    def work(first: int, last: int) -> None:
        own = slice(first, last)
        parts = [tensor[own].numpy() for tensor in (codes, error, own_product, slope)]
        _sweep_rows(*parts, hessian, ridge[()], among, scale[own], groups, movable, largest, rows.most)

    if fisher is None:
        _share_out(work, len(codes))
    else:
        work(0, len(codes))
    for there, here in zip(changed, (codes, error, own_product), strict=True):
        if here is not there:
            there.copy_(here)


COMPILED = Loops(torch.device("cpu"), round_tile, sweep)


def _array(tensor: torch.Tensor) -> Any:
    return tensor.cpu().contiguous().numpy()


def _share_out(work: Callable[[int, int], None], count: int) -> None:
    """Do `work` from row to row, for all rows that do not feed each other, on as many threads as torch has."""
    threads = torch.get_num_threads()
    if threads == 1 or count <= ROWS_PER_TASK:
        work(0, count)
        return
    starts = range(0, count, ROWS_PER_TASK)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, starts, [min(start + ROWS_PER_TASK, count) for start in starts]))
