"""How matrix products are computed: as fast as the machine can, and in float32 unless rounding is allowed.

PyTorch leaves products of float32 matrices to its BLAS, unless it is told that their elements may be rounded to
bfloat16: then oneDNN computes them. On CPUs with AMX it does round; on others with AVX-512 it does not, and takes half
as long as a BLAS that does not use the CPU's full width. Which of the two it is, is measured. Among the others are some
that have instructions for products of bfloat16 (AVX512_BF16), for which matrices are rounded here.

GPUs multiply float32 matrices on their tensor cores, several times as fast, where elements may be rounded to TF32: that
is eight times as exact as bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Precision = Literal["bfloat16", "tf32", "float32"]
# Relative errors of a product of 256 x 256 x 256: about 3e-7 in float32, 2e-3 with elements rounded to bfloat16.
ROUNDED = 1e-5
# Of as many rows a Gram matrix stays positive semidefinite but for a hundredth of its mean where it is rounded to
# bfloat16. That of one row of 1024 features lacks 0.4 to 0.8 of it, and of more features the whole: an expert that few
# tokens reach could not be rounded at any damping.
ENOUGH_ROWS = 128


def usual_precision(device: torch.device) -> Precision:
    """Of the products of calibrate and quantize on this machine, where nobody asks for another."""
    if device.type == "cuda":
        return "tf32"
    return "bfloat16" if onednn_rounds() or _multiplies_bfloat16() else "float32"


@contextmanager
def products(precision: Precision, device: torch.device | None = None) -> Iterator[None]:
    """Compute the products of float32 matrices with at least this precision, and as fast as that allows.

    Args:
        device: where; by default on the CPU.
    """
    with ExitStack() as stack:
        if device is not None and device.type == "cuda":
            stack.enter_context(_tensor_cores(precision != "float32"))
        elif _has_onednn() and not (precision == "float32" and onednn_rounds()):
            stack.enter_context(_onednn())
        if precision == "bfloat16" and not onednn_rounds() and _multiplies_bfloat16():  # never asked of a GPU
            stack.enter_context(Bfloat16Products())
        yield


class Bfloat16Products(TorchFunctionMode):
    """While active, linears and the sums of Gram matrices multiply elements rounded to bfloat16.

    The CPU adds up in float32; a product is rounded to bfloat16 once more, and then float32 again. Attention is left
    as it is, and so are sums over few rows.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is nn.functional.linear and not kwargs and args[0].dtype == torch.float32:
            x, weight, bias = (*args, None)[:3]
            return func(x.bfloat16(), weight.bfloat16(), None if bias is None else bias.bfloat16()).float()
        if func is torch.Tensor.addmm_ and not kwargs and args[0].dtype == torch.float32:
            total, left, right = args
            if left.shape[1] >= ENOUGH_ROWS:
                return total.add_(left.bfloat16() @ right.bfloat16())
        return func(*args, **(kwargs or {}))


@contextmanager
def _tensor_cores(rounding: bool) -> Iterator[None]:
    """Have a GPU round the elements of float32 matrices to TF32, or not: convolutions do, unless they are told."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    places: list[tuple[Any, str, Any]] = [(matmul, "allow_tf32", rounding), (cudnn, "allow_tf32", rounding)]
    if hasattr(torch.backends, "fp32_precision"):  # 2.9 and later, which want one of the two ways
        wanted = "tf32" if rounding else "ieee"
        places = [(matmul, "fp32_precision", wanted), (cudnn.conv, "fp32_precision", wanted)]
    before = [getattr(where, name) for where, name, _ in places]
    for where, name, value in places:
        setattr(where, name, value)
    try:
        yield
    finally:
        for (where, name, _), value in zip(places, before, strict=True):
            setattr(where, name, value)


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
