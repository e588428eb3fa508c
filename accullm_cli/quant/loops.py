"""The two inner loops of rounding: what decides one weight after the other, and so cannot be a product of matrices.

Whoever calls rounding says which make of them runs, and so where: those that numba compiles for the CPU
(`quant.compiled.COMPILED`), or a GPU's kernels (`kernels.rounding`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from accullm_cli.quant.grid import Grid


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


@dataclass(frozen=True)
class Sweep:
    """N rows whose codes are moved one at a time, each row for itself (see quant.descent); all on one device.

    codes, error and slope are contiguous. codes and error are changed in place; slope is used up.
    """

    codes: torch.Tensor  # uint8 [N, K]
    error: torch.Tensor  # E = W* - Q, [N, K], in the working dtype as all that follows
    slope: torch.Tensor  # E (H + ridge), [N, K]
    hessian: torch.Tensor  # H, [K, K]
    ridge: float
    grid: Grid  # of these rows
    movable: torch.Tensor  # bool [K], the columns on the grid
    most: int  # sweeps over a row; fewer where one changes nothing


@dataclass(frozen=True)
class Loops:
    """One make of the two.

    device: the one they are for, where all that belongs to rounding then happens.
    round_tile: codes, uint8 [N, C], and what they miss of `wanted`, [N, C].
    sweep: does its work in place.
    """

    device: torch.device
    round_tile: Callable[[Tile], tuple[torch.Tensor, torch.Tensor]]
    sweep: Callable[[Sweep], None]
