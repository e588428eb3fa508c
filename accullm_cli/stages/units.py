"""What quantize rounds into one shard, and the files that it leaves of each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from accullm_cli.model.blocks import Decoder
from accullm_cli.model.embeddings import EmbeddingSlot, find_embeddings
from accullm_cli.quant.correction import read_linear
from accullm_cli.quant.encodings.base import StoredLinear
from accullm_cli.quant.plan import LinearPlan, Plan
from accullm_cli.run import file_sha256, key_of, write_file, write_text
from accullm_cli.stages.job import Job


@dataclass(frozen=True)
class Unit:
    """What is rounded into one shard: a block, or an embedding outside of the blocks.

    name: of its files; label: for people.
    linears: how its weights are stored.
    block: a block's number. embedding: where an embedding is.
    """

    name: str
    label: str
    linears: Mapping[str, LinearPlan]
    block: int | None = None
    embedding: EmbeddingSlot | None = None


@dataclass(frozen=True)
class UnitRecord:
    """What is known about one finished unit.

    inputs: what its shard was made from, the key of the unit before among it.
    relative_errors: per linear of a block, ||Y (W - Q)^T|| / ||Y W^T||, None where no calibration row reached it.
    """

    inputs: dict[str, str]
    sha256: str
    relative_errors: dict[str, float | None]
    records: list[str]

    @property
    def key(self) -> str:
        return key_of(self.inputs)


def units_of(decoder: Decoder, plan: Plan) -> list[Unit]:
    """All that is rounded, in order: each unit is rounded for what those before it have become."""
    total = len(decoder.block_names)
    blocks = []
    for index, slots in enumerate(decoder.slots):
        linears = {slot.name: plan.linears[slot.name] for slot in slots}
        blocks.append(Unit(block_unit(index), f"block {index + 1}/{total}", linears, block=index))
    before: list[Unit] = []
    behind: list[Unit] = []
    for slot in find_embeddings(decoder.model) if plan.embeddings else ():
        if slot.name not in plan.embeddings:
            continue
        name = "head" if slot.is_head else "embedding"
        unit = Unit(name, name, {slot.name: plan.embeddings[slot.name]}, embedding=slot)
        (behind if slot.is_head else before).append(unit)
    return [*before, *blocks, *behind]


def block_unit(index: int) -> str:
    """The name of a block's unit."""
    return f"block-{index:05d}"


def shard_path(job: Job, unit: str) -> Path:
    return job.own(f"quantize/{unit}.safetensors")


def load_record(job: Job, unit: str) -> UnitRecord | None:
    """The record of a finished unit; None where there is none."""
    path = shard_path(job, unit).with_suffix(".json")
    if not path.exists() or not shard_path(job, unit).exists():
        return None
    return UnitRecord(**json.loads(path.read_text()))


def write_unit(
    job: Job,
    unit: Unit,
    inputs: dict[str, str],
    tensors: dict[str, torch.Tensor],
    relative_errors: dict[str, float | None],
    records: list[str],
) -> UnitRecord:
    """Write a unit's shard, and then its record: without that it counts as not rounded."""
    path = shard_path(job, unit.name)
    here = {name: tensor.cpu() for name, tensor in tensors.items()}
    write_file(path, lambda temporary: save_file(here, temporary, metadata={"format": "pt"}))
    record = UnitRecord(inputs, file_sha256(path), relative_errors, records)
    write_text(path.with_suffix(".json"), json.dumps(asdict(record), indent=1))
    return record


def linear_of(tensors: dict[str, torch.Tensor], plan: LinearPlan) -> StoredLinear:
    """A quantized linear from a shard's tensors."""
    own = {
        name.removeprefix(f"{plan.name}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{plan.name}.")
    }
    return read_linear(own, plan)
