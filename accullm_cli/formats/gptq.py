"""The format of GPTQ, as AutoGPTQ laid it down: read by transformers (gptqmodel), vLLM, SGLang and the ExLlama family.

For a linear P with weight [N, K], b bits and group size g; value = (code - zero) * scale:

- P.qweight int32 [K*b/32, N]: codes packed densely along K, least significant bits first.
- P.qzeros int32 [K/g, N*b/32]: zero points packed along N, each less one in version 1, and as they are in version 2 (a
  format of its own here; checkpoint_format says which). So version 1 has no zero point of 0: of 2**b - 1, which some
  writers store for it, some readers make 0 and others 2**b.
- P.scales float16 [K/g, N]; P.g_idx int32 [K]: the group of each input feature. Some writers leave it out where groups
  are neighbours; and some have a last group of fewer features, where g does not divide K.

Linears that differ from the rest are named in `dynamic`: "+:REGEX" with what they have, "-:REGEX" for those left as
they are. vLLM looks for a regex that matches the name of the module that it makes of fused linears.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.formats.assemble import assemble, placing, refuse
from accullm_cli.formats.base import Parts
from accullm_cli.formats.capabilities import CAPABILITIES, WHOLE_ROWS, quantization_of
from accullm_cli.formats.earlier_keys import with_earlier_keys
from accullm_cli.formats.manifest import Manifest, manifest_of
from accullm_cli.formats.shards import TensorFiles, read_json
from accullm_cli.formats.stored import StoredArtifact, TensorSchema, not_finite, schema_bytes
from accullm_cli.formats.words import to_octets, to_words, word_count
from accullm_cli.quant.encodings.base import StoredLinear
from accullm_cli.quant.linear import QuantizedLinear
from accullm_cli.quant.packing import pack, unpack
from accullm_cli.quant.plan import KEPT_BITS, LinearPlan, Plan

WIDTHS = (2, 3, 4, 8)
# What vLLM calls the modules that it makes of several linears.
FUSED_NAMES = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
FUSED_NAMES |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


class GptqFormat:
    """Writer and reader of GPTQ's format, in one of its versions.

    name: also the checkpoint_format. less: what zero points are stored less by.
    """

    def __init__(self, name: str, less: int) -> None:
        self.name = name
        self.less = less

    def linear_bytes(self, linear: LinearPlan, dtype: torch.dtype) -> int:
        """Bytes that are stored for a linear: zero points in any case, and the group of each input feature."""
        if linear.bits == KEPT_BITS:
            return linear.stored_bytes
        return schema_bytes(linear_schema(linear))

    def write(self, directory: Path, parts: Parts) -> None:
        """Write an artifact: codes are packed anew, never rounded anew.

        Raises:
            AccullmError: the plan is impossible.
        """
        refuse(self.name, parts, directory)
        config = {**with_earlier_keys(parts.config), "quantization_config": quantization_config(parts.plan, self.name)}

        def encoded(name: str, stored: StoredLinear) -> dict[str, torch.Tensor]:
            assert isinstance(stored, QuantizedLinear)
            return encode(stored, self.less)

        assemble(directory, parts, self.name, config, placing(parts.plan, encoded))
        self.open(directory)

    def open(self, directory: Path) -> GptqArtifact:
        """Open an artifact of this format, from accullm or from another tool.

        Raises:
            AccullmError: a file is missing, truncated or not as its schema says, or its scheme is not supported.
        """
        files = TensorFiles.open(directory)
        manifest = manifest_of(directory, self.name)
        if (version := _version(directory)) != self.name:
            known = sorted(name for name, format in CAPABILITIES.items() if FORMAT.name in (name, format.quant_method))
            raise AccullmError(
                f"is GPTQ in format {version}, of which only {' and '.join(known)} are supported",
                directory / "config.json",
            )
        plan = derived_plan(directory, files, self.less) if manifest is None else manifest.plan
        return GptqArtifact(directory, self.name, plan, files, manifest, self.less)


FORMAT = GptqFormat("gptq", less=1)


class GptqArtifact(StoredArtifact):
    """An opened artifact of GPTQ's format, in either version."""

    def __init__(
        self, path: Path, format: str, plan: Plan, files: TensorFiles, manifest: Manifest | None, added: int
    ) -> None:
        self.format = format
        self._added = added
        schema = {name: linear_schema(row) for name, row in plan.quantized.items()}
        for name, tensors in schema.items() if manifest is None else ():
            if f"{name}.g_idx" not in files.infos:
                del tensors[f"{name}.g_idx"]
        super().__init__(path, plan, files, schema, manifest)

    def _linear(self, name: str, stored: Mapping[str, torch.Tensor]) -> StoredLinear:
        return decode(stored, self.plan.quantized[name], self._added, self.path)

    def _linear_problems(self, name: str, stored: Mapping[str, torch.Tensor]) -> Iterator[str]:
        row = self.plan.quantized[name]
        zeros = _zeros(stored["qzeros"], row, self._added)
        if int(zeros.max()) == 2**row.bits:
            yield f"qzeros holds {2**row.bits - 1}, which some readers take for 0 and others for {2**row.bits}"
        yield from not_finite("scales", stored["scales"])


