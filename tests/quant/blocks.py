"""Rows and blocks of GGUF's encodings for tests."""

from __future__ import annotations

import gguf
import numpy as np
import torch

from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.encodings.ggml import GgmlBlocks
from accullm_cli.quant.encodings.ggml_layout import BLOCK_TYPES, BlockType, Half, pack_blocks, unpack_blocks
from accullm_cli.quant.plan import LinearPlan

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


def levels_of(kind: BlockType) -> list[float]:
    return list(kind.levels) if kind.levels else [code - kind.zero for code in range(2**kind.bits)]
