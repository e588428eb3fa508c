"""Do the kernels of rounding do on a device what the CPU's loops do? Asked before anything is rounded there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.kernels.rounding import MOST_COLUMNS, cuda_loops, with_tensors
from accullm_cli.quant.grid import Grid
from accullm_cli.quant.loops import (
    COMPILED,
    ChainDescent,
    ChainTile,
    Chance,
    CodeDescent,
    CodeTile,
    Descent,
    Loops,
    RowFeedback,
    Tile,
)

ROWS, GROUP_SIZE = 70, 48  # no multiple of a block's rows; a last short group
LEVELS = torch.tensor([-9.0, -7.0, -5.5, -4.0, -3.0, -2.0, -1.5, -1.0, 0.5, 1.0, 1.5, 2.0, 4.0, 5.0, 6.0, 7.0])


@cache
def checked_loops(device: torch.device) -> Loops:
    """The loops of rounding for a device: on a GPU kernels, once they have shown that they are right there.

    Raises:
        AccullmError: they round otherwise than the CPU, or cannot be compiled for the device.
    """
    if device.type == "cpu":
        return COMPILED
    loops = loops_of(device)
    error = rounding_disagreement(loops)
    if error is not None:
        raise AccullmError(
            f"the CUDA kernels round otherwise than the CPU: {error}",
            str(device),
            "convert on the CPU, and please report this with the output of accullm doctor",
        )
    return loops


def loops_of(device: torch.device) -> Loops:
    """The kernels of a GPU, checked or not."""
    from accullm_cli.kernels.device import describe, launch

    index = device.index if device.index is not None else torch.cuda.current_device()
    return cuda_loops(device, launch, describe(index).shared_bytes)


def rounding_disagreement(loops: Loops) -> str | None:
    """Round tiles, at random and not, to steps, levels and a trellis, and descend, by these loops and by the CPU's.

    With rows that feed each other, and with such that do not.

    Both add up the same terms in the same order, so that any numbers will do, and all bits have to be equal.

    Returns:
        What differs; None where nothing does.

    Raises:
        AccullmError: the kernels cannot be compiled for the device.
    """
    draw = torch.Generator().manual_seed(0)

    def sent(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(loops.device, copy=True)

    for what, tile in _tiles(draw):
        there = with_tensors(tile, sent)
        codes, error = COMPILED.round_tile(tile)
        found_codes, found_error = loops.round_tile(there)
        if not _equal((found_codes, codes), (found_error, error), (there.fed, tile.fed)):
            return f"{what}: {_different(found_codes, codes)}"
    for what, rows in _descents(draw):
        moved = with_tensors(rows, sent)
        COMPILED.descend(rows)
        loops.descend(moved)
        if not _equal((moved.codes, rows.codes), (moved.error, rows.error)):
            return f"{what}: {_different(moved.codes, rows.codes)}"
    return None


def _tiles(draw: torch.Generator) -> Iterator[tuple[str, Tile]]:
    """For codes that are steps, at random, of levels, with rows that feed each other, and of a trellis."""
    order = torch.randperm(MOST_COLUMNS, generator=draw)
    chance = Chance(torch.rand(ROWS, MOST_COLUMNS, generator=draw), 2**63 + 5, 7, order)
    rows = _rows(draw, MOST_COLUMNS)

    def parts() -> dict[str, Any]:
        wanted, fed = (torch.randn(ROWS, MOST_COLUMNS, generator=draw) for _ in range(2))
        upper = torch.randn(MOST_COLUMNS, MOST_COLUMNS, generator=draw) / 16
        return {"wanted": wanted, "fed": fed, "upper": upper, "scale": _grid(draw).scale, "group": order // GROUP_SIZE}

    for what, own in (
        ("", {}),
        (" at random", {"chance": chance}),
        (" to levels", {"levels": LEVELS}),
        (" of rows that feed each other", {"rows": rows}),
    ):
        yield f"feedback_round{what}", CodeTile(**parts(), zero=torch.full((ROWS, 3), 8.0), largest_code=15, **own)
    for what, feedback in (("", None), (" of rows that feed each other", rows)):
        yield f"trellis_round{what}", ChainTile(**parts(), levels=LEVELS, rows=feedback)


def _descents(draw: torch.Generator) -> Iterator[tuple[str, Descent]]:
    """Of steps and levels, with rows that feed each other, and of a trellis."""
    yield "descend", CodeDescent(**_descent(draw, signed=False))
    yield "descend over levels", CodeDescent(**_descent(draw, signed=True), levels=LEVELS)
    fed = _descent(draw, signed=False)
    fisher = _fisher(draw)
    yield "descend over rows that feed each other", CodeDescent(**fed, rows=(fisher @ fed["product"], fisher))
    for what, rows in (("", None), (" over rows that feed each other", _rows(draw, 3 * MOST_COLUMNS))):
        yield f"trellis_descend{what}", ChainDescent(**_descent(draw, signed=True), levels=LEVELS, rows=rows)


def _descent(draw: torch.Generator, signed: bool) -> dict[str, Any]:
    """Rows whose codes are far from the best, over more columns than a block has threads."""
    columns = 3 * MOST_COLUMNS
    inputs = torch.randn(2 * columns, columns, generator=draw)
    hessian = inputs.T @ inputs / len(inputs)
    error, grid = torch.randn(ROWS, columns, generator=draw) / 8, _grid(draw, columns)
    if signed:
        grid = replace(grid, scale=grid.scale * torch.where(torch.arange(grid.scale.shape[1]) % 2 == 1, -1, 1))
    return {
        "codes": torch.randint(0, 16, (ROWS, columns), generator=draw, dtype=torch.uint8), "error": error,
        "product": error @ hessian, "hessian": hessian, "ridge": 0.01, "grid": grid,
        "movable": torch.arange(columns) % 9 != 4, "sweeps": 3,
    }  # fmt: skip


def _fisher(draw: torch.Generator) -> torch.Tensor:
    gradients = torch.randn(2 * ROWS, ROWS, generator=draw)
    return gradients.T @ gradients / len(gradients)


def _rows(draw: torch.Generator, columns: int) -> RowFeedback:
    upper = torch.randn(ROWS, ROWS, generator=draw) / 16
    return RowFeedback(torch.randn(ROWS, columns, generator=draw), upper, torch.rand(ROWS, generator=draw) + 0.5)


def _grid(draw: torch.Generator, columns: int = MOST_COLUMNS) -> Grid:
    scale = torch.rand(ROWS, -(-columns // GROUP_SIZE), generator=draw) / 4 + 0.125
    return Grid(scale, torch.full_like(scale, 8.0), 4, GROUP_SIZE, False)


def _equal(*pairs: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return all(torch.equal(there.cpu(), here) for there, here in pairs)


def _different(there: torch.Tensor, here: torch.Tensor) -> str:
    return f"{int((there.cpu() != here).sum())} of {here.numel()} codes"
