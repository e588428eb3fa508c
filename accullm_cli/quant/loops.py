"""The two inner loops of rounding: what decides one weight after the other, and so cannot be a product of matrices.

`COMPILED` is numba's make of them, for the CPU; `kernels.rounding` has a GPU's. The machine code is kept beside this
file, or in the user's cache directory, so that only the first run waits for it (some five seconds). Nothing in rounding
is reordered or fused, so that the same numbers come out on every CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numba
import numpy as np
import torch

from accullm_cli.quant.grid import Grid
from accullm_cli.quant.philox import uniform

# Rows that a thread takes at once where rows do not depend on each other.
ROWS_PER_TASK = 64
# What lets a compiler add up several parts of a sum at once, with fused multiplications; the same program still gives
# the same numbers on the same CPU.
SUMS_IN_ANY_ORDER = frozenset({"reassoc", "contract", "nsz"})


@dataclass(frozen=True)
class Chance:
    """What stochastic rounding needs of a tile, see quant.stochastic."""

    share: torch.Tensor  # [N, C], what part of its feedback each weight may receive
    seed: int  # below 2**64
    stream: int  # below 2**32, the linear's own
    features: torch.Tensor  # int64 [C], the input feature that each column is


@dataclass(frozen=True)
class Tile:
    """N rows by C columns of weights, in the order of rounding; all on one device and in the working dtype."""

    wanted: torch.Tensor  # [N, C], the targets
    # [N, C], what earlier columns feed to each weight; when the tile is done, in place, what all columns before it do.
    fed: torch.Tensor
    # U of the tile's columns, [C, C], unit upper triangular; what is not above its diagonal is not used.
    upper: torch.Tensor
    scale: torch.Tensor  # [N, G], the rows' grid
    zero: torch.Tensor  # [N, G]
    group: torch.Tensor  # int64 [C], each column's group
    largest_code: int
    # Where rows feed each other, too: what rows before the tile feed to each weight [N, C] (overwritten), and V of the
    # tile's rows [N, N], unit upper triangular. Not with `chance`.
    rows: tuple[torch.Tensor, torch.Tensor] | None = None
    chance: Chance | None = None
    levels: torch.Tensor | None = None  # [largest code + 1], see `Grid`; not with `chance`


@dataclass(frozen=True)
class Descent:
    """N rows whose codes are moved one at a time (see quant.descent); all on one device.

    codes, error and slope are contiguous. codes and error are changed in place; slope is used up.
    """

    codes: torch.Tensor  # uint8 [N, K]
    error: torch.Tensor  # E = W* - Q, [N, K], in the working dtype as all that follows
    slope: torch.Tensor  # P = E (H + ridge), [N, K]; where rows feed each other, G P
    hessian: torch.Tensor  # H, [K, K]
    ridge: float
    grid: Grid  # of these rows
    movable: torch.Tensor  # bool [K], the columns on the grid
    sweeps: int  # over a row, at most; fewer where one changes nothing
    # Where rows feed each other: their P [N, K], contiguous, changed in place, and their G [N, N].
    rows: tuple[torch.Tensor, torch.Tensor] | None = None
    levels: torch.Tensor | None = None  # [largest code + 1], the grid's table


@dataclass(frozen=True)
class Loops:
    """One make of the two.

    device: the one they are for, where all that belongs to rounding then happens.
    round_tile: codes, uint8 [N, C], and what they miss of `wanted`, [N, C].
    descend: does its work in place.
    round_chained: tiles whose rows feed each other, none of which waits for another, at once; None where they are no
        faster than one after the other. The same for each as `round_tile` gives.
    """

    device: torch.device
    round_tile: Callable[[Tile], tuple[torch.Tensor, torch.Tensor]]
    descend: Callable[[Descent], None]
    round_chained: Callable[[Sequence[Tile]], list[tuple[torch.Tensor, torch.Tensor]]] | None = None


# -- compiled by numba -------------------------------------------------------------------------------------


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
def level_code(place, levels):  # type: ignore[no-untyped-def]
    """The code of the level that is nearest to `place`, of two the lower one; 0 where `place` is not a number."""
    code = 0
    for above in range(1, len(levels)):  # all of them: no branch to guess, and several at once
        code += place + place > levels[above - 1] + levels[above]
    return code


@compiled
def _round_rows(  # type: ignore[no-untyped-def]
    first, last, wanted, fed, upper, row_fed, row_upper, scale, zero, group, levels, largest, share, noise, codes, error
):
    columns, stochastic, rows_feed = wanted.shape[1], share.shape[0] > 0, row_upper.shape[0] > 0
    has_levels = levels.shape[0] > 0
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
                point = code - offset
            elif has_levels:
                place = level_code((wanted[n, k] + feedback) / step, levels)
                code = place + lowest
                point = levels[place]
            else:
                code = min(max(np.rint((wanted[n, k] + feedback) / step + offset), lowest), largest)
                point = code - offset
            codes[n, k] = np.uint8(code)
            lost = wanted[n, k] - point * step
            error[n, k] = lost
            for j in range(k + 1, columns):
                fed[n, j] += lost * upper[k, j]


def round_tile(tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a tile with the feedback inside of it; see `Loops`. What is on another device comes here and goes back."""
    fed = tile.fed.cpu().contiguous()
    none = fed.new_empty(0, 0)
    levels = fed.new_empty(0) if tile.levels is None else tile.levels
    row_fed, row_upper = tile.rows or (none, none)
    share = noise = none
    if (chance := tile.chance) is not None:
        share, noise = chance.share, uniform(chance.seed, chance.stream, chance.features, len(fed)).to(fed.dtype).T
    codes, error = torch.empty(fed.shape, dtype=torch.uint8), torch.empty_like(fed)
    tensors = (tile.wanted, fed, tile.upper, row_fed, row_upper, tile.scale, tile.zero, tile.group, levels)
    arrays = [_array(tensor) for tensor in tensors]
    largest = arrays[0].dtype.type(tile.largest_code)
    rest = [_array(tensor) for tensor in (share, noise, codes, error)]
    _share_out(_round_rows, len(fed), tile.rows is not None, *arrays, largest, *rest)
    if fed is not tile.fed:
        tile.fed.copy_(fed)
    return codes.to(tile.fed.device), error.to(tile.fed.device)


