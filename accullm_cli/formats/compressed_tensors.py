"""The format `pack-quantized` of compressed-tensors: weight-only 2 to 8 bits, read by transformers, vLLM and SGLang.

https://github.com/vllm-project/compressed-tensors is where it comes from.

What a linear's tensors are stands in `formats.pack_quantized`, what config.json says of them in
`formats.config_groups`. Tensors have the names that checkpoints of the model have, and experts in a stacked parameter
are stored one by one, gate and up apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.formats.assemble import assemble, read_shard, refuse
from accullm_cli.formats.base import ModelShape, Parts
from accullm_cli.formats.config_groups import EMBEDDING, EXPERTS, LINEAR, Scheme, Schemes, groups_of
from accullm_cli.formats.config_groups import FORMAT as PACKING
from accullm_cli.formats.manifest import MANIFEST_NAME, Manifest, manifest_of
from accullm_cli.formats.objections import SCALE_DTYPES
from accullm_cli.formats.pack_quantized import (
    PACKED,
    SCALE,
    SHAPE,
    ZERO_POINT,
    decode,
    encode,
    joined,
    linear_schema,
    packed,
    split,
    stored_bytes,
)
from accullm_cli.formats.placing import placed_plan
from accullm_cli.formats.readers import Reading
from accullm_cli.formats.shards import TensorFiles, dtype_name, read_json, write_shard
from accullm_cli.formats.stored import StoredArtifact, TensorSchema, not_finite
from accullm_cli.quant.linear import QuantizedLinear
from accullm_cli.quant.plan import KEPT_BITS, LinearPlan, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from accullm_cli.model.structure import Structure

# Of a linear, the names that it is stored by; without an entry its own.
StoredAs = Mapping[str, tuple[str, ...]]
# In the name of an expert, what stands before its number, as readers look for it.
_EXPERT = re.compile(r"\.experts\.\d+\.|\.experts\.\w+\.\d+$")
# An expert's gate and up projection in one parameter.
_GATE_AND_UP = re.compile(r"\.gate_up_proj\.\d+$")
# Of a weight_shape.
_SHAPE_BYTES = 16
# What llm-compressor writes of Mixtral, and transformers loads with experts at random.
_UNKNOWN_EXPERT = re.compile(r"\.block_sparse_moe\.experts\.\d+\.\w+_proj$")


class CompressedTensorsFormat:
    """Writer and reader of compressed-tensors' pack-quantized format."""

    name = "compressed-tensors"

    def linear_bytes(self, linear: LinearPlan, dtype: torch.dtype) -> int:
        """Bytes that are stored for a linear: codes and zero points are padded to words of 32 bits."""
        if linear.bits == KEPT_BITS:
            return linear.stored_bytes
        # Of an expert gate and up are stored apart, each with its shape.
        shapes = _SHAPE_BYTES if _GATE_AND_UP.search(linear.name) else 0
        return stored_bytes(linear, dtype) + shapes

    def write(self, directory: Path, parts: Parts) -> None:
        """Write an artifact: codes are packed anew, never rounded anew.

        Raises:
            AccullmError: the plan is impossible, or a scale cannot be stored exactly in the model's dtype.
        """
        refuse(self.name, parts, directory)

        def place(source: Path, target: Path) -> None:
            write_shard(target, dict(_convert_block(source, parts.plan, parts.shape)))

        outside = (
            (name if name in parts.kept else _stored_name(name, parts.shape), tensor) for name, tensor in parts.outside
        )
        config = {"quantization_config": quantization_config(parts.plan, parts.shape)}
        assemble(directory, replace(parts, outside=outside), self.name, config, place)
        self.open(directory)

    def open(self, directory: Path) -> CompressedTensorsArtifact:
        """Open an artifact of this format, from accullm or from another tool.

        Raises:
            AccullmError: a file is missing, truncated or not as its schema says, or the scheme is not supported.
        """
        files = TensorFiles.open(directory)
        config = read_json(directory / "config.json")
        manifest = manifest_of(directory, self.name)
        if manifest is None:
            return CompressedTensorsArtifact(directory, derived_plan(directory, files, config), files, None, {}, config)
        check_config(directory, manifest, config)
        return CompressedTensorsArtifact(directory, manifest.plan, files, manifest, manifest.stored_as, config)


FORMAT = CompressedTensorsFormat()


class CompressedTensorsArtifact(StoredArtifact):
    """An opened pack-quantized artifact."""

    format = "compressed-tensors"

    def __init__(
        self,
        path: Path,
        plan: Plan,
        files: TensorFiles,
        manifest: Manifest | None,
        stored_as: StoredAs,
        config: Mapping[str, Any],
    ) -> None:
        self._config = config
        self._stored_as = {name: stored_as.get(name, (name,)) for name in plan.quantized}
        schema: dict[str, dict[str, TensorSchema]] = {}
        for name, row in plan.quantized.items():
            schema[name] = {}
            for part in self._parts(name, row):
                schema[name] |= linear_schema(part, scale_dtype(path, files, part.name))
        tensors = {name: names[0] for name, names in stored_as.items() if len(names) == 1}
        super().__init__(path, plan, files.renamed(tensors), schema, manifest)

    @property
    def kinds(self) -> Mapping[str, str]:
        """See `StoredArtifact.kinds`."""
        if self.manifest is not None:
            return self.manifest.kinds
        text = self._config.get("text_config", {})
        is_tied = bool(self._config.get("tie_word_embeddings", text.get("tie_word_embeddings")))
        found = dict.fromkeys(self.plan.embeddings, "tied" if is_tied else "embedding")
        found |= {name: "head" for name in self.plan.embeddings if _is_head(name)}
        return found | {name: "expert" for name in self.plan.linears if _EXPERT.search(name)}

    @property
    def readings(self) -> tuple[Reading, ...]:
        """See `StoredArtifact.readings`. Other tools do not write the key by which transformers reads zero points."""
        found = super().readings
        if self.manifest is None and any(map(_UNKNOWN_EXPERT.search, self.plan.quantized)):
            why = "its experts have other names than in checkpoints of the model, under which readers do not find them"
            return tuple(replace(each, obstacle=each.obstacle or why) for each in found)
        if self._dequantizes or not _needs_dequantizing(self.plan, self.kinds):
            return found
        why = 'its config.json does not say "dequantize": true, without which zero points and embeddings are not read'
        return tuple(replace(each, obstacle=each.obstacle or why) if each.is_transformers else each for each in found)

    @property
    def _dequantizes(self) -> bool:
        return bool(self._config["quantization_config"].get("dequantize"))

    def reader_dtype(self, name: str) -> torch.dtype:
        """What transformers dequantizes while it loads is rounded to the scales' dtype."""
        if not (self._dequantizes or self.kinds.get(name) == "expert"):
            return torch.float32
        return self.files.infos[f"{self._stored_as[name][0]}.{SCALE}"].torch_dtype

    def placed(self, model: PreTrainedModel, structure: Structure) -> StoredArtifact:
        """See `StoredArtifact.placed`: what another tool wrote has the names of checkpoints."""
        if self.manifest is not None:
            return self
        plan, stored_as = placed_plan(self, model, structure)
        return CompressedTensorsArtifact(self.path, plan, self.files, None, stored_as, self._config)

    def _parts(self, name: str, row: LinearPlan | None = None) -> list[LinearPlan]:
        """The rows of a linear as they are stored."""
        row = row or self.plan.quantized[name]
        names = self._stored_as[name]
        return [replace(row, name=part, out_features=row.out_features // len(names)) for part in names]

    def _stored(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a quantized linear by their full names: they may be those of several."""
        if name not in self.schema:
            return super()._stored(name)
        return self.files.tensors(self.schema[name])

    def _linear(self, name: str, stored: Mapping[str, torch.Tensor]) -> QuantizedLinear:
        return joined([decode(_of(part.name, stored), part) for part in self._parts(name)])

    def _linear_problems(self, name: str, stored: Mapping[str, torch.Tensor]) -> Iterator[str]:
        for part in self._parts(name):
            tensors = _of(part.name, stored)
            if tensors[SHAPE].tolist() != [part.out_features, part.in_features]:
                yield f"{SHAPE} is {tensors[SHAPE].tolist()}"
            for suffix, tensor in packed(decode(tensors, part)).items():
                if not torch.equal(tensor, tensors[suffix]):
                    yield f"padding bits of {suffix} are not zero"
            yield from not_finite(SCALE, tensors[SCALE])


def _of(name: str, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those tensors that belong to a stored linear, by suffix."""
    return {full.removeprefix(f"{name}."): tensor for full, tensor in stored.items() if full.startswith(f"{name}.")}


# -- writing -----------------------------------------------------------------------------------------------


def quantization_config(plan: Plan, shape: ModelShape) -> dict[str, Any]:
    """What readers match modules with: exact names, one group per scheme, so that none matches twice.

    Experts in stacked parameters are no modules: one expression stands for all of them. Where a module has another name
    in checkpoints, both are there, as some readers look for the one and some for the other.
    """
    targets: dict[Scheme, dict[str, None]] = {}
    for name, row in plan.quantized.items():
        names = (EXPERTS,) if shape.kinds.get(name) == "expert" else (name, *shape.stored_as.get(name, ()))
        targets.setdefault(Scheme.of(row), {}).update(dict.fromkeys(names))
    ignored = [name for name in shape.others if name not in plan.quantized]
    ignored += [name for name, row in plan.linears.items() if row.bits == KEPT_BITS]
    ignored = [other for name in ignored for other in (name, *shape.stored_as.get(name, ()))]
    return {
        "quant_method": "compressed-tensors",
        "format": PACKING,
        **({"dequantize": True} if _needs_dequantizing(plan, shape.kinds) else {}),
        "quantization_status": "compressed",
        "ignore": [*dict.fromkeys(ignored)],
        "config_groups": groups_of(targets),
    }


def _needs_dequantizing(plan: Plan, kinds: Mapping[str, str]) -> bool:
    """Whether transformers is to dequantize while it loads.

    With compressed-tensors 0.18 to 0.20 it builds packed zero points in their unpacked shape, and quantized embeddings
    without what it initializes them by, and then refuses the file. Told to dequantize while loading it reads both, but
    takes every linear that is no expert for the first scheme, so with several schemes the refusal is the better end.
    Other readers do not look at this key.
    """
    dense = {Scheme.of(row) for name, row in plan.quantized.items() if kinds.get(name) != "expert"}
    looked_up = any(kinds.get(name) != "head" for name in plan.embeddings)
    return len(dense) == 1 and (looked_up or not dense.pop().symmetric)


def _convert_block(source: Path, plan: Plan, shape: ModelShape) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a block: quantized linears in this format, the rest as it is."""
    for name, stored in read_shard(source, plan):
        if isinstance(stored, torch.Tensor):
            yield _stored_name(name, shape), stored
            continue
        assert isinstance(stored, QuantizedLinear)
        names = shape.stored_as.get(name, (name,))
        for part, linear in zip(names, split(stored, len(names)), strict=True):
            for suffix, tensor in encode(linear, shape.dtype, name).items():
                yield f"{part}.{suffix}", tensor


def _stored_name(name: str, shape: ModelShape) -> str:
    """What a tensor that is stored as it is is called."""
    (stored,) = shape.stored_as.get(name, (name,))
    return stored


# -- reading -----------------------------------------------------------------------------------------------


def scale_dtype(path: Path, files: TensorFiles, name: str) -> torch.dtype:
    """The dtype of a linear's scales: any that weights come in."""
    info = files.infos.get(f"{name}.{SCALE}")
    if info is None:
        raise AccullmError(f"tensor {name}.{SCALE} is missing", path, "copy the artifact again")
    if info.torch_dtype not in SCALE_DTYPES:
        raise AccullmError(f"tensor {name}.{SCALE} is {dtype_name(info.torch_dtype)}", info.file)
    return info.torch_dtype


def check_config(directory: Path, manifest: Manifest, config: Mapping[str, Any]) -> None:
    """Hold config.json, which readers go by, against the manifest.

    Raises:
        AccullmError: it gives a linear another scheme, or none.
    """
    path = directory / "config.json"
    schemes = Schemes(config.get("quantization_config", {}), path)
    for name, row in manifest.plan.quantized.items():
        looked_up = manifest.kinds.get(name) in ("embedding", "tied")
        for stored in manifest.stored_as.get(name, (name,)):
            if schemes.find(stored, EMBEDDING if looked_up else LINEAR) != Scheme.of(row):
                raise AccullmError(
                    f"describes {stored} otherwise than {MANIFEST_NAME}", path, "copy the artifact again"
                )


def derived_plan(path: Path, files: TensorFiles, config: Mapping[str, Any]) -> Plan:
    """The plan of an artifact that another tool wrote, from its config.json and the shapes of its tensors.

    A matrix with a row for each token is one of the embeddings.

    Raises:
        AccullmError: something in it is not supported; a tensor is missing.
    """
    schemes = Schemes(config.get("quantization_config", {}), path / "config.json")
    text = config.get("text_config")
    vocabulary = {part.get("vocab_size") for part in (config, text if isinstance(text, dict) else {})}
    linears: dict[str, LinearPlan] = {}
    embeddings: dict[str, LinearPlan] = {}
    for tensor, info in files.infos.items():
        name, _, suffix = tensor.rpartition(".")
        if suffix == "weight_g_idx":
            raise AccullmError(f"tensor {tensor}: reordered inputs (actorder group) are not supported", info.file)
        if suffix != PACKED:
            continue
        if f"{name}.{SHAPE}" not in files.infos:
            raise AccullmError(f"tensor {name}.{SHAPE} is missing", path, "copy the artifact again")
        dtype = scale_dtype(path, files, name)  # the model's
        rows, columns = map(int, files.tensor(f"{name}.{SHAPE}").tolist())
        is_embedding = rows in vocabulary and ".layers." not in name
        scheme = schemes.find(name, EMBEDDING if is_embedding and not _is_head(name) else LINEAR)
        if scheme.symmetric and f"{name}.{ZERO_POINT}" in files.infos:
            raise AccullmError(f"tensor {name}.{ZERO_POINT} is stored, and the scheme is symmetric", info.file)
        size = scheme.group_size
        if size > 0 and columns % size:
            raise AccullmError(f"tensor {tensor} has {columns} inputs, which groups of {size} do not divide", info.file)
        row = LinearPlan(name, rows, columns, scheme.bits, size, scheme.symmetric, source_itemsize=dtype.itemsize)
        (embeddings if is_embedding else linears)[name] = row
    return Plan(linears, embeddings=embeddings)


def _is_head(name: str) -> bool:
    return name.rpartition(".")[2] in ("lm_head", "embed_out", "output")
