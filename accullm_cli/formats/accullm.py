"""The native format: any plan, its tensors as the quantize stage wrote them. docs/format.md has it on one page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.formats import NATIVE
from accullm_cli.formats.assemble import assemble, refuse
from accullm_cli.formats.base import Parts, Stack
from accullm_cli.formats.manifest import (
    MANIFEST_NAME,
    OLDEST_WRITTEN,
    USUAL_ENCODING,
    Manifest,
    check_version,
    read_manifest,
    record_fidelity,
    version_of,
)
from accullm_cli.formats.shards import TensorFiles, link_or_copy, read_json
from accullm_cli.formats.stored import StoredArtifact, TensorSchema, not_finite
from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.encodings.integer import IntegerZero
from accullm_cli.quant.linear import QuantizedLinear, check_outlier_index
from accullm_cli.quant.packing import pack, packed_length, unpack
from accullm_cli.quant.plan import LinearPlan, Plan

__all__ = ["LOADER_GUARD", "AccullmArtifact", "AccullmFormat", "record_fidelity"]

SUFFIXES = IntegerZero.suffixes
# What config.json leaves out: version 1 had no tables of scales, version 2 no levels, and embeddings have neither.
DEFAULT_SCHEME = {"scale_bits": 16, "encoding": USUAL_ENCODING}
SCHEME_KEYS = ("bits", "group_size", "scale_bits", "symmetric", "encoding", "outliers")
# An embedding has no outliers, and no scheme in common with the linears.
EMBEDDING_KEYS = ("bits", "group_size", "symmetric")

# transformers skips a quantization method that it does not know with a warning, and gives random values to the weights
# it then misses. The config key `transformers_weights` names the file it reads instead of the standard ones; no file
# has this name, so loading fails, with the remedy in the message. Our quantizer takes the key away (accullm_cli/hf.py).
LOADER_GUARD = "import-accullm_cli.hf-before-loading.safetensors"


class AccullmFormat:
    """Writer and reader of the native format."""

    name = NATIVE

    def linear_bytes(self, linear: LinearPlan, dtype: torch.dtype) -> int:
        """Bytes that are stored for a linear."""
        return linear.stored_bytes

    def write(self, directory: Path, parts: Parts) -> None:
        """Assemble an artifact: block shards are linked from the run directory, and copied where that is impossible.

        Raises:
            AccullmError: the plan is impossible, or the parts do not fit it.
        """
        refuse(self.name, parts, directory)
        described = quantization_config(parts.plan, parts.shape.stacks)
        config = {"quantization_config": described, "transformers_weights": LOADER_GUARD}
        assemble(directory, parts, self.name, config, link_or_copy)
        self.open(directory)

    def open(self, directory: Path) -> AccullmArtifact:
        """Open an artifact; the refusals are listed in docs/format.md.

        Raises:
            AccullmError: a file is missing, truncated or not as its schema says.
        """
        manifest = read_manifest(directory)
        if manifest.format != self.name:
            raise AccullmError(f"describes an artifact of format {manifest.format}", directory / MANIFEST_NAME)
        check_config(directory / "config.json", manifest)
        files = TensorFiles.open(directory)
        check_owners(directory, files, manifest)
        return AccullmArtifact(directory, manifest, files)


FORMAT = AccullmFormat()


class AccullmArtifact(StoredArtifact):
    """An opened artifact in the native format."""

    format = NATIVE

    def __init__(self, path: Path, manifest: Manifest, files: TensorFiles) -> None:
        schema = {
            name: linear_schema(linear, manifest.outliers.get(name, 0), manifest.dtype)
            for name, linear in manifest.plan.quantized.items()
        }
        super().__init__(path, manifest.plan, files, schema, manifest)
        self.plan = with_outliers(path, manifest, files)

    def _linear(self, name: str, stored: Mapping[str, torch.Tensor]) -> QuantizedLinear:
        plan = self.plan.embeddings.get(name) or self.plan.linears[name]
        linear = ENCODINGS[plan.encoding].from_tensors(stored, plan)
        assert isinstance(linear, QuantizedLinear)
        return linear

    def _linear_problems(self, name: str, stored: Mapping[str, torch.Tensor]) -> Iterator[str]:
        linear = self._linear(name, stored)
        if not torch.equal(linear.to_tensors()["qweight"], stored["qweight"]):
            yield "padding bits of qweight are not zero"
        if linear.zeros is not None and not torch.equal(pack(linear.zeros, linear.bits), stored["qzeros"]):
            yield "padding bits of qzeros are not zero"
        yield from _scale_problems(linear, stored)
        yield from not_finite("outlier_weight", linear.outlier_weight)
        index = linear.outlier_index.long()
        group = index // linear.columns_per_group
        zero = linear.zero_code if linear.zeros is None else linear.zeros[:, group]
        differs = (linear.codes[:, index] != zero).any(0)
        if differs.any():
            feature = index[differs][0].item()
            what = "zero point" if linear.levels is None else "level 0"
            yield f"the codes of outlier feature {feature} differ from the {what}"


def _scale_problems(linear: QuantizedLinear, stored: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """What is wrong with a linear's scales or their table."""
    table = linear.scale_table
    if table is None:
        yield from not_finite("scales", linear.scales)
        return
    yield from not_finite("scale_table", table)
    if not bool((table[1:] >= table[:-1]).all()):
        yield "scale_table is not ascending"
    groups = linear.scales.shape[1]
    if not torch.equal(
        pack(unpack(stored["qscales"], linear.scale_bits, groups), linear.scale_bits), stored["qscales"]
    ):
        yield "padding bits of qscales are not zero"


