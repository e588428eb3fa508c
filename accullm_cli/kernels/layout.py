"""The order in which the CUDA kernels read a quantized linear: made once when a layer is loaded, and undone exactly.

cuda/layout.cuh draws it and says why it is so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.quant.linear import QuantizedLinear, check_outlier_index, is_trellis
from accullm_cli.quant.trellis import SEGMENT

STRIP = 16  # output features of a tile
TILE_K = 64  # input features of a tile
STEP_K = 16  # outlier features of a step
# A lane's 16 input features must lie in one group.
SMALLEST_GROUP = 16
ONE_GROUP_SHIFT = 31  # k >> 31 is 0: a row's only group
COMPUTE_DTYPES = (torch.float16, torch.bfloat16)
# The codes from here on are those of the levels above 0; the ones before are those of 0 and of the levels below it.
ABOVE_ZERO = 8


@dataclass(frozen=True)
class TiledLinear:
    """A quantized linear [N, K] for the kernels: S = ceil(N / 16) strips, T = ceil(K / 64) tiles, G groups, O steps."""

    tiles: torch.Tensor  # uint8 [S, T, 32, 16]: by lane
    scales: torch.Tensor  # float16 [S, G, 8, 2]
    zeros: torch.Tensor | None  # uint8 [S, G, 8], two nibbles each; None where symmetric
    outlier_tiles: torch.Tensor  # compute dtype [S, O, 32, 8]: by lane
    outlier_index: torch.Tensor  # int32 [O * 16], -1 where unused
    out_features: int
    in_features: int
    outliers: int
    bits: int
    group_size: int  # -1: one group per row
    levels: tuple[int, ...] | None = None  # of the linear, whose codes have another order in the tiles

    @property
    def dtype(self) -> torch.dtype:
        """What activations must be."""
        return self.outlier_tiles.dtype

    @property
    def is_trellis(self) -> bool:
        return is_trellis(self.levels, self.bits)

    @property
    def group_shift(self) -> int:
        return ONE_GROUP_SHIFT if self.group_size == -1 else self.group_size.bit_length() - 1

    @property
    def stored_bytes(self) -> int:
        """Bytes that a product reads, activations aside."""
        parts = (self.tiles, self.scales, self.zeros, self.outlier_tiles, self.outlier_index)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


def why_not_tiled(bits: int, group_size: int, dtype: torch.dtype, levels: tuple[int, ...] | None = None) -> str | None:
    """Why the kernels cannot multiply by such a linear; None where they can."""
    if bits > 4:
        return f"{bits} bits: the kernels read codes of at most 4 bits"
    if is_trellis(levels, bits):
        if levels != tuple(-level for level in reversed(levels or ())):
            return "a trellis whose levels are no mirror image: the kernels know signs and magnitudes"
    elif levels is not None and not len(levels) - ABOVE_ZERO <= levels.index(0) + 1 <= ABOVE_ZERO:
        return f"levels whose 0 is number {levels.index(0)}: the kernels know at most 7 below it and 8 above"
    power_of_two = group_size > 0 and group_size & (group_size - 1) == 0
    if group_size != -1 and not (power_of_two and group_size >= SMALLEST_GROUP):
        return f"group size {group_size}: the kernels know powers of two from {SMALLEST_GROUP} on, and -1"
    if dtype not in COMPUTE_DTYPES:
        return f"{dtype} activations: the kernels compute in float16 or bfloat16"
    return None


def tile(linear: QuantizedLinear, dtype: torch.dtype) -> TiledLinear:
    """Re-order a linear, on the device it is on.

    Args:
        dtype: float16 or bfloat16, that of the activations; outlier weights are rounded to it.

    Raises:
        AccullmError: more than 4 bits, a group size that is no power of two or below 16, another dtype, or more than 8
            levels on one side of 0; outlier features that do not exist, at whose place the kernels would read.
    """
    reason = why_not_tiled(linear.bits, linear.group_size, dtype, linear.levels)
    if reason is not None:
        raise AccullmError(f"no CUDA kernel for {reason}")
    rows, columns = linear.codes.shape
    check_outlier_index(linear.outlier_index, columns)
    strips, tiles = -(-rows // STRIP), -(-columns // TILE_K)
    groups = 1 if linear.group_size == -1 else -(-tiles * TILE_K // linear.group_size)
    # A feature's place is strip, row, half | tile, t, step, pair, element: the names of cuda/layout.cuh.
    if linear.is_trellis:
        codes = _padded(_chained(linear.codes, linear.bits), strips * STRIP, tiles * TILE_K)
        codes = codes.view(strips, 8, 2, tiles, 4, 2, 4, 2)  # of two steps; bytes
        nibbles = (codes[..., 0] | codes[..., 1] << 4).permute(0, 3, 1, 4, 5, 2, 6)
    else:
        ordered = linear.codes if linear.levels is None else _from_zero(linear.codes, linear.levels)
        codes = _padded(ordered, strips * STRIP, tiles * TILE_K).view(strips, 8, 2, tiles, 4, 4, 2, 2)
        nibbles = (codes[:, :, 0] | codes[:, :, 1] << 4).transpose(1, 2)
        if linear.levels is None:
            nibbles = nibbles.transpose(-1, -2)
    zeros = None
    if linear.zeros is not None:
        by_half = _padded(linear.zeros, strips * STRIP, groups).view(strips, 8, 2, groups)
        zeros = (by_half[:, :, 0] | by_half[:, :, 1] << 4).transpose(1, 2).contiguous()
    scales = _padded(linear.scales, strips * STRIP, groups).view(strips, 8, 2, groups)
    steps = -(-len(linear.outlier_index) // STEP_K)
    outliers = _padded(linear.outlier_weight.to(dtype), strips * STRIP, steps * STEP_K)
    index = torch.full((steps * STEP_K,), -1, dtype=torch.int32, device=linear.codes.device)
    index[: len(linear.outlier_index)] = linear.outlier_index
    return TiledLinear(
        tiles=nibbles.reshape(strips, tiles, 32, 16),
        scales=scales.permute(0, 3, 1, 2).contiguous(),
        zeros=zeros,
        outlier_tiles=outliers.view(strips, 8, 2, steps, 4, 2, 2)
        .permute(0, 3, 1, 4, 5, 2, 6)
        .reshape(strips, steps, 32, 8),
        outlier_index=index,
        out_features=rows,
        in_features=columns,
        outliers=len(linear.outlier_index),
        bits=linear.bits,
        group_size=linear.group_size,
        levels=linear.levels,
    )


def untile(tiled: TiledLinear, rows: torch.Tensor | None = None) -> QuantizedLinear:
    """The linear that was re-ordered, its outlier weights in the compute dtype.

    Args:
        rows: int64 [R], output features; all of them where it is None.
    """
    strips, tiles = tiled.tiles.shape[:2]
    steps, device = tiled.outlier_tiles.shape[1], tiled.tiles.device
    rows = torch.arange(tiled.out_features, device=device) if rows is None else rows
    strip, row, half = rows // STRIP, rows % STRIP // 2, rows % 2
    groups = 1 if tiled.group_size == -1 else -(-tiled.in_features // tiled.group_size)
    shift = (4 * half[:, None]).to(torch.uint8)  # of a row's nibbles in the bytes that it shares with another
    if tiled.is_trellis:
        codes = _places(tiled, rows)
    else:
        codes = tiled.tiles.view(strips, tiles, 8, 4, 4, 2, 2)[strip, :, row]
        if tiled.levels is None:
            codes = codes.transpose(-1, -2)
        codes = codes.reshape(len(rows), tiles * TILE_K)[:, : tiled.in_features] >> shift & 15
        codes = codes.contiguous() if tiled.levels is None else _from_first(codes, tiled.levels)
    # [R, steps, t, pair, half, element]
    outliers = tiled.outlier_tiles.view(strips, steps, 8, 4, 2, 2, 2)[strip, :, row]
    outliers = outliers[torch.arange(len(rows), device=device), ..., half, :].reshape(len(rows), steps * STEP_K)
    count = tiled.outliers
    return QuantizedLinear(
        codes=codes,
        scales=tiled.scales[strip, :, row, half][:, :groups].contiguous(),
        zeros=None if tiled.zeros is None else (tiled.zeros[strip, :, row][:, :groups] >> shift & 15).contiguous(),
        outlier_index=tiled.outlier_index[:count].clone(),
        outlier_weight=outliers[:, :count].contiguous(),
        bits=tiled.bits,
        group_size=tiled.group_size,
        levels=tiled.levels,
    )


def magnitudes(levels: Sequence[int], bits: int) -> tuple[int, ...]:
    """Of the level of each of 16 codes of a tile, or of what a trellis looks up; 0 where there is none."""
    if is_trellis(levels, bits):
        above = levels[len(levels) // 2 :]
        return tuple(above[number] if number < len(above) else 0 for number in map(_number, range(16)))
    zero = levels.index(0)
    below, above = [-level for level in levels[zero::-1]], levels[zero + 1 :]
    return (*below, *[0] * (ABOVE_ZERO - len(below)), *above, *[0] * (ABOVE_ZERO - len(above)))


def _from_zero(codes: torch.Tensor, levels: tuple[int, ...]) -> torch.Tensor:
    """Codes in the order of a tile: 0 is the level 0, as padding is; see `ABOVE_ZERO`."""
    zero = levels.index(0)
    return torch.where(codes > zero, codes + (ABOVE_ZERO - 1 - zero), zero - codes)


def _from_first(codes: torch.Tensor, levels: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `_from_zero`."""
    zero = levels.index(0)
    return torch.where(codes >= ABOVE_ZERO, codes - (ABOVE_ZERO - 1 - zero), zero - codes)


