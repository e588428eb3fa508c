"""Packing against a bit string built bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accullm_cli.quant.packing import pack, packed_length, unpack


def pack_bit_by_bit(codes: list[int], bits: int) -> list[int]:
    """Bit j of code k is bit k*bits + j of the string; bit b of the string is bit b % 8 of byte b // 8."""
    octets = [0] * ((len(codes) * bits + 7) // 8)
    for k, code in enumerate(codes):
        for j in range(bits):
            at = k * bits + j
            octets[at // 8] |= (code >> j & 1) << at % 8
    return octets


@st.composite
def code_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    bits = draw(st.integers(1, 8))
    shape = (*draw(st.lists(st.integers(1, 3), max_size=2)), draw(st.integers(1, 40)))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8), bits


@settings(deadline=None)
@given(code_tensors())
def test_unpacking_gives_back_what_was_packed(case):
    codes, bits = case
    packed = pack(codes, bits)
    assert packed.shape == (*codes.shape[:-1], packed_length(codes.shape[-1], bits))
    assert packed.dtype == torch.uint8
    unpacked = unpack(packed, bits, codes.shape[-1])
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes)


@settings(deadline=None)
@given(code_tensors())
def test_layout_is_that_of_the_bit_string(case):
    codes, bits = case
    expected = [pack_bit_by_bit(row, bits) for row in codes.view(-1, codes.shape[-1]).tolist()]
    assert pack(codes, bits).view(len(expected), -1).tolist() == expected


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("count", [1, 3, 5, 7, 9, 17])
def test_padding_bits_are_zero(bits, count):
    packed = pack(torch.full((2, count), 2**bits - 1, dtype=torch.uint8), bits)
    used = (count * bits - 1) % 8 + 1
    assert packed[:, -1].tolist() == [2**used - 1] * 2


def test_four_bits_put_the_even_code_into_the_low_nibble():
    assert pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x03]]


def test_three_bits_run_across_bytes():
    # 5 | 6 << 3 | 7 << 6 = 0b1_1111_0101
    assert pack(torch.tensor([5, 6, 7], dtype=torch.uint8), 3).tolist() == [0b11110101, 0b1]


@pytest.mark.parametrize("bits", [4, 8])
def test_the_result_is_a_copy_of_its_own(bits):
    codes = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)
    packed = pack(codes, bits)
    unpacked = unpack(packed, bits, 2)
    codes.zero_()
    packed_before = packed.clone()
    unpacked.zero_()
    assert torch.equal(packed, packed_before)
    assert unpack(packed, bits, 2).tolist() == [[1, 2], [3, 4]]


def test_columns_that_are_not_contiguous_are_packed():
    codes = torch.arange(16, dtype=torch.uint8).view(4, 4).T
    for bits in (4, 8):
        assert torch.equal(pack(codes, bits), pack(codes.contiguous(), bits))
        assert pack(codes, bits).is_contiguous()
