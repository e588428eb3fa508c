"""The bytes of pack-quantized linears: codes in words of 32 bits without gaps, zero points along the outputs.

For a linear P with weight [N, K] and groups along K:

- P.weight_packed int32 [N, ceil(K*bits/32)]: the code q in [-2**(bits-1), 2**(bits-1)) is stored as
  q + 2**(bits-1), which is our unsigned code, in bits k*bits to k*bits+bits-1 of its row, least significant first; a
  code may begin in one word and end in the next.
- P.weight_scale [N, G] in the model's dtype; P.weight_shape int64 [2].
- P.weight_zero_point int32 [ceil(N*bits/32), G], only where asymmetric: packed along N, with the same offset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.formats.shards import dtype_name
from accullm_cli.formats.stored import TensorSchema, schema_bytes
from accullm_cli.formats.words import to_octets, to_words, word_count
from accullm_cli.quant.linear import QuantizedLinear
from accullm_cli.quant.packing import pack, unpack
from accullm_cli.quant.plan import LinearPlan

PACKED, SCALE, SHAPE, ZERO_POINT = "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"


def linear_schema(linear: LinearPlan, dtype: torch.dtype) -> dict[str, TensorSchema]:
    """The tensors of one quantized linear by full name; dtype: of its scales."""
    rows, bits, name = linear.out_features, linear.bits, linear.name
    schema = {
        f"{name}.{PACKED}": TensorSchema(torch.int32, (rows, word_count(linear.in_features, bits))),
        f"{name}.{SCALE}": TensorSchema(dtype, (rows, linear.groups)),
        f"{name}.{SHAPE}": TensorSchema(torch.int64, (2,)),
    }
    if not linear.symmetric:
        schema[f"{name}.{ZERO_POINT}"] = TensorSchema(torch.int32, (word_count(rows, bits), linear.groups))
    return schema


def stored_bytes(linear: LinearPlan, dtype: torch.dtype) -> int:
    """Bytes of a quantized linear that is stored as one; dtype: of its scales."""
    return schema_bytes(linear_schema(linear, dtype))


# -- writing -----------------------------------------------------------------------------------------------


def encode(linear: QuantizedLinear, dtype: torch.dtype, where: object) -> dict[str, torch.Tensor]:
    """The tensors, by suffix, of a linear without outliers.

    Raises:
        AccullmError: a scale is not exactly representable in `dtype`.
    """
    scales = linear.scales.to(dtype)
    if not torch.equal(scales.double(), linear.scales.double()):
        raise AccullmError(
            f"a scale is not exactly representable in {dtype_name(dtype)}", where, "run profile again for this format"
        )
    shape = torch.tensor(linear.codes.shape, dtype=torch.int64)
    return {**packed(linear), SCALE: scales, SHAPE: shape}


def packed(linear: QuantizedLinear) -> dict[str, torch.Tensor]:
    """Codes packed along the inputs, zero points along the outputs."""
    tensors = {PACKED: to_words(pack(linear.codes, linear.bits))}
    if linear.zeros is not None:
        tensors[ZERO_POINT] = to_words(pack(linear.zeros.T, linear.bits)).T.contiguous()
    return tensors


def split(linear: QuantizedLinear, count: int) -> list[QuantizedLinear]:
    """The same as `count` linears, one below the other."""
    rows = len(linear.codes) // count
    return [
        replace(
            linear,
            codes=linear.codes[start : start + rows],
            scales=linear.scales[start : start + rows],
            zeros=None if linear.zeros is None else linear.zeros[start : start + rows],
            outlier_weight=linear.outlier_weight[start : start + rows],
        )
        for start in range(0, len(linear.codes), rows)
    ]


# -- reading -----------------------------------------------------------------------------------------------


def decode(tensors: Mapping[str, torch.Tensor], plan: LinearPlan) -> QuantizedLinear:
    """The inverse of `encode`. Scales stay in their stored dtype where float16 cannot hold them."""
    codes = unpack(to_octets(tensors[PACKED]), plan.bits, plan.in_features)
    zeros = None
    if not plan.symmetric:
        zeros = unpack(to_octets(tensors[ZERO_POINT].T), plan.bits, plan.out_features).T.contiguous()
    scales = tensors[SCALE]
    half = scales.half()
    return QuantizedLinear(
        codes=codes,
        scales=half if torch.equal(half.double(), scales.double()) else scales,
        zeros=zeros,
        outlier_index=torch.zeros(0, dtype=torch.int32),
        outlier_weight=scales.new_zeros(plan.out_features, 0),
        bits=plan.bits,
        group_size=plan.group_size,
    )


def joined(parts: Sequence[QuantizedLinear]) -> QuantizedLinear:
    """The inverse of `split`."""
    if len(parts) == 1:
        return parts[0]
    zeros = [part.zeros for part in parts if part.zeros is not None]
    # Of two parts, one may have scales that float16 cannot hold.
    wide = next((part.scales.dtype for part in parts if part.scales.dtype != torch.float16), torch.float16)
    return replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales.to(wide) for part in parts]),
        zeros=torch.cat(zeros) if zeros else None,
        outlier_weight=torch.cat([part.outlier_weight for part in parts]),
    )