# -- what config.json says ---------------------------------------------------------------------------------


def quantization_config(plan: Plan, stacks: Mapping[str, Stack] | None = None) -> dict[str, Any]:
    """What a loader must know before it reads a tensor.

    The most frequent scheme stands at the top; `linears` names every quantized linear with what differs from it.
    `embeddings` is there where embedding or head are quantized, `stacks` where experts are not stored as [E, N, K].
    """
    quantized = {name: scheme_of(linear) for name, linear in plan.linears.items() if linear.bits != 16}
    keys = [key for key in SCHEME_KEYS if key != "encoding" or version_of(plan) > OLDEST_WRITTEN]
    common = {
        key: Counter(scheme[key] for scheme in quantized.values()).most_common(1)[0][0] if quantized else 0
        for key in keys
    }
    return {
        "quant_method": NATIVE,
        "format_version": version_of(plan),
        **common,
        "linears": {
            name: {key: scheme[key] for key in keys if scheme[key] != common[key]} for name, scheme in quantized.items()
        },
        "skipped": [name for name, linear in plan.linears.items() if linear.bits == 16],
        **({"embeddings": embedding_schemes(plan)} if plan.embeddings else {}),
        **({"stacks": {name: asdict(stack) for name, stack in stacks.items()}} if stacks else {}),
    }


def scheme_of(linear: LinearPlan) -> dict[str, int | bool | str]:
    return {
        "bits": linear.bits,
        "group_size": linear.group_size,
        "scale_bits": linear.scale_bits,
        "symmetric": linear.symmetric,
        "encoding": linear.encoding,
        "outliers": len(linear.outlier_index),
    }


def embedding_schemes(plan: Plan) -> dict[str, dict[str, int | bool]]:
    return {
        name: {key: getattr(embedding, key) for key in EMBEDDING_KEYS} for name, embedding in plan.embeddings.items()
    }


