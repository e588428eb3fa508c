"""Grids of GGUF's blocks: codes by brute force, and what a fit makes of scales and offsets by least squares."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accullm_cli.quant.encodings.ggml_grid import BlockGrid
from accullm_cli.quant.encodings.ggml_layout import BLOCK_TYPES, BlockType
from tests.quant.blocks import NAMES, draw, encoding, levels_of, row


def numbers_of(grid: BlockGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset of every column, by hand."""
    kind, count = grid.kind, grid.integers.shape[1] * grid.kind.group
    of_block = [column // kind.block for column in range(count)]
    of_group = [column // kind.group for column in range(count)]
    scale = grid.half[:, of_block] * grid.integers[:, of_group]
    return scale, grid.half_offset[:, of_block] * grid.lifts[:, of_group]


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=15)
@given(st.integers(1, 3), st.integers(1, 2), st.floats(-3, 3), st.booleans(), st.integers(0, 999))
def test_codes_are_those_of_the_nearest_value(
    name: str, rows: int, blocks: int, mean: float, searches: bool, seed: int
) -> None:
    kind = BLOCK_TYPES[name]
    columns = blocks * kind.block
    weight, importance = draw(rows, columns, seed=seed) + mean, draw(columns, seed=seed + 1).square()
    grid, _ = encoding(name).grid(weight, row(name, rows, columns), "float16", importance if searches else None)
    scale, offset = numbers_of(grid)
    every = torch.stack([level * scale + offset for level in levels_of(kind)])
    codes = grid.round_to_nearest(weight)
    assert torch.equal(grid.values(codes), every.gather(0, codes.long()[None])[0])
    nearest = (every - weight).abs().amin(0)
    torch.testing.assert_close((grid.values(codes) - weight).abs(), nearest, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in NAMES if not BLOCK_TYPES[name].has_offset])
def test_scales_of_either_sign_are_tried(name: str) -> None:
    """The end of the grid that reaches further goes to where the largest weight is."""
    kind = BLOCK_TYPES[name]
    weight = draw(1, kind.block).clamp(-1, 1)
    weight[0, 5] = 8
    up, down = (
        encoding(name).grid(own, row(name, 1, kind.block), "float16", torch.ones(kind.block))[0]
        for own in (weight, -weight)
    )
    group = 5 // kind.group
    assert float(up.scale[0, group]) == -float(down.scale[0, group])
    if kind.bits < 6 and kind.levels is None:  # else both ends are nearly as good
        assert float(up.scale[0, group]) < 0


def step_by_hand(
    left: np.ndarray,
    along: np.ndarray,
    level: np.ndarray,
    scale: float,
    offset: float,
    stored: tuple[Callable[[float], float], Callable[[float], float]],
) -> tuple[float, float]:
    """Scale and offset by least squares for what is `left` without both; the offset for the scale as it is stored."""
    wanted = np.linalg.lstsq(np.stack([along, level], 1), left, rcond=None)[0][0]
    new_scale = stored[0](wanted)
    lift = level @ (left - new_scale * along) / (level @ level) if level.any() else 0.0
    new_offset = stored[1](lift)
    before, after = left - scale * along - offset * level, left - new_scale * along - new_offset * level
    return (new_scale, new_offset) if after @ after < before @ before else (scale, offset)


