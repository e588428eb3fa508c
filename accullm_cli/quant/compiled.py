"""The inner loop of rounding with feedback, compiled by numba: it decides one weight after the other.

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


def round_tile(
    wanted: torch.Tensor,
    fed: torch.Tensor,
    upper: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    group: torch.Tensor,
    largest_code: int,
    rows: tuple[torch.Tensor, torch.Tensor] | None = None,
    chance: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a tile of weights, N rows by C columns in the order of rounding, with the feedback inside of it.

    Args:
        wanted: the targets, [N, C], in the working dtype as all that follows.
        fed: what earlier columns feed to each weight, [N, C]; at the end, in place, what all columns before it feed.
        upper: U of the tile's columns, [C, C], unit upper triangular.
        scale, zero: the rows' grid, [N, G]; group: int64 [C], each column's group.
        rows: where rows feed each other, too: what rows before the tile feed to each weight [N, C] (overwritten), and
            V of the tile's rows [N, N], unit upper triangular.
        chance: for stochastic rounding: share [N, C] and noise [N, C], as `stochastic_code` wants them.

    Returns:
        Codes, uint8 [N, C], and what they miss of `wanted`, [N, C].
    """
    codes, error = torch.empty(wanted.shape, dtype=torch.uint8), torch.empty_like(wanted)
    none = wanted.new_empty(0, 0)
    row_fed, row_upper = rows or (none, none)
    share, noise = chance or (none, none)
    tensors = (wanted, fed, upper, row_fed, row_upper, scale, zero, group)
    arrays = [tensor.contiguous().numpy() for tensor in tensors]
    assert fed.is_contiguous(), "fed is written in place"
    largest = arrays[0].dtype.type(largest_code)
    rest = [tensor.contiguous().numpy() for tensor in (share, noise, codes, error)]

    def work(first: int, last: int) -> None:
        _round_rows(first, last, *arrays, largest, *rest)

    threads = torch.get_num_threads()
    if rows is not None or threads == 1 or len(wanted) <= ROWS_PER_TASK:
        work(0, len(wanted))
    else:
        starts = range(0, len(wanted), ROWS_PER_TASK)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, starts, [min(start + ROWS_PER_TASK, len(wanted)) for start in starts]))
    return codes, error
