"""Which kernel computes a product, over which grid and with which arguments: everything but the launch itself.

Nothing here needs a GPU, so that the tests can launch the same kernels on the CPU.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.kernels.layout import STEP_K, STRIP, TiledLinear, magnitudes

# What codes are, as cuda/ptx.cuh counts: steps from a zero point, places in a table, a trellis.
CODES = (0, 1, 2)
WARP = 32
# Up to here tokens fit beside a strip's weights in one warp's registers.
GEMV_TOKENS = 16
GEMV_RING_BYTES = 4 * (512 + 2 * 128)  # RING_BYTES of cuda/hybrid_gemv.cu
GEMM_THREADS = 128
GEMM_FEATURES = 128  # output features of a block
# What one stage of cuda/hybrid_gemm.cu takes: 8 strips of codes, scales and zero points, and 144 bytes per token.
GEMM_STAGE_BYTES = 8 * (512 + 2 * 128)
GEMM_TOKEN_BYTES = 144
GEMM_STAGES = {32: 4, 64: 3, 128: 3}  # by tokens of a block
DEQUANTIZE_THREADS = 256
DEQUANTIZE_BLOCKS = 8  # per multiprocessor, so that the last ones do not run alone
# Warps per multiprocessor that keep its memory requests coming; the kernel's registers admit 32.
WANTED_WARPS = 32
# A part of K below this many tiles per warp costs more to sum up than it saves.
SMALLEST_SHARE = 2


@dataclass(frozen=True)
class Device:
    """What a launch depends on."""

    multiprocessors: int
    shared_bytes: int  # that one block may have


@dataclass(frozen=True)
class Launch:
    """One kernel with its grid and arguments (ctypes values, which point into tensors that the caller keeps alive)."""

    source: str  # file in cuda/
    kernel: str
    defines: tuple[str, ...]  # "NAME=VALUE"
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class ProductPlan:
    """How a product is computed."""

    source: str
    kernel: str
    grid: tuple[int, int, int]  # z: parts of K
    threads: int
    shared_bytes: int

    def partial_shape(self, tokens: int, strips: int) -> tuple[int, int, int]:
        """Of the float32 workspace [splits, M, 16 S]; empty where K is not split."""
        return (self.grid[2] if self.grid[2] > 1 else 0, tokens, strips * STRIP)


class WeightStruct(ctypes.Structure):
    """`Weight` of cuda/layout.cuh."""

    _fields_ = (
        ("tiles", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("outlier_tiles", ctypes.c_void_p),
        ("outlier_index", ctypes.c_void_p),
        ("levels", ctypes.c_uint8 * 16),
        ("out_features", ctypes.c_int),
        ("in_features", ctypes.c_int),
        ("tiles_k", ctypes.c_int),
        ("groups", ctypes.c_int),
        ("group_shift", ctypes.c_int),
        ("symmetric_zero", ctypes.c_int),
        ("outlier_steps", ctypes.c_int),
    )


class ProductStruct(ctypes.Structure):
    """`Product` of cuda/pieces.cuh."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("partial", ctypes.c_void_p),
        ("arrived", ctypes.c_void_p),
        ("x_stride", ctypes.c_uint64),
        ("tokens", ctypes.c_int),
    )


def plan_product(tiled: TiledLinear, tokens: int, device: Device) -> ProductPlan:
    """The kernel for M = `tokens` and its grid.

    Raises:
        AccullmError: `tokens` is 0, or no block of the kernel fits the device's shared memory.
    """
    if tokens < 1:
        raise AccullmError("no CUDA kernel for 0 tokens")
    return _plan_gemv(tiled, tokens, device) if tokens <= GEMV_TOKENS else _plan_gemm(tiled, tokens, device)


