"""The format `pack-quantized` of compressed-tensors: weight-only 4 or 8 bits, read by transformers, vLLM and SGLang.

For a linear P with weight [N, K] and group size g (https://github.com/vllm-project/compressed-tensors):

- P.weight_packed int32 [N, ceil(K*bits/32)]: the code q in [-2**(bits-1), 2**(bits-1)) is stored as
  q + 2**(bits-1), which is our unsigned code, least significant bits first along K.
- P.weight_scale [N, G] in the model's dtype; P.weight_shape int64 [2].
- P.weight_zero_point int32 [ceil(N*bits/32), G], only where asymmetric: packed along N, with the same offset.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.formats.assemble import assemble, read_shard, refuse
from accullm_cli.formats.base import Parts
from accullm_cli.formats.manifest import MANIFEST_NAME, Manifest, read_manifest
from accullm_cli.formats.objections import SCALE_DTYPES
from accullm_cli.formats.shards import TensorFiles, dtype_name, read_json, write_shard
from accullm_cli.formats.stored import StoredArtifact, TensorSchema, not_finite
from accullm_cli.quant.linear import QuantizedLinear
from accullm_cli.quant.packing import pack, packed_length, unpack
from accullm_cli.quant.plan import LinearPlan, Plan


class CompressedTensorsFormat:
    """Writer and reader of compressed-tensors' pack-quantized format."""

    name = "compressed-tensors"

    def linear_bytes(self, linear: LinearPlan, dtype: torch.dtype) -> int:
        """Bytes that are stored for a linear: codes and zero points are padded to words of 32 bits."""
        if linear.bits == 16:
            return linear.stored_bytes
        return sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in linear_schema(linear, dtype).values())

    def write(self, directory: Path, parts: Parts) -> None:
        """Write an artifact: codes are packed anew, never rounded anew.

        Raises:
            AccullmError: the plan is impossible, or a scale cannot be stored exactly in the model's dtype.
        """
        refuse(self.name, parts, directory)

        def place(source: Path, target: Path) -> None:
            write_shard(target, dict(_convert_block(source, parts.plan, parts.shape.dtype)))

        assemble(directory, parts, self.name, {"quantization_config": quantization_config(parts.plan)}, place)
        self.open(directory)

    def open(self, directory: Path) -> CompressedTensorsArtifact:
        """Open an artifact of this format, from accullm or from another tool.

        Raises:
            AccullmError: a file is missing, truncated or not as its schema says, or the scheme is not supported.
        """
        files = TensorFiles.open(directory)
        manifest = read_manifest(directory) if (directory / MANIFEST_NAME).exists() else None
        if manifest is not None and manifest.format != self.name:
            raise AccullmError(f"describes an artifact of format {manifest.format}", directory / MANIFEST_NAME)
        plan = derived_plan(directory, files) if manifest is None else manifest.plan
        return CompressedTensorsArtifact(directory, plan, files, manifest)


FORMAT = CompressedTensorsFormat()


class CompressedTensorsArtifact(StoredArtifact):
    """An opened pack-quantized artifact."""

    format = "compressed-tensors"

    def __init__(self, path: Path, plan: Plan, files: TensorFiles, manifest: Manifest | None) -> None:
        schema = {
            name: linear_schema(linear, scale_dtype(path, files, name))
            for name, linear in plan.linears.items()
            if linear.bits != 16
        }
        super().__init__(path, plan, files, schema, manifest)

    @property
    def reader_dtype(self) -> torch.dtype:
        """Weights are rounded to the dtype of their scales."""
        name = next(iter(self.schema), None)
        return torch.float32 if name is None else self.files.infos[f"{name}.weight_scale"].torch_dtype

    def _linear(self, name: str, stored: Mapping[str, torch.Tensor]) -> QuantizedLinear:
        return decode(stored, self.plan.linears[name])

    def _linear_problems(self, name: str, stored: Mapping[str, torch.Tensor]) -> Iterator[str]:
        plan = self.plan.linears[name]
        if stored["weight_shape"].tolist() != [plan.out_features, plan.in_features]:
            yield f"weight_shape is {stored['weight_shape'].tolist()}"
        for suffix, tensor in _packed(decode(stored, plan)).items():
            if not torch.equal(tensor, stored[suffix]):
                yield f"padding bits of {suffix} are not zero"
        yield from not_finite("weight_scale", stored["weight_scale"])


