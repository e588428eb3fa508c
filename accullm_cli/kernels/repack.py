"""Launches of cuda/repack.cu: codes to tiles and back, and tiles to a 16-bit weight."""

from __future__ import annotations

import ctypes

import torch

from accullm_cli.kernels.launch import Device, Launch, defines, weight_struct
from accullm_cli.kernels.layout import TiledLinear

THREADS = 256
# A block of the dequantization per multiprocessor and this many more, so that the last ones do not run alone.
BLOCKS_PER_MULTIPROCESSOR = 8


def pack_launch(codes: torch.Tensor, tiles: torch.Tensor) -> Launch:
    """Writes codes (uint8 [N, K], below 16) into tiles (uint8 [S, T, 32, 16])."""
    return _per_word("pack_tiles", (codes, tiles), codes, tiles)


def unpack_launch(tiles: torch.Tensor, codes: torch.Tensor) -> Launch:
    """Writes the codes of tiles (uint8 [S, T, 32, 16]) into `codes` (uint8 [N, K])."""
    return _per_word("unpack_tiles", (tiles, codes), codes, tiles)


def dequantize_launch(tiled: TiledLinear, weight: torch.Tensor, device: Device) -> Launch:
    """Writes the weight that `tiled` stands for, outlier features included, into `weight` [N, K] in its dtype."""
    strips, tiles = tiled.tiles.shape[:2]
    parts = min(tiles, max(1, BLOCKS_PER_MULTIPROCESSOR * device.multiprocessors // strips))
    arguments = (weight_struct(tiled), ctypes.c_void_p(weight.data_ptr()))
    return Launch("repack.cu", "dequantize_tiles", defines(tiled.dtype), (strips, parts, 1), THREADS, 0, arguments)


def _per_word(kernel: str, order: tuple[torch.Tensor, ...], codes: torch.Tensor, tiles: torch.Tensor) -> Launch:
    words = tiles.numel() // 4
    arguments = (
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in order),
        ctypes.c_int(codes.shape[0]),
        ctypes.c_int(codes.shape[1]),
        ctypes.c_int(tiles.shape[1]),
        ctypes.c_uint64(words),
    )
    grid = (-(-words // THREADS), 1, 1)
    return Launch("repack.cu", kernel, defines(torch.float16), grid, THREADS, 0, arguments)
