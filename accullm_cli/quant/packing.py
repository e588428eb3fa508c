"""Dense bit packing, as the artifact stores codes: along the last dimension, least significant bits first."""

from __future__ import annotations

import torch


def packed_length(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take: ceil(count * bits / 8)."""
    return (count * bits + 7) // 8


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes of 1 to 8 bits.

    Args:
        codes: uint8 [..., K], each below 2**bits.
        bits: width of a code.

    Returns:
        uint8 [..., ceil(K * bits / 8)]. Code k occupies bits k*bits to k*bits+bits-1 of the row's bit string,
        least significant first; with 4 bits the low nibble holds the even code. Padding bits are zero.
    """
    if bits == 8:
        return codes.contiguous().clone()
    *lead, count = codes.shape
    if bits == 4:
        # The general path gives the same, with 8 bytes for every code: too many for the matrix of a vocabulary.
        padded = torch.nn.functional.pad(codes, (0, count % 2))
        return (padded[..., ::2] | (padded[..., 1::2] << 4)).contiguous()
    # 8 codes fill exactly `bits` bytes.
    padded = torch.zeros(*lead, (count + 7) // 8 * 8, dtype=torch.int64, device=codes.device)
    padded[..., :count] = codes
    word = (padded.view(*lead, -1, 8) << (torch.arange(8, device=codes.device) * bits)).sum(-1)
    octets = (word[..., None] >> (torch.arange(bits, device=codes.device) * 8)) & 0xFF
    return octets.to(torch.uint8).view(*lead, -1)[..., : packed_length(count, bits)].contiguous()


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse of `pack`: uint8 [..., ceil(count * bits / 8)] to uint8 [..., count]."""
    if bits == 8:
        return packed[..., :count].clone()
    *lead, length = packed.shape
    if bits == 4:
        # The general path gives the same at a tenth of the speed, and every forward pass of a loaded model waits here.
        return torch.stack((packed & 15, packed >> 4), dim=-1).view(*lead, -1)[..., :count].contiguous()
    chunks = (length + bits - 1) // bits
    padded = torch.zeros(*lead, chunks * bits, dtype=torch.int64, device=packed.device)
    padded[..., :length] = packed
    word = (padded.view(*lead, chunks, bits) << (torch.arange(bits, device=packed.device) * 8)).sum(-1)
    codes = (word[..., None] >> (torch.arange(8, device=packed.device) * bits)) & ((1 << bits) - 1)
    return codes.to(torch.uint8).view(*lead, -1)[..., :count].contiguous()
