"""Do the kernels compile, and do those that multiply agree with float64? What `accullm doctor` asks."""

from __future__ import annotations

from functools import cache

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.kernels.compile import compile_kernels
from accullm_cli.kernels.launch import GEMV_TOKENS, defines
from accullm_cli.kernels.layout import tile
from accullm_cli.kernels.matmul import FUSED_TOKENS, engine, hybrid_matmul
from accullm_cli.quant.linear import QuantizedLinear

SOURCES = ("hybrid_gemv.cu", "hybrid_gemm.cu", "dequantize.cu")
ROUNDING_SOURCES = ("feedback_round.cu", "descend.cu")
# One for each kernel and each of its sizes.
TOKENS = (1, GEMV_TOKENS, GEMV_TOKENS + 1, FUSED_TOKENS // 2, FUSED_TOKENS, FUSED_TOKENS + 1)


def compile_all(architecture: int) -> int:
    """Compile everything that one architecture runs; how many files that were.

    Raises:
        AccullmError: CuPy or NVRTC is missing, or something does not compile.
    """
    builds = [(source, defines(torch.float16)) for source in SOURCES]
    if architecture >= 80:  # tensor cores before know no bfloat16
        builds += [(source, defines(torch.bfloat16)) for source in SOURCES]
    builds += [(source, ("REAL=float",)) for source in ROUNDING_SOURCES]
    for source, define in builds:
        compile_kernels(source, define, architecture)
    return len(builds)


@cache
def require_agreement(device: torch.device) -> None:
    """Let no model be multiplied by kernels that are wrong on this device; asked once for each.

    Raises:
        AccullmError: a product differs from float64, or the device has no kernels.
    """
    error = largest_disagreement(device)
    if error is not None:
        raise AccullmError(
            f"the CUDA kernels disagree with float64: {error}",
            str(device),
            "run the model on the CPU, and please report this with the output of accullm doctor",
        )


def largest_disagreement(device: torch.device) -> str | None:
    """Multiply by a small linear with every kernel, in whole numbers whose sums no format rounds; None where all agree.

    Raises:
        AccullmError: the device has no kernels.
    """
    draw = torch.Generator().manual_seed(0)
    rows, columns, size, outliers = 200, 456, 128, 5  # no multiples of the tiles, a last short group
    group = torch.arange(columns) // size
    zeros = torch.randint(0, 16, (rows, 4), generator=draw, dtype=torch.uint8)
    codes = torch.randint(0, 16, (rows, columns), generator=draw, dtype=torch.uint8)
    index = torch.randperm(columns, generator=draw)[:outliers].sort().values
    codes[:, index] = zeros[:, group[index]]
    outlier_weight = torch.randint(-4, 5, (rows, outliers), generator=draw).to(torch.float16)
    weight = codes.double() - zeros[:, group].double()
    weight[:, index] = outlier_weight.double()
    linear = QuantizedLinear(
        codes.to(device),
        torch.ones(rows, 4, dtype=torch.float16, device=device),
        zeros.to(device),
        index.to(torch.int32).to(device),
        outlier_weight.to(device),
        bits=4,
        group_size=size,
    )
    tiled = tile(linear, torch.float16)
    for tokens in TOKENS:
        # Few are not 0, so that sums stay below 2048, up to which float16 holds every whole number.
        x = torch.randint(-1, 2, (tokens, columns), generator=draw)
        x *= torch.rand(tokens, columns, generator=draw) < 0.2
        wanted = x.double() @ weight.T
        found = hybrid_matmul(x.to(device, torch.float16), tiled).double().cpu()
        error = float((found - wanted).abs().max())
        if error != 0:
            return f"{engine(tiled, tokens)} with {tokens} tokens is off by {error:g} in whole numbers"
    return None
