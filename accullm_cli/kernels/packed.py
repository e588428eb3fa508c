"""Products of few tokens by 4-bit weights on a CPU, from the codes as they are stored, compiled by numba.

A weight of 4 bits is an eighth of one in float32, and a product of few tokens waits for its weights. So a row's codes
are turned into weights where they are multiplied, and no weight is written to memory:

    byte j of a row     low nibble: feature 2 j      high nibble: feature 2 j + 1
    x                   its even and its odd features apart, so that a loop over bytes reads neighbours

A weight is (code - zero) * scale, or level * scale: of at most 18 significant bits, so exact in float32. For bfloat16
activations it is rounded to bfloat16 by its bits, as IEEE 754 rounds to the nearest, ties to even. Sums are float32, in
an order that the compiler chooses for the CPU, and y is rounded once.

Levels are looked up first, a row of them (`kernels.lookup`), a byte each, which the nearest cache holds. Those of a
trellis hang on the codes of the two rows above as well, which are read where they are stored.

One token has a loop of its own. More go through in fours, the last four filled up with zeros: these share the work on
the codes, and take twice as long as one (1.4 and 2.7 ms for a weight [4096, 4096] in groups of 64, one thread).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch.autograd import forward_ad

from accullm_cli.errors import AccullmError
from accullm_cli.kernels.lookup import OCTETS, look_up, look_up_trellis
from accullm_cli.quant.compiled import SUMS_IN_ANY_ORDER, compiled
from accullm_cli.quant.linear import QuantizedLinear, is_trellis
from accullm_cli.quant.packing import unpack
from accullm_cli.quant.trellis import SEGMENT, places_of_codes

PACKED_BITS = 4
PACKED_DTYPES = (torch.float32, torch.bfloat16)
# The largest number of tokens measured for which every product is faster so than by dequantizing the weight and torch's
# dense product. At 64 those of small weights are not; docs/kernels.md has the measurement.
PACKED_TOKENS = 16
# Tokens that share the work on the codes, in `_four_tokens`.
TOGETHER = 4
# Weights times tokens for which a second thread saves more than it costs to start (some 0.1 ms).
WORTH_A_THREAD = 1 << 20


@dataclass(frozen=True)
class PackedLinear:
    """A quantized linear [N, K] for products on a CPU: G groups, n outlier features."""

    codes: torch.Tensor  # uint8 [N, ceil(K / 2)], as stored
    scales: torch.Tensor  # float32 [N, G]
    zeros: torch.Tensor | None  # uint8 [N, G]; None where codes are places in a table
    outlier_index: torch.Tensor  # int64 [n]
    outlier_weight: torch.Tensor  # float32 [N, n], rounded to the compute dtype
    dtype: torch.dtype  # what activations must be
    in_features: int
    group_size: int  # -1: one group per row
    levels: tuple[int, ...] | None = None  # that table, 16 numbers; 32 of a trellis

    @property
    def stored_bytes(self) -> int:
        """Bytes that a product reads, activations aside."""
        parts = (self.codes, self.scales, self.zeros, self.outlier_index, self.outlier_weight)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def unpacked(self) -> QuantizedLinear:
        """The linear, its outlier weights rounded to the compute dtype."""
        codes = unpack(self.codes, PACKED_BITS, self.in_features)
        return QuantizedLinear(
            codes=places_of_codes(codes) if is_trellis(self.levels, PACKED_BITS) else codes,
            scales=self.scales.half(),  # they come from there
            zeros=self.zeros,
            outlier_index=self.outlier_index,
            outlier_weight=self.outlier_weight,
            bits=PACKED_BITS,
            group_size=self.group_size,
            levels=self.levels,
        )


def why_not_packed(bits: int, group_size: int, dtype: torch.dtype) -> str | None:
    """Why products on a CPU cannot read such a linear as it is stored; None where they can."""
    if bits != PACKED_BITS:
        return f"{bits} bits: products on a CPU read codes of {PACKED_BITS} bits"
    if group_size != -1 and group_size % 2:
        return f"group size {group_size}: products on a CPU read two codes at once, so it must be even or -1"
    if dtype not in PACKED_DTYPES:
        return f"{dtype} activations: products on a CPU compute in float32 or bfloat16"
    return None


def is_worth_packing(x: torch.Tensor) -> bool:
    """Whether x [..., K] is on the CPU, and of so few tokens that they are multiplied fastest so.

    Not while torch compiles or exports a model: it can look into its own operations alone.
    """
    few = x.numel() <= PACKED_TOKENS * x.shape[-1]
    return x.device.type == "cpu" and few and not torch.compiler.is_compiling()


def needs_gradient(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether a gradient is to flow through a product, backwards or (a tangent) forwards."""
    parts = [part for part in (x, bias) if part is not None]
    backwards = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
    return backwards or any(forward_ad.unpack_dual(part).tangent is not None for part in parts)


