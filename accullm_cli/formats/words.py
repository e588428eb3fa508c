"""Words of 32 bits, in which other programs' formats hold packed codes. Bytes are as on disk: the lowest first."""

from __future__ import annotations

import torch


def to_words(octets: torch.Tensor) -> torch.Tensor:
    """uint8 [R, B] to int32 [R, ceil(B/4)], the first byte lowest, filled up with zeros."""
    padded = torch.nn.functional.pad(octets, (0, -octets.shape[1] % 4))
    # In one dimension: torch counts a single row as contiguous whatever its stride, and then cannot view it.
    return padded.flatten().view(torch.int32).view(len(octets), -1)


def to_octets(words: torch.Tensor) -> torch.Tensor:
    """The inverse: int32 or uint32 [R, W] to uint8 [R, 4*W]."""
    return words.flatten().view(torch.uint8).view(len(words), -1)


def word_count(count: int, bits: int) -> int:
    """Words that `count` codes of `bits` bits take: ceil(count * bits / 32)."""
    return (count * bits + 31) // 32
