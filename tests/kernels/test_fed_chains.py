"""The kernels for chains of rows that feed each other, on the CPU: bit for bit what the compiled loops make of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accullm_cli.kernels.rounding import (
    chain_descent_launch,
    cuda_loops,
    curvature_of,
    fed_chains_launch,
    structs_of,
    with_tensors,
)
from accullm_cli.quant.encodings.trellis import ABOVE
from accullm_cli.quant.loops import COMPILED, ChainDescent, ChainTile, RowFeedback
from accullm_cli.quant.plan import LinearPlan
from accullm_cli.quant.rounding import RoundingOptions, round_linears
from accullm_cli.quant.trellis import SEGMENT, is_chain
from tests.cuda_emulation import emulate, guarded, needs_compiler, poisoned, run
from tests.kernels.test_rounding import AMPLE, DTYPES, ORDERS, trellis_descent, trellis_tile
from tests.quant.references import correlated_problem
from tests.test_pinned import sha256_of

pytestmark = needs_compiler

# A row alone, and about the edges of the turns of 32 rows and of a segment.
COUNTS = st.sampled_from([1, 2, 31, 32, 33, 70, 255, SEGMENT])
BITS = st.sampled_from([2, 3, 4, 5])


def levels_of(bits: int, dtype: torch.dtype) -> torch.Tensor:
    above = torch.tensor([0, *ABOVE[bits]], dtype=dtype) / 4
    return guarded(torch.cat([-above.flip(0), above]))


def feedback(rows: int, columns: int, dtype: torch.dtype, seed: int) -> RowFeedback:
    """Of rows that share causes; what lies on and below V's diagonal is not to be read."""
    draw = torch.Generator().manual_seed(seed)
    upper = torch.randn(rows, rows, generator=draw, dtype=torch.float64) / 8
    upper = torch.where(torch.ones_like(upper).triu(1).bool(), upper, torch.nan)
    fed, weight = torch.randn(rows, columns, generator=draw), torch.rand(rows, generator=draw) + 0.1
    return RowFeedback(guarded(fed.to(dtype)), guarded(upper.to(dtype)), guarded(weight.to(dtype)))


def copied(task: Any) -> Any:
    return with_tensors(task, torch.Tensor.clone)


def buffers_of(*tasks: object) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for task in tasks:
        with_tensors(task, lambda tensor: found.append(tensor) or tensor)
    return found


@settings(deadline=None, max_examples=12)
@given(
    st.lists(st.tuples(COUNTS, st.integers(1, 6)), min_size=1, max_size=3), BITS, DTYPES, ORDERS, st.integers(0, 999)
)
def test_tiles_at_once_are_those_of_the_compiled_loop_bit_for_bit(
    sides: list[tuple[int, int]], bits: int, dtype: torch.dtype, order: int, seed: int
) -> None:
    tiles: list[ChainTile] = []
    for rows, columns in sides:
        tile = trellis_tile(columns, rows, dtype, seed)
        own = feedback(rows, columns, dtype, seed)
        tiles.append(replace(tile, levels=levels_of(bits, dtype), rows=own))
    results = [(poisoned(*tile.fed.shape, dtype=torch.uint8), poisoned(*tile.fed.shape, dtype=dtype)) for tile in tiles]
    before = copied(tuple(tiles))
    structs = guarded(structs_of([(tile, *found) for tile, found in zip(tiles, results, strict=True)]))
    buffers = [structs, *buffers_of(*tiles), *(part for found in results for part in found)]
    run(fed_chains_launch(structs, len(tiles), dtype), buffers, order)
    for tile, (codes, error), compiled in zip(tiles, results, before, strict=True):
        wanted_codes, wanted_error = COMPILED.round_tile(compiled)
        assert is_chain(codes)
        assert torch.equal(codes, wanted_codes)
        assert torch.equal(error, wanted_error)
        assert torch.equal(tile.fed, compiled.fed)


@settings(deadline=None, max_examples=12)
@given(COUNTS, st.integers(1, 12), BITS, DTYPES, ORDERS, st.integers(0, 999))
def test_a_descent_is_that_of_the_compiled_loop_bit_for_bit(
    rows: int, columns: int, bits: int, dtype: torch.dtype, order: int, seed: int
) -> None:
    there = trellis_descent(rows, columns, dtype, seed)
    codes = there.codes if bits > 2 else guarded(there.codes % 8)
    parts = {"codes": codes, "levels": levels_of(bits, dtype), "rows": feedback(rows, columns, dtype, seed)}
    there = replace(there, **parts, sweeps=2)
    here: ChainDescent = copied(there)
    COMPILED.descend(here)
    curvature = guarded(curvature_of(there))
    buffers = [part for part in buffers_of(there) if part is not there.movable and part is not there.grid.zero]
    run(chain_descent_launch(there, curvature), [*buffers, curvature], order)
    assert torch.equal(there.codes, here.codes)
    assert torch.equal(there.error, here.error)
    assert torch.equal(there.product, here.product)


def test_a_linear_of_two_segments_is_rounded_by_kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With outliers, and tiles that do not wait for each other at once: the bytes of the CPU."""
    rows, columns = SEGMENT + 20, 140
    problem = correlated_problem(rows, columns, 300, seed=3)
    plan = LinearPlan("a", rows, columns, 4, 64, True, (3, 70, 139), scale_bits=6, encoding="trellis")
    gradients = torch.randn(2 * rows, rows, generator=torch.Generator().manual_seed(1))
    launched: list[tuple[str, int]] = []

    def launch(what: Any, device: torch.device) -> None:
        launched.append((what.kernel, what.grid[0]))
        emulate(what)

    def tensors(**loops: Any) -> dict[str, torch.Tensor]:
        arguments = {"a": problem.weight.float()}, {"a": plan}, RoundingOptions(), torch.bfloat16
        fishers = {"a": gradients.T @ gradients / len(gradients)}
        found = round_linears(
            *arguments, problem.hessian.float(), {"a": problem.pull.float()}, fishers=fishers, **loops
        )
        return found["a"].linear.to_tensors()

    wanted = sha256_of(tensors())
    assert sha256_of(tensors(loops=cuda_loops(torch.device("cpu"), launch, AMPLE))) == wanted
    # Two column blocks by two segments, in three waves.
    assert [blocks for kernel, blocks in launched if kernel == "trellis_round_fed"] == [1, 2, 1]
    assert {kernel for kernel, _ in launched} == {"trellis_round", "trellis_round_fed", "trellis_descend_fed"}
