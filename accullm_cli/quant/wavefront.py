"""Tiles whose rows feed each other, by torch on whatever device they are: all weights at once that wait for none.

A weight (n, k) of such a tile waits for those to its left and those above it, see quant.rounding:

    step  0 1 2 3 4      so those on an anti-diagonal, n + k = t, are rounded in step t,
          1 2 3 4 5      together with those of all other tiles of which none waits for another.
          2 3 4 5 6

Every sum adds the same terms in the same order as the loop of `quant.loops`, each product rounded before it is added.
So the same numbers come out, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from accullm_cli.quant.loops import CodeTile, RowFeedback


def round_fed(tiles: Sequence[CodeTile]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Round tiles with `rows` and without `chance`; see `Loops.round_fed`. All have the same grid and dtype.

    A tile of N by C takes N + C - 1 steps of some twenty operations each, and so do many.
    """
    rows, columns = (max(tile.wanted.shape[side] for tile in tiles) for side in (0, 1))

    def stacked(parts: Sequence[torch.Tensor], height: int, width: int, value: float = 0.0) -> torch.Tensor:
        sides = ((0, width - part.shape[1], 0, height - part.shape[0]) for part in parts)
        return torch.stack([pad(part, side, value=value) for part, side in zip(parts, sides, strict=True)])

    wanted = stacked([tile.wanted for tile in tiles], rows, columns)
    scale = stacked([tile.scale[:, tile.group] for tile in tiles], rows, columns, 1.0)
    zero = stacked([tile.zero[:, tile.group] for tile in tiles], rows, columns)
    fed = stacked([tile.fed for tile in tiles], rows, columns)
    # U and V; what lies on and below the diagonals may be anything. Columns are counted from the last where they stand
    # for rows of these, so that an anti-diagonal is a run of rows in all of them.
    upper = stacked([tile.upper.triu(1) for tile in tiles], columns, columns).flip(1).contiguous()
    across = stacked([_rows(tile).upper.triu(1) for tile in tiles], rows, rows)
    row_fed = stacked([_rows(tile).fed.T for tile in tiles], columns, rows).flip(1).contiguous()
    codes, error = torch.zeros_like(wanted), torch.zeros_like(wanted)
    levels, largest = tiles[0].levels, tiles[0].largest_code
    for step in range(rows + columns - 1):
        first, last = max(0, step - columns + 1), min(rows - 1, step)
        place = columns - 1 - step + first  # of the column of row `first`, counted from the last
        own, behind = slice(first, last + 1), slice(place, place + last + 1 - first)
        size, offset, target, feedback, code, lost = (
            _diagonal(matrix, first * (columns - 1) + step, last + 1 - first, columns - 1)
            for matrix in (scale, zero, wanted, fed, codes, error)
        )
        from_above = _diagonal(row_fed, place * rows + first, last + 1 - first, rows + 1)
        position = (target + (feedback + from_above)) / size
        if levels is None:
            code.copy_((position + offset).round_().clamp_(0, largest))
            point = code - offset
        else:
            # The nearest level, of two the lower one.
            level = ((position + position)[..., None] > levels[:-1] + levels[1:]).sum(-1)
            code.copy_(level)
            point = levels[level]
        lost.copy_(target - point * size)
        passed_on = lost + feedback
        after = step - last + 1  # all of these columns and rows lie before the next ones
        fed[:, own, after:] += lost[..., None] * upper[:, behind, after:]
        row_fed[:, behind, first + 1 :] += passed_on[..., None] * across[:, own, first + 1 :]
    results = []
    for tile, own_codes, own_error, own_fed in zip(tiles, codes, error, fed, strict=True):
        height, width = tile.wanted.shape
        tile.fed.copy_(own_fed[:height, :width])
        results.append((own_codes[:height, :width].to(torch.uint8), own_error[:height, :width]))
    return results


def _diagonal(matrix: torch.Tensor, start: int, count: int, stride: int) -> torch.Tensor:
    """Every `stride`-th element of the matrices [B, N, C] from `start` on, as a view [B, count]."""
    return matrix.as_strided((len(matrix), count), (matrix.stride(0), stride), start)


def _rows(tile: CodeTile) -> RowFeedback:
    assert tile.rows is not None
    return tile.rows