def check_config(path: Path, manifest: Manifest) -> None:
    """Hold config.json, which loaders read, against the manifest.

    Raises:
        AccullmError: it is missing, of a newer version, or describes other linears or embeddings.
    """
    config = read_json(path).get("quantization_config")
    if not isinstance(config, dict) or config.get("quant_method") != NATIVE:
        raise AccullmError(f"does not say quant_method {NATIVE}", path, "copy the artifact again")
    check_version(config.get("format_version"), path)
    entries, embeddings = config.get("linears"), config.get("embeddings", {})
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise AccullmError("does not name its quantized linears", path, "copy the artifact again")
    if not isinstance(embeddings, dict):
        raise AccullmError("does not name its quantized embeddings", path, "copy the artifact again")
    common = {**DEFAULT_SCHEME, **{key: config[key] for key in SCHEME_KEYS if key in config}}
    described = {name: {**common, **entry} for name, entry in entries.items()} | embeddings
    planned: dict[str, Mapping[str, int | bool | str]] = {**embedding_schemes(manifest.plan)}
    for name, linear in manifest.plan.linears.items():
        if linear.bits != 16:
            planned[name] = {**scheme_of(linear), "outliers": manifest.outliers[name]}
    for name in (*manifest.plan.linears, *manifest.plan.embeddings):
        if described.pop(name, None) != planned.get(name):
            raise AccullmError(f"describes {name} otherwise than {MANIFEST_NAME}", path, "copy the artifact again")
    for name in described:
        raise AccullmError(f"describes {name}, which {MANIFEST_NAME} does not", path, "copy the artifact again")


# -- what the tensors must be ------------------------------------------------------------------------------


def linear_schema(linear: LinearPlan, outliers: int, dtype: torch.dtype) -> dict[str, TensorSchema]:
    """The tensors of one quantized linear by full name. See docs/format.md."""
    rows, bits, name = linear.out_features, linear.bits, linear.name
    schema = {
        f"{name}.qweight": TensorSchema(torch.uint8, (rows, packed_length(linear.in_features, bits))),
    }
    if linear.scale_bits == 16:
        schema[f"{name}.scales"] = TensorSchema(torch.float16, (rows, linear.groups))
    else:
        width = packed_length(linear.groups, linear.scale_bits)
        schema[f"{name}.qscales"] = TensorSchema(torch.uint8, (rows, width))
        schema[f"{name}.scale_table"] = TensorSchema(torch.float16, (2**linear.scale_bits,))
    if not linear.symmetric:
        schema[f"{name}.qzeros"] = TensorSchema(torch.uint8, (rows, packed_length(linear.groups, bits)))
    if outliers:
        schema[f"{name}.outlier_index"] = TensorSchema(torch.int32, (outliers,))
        schema[f"{name}.outlier_weight"] = TensorSchema(dtype, (rows, outliers))
    return schema


def check_owners(path: Path, files: TensorFiles, manifest: Manifest) -> None:
    """Refuse tensors of quantized linears that the plan does not have, or does not have like this.

    Raises:
        AccullmError: such a tensor is stored.
    """
    quantized = manifest.plan.quantized
    for name, info in files.infos.items():
        owner, _, suffix = name.rpartition(".")
        if suffix not in SUFFIXES or name in manifest.kept:
            continue
        linear = quantized.get(owner)
        if linear is None:
            raise AccullmError(f"tensor {name} belongs to no quantized linear of {MANIFEST_NAME}", info.file)
        if suffix == "scales" and linear.scale_bits != 16:
            raise AccullmError(f"tensor {name} is stored beside the table of {owner}", info.file)
        if suffix == "qzeros" and linear.symmetric:
            raise AccullmError(f"tensor {name} is stored although {owner} is symmetric", info.file)


def with_outliers(path: Path, manifest: Manifest, files: TensorFiles) -> Plan:
    """The manifest's plan with the outlier features that the tensors name.

    Raises:
        AccullmError: a linear's features are not ascending, or beyond its inputs.
    """
    indices = files.tensors(f"{name}.outlier_index" for name, count in manifest.outliers.items() if count)
    linears = dict(manifest.plan.linears)
    for tensor, index in indices.items():
        name = tensor.removesuffix(".outlier_index")
        check_outlier_index(index, linears[name].in_features, tensor, files.infos[tensor].file)
        linears[name] = replace(linears[name], outlier_index=tuple(index.tolist()))
    return replace(manifest.plan, linears=linears)
