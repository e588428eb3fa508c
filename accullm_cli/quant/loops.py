"""The two inner loops of rounding: what decides one weight after the other, and so cannot be a product of matrices.

`COMPILED` is numba's make of them, for the CPU; `kernels.rounding` has a GPU's. The machine code is kept, so that only
the first run waits for it (some five seconds). Nothing in rounding is reordered or fused, so that the same numbers come
out on every CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from accullm_cli.quant.compiled import compiled, share_out
from accullm_cli.quant.grid import Grid
from accullm_cli.quant.philox import uniform
from accullm_cli.quant.trellis import SEGMENT
from accullm_cli.quant.viterbi import best_chain, fed_loss, good_fed_chain, middles_of

# Rows that a thread takes at once where rows do not depend on each other.
ROWS_PER_TASK = 64


@dataclass(frozen=True)
class Chance:
    """What stochastic rounding needs of a tile, see quant.stochastic."""

    share: torch.Tensor  # [N, C], what part of its feedback each weight may receive
    seed: int  # below 2**64
    stream: int  # below 2**32, the linear's own
    features: torch.Tensor  # int64 [C], the input feature that each column is


@dataclass(frozen=True)
class RowFeedback:
    """How N rows feed each other, by their own part of a Fisher matrix, G = V R V^T."""

    fed: torch.Tensor  # [N, C], what other rows feed to each weight of a tile (overwritten), or add to P of a descent
    upper: torch.Tensor  # V, [N, N], unit upper triangular; what is not above its diagonal is not used
    weight: torch.Tensor  # the diagonal of R, [N]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """N rows by C columns of weights, in the order of rounding; all on one device and in the working dtype."""

    wanted: torch.Tensor  # [N, C], the targets
    # [N, C], what earlier columns feed to each weight; when the tile is done, in place, what all columns before it do.
    fed: torch.Tensor
    # U of the tile's columns, [C, C], unit upper triangular; what is not above its diagonal is not used.
    upper: torch.Tensor
    scale: torch.Tensor  # [N, G], the rows' grid
    group: torch.Tensor  # int64 [C], each column's group
    rows: RowFeedback | None = None  # where rows feed each other, too


@dataclass(frozen=True, kw_only=True)
class CodeTile(Tile):
    """One whose codes are chosen each by itself: steps of a scale, to nearest or at random, or places in a table."""

    zero: torch.Tensor  # [N, G]
    largest_code: int
    levels: torch.Tensor | None = None  # [largest code + 1], see `Grid`
    chance: Chance | None = None  # with neither `levels` nor `rows`


@dataclass(frozen=True, kw_only=True)
class ChainTile(Tile):
    """One of a trellis, whose columns are chains: they begin with the tile, and again with every segment.

    With `rows` it is at most one segment.
    """

    levels: torch.Tensor  # ascending, [4 L]


@dataclass(frozen=True, kw_only=True)
class Descent:
    """N rows whose codes are changed as that lowers the loss (see quant.descent); all on one device.

    codes, error and product are contiguous. They are changed in place, but product is used up where rows do not feed
    each other.
    """

    codes: torch.Tensor  # uint8 [N, K]
    error: torch.Tensor  # E = W* - Q, [N, K], in the working dtype as all that follows
    product: torch.Tensor  # P = E (H + ridge), [N, K]
    hessian: torch.Tensor  # H, [K, K]
    ridge: float
    grid: Grid  # of these rows
    movable: torch.Tensor  # bool [K], the columns on the grid
    sweeps: int  # over a row (of chains over all columns), at most; fewer where one changes nothing


@dataclass(frozen=True, kw_only=True)
class CodeDescent(Descent):
    """One that moves a code at a time."""

    levels: torch.Tensor | None = None  # [largest code + 1], the grid's table
    # Where rows feed each other: the slope G P, [N, K], contiguous and used up, and their G, [N, N].
    rows: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class ChainDescent(Descent):
    """One of a trellis, that moves the codes of a column together, a segment at a time."""

    levels: torch.Tensor  # ascending, [4 L]
    rows: RowFeedback | None = None  # of at most one segment


@dataclass(frozen=True)
class Loops:
    """One make of the two, each for either kind of task.

    device: the one they are for, where all that belongs to rounding then happens.
    round_tile: codes, uint8 [N, C], and what they miss of `wanted`, [N, C].
    descend: does its work in place.
    round_fed: tiles of one kind whose rows feed each other, none of which waits for another, at once; None where they
        are no faster than one after the other. The same for each as `round_tile` gives.
    """

    device: torch.device
    round_tile: Callable[[Tile], tuple[torch.Tensor, torch.Tensor]]
    descend: Callable[[Descent], None]
    round_fed: Callable[[Sequence[Tile]], list[tuple[torch.Tensor, torch.Tensor]]] | None = None


# -- compiled by numba -------------------------------------------------------------------------------------


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
    first, last, wanted, fed, upper, row_fed, row_upper, scale, zero, group, levels, share, noise, codes, error, largest
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


@compiled
def _round_chains(  # type: ignore[no-untyped-def]
    first, last, wanted, fed, upper, row_fed, row_upper, row_weight, scale, group, levels, codes, error
):
    """Of whole segments, first to last: each column by the chain of least error, and its errors fed to those behind."""
    columns, rows_feed = wanted.shape[1], len(row_weight) > 0
    room = min(last - first, SEGMENT)
    position, step = np.empty(room, wanted.dtype), np.empty(room, wanted.dtype)
    near, back, places = np.empty((room, 4), np.uint8), np.empty((room, 4), np.uint8), np.empty(room, np.uint8)
    own_fed, middles = np.empty((2, 4, room), wanted.dtype), middles_of(levels)
    for start in range(first, last, SEGMENT):
        count = min(SEGMENT, last - start)
        for k in range(columns):
            for n in range(count):
                position[n] = wanted[start + n, k] + fed[start + n, k]
                step[n] = scale[start + n, group[k]]
                if rows_feed:
                    position[n] += row_fed[start + n, k]
            if rows_feed:
                good_fed_chain(
                    position[:count], step[:count], levels, middles, row_upper, row_weight, own_fed, near, back, places
                )
            else:
                best_chain(position[:count], step[:count], levels, middles, near, back[:, 0], places)
            for n in range(count):
                codes[start + n, k] = places[n]
                lost = wanted[start + n, k] - levels[places[n]] * step[n]
                error[start + n, k] = lost
                for j in range(k + 1, columns):
                    fed[start + n, j] += lost * upper[k, j]


def round_tile(tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a tile with the feedback inside of it; see `Loops`. What is on another device comes here and goes back."""
    fed = tile.fed.cpu().contiguous()
    codes, error = torch.empty(fed.shape, dtype=torch.uint8), torch.empty_like(fed)
    rows = tile.rows or _no_rows(fed)
    first, last = (tile.wanted, fed, tile.upper, rows.fed, rows.upper), (codes, error)
    if isinstance(tile, ChainTile):
        arrays = _arrays(*first, rows.weight, tile.scale, tile.group, tile.levels, *last)
        share_out(_round_chains, len(fed), SEGMENT, *arrays)
    else:
        assert isinstance(tile, CodeTile), "there is no other kind"
        levels = fed.new_empty(0) if tile.levels is None else tile.levels
        share = noise = fed.new_empty(0, 0)
        if (chance := tile.chance) is not None:
            share, noise = chance.share, uniform(chance.seed, chance.stream, chance.features, len(fed)).to(fed.dtype).T
        arrays = _arrays(*first, tile.scale, tile.zero, tile.group, levels, share, noise, *last)
        largest = arrays[0].dtype.type(tile.largest_code)
        share_out(_round_rows, len(fed), None if tile.rows else ROWS_PER_TASK, *arrays, largest)
    if fed is not tile.fed:
        tile.fed.copy_(fed)
    return codes.to(tile.fed.device), error.to(tile.fed.device)


