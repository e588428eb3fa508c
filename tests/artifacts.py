"""Artifacts of tiny models by plain nearest rounding: what tests of formats and loaders start from."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from accullm_cli.formats import FORMATS, artifact_format, open_artifact
from accullm_cli.formats.base import ModelShape, Objection, Parts
from accullm_cli.formats.objections import objections
from accullm_cli.quant.encodings.affine import AffineLinear
from accullm_cli.quant.encodings.levels import LEVELS
from accullm_cli.quant.encodings.trellis import ABOVE
from accullm_cli.quant.linear import QuantizedLinear
from accullm_cli.quant.plan import LinearPlan, Plan
from accullm_cli.quant.trellis import places_of_codes

# By the name of the list of blocks.
EMBEDDING_OF = {"model.layers": "model.embed_tokens", "transformer.h": "transformer.wte"}


def quantize_nearest(
    weight: torch.Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    outliers: tuple[int, ...] = (),
    scale_bits: int = 16,
) -> QuantizedLinear:
    """Round [N, K] to the nearest of each group's evenly spaced values. Scales hold in float16 and bfloat16.

    With fewer than 16 scale bits every scale is the next larger one of a table of powers of two and what lies between.
    """
    table = None
    if scale_bits < 16:
        table = (2.0 ** torch.linspace(-14, 2, 2**scale_bits)).bfloat16().half()
    rows, columns = weight.shape
    values = weight.detach().float().clone()
    values[:, list(outliers)] = 0
    size = columns if group_size == -1 else group_size
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scales, zeros = [], []
    for start in range(0, columns, size):
        group = values[:, start : start + size]
        low, high = group.amin(1, keepdim=True).clamp(max=0), group.amax(1, keepdim=True).clamp(min=0)
        if symmetric:
            scale = torch.maximum(-low, high) / (2 ** (bits - 1) - 0.5)
        else:
            scale = (high - low) / (2**bits - 1)
        scale = scale.clamp(min=1e-4).bfloat16().half()
        if table is not None:
            scale = table[torch.searchsorted(table.float(), scale.float())]
        zero = torch.full_like(low, 2 ** (bits - 1)) if symmetric else (-low / scale.float()).round()
        zero = zero.clamp(0, 2**bits - 1)
        codes[:, start : start + size] = ((group / scale.float()).round() + zero).clamp(0, 2**bits - 1).byte()
        for feature in outliers:
            if start <= feature < start + size:
                codes[:, feature] = zero[:, 0].byte()
        scales.append(scale)
        zeros.append(zero.byte())
    return QuantizedLinear(
        codes=codes,
        scales=torch.cat(scales, 1),
        zeros=None if symmetric else torch.cat(zeros, 1),
        outlier_index=torch.tensor(outliers, dtype=torch.int32),
        outlier_weight=weight.detach()[:, list(outliers)].contiguous(),
        bits=bits,
        group_size=group_size,
        scale_table=table,
    )


def quantize_affine(weight: torch.Tensor, bits: int, group_size: int) -> AffineLinear:
    """Round [N, K] to the nearest value of grids with real offsets. Both numbers hold in float16 and bfloat16."""
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    groups = weight.detach().float().view(rows, -1, size)
    low, high = groups.amin(-1), groups.amax(-1)
    scale, offset = ((high - low) / (2**bits - 1)).clamp(min=1e-4).bfloat16().half(), low.bfloat16().half()
    codes = ((groups - offset.float()[..., None]) / scale.float()[..., None]).round().clamp(0, 2**bits - 1)
    return AffineLinear(
        codes=codes.byte().view(rows, columns),
        scales=scale,
        offsets=offset,
        outlier_index=torch.zeros(0, dtype=torch.int32),
        outlier_weight=scale.new_zeros(rows, 0),
        bits=bits,
        group_size=group_size,
    )


def quantize_levels(
    weight: torch.Tensor, bits: int, group_size: int, outliers: tuple[int, ...] = (), scale_bits: int = 16
) -> QuantizedLinear:
    """Round [N, K] to the nearest level; the largest weight of a group becomes the last one, whatever its sign is."""
    levels = torch.tensor(LEVELS[bits], dtype=torch.float32)
    table = None
    if scale_bits < 16:
        magnitudes = (2.0 ** torch.linspace(-20, 0, 2 ** (scale_bits - 1))).bfloat16().half()
        table = torch.cat([-magnitudes.flip(0), magnitudes])
    values = weight.detach().float().clone()
    values[:, list(outliers)] = 0
    size = weight.shape[1] if group_size == -1 else group_size
    codes, scales = [], []
    for group in values.split(size, 1):
        largest = group.gather(1, group.abs().argmax(1, keepdim=True)) / 127
        scale = torch.where(largest.abs() < 1e-6, 1e-6, largest).bfloat16().half()
        if table is not None:
            scale = table[(scale.float() - table.float()).abs().argmin(1, keepdim=True)]
        codes.append(((group / scale.float())[..., None] - levels).abs().argmin(-1).byte())
        scales.append(scale)
    return QuantizedLinear(
        codes=torch.cat(codes, 1),
        scales=torch.cat(scales, 1),
        zeros=None,
        outlier_index=torch.tensor(outliers, dtype=torch.int32),
        outlier_weight=weight.detach()[:, list(outliers)].contiguous(),
        bits=bits,
        group_size=group_size,
        scale_table=table,
        levels=LEVELS[bits],
    )


def quantize_trellis(
    weight: torch.Tensor, bits: int, group_size: int, outliers: tuple[int, ...] = (), scale_bits: int = 16
) -> QuantizedLinear:
    """Any codes, with scales that give [N, K] about the size it has."""
    rows, columns = weight.shape
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(columns)).byte()
    places = places_of_codes(codes)
    places[:, list(outliers)] = 2**bits
    table = None if scale_bits == 16 else (2.0 ** torch.linspace(-20, 0, 2**scale_bits)).bfloat16().half()
    size = columns if group_size == -1 else group_size
    groups = [group.detach().float().abs().amax(1, keepdim=True) / 127 for group in weight.split(size, 1)]
    scales = torch.cat(groups, 1).clamp(min=1e-6).bfloat16().half()
    if table is not None:
        scales = table[(scales.float()[..., None] - table.float()).abs().argmin(-1)]
    above = ABOVE[bits]
    return QuantizedLinear(
        codes=places,
        scales=scales,
        zeros=None,
        outlier_index=torch.tensor(outliers, dtype=torch.int32),
        outlier_weight=weight.detach()[:, list(outliers)].contiguous(),
        bits=bits,
        group_size=group_size,
        scale_table=table,
        levels=(*(-level for level in above[::-1]), 0, 0, *above),
    )


@dataclass(frozen=True)
class Made:
    """Parts of an artifact, what they hold, and the model with the weights that the artifact stands for."""

    parts: Parts
    linears: dict[str, Any]
    reference: nn.Module
    embeddings: dict[str, Any]


def make_parts(
    model: nn.Module,
    run: Path,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = False,
    outliers: tuple[int, ...] = (),
    keep: tuple[str, ...] = (),
    scale_dtype: str = "float16",
    companions: Mapping[str, Path] | None = None,
    scale_bits: int = 16,
    embedding_bits: int = 16,
    encoding: str = "integer",
    others: Mapping[str, tuple[int, int]] | None = None,
) -> Made:
    """Quantize every linear in the model's blocks; `keep` names (by their ends) those that stay as they are.

    With `embedding_bits` below 16 embedding and head are quantized, too; tied ones as one matrix. `others` gives
    linears (by the ends of their names) other bits and group sizes.
    """

    def quantize(weight: torch.Tensor, bits: int, group_size: int, *rest: Any) -> Any:
        if encoding == "affine":
            return quantize_affine(weight, bits, group_size)
        if encoding == "levels":
            return quantize_levels(weight, bits, group_size, *rest[1:])
        if encoding == "trellis":
            return quantize_trellis(weight, bits, group_size, *rest[1:])
        return quantize_nearest(weight, bits, group_size, *rest)

    run.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "model"):
        prefix, blocks = "model.layers", model.model.layers
    else:
        prefix, blocks = "transformer.h", model.transformer.h
    reference = copy.deepcopy(model)
    plans: dict[str, LinearPlan] = {}
    kinds: dict[str, str] = {}
    linears: dict[str, Any] = {}
    shards = []
    for number, block in enumerate(blocks):
        tensors = {f"{prefix}.{number}.{name}": tensor for name, tensor in block.state_dict().items()}
        for parameter, kind in _weights(block, f"{prefix}.{number}."):
            stacked = tensors.pop(parameter)
            target = reference.get_parameter(parameter).data
            for name, weight, slot in _slices(parameter, kind, stacked, target):
                kept = name.endswith(keep) if keep else False
                kinds[name] = kind
                itemsize = weight.element_size()
                if kept:
                    plans[name] = LinearPlan(name, *weight.shape, 16, -1, False, (), itemsize)
                    tensors[f"{name}.weight"] = weight.T.contiguous() if kind == "conv1d" else weight.clone()
                    continue
                own = next((scheme for end, scheme in (others or {}).items() if name.endswith(end)), (bits, group_size))
                scheme = (*own, symmetric, outliers)
                plans[name] = LinearPlan(name, *weight.shape, *scheme, itemsize, scale_bits, encoding)
                linears[name] = quantize(weight, *scheme, scale_bits)
                slot.copy_(linears[name].dequantize(weight.dtype))
                tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in linears[name].to_tensors().items()}
        shards.append(run / f"block-{number:05d}.safetensors")
        save_file(tensors, shards[-1])
    tied = model.config.tie_word_embeddings
    embeddings: dict[str, Any] = {}
    embedding_plans: dict[str, LinearPlan] = {}
    embedding_shards = []
    if embedding_bits < 16:
        for name in (EMBEDDING_OF[prefix],) if tied else (EMBEDDING_OF[prefix], "lm_head"):
            weight = model.get_parameter(f"{name}.weight")
            own = "integer" if encoding in ("levels", "trellis") else encoding
            rounds = quantize_affine if own == "affine" else partial(quantize_nearest, symmetric=symmetric)
            embeddings[name] = rounds(weight, embedding_bits, group_size)
            itemsize = weight.element_size()
            embedding_plans[name] = LinearPlan(
                name, *weight.shape, embedding_bits, group_size, symmetric, source_itemsize=itemsize, encoding=own
            )
            reference.get_parameter(f"{name}.weight").data.copy_(embeddings[name].dequantize(weight.dtype))
            embedding_shards.append(run / f"{name}.safetensors")
            tensors = {f"{name}.{suffix}": tensor for suffix, tensor in embeddings[name].to_tensors().items()}
            save_file(tensors, embedding_shards[-1])
    outside = [
        (name, tensor.clone())
        for name, tensor in model.state_dict().items()
        if not name.startswith(f"{prefix}.")
        and not (tied and name == "lm_head.weight")
        and name.removesuffix(".weight") not in embeddings
    ]
    config = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    config["architectures"] = [type(model).__name__]
    parts = Parts(
        config=config,
        companions=companions or {},
        plan=Plan(plans, scale_dtype, embedding_plans),
        shape=_shape(model, kinds, embeddings, prefix),
        blocks=tuple(shards),
        outside=iter(outside),
        provenance={"source": {"name": "tiny", "sha256": "0" * 64}, "records": ["nothing to report"]},
        embeddings=tuple(embedding_shards),
    )
    return Made(parts, linears, reference, embeddings)


def _shape(model: nn.Module, kinds: dict[str, str], embeddings: Mapping[str, object], prefix: str) -> ModelShape:
    """With names of experts as in the checkpoints of Mixtral, which alone has any here."""
    named = {}
    for name in (name for name, kind in kinds.items() if kind == "expert"):
        owner, number = name.split(".mlp.experts.")[0] + ".block_sparse_moe.experts", name.rpartition(".")[2]
        last = ("w1", "w3") if ".gate_up_proj." in name else ("w2",)
        named[name] = tuple(f"{owner}.{number}.{part}" for part in last)
    renamed = {
        name: (name.replace(".mlp.", ".block_sparse_moe."),)
        for name in model.state_dict()
        if name.endswith("mlp.gate.weight")
    }
    renamed |= {name.removesuffix(".weight"): (other.removesuffix(".weight"),) for name, (other,) in renamed.items()}
    tied = model.config.tie_word_embeddings
    of_embeddings = {name: "head" if name == "lm_head" else "tied" if tied else "embedding" for name in embeddings}
    others = [name.removesuffix(".weight") for name in renamed if name.endswith(".weight")]
    others += [] if "lm_head" in embeddings or (tied and embeddings) else ["lm_head"]
    return ModelShape(model.config.model_type, model.dtype, kinds | of_embeddings, {}, named | renamed, tuple(others))


def _weights(block: nn.Module, prefix: str) -> list[tuple[str, str]]:
    """Names of the parameters that hold linears, with their kind."""
    found = []
    for path, module in block.named_modules():
        name = prefix + path
        if isinstance(module, Conv1D):
            found.append((f"{name}.weight", "conv1d"))
        elif isinstance(module, nn.Linear):
            found.append((f"{name}.weight", "linear"))
        found += [
            (f"{name}.{key}", "expert") for key, value in module.named_parameters(recurse=False) if value.dim() == 3
        ]
    return found


def _slices(parameter: str, kind: str, stored: torch.Tensor, target: torch.Tensor):
    """Each linear of a parameter: its name, its weight [N, K], and the view of the reference's weight [N, K]."""
    name = parameter.removesuffix(".weight")
    if kind == "expert":
        return [(f"{name}.{e}", stored[e], target[e]) for e in range(len(stored))]
    if kind == "conv1d":
        return [(name, stored.T, target.T)]
    return [(name, stored, target)]


