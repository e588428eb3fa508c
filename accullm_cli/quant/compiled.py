"""Loops as machine code, made by numba and kept beside their file, or in the user's cache directory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numba

# What lets a compiler add up several parts of a sum at once, with fused multiplications; the same program still gives
# the same numbers on the same CPU.
SUMS_IN_ANY_ORDER = frozenset({"reassoc", "contract", "nsz"})


def compiled(function: Callable[..., Any], freedom: frozenset[str] = frozenset(), inlined: bool = False) -> Any:
    """`function` as machine code, kept on disk where there is a place to write to.

    Args:
        freedom: what the compiler may do to its floating-point operations, in LLVM's words.
        inlined: make it part of every compiled function that calls it.
    """
    make = partial(numba.njit, nogil=True, fastmath=set(freedom), forceinline=inlined)
    try:
        return make(cache=True)(function)
    except RuntimeError:  # no directory to keep it in
        return make()(function)