def pack_linear(
    tensors: Mapping[str, torch.Tensor],
    in_features: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    levels: tuple[int, ...] | None = None,
) -> PackedLinear:
    """A linear for products on a CPU.

    Args:
        tensors: of the native format, by suffix (`QuantizedLinear.to_tensors`), on the CPU. The codes are shared.
        dtype: float32 or bfloat16, that of the activations; outlier weights are rounded to it.
        levels: see `QuantizedLinear`.

    Raises:
        AccullmError: another width than 4 bits, an odd group size, another dtype, or tensors that do not fit.
    """
    reason = why_not_packed(bits, group_size, dtype)
    if reason is not None:
        raise AccullmError(f"no product on a CPU for {reason}")
    linear = QuantizedLinear.from_tensors(tensors, in_features, bits, group_size, levels)
    zeros = linear.zeros
    if zeros is None and levels is None:
        zeros = torch.full(linear.scales.shape, 2 ** (bits - 1), dtype=torch.uint8)
    return PackedLinear(
        codes=tensors["qweight"].contiguous(),
        scales=linear.scales.float().contiguous(),
        zeros=None if zeros is None else zeros.contiguous(),
        outlier_index=linear.outlier_index.long(),
        outlier_weight=linear.outlier_weight.to(dtype).float(),
        dtype=dtype,
        in_features=in_features,
        group_size=group_size,
        levels=levels,
    )


