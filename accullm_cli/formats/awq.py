"""The format "gemm" of AutoAWQ: 4 bits, read by transformers (gptqmodel), vLLM, SGLang and mlx_lm.

For a linear P with weight [N, K] and group size g; value = (code - zero) * scale:

- P.qweight int32 [K, N/8]: for each input feature the codes of all outputs. Of the eight outputs that share a word, the
  nibbles hold number 0, 2, 4, 6, 1, 3, 5, 7, from the lowest nibble on.
- P.qzeros int32 [K/g, N/8]: zero points, packed the same way.
- P.scales float16 [K/g, N].

config.json has one scheme for all linears, and in `modules_to_not_convert` the names of those left as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.formats.assemble import assemble, placing, refuse
from accullm_cli.formats.base import Parts
from accullm_cli.formats.capabilities import quantization_of
from accullm_cli.formats.earlier_keys import with_earlier_keys
from accullm_cli.formats.manifest import manifest_of
from accullm_cli.formats.shards import TensorFiles, read_json
from accullm_cli.formats.stored import StoredArtifact, TensorSchema, not_finite, schema_bytes
from accullm_cli.formats.words import to_octets, to_words, word_count
from accullm_cli.quant.encodings.base import StoredLinear
from accullm_cli.quant.linear import QuantizedLinear
from accullm_cli.quant.packing import pack, unpack
from accullm_cli.quant.plan import KEPT_BITS, LinearPlan, Plan

BITS = 4
# Of eight neighbouring outputs, which one each nibble holds.
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)


class AwqFormat:
    """Writer and reader of AWQ's format."""

    name = "awq"

    def linear_bytes(self, linear: LinearPlan, dtype: torch.dtype) -> int:
        """Bytes that are stored for a linear."""
        if linear.bits == KEPT_BITS:
            return linear.stored_bytes
        return schema_bytes(linear_schema(linear))

    def write(self, directory: Path, parts: Parts) -> None:
        """Write an artifact: codes are packed anew, never rounded anew.

        Raises:
            AccullmError: the plan is impossible.
        """
        refuse(self.name, parts, directory)
        config = {**with_earlier_keys(parts.config), "quantization_config": quantization_config(parts.plan)}
        assemble(directory, parts, self.name, config, placing(parts.plan, _encode))
        self.open(directory)

    def open(self, directory: Path) -> AwqArtifact:
        """Open an artifact of this format, from accullm or from another tool.

        Raises:
            AccullmError: a file is missing, truncated or not as its schema says, or its scheme is not supported.
        """
        files = TensorFiles.open(directory)
        manifest = manifest_of(directory, self.name)
        _check_version(directory / "config.json")
        plan = derived_plan(directory, files) if manifest is None else manifest.plan
        schema = {name: linear_schema(row) for name, row in plan.quantized.items()}
        return AwqArtifact(directory, plan, files, schema, manifest)


FORMAT = AwqFormat()


class AwqArtifact(StoredArtifact):
    """An opened artifact of AWQ's format."""

    format = "awq"

    def _linear(self, name: str, stored: Mapping[str, torch.Tensor]) -> QuantizedLinear:
        return decode(stored, self.plan.quantized[name])

    def _linear_problems(self, name: str, stored: Mapping[str, torch.Tensor]) -> Iterator[str]:
        yield from not_finite("scales", stored["scales"])


# -- writing -----------------------------------------------------------------------------------------------


def quantization_config(plan: Plan) -> dict[str, Any]:
    """What loaders read of config.json."""
    kept = [name for name, row in plan.linears.items() if row.bits == KEPT_BITS]
    row = next(row for row in plan.linears.values() if row.bits != KEPT_BITS)
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": BITS,
        "group_size": row.group_size,
        "zero_point": True,
        # Some readers take this list for all that is left as it is, the head included.
        "modules_to_not_convert": ["lm_head", *kept] if kept else None,
    }


def _encode(name: str, stored: StoredLinear) -> dict[str, torch.Tensor]:
    assert isinstance(stored, QuantizedLinear)
    return encode(stored)


