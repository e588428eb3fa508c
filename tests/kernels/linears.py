"""Quantized linears for the tests of the kernels, and what they stand for in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.linear import QuantizedLinear
from accullm_cli.quant.plan import LinearPlan

ENCODED = ("integer", "levels", "trellis")


@dataclass(frozen=True)
class Shape:
    """What a kernel's path depends on."""

    out_features: int
    in_features: int
    group_size: int = 128
    symmetric: bool = False
    outliers: int = 0
    bits: int = 4
    encoding: str = "integer"  # one of ENCODED; the others with scales of either sign and no zero points


def table_of(encoding: str, bits: int) -> tuple[int, ...] | None:
    """The levels of an encoding."""
    return ENCODINGS[encoding].levels(LinearPlan("", 1, 1, bits, 64, True, encoding=encoding))


def chain(codes: torch.Tensor) -> torch.Tensor:
    """The places that codes of a trellis stand for, uint8 [N, K], row after row by the formula of docs/format.md."""
    places = []
    above, before = torch.zeros_like(codes[0]), torch.zeros_like(codes[0])
    for n, own in enumerate(codes):
        if n % 256 == 0:
            above, before = torch.zeros_like(own), torch.zeros_like(own)
        places.append(2 * (own ^ before) + above)
        above, before = own & 1, above
    return torch.stack(places)


def random_linear(shape: Shape, dtype: torch.dtype, seed: int, exact: bool = False) -> QuantizedLinear:
    """A linear with random codes; with `exact`, sums of small whole activations and its weights have no rounding."""
    draw = torch.Generator().manual_seed(seed)
    rows, columns = shape.out_features, shape.in_features
    size = columns if shape.group_size == -1 else shape.group_size
    groups = -(-columns // size)
    most = 2**shape.bits
    codes = torch.randint(0, most, (rows, columns), generator=draw, dtype=torch.uint8)
    zeros = torch.randint(0, most, (rows, groups), generator=draw, dtype=torch.uint8)
    levels = table_of(shape.encoding, shape.bits)
    if shape.encoding == "levels":
        assert levels is not None
        zeros.fill_(levels.index(0))
    elif shape.symmetric or levels is not None:
        zeros.fill_(most // 2)
    if exact:
        scales = 2.0 ** torch.randint(-2, 2, (rows, groups), generator=draw)
        outlier_weight = torch.randint(-8, 9, (rows, shape.outliers), generator=draw).float()
    else:
        scales = torch.rand(rows, groups, generator=draw) * 0.01 + 0.001
        outlier_weight = torch.randn(rows, shape.outliers, generator=draw)
    if levels is not None:
        scales *= torch.randint(0, 2, (rows, groups), generator=draw) * 2 - 1
    index = torch.randperm(columns, generator=draw)[: shape.outliers].sort().values
    codes[:, index] = zeros[:, index // size]
    return QuantizedLinear(
        codes=chain(codes) if shape.encoding == "trellis" else codes,
        scales=scales.to(torch.float16),
        zeros=None if shape.symmetric or levels is not None else zeros,
        outlier_index=index.to(torch.int32),
        outlier_weight=outlier_weight.to(dtype),
        bits=shape.bits,
        group_size=shape.group_size,
        levels=levels,
    )


def exact_weight(linear: QuantizedLinear, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K] as float64 numbers that `dtype` holds, by the formula of docs/format.md."""
    rows, columns = linear.codes.shape
    size = columns if linear.group_size == -1 else linear.group_size
    group = torch.arange(columns) // size
    if linear.levels is not None:
        steps = torch.tensor(linear.levels, dtype=torch.float64)[linear.codes.long()]
    else:
        zero = torch.full((rows, columns), 2 ** (linear.bits - 1)) if linear.zeros is None else linear.zeros[:, group]
        steps = linear.codes.double() - zero.double()
    weight = (steps * linear.scales[:, group].double()).to(dtype).double()
    for position, column in enumerate(linear.outlier_index.tolist()):
        weight[:, column] = linear.outlier_weight[:, position].to(dtype).double()
    return weight