# -- writing -----------------------------------------------------------------------------------------------


def quantization_config(plan: Plan) -> dict[str, Any]:
    """The config that readers match modules with: exact names, one group per scheme, so that none matches twice."""
    schemes: dict[tuple[int, int, bool], list[str]] = {}
    for name, linear in plan.linears.items():
        if linear.bits != 16:
            schemes.setdefault((linear.bits, linear.group_size, linear.symmetric), []).append(name)
    # transformers with compressed-tensors 0.18 to 0.20 builds packed zero points in their unpacked shape and then
    # refuses the file. Told to dequantize while loading it reads them, but takes every linear for the first scheme, so
    # with several schemes the refusal is the better end. Other readers do not look at this key.
    dequantize_while_loading = [symmetric for _, _, symmetric in schemes] == [False]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        **({"dequantize": True} if dequantize_while_loading else {}),
        "quantization_status": "compressed",
        "ignore": ["lm_head", *(name for name, linear in plan.linears.items() if linear.bits == 16)],
        "config_groups": {
            f"group_{number}": {
                "targets": names,
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": symmetric,
                    "strategy": "channel" if group_size == -1 else "group",
                    "group_size": None if group_size == -1 else group_size,
                    "dynamic": False,
                    "actorder": None,
                },
                "input_activations": None,
                "output_activations": None,
            }
            for number, ((bits, group_size, symmetric), names) in enumerate(schemes.items())
        },
    }