def fitted_by_hand(
    kind: BlockType, inputs: np.ndarray, target: np.ndarray, codes: np.ndarray, start: BlockGrid
) -> np.ndarray:
    """Half, integers, half offset and lifts of the first row, one after the other."""
    half, integers, half_offset, lifts = (
        getattr(start, name)[0].numpy().copy() for name in ("half", "integers", "half_offset", "lifts")
    )
    points = np.array([levels_of(kind)[code] for code in codes])
    of_block, of_group = np.arange(len(codes)) // kind.block, np.arange(len(codes)) // kind.group

    def whole(unit: float, bounds: tuple[int, int], scales: bool) -> Callable[[float], float]:
        def stored(wanted: float) -> float:
            number = float(np.clip(np.rint(wanted / unit), *bounds)) if unit else 0.0
            return unit * (number or (1.0 if scales and kind.levels is None else 0.0))

        return stored

    def values() -> np.ndarray:
        scale, offset = half[of_block] * integers[of_group], half_offset[of_block] * lifts[of_group]
        return points * scale + offset

    for block in range(len(half)):
        for group in np.unique(of_group[of_block == block]) if kind.is_super else ():
            own = of_group == group
            along, level = inputs[:, own] @ points[own], inputs[:, own].sum(1) * kind.has_offset
            left = inputs @ (target - np.where(own, 0, values()))
            scale, offset = integers[group] * half[block], lifts[group] * half_offset[block]
            stored = whole(half[block], kind.integers, True), whole(half_offset[block], kind.lifts, False)
            scale, offset = step_by_hand(left, along, level, scale, offset, stored)
            integers[group] = scale / half[block]
            lifts[group] = offset / half_offset[block] if kind.has_offset else 0
        own = of_block == block
        along = inputs[:, own] @ (points * integers[of_group])[own]
        level = inputs[:, own] @ lifts[of_group][own]
        left = inputs @ (target - np.where(own, 0, values()))
        stored = (lambda wanted: float(np.float16(wanted)),) * 2
        half[block], half_offset[block] = step_by_hand(left, along, level, half[block], half_offset[block], stored)
    return np.concatenate([half, integers, half_offset, lifts])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(2))
def test_scales_and_offsets_are_those_of_least_squares(name: str, seed: int) -> None:
    """Of one sub-block after the other, and then of the block, each for what all others leave."""
    kind = BLOCK_TYPES[name]
    count = 2 * kind.block
    target = draw(1, count, seed=seed + 100) - 0.3
    # Inputs that have much in common, so that sub-blocks make up for each other.
    inputs = draw(count + 30, count, seed=seed) + 2 * draw(count + 30, 1, seed=seed + 7)
    start, _ = encoding(name).grid(target, row(name, 1, count), "float16")
    codes = start.round_to_nearest(target + 0.3 * draw(1, count, seed=9)).to(torch.uint8)
    error = target - start.values(codes)
    fitted = start.fitted(error, codes, torch.ones(count, dtype=torch.bool), inputs.T @ inputs, 0.0)
    found = torch.cat([fitted.half, fitted.integers, fitted.half_offset, fitted.lifts], 1)[0]
    expected = fitted_by_hand(kind, inputs.numpy(), target[0].numpy(), codes[0].numpy(), start)
    assert found.tolist() == expected.tolist()
    assert not kind.is_super or not torch.equal(fitted.integers, start.integers)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=8)
@given(st.integers(0, 999), st.sampled_from([(), (2,), tuple(range(32))]))
def test_a_fit_loses_nothing_and_says_what_is_left(name: str, seed: int, outliers: tuple[int, ...]) -> None:
    kind = BLOCK_TYPES[name]
    count = 2 * kind.block
    inputs, target = (
        draw(count + 40, count, seed=seed) @ draw(count, count, seed=seed + 1) / 16,
        draw(3, count, seed=seed + 2),
    )
    hessian, ridge = inputs.T @ inputs / len(inputs), 0.03
    grid, _ = encoding(name).grid(target, row(name, 3, count), "float16", torch.ones(count))
    codes = (grid.round_to_nearest(target) + draw(3, count, seed=seed + 3).round()).clamp(0, 2**kind.bits - 1)
    codes = codes.to(torch.uint8)
    on_grid = torch.ones(count, dtype=torch.bool)
    on_grid[list(outliers)] = False

    def loss(grid: BlockGrid) -> torch.Tensor:
        left = (target - grid.values(codes)).masked_fill(~on_grid, 0)
        return ((left @ hessian) * left).sum(1) + ridge * left.square().sum(1)

    error = (target - grid.values(codes)).masked_fill(~on_grid, 0)
    fitted = grid.fitted(error, codes, on_grid, hessian, ridge)
    assert (loss(fitted) <= loss(grid)).all()
    assert kind.bits == 8 or (loss(fitted) < loss(grid)).any(), "next to a scale of 8 bits there may be no better one"
    left = (target - fitted.values(codes)).masked_fill(~on_grid, 0)
    torch.testing.assert_close(error, left, rtol=0, atol=1e-11)
    for number, (least, most) in ((fitted.integers, kind.integers), (fitted.lifts, kind.lifts)):
        assert torch.equal(number, number.round().clamp(least, most))
    for number in (fitted.half, fitted.half_offset):
        assert torch.equal(number, number.half().double())
