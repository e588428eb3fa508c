"""Scales that can be stored: the nearest of a table, never below what was asked for, and tables that hold the range."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accullm_cli.quant.grid import minmax_grid, searched_grid, spanning_scales
from accullm_cli.quant.scales import LARGEST_RATIO, StorableScales, round_scale

BITS = st.integers(4, 8)
DTYPES = st.sampled_from(["float16", "bfloat16"])


@settings(deadline=None)
@given(st.floats(1e-4, 1.0), st.floats(1.0, 900.0), BITS, DTYPES)
def test_a_table_has_equal_ratios_between_its_ends(smallest: float, ratio: float, bits: int, dtype: str) -> None:
    table = StorableScales(dtype).with_table(smallest, smallest * ratio, bits).table
    assert table is not None
    assert (table.dtype, len(table)) == (torch.float16, 2**bits)
    assert bool((table[1:] >= table[:-1]).all())
    assert bool((table > 0).all())
    digits = 2.0**-7 if dtype == "bfloat16" else 2.0**-10
    for place, value in enumerate(table.double().tolist()):
        assert value == pytest.approx(smallest * ratio ** (place / (2**bits - 1)), rel=2.5 * digits, abs=2.0**-24)
    assert float(table[-1]) >= smallest * ratio * (1 - 1e-12)
    if dtype == "bfloat16":
        assert torch.equal(table.bfloat16().double(), table.double())


@settings(deadline=None)
@given(st.integers(0, 2**31), BITS, DTYPES)
def test_rounding_finds_the_nearest_of_the_table_by_brute_force(seed: int, bits: int, dtype: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.exp(torch.randn(50, generator=generator, dtype=torch.float64))
    storable = StorableScales(dtype).with_table(float(scales.min()), float(scales.max()), bits)
    assert storable.table is not None
    table = storable.table.double().tolist()
    up = storable.round_up(scales)
    for scale, found, above in zip(scales.tolist(), storable.round(scales).tolist(), up.tolist(), strict=True):
        best = min(abs(math.log(value / scale)) for value in table)
        assert abs(math.log(found / scale)) == pytest.approx(best, abs=1e-12)
        assert above == min((value for value in table if value >= scale), default=table[-1])


def test_a_table_ends_at_a_thousandth_of_its_largest() -> None:
    table = StorableScales().with_table(1e-7, 1.0, 6).table
    assert table is not None
    assert float(table[0]) == round_scale(torch.tensor(1 / LARGEST_RATIO), "float16")


def test_any_scale_is_rounded_up_by_one_step_at_most() -> None:
    scale = torch.tensor([0.1, 1.0, 1.0001])
    up = StorableScales().round_up(scale)
    assert bool((up >= scale).all())
    assert bool((up <= scale * (1 + 2**-9)).all())


@settings(deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([2, 3, 4, 8]), st.booleans())
def test_a_grid_with_a_table_has_only_its_scales(seed: int, bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(12, 40, generator=generator) * torch.exp(torch.randn(12, 1, generator=generator))
    weight[3] = 0
    storable = StorableScales().table_for(spanning_scales(weight, bits, 16, symmetric), 6, smallest_range=0.6)
    assert storable.table is not None
    for grid in (
        minmax_grid(weight, bits, 16, symmetric, storable),
        searched_grid(weight, torch.ones(40), bits, 16, symmetric, storable),
    ):
        assert set(grid.scale.flatten().tolist()) <= set(storable.table.float().tolist())
        assert grid.storable is storable


def test_a_table_of_64_scales_costs_next_to_nothing() -> None:
    """The weighted error of a searched grid, over that of one with float16 scales, where rows differ tenfold."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(128, 256, generator=generator) * 10 ** torch.rand(128, 1, generator=generator)
    importance = torch.rand(256, generator=generator) + 0.1

    def error(storable: StorableScales) -> float:
        grid = searched_grid(weight, importance, 4, 32, False, storable)
        return float(((weight - grid.values(grid.round_to_nearest(weight))).square() * importance).sum())

    free = error(StorableScales())
    table = StorableScales().table_for(spanning_scales(weight, 4, 32, False), 6, smallest_range=0.6)
    assert error(table) < 1.02 * free
    # So few that it must cost: the measure can tell.
    assert error(StorableScales().with_table(0.1, 2.0, 2)) > 1.3 * free


def test_a_weight_of_zeros_has_a_table_too() -> None:
    storable = StorableScales().table_for(spanning_scales(torch.zeros(3, 8), 4, 4, False), 6)
    assert storable.table is not None
    assert storable.table.unique().tolist() == [1.0]


def test_no_weight_lies_outside_a_grid_with_a_margin() -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(3))
    storable = StorableScales().table_for(spanning_scales(weight, 4, 16, False, margin=0.5), 4)
    grid = minmax_grid(weight, 4, 16, False, storable, margin=0.5)
    scale, zero = grid.per_column(64)
    position = weight / scale + zero
    assert float(position.min()) >= 0
    assert float(position.max()) <= 15
