"""quantize: round every linear, block by block, each block into a shard of its own.

Two streams of hidden states go through the blocks: the original model's, and that of the model quantized so far.
Within a block the linears are rounded in the order the block computes them, so that each one is rounded for the
input it will really get, and its target makes up for what was lost before it (see quant.rounding).

It leaves in the run directory, for each block,
    quantize/block-00000.safetensors    the block as the native format stores it (docs/format.md)
    quantize/block-00000.json           its key, relative errors and records
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from accullm_cli.model.blocks import Decoder, batches
from accullm_cli.model.slots import LinearSlot, share_weights
from accullm_cli.progress import Event
from accullm_cli.quant.linear import QuantizedLinear
from accullm_cli.quant.plan import Plan
from accullm_cli.quant.rounding import RoundedLinear, RoundingOptions, round_linears
from accullm_cli.quant.stats import GramMatrices
from accullm_cli.run import UP_TO_DATE, Reason, compare_inputs, file_sha256, key_of, write_file, write_text
from accullm_cli.stages.calibrate import PROBE_TOKENS, load_block_stats, load_tokens, open_decoder, stats_path
from accullm_cli.stages.job import Job, StageOutcome, Work, machine_inputs, run_stage, section_inputs
from accullm_cli.stages.profile import load_plan
from accullm_cli.stages.streams import StreamStore

VERSION = 1
# Gram matrices that are accumulated in one pass; the experts of a step come in parts of this size.
GRAM_BYTES = 1 << 30


@dataclass(frozen=True)
class BlockRecord:
    """What is known about one finished block.

    inputs: what its shard was made from; the first one is the key of the block before.
    relative_errors: per linear, ||Y (W - Q)^T|| / ||Y W^T||, None where no calibration row reached it.
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
        **machine_inputs(),
    }


def shard_path(job: Job, index: int) -> Path:
    return job.run.file(f"quantize/block-{index:05d}.safetensors")


def load_block_record(job: Job, index: int) -> BlockRecord | None:
    """The record of a finished block; None where there is none."""
    path = shard_path(job, index).with_suffix(".json")
    if not path.exists() or not shard_path(job, index).exists():
        return None
    return BlockRecord(**json.loads(path.read_text()))


# -- the stage, top to bottom ------------------------------------------------------------------------------


def _quantize(job: Job, decoder: Decoder, plan: Plan, shared: dict[str, str], force: bool) -> Work:
    total = len(decoder.block_names)
    reasons, block_inputs = _decide_blocks(job, decoder, plan, shared, force)
    finished = next((index for index, reason in enumerate(reasons) if reason.runs), total)
    streams = _Streams.needed(job, decoder, finished, [key_of(entry) for entry in block_inputs])
    for index in range(total):
        if index < finished:
            job.progress(Event("quantize", "step", f"block {index + 1}/{total}", UP_TO_DATE, index + 1, total))
            if streams is not None and index >= streams.position:
                streams.follow(job, index, plan)
            continue
        record = _quantize_block(job, decoder, plan, index, streams, block_inputs[index])
        if streams is not None:
            streams.store(record.key)
        job.progress(Event("quantize", "step", f"block {index + 1}/{total}", reasons[index], index + 1, total))
    if streams is not None:
        streams.remove()
    records = []
    for index in range(total):
        finished_block = load_block_record(job, index)
        assert finished_block is not None
        records += finished_block.records
    shards = [shard_path(job, index) for index in range(total)]
    return Work((*shards, *(path.with_suffix(".json") for path in shards)), tuple(records))


def _decide_blocks(
    job: Job, decoder: Decoder, plan: Plan, shared: dict[str, str], force: bool
) -> tuple[list[Reason], list[dict[str, str]]]:
    """For each block why it runs, and its inputs. A block runs if its inputs or any block before it changed."""
    reasons: list[Reason] = []
    block_inputs: list[dict[str, str]] = []
    previous = ""
    for index, slots in enumerate(decoder.slots):
        rows = {slot.name: asdict(plan.linears[slot.name]) for slot in slots}
        inputs = {
            **shared,
            "config:plan": key_of({"rows": json.dumps(rows), "scale_dtype": plan.scale_dtype}),
            "input:block before": previous,
        }
        record = load_block_record(job, index)
        if force:
            reason = Reason("forced")
        elif record is None:
            reason = Reason("new")
        else:
            reason = compare_inputs(record.inputs, inputs)
            if not reason.runs and file_sha256(shard_path(job, index)) != record.sha256:
                reason = Reason("output missing", f"{shard_path(job, index).name} is damaged")
        reasons.append(reason)
        block_inputs.append(inputs)
        previous = key_of(inputs)
    return reasons, block_inputs


