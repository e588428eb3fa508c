"""How matrix products are computed: as fast as this CPU can, and in float32 unless rounding is allowed.

PyTorch leaves products of float32 matrices to its BLAS, unless it is told that their elements may be rounded to
bfloat16: then oneDNN computes them. On CPUs with AMX it does round; on others with AVX-512 it does not, and takes half
as long as a BLAS that does not use the CPU's full width. Which of the two it is, is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal

import torch

from accullm_cli.stages.job import Job

Precision = Literal["bfloat16", "float32"]
# Relative errors of a product of 256 x 256 x 256: about 3e-7 in float32, 2e-3 with elements rounded to bfloat16.
ROUNDED = 1e-5


def precision_of(job: Job) -> Precision:
    """Of the products of calibrate and quantize on this machine."""
    return "bfloat16" if job.config.machine.precision == "auto" and onednn_rounds() else "float32"


@contextmanager
def products(precision: Precision) -> Iterator[None]:
    """Compute the products of float32 matrices with at least this precision, and as fast as that allows."""
    if not _has_onednn() or (precision == "float32" and onednn_rounds()):
        yield
    else:
        with _onednn():
            yield


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
