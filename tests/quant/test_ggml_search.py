"""The search for scales and offsets of GGUF's blocks, against brute force."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from accullm_cli.quant.encodings.ggml_grid import BlockGrid
from accullm_cli.quant.encodings.ggml_layout import BLOCK_TYPES
from tests.quant.blocks import NAMES, SUPER, draw, encoding, levels_of, row


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
