"""Artifacts of other tools, whose tensors have the names of checkpoints, by the names of a model's module tree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from accullm_cli.errors import AccullmError
from accullm_cli.formats.stored import StoredArtifact
from accullm_cli.quant.plan import LinearPlan, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from accullm_cli.model.structure import Structure


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
        ways = ((name,), names.get(name, (name,)))
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
    return Plan(linears, artifact.plan.scale_dtype, embeddings), stored_as


def _row(artifact: StoredArtifact, name: str, parts: tuple[str, ...]) -> LinearPlan:
    """The row of a linear whose rows are those of several, one below the other."""
    rows = [replace(artifact.plan.quantized[part], name=name) for part in parts]
    if any(row != rows[0] for row in rows):
        raise AccullmError(f"{', '.join(parts)} are one linear, and stored in several ways", artifact.path)
    return replace(rows[0], out_features=sum(row.out_features for row in rows))
