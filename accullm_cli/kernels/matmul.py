"""Multiplication by a quantized linear."""

from __future__ import annotations

import torch

from accullm_cli.quant.linear import QuantizedLinear

# What computes the product, for people.
ENGINE = "torch: dequantize, then multiply"


def hybrid_matmul(x: torch.Tensor, linear: QuantizedLinear, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ W^T + bias, with W the dequantized weight rounded once to x's dtype.

    Args:
        x: [..., K], float32, float16 or bfloat16, on the device of `linear`.
        linear: weight [N, K].
        bias: [N] in x's dtype.

    Returns:
        [..., N] in x's dtype.
    """
    return torch.nn.functional.linear(x, linear.dequantize(x.dtype), bias)