def _plan_gemv(tiled: TiledLinear, tokens: int, device: Device) -> ProductPlan:
    strips, tiles = tiled.tiles.shape[:2]
    steps = tiled.outlier_tiles.shape[1]
    outlier_bytes = 2 * tokens * steps * STEP_K

    def shared_bytes(warps: int) -> int:
        return warps * GEMV_RING_BYTES + outlier_bytes

    fitting = [warps for warps in (16, 8, 4) if shared_bytes(warps) <= device.shared_bytes]
    if not fitting:
        raise AccullmError(
            f"no CUDA kernel for {tokens} tokens and {steps * STEP_K} outlier features in {device.shared_bytes} bytes "
            "of shared memory"
        )
    wanted = WANTED_WARPS * device.multiprocessors
    # The fewest warps per block that fill the device, and no more than there are tiles for.
    warps = next((warps for warps in reversed(fitting) if strips * warps >= wanted), fitting[0])
    while warps > 4 and warps * SMALLEST_SHARE > tiles + steps:
        warps //= 2
    most = max(1, (tiles + steps) // (warps * SMALLEST_SHARE))
    splits = min(max(1, wanted // (2 * strips * warps)), most)
    kernel = "hybrid_gemv_8" if tokens <= 8 else "hybrid_gemv_16"
    return ProductPlan("hybrid_gemv.cu", kernel, (strips, 1, splits), warps * WARP, shared_bytes(warps))


def _plan_gemm(tiled: TiledLinear, tokens: int, device: Device) -> ProductPlan:
    strips, tiles = tiled.tiles.shape[:2]
    steps = tiled.outlier_tiles.shape[1]

    def shared_bytes(block_tokens: int) -> int:
        stage = GEMM_STAGE_BYTES + block_tokens * GEMM_TOKEN_BYTES
        return GEMM_STAGES[block_tokens] * stage + block_tokens * GEMM_TOKEN_BYTES

    fitting = [size for size in GEMM_STAGES if shared_bytes(size) <= device.shared_bytes]
    if not fitting:
        raise AccullmError(f"no CUDA kernel for {tokens} tokens in {device.shared_bytes} bytes of shared memory")
    block_tokens = next((size for size in fitting if size >= tokens), fitting[-1])
    columns, rows = -(-strips * STRIP // GEMM_FEATURES), -(-tokens // block_tokens)
    splits = 1
    # There is a counter per strip, and so for 8 blocks of tokens at most.
    if rows <= GEMM_FEATURES // STRIP and columns * rows <= strips:
        splits = max(1, min(2 * device.multiprocessors // (columns * rows), (tiles + steps) // (2 * SMALLEST_SHARE)))
    kernel = f"hybrid_gemm_{block_tokens}"
    return ProductPlan("hybrid_gemm.cu", kernel, (columns, rows, splits), GEMM_THREADS, shared_bytes(block_tokens))


def product_launch(
    plan: ProductPlan,
    x: torch.Tensor,
    tiled: TiledLinear,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    partial: torch.Tensor | None,
    arrived: torch.Tensor | None,
) -> Launch:
    """The launch that writes x W^T + bias into y.

    Args:
        x: [M, K] in the compute dtype, rows at multiples of 8 numbers from each other, zeros between K and those.
        y: [M, N].
        partial: float32 of `plan.partial_shape`; None where K is not split.
        arrived: int32 [S], zeros, for this launch alone; None where K is not split.
    """
    product = ProductStruct(
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        None if partial is None else partial.data_ptr(),
        None if arrived is None else arrived.data_ptr(),
        x.stride(0),
        x.shape[0],
    )
    arguments = (weight_struct(tiled), product)
    return Launch(plan.source, plan.kernel, defines_of(tiled), plan.grid, plan.threads, plan.shared_bytes, arguments)


def dequantize_launch(tiled: TiledLinear, weight: torch.Tensor, device: Device) -> Launch:
    """The launch that writes the weight that `tiled` stands for, with outliers, into `weight` [N, K] in its dtype."""
    strips, tiles = tiled.tiles.shape[:2]
    parts = min(tiles, max(1, DEQUANTIZE_BLOCKS * device.multiprocessors // strips))
    arguments = (weight_struct(tiled), ctypes.c_void_p(weight.data_ptr()))
    grid = (strips, parts, 1)
    return Launch("dequantize.cu", "dequantize_tiles", defines_of(tiled), grid, DEQUANTIZE_THREADS, 0, arguments)


def weight_struct(tiled: TiledLinear) -> WeightStruct:
    """The kernels' view of a linear, whose tensors the caller keeps alive."""
    return WeightStruct(
        tiled.tiles.data_ptr(),
        tiled.scales.data_ptr(),
        None if tiled.zeros is None else tiled.zeros.data_ptr(),
        tiled.outlier_tiles.data_ptr(),
        tiled.outlier_index.data_ptr(),
        (ctypes.c_uint8 * 16)(*(() if tiled.levels is None else magnitudes(tiled.levels, tiled.bits))),
        tiled.out_features,
        tiled.in_features,
        tiled.tiles.shape[1],
        tiled.scales.shape[1],
        tiled.group_shift,
        2 ** (tiled.bits - 1),
        tiled.outlier_tiles.shape[1],
    )


def defines_of(tiled: TiledLinear) -> tuple[str, ...]:
    """What makes a kernel's source multiply by such a linear."""
    return defines(tiled.dtype, (tiled.levels is not None) + tiled.is_trellis)


def defines(dtype: torch.dtype, levels: int) -> tuple[str, ...]:
    """What makes a kernel's source compute in `dtype`; levels: one of `CODES`."""
    return (f"COMPUTE_BF16={int(dtype == torch.bfloat16)}", f"LEVELS={levels}")