def _convert_block(source: Path, plan: Plan, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a block: quantized linears in this format, the rest as it is."""
    for name, stored in read_shard(source, plan):
        if isinstance(stored, torch.Tensor):
            yield name, stored
            continue
        assert isinstance(stored, QuantizedLinear)
        for suffix, tensor in encode(stored, dtype, name).items():
            yield f"{name}.{suffix}", tensor


def encode(linear: QuantizedLinear, dtype: torch.dtype, where: object) -> dict[str, torch.Tensor]:
    """The format's tensors, by suffix, of a linear without outliers.

    Raises:
        AccullmError: a scale is not exactly representable in `dtype`.
    """
    scales = linear.scales.to(dtype)
    if not torch.equal(scales.double(), linear.scales.double()):
        raise AccullmError(
            f"a scale is not exactly representable in {dtype_name(dtype)}",
            where,
            "run profile again with --format compressed-tensors",
        )
    shape = torch.tensor(linear.codes.shape, dtype=torch.int64)
    return {**_packed(linear), "weight_scale": scales, "weight_shape": shape}


def _packed(linear: QuantizedLinear) -> dict[str, torch.Tensor]:
    """Codes packed along the inputs, zero points along the outputs."""
    tensors = {"weight_packed": _words(pack(linear.codes, linear.bits))}
    if linear.zeros is not None:
        tensors["weight_zero_point"] = _words(pack(linear.zeros.T, linear.bits)).T.contiguous()
    return tensors


def _words(octets: torch.Tensor) -> torch.Tensor:
    """uint8 [R, B] to int32 [R, ceil(B/4)], the first byte lowest, filled up with zeros."""
    padded = torch.nn.functional.pad(octets, (0, -octets.shape[1] % 4))
    shifts = torch.arange(4) * 8
    words = (padded.view(len(octets), -1, 4).to(torch.int64) << shifts).sum(-1)
    # The topmost bit is int32's sign.
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


# -- reading -----------------------------------------------------------------------------------------------


def decode(tensors: Mapping[str, torch.Tensor], plan: LinearPlan) -> QuantizedLinear:
    """The inverse of `encode`. Scales stay in their stored dtype where float16 cannot hold them."""
    codes = unpack(_octets(tensors["weight_packed"]), plan.bits, plan.in_features)
    zeros = None
    if not plan.symmetric:
        zeros = unpack(_octets(tensors["weight_zero_point"].T), plan.bits, plan.out_features).T.contiguous()
    scales = tensors["weight_scale"]
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


def _octets(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `_words`: int32 [R, W] to uint8 [R, 4*W]."""
    octets = (words.to(torch.int64)[..., None] >> (torch.arange(4) * 8)) & 0xFF
    return octets.to(torch.uint8).reshape(len(words), -1)


def linear_schema(linear: LinearPlan, dtype: torch.dtype) -> dict[str, TensorSchema]:
    """The tensors of one quantized linear by full name."""
    rows, bits, name = linear.out_features, linear.bits, linear.name
    schema = {
        f"{name}.weight_packed": TensorSchema(torch.int32, (rows, _word_count(linear.in_features, bits))),
        f"{name}.weight_scale": TensorSchema(dtype, (rows, linear.groups)),
        f"{name}.weight_shape": TensorSchema(torch.int64, (2,)),
    }
    if not linear.symmetric:
        schema[f"{name}.weight_zero_point"] = TensorSchema(torch.int32, (_word_count(rows, bits), linear.groups))
    return schema


def _word_count(count: int, bits: int) -> int:
    return (packed_length(count, bits) + 3) // 4


def scale_dtype(path: Path, files: TensorFiles, name: str) -> torch.dtype:
    """The dtype of a linear's scales: any that weights come in."""
    info = files.infos.get(f"{name}.weight_scale")
    if info is None:
        raise AccullmError(f"tensor {name}.weight_scale is missing", path, "copy the artifact again")
    if info.torch_dtype not in SCALE_DTYPES:
        raise AccullmError(f"tensor {name}.weight_scale is {dtype_name(info.torch_dtype)}", info.file)
    return info.torch_dtype


def derived_plan(path: Path, files: TensorFiles) -> Plan:
    """The plan of an artifact that another tool wrote, from its tensors; one group per row is group size -1.

    Raises:
        AccullmError: it is not pack-quantized with integers of 4 or 8 bits, or its inputs are reordered.
    """
    config = read_json(path / "config.json").get("quantization_config", {})
    if config.get("format") != "pack-quantized":
        raise AccullmError(
            f"is compressed-tensors in format {config.get('format')}, of which only pack-quantized is supported",
            path / "config.json",
        )
    linears = {}
    for name, info in files.infos.items():
        owner, _, suffix = name.rpartition(".")
        if suffix == "weight_g_idx":
            raise AccullmError(f"tensor {name}: reordered inputs (actorder group) are not supported", info.file)
        if suffix == "weight_packed":
            linears[owner] = _derived_linear(path, files, owner, info.shape[-1])
    return Plan(linears)


def _derived_linear(path: Path, files: TensorFiles, name: str, words: int) -> LinearPlan:
    dtype = scale_dtype(path, files, name)  # the model's
    if f"{name}.weight_shape" not in files.infos:
        raise AccullmError(f"tensor {name}.weight_shape is missing", path, "copy the artifact again")
    rows, columns = files.tensor(f"{name}.weight_shape").tolist()
    groups = files.infos[f"{name}.weight_scale"].shape[-1]
    bits = next((bits for bits in (4, 8) if _word_count(columns, bits) == words), None)
    if bits is None:
        raise AccullmError(f"tensor {name}.weight_packed has {words} words for {columns} inputs", path)
    return LinearPlan(
        name=name,
        out_features=rows,
        in_features=columns,
        bits=bits,
        group_size=-1 if groups == 1 else columns // groups,
        symmetric=f"{name}.weight_zero_point" not in files.infos,
        source_itemsize=dtype.itemsize,
    )
