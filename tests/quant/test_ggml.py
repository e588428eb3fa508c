"""GGUF's encodings: against the package of its authors bit for bit, and against brute force and least squares."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accullm_cli.errors import AccullmError
from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.encodings.base import MEASURED_BITS
from accullm_cli.quant.encodings.ggml import RELATIVE_DAMAGE, BlockLinear, GgmlBlocks
from accullm_cli.quant.encodings.ggml_grid import BlockGrid
from accullm_cli.quant.encodings.ggml_layout import BLOCK_TYPES, BlockType, Half, pack_blocks, unpack_blocks
from accullm_cli.quant.grid import minmax_grid
from accullm_cli.quant.plan import LinearPlan
from accullm_cli.quant.rounding import RoundingOptions, round_linears
from tests.quant.references import correlated_problem

NAMES = list(BLOCK_TYPES)
SUPER = [name for name, kind in BLOCK_TYPES.items() if kind.is_super]
NO_OUTLIERS = torch.zeros(0, dtype=torch.int64)


def row(name: str, rows: int, columns: int, outliers: tuple[int, ...] = ()) -> LinearPlan:
    kind = BLOCK_TYPES[name]
    return LinearPlan("a", rows, columns, kind.bits, kind.group, not kind.has_offset, outliers, encoding=name)


def encoding(name: str) -> GgmlBlocks:
    found = ENCODINGS[name]
    assert isinstance(found, GgmlBlocks)
    return found


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def read_by_its_authors(blocks: torch.Tensor, name: str) -> np.ndarray:
    return gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name])


def assert_read_alike(blocks: torch.Tensor, name: str) -> None:
    """To the last bit, the sign of zeros included."""
    expected = read_by_its_authors(blocks, name)
    plan = row(name, len(blocks), expected.shape[1])
    found = encoding(name).unpack_blocks(blocks, plan)
    assert np.array_equal(found.dequantize().numpy().view(np.int32), expected.view(np.int32))
    assert torch.equal(encoding(name).pack_blocks(found), blocks)
    parts = unpack_blocks(blocks, BLOCK_TYPES[name])
    assert torch.equal(pack_blocks(parts, BLOCK_TYPES[name]), blocks)


def with_halves(blocks: torch.Tensor, kind: BlockType, half: float) -> torch.Tensor:
    """The blocks with this number for all float16s."""
    parts = unpack_blocks(blocks, kind)
    for field in kind.fields:
        if isinstance(field, Half):
            parts[field.of] = torch.full_like(parts[field.of], half)
    return pack_blocks(parts, kind)


# -- bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_blocks_have_the_sizes_that_are_published(name: str) -> None:
    kind, plan = BLOCK_TYPES[name], row(name, 3, 512)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[encoding(name).ggml_type]]
    assert (kind.block, kind.bytes_of_block) == (block, size)
    assert plan.stored_bytes == 3 * 512 // block * size


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.integers(1, 3), st.floats(-6e4, 6e4, width=16), st.integers(0, 999))
def test_any_bytes_are_read_as_their_authors_read_them(
    name: str, rows: int, blocks: int, half: float, seed: int
) -> None:
    kind = BLOCK_TYPES[name]
    octets = np.random.default_rng(seed).integers(0, 256, (rows, blocks * kind.bytes_of_block), dtype=np.uint8)
    assert_read_alike(with_halves(torch.from_numpy(octets), kind, half), name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("half", [0.0, -0.0, 2.0**-24, -(2.0**-24), 2.0**-14, 1.0, 65504.0, -65504.0])
@pytest.mark.parametrize("octet", [0x00, 0xFF, 0x80, 0x0F])
def test_extreme_blocks_are_read_alike(name: str, half: float, octet: int) -> None:
    kind = BLOCK_TYPES[name]
    octets = torch.full((2, 2 * kind.bytes_of_block), octet, dtype=torch.uint8)
    assert_read_alike(with_halves(octets, kind, half), name)


EXTREME_WEIGHTS = {
    "zeros": lambda: torch.zeros(2, 256, dtype=torch.float64),
    "denormals": lambda: draw(2, 256) * 2.0**-22,
    "the largest": lambda: draw(2, 256).clamp(-1, 1) * 60000,
    "negative": lambda: -draw(2, 256).abs() - 1,
    "positive": lambda: draw(2, 256).abs() + 1,
    "constant": lambda: torch.full((2, 256), 0.37, dtype=torch.float64),
    "constant, negative": lambda: torch.full((2, 256), -0.37, dtype=torch.float64),
    "one weight": lambda: torch.nn.functional.pad(draw(2, 1), (77, 178)),
    "a block of zeros": lambda: draw(2, 256) * (torch.arange(256) // 32 != 3),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("searches", [True, False])
@pytest.mark.parametrize("what", EXTREME_WEIGHTS)
def test_what_is_rounded_is_what_is_stored(name: str, searches: bool, what: str) -> None:
    weight = EXTREME_WEIGHTS[what]().float()
    plan = row(name, 2, 256)
    grid, sentences = encoding(name).grid(weight, plan, "float16", torch.ones(256) if searches else None)
    assert sentences == []
    codes = grid.round_to_nearest(weight).to(torch.uint8)
    values = grid.values(codes.float())
    stored = encoding(name).store(grid, codes, plan, NO_OUTLIERS, weight[:, :0])
    assert torch.equal(stored.dequantize(), values)
    assert_read_alike(stored.blocks, name)
    assert torch.isfinite(values).all()
    if what in ("zeros", "a block of zeros"):
        assert not values[weight == 0].any()
    # No weight is further away than half a step of the worst grid, or what a float16 is missing.
    step = weight.abs().amax() * 2 ** (2.0 - BLOCK_TYPES[name].bits)
    gaps = [high - low for low, high in itertools.pairwise(levels_of(BLOCK_TYPES[name]))]
    assert ((weight - values).abs() <= step + 2.0**-24 * max(2, *gaps)).all()


# -- the grid ----------------------------------------------------------------------------------------------


def numbers_of(grid: BlockGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset of every column, by hand."""
    kind, count = grid.kind, grid.integers.shape[1] * grid.kind.group
    of_block = [column // kind.block for column in range(count)]
    of_group = [column // kind.group for column in range(count)]
    scale = grid.half[:, of_block] * grid.integers[:, of_group]
    return scale, grid.half_offset[:, of_block] * grid.lifts[:, of_group]


def levels_of(kind: BlockType) -> list[float]:
    return list(kind.levels) if kind.levels else [code - kind.zero for code in range(2**kind.bits)]


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


# -- the search --------------------------------------------------------------------------------------------


def least_error(
    weight: np.ndarray, importance: np.ndarray, levels: list[float], scales: np.ndarray, offsets: np.ndarray
) -> float:
    """Of all pairs of a scale and an offset, each weight being rounded to the nearest of all values."""
    best = np.inf
    for offset in offsets:
        values = scales[:, None, None] * np.array(levels)[None, :, None] + offset
        left = np.abs(values - weight).min(1) ** 2 @ importance
        best = min(best, float(left.min()))
    return best


def error_of(grid: BlockGrid, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Of each sub-block, [N, G]."""
    left = weight - grid.values(grid.round_to_nearest(weight))
    return (left.square() * importance).view(len(weight), -1, grid.kind.group).sum(-1)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SUPER])
def test_the_search_comes_near_to_the_best_of_all_scales_and_offsets(name: str) -> None:
    kind = BLOCK_TYPES[name]
    ratios = []
    for seed in range(8):
        weight, importance = draw(1, 32, seed=seed) + 0.4, draw(32, seed=seed + 50).square() + 0.1
        grid, _ = encoding(name).grid(weight, row(name, 1, 32), "float16", importance)
        found = float(error_of(grid, weight, importance))
        scales = np.linspace(0.4, 1.1, 150) * float(weight.abs().max()) / max(map(abs, levels_of(kind)))
        offsets = np.zeros(1)
        if kind.has_offset:
            scales, offsets = scales * 1.2, float(weight.min()) + np.linspace(-0.2, 1, 60)
        best = least_error(
            weight[0].numpy(), importance.numpy(), levels_of(kind), np.concatenate([scales, -scales]), offsets
        )
        ratios.append(found / best)
    # With 8 bits there are hundreds of scales by which all weights happen to lie near to values.
    assert np.median(ratios) < (1.5 if kind.bits == 8 else 1.02)
    assert max(ratios) < (2 if kind.bits == 8 else 1.2)


@pytest.mark.parametrize("name", NAMES)
def test_no_single_integer_and_no_float16_next_to_it_would_do_much_better(name: str) -> None:
    """All integers of every sub-block, for the float16s that were found; and float16s that are a little off."""
    kind = BLOCK_TYPES[name]
    weight, importance = draw(4, 256, seed=1) * (1 + draw(4, 256, seed=2).abs()), draw(256, seed=3).square() + 0.1
    grid, _ = encoding(name).grid(weight, row(name, 4, 256), "float16", importance)
    found = error_of(grid, weight, importance)
    for factor in (0.9, 0.97, 0.99, 1.01, 1.03, 1.1):
        other = BlockGrid.of(kind, (grid.half * factor).half().double(), grid.integers, grid.half_offset, grid.lifts)
        assert error_of(other, weight, importance).sum() > 0.98 * found.sum()
    best = found.clone()
    for integer in range(kind.integers[0], kind.integers[1] + 1, 1 if kind.bits < 6 else 5):
        for lift in range(*kind.lifts, 3) if kind.is_super and kind.has_offset else [None]:
            if integer == 0:
                continue
            integers = torch.full_like(grid.integers, integer)
            lifts = grid.lifts if lift is None else torch.full_like(grid.lifts, lift)
            other = BlockGrid.of(kind, grid.half, integers, grid.half_offset, lifts)
            best = torch.minimum(best, error_of(other, weight, importance))
    # With more bits there are more integers by which all weights happen to lie near to values.
    assert best.sum() > (0.97 if kind.bits < 5 else 0.9) * found.sum()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_the_error_is_less_than_that_of_the_authors_own_rounding(name: str) -> None:
    weight = draw(16, 256, seed=7)
    grid, _ = encoding(name).grid(weight, row(name, 16, 256), "float16", torch.ones(256))
    kind = gguf.GGMLQuantizationType[name]
    theirs = gguf.quants.dequantize(gguf.quants.quantize(weight.float().numpy(), kind), kind)
    assert error_of(grid, weight, torch.ones(256)).sum() < 0.92 * (weight - torch.from_numpy(theirs)).square().sum()


@pytest.mark.parametrize("name", NAMES)
def test_the_search_does_not_look_at_outliers_and_bears_features_without_importance(name: str) -> None:
    weight = draw(3, 512, seed=3)
    weight[:, [5, 300]] *= 1000
    ignored = torch.zeros(512, dtype=torch.bool)
    ignored[[5, 300]] = True
    importance = draw(512, seed=4).square()
    importance[:64] = 0  # one block and more, which calibration never saw
    grid, _ = encoding(name).grid(weight, row(name, 3, 512), "float16", importance, ignored)
    left = (weight - grid.values(grid.round_to_nearest(weight))).masked_fill(ignored, 0)
    assert float(left.abs().max()) < 2


def test_where_nothing_counts_everything_counts_alike() -> None:
    weight = draw(2, 64, seed=3)
    grids = [
        encoding("Q4_0").grid(weight, row("Q4_0", 2, 64), "float16", own)[0]
        for own in (torch.zeros(64), torch.ones(64))
    ]
    assert torch.equal(grids[0].scale, grids[1].scale)


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_no_float16_reaches_are_clamped_and_on_record(name: str) -> None:
    weight = torch.full((1, 512), -1e12, dtype=torch.float64)
    weight[:, :256] = draw(1, 256)
    grid, sentences = encoding(name).grid(weight, row(name, 1, 512), "float16", torch.ones(512))
    count = 256 // BLOCK_TYPES[name].block
    assert sentences == [f"{count} of {2 * count} blocks hold weights that no float16 reaches, and were clamped"]
    assert torch.isfinite(grid.values(grid.round_to_nearest(weight))).all()


# -- the fit -----------------------------------------------------------------------------------------------


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


# -- rounding, whole ---------------------------------------------------------------------------------------


def loss_of(weight: torch.Tensor, linear: BlockLinear, hessian: torch.Tensor) -> float:
    left = weight - linear.dequantize(torch.float64)
    return float(((left @ hessian) * left).sum())


@pytest.mark.parametrize("name", NAMES)
def test_feedback_and_fit_lose_less_than_the_nearest_values(name: str) -> None:
    problem = correlated_problem(8, 256, 700, seed=2)
    losses = {}
    for method, grid in (("nearest", "search"), ("feedback", "search"), ("feedback", "fit")):
        options = RoundingOptions(method=method, grid=grid, target="original")  # type: ignore[arg-type]
        found = round_linears({"a": problem.weight}, {"a": row(name, 8, 256)}, options, torch.float64, problem.hessian)
        linear = found["a"].linear
        assert isinstance(linear, BlockLinear)
        assert found["a"].records == ()
        assert np.array_equal(linear.dequantize().numpy(), read_by_its_authors(linear.blocks, name))
        losses[method, grid] = loss_of(problem.weight, linear, problem.hessian)
    assert losses["feedback", "search"] < 0.7 * losses["nearest", "search"]
    assert losses["feedback", "fit"] < losses["feedback", "search"]


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=6)
@given(st.integers(1, 9), st.integers(1, 2), st.sampled_from([(), (3, 40 % 32), (0, 1, 2)]), st.integers(0, 99))
def test_tensors_read_back_and_take_the_bytes_that_were_planned(
    name: str, rows: int, blocks: int, outliers: tuple[int, ...], seed: int
) -> None:
    columns = blocks * BLOCK_TYPES[name].block
    plan = row(name, rows, columns, tuple(sorted(outliers)))
    weight = draw(rows, columns, seed=seed).float()
    found = round_linears({"a": weight}, {"a": plan}, RoundingOptions(method="nearest"), torch.bfloat16)["a"].linear
    tensors = found.to_tensors()
    assert set(tensors) <= set(encoding(name).suffixes)
    assert sum(tensor.nbytes for tensor in tensors.values()) == plan.stored_bytes
    read = encoding(name).from_tensors(tensors, plan)
    assert torch.equal(read.dequantize(), found.dequantize())
    assert torch.equal(read.blocks, found.blocks)


@pytest.mark.parametrize("name", NAMES)
def test_outliers_keep_their_weights_and_their_codes_are_the_nearest(name: str) -> None:
    problem = correlated_problem(8, 256, 700, seed=4)
    plan = row(name, 8, 256, (3, 40))
    found = round_linears({"a": problem.weight}, {"a": plan}, RoundingOptions(), torch.float32, problem.hessian)
    linear = found["a"].linear
    assert isinstance(linear, BlockLinear)
    wanted = problem.weight[:, [3, 40]]
    assert torch.equal(linear.dequantize()[:, [3, 40]], wanted.float())
    plain = linear.without_outliers(torch.float64)
    assert np.array_equal(plain.numpy(), read_by_its_authors(linear.blocks, name))
    kind, parts = BLOCK_TYPES[name], unpack_blocks(linear.blocks, BLOCK_TYPES[name])
    for code in range(2**kind.bits):
        parts["codes"][:, [3, 40]] = code
        other = encoding(name).unpack_blocks(pack_blocks(parts, kind), plan).without_outliers(torch.float64)
        assert ((plain - problem.weight)[:, [3, 40]].abs() <= (other - problem.weight)[:, [3, 40]].abs() + 1e-6).all()


def test_rows_in_parts_are_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = draw(9, 256, seed=5).float()
    found = []
    for elements in (1 << 18, 700):
        monkeypatch.setattr("accullm_cli.quant.grid.CHUNK_ELEMENTS", elements)
        monkeypatch.setattr("accullm_cli.quant.encodings.ggml.ELEMENTS_TOGETHER", elements)
        options = RoundingOptions(method="nearest")
        linear = round_linears({"a": weight}, {"a": row("Q5_1", 9, 256)}, options, torch.float32)["a"].linear
        found.append((linear.blocks, linear.dequantize()))
    for whole, parts in zip(*found, strict=True):
        assert torch.equal(whole, parts)


# Of the blocks that rounding in float64 writes. Other bytes need another VERSION of quantize.
PINNED = {
    "Q4_0": "650a287a501aa3cd",
    "Q4_1": "1e4d4f8a01b5002d",
    "Q5_0": "b0c1c00448645cd3",
    "Q5_1": "177057c9c0708d70",
    "Q8_0": "31fc797b6b80ac3a",
    "Q3_K": "d8c4bbb538c6efeb",
    "Q4_K": "89e58a4c7d7f9197",
    "Q5_K": "617067fdf181eabe",
    "Q6_K": "7c9ed1bbe4e71266",
    "IQ4_NL": "b9766cfe3cfc5080",
    "IQ4_XS": "56844fe2eecedcc4",
}


@pytest.mark.parametrize("name", NAMES)
def test_rounding_writes_the_pinned_bytes(name: str) -> None:
    """No decision is near to a tie, so that a last bit, which another CPU may have otherwise, changes nothing."""
    state, numbers = 7, []
    for _ in range(2 * 256):
        state = (state * 1103515245 + 12345) % 2**31
        numbers.append(((state >> 8) % 65537 - 32768) / 65536)
    weight = torch.tensor(numbers, dtype=torch.float64).view(2, 256)
    neighbours = torch.full((255,), 0.3, dtype=torch.float64)
    hessian = (1.1 ** (torch.arange(256) % 7)).double().diag() + neighbours.diag(1) + neighbours.diag(-1)
    found = []
    for noise in (0.0, 1e-13):
        shaken = weight * (1 + noise * draw(2, 256))
        options = RoundingOptions(target="original")
        rounded = round_linears({"a": shaken}, {"a": row(name, 2, 256)}, options, torch.float32, hessian)["a"].linear
        assert isinstance(rounded, BlockLinear)
        found.append(hashlib.sha256(bytes(rounded.blocks.flatten().tolist())).hexdigest()[:16])
    assert found == [PINNED[name]] * 2


# -- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "line"),
    [
        ({}, "tensor blocks is missing"),
        ({"blocks": torch.zeros(2, 35, dtype=torch.uint8)}, "tensor blocks has shape [2, 35], expected [2, 36]"),
        ({"blocks": torch.zeros(2, 36)}, "tensor blocks is of float32, expected uint8"),
        (
            {"blocks": torch.zeros(2, 36, dtype=torch.uint8), "outlier_index": torch.tensor([3])},
            "tensor outlier_weight is missing",
        ),
        (
            {
                "blocks": torch.zeros(2, 36, dtype=torch.uint8),
                "outlier_index": torch.tensor([64]),
                "outlier_weight": torch.zeros(2, 1),
            },
            "tensor outlier_index names feature 64 of 64",
        ),
    ],
)
def test_damaged_tensors_are_refused(tensors: dict[str, torch.Tensor], line: str) -> None:
    with pytest.raises(AccullmError) as error:
        encoding("Q4_0").from_tensors(tensors, row("Q4_0", 2, 64))
    assert error.value.line() == line


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("Q4_0", {}, ""),
        ("Q4_0", {"bits": 5}, "is to have 5 bits, and Q4_0 has 4"),
        ("Q4_0", {"group_size": 64}, "is to have group size 64, and Q4_0 has 32"),
        ("Q4_0", {"symmetric": False}, "is to have other scales or offsets than Q4_0 has"),
        ("Q4_1", {"symmetric": True}, "is to have other scales or offsets than Q4_1 has"),
        ("Q8_0", {"scale_bits": 6}, "is to have other scales or offsets than Q8_0 has"),
        ("Q4_K", {"in_features": 576}, "has 576 input features, which are no multiple of Q4_K's blocks of 256"),
        ("Q5_1", {"in_features": 80}, "has 80 input features, which are no multiple of Q5_1's blocks of 32"),
    ],
)
def test_what_cannot_be_stored_like_this(name: str, changes: dict[str, object], problem: str) -> None:
    assert encoding(name).problem(replace(row(name, 2, 256), **changes)) == problem  # type: ignore[arg-type]


def test_stochastic_rounding_is_refused() -> None:
    problem = correlated_problem(2, 64, 100, seed=1)
    options = RoundingOptions(method="stochastic")
    with pytest.raises(AccullmError) as error:
        round_linears({"a": problem.weight}, {"a": row("Q4_1", 2, 64)}, options, torch.float32, problem.hessian)
    assert error.value.line() == (
        "a: Q4_1 cannot be rounded at random: its grid need not hold the range of the weights; use another --rounding"
    )


@pytest.mark.parametrize("name", RELATIVE_DAMAGE)
def test_damage_relative_to_integer_codes_is_as_it_is_measured(name: str) -> None:
    kind = BLOCK_TYPES[name]
    weight = torch.randn(32, 512, generator=torch.Generator().manual_seed(3))
    row = LinearPlan("a", 32, 512, kind.bits, kind.group, not kind.has_offset, encoding=name)
    integers = minmax_grid(weight, MEASURED_BITS, 32, symmetric=False)
    expected = (weight - integers.values(integers.round_to_nearest(weight))).square().mean()
    grid, _ = ENCODINGS[name].grid(weight, row, "float16", torch.ones(512))
    change = weight - grid.values(grid.round_to_nearest(weight))
    assert float(change.square().mean() / expected) == pytest.approx(ENCODINGS[name].relative_damage(row), rel=0.05)
