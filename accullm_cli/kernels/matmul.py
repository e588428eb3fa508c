"""Multiplication by a quantized linear: by a kernel of the GPU or the CPU where one serves, else dequantization."""

from __future__ import annotations

import importlib.util

import torch
from torch.nn.functional import linear as dense_product

from accullm_cli.errors import AccullmError
from accullm_cli.kernels.compile import HOW_TO_INSTALL, OLDEST_ARCHITECTURE
from accullm_cli.kernels.launch import GEMV_TOKENS, dequantize_launch, plan_product, product_launch
from accullm_cli.kernels.layout import TiledLinear, why_not_tiled
from accullm_cli.kernels.packed import PackedLinear, needs_gradient, packed_product
from accullm_cli.quant.linear import QuantizedLinear

# What computes a product, for people.
ENGINE = "torch: dequantize, then multiply"
PACKED_ENGINE = "CPU: packed 4-bit"
GEMV_ENGINE = "CUDA: hybrid_gemv"
GEMM_ENGINE = "CUDA: hybrid_gemm"
DENSE_ENGINE = "CUDA: dequantize_tiles, then torch"
# From here on 4-bit weights save no time (a product of more tokens is bound by arithmetic), and torch's dense product
# runs nearer to the tensor cores' limit than mma.sync does. Not measured on a GPU: docs/kernels.md.
FUSED_TOKENS = 128


Operand = QuantizedLinear | TiledLinear | PackedLinear


def hybrid_matmul(x: torch.Tensor, linear: Operand, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ W^T + bias, with W the dequantized weight rounded once to x's dtype.

    Args:
        x: [..., K], on the device of `linear`: float32, float16 or bfloat16; where `linear` is tiled or packed, its
            dtype.
        linear: weight [N, K]. Tiled, it is multiplied by the CUDA kernels, in torch's current stream. Packed, it is
            multiplied on the CPU as it is stored. Where a gradient is to flow through the product, forwards or
            backwards, the weight is dequantized and torch multiplies.
        bias: [N] in x's dtype.

    Returns:
        [..., N] in x's dtype.

    Raises:
        AccullmError: a tiled linear that is not on a GPU, or a GPU without kernels; x of another dtype than the linear
            was tiled or packed for.
    """
    if isinstance(linear, QuantizedLinear):
        return dense_product(x, linear.dequantize(x.dtype), bias)
    if isinstance(linear, PackedLinear):
        return packed_product(x, linear, bias)
    return _tiled_matmul(x, linear, bias)


def engine(linear: Operand, tokens: int) -> str:
    """What `hybrid_matmul` computes a product of so many tokens with."""
    if isinstance(linear, QuantizedLinear):
        return ENGINE
    if isinstance(linear, PackedLinear):
        return PACKED_ENGINE
    if tokens <= GEMV_TOKENS:
        return GEMV_ENGINE
    return GEMM_ENGINE if tokens <= FUSED_TOKENS else DENSE_ENGINE


def why_no_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the CUDA kernels cannot run on `device` in `dtype`; None where they can."""
    if device.type != "cuda":
        return f"device {device}: the kernels need a GPU of NVIDIA"
    if torch.version.hip is not None:
        return "this torch is built for ROCm: the kernels need a GPU of NVIDIA"
    reason = _why_no_cupy(device)
    if reason is not None:
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < OLDEST_ARCHITECTURE:
        return f"compute capability {major}.{minor}: the kernels need 7.5 or newer"
    if dtype == torch.bfloat16 and major < 8:
        return f"compute capability {major}.{minor} multiplies no bfloat16: load the model in float16"
    return None


def _why_no_cupy(device: torch.device) -> str | None:
    """Why CuPy cannot be used there; None where it can."""
    if importlib.util.find_spec("cupy") is None:
        return f"CuPy is missing: {HOW_TO_INSTALL}"
    from accullm_cli.kernels.device import describe

    try:
        describe(device.index or 0)
    except (ImportError, RuntimeError) as error:  # a package for another CUDA: CuPy's errors are RuntimeErrors
        return f"CuPy cannot use it ({str(error).strip().partition(chr(10))[0]}): {HOW_TO_INSTALL}"
    return None


def _tiled_matmul(x: torch.Tensor, tiled: TiledLinear, bias: torch.Tensor | None) -> torch.Tensor:
    from accullm_cli.kernels.device import describe, launch

    if x.dtype != tiled.dtype:
        raise AccullmError(f"activations are {x.dtype}, but the linear was tiled for {tiled.dtype}")
    reason = why_no_kernels(x.device, x.dtype) or why_not_tiled(tiled.bits, tiled.group_size, tiled.dtype)
    if reason is not None:
        raise AccullmError(f"no CUDA kernel for {reason}")
    shape = (*x.shape[:-1], tiled.out_features)
    rows = aligned_rows(x)
    tokens = len(rows)
    if tokens == 0:
        return x.new_empty(shape)
    device = describe(x.get_device())
    if tokens > FUSED_TOKENS or needs_gradient(x, bias):
        weight = torch.empty(tiled.out_features, tiled.in_features, dtype=x.dtype, device=x.device)
        launch(dequantize_launch(tiled, weight, device), x.device)
        return dense_product(x, weight, bias)
    plan = plan_product(tiled, tokens, device)
    y = x.new_empty(tokens, tiled.out_features)
    partial = arrived = None
    if plan.grid[2] > 1:
        strips = len(tiled.tiles)
        partial = torch.empty(plan.partial_shape(tokens, strips), dtype=torch.float32, device=x.device)
        # Anew for each launch: one that was aborted leaves counts behind.
        arrived = torch.zeros(strips, dtype=torch.int32, device=x.device)
    bias = None if bias is None else bias.contiguous()
    launch(product_launch(plan, rows, tiled, bias, y, partial, arrived), x.device)
    return y.view(shape)


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] as [M, K], copied only where a row does not start at a multiple of 16 bytes.

    A copy holds zeros between K and the next multiple of 8.
    """
    columns = x.shape[-1]
    rows = x.reshape(-1, columns)
    if columns % 8 == 0 and rows.stride(1) == 1 and rows.stride(0) % 8 == 0 and rows.data_ptr() % 16 == 0:
        return rows
    padded = rows.new_zeros(len(rows), -(-columns // 8) * 8)
    padded[:, :columns] = rows
    return padded[:, :columns]