def _quantize_block(
    job: Job, decoder: Decoder, plan: Plan, index: int, streams: _Streams | None, inputs: dict[str, str]
) -> BlockRecord:
    block = decoder.load_block(index)
    rounded_block = share_weights(block, decoder.slots[index])
    if streams is None:
        rounded = _round_without_streams(job, decoder, plan, index, block)
    else:
        rounded = _round_with_streams(job, decoder, plan, index, block, rounded_block, streams)
        streams.advance_rounded(index, rounded_block)
    path = shard_path(job, index)
    tensors = _block_tensors(decoder, index, block, rounded)
    write_file(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))
    record = BlockRecord(
        inputs=inputs,
        sha256=file_sha256(path),
        relative_errors={name: entry.relative_error for name, entry in rounded.items()},
        records=[f"{name}: {sentence}" for name, entry in rounded.items() for sentence in entry.records],
    )
    write_text(path.with_suffix(".json"), json.dumps(asdict(record), indent=1))
    decoder.release_block(index)
    return record


def _round_with_streams(
    job: Job,
    decoder: Decoder,
    plan: Plan,
    index: int,
    block: nn.Module,
    rounded_block: nn.Module,
    streams: _Streams,
) -> dict[str, RoundedLinear]:
    """Round the block's linears in the order it computes them; `rounded_block` gets the rounded weights.

    The original's stream is behind the block at the end, the rounded one still before it.
    """
    slot_of = {slot.name: slot for slot in decoder.slots[index]}
    rounded: dict[str, RoundedLinear] = {}
    moves_on = False
    parts: list[list[tuple[str, ...]]] = []
    for step in decoder.input_groups(index, block, streams.rounded[:1, :PROBE_TOKENS]):
        quantized = [names for group in step if (names := _quantized_names(group, plan))]
        parts += _parts_in_memory(quantized, slot_of)
    for number, part in enumerate(parts):
        # Routing differs between the streams, so the rows of an expert's two inputs do not correspond.
        with_drift = streams.original is not None and slot_of[part[0][0]].expert is None
        moves_on = with_drift and number == len(parts) - 1
        grams = _accumulate(decoder, index, block, rounded_block, part, slot_of, streams, with_drift, moves_on)
        if moves_on:
            # Of the original's weights only this part's are read from here on; the others make room for its factor.
            for name in rounded:
                if slot_of[name].expert is None:
                    slot_of[name].write(block, slot_of[name].read(rounded_block))
        for group in part:
            gram = grams.pop(group[0])
            results = round_linears(
                {name: slot_of[name].read(block) for name in group},
                {name: plan.linears[name] for name in group},
                _options(job, plan),
                decoder_dtype(decoder, index, slot_of[group[0]]),
                gram.take_hessian(),
                gram.take_drift(),
            )
            for name, result in results.items():
                slot_of[name].write(rounded_block, result.linear.dequantize(torch.float32))
            rounded |= results
    if not moves_on:
        streams.advance_original(index, block)
    return rounded


def _accumulate(
    decoder: Decoder,
    index: int,
    block: nn.Module,
    rounded_block: nn.Module,
    groups: list[tuple[str, ...]],
    slot_of: dict[str, LinearSlot],
    streams: _Streams,
    with_drift: bool,
    moves_on: bool,
) -> dict[str, GramMatrices]:
    """The Gram matrices of some inputs of a block over the calibration text, by the first linear of each.

    Args:
        with_drift: run the original's stream, too.
        moves_on: run it to the end of the block, and leave it there.
    """
    grams = {group[0]: GramMatrices(slot_of[group[0]].in_features, with_drift) for group in groups}
    last = frozenset(grams) if slot_of[groups[0][0]].expert is None else None
    for rows in batches(*streams.rounded.shape[:2]):
        originals: dict[str, torch.Tensor] = {}

        def keep(name: str, value: torch.Tensor, into: dict[str, torch.Tensor] = originals) -> None:
            if name in grams:
                into[name] = value.reshape(-1, value.shape[-1])

        def add(name: str, value: torch.Tensor, originals: dict[str, torch.Tensor] = originals) -> None:
            if name in grams:
                grams[name].add(value.reshape(-1, value.shape[-1]), originals.get(name))

        if with_drift and streams.original is not None:
            output = decoder.run_capturing(index, block, streams.original[rows], keep, None if moves_on else last)
            if moves_on and output is not None:
                streams.original[rows] = output
        decoder.run_capturing(index, rounded_block, streams.rounded[rows], add, last)
    return grams


