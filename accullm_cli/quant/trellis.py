"""Trellis codes: each of k bits stands for one of 2**(k+1) levels, of which the codes above it say half.

Trellis coded quantization (Marcellin and Fischer, IEEE Transactions on Communications 38, 1990; for weights of language
models QTIP, arXiv 2406.11235) with Ungerboeck's code of four states. Down the rows of a column, with u_n the lowest
bit of code c_n, weight n has the level of number

    place_n = 2 (c_n XOR u_(n-2)) + u_(n-1),

so that its own code chooses among the even or the odd levels, whichever u_(n-1) says, and u_n is free to say what the
next two weights choose from. Of all sequences of codes that of least error is found by Viterbi's algorithm. The
levels are as close as those of one bit more, at no cost in bits; what is left of that gain, as half of them may be
chosen each time, `encodings.trellis` has as it was measured. A weight hangs on three codes alone, so that any part of a
matrix is decoded without what lies before.

Chains begin again every SEGMENT rows, with u = 0 above the first one.
"""

from __future__ import annotations

import torch

# A shorter chain loses more at its beginning, where little is free: of normal weights' squared error 3.4% with 32 rows,
# 0.4% with 256.
SEGMENT = 256


def codes_of_places(places: torch.Tensor) -> torch.Tensor:
    """The codes of a chain's levels.

    Args:
        places: uint8 [N, K], as `places_of_codes` gives them; row 0 begins a segment.

    Returns:
        uint8 [N, K], each below half of what the places are below.
    """
    own = places >> 1
    # u_n = place bit 1 of n XOR u_(n-2): the parity of that bit over every second row up to n.
    bits = _segments(own & 1)
    bits = torch.stack([bits[:, row::2].cumsum(1, dtype=torch.int32) & 1 for row in (0, 1)], 2)
    bits = bits.to(torch.uint8).flatten(0, 2)[: len(places)]
    return own ^ _above(bits, 2)


def places_of_codes(codes: torch.Tensor) -> torch.Tensor:
    """The levels' numbers, uint8 [N, K], of codes uint8 [N, K]; row 0 begins a segment."""
    bits = codes & 1
    return (codes ^ _above(bits, 2)) << 1 | _above(bits, 1)


def is_chain(places: torch.Tensor) -> bool:
    """Whether there are codes for these places, uint8 [N, K]."""
    return torch.equal(places_of_codes(codes_of_places(places)), places)


def _segments(rows: torch.Tensor) -> torch.Tensor:
    """[N, K] as [segments, SEGMENT, K], filled up with zeros."""
    return torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % SEGMENT)).unflatten(0, (-1, SEGMENT))


def _above(bits: torch.Tensor, count: int) -> torch.Tensor:
    """For each row of [N, K] the one `count` rows above it in its segment; 0 where there is none."""
    segments = _segments(bits)
    moved = torch.nn.functional.pad(segments, (0, 0, count, 0))[:, :SEGMENT]
    return moved.flatten(0, 1)[: len(bits)]
