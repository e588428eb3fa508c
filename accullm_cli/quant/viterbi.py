"""The best chain of trellis codes for the weights of a column: Viterbi's algorithm (IEEE Transactions on Information
Theory 13, 1967) over the four states of `quant.trellis`."""

from __future__ import annotations

import numpy as np
import torch

from accullm_cli.quant.compiled import compiled
from accullm_cli.quant.trellis import SEGMENT

NO_PATH = 1e300


@compiled
def best_chain(wanted, step, levels, near, back, places):  # type: ignore[no-untyped-def]
    """Write the places whose levels have the least squared error, and return that.

    Places of one remainder by 4 belong together: the lower bit of it is u_(n-1), and the upper one u_n XOR u_(n-2).

    Args:
        wanted: the weights, [N]; N at most a segment. step: their scales, of either sign, [N].
        levels: ascending, [4 L]. near: uint8 [N, 4], back: uint8 [N], both overwritten.
        places: uint8 [N], written.
    """
    count, each = len(wanted), len(levels) // 4
    metric, middles = np.empty(4, np.float64), np.empty((4, each - 1), levels.dtype)
    for remainder in range(4):
        for number in range(each - 1):
            middles[remainder, number] = levels[4 * number + remainder] + levels[4 * number + 4 + remainder]
    # By state u_(n-1) + 2 u_(n-2).
    cost_0, cost_1, cost_2, cost_3 = 0.0, NO_PATH, NO_PATH, NO_PATH
    for n in range(count):
        twice = (wanted[n] + wanted[n]) / step[n]
        for remainder in range(4):
            above = np.int32(0)
            for number in range(each - 1):  # all of them: no branch to guess, and several at once
                above += np.int32(twice > middles[remainder, number])
            place = 4 * above + remainder
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
def _nearest_chains(wanted, step, levels, places):  # type: ignore[no-untyped-def]
    """All columns of [N, K], the rows of one segment."""
    rows = wanted.shape[0]
    near, back, own = np.empty((rows, 4), np.uint8), np.empty(rows, np.uint8), np.empty(rows, np.uint8)
    for k in range(wanted.shape[1]):
        best_chain(wanted[:, k].copy(), step[:, k].copy(), levels, near, back, own)
        places[:, k] = own


def nearest_chains(weight: torch.Tensor, step: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The places of the chains that are nearest to the columns of a weight: uint8 [N, K], on its device.

    Args:
        weight: [N, K]; row 0 begins a segment. step: its scales, [N, K]. levels: ascending, [4 L].
    """
    places = torch.empty(weight.shape, dtype=torch.uint8)
    parts = (tensor.cpu().split(SEGMENT) for tensor in (weight, step, places))
    for part in zip(*parts, strict=True):
        wanted, own_step, own = (tensor.numpy() for tensor in part)
        _nearest_chains(wanted, own_step, levels.cpu().numpy(), own)
    return places.to(weight.device)
