"""Where the bits of GGUF's blocks lie: bytes to the numbers that a block is made of, and back.

A row of a tensor is a chain of blocks of 32 weights, or of super-blocks of 256, in one of the layouts below. Every
layout is a few planes: a byte of a plane carries one bit, two, or four of several numbers, of the first `width` numbers
in its lowest bits, of the next `width` above them, and so on; a number of more bits has a plane for the rest. (As in
ggml-common.h and ggml-quants.c of ggml.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

SUPER_BLOCK = 256


@dataclass(frozen=True)
class Half:
    """A float16 for a whole block."""

    of: str
    size = 2

    def read(self, octets: torch.Tensor) -> dict[str, torch.Tensor]:
        return {self.of: octets.contiguous().view(torch.float16)}

    def write(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return parts[self.of].contiguous().view(torch.uint8)


@dataclass(frozen=True)
class Plane:
    """`bits` bits of each number, above `shift` others; `flipped`: the highest bit is the other way round."""

    of: str
    size: int  # bytes of a block
    width: int  # numbers that lie side by side
    bits: int
    shift: int = 0
    flipped: bool = False

    def read(self, octets: torch.Tensor) -> dict[str, torch.Tensor]:
        numbers = octets.unflatten(-1, (-1, 1, self.width)) >> self._places(octets) & (2**self.bits - 1)
        return {self.of: (numbers ^ self._flip) << self.shift}

    def write(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        numbers = (parts[self.of] >> self.shift & (2**self.bits - 1)) ^ self._flip
        numbers = numbers.unflatten(-1, (-1, 8 // self.bits, self.width))
        return (numbers << self._places(numbers)).sum(-2, dtype=torch.uint8).flatten(-2)

    @property
    def _flip(self) -> int:
        return 2 ** (self.bits - 1) if self.flipped else 0

    def _places(self, octets: torch.Tensor) -> torch.Tensor:
        return torch.arange(0, 8, self.bits, dtype=torch.uint8, device=octets.device)[:, None]


@dataclass(frozen=True)
class SixBitPairs:
    """Eight scales and eight minima of 6 bits in 12 bytes.

    Of the first four of either, the 6 bits are the lower ones of bytes 0 to 3 and 4 to 7. Of the last four, the lower 4
    bits are in bytes 8 to 11, scales below minima, and the upper 2 above those of the first four.
    """

    size = 12

    def read(self, octets: torch.Tensor) -> dict[str, torch.Tensor]:
        scales, minima, lower = octets.unflatten(-1, (3, 4)).unbind(-2)
        return {
            "integers": torch.cat([scales & 63, lower & 15 | scales >> 6 << 4], -1),
            "lifts": torch.cat([minima & 63, lower >> 4 | minima >> 6 << 4], -1),
        }

    def write(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        scales, minima = parts["integers"], parts["lifts"]
        first, last = slice(0, 4), slice(4, 8)
        low = [number[..., first] | number[..., last] >> 4 << 6 for number in (scales, minima)]
        return torch.cat([*low, scales[..., last] & 15 | (minima[..., last] & 15) << 4], -1)


@dataclass(frozen=True)
class BlockType:
    """One of ggml's ways to store weights; `name` is what ggml and GGUF call it.

    A weight is point * scale + offset; the point is code - zero, or what a table of levels has for the code. The scale
    is a float16 of the block times an integer, and so is the offset (by its "lift"). In blocks of 32 both integers are
    1, or the offset's is 0 where there is none; in super-blocks every sub-block has its own.

    block, group: weights of a block, and of those that share a scale.
    zero: the code of a point 0; 0 where there is an offset or a table.
    integers, lifts: the smallest and the largest.
    fields: of a block, in their order. Of integers they hold the distance from the smallest, of lifts the negative.
    """

    name: str
    bits: int
    block: int
    group: int
    fields: tuple[Half | Plane | SixBitPairs, ...]
    zero: int = 0
    integers: tuple[int, int] = (1, 1)
    lifts: tuple[int, int] = (0, 0)
    levels: tuple[float, ...] | None = None

    @property
    def bytes_of_block(self) -> int:
        return sum(field.size for field in self.fields)

    @property
    def groups_of_block(self) -> int:
        return self.block // self.group

    @property
    def has_offset(self) -> bool:
        return self.lifts != (0, 0)

    @property
    def is_super(self) -> bool:
        """Every sub-block has integers of its own."""
        return self.integers != (1, 1)

    def integer(self, wanted: torch.Tensor) -> torch.Tensor:
        """The nearest integer that a scale may have; not 0, which nothing can be divided by.

        On a table of levels it may be 0, for weights that all are: no level is, unlike the point of a zero code.
        """
        rounded = wanted.round().clamp_(*self.integers)
        if self.levels is not None:
            return rounded
        least = torch.ones_like(rounded)
        if self.integers[0] < 0:
            least = torch.where(wanted < 0, -least, least)
        return torch.where(rounded == 0, least, rounded)

    def lift(self, wanted: torch.Tensor) -> torch.Tensor:
        """The nearest integer that an offset may have."""
        return wanted.round().clamp_(*self.lifts)


NIBBLES = Plane("codes", 16, 16, 4)
FIFTH_BITS = Plane("codes", 4, 1, 1, shift=4)
NIBBLES_OF_SUPER_BLOCK = Plane("codes", 128, 32, 4)
# 16 levels, closer to each other where most weights are.
FINER_NEAR_ZERO = (
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
)  # fmt: skip
# Of a super-block whose sub-blocks have a minimum.
MINIMA = (-63, 0)
_TYPES = (
    BlockType("Q4_0", 4, 32, 32, (Half("half"), NIBBLES), zero=8),
    BlockType("Q4_1", 4, 32, 32, (Half("half"), Half("half_offset"), NIBBLES), lifts=(1, 1)),
    BlockType("Q5_0", 5, 32, 32, (Half("half"), FIFTH_BITS, NIBBLES), zero=16),
    BlockType("Q5_1", 5, 32, 32, (Half("half"), Half("half_offset"), FIFTH_BITS, NIBBLES), lifts=(1, 1)),
    BlockType("Q8_0", 8, 32, 32, (Half("half"), Plane("codes", 32, 32, 8, flipped=True)), zero=128),
    BlockType(
        "Q3_K", 3, 256, 16,
        (
            Plane("codes", 32, 32, 1, shift=2), Plane("codes", 64, 32, 2),
            Plane("integers", 8, 8, 4), Plane("integers", 4, 4, 2, shift=4), Half("half"),
        ),
        zero=4, integers=(-32, 31),
    ),
    BlockType(
        "Q4_K", 4, 256, 32, (Half("half"), Half("half_offset"), SixBitPairs(), NIBBLES_OF_SUPER_BLOCK),
        integers=(0, 63), lifts=MINIMA,
    ),
    BlockType(
        "Q5_K", 5, 256, 32,
        (
            Half("half"), Half("half_offset"), SixBitPairs(),
            Plane("codes", 32, 32, 1, shift=4), NIBBLES_OF_SUPER_BLOCK,
        ),
        integers=(0, 63), lifts=MINIMA,
    ),
    BlockType(
        "Q6_K", 6, 256, 16,
        (
            Plane("codes", 128, 64, 4), Plane("codes", 64, 32, 2, shift=4),
            Plane("integers", 16, 16, 8, flipped=True), Half("half"),
        ),
        zero=32, integers=(-128, 127),
    ),
    BlockType("IQ4_NL", 4, 32, 32, (Half("half"), NIBBLES), levels=FINER_NEAR_ZERO),
    BlockType(
        "IQ4_XS", 4, 256, 32,
        (
            Half("half"), Plane("integers", 2, 1, 2, shift=4), Plane("integers", 4, 1, 4),
            Plane("codes", 128, 16, 4),
        ),
        integers=(-32, 31), levels=FINER_NEAR_ZERO,
    ),
)  # fmt: skip
BLOCK_TYPES: Mapping[str, BlockType] = {kind.name: kind for kind in _TYPES}


def unpack_blocks(octets: torch.Tensor, kind: BlockType) -> dict[str, torch.Tensor]:
    """What the blocks of some rows are made of.

    Args:
        octets: uint8 [N, bytes of a row].

    Returns:
        codes, uint8 [N, K]; half and (with an offset) half_offset, float16 [N, blocks]; of super-blocks integers and
        lifts as they are stored, uint8 [N, K / group].
    """
    blocks = octets.view(len(octets), -1, kind.bytes_of_block)
    parts: dict[str, torch.Tensor] = {}
    start = 0
    for field in kind.fields:
        for name, numbers in field.read(blocks[..., start : start + field.size]).items():
            own = numbers.flatten(1)
            parts[name] = parts[name] | own if name in parts else own
        start += field.size
    return parts


def pack_blocks(parts: Mapping[str, torch.Tensor], kind: BlockType) -> torch.Tensor:
    """The inverse of `unpack_blocks`."""
    rows, columns = parts["codes"].shape
    blocks = {name: part.view(rows, columns // kind.block, -1) for name, part in parts.items()}
    return torch.cat([field.write(blocks) for field in kind.fields], -1).flatten(1)