@compiled
def _descend_rows(  # type: ignore[no-untyped-def]
    first, last, codes, error, slope, hessian, product, fisher, scale, group, movable, levels, ridge, largest, sweeps
):
    """product: P; the same memory as `slope`, G P, where there is no G."""
    columns, rows_feed, has_levels = error.shape[1], fisher.shape[0] > 0, levels.shape[0] > 0
    lowest = largest - largest  # 0 of the weights' type
    for n in range(first, last):
        for _ in range(sweeps):
            moved_any = False
            for k in range(columns):
                step = scale[n, group[k]]
                curvature = (hessian[k, k] + ridge) * step
                if rows_feed:
                    curvature *= fisher[n, n]
                # Of a scale's sign; not a number, or 0, is none to divide by.
                if not movable[k] or not abs(curvature) > lowest:
                    continue
                if has_levels:
                    before = levels[codes[n, k]]
                    place = level_code(before + slope[n, k] / curvature, levels)
                    code = place + lowest
                    moved = (levels[place] - before) * step
                else:
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
                    for m in range(first, last):
                        weight = fisher[m, n] * moved
                        for j in range(columns):
                            slope[m, j] -= weight * hessian[k, j]
                        slope[m, k] -= weight * ridge
            if not moved_any:
                break


def descend(descent: Descent) -> None:
    """Move codes one at a time; see `Loops`. What is on another device comes here and goes back."""
    product, fisher = descent.rows or (descent.slope, descent.slope.new_empty(0, 0))
    changed = descent.codes, descent.error, product
    codes, error, own_product = (tensor.cpu() for tensor in changed)
    slope = own_product if descent.rows is None else descent.slope.cpu()
    group = torch.arange(codes.shape[1]) // descent.grid.columns_per_group
    levels = error.new_empty(0) if descent.levels is None else descent.levels
    tensors = (
        codes, error, slope, descent.hessian, own_product, fisher, descent.grid.scale, group, descent.movable, levels,
    )  # fmt: skip
    arrays = [_array(tensor) for tensor in tensors]
    ridge, largest = (arrays[1].dtype.type(number) for number in (descent.ridge, descent.grid.largest_code))
    _share_out(_descend_rows, len(codes), descent.rows is not None, *arrays, ridge, largest, descent.sweeps)
    for there, here in zip(changed, (codes, error, own_product), strict=True):
        if here is not there:
            there.copy_(here)


COMPILED = Loops(torch.device("cpu"), round_tile, descend)


def _array(tensor: torch.Tensor) -> Any:
    return tensor.cpu().contiguous().numpy()


def _share_out(loop: Callable[..., None], count: int, chained: bool, *arguments: Any) -> None:
    """Run `loop` from row to row, on as many threads as torch has, or on one where rows feed each other (`chained`)."""
    threads = 1 if chained else torch.get_num_threads()
    if threads == 1 or count <= ROWS_PER_TASK:
        loop(0, count, *arguments)
        return

    def some(first: int) -> None:
        loop(first, min(first + ROWS_PER_TASK, count), *arguments)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(some, range(0, count, ROWS_PER_TASK)))