def _round_without_streams(
    job: Job, decoder: Decoder, plan: Plan, index: int, block: nn.Module
) -> dict[str, RoundedLinear]:
    """Nearest rounding needs no activations but each feature's second moment, which calibrate measured."""
    slot_of = {slot.name: slot for slot in decoder.slots[index]}
    rounded: dict[str, RoundedLinear] = {}
    for entry in load_block_stats(stats_path(job, index)):
        for name in _quantized_names(entry.linears, plan):
            rounded |= round_linears(
                {name: slot_of[name].read(block)},
                {name: plan.linears[name]},
                _options(job, plan),
                decoder_dtype(decoder, index, slot_of[name]),
                importance=entry.second_moment if entry.tokens else None,
            )
    return rounded


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


def decoder_dtype(decoder: Decoder, index: int, slot: LinearSlot) -> torch.dtype:
    """The dtype that a linear's weight is stored in."""
    return decoder.weights.dtype(f"{decoder.block_names[index]}.{slot.parameter}")


def _options(job: Job, plan: Plan) -> RoundingOptions:
    rounding = job.config.rounding
    return RoundingOptions(**rounding.model_dump(), seed=job.config.machine.seed, scale_dtype=plan.scale_dtype)


def _quantized_names(group: tuple[str, ...], plan: Plan) -> tuple[str, ...]:
    return tuple(name for name in group if plan.linears[name].bits < 16)


def _parts_in_memory(groups: list[tuple[str, ...]], slot_of: dict[str, LinearSlot]) -> list[list[tuple[str, ...]]]:
    """Cut a step's groups so that the Gram matrices of each part fit into GRAM_BYTES (one group always does)."""
    parts: list[list[tuple[str, ...]]] = []
    used = GRAM_BYTES
    for group in groups:
        size = 2 * 4 * slot_of[group[0]].in_features ** 2
        if used + size > GRAM_BYTES:
            parts.append([])
            used = 0
        parts[-1].append(group)
        used += size
    return parts


class _Streams:
    """The hidden states [S, T, hidden] of the original and of the model quantized so far, behind `position` blocks.

    `original` is None where no target is corrected for the past: nobody reads it then.
    """

    def __init__(self, job: Job, decoder: Decoder, restored: tuple[int, dict[str, torch.Tensor]] | None) -> None:
        self._decoder = decoder
        self._store = _stream_store(job)
        ids = load_tokens(job)["calibration"]
        decoder.load_outside()
        decoder.embed(ids[:1, :PROBE_TOKENS])
        embedded = torch.cat([decoder.embed(ids[rows]) for rows in batches(*ids.shape)])
        decoder.release_outside()
        corrected = job.config.rounding.target == "corrected"
        self.original: torch.Tensor | None = None
        if restored is None:
            self.position, self.rounded = 0, embedded
            self.original = embedded.clone() if corrected else None
        else:
            self.position, self.rounded = restored[0], restored[1]["rounded"]
            self.original = restored[1].get("original")

    @classmethod
    def needed(cls, job: Job, decoder: Decoder, finished: int, keys: list[str]) -> _Streams | None:
        """The streams, as far as they were stored; None where no block is left or rounding does not read them."""
        if finished == len(keys) or job.config.rounding.method == "nearest":
            return None
        return cls(job, decoder, _stream_store(job).restore(keys[:finished]))

    def advance_original(self, index: int, block: nn.Module) -> None:
        """Run the original's stream through a block."""
        if self.original is not None:
            self._advance(self.original, index, block)

    def advance_rounded(self, index: int, rounded_block: nn.Module) -> None:
        """Run the rounded model's stream through a block."""
        self._advance(self.rounded, index, rounded_block)
        self.position = index + 1

    def _advance(self, stream: torch.Tensor, index: int, block: nn.Module) -> None:
        for rows in batches(*stream.shape[:2]):
            stream[rows] = self._decoder.run(index, block, stream[rows])

    def follow(self, job: Job, index: int, plan: Plan) -> None:
        """Run both streams through a finished block, from its shard."""
        block = self._decoder.load_block(index)
        rounded_block = share_weights(block, self._decoder.slots[index])
        tensors = load_file(shard_path(job, index))
        for slot in self._decoder.slots[index]:
            linear_plan = plan.linears[slot.name]
            if linear_plan.bits < 16:
                own = {
                    name.removeprefix(f"{slot.name}."): tensor
                    for name, tensor in tensors.items()
                    if name.startswith(f"{slot.name}.")
                }
                linear = QuantizedLinear.from_tensors(own, slot.in_features, linear_plan.bits, linear_plan.group_size)
                slot.write(rounded_block, linear.dequantize(torch.float32))
        self.advance_original(index, block)
        self.advance_rounded(index, rounded_block)
        self._decoder.release_block(index)

    def store(self, key: str) -> None:
        streams = {"rounded": self.rounded}
        if self.original is not None:
            streams["original"] = self.original
        self._store.store_if_due(key, streams)

    def remove(self) -> None:
        self._store.remove()


def _stream_store(job: Job) -> StreamStore:
    return StreamStore(job.run.file("quantize/streams.safetensors"))
