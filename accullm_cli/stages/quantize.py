"""quantize: round every linear, block by block, each block into a shard of its own.

Two streams of hidden states go through the blocks: the original model's, and that of the model quantized so far.
Within a block the linears are rounded in the order the block computes them, so that each one is rounded for the
input it will really get, and its target makes up for what was lost before it (see quant.rounding). An embedding that
is only looked up is rounded before the blocks, if it is to be quantized at all, and the output head behind them.

Rounding happens on the device that was asked for (quant.rounding); streams, Hessians and all else stay on the CPU.

It leaves in the run directory, for each block,
    quantize/block-00000.safetensors    the block as the native format stores it (docs/format.md)
    quantize/block-00000.json           its key, relative errors and records
and the same for `embedding` and `head` where these are quantized; `head` is both where they are tied.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from accullm_cli.model.blocks import Decoder, batches
from accullm_cli.model.embeddings import EmbeddingSlot, find_embeddings
from accullm_cli.model.slots import share_weights
from accullm_cli.progress import Event
from accullm_cli.quant.linear import QuantizedLinear
from accullm_cli.quant.plan import LinearPlan, Plan
from accullm_cli.quant.rounding import RoundedLinear
from accullm_cli.run import UP_TO_DATE, Reason, compare_inputs, file_sha256, key_of, write_file, write_text
from accullm_cli.stages.block_rounding import BlockPair, round_with_streams, round_without_streams
from accullm_cli.stages.calibrate import PROBE_TOKENS, load_tokens, open_decoder
from accullm_cli.stages.device import device_of
from accullm_cli.stages.embedding_rounding import head_gram, round_embedding
from accullm_cli.stages.job import Job, StageOutcome, Work, machine_inputs, run_stage, section_inputs
from accullm_cli.stages.precision import precision_of, products
from accullm_cli.stages.profile import load_plan
from accullm_cli.stages.streams import StreamStore

VERSION = 4


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


def quantize(job: Job, calibrate_key: str, profile_key: str, force: bool = False) -> StageOutcome:
    """Round every linear of the plan; finished blocks whose inputs did not change are kept."""
    inputs = quantize_inputs(job, calibrate_key, profile_key)
    plan = load_plan(job.run.file("plan.json"))
    decoder = open_decoder(job)

    def work(reason: Reason) -> Work:
        # What is particular to a block comes from its rows of the plan, not from the plan as a whole.
        shared = {name: value for name, value in inputs.items() if name != "input:profile"}
        with products("float32"):
            return _quantize(job, decoder, plan, shared, reason.code == "forced")

    return run_stage(job, "quantize", inputs, force, work)


def quantize_inputs(job: Job, calibrate_key: str, profile_key: str) -> dict[str, str]:
    """What the shards depend on."""
    return {
        "source:sha256": job.source.sha256,
        "version:quantize": str(VERSION),
        "input:calibrate": calibrate_key,
        "input:profile": profile_key,
        "config:machine.seed": str(job.config.machine.seed),
        **section_inputs("rounding", job.config.rounding),
        **machine_inputs(device_of(job.config)),
        "machine:precision": precision_of(job),
    }


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
    return job.run.file(f"quantize/{unit}.safetensors")


def load_record(job: Job, unit: str) -> UnitRecord | None:
    """The record of a finished unit; None where there is none."""
    path = shard_path(job, unit).with_suffix(".json")
    if not path.exists() or not shard_path(job, unit).exists():
        return None
    return UnitRecord(**json.loads(path.read_text()))


# -- the stage, top to bottom ------------------------------------------------------------------------------


def _quantize(job: Job, decoder: Decoder, plan: Plan, shared: dict[str, str], force: bool) -> Work:
    units = units_of(decoder, plan)
    total = len(units)
    reasons, unit_inputs = _decide_units(job, units, plan, shared, force)
    finished = next((number for number, reason in enumerate(reasons) if reason.runs), total)
    streams: _Streams | None = None
    for number, unit in enumerate(units):
        if unit.block == 0:
            # Behind a quantized embedding, as the rounded model's stream begins with it.
            streams = _Streams.needed(job, decoder, units, finished, unit_inputs)
        if number < finished:
            job.progress(Event("quantize", "step", unit.label, UP_TO_DATE, number + 1, total))
            if streams is not None and unit.block is not None and unit.block >= streams.position:
                streams.follow(job, unit.block, plan)
            continue
        if unit.embedding is not None:
            _quantize_embedding(job, decoder, plan, unit, unit.embedding, streams, unit_inputs[number])
        elif unit.block is not None:
            record = _quantize_block(job, decoder, plan, unit, unit.block, streams, unit_inputs[number])
            if streams is not None:
                streams.store(record.key)
        job.progress(Event("quantize", "step", unit.label, reasons[number], number + 1, total))
    if streams is not None:
        streams.remove()
    records = []
    for unit in units:
        done = load_record(job, unit.name)
        assert done is not None
        records += done.records
    shards = [shard_path(job, unit.name) for unit in units]
    return Work((*shards, *(path.with_suffix(".json") for path in shards)), tuple(records))


def _decide_units(
    job: Job, units: list[Unit], plan: Plan, shared: dict[str, str], force: bool
) -> tuple[list[Reason], list[dict[str, str]]]:
    """For each unit why it runs, and its inputs. A unit runs if its inputs or any unit before it changed."""
    reasons: list[Reason] = []
    unit_inputs: list[dict[str, str]] = []
    previous = ""
    for unit in units:
        rows = {name: asdict(linear) for name, linear in unit.linears.items()}
        inputs = {
            **shared,
            "config:plan": key_of({"rows": json.dumps(rows), "scale_dtype": plan.scale_dtype}),
            "input:block before": previous,
        }
        record = load_record(job, unit.name)
        if force:
            reason = Reason("forced")
        elif record is None:
            reason = Reason("new")
        else:
            reason = compare_inputs(record.inputs, inputs)
            if not reason.runs and file_sha256(shard_path(job, unit.name)) != record.sha256:
                reason = Reason("output missing", f"{shard_path(job, unit.name).name} is damaged")
        reasons.append(reason)
        unit_inputs.append(inputs)
        previous = key_of(inputs)
    return reasons, unit_inputs


def _quantize_block(
    job: Job, decoder: Decoder, plan: Plan, unit: Unit, index: int, streams: _Streams | None, inputs: dict[str, str]
) -> UnitRecord:
    block = decoder.load_block(index)
    pair = BlockPair(decoder, index, block, share_weights(block, decoder.slots[index]))
    if streams is None:
        rounded = round_without_streams(job, plan, pair)
    else:
        rounded = round_with_streams(job, plan, pair, streams.original, streams.rounded)
        streams.position = index + 1
    record = _finish(
        job,
        unit,
        inputs,
        _block_tensors(decoder, index, block, rounded),
        {name: entry.relative_error for name, entry in rounded.items()},
        [f"{name}: {sentence}" for name, entry in rounded.items() for sentence in entry.records],
    )
    decoder.release_block(index)
    return record


def _quantize_embedding(
    job: Job,
    decoder: Decoder,
    plan: Plan,
    unit: Unit,
    slot: EmbeddingSlot,
    streams: _Streams | None,
    inputs: dict[str, str],
) -> UnitRecord:
    gram = None
    if slot.is_head and streams is not None:
        gram = head_gram(job, decoder, slot, streams.original, streams.rounded)
    tensors, records = round_embedding(job, decoder, plan, slot, gram)
    named = {f"{slot.name}.{suffix}": tensor for suffix, tensor in tensors.items()}
    return _finish(job, unit, inputs, named, {}, [f"{slot.name}: {sentence}" for sentence in records])


def _finish(
    job: Job,
    unit: Unit,
    inputs: dict[str, str],
    tensors: dict[str, torch.Tensor],
    relative_errors: dict[str, float | None],
    records: list[str],
) -> UnitRecord:
    """Write a unit's shard, and then its record: without that it counts as not rounded."""
    path = shard_path(job, unit.name)
    write_file(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))
    record = UnitRecord(inputs, file_sha256(path), relative_errors, records)
    write_text(path.with_suffix(".json"), json.dumps(asdict(record), indent=1))
    return record


