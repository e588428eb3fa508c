"""Groups with a scale alone, whose codes are a trellis: value = levels[place] * scale (see quant.trellis).

A table is its own mirror image and has 0 twice, so that either half of it (the even and the odd places) has one, and
is the other's negative: 15 numbers say all of that of 4 bits.
"""

from __future__ import annotations

from collections.abc import Mapping

# By bits: the levels above 0, of 8 bits.
ABOVE: Mapping[int, tuple[int, ...]] = {
    2: (32, 70, 127),
    3: (15, 31, 48, 66, 92, 109, 127),
    4: (7, 11, 16, 21, 27, 32, 38, 44, 50, 57, 65, 75, 87, 102, 127),
    5: tuple(4 * place + 7 for place in range(31)),
}


def trellis_levels(bits: int) -> tuple[int, ...]:
    """The table of 2**(bits + 1) levels, ascending; places 2**bits - 1 and 2**bits are 0."""
    above = ABOVE[bits]
    return (*(-level for level in above[::-1]), 0, 0, *above)
