"""Tiles whose rows feed each other, many at once by torch: bit for bit what the compiled loop makes of each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accullm_cli.quant import feedback
from accullm_cli.quant.feedback import factor_hessian, round_with_feedback
from accullm_cli.quant.grid import Grid
from accullm_cli.quant.loops import COMPILED, CodeTile, RowFeedback
from accullm_cli.quant.wavefront import round_fed
from tests.quant.references import correlated_problem

LEVELS = torch.tensor([-9.0, -7.0, -5.5, -4.0, -3.0, -2.0, -1.5, -1.0, 0.5, 1.0, 1.5, 2.0, 4.0, 5.0, 6.0, 7.0])
SIDES = st.tuples(st.integers(1, 20), st.integers(1, 24))


def chained_tile(rows: int, columns: int, dtype: torch.dtype, levels: bool, draw: torch.Generator) -> CodeTile:
    """What lies on and below the diagonals of U and V is not to be read."""

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    def above(count: int) -> torch.Tensor:
        return torch.where(torch.ones(count, count).triu(1).bool(), matrix(count, count) / 8, torch.nan)

    scale = matrix(rows, 3).abs() / 8 + 0.125
    zero = torch.randint(0, 16, (rows, 3), generator=draw).to(dtype)
    group = torch.randint(0, 3, (columns,), generator=draw)
    feedback = RowFeedback(matrix(rows, columns) / 4, above(rows), torch.empty(0))
    table = LEVELS.to(dtype) if levels else None
    fed = matrix(rows, columns) / 4
    return CodeTile(
        wanted=matrix(rows, columns), fed=fed, upper=above(columns), scale=scale, group=group, rows=feedback, zero=zero,
        largest_code=15, levels=table,
    )  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(st.lists(SIDES, min_size=1, max_size=4), st.booleans(), st.booleans(), st.integers(0, 999))
def test_tiles_of_any_sides_are_those_of_the_compiled_loop(
    sides: list[tuple[int, int]], is_double: bool, levels: bool, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if is_double else torch.float32
    tiles = [chained_tile(rows, columns, dtype, levels, draw) for rows, columns in sides]
    alone = [replace(tile, fed=tile.fed.clone()) for tile in tiles]
    found = round_fed(tiles)
    for tile, (codes, error), other in zip(tiles, found, alone, strict=True):
        wanted_codes, wanted_error = COMPILED.round_tile(other)
        assert torch.equal(codes, wanted_codes)
        assert torch.equal(error, wanted_error)
        assert torch.equal(tile.fed, other.fed)


@pytest.mark.parametrize(
    ("rows", "columns", "row_block", "column_block"),
    [(1, 5, 256, 128), (6, 1, 256, 128), (50, 70, 7, 8), (70, 50, 16, 24), (9, 20, 256, 128), (12, 30, 1, 1)],
)
def test_waves_of_tiles_give_what_one_tile_after_the_other_gives(
    rows: int, columns: int, row_block: int, column_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The products between tiles are the same ones, so that all bits are."""
    monkeypatch.setattr(feedback, "ROW_BLOCK", row_block)
    monkeypatch.setattr(feedback, "COLUMN_BLOCK", column_block)
    problem = correlated_problem(rows, columns, 3 * columns, seed=rows)
    gradients = torch.randn(2 * rows, rows, generator=torch.Generator().manual_seed(1))
    fisher = factor_hessian(gradients.T @ gradients, 0.5)
    factor = factor_hessian(problem.hessian.float(), 0.01, (0,))
    groups = -(-columns // 16)
    grid = Grid(torch.full((rows, groups), 0.25), torch.full((rows, groups), 7.0), 4, 16, False)
    sizes: list[int] = []

    def spied(tiles: list[CodeTile]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        sizes.append(len(tiles))
        return round_fed(tiles)

    def rounded(**loops: object) -> torch.Tensor:
        weight = problem.weight.float()
        return round_with_feedback(weight, grid, weight[:, :1], factor, fisher, None, replace(COMPILED, **loops))[0]

    assert torch.equal(rounded(round_fed=spied), rounded())
    high, wide = -(-rows // row_block), -(-(columns - 1) // column_block)
    assert len(sizes) == (high + wide - 1 if wide else 0)
    assert sum(sizes) == high * wide
