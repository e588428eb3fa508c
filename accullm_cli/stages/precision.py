"""How matrix products are computed: as fast as this CPU can, and in float32 unless rounding is allowed.

PyTorch leaves products of float32 matrices to its BLAS, unless it is told that their elements may be rounded to
bfloat16: then oneDNN computes them. On CPUs with AMX it does round; on others with AVX-512 it does not, and takes half
as long as a BLAS that does not use the CPU's full width. Which of the two it is, is measured. Among the others are some
that have instructions for products of bfloat16 (AVX512_BF16), for which matrices are rounded here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Precision = Literal["bfloat16", "float32"]
# Relative errors of a product of 256 x 256 x 256: about 3e-7 in float32, 2e-3 with elements rounded to bfloat16.
ROUNDED = 1e-5


def usual_precision() -> Precision:
    """Of the products of calibrate and quantize on this machine, where nobody asks for another."""
    return "bfloat16" if onednn_rounds() or _multiplies_bfloat16() else "float32"


@contextmanager
def products(precision: Precision) -> Iterator[None]:
    """Compute the products of float32 matrices with at least this precision, and as fast as that allows."""
    with ExitStack() as stack:
        if _has_onednn() and not (precision == "float32" and onednn_rounds()):
            stack.enter_context(_onednn())
        if precision == "bfloat16" and not onednn_rounds() and _multiplies_bfloat16():
            stack.enter_context(Bfloat16Products())
        yield


class Bfloat16Products(TorchFunctionMode):
    """While active, linears and the sums of Gram matrices multiply elements rounded to bfloat16.

    The CPU adds up in float32; a product is rounded to bfloat16 once more, and then float32 again. Attention is left
    as it is.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is nn.functional.linear and not kwargs and args[0].dtype == torch.float32:
            x, weight, bias = (*args, None)[:3]
            return func(x.bfloat16(), weight.bfloat16(), None if bias is None else bias.bfloat16()).float()
        if func is torch.Tensor.addmm_ and not kwargs and args[0].dtype == torch.float32:
            total, left, right = args
            return total.add_(left.bfloat16() @ right.bfloat16())
        return func(*args, **(kwargs or {}))


@lru_cache(maxsize=1)
def onednn_rounds() -> bool:
    """Whether oneDNN, told that it may, rounds the elements of float32 matrices to bfloat16."""
    if not _has_onednn():
        return False
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    with _onednn():
        error = (left @ right).double() - exact
    return float(error.norm() / exact.norm()) > ROUNDED


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16, and torch says so (2.10 and later)."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16"))


def _has_onednn() -> bool:
    """Whether this torch lets products of float32 matrices be told (2.9 and later)."""
    return hasattr(torch.backends.mkldnn, "matmul")


@contextmanager
def _onednn() -> Iterator[None]:
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined, unused-ignore]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
