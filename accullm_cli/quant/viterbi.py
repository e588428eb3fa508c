"""Chains of trellis codes for the weights of a column: Viterbi's algorithm (IEEE Transactions on Information Theory 13,
1967) over the four states of `quant.trellis`."""

from __future__ import annotations

import numpy as np
import torch

from accullm_cli.quant.compiled import compiled, share_out
from accullm_cli.quant.trellis import SEGMENT

NO_PATH = 1e300
# Places of one remainder by 4 belong together: the lower bit of it is u_(n-1), and the upper one u_n XOR u_(n-2).
REMAINDERS = 4


@compiled
def middles_of(levels):  # type: ignore[no-untyped-def]
    """For each remainder twice the middles between its neighbouring levels: [4, L - 1], of [4 L]."""
    middles = np.empty((REMAINDERS, len(levels) // REMAINDERS - 1), levels.dtype)
    for place in range(len(levels) - REMAINDERS):
        middles[place % REMAINDERS, place // REMAINDERS] = levels[place] + levels[place + REMAINDERS]
    return middles


@compiled
def _nearest(position, remainder, middles):  # type: ignore[no-untyped-def]
    """The place of the level that is nearest, of those with a remainder."""
    above = np.int32(0)
    for number in range(middles.shape[1]):  # all of them: no branch to guess, and several at once
        above += np.int32(position + position > middles[remainder, number])
    return REMAINDERS * above + remainder


@compiled
def _feed(before, weights, missed, after):  # type: ignore[no-untyped-def]
    """What later rows are fed, [N], with what one row missed."""
    for m in range(len(before)):
        after[m] = before[m] + weights[m] * missed


@compiled
def best_chain(wanted, step, levels, middles, near, back, places):  # type: ignore[no-untyped-def]
    """Write the places whose levels have the least squared error, and return that.

    Args:
        wanted: the weights, [N]; N at most a segment. step: their scales, of either sign, [N].
        levels: ascending, [4 L]. middles: of them.
        near: uint8 [N, 4], back: uint8 [N], both overwritten.
        places: uint8 [N], written.
    """
    count = len(wanted)
    metric = np.empty(REMAINDERS, np.float64)
    # By state u_(n-1) + 2 u_(n-2).
    cost_0, cost_1, cost_2, cost_3 = 0.0, NO_PATH, NO_PATH, NO_PATH
    for n in range(count):
        for remainder in range(REMAINDERS):
            place = _nearest(wanted[n] / step[n], remainder, middles)
            near[n, remainder] = place
            lost = wanted[n] - levels[place] * step[n]
            metric[remainder] = lost * lost
        # Into u + 2 v from v and v + 2: what u_(n-2) was is kept.
        from_2, from_3 = cost_2 + metric[2], cost_3 + metric[3]
        into_0, into_2 = cost_0 + metric[0], cost_1 + metric[1]
        into_1, into_3 = cost_0 + metric[2], cost_1 + metric[3]
        via_2, via_3 = cost_2 + metric[0], cost_3 + metric[1]
        back[n] = (from_2 < into_0) + 2 * (via_2 < into_1) + 4 * (from_3 < into_2) + 8 * (via_3 < into_3)
        cost_0, cost_1 = min(into_0, from_2), min(into_1, via_2)
        cost_2, cost_3 = min(into_2, from_3), min(into_3, via_3)
    least = min(min(cost_0, cost_1), min(cost_2, cost_3))
    state = 0 if cost_0 == least else 1 if cost_1 == least else 2 if cost_2 == least else 3
    for n in range(count - 1, -1, -1):
        own, before, earlier = state & 1, state >> 1, (back[n] >> state) & 1
        places[n] = near[n, before + 2 * (own ^ earlier)]
        state = before + 2 * earlier
    return least


@compiled
def good_fed_chain(wanted, step, levels, middles, upper, weight, fed, near, back, places):  # type: ignore[no-untyped-def]
    """As `best_chain`, where rows feed each other: places whose loss r G r^T is small, and that loss.

    With r what the weights miss and G = V R V^T, it is the sum of R_nn (r_n + sum over m < n of V_mn r_m)^2. What a row
    is fed hangs on the whole path to a state, so that each keeps its own (per-survivor processing: Raheli, Polydoros
    and Tzou, IEEE Transactions on Communications 43, 1995), and what comes out need not be the best chain there is.

    Args:
        upper: V, [N, N], unit upper triangular. weight: the diagonal of R, [N].
        fed: [2, 4, N], near: uint8 [N, 4], back: uint8 [N, 4], all overwritten.
        (others: as for `best_chain`)
    """
    count = len(wanted)
    cost, next_cost = np.full(4, NO_PATH), np.empty(4, np.float64)
    cost[0] = 0.0
    fed[0, :, :count] = 0
    now = 0
    for n in range(count):
        next_cost[:] = NO_PATH
        for state in range(4):
            if cost[state] == NO_PATH:
                continue
            position = wanted[n] + fed[now, state, n]
            for half in range(2):
                place = _nearest(position / step[n], (state & 1) + 2 * half, middles)
                lost = position - levels[place] * step[n]
                total = cost[state] + weight[n] * lost * lost
                into = (half ^ (state >> 1)) + 2 * (state & 1)
                if total < next_cost[into]:
                    next_cost[into] = total
                    near[n, into], back[n, into] = place, state
        for into in range(4):
            if next_cost[into] < NO_PATH:
                missed, before = wanted[n] - levels[near[n, into]] * step[n], fed[now, back[n, into], n + 1 : count]
                _feed(before, upper[n, n + 1 :], missed, fed[1 - now, into, n + 1 :])
        cost[:] = next_cost
        now = 1 - now
    state = int(np.argmin(cost))
    least = cost[state]
    for n in range(count - 1, -1, -1):
        places[n] = near[n, state]
        state = back[n, state]
    return least


@compiled
def fed_loss(missed, upper, weight, fed):  # type: ignore[no-untyped-def]
    """The loss r G r^T of what weights miss, [N]; fed: [N], overwritten."""
    fed[: len(missed)] = 0
    loss = 0.0
    for n in range(len(missed)):
        own = missed[n] + fed[n]
        loss += weight[n] * own * own
        later, weights = fed[n + 1 : len(missed)], upper[n, n + 1 :]
        for m in range(len(later)):
            later[m] += weights[m] * missed[n]
    return loss


@compiled
def _nearest_chains(first, last, wanted, step, levels, places):  # type: ignore[no-untyped-def]
    """All columns of whole segments, first to last."""
    room = min(last - first, SEGMENT)
    own, own_step = np.empty(room, wanted.dtype), np.empty(room, wanted.dtype)
    near, back, chain = np.empty((room, 4), np.uint8), np.empty(room, np.uint8), np.empty(room, np.uint8)
    middles = middles_of(levels)
    for start in range(first, last, SEGMENT):
        end = min(start + SEGMENT, last)
        count = end - start
        for k in range(wanted.shape[1]):
            own[:count], own_step[:count] = wanted[start:end, k], step[start:end, k]
            best_chain(own[:count], own_step[:count], levels, middles, near, back, chain)
            places[start:end, k] = chain[:count]


def nearest_chains(weight: torch.Tensor, step: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The places of the chains that are nearest to the columns of a weight: uint8 [N, K], on its device.

    Args:
        weight: [N, K]; row 0 begins a segment. step: its scales, [N, K]. levels: ascending, [4 L].
    """
    places = torch.empty(weight.shape, dtype=torch.uint8)
    arrays = [tensor.cpu().contiguous().numpy() for tensor in (weight, step, levels, places)]
    share_out(_nearest_chains, len(weight), SEGMENT, *arrays)
    return places.to(weight.device)
