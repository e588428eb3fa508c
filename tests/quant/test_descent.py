"""Coordinate descent over codes: never a greater loss, and an end where no single code can be improved."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from accullm_cli.quant import descent, loops
from accullm_cli.quant.descent import Draft
from accullm_cli.quant.grid import Grid, minmax_grid

RIDGE = 0.05


def positive(size: int, generator: torch.Generator) -> torch.Tensor:
    """A correlated positive definite matrix, as Hessians and Fisher matrices are."""
    rows = torch.randn(2 * size, size, generator=generator, dtype=torch.float64)
    rows += 2 * torch.randn(2 * size, 1, generator=generator, dtype=torch.float64)
    return rows.T @ rows / len(rows)


def problem(
    seed: int, rows: int = 5, columns: int = 12, bits: int = 3, signed: bool = False
) -> tuple[torch.Tensor, torch.Tensor, Grid, torch.Tensor]:
    """Target, codes of nearest rounding, grid (`signed`: with scales of both signs), Hessian, in float64."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    grid = minmax_grid(target, bits, 4, False)
    if signed:
        down = torch.rand(grid.scale.shape, generator=generator) < 0.5
        mirrored = replace(grid, scale=-grid.scale, zero=grid.largest_code - grid.zero)
        grid = mirrored.where(down, grid)
    return target, grid.round_to_nearest(target).to(torch.uint8), grid, positive(columns, generator)


def descend(
    target: torch.Tensor,
    codes: torch.Tensor,
    grid: Grid,
    hessian: torch.Tensor,
    movable: torch.Tensor | None = None,
    fisher: torch.Tensor | None = None,
    ridge: float = RIDGE,
) -> None:
    """Of codes, in place. Columns that are not movable are outliers, whose weights are what their codes stand for."""
    fixed = torch.zeros(0, dtype=torch.int64) if movable is None else torch.nonzero(~movable).flatten()
    kept = grid.values(codes.to(target.dtype))[:, fixed]
    Draft(target, grid, codes, fixed, kept, hessian, ridge).descend(fisher)


def loss(
    target: torch.Tensor, codes: torch.Tensor, grid: Grid, hessian: torch.Tensor, fisher: torch.Tensor | None
) -> float:
    error = target - grid.values(codes.double())
    damped = hessian + RIDGE * torch.eye(len(hessian))
    rows = torch.eye(len(error), dtype=torch.float64) if fisher is None else fisher
    return float(torch.trace(rows @ error @ damped @ error.T))


@pytest.mark.parametrize("with_rows", [False, True])
@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6), rows=st.integers(1, 40), columns=st.integers(1, 20), bits=st.integers(2, 4),
    signed=st.booleans(),
)  # fmt: skip
@example(seed=87997, rows=39, columns=10, bits=4, signed=False)  # 30 rounds are not enough
def test_no_single_code_can_be_improved_at_the_end(
    with_rows: bool, seed: int, rows: int, columns: int, bits: int, signed: bool
) -> None:
    target, codes, grid, hessian = problem(seed, rows, columns, bits, signed)
    fisher = positive(rows, torch.Generator().manual_seed(seed + 1)) if with_rows else None
    movable = torch.rand(columns, generator=torch.Generator().manual_seed(seed)) < 0.8
    before, kept = loss(target, codes, grid, hessian, fisher), codes.clone()
    with pytest.MonkeyPatch.context() as patch:
        # Far beyond where it ends: blocks of rows that feed each other take some dozens of rounds.
        patch.setattr(descent, "SWEEPS", 1000)
        patch.setattr(descent, "ROUNDS", 500)
        descend(target, codes, grid, hessian, movable, fisher)
    after = loss(target, codes, grid, hessian, fisher)
    assert after <= before * (1 + 1e-12)
    assert torch.equal(codes[:, ~movable], kept[:, ~movable])
    for row in range(0, rows, max(1, rows // 3)):
        for column in torch.nonzero(movable).flatten().tolist():
            for code in range(grid.largest_code + 1):
                other = codes.clone()
                other[row, column] = code
                assert loss(target, other, grid, hessian, fisher) >= after * (1 - 1e-9)


@pytest.mark.parametrize("with_rows", [False, True])
def test_it_gains_where_errors_are_correlated(with_rows: bool) -> None:
    target, codes, grid, hessian = problem(3, 64, 64, 4)
    fisher = positive(64, torch.Generator().manual_seed(4)) if with_rows else None
    before = loss(target, codes, grid, hessian, fisher)
    descend(target, codes, grid, hessian, fisher=fisher)
    assert loss(target, codes, grid, hessian, fisher) < 0.5 * before


def test_rows_do_not_depend_on_how_they_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    target, codes, grid, hessian = problem(5, 50, 16)
    again = codes.clone()
    descend(target, codes, grid, hessian)
    monkeypatch.setattr(loops, "ROWS_PER_TASK", 7)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    descend(target, again, grid, hessian)
    assert torch.equal(codes, again)


def test_a_dead_feature_stays_where_it_is() -> None:
    """Nothing reads it, and without a ridge nothing is to be gained there."""
    target, codes, grid, hessian = problem(6)
    hessian[2], hessian[:, 2] = 0, 0
    kept = codes[:, 2].clone()
    descend(target, codes, grid, hessian, ridge=0.0)
    assert torch.equal(codes[:, 2], kept)


def test_float32_ends_as_float64_does_but_for_near_ties() -> None:
    target, codes, grid, hessian = problem(7, 64, 48, 4)
    single = codes.clone()
    single_grid = Grid(grid.scale.float(), grid.zero.float(), grid.bits, grid.columns_per_group, grid.symmetric)
    descend(target, codes, grid, hessian)
    descend(target.float(), single, single_grid, hessian.float())
    assert float((single == codes).double().mean()) > 0.98
    assert loss(target, single, grid, hessian, None) == pytest.approx(
        loss(target, codes, grid, hessian, None), rel=0.01
    )