Bits = TypeVar("Bits", int, torch.Tensor)


def _number(looked_up: Bits) -> Bits:
    """The number of the magnitude that is looked up by a nibble: see cuda/layout.cuh."""
    lowest = looked_up >> 2 & 1
    return (looked_up & 3) << 2 | (looked_up >> 3 ^ lowest) << 1 | lowest


def _chained(places: torch.Tensor, bits: int) -> torch.Tensor:
    """The nibbles of a trellis, uint8 [N, K], in the order of features: see cuda/layout.cuh."""
    zero = 2**bits
    number = torch.where(places < zero, zero - 1 - places, places - zero)
    looked_up = number >> 2 | (number & 1) << 2 | ((number ^ number >> 1) & 1) << 3
    rows = torch.nn.functional.pad(looked_up, (0, 0, 0, -len(places) % SEGMENT)).unflatten(0, (-1, SEGMENT))
    # Each nibble, ^ the two above it, is what is looked up. So, ^ the third above it, it is that ^ the one above that.
    nibbles = rows.clone()
    nibbles[:, 1:] ^= rows[:, :-1]
    distance = 3
    while distance < SEGMENT:
        nibbles[:, distance:] ^= nibbles[:, :-distance].clone()
        distance *= 2
    return nibbles.flatten(0, 1)[: len(places)]


def _places(tiled: TiledLinear, rows: torch.Tensor) -> torch.Tensor:
    """The inverse of `_chained`, of some rows, int64 [R]."""
    strips, tiles = tiled.tiles.shape[:2]
    octets = tiled.tiles.view(strips, tiles, 8, 4, 2, 2, 4)

    def nibbles(above: int) -> torch.Tensor:
        own = (rows - above).clamp(min=0)
        found = octets[own // STRIP, :, own % STRIP // 2, :, :, own % 2]
        found = torch.stack((found & 15, found >> 4), -1).reshape(len(rows), tiles * TILE_K)[:, : tiled.in_features]
        return found * (rows % SEGMENT >= above)[:, None]

    above = nibbles(1)
    looked_up = nibbles(0) ^ above ^ nibbles(2)
    number, zero = _number(looked_up), 2**tiled.bits
    return torch.where((looked_up >> 2 ^ above >> 3) & 1 == 1, zero - 1 - number, zero + number)


def _padded(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """`matrix` in the upper left corner of [rows, columns] zeros."""
    padded = matrix.new_zeros(rows, columns)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded
