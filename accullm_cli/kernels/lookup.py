"""Looks up the 4-bit codes of 16 bytes in a table of 16 bytes at once, in loops that numba compiles.

CPUs have an instruction for it, which no compiler makes of a loop over `table[code]`: that fetches one byte after the
other, and takes 4.9 ms for those of a weight [4096, 4096] where this takes 0.3. numba knows no vectors, so this step
is written in LLVM's language, as 16 elements of a vector that are picked from another. LLVM makes the instruction of it
(PSHUFB on x86-64, TBL on AArch64), and something slower where a CPU has none.

Codes of a trellis are looked up in both halves of their table, the even and the odd places, and the lowest bit of the
code above says which of the two it is.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

OCTETS = 16

_WORD, _BYTES = ir.IntType(32), ir.VectorType(ir.IntType(8), OCTETS)


def _each(byte: int) -> Any:
    return ir.Constant(_BYTES, [byte] * OCTETS)


class _Vectors:
    """Loads, look-ups and stores of 16 bytes of the arrays that a function for numba was called with, by position."""

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        self.builder = builder
        self.data = [
            context.make_array(kind)(context, builder, value).data if isinstance(kind, types.Array) else value
            for kind, value in zip(signature.args, arguments, strict=True)
        ]

    def _address(self, position: int, place: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(self.data[position], [place]), _BYTES.as_pointer())

    def loaded(self, position: int, place: Any) -> Any:
        value = self.builder.load(self._address(position, place))
        value.align = 1
        return value

    def levels(self, position: int, first: int) -> Any:
        """16 of a table."""
        return self.loaded(position, ir.Constant(ir.IntType(64), first))

    def stored(self, value: Any, position: int, place: Any) -> None:
        self.builder.store(value, self._address(position, place)).align = 1

    def nibbles(self, pairs: Any) -> tuple[Any, Any]:
        """The low and the high ones."""
        return self.builder.and_(pairs, _each(15)), self.builder.lshr(pairs, _each(4))

    def picked(self, levels: Any, codes: Any) -> Any:
        found = ir.Constant(_BYTES, ir.Undefined)
        for i in range(OCTETS):
            place = ir.Constant(_WORD, i)
            level = self.builder.extract_element(levels, self.builder.extract_element(codes, place))
            found = self.builder.insert_element(found, level, place)
        return found


def _look_up(typing: Any, octets: Any, at: Any, table: Any, low: Any, high: Any) -> Any:
    """For numba: low[at + i] = table[octets[at + i] & 15] and high[at + i] = table[octets[at + i] >> 4], i below 16.

    octets: uint8; table: int8 [16]; low, high: int8; all contiguous, with at + 16 elements or more. at: without a sign.
    """

    def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vectors, at = _Vectors(context, builder, signature, arguments), arguments[1]
        levels = vectors.levels(2, 0)
        for target, codes in enumerate(vectors.nibbles(vectors.loaded(0, at)), start=3):
            vectors.stored(vectors.picked(levels, codes), target, at)
        return context.get_dummy_value()

    return types.void(octets, at, table, low, high), make


def _look_up_trellis(
    typing: Any, octets: Any, above: Any, before: Any, at: Any, table: Any, low: Any, high: Any
) -> Any:
    """As `_look_up`, for codes of a trellis with those of the row above and of the row before that (see quant.trellis).

    above, before: as octets. table: int8 [32], the levels at even places and then those at odd ones.
    """

    def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vectors, at = _Vectors(context, builder, signature, arguments), arguments[3]
        even, odd = vectors.levels(4, 0), vectors.levels(4, OCTETS)
        own, above, before = (vectors.loaded(position, at) for position in range(3))
        places = vectors.nibbles(builder.xor(own, builder.and_(before, _each(0x11))))
        for target, (own_half, bit) in enumerate(zip(places, (0x01, 0x10), strict=True), start=5):
            is_odd = builder.icmp_unsigned("!=", builder.and_(above, _each(bit)), _each(0))
            found = builder.select(is_odd, vectors.picked(odd, own_half), vectors.picked(even, own_half))
            vectors.stored(found, target, at)
        return context.get_dummy_value()

    return types.void(octets, above, before, at, table, low, high), make


look_up: Any = intrinsic(_look_up)
look_up_trellis: Any = intrinsic(_look_up_trellis)