@compiled
def _descend_rows(  # type: ignore[no-untyped-def]
    first, last, codes, error, product, hessian, scale, group, movable, slope, fisher, levels, ridge, largest, sweeps
):
    """slope: G P; the same memory as `product`, P, where there is no G."""
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


@compiled
def _descend_chains(  # type: ignore[no-untyped-def]
    first, last, codes, error, product, hessian, scale, group, movable, levels, others, upper, weight, ridge, sweeps
):
    """Of whole segments, first to last: each column moved to the chain of least loss, everything else as it is."""
    columns, rows_feed = error.shape[1], len(weight) > 0
    room = min(last - first, SEGMENT)
    wanted, step, away = np.empty(room, error.dtype), np.empty(room, error.dtype), np.empty(room, error.dtype)
    near, back, places = np.empty((room, 4), np.uint8), np.empty((room, 4), np.uint8), np.empty(room, np.uint8)
    own_fed, middles = np.empty((2, 4, room), error.dtype), middles_of(levels)
    nothing = ridge - ridge  # 0 of the weights' type
    for start in range(first, last, SEGMENT):
        count = min(SEGMENT, last - start)
        for _ in range(sweeps):
            moved_any = False
            for k in range(columns):
                curvature = hessian[k, k] + ridge
                if not movable[k] or not curvature > nothing:
                    continue
                before = 0.0
                for n in range(count):
                    away[n] = product[start + n, k] / curvature
                    if rows_feed:
                        away[n] += others[start + n, k] / curvature
                    before += away[n] * away[n]
                    step[n] = scale[start + n, group[k]]
                    wanted[n] = levels[codes[start + n, k]] * step[n] + away[n]
                if rows_feed:
                    before = fed_loss(away[:count], upper, weight, own_fed[0, 0])
                    after = good_fed_chain(
                        wanted[:count], step[:count], levels, middles, upper, weight, own_fed, near, back, places
                    )
                else:
                    after = best_chain(wanted[:count], step[:count], levels, middles, near, back[:, 0], places)
                if not after < before:
                    continue
                for n in range(count):
                    moved = (levels[places[n]] - levels[codes[start + n, k]]) * step[n]
                    codes[start + n, k] = places[n]
                    if moved == nothing:
                        continue
                    moved_any = True
                    error[start + n, k] -= moved
                    for j in range(columns):
                        product[start + n, j] -= moved * hessian[k, j]
                    product[start + n, k] -= moved * ridge
            if not moved_any:
                break