def packed_product(x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] W^T + bias: [..., N] in x's dtype, rounded once; where a gradient flows, from the dequantized weight.

    Raises:
        AccullmError: x is of another dtype than `packed` is for, or not on the CPU.
    """
    if x.dtype != packed.dtype or x.device.type != "cpu":
        raise AccullmError(f"activations are {x.dtype} on {x.device}, but the linear was packed for {packed.dtype}")
    if needs_gradient(x, bias):
        return torch.nn.functional.linear(x, packed.unpacked().dequantize(x.dtype), bias)
    rows = x.detach().reshape(-1, packed.in_features).float()
    tokens, features = len(rows), len(packed.codes)
    padded = tokens if tokens == 1 else -(-tokens // TOGETHER) * TOGETHER
    pairs = torch.nn.functional.pad(rows, (0, packed.in_features % 2, 0, padded - tokens)).unflatten(1, (-1, 2))
    even, odd = pairs[..., 0].contiguous(), pairs[..., 1].contiguous()
    y = torch.empty(padded, features)
    half = packed.codes.shape[1] if packed.group_size == -1 else packed.group_size // 2
    kernels, origin = (_one_token, _four_tokens), packed.zeros
    if origin is None:
        kernels, origin = (_one_token_of_levels, _four_tokens_of_levels), torch.tensor(packed.levels, dtype=torch.int8)
        if is_trellis(packed.levels, PACKED_BITS):
            origin = origin.view(-1, 2).T.flatten()  # those at even places first
    arrays = [tensor.numpy() for tensor in (packed.codes, packed.scales, origin, even, odd, y)]
    kernel = kernels[0 if padded == 1 else 1]
    rounds = packed.dtype == torch.bfloat16

    def work(first: int, last: int) -> None:
        octets = packed.codes.shape[1]
        room = [np.empty((2, octets), np.int8), np.zeros(octets, np.uint8), SEGMENT]
        kernel(*arrays, *([] if packed.levels is None else room), half, rounds, first, last)

    _in_threads(work, features, packed.codes.numel() * padded)
    y = y[:tokens]
    if len(packed.outlier_index):
        y += rows[:, packed.outlier_index] @ packed.outlier_weight.T
    if bias is not None:
        y += bias.detach().float()
    return y.to(x.dtype).view(*x.shape[:-1], features)


def _in_threads(work: Callable[[int, int], None], rows: int, multiplications: int) -> None:
    """`work(first, last)` for parts of the rows, the last of them in this thread and each other in one of its own."""
    threads = max(1, min(torch.get_num_threads(), multiplications // WORTH_A_THREAD))
    bounds = [rows * part // threads for part in range(threads + 1)]
    if threads == 1:
        work(*bounds)
        return
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(work, first, last) for first, last in pairwise(bounds[:-1])]
        work(*bounds[-2:])
        for other in others:
            other.result()


# -- machine code ----------------------------------------------------------------------------------------------------

_LOW_NIBBLE, _HIGH_NIBBLE, _LOWEST_BITS = np.uint8(15), np.uint8(4), np.uint8(0x11)
# bfloat16 is the upper half of float32. Half a unit, less one where the last bit is even, carries what is above it.
_HALF_BITS, _ONE, _BELOW_HALF, _UPPER = np.uint32(16), np.uint32(1), np.uint32(0x7FFF), np.uint32(0xFFFF0000)

# Indices without a sign: of another the compiler asks whether it counts from the end, and then handles one weight at a
# time instead of eight.
_INDEX = np.uintp

fast = partial(compiled, freedom=SUMS_IN_ANY_ORDER)
# Not inlined, a group costs a call with three arrays: seven times its work.
inlined = partial(fast, inlined=True)


@inlined
def _weight(code, zero, scale, to_bfloat16):  # type: ignore[no-untyped-def]
    value = np.float32(np.float32(np.int32(np.int32(code) - zero)) * scale)
    if to_bfloat16:
        bits = value.view(np.uint32)
        bits = np.uint32(np.uint32(bits + _BELOW_HALF + ((bits >> _HALF_BITS) & _ONE)) & _UPPER)
        return bits.view(np.float32)
    return value


@inlined
def _group_by_one(codes, zero, scale, to_bfloat16, even, odd):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for j in range(codes.shape[0]):
        pair = codes[j]
        total += _weight(pair & _LOW_NIBBLE, zero, scale, to_bfloat16) * even[j]
        total += _weight(pair >> _HIGH_NIBBLE, zero, scale, to_bfloat16) * odd[j]
    return total


@fast
def _one_token(codes, scales, zeros, even, odd, y, half, to_bfloat16, first, last):  # type: ignore[no-untyped-def]
    """The rows first to last of y [1, N]; half: bytes in a group of a row."""
    octets = codes.shape[1]
    for n in range(first, last):
        total = np.float32(0)
        for g in range(scales.shape[1]):
            begin, end = g * half, min(g * half + half, octets)
            zero, scale = np.int32(zeros[n, g]), scales[n, g]
            total += _group_by_one(codes[n, begin:end], zero, scale, to_bfloat16, even[0, begin:end], odd[0, begin:end])
        y[0, n] = total


@fast
def _four_tokens(codes, scales, zeros, even, odd, y, half, to_bfloat16, first, last):  # type: ignore[no-untyped-def]
    """As `_one_token`, for y [M, N], M a multiple of 4: their sums share the work on the codes."""
    octets = codes.shape[1]
    for n in range(first, last):
        for quad in range(y.shape[0] // 4):
            a = _INDEX(4 * quad)
            b, c, d = a + _INDEX(1), a + _INDEX(2), a + _INDEX(3)
            sum_a = sum_b = sum_c = sum_d = np.float32(0)
            for g in range(scales.shape[1]):
                begin = g * half
                scale, zero = scales[n, g], np.int32(zeros[n, g])
                for offset in range(min(half, octets - begin)):
                    j = _INDEX(begin) + _INDEX(offset)
                    pair = codes[n, j]
                    low = _weight(pair & _LOW_NIBBLE, zero, scale, to_bfloat16)
                    high = _weight(pair >> _HIGH_NIBBLE, zero, scale, to_bfloat16)
                    sum_a += low * even[a, j] + high * odd[a, j]
                    sum_b += low * even[b, j] + high * odd[b, j]
                    sum_c += low * even[c, j] + high * odd[c, j]
                    sum_d += low * even[d, j] + high * odd[d, j]
            y[a, n], y[b, n], y[c, n], y[d, n] = sum_a, sum_b, sum_c, sum_d


@fast
def _look_up_row(codes, n, nothing, segment, table, low, high):  # type: ignore[no-untyped-def]
    row = codes[n]
    whole = row.shape[0] // OCTETS
    if table.shape[0] == 16:
        for part in range(whole):
            look_up(row, _INDEX(part * OCTETS), table, low, high)
        for j in range(whole * OCTETS, row.shape[0]):
            low[j] = table[row[j] & _LOW_NIBBLE]
            high[j] = table[row[j] >> _HIGH_NIBBLE]
        return
    above = codes[n - 1] if n % segment > 0 else nothing
    before = codes[n - 2] if n % segment > 1 else nothing
    for part in range(whole):
        look_up_trellis(row, above, before, _INDEX(part * OCTETS), table, low, high)
    for j in range(whole * OCTETS, row.shape[0]):
        places = row[j] ^ (before[j] & _LOWEST_BITS)
        odd = above[j] & _LOWEST_BITS
        low[j] = table[(odd & _LOW_NIBBLE) << _HIGH_NIBBLE | places & _LOW_NIBBLE]
        high[j] = table[odd & ~_LOW_NIBBLE | places >> _HIGH_NIBBLE]


@inlined
def _levels_by_one(low, high, scale, to_bfloat16, even, odd):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for j in range(low.shape[0]):
        total += _weight(low[j], np.int32(0), scale, to_bfloat16) * even[j]
        total += _weight(high[j], np.int32(0), scale, to_bfloat16) * odd[j]
    return total


@fast
def _one_token_of_levels(codes, scales, table, even, odd, y, room, nothing, segment, half, to_bfloat16, first, last):  # type: ignore[no-untyped-def]
    """As `_one_token`.

    table: int8 [16], what the codes stand for; of a trellis [32], the levels at even places and then those at odd ones.
    room: int8 [2, octets], for the levels of a row. nothing: uint8 [octets], zeros, above a chain. segment: its rows.
    """
    octets = codes.shape[1]
    low, high = room[0], room[1]
    for n in range(first, last):
        _look_up_row(codes, n, nothing, segment, table, low, high)
        total = np.float32(0)
        for g in range(scales.shape[1]):
            start, stop = g * half, min(g * half + half, octets)
            x, z = even[0, start:stop], odd[0, start:stop]
            total += _levels_by_one(low[start:stop], high[start:stop], scales[n, g], to_bfloat16, x, z)
        y[0, n] = total


@fast
def _four_tokens_of_levels(codes, scales, table, even, odd, y, room, nothing, segment, half, to_bfloat16, first, last):  # type: ignore[no-untyped-def]
    """As `_four_tokens`, and the levels of a row are looked up once for all tokens."""
    octets = codes.shape[1]
    low_levels, high_levels = room[0], room[1]
    for n in range(first, last):
        _look_up_row(codes, n, nothing, segment, table, low_levels, high_levels)
        for quad in range(y.shape[0] // 4):
            a = _INDEX(4 * quad)
            b, c, d = a + _INDEX(1), a + _INDEX(2), a + _INDEX(3)
            sum_a = sum_b = sum_c = sum_d = np.float32(0)
            for g in range(scales.shape[1]):
                scale = scales[n, g]
                for place in range(g * half, min(g * half + half, octets)):
                    j = _INDEX(place)
                    low = _weight(low_levels[j], np.int32(0), scale, to_bfloat16)
                    high = _weight(high_levels[j], np.int32(0), scale, to_bfloat16)
                    sum_a += low * even[a, j] + high * odd[a, j]
                    sum_b += low * even[b, j] + high * odd[b, j]
                    sum_c += low * even[c, j] + high * odd[c, j]
                    sum_d += low * even[d, j] + high * odd[d, j]
            y[a, n], y[b, n], y[c, n], y[d, n] = sum_a, sum_b, sum_c, sum_d
