"""GGUF's blocks, against the package of their authors bit for bit."""

from __future__ import annotations

import itertools

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accullm_cli.quant.encodings.ggml_layout import BLOCK_TYPES
from tests.quant.blocks import NAMES, NO_OUTLIERS, assert_read_alike, draw, encoding, levels_of, row, with_halves


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
