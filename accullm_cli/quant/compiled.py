"""Loops as machine code, made by numba and kept beside their file, or in the user's cache directory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numba
import torch

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


def share_out(loop: Callable[..., None], count: int, together: int | None, *arguments: Any) -> None:
    """Run `loop` over rows, so many `together` on one of torch's threads; None: all of them, which feed each other."""
    if together is None or count <= together or torch.get_num_threads() == 1:
        loop(0, count, *arguments)
        return

    def some(first: int) -> None:
        loop(first, min(first + together, count), *arguments)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(some, range(0, count, together)))
