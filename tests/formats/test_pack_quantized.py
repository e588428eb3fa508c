"""The bytes of pack-quantized linears: by hand, and held against the package whose format it is."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accullm_cli.errors import AccullmError
from accullm_cli.formats.pack_quantized import decode, encode, joined, linear_schema, split, stored_bytes
from accullm_cli.quant.linear import QuantizedLinear
from accullm_cli.quant.plan import LinearPlan
from tests.artifacts import quantize_nearest

package = pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")

from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor  # noqa: E402
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402

WIDTHS = range(2, 9)
Variant = tuple[int, int, bool]
VARIANTS = [(bits, group, symmetric) for bits in WIDTHS for group in (32, -1) for symmetric in (True, False)]


def linear_of(shape: tuple[int, int], bits: int, group_size: int, symmetric: bool) -> QuantizedLinear:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    return quantize_nearest(weight, bits, group_size, symmetric)


def scheme_of(bits: int, group_size: int, symmetric: bool) -> QuantizationScheme:
    args = QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=symmetric,
        strategy="channel" if group_size == -1 else "group",
        group_size=None if group_size == -1 else group_size,
    )
    return QuantizationScheme(targets=["Linear"], weights=args)


# -- by hand -------------------------------------------------------------------------------------------------


def tiny(bits: int, codes: list[list[int]], zeros: list[list[int]]) -> QuantizedLinear:
    return QuantizedLinear(
        codes=torch.tensor(codes, dtype=torch.uint8),
        scales=torch.ones(len(codes), len(zeros[0]), dtype=torch.float16),
        zeros=torch.tensor(zeros, dtype=torch.uint8),
        outlier_index=torch.zeros(0, dtype=torch.int32),
        outlier_weight=torch.zeros(len(codes), 0),
        bits=bits,
        group_size=-1,
    )


def test_four_bits_fill_words_from_the_lowest_nibble() -> None:
    """Nine codes: eight in the first word, whose topmost bit is its sign, and one in the second."""
    tensors = encode(tiny(4, [[1, 2, 3, 4, 5, 6, 7, 15, 9]], [[11]]), torch.float32, "here")
    assert tensors["weight_packed"].tolist() == [[0xF7654321 - 2**32, 0x9]]
    assert tensors["weight_zero_point"].tolist() == [[11]]
    assert tensors["weight_shape"].tolist() == [1, 9]


def test_three_bits_go_on_from_one_word_to_the_next() -> None:
    """Code 10 has two bits at the end of the first word and one at the beginning of the second."""
    codes = [0] * 10 + [0b101, 0b110]
    (words,) = encode(tiny(3, [codes], [[0]]), torch.float32, "here")["weight_packed"].tolist()
    assert words == [0b01 << 30, 0b1 | 0b110 << 1]


def test_zero_points_are_packed_along_the_outputs() -> None:
    """Six outputs of one group at six bits: 36 bits, in two words below each other."""
    tensors = encode(tiny(6, [[0]] * 6, [[1], [2], [3], [4], [5], [63]]), torch.float32, "here")
    bits = sum(zero << 6 * row for row, zero in enumerate((1, 2, 3, 4, 5, 63)))
    assert tensors["weight_zero_point"].tolist() == [[bits % 2**32 - 2**32], [bits >> 32]]


# -- against the package -------------------------------------------------------------------------------------

# 70 input features and 21 rows fill neither bytes nor words, at any width.
SHAPES = [(48, 96), (21, 70)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_zero_points_pack_as_the_package_does(shape: tuple[int, int], variant: Variant) -> None:
    bits, group_size, symmetric = variant
    linear = linear_of(shape, bits, -1 if shape[1] % 32 else group_size, symmetric)
    tensors = encode(linear, torch.float16, "here")
    middle = 2 ** (bits - 1)
    signed = (linear.codes.int() - middle).to(torch.int8)
    assert torch.equal(tensors["weight_packed"], pack_to_int32(signed, bits))
    assert tensors["weight_shape"].tolist() == list(shape)
    if symmetric:
        assert "weight_zero_point" not in tensors
    else:
        assert linear.zeros is not None
        zeros = (linear.zeros.int() - middle).to(torch.int8)
        assert torch.equal(tensors["weight_zero_point"], pack_to_int32(zeros, bits, packed_dim=0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_package_decompresses_to_our_weights(variant: Variant, dtype: torch.dtype) -> None:
    linear = linear_of((48, 96), *variant)
    found = PackedQuantizationCompressor.decompress(encode(linear, dtype, "here"), scheme_of(*variant))
    assert found["weight"].dtype == dtype
    assert torch.equal(found["weight"], linear.dequantize(dtype))


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(list(WIDTHS)),
    rows=st.integers(1, 40),
    groups=st.integers(1, 4),
    size=st.integers(1, 45),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_reads_back_and_as_the_package_reads_it(
    bits: int, rows: int, groups: int, size: int, symmetric: bool, seed: int
) -> None:
    weight = torch.randn(rows, groups * size, generator=torch.Generator().manual_seed(seed))
    linear = quantize_nearest(weight, bits, size, symmetric)
    tensors = encode(linear, torch.float32, "here")
    row = LinearPlan("p", rows, groups * size, bits, size, symmetric)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} == {
        name.removeprefix("p."): (entry.dtype, entry.shape) for name, entry in linear_schema(row, torch.float32).items()
    }
    assert sum(tensor.nbytes for tensor in tensors.values()) == stored_bytes(row, torch.float32)
    found = decode(tensors, row)
    assert torch.equal(found.codes, linear.codes)
    assert torch.equal(found.scales, linear.scales)
    assert (found.zeros is None) == symmetric
    if not symmetric:
        assert torch.equal(found.zeros, linear.zeros)
    theirs = PackedQuantizationCompressor.decompress(tensors, scheme_of(bits, size, symmetric))
    assert torch.equal(theirs["weight"], linear.dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_taken_apart_are_joined_again(symmetric: bool) -> None:
    linear = linear_of((22, 96), 5, 32, symmetric)
    parts = split(linear, 2)
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), linear.dequantize())
    row = LinearPlan("p", 11, 96, 5, 32, symmetric)
    back = joined([decode(encode(part, torch.bfloat16, "here"), row) for part in parts])
    assert torch.equal(back.codes, linear.codes)
    assert torch.equal(back.dequantize(), linear.dequantize())


# -- scales --------------------------------------------------------------------------------------------------


def test_scales_that_float16_holds_are_read_as_such() -> None:
    linear = linear_of((21, 96), 4, 32, True)
    row = LinearPlan("p", 21, 96, 4, 32, True)
    assert decode(encode(linear, torch.bfloat16, "here"), row).scales.dtype == torch.float16


def test_scales_that_float16_does_not_hold_keep_their_dtype() -> None:
    linear = linear_of((21, 96), 4, 32, True)
    row = LinearPlan("p", 21, 96, 4, 32, True)
    tensors = encode(linear, torch.bfloat16, "here")
    tensors["weight_scale"] = tensors["weight_scale"] * 2.0**-30
    assert torch.equal(decode(tensors, row).dequantize(), linear.dequantize() * 2.0**-30)


def test_a_scale_that_bfloat16_does_not_hold_is_refused() -> None:
    linear = linear_of((48, 96), 4, 32, True)
    linear = dataclasses.replace(linear, scales=linear.scales * (1 + 2**-10))
    with pytest.raises(AccullmError) as error:
        encode(linear, torch.bfloat16, "model.layers.0")
    assert error.value.line() == (
        "model.layers.0: a scale is not exactly representable in bfloat16; run profile again for this format"
    )
