"""What rounding keeps in memory: large matrices are let go early, and parts give what the whole gives."""

from __future__ import annotations

import weakref

import pytest
import torch

from accullm_cli.quant import grid
from accullm_cli.quant.stats import GramMatrices
from tests.quant.references import correlated_problem


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_a_grid_searched_in_parts_is_that_of_the_whole(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(7, 40, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(40, generator=torch.Generator().manual_seed(1))
    ignored = torch.arange(40) % 13 == 5
    whole = grid.searched_grid(weight, importance, 4, 16, False, ignored=ignored)
    monkeypatch.setattr(grid, "CHUNK_ELEMENTS", 40 * rows)
    parts = grid.searched_grid(weight, importance, 4, 16, False, ignored=ignored)
    assert torch.equal(parts.scale, whole.scale)
    assert torch.equal(parts.zero, whole.zero)


def test_a_row_longer_than_a_part_is_a_part_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "CHUNK_ELEMENTS", 10)
    assert [part.tolist() for part in grid.row_chunks(torch.arange(22).view(2, 11))] == [
        [list(range(11))],
        [list(range(11, 22))],
    ]


def test_the_drift_is_gone_once_pulls_are_taken() -> None:
    problem = correlated_problem(6, 20, 64, seed=0)
    gram = GramMatrices(20, with_drift=True, dtype=torch.float64)
    gram.add(problem.quantized, problem.original)
    assert gram._drift is not None
    drift = weakref.ref(gram._drift)
    pulls = gram.take_pulls({"a": problem.weight})
    assert drift() is None
    torch.testing.assert_close(pulls["a"], problem.pull, rtol=1e-9, atol=1e-12)


def test_grams_are_given_away() -> None:
    gram = GramMatrices(3, with_drift=True)
    gram.add(torch.eye(3), 2 * torch.eye(3))
    hessian = weakref.ref(gram._hessian)  # type: ignore[arg-type]
    assert gram.take_hessian().tolist() == (torch.eye(3) / 3).tolist()  # type: ignore[union-attr]
    assert hessian() is None


def test_the_drift_is_given_away_once() -> None:
    problem = correlated_problem(6, 20, 64, seed=0)
    gram = GramMatrices(20, with_drift=True, dtype=torch.float64)
    gram.add(problem.quantized[:40], problem.original[:40])
    gram.add(problem.quantized[40:], problem.original[40:])
    expected = problem.quantized.T @ (problem.original - problem.quantized) / 64
    torch.testing.assert_close(gram.take_drift(), expected, rtol=1e-9, atol=1e-12)
    assert gram.take_drift() is None
    assert GramMatrices(20).take_drift() is None
    assert GramMatrices(20, with_drift=True).take_drift() is None  # no row