# -- writing -----------------------------------------------------------------------------------------------


def quantization_config(plan: Plan, checkpoint_format: str) -> dict[str, Any]:
    """What loaders read of config.json: the scheme that most linears have, and in `dynamic` those that differ."""
    schemes = {name: _scheme(row) for name, row in plan.linears.items()}
    quantized = [scheme for scheme in schemes.values() if scheme["bits"] != KEPT_BITS]
    usual = max(quantized, key=quantized.count)
    dynamic: dict[str, dict[str, Any]] = {}
    for name, scheme in schemes.items():
        pattern = f"^{re.escape(name)}$"
        owner, _, last = name.rpartition(".")
        if last in FUSED_NAMES:
            pattern = f"^{re.escape(owner)}\\.({last}|{FUSED_NAMES[last]})$"
        if scheme["bits"] == KEPT_BITS:
            dynamic[f"-:{pattern}"] = {}
        elif scheme != usual:
            dynamic[f"+:{pattern}"] = scheme
    return {
        "quant_method": "gptq",
        "checkpoint_format": checkpoint_format,
        **usual,
        "desc_act": False,
        "static_groups": False,
        "true_sequential": True,
        "lm_head": False,
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
    }


def _scheme(row: LinearPlan) -> dict[str, Any]:
    return {"bits": row.bits, "group_size": row.group_size, "sym": row.symmetric}


