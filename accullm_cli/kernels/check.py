"""Do the kernels compile, and do those that multiply agree with float64? What `accullm doctor` asks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.kernels.compile import compile_kernels
from accullm_cli.kernels.launch import CODES, GEMV_TOKENS, defines
from accullm_cli.kernels.layout import tile
from accullm_cli.kernels.matmul import FUSED_TOKENS, engine, hybrid_matmul
from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.linear import QuantizedLinear, zero_place
from accullm_cli.quant.plan import LinearPlan

SOURCES = ("hybrid_gemv.cu", "hybrid_gemm.cu", "dequantize.cu")
ROUNDING_SOURCES = ("feedback_round.cu", "descend.cu", "trellis.cu")
# One for each kernel and each of its sizes.
TOKENS = (1, GEMV_TOKENS, GEMV_TOKENS + 1, FUSED_TOKENS // 2, FUSED_TOKENS, FUSED_TOKENS + 1)


def compile_all(architecture: int) -> int:
    """Compile everything that one architecture runs; how many files that were.

    Raises:
        AccullmError: CuPy or NVRTC is missing, or something does not compile.
    """
    dtypes = (torch.float16, torch.bfloat16) if architecture >= 80 else (torch.float16,)  # tensor cores before know one
    builds = [(source, defines(*what)) for source in SOURCES for what in product(dtypes, CODES)]
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
    """Multiply by small linears with every kernel, in whole numbers whose sums no format rounds; None where all agree.

    Raises:
        AccullmError: the device has no kernels.
    """
    draw = torch.Generator().manual_seed(0)
    for what, linear, weight, share in _linears(draw):
        tiled = tile(linear.to(device), torch.float16)
        for tokens in TOKENS:
            x = torch.randint(-1, 2, (tokens, weight.shape[1]), generator=draw)
            x *= torch.rand(x.shape, generator=draw) < share
            wanted = x.double() @ weight.T
            found = hybrid_matmul(x.to(device, torch.float16), tiled).double().cpu()
            error = float((found - wanted).abs().max())
            if error != 0:
                return f"{engine(tiled, tokens)} with {tokens} tokens is off by {error:g} in whole numbers{what}"
    return None


def _linears(draw: torch.Generator) -> Iterator[tuple[str, QuantizedLinear, torch.Tensor, float]]:
    """Three linears, of steps, of levels and of a trellis, with their weights in float64.

    And the share of activations that may be other than 0, so that sums stay below 2048, up to which float16 holds every
    whole number.
    """
    columns, size, outliers = 456, 128, 5  # no multiples of the tiles, a last short group
    group = torch.arange(columns) // size
    for encoding, rows, what in (
        ("integer", 200, ""),
        ("levels", 200, " of levels"),
        ("trellis", 266, " of a trellis"),
    ):
        levels = ENCODINGS[encoding].levels(LinearPlan("", rows, columns, 4, size, True, encoding=encoding))
        zeros = torch.randint(0, 16, (rows, 4), generator=draw, dtype=torch.uint8)
        codes = torch.randint(0, 16, (rows, columns), generator=draw, dtype=torch.uint8)
        index = torch.randperm(columns, generator=draw)[:outliers].sort().values
        outlier_weight = torch.randint(-4, 5, (rows, outliers), generator=draw).to(torch.float16)
        if levels is None:
            scales = torch.ones(rows, 4, dtype=torch.float16)
            codes[:, index] = zeros[:, group[index]]
            weight = codes.double() - zeros[:, group].double()
        else:
            scales = (torch.randint(0, 2, (rows, 4), generator=draw) * 2 - 1).half()
            if encoding == "trellis":
                codes = _places(codes)
            codes[:, index] = zero_place(levels)
            weight = torch.tensor(levels).double()[codes.int()] * scales[:, group].double()
        weight[:, index] = outlier_weight.double()
        linear = QuantizedLinear(
            codes,
            scales,
            zeros if levels is None else None,
            index.to(torch.int32),
            outlier_weight,
            bits=4,
            group_size=size,
            levels=levels,
        )
        yield what, linear, weight, 0.2 if levels is None else 0.05


def _places(codes: torch.Tensor) -> torch.Tensor:
    """What codes of a trellis stand for, row after row; after 256 rows the next chain begins."""
    found = 2 * codes
    for n in range(1, len(codes)):
        if n % 256 > 0:
            found[n] |= codes[n - 1] & 1
        if n % 256 > 1:
            found[n] ^= 2 * (codes[n - 2] & 1)
    return found
