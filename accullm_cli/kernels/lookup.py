"""Looks up the 4-bit codes of 16 bytes in a table of 16 bytes at once, in loops that numba compiles.

CPUs have an instruction for it, which no compiler makes of a loop over `table[code]`: that fetches one byte after the
other, and takes 4.9 ms for those of a weight [4096, 4096] where this takes 0.3. numba knows no vectors, so this step
is written in LLVM's language, as 16 elements of a vector that are picked from another. LLVM makes the instruction of it
(PSHUFB on x86-64, TBL on AArch64), and something slower where a CPU has none.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

OCTETS = 16

_WORD, _BYTES = ir.IntType(32), ir.VectorType(ir.IntType(8), OCTETS)


def _look_up(typing: Any, octets: Any, at: Any, table: Any, low: Any, high: Any) -> Any:
    """For numba: low[at + i] = table[octets[at + i] & 15] and high[at + i] = table[octets[at + i] >> 4], i below 16.

    octets: uint8; table: int8 [16]; low, high: int8; all contiguous, with at + 16 elements or more. at: without a sign.
    """

    def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def vector_at(position: int, place: Any) -> Any:
            array = context.make_array(signature.args[position])(context, builder, arguments[position])
            return builder.bitcast(builder.gep(array.data, [place]), _BYTES.as_pointer())

        def loaded(position: int, place: Any) -> Any:
            value = builder.load(vector_at(position, place))
            value.align = 1
            return value

        pairs, levels = loaded(0, arguments[1]), loaded(2, ir.Constant(ir.IntType(64), 0))
        codes = {
            3: builder.and_(pairs, ir.Constant(_BYTES, [15] * OCTETS)),
            4: builder.lshr(pairs, ir.Constant(_BYTES, [4] * OCTETS)),
        }
        for position, code in codes.items():
            found = ir.Constant(_BYTES, ir.Undefined)
            for i in range(OCTETS):
                place = ir.Constant(_WORD, i)
                level = builder.extract_element(levels, builder.extract_element(code, place))
                found = builder.insert_element(found, level, place)
            builder.store(found, vector_at(position, arguments[1])).align = 1
        return context.get_dummy_value()

    return types.void(octets, at, table, low, high), make


look_up: Any = intrinsic(_look_up)