def _block_tensors(
    decoder: Decoder, index: int, block: nn.Module, rounded: dict[str, RoundedLinear]
) -> dict[str, torch.Tensor]:
    """The block as the native format stores it: quantized linears, everything else in its stored dtype."""
    prefix = decoder.block_names[index]
    replaced = {slot.parameter for slot in decoder.slots[index] if slot.name in rounded}
    tensors = {}
    for name, value in block.state_dict().items():
        if name not in replaced:
            tensors[f"{prefix}.{name}"] = value.to(decoder.weights.dtype(f"{prefix}.{name}")).contiguous()
    for slot in decoder.slots[index]:
        if slot.parameter in replaced and slot.name not in rounded:  # an expert left in 16 bits among quantized ones
            dtype = decoder.weights.dtype(f"{prefix}.{slot.parameter}")
            tensors[f"{slot.name}.weight"] = slot.read(block).to(dtype).contiguous()
    for name, result in rounded.items():
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in result.linear.to_tensors().items()}
    return tensors


# How many blocks are behind stored streams, and the streams by name.
_Restored = tuple[int, dict[str, torch.Tensor]]


class _Streams:
    """The hidden states [S, T, hidden] of the original and of the model quantized so far, behind `position` blocks.

    `original` is None where nobody reads it: no target is corrected for the past, and there are no gradients.
    """

    def __init__(
        self, job: Job, decoder: Decoder, embedding: QuantizedLinear | None, restored: _Restored | None
    ) -> None:
        """`embedding`: what the rounded model's stream begins with, where that is not the original's."""
        self._decoder = decoder
        self._precision = precision_of(job)
        self._store = _stream_store(job)
        ids = load_tokens(job)["calibration"]
        reads_original = job.config.rounding.target == "corrected" or job.config.gradient_samples > 0
        decoder.load_outside()
        decoder.learn_calls(ids[:1, :PROBE_TOKENS])
        self.original: torch.Tensor | None = None
        if restored is None:
            self.position, self.rounded = 0, decoder.embed_all(ids)
            if reads_original:
                self.original = self.rounded
            if embedding is not None:
                module = decoder.model.get_input_embeddings()
                module.weight = nn.Parameter(torch.empty(0), False)  # the original's makes room
                module.weight = nn.Parameter(embedding.dequantize(torch.float32), False)
                self.rounded = decoder.embed_all(ids)
        else:
            self.position, self.rounded = restored[0], restored[1]["rounded"]
            self.original = restored[1].get("original")
            decoder.learn_calls(ids)
        decoder.release_outside()
        if self.original is self.rounded:
            self.original = self.rounded.clone()

    @classmethod
    def needed(
        cls, job: Job, decoder: Decoder, units: list[Unit], finished: int, inputs: list[dict[str, str]]
    ) -> _Streams | None:
        """The streams, as far as they were stored; None where no unit is left or rounding does not read them.

        Args:
            finished: the number of units that are.
        """
        if finished == len(units) or job.config.rounding.method == "nearest":
            return None
        keys = [key_of(entry) for unit, entry in zip(units[:finished], inputs, strict=False) if unit.block is not None]
        embedding = None
        if units[0].embedding is not None:
            tensors = load_file(shard_path(job, units[0].name))
            embedding = _linear_of(tensors, next(iter(units[0].linears.values())))
        return cls(job, decoder, embedding, _stream_store(job).restore(keys))

    def _advance(self, stream: torch.Tensor, index: int, block: nn.Module) -> None:
        with products(self._precision):
            for rows in batches(*stream.shape[:2]):
                stream[rows] = self._decoder.run(index, block, stream[rows])

    def follow(self, job: Job, index: int, plan: Plan) -> None:
        """Run both streams through a finished block, from its shard."""
        block = self._decoder.load_block(index)
        rounded_block = share_weights(block, self._decoder.slots[index])
        tensors = load_file(shard_path(job, block_unit(index)))
        for slot in self._decoder.slots[index]:
            linear_plan = plan.linears[slot.name]
            if linear_plan.bits < 16:
                slot.write(rounded_block, _linear_of(tensors, linear_plan).dequantize(torch.float32))
        if self.original is not None:
            self._advance(self.original, index, block)
        self._advance(self.rounded, index, rounded_block)
        self.position = index + 1
        self._decoder.release_block(index)

    def store(self, key: str) -> None:
        streams = {"rounded": self.rounded}
        if self.original is not None:
            streams["original"] = self.original
        self._store.store_if_due(key, streams)

    def remove(self) -> None:
        self._store.remove()


def _linear_of(tensors: dict[str, torch.Tensor], plan: LinearPlan) -> QuantizedLinear:
    """A quantized linear from a shard's tensors."""
    own = {
        name.removeprefix(f"{plan.name}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{plan.name}.")
    }
    return QuantizedLinear.from_tensors(own, plan.in_features, plan.bits, plan.group_size)


def _stream_store(job: Job) -> StreamStore:
    return StreamStore(job.run.file("quantize/streams.safetensors"))