def empty(directory: Path) -> Path:
    directory.mkdir(parents=True)
    return directory


def write(format: str, directory: Path, made: Made) -> Path:
    """An artifact in a new directory."""
    FORMATS[format].write(empty(directory), made.parts)
    return directory


def assert_reads_back(format: str, directory: Path, made: Made, foreign: bool) -> None:
    """All that was written is read, bit for bit; `foreign` as of another tool, without the manifest."""
    if foreign:
        (directory / "accullm.json").unlink()
    assert artifact_format(directory) == format
    opened, plan = open_artifact(directory), made.parts.plan
    assert opened.plan.quantized == plan.quantized
    assert {name: row.bits for name, row in opened.plan.linears.items()} == {
        name: row.bits for name, row in plan.linears.items()
    }
    for name, linear in made.linears.items():
        assert torch.equal(opened.linear(name).dequantize(), linear.dequantize()), name
    for name, row in made.parts.plan.linears.items():
        if row.bits == 16:
            assert torch.equal(opened.tensor(f"{name}.weight"), made.reference.get_parameter(f"{name}.weight")), name
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(opened.tensor(norm), made.reference.get_parameter(norm))
    assert "model.layers.0.self_attn.q_proj.bias" in opened.names()
    assert list(opened.problems()) == []


def change_tensors(directory: Path, file: str, name: str, changes: Mapping[str, torch.Tensor | None]) -> None:
    """Change tensors of a linear, by suffix, in one file of an artifact and its index; None drops one."""
    tensors = load_file(directory / file)
    for suffix, tensor in changes.items():
        tensors.pop(f"{name}.{suffix}", None)
        if tensor is not None:
            tensors[f"{name}.{suffix}"] = tensor
    save_file(tensors, directory / file)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    others = {tensor: place for tensor, place in index["weight_map"].items() if place != file}
    index["weight_map"] = others | dict.fromkeys(tensors, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_config(directory: Path, **changes: object) -> None:
    """Change quantization_config; None drops a key."""
    config = json.loads((directory / "config.json").read_text())
    changed = {**config["quantization_config"], **changes}
    config["quantization_config"] = {key: value for key, value in changed.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))


def write_quantization(directory: Path, **described: object) -> None:
    """Write another quantization_config."""
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": described}))


def expert_objections(format: str, *rows: LinearPlan, named: bool = True) -> list[Objection]:
    """What a format objects to in experts; `named`: their names in checkpoints are known."""
    plan = Plan({row.name: row for row in rows})
    stored_as = {row.name: (f"{row.name}.part",) for row in rows} if named else {}
    shape = ModelShape("gpt_oss", torch.float16, dict.fromkeys(plan.linears, "expert"), stored_as=stored_as)
    return objections(format, plan, shape)
