"""Artifacts of other tools, whose tensors have the names of checkpoints, by the names of a model's module tree."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from accullm_cli.errors import AccullmError
from accullm_cli.formats.stored import StoredArtifact
from accullm_cli.quant.plan import KEPT_BITS, LinearPlan, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from accullm_cli.model.structure import Structure

# What most architectures call the parts of an expert that checkpoints of Mixtral number.
PARTS_OF_EXPERTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def placed_plan(
    artifact: StoredArtifact, model: PreTrainedModel, structure: Structure
) -> tuple[Plan, Mapping[str, tuple[str, ...]]]:
    """The plan of an artifact by the names of a model, and the names in the artifact of all that it stores.

    An expert's rows may be stored as several linears, one below the other. A matrix that is quantized and none of the
    linears of a block (a router) is a linear of the plan, too.

    Raises:
        AccullmError: codes have no place in the model, or a tensor is part of a linear that has no codes.
    """
    from accullm_cli.model.embeddings import find_embeddings
    from accullm_cli.model.names import checkpoint_modules, destinations, expert_names

    quantized = artifact.plan.quantized
    slots = [slot.name for own in structure.slots for slot in own]
    outer = [slot.name for slot in find_embeddings(model)] if artifact.plan.embeddings else []
    renamed = checkpoint_modules(model, [*slots, *outer])
    names: dict[str, tuple[str, ...]] = {name: (other,) for name, other in renamed.items()}
    for block, own in zip(structure.blocks, structure.slots, strict=True):
        names |= expert_names(model, block, own)
    stored_as: dict[str, tuple[str, ...]] = {}
    for name in (*slots, *outer):
        parts = names.get(name, (name,))
        ways = ((name,), parts, tuple(map(_in_words, parts)))
        if (way := next((way for way in ways if all(part in quantized for part in way)), None)) is not None:
            stored_as[name] = way
    left = sorted(quantized.keys() - {part for parts in stored_as.values() for part in parts})
    parameters = dict(model.named_parameters())
    for stored, place in destinations(model, [f"{name}.weight" for name in left]).items():
        name = stored.removesuffix(".weight")
        row, parameter = quantized[name], parameters.get(place.name)
        if parameter is None or place.is_converted or parameter.shape != (row.out_features, row.in_features):
            raise AccullmError(f"{name}, which is stored as codes, has no place in this model", artifact.path)
        stored_as[place.name.removesuffix(".weight")] = (name,)
    rows = {name: _row(artifact, name, parts) for name, parts in stored_as.items()}
    codes = {tensor for tensors in artifact.schema.values() for tensor in tensors}
    others = [name for name in artifact.files.infos if name not in codes]
    for stored, place in destinations(model, others).items():
        if place.is_converted:
            raise AccullmError(f"tensor {stored} is part of {place.name}, which has no codes", artifact.path)
        stored_as[place.name] = (stored,)
    linears = {name: row for name, row in rows.items() if name not in outer}
    embeddings = {name: row for name, row in rows.items() if name in outer}
    linears |= kept_rows(artifact, structure, {name: parts[0] for name, parts in stored_as.items()}, linears.keys())
    return Plan(linears, artifact.plan.scale_dtype, embeddings), stored_as


def _in_words(name: str) -> str:
    """What llm-compressor calls a part of an expert that checkpoints of Mixtral number."""
    owner, _, last = name.rpartition(".")
    return f"{owner}.{PARTS_OF_EXPERTS.get(last, last)}"


def with_kept_linears(artifact: StoredArtifact) -> StoredArtifact:
    """The artifact of another tool, with the linears in its plan that this left in 16 bits, by their names there.

    Nothing but the model says which matrices are linears. Where transformers does not know the model, or it is another
    one, the plan stays as it is.
    """
    from accullm_cli.model.names import checkpoint_modules
    from accullm_cli.model.skeleton import build_skeleton
    from accullm_cli.model.structure import read_structure
    from accullm_cli.model.supported import check_supported, read_config

    path = artifact.path / "config.json"
    quantization = ("quantization", "quantization_config")
    try:
        config = {key: value for key, value in read_config(path).items() if key not in quantization}
        check_supported(config, path)
        model = build_skeleton(artifact.path)
        structure = read_structure(model)
    except AccullmError:
        return artifact
    slots = [slot.name for own in structure.slots for slot in own]
    names = {name: other for name, other in checkpoint_modules(model, slots).items() if name != other}
    own = kept_rows(artifact, structure, names, artifact.plan.linears.keys())
    rows = {names.get(name, name): replace(row, name=names.get(name, name)) for name, row in own.items()}
    found = copy(artifact)
    found.plan = replace(artifact.plan, linears={**artifact.plan.linears, **rows})
    return found


def kept_rows(
    artifact: StoredArtifact, structure: Structure, stored_as: Mapping[str, str], quantized: Collection[str]
) -> dict[str, LinearPlan]:
    """The linears of a model that an artifact stores as they are, but for those of experts, by the model's names.

    Args:
        stored_as: what linears are called there, where that is not their name. quantized: those that are not.
    """
    rows = {}
    for slot in (slot for own in structure.slots for slot in own if slot.kind != "expert"):
        stored = stored_as.get(slot.name, slot.name)
        info = artifact.files.infos.get(f"{stored}.weight")
        if info is None or not {slot.name, stored}.isdisjoint(quantized):
            continue
        if sorted(info.shape) == sorted((slot.out_features, slot.in_features)):
            sizes = slot.out_features, slot.in_features
            rows[slot.name] = LinearPlan(slot.name, *sizes, KEPT_BITS, -1, False, (), info.torch_dtype.itemsize)
    return rows


def _row(artifact: StoredArtifact, name: str, parts: tuple[str, ...]) -> LinearPlan:
    """The row of a linear whose rows are those of several, one below the other."""
    rows = [replace(artifact.plan.quantized[part], name=name) for part in parts]
    if any(row != rows[0] for row in rows):
        raise AccullmError(f"{', '.join(parts)} are one linear, and stored in several ways", artifact.path)
    return replace(rows[0], out_features=sum(row.out_features for row in rows))