def encode(linear: QuantizedLinear, less: int = 1) -> dict[str, torch.Tensor]:
    """The format's tensors, by suffix, of a linear without outliers.

    Args:
        less: see `GptqFormat`; no zero point is below it.
    """
    zeros = linear.zeros
    if zeros is None:
        zeros = torch.full_like(linear.scales, 2 ** (linear.bits - 1), dtype=torch.uint8)
    assert int(zeros.min()) >= less
    return {
        "qweight": to_words(pack(linear.codes, linear.bits)).T.contiguous(),
        "qzeros": to_words(pack((zeros - less).T, linear.bits)),
        "scales": linear.scales.T.contiguous(),
        "g_idx": (torch.arange(linear.codes.shape[1]) // linear.columns_per_group).to(torch.int32),
    }


# -- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReorderedLinear:
    """A weight whose groups are no neighbouring input features (desc_act).

    linear: the weight with its input features in the order of their groups.
    order: int64 [K], which feature each of these is.
    """

    linear: QuantizedLinear
    order: torch.Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that the artifact stands for: [N, K] in `dtype`."""
        return self.linear.dequantize(dtype)[:, self.order.argsort()]

    def to(self, device: torch.device) -> ReorderedLinear:
        """The same linear on a device."""
        return ReorderedLinear(self.linear.to(device), self.order.to(device))

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Those of the linear in the order of its groups, and that order."""
        return {**self.linear.to_tensors(), "order": self.order}


def decode(tensors: Mapping[str, torch.Tensor], row: LinearPlan, added: int, where: object) -> StoredLinear:
    """The inverse of `encode`.

    Args:
        added: to stored zero points.

    Raises:
        AccullmError: `g_idx` does not give each group its number of input features.
    """
    codes = unpack(to_octets(tensors["qweight"].T), row.bits, row.in_features)
    scales = tensors["scales"].T.contiguous()
    linear = QuantizedLinear(
        codes=codes,
        scales=scales,
        zeros=None if row.symmetric else _zeros(tensors["qzeros"], row, added).T.contiguous(),
        outlier_index=torch.zeros(0, dtype=torch.int32),
        outlier_weight=scales.new_zeros(row.out_features, 0),
        bits=row.bits,
        group_size=row.group_size,
    )
    in_order = torch.arange(row.in_features) // linear.columns_per_group
    group = tensors.get("g_idx", in_order).long()
    if torch.equal(group, in_order):
        return linear
    order = group.argsort(stable=True)
    if not torch.equal(group[order], in_order):
        raise AccullmError(
            f"tensor {row.name}.g_idx does not put {linear.columns_per_group} input features into each of "
            f"{row.groups} groups",
            where,
            "copy the artifact again",
        )
    return ReorderedLinear(replace(linear, codes=codes[:, order].contiguous()), order)


def _zeros(qzeros: torch.Tensor, row: LinearPlan, added: int) -> torch.Tensor:
    """Zero points, uint8 [G, N]. What overflows is the next power of two, as in ExLlama and vLLM."""
    zeros = unpack(to_octets(qzeros), row.bits, row.out_features)
    return (zeros.to(torch.int16) + added).clamp_(max=255).to(torch.uint8)


def linear_schema(row: LinearPlan) -> dict[str, TensorSchema]:
    """The tensors of one quantized linear by full name."""
    rows, columns, bits, name = row.out_features, row.in_features, row.bits, row.name
    return {
        f"{name}.qweight": TensorSchema(torch.int32, (word_count(columns, bits), rows)),
        f"{name}.qzeros": TensorSchema(torch.int32, (row.groups, word_count(rows, bits))),
        f"{name}.scales": TensorSchema(torch.float16, (row.groups, rows)),
        f"{name}.g_idx": TensorSchema(torch.int32, (columns,)),
    }


def _version(path: Path) -> object:
    """The checkpoint_format of an artifact; older tools wrote it under another key, or none."""
    config = quantization_of(read_json(path / "config.json"))
    return config.get("checkpoint_format", config.get("format")) or FORMAT.name


def derived_plan(path: Path, files: TensorFiles, added: int) -> Plan:
    """The plan of an artifact that another tool wrote, from its tensors; one group per row is group size -1.

    Modules that are in no numbered block are embeddings.

    Raises:
        AccullmError: the shapes of a linear's tensors do not fit each other.
    """
    usual = quantization_of(read_json(path / "config.json")).get("group_size")
    linears: dict[str, LinearPlan] = {}
    embeddings: dict[str, LinearPlan] = {}
    for name in files.infos:
        owner, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            in_block = any(part.isdigit() for part in owner.split("."))
            (linears if in_block else embeddings)[owner] = _derived_linear(path, files, owner, added, usual)
    return Plan(linears, embeddings=embeddings)


def _derived_linear(path: Path, files: TensorFiles, name: str, added: int, usual: object) -> LinearPlan:
    """Args: usual: the group size that config.json gives most linears."""
    shapes = {}
    for suffix, dimensions in (("qweight", 2), ("qzeros", 2), ("scales", 2), ("g_idx", 1)):
        info = files.infos.get(f"{name}.{suffix}")
        if info is None and suffix == "g_idx":
            continue
        if info is None:
            raise AccullmError(f"tensor {name}.{suffix} is missing", path, "copy the artifact again")
        shapes[suffix] = info.shape
        if len(info.shape) != dimensions:
            raise AccullmError(f"tensor {name}.{suffix} has shape {list(info.shape)}", info.file)
    (words, rows), zero_words, groups = shapes["qweight"], shapes["qzeros"][1], shapes["scales"][0]
    if "g_idx" in shapes:
        (columns,) = shapes["g_idx"]
        bits = next((bits for bits in WIDTHS if word_count(columns, bits) == words), None)
    else:
        bits = next((bits for bits in WIDTHS if word_count(rows, bits) == zero_words), None)
        columns = 32 * words // (bits or 1)
    if bits is None:
        raise AccullmError(f"tensor {name}.qweight has {words} words for {columns} inputs", path)
    size = _group_size(files, name, columns, groups, usual)
    if size is None:
        raise AccullmError(f"tensor {name}.scales has {groups} groups for {columns} inputs", path)
    row = LinearPlan(
        name=name,
        out_features=rows,
        in_features=columns,
        bits=bits,
        group_size=size,
        symmetric=False,
        encoding="integer from 1" if added else "integer",
    )
    if shapes["qzeros"] != linear_schema(row)[f"{name}.qzeros"].shape:
        return row  # which is refused when the schema is looked at
    zeros = _zeros(files.tensor(f"{name}.qzeros"), row, added)
    return row if not bool((zeros == 2 ** (bits - 1)).all()) else replace(row, symmetric=True)


def _group_size(files: TensorFiles, name: str, columns: int, groups: int, usual: object) -> int | None:
    """Of so many groups; None where there is none."""
    if groups == 1:
        return WHOLE_ROWS
    if f"{name}.g_idx" in files.infos:
        # All but the last have as many features, also where they are no neighbours.
        usual = int((files.tensor(f"{name}.g_idx") == 0).sum())
    if isinstance(usual, int) and usual > 0 and math.ceil(columns / usual) == groups:
        return usual
    return columns // groups if groups and columns % groups == 0 else None