def encode(linear: QuantizedLinear) -> dict[str, torch.Tensor]:
    """The format's tensors, by suffix, of an asymmetric linear of 4 bits without outliers."""
    assert linear.zeros is not None
    return {
        "qweight": _packed(linear.codes.T),
        "qzeros": _packed(linear.zeros.T),
        "scales": linear.scales.T.contiguous(),
    }


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [R, N] to int32 [R, N/8]."""
    ordered = codes.reshape(len(codes), -1, len(NIBBLES))[..., NIBBLES]
    return to_words(pack(ordered.reshape(codes.shape), BITS))


# -- reading -----------------------------------------------------------------------------------------------


def decode(tensors: Mapping[str, torch.Tensor], row: LinearPlan) -> QuantizedLinear:
    """The inverse of `encode`."""
    scales = tensors["scales"].T.contiguous()
    return QuantizedLinear(
        codes=_unpacked(tensors["qweight"]).T.contiguous(),
        scales=scales,
        zeros=_unpacked(tensors["qzeros"]).T.contiguous(),
        outlier_index=torch.zeros(0, dtype=torch.int32),
        outlier_weight=scales.new_zeros(row.out_features, 0),
        bits=BITS,
        group_size=row.group_size,
    )


def _unpacked(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `_packed`."""
    count = len(NIBBLES) * words.shape[1]
    nibbles = unpack(to_octets(words), BITS, count).view(len(words), -1, len(NIBBLES))
    places = [NIBBLES.index(output) for output in range(len(NIBBLES))]
    return nibbles[..., places].reshape(len(words), count)


def linear_schema(row: LinearPlan) -> dict[str, TensorSchema]:
    """The tensors of one quantized linear by full name."""
    words, name = word_count(row.out_features, BITS), row.name
    return {
        f"{name}.qweight": TensorSchema(torch.int32, (row.in_features, words)),
        f"{name}.qzeros": TensorSchema(torch.int32, (row.groups, words)),
        f"{name}.scales": TensorSchema(torch.float16, (row.groups, row.out_features)),
    }


def _check_version(path: Path) -> None:
    config = quantization_of(read_json(path))
    version = config.get("version") or config.get("format") or "gemm"
    if str(version).lower() != "gemm":
        raise AccullmError(f"is AWQ in version {version}, of which only gemm is supported", path)
    bits = config.get("bits", config.get("w_bit", BITS))
    if bits != BITS:
        raise AccullmError(f"is AWQ with {bits} bits, of which only {BITS} are supported", path)


def derived_plan(path: Path, files: TensorFiles) -> Plan:
    """The plan of an artifact that another tool wrote, from its tensors; one group per row is group size -1.

    Modules that are in no numbered block are embeddings.

    Raises:
        AccullmError: the shapes of a linear's tensors do not fit each other.
    """
    linears: dict[str, LinearPlan] = {}
    embeddings: dict[str, LinearPlan] = {}
    for name in files.infos:
        owner, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            in_block = any(part.isdigit() for part in owner.split("."))
            (linears if in_block else embeddings)[owner] = _derived_linear(path, files, owner)
    return Plan(linears, embeddings=embeddings)


def _derived_linear(path: Path, files: TensorFiles, name: str) -> LinearPlan:
    shapes = []
    for suffix in ("qweight", "scales"):
        info = files.infos.get(f"{name}.{suffix}")
        if info is None:
            raise AccullmError(f"tensor {name}.{suffix} is missing", path, "copy the artifact again")
        if len(info.shape) != 2:
            raise AccullmError(f"tensor {name}.{suffix} has shape {list(info.shape)}", info.file)
        shapes.append(info.shape)
    (columns, words), (groups, _) = shapes
    if not groups or columns % groups:
        raise AccullmError(f"tensor {name}.scales has {groups} groups for {columns} inputs", path)
    row = LinearPlan(name, len(NIBBLES) * words, columns, BITS, columns // groups, False)
    return replace(row, group_size=-1) if groups == 1 else row