def descend(descent: Descent) -> None:
    """Change codes as that lowers the loss; see `Loops`. What is on another device comes here and goes back."""
    changed = descent.codes, descent.error, descent.product
    codes, error, product = (tensor.cpu() for tensor in changed)
    group = torch.arange(codes.shape[1]) // descent.grid.columns_per_group
    own = codes, error, product, descent.hessian, descent.grid.scale, group, descent.movable
    if isinstance(descent, ChainDescent):
        rows = descent.rows or _no_rows(error)
        arrays = _arrays(*own, descent.levels, rows.fed, rows.upper, rows.weight)
        share_out(_descend_chains, len(codes), SEGMENT, *arrays, arrays[1].dtype.type(descent.ridge), descent.sweeps)
    else:
        assert isinstance(descent, CodeDescent), "there is no other kind"
        slope, fisher = descent.rows or (product, error.new_empty(0, 0))
        levels = error.new_empty(0) if descent.levels is None else descent.levels
        arrays = _arrays(*own, slope, fisher, levels)
        ridge, largest = (arrays[1].dtype.type(number) for number in (descent.ridge, descent.grid.largest_code))
        together = None if descent.rows else ROWS_PER_TASK
        share_out(_descend_rows, len(codes), together, *arrays, ridge, largest, descent.sweeps)
    for there, here in zip(changed, (codes, error, product), strict=True):
        if here is not there:
            there.copy_(here)


COMPILED = Loops(torch.device("cpu"), round_tile, descend)


def _no_rows(like: torch.Tensor) -> RowFeedback:
    return RowFeedback(like.new_empty(0, 0), like.new_empty(0, 0), like.new_empty(0))


def _arrays(*tensors: torch.Tensor) -> list[Any]:
    return [tensor.cpu().contiguous().numpy() for tensor in tensors]
