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
from accullm_cli.model.slots import share_weights
from accullm_cli.progress import Event
from accullm_cli.quant.linear import QuantizedLinear
from accullm_cli.quant.plan import Plan
from accullm_cli.quant.rounding import RoundedLinear
from accullm_cli.run import UP_TO_DATE, Reason, compare_inputs, file_sha256, key_of, write_file, write_text
from accullm_cli.stages.block_rounding import BlockPair, round_with_streams, round_without_streams
from accullm_cli.stages.calibrate import PROBE_TOKENS, load_tokens, open_decoder
from accullm_cli.stages.job import Job, StageOutcome, Work, machine_inputs, run_stage, section_inputs
from accullm_cli.stages.precision import precision_of, products
from accullm_cli.stages.profile import load_plan
from accullm_cli.stages.streams import StreamStore

VERSION = 3


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
        **machine_inputs(),
        "machine:precision": precision_of(job),
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
    pair = BlockPair(decoder, index, block, share_weights(block, decoder.slots[index]))
    if streams is None:
        rounded = round_without_streams(job, plan, pair)
    else:
        rounded = round_with_streams(job, plan, pair, streams.original, streams.rounded)
        streams.advance_rounded(index, pair.rounded)
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


class _Streams:
    """The hidden states [S, T, hidden] of the original and of the model quantized so far, behind `position` blocks.

    `original` is None where nobody reads it: no target is corrected for the past, and there are no gradients.
    """

    def __init__(self, job: Job, decoder: Decoder, restored: tuple[int, dict[str, torch.Tensor]] | None) -> None:
        self._decoder = decoder
        self._precision = precision_of(job)
        self._store = _stream_store(job)
        ids = load_tokens(job)["calibration"]
        decoder.load_outside()
        decoder.embed(ids[:1, :PROBE_TOKENS])
        embedded = torch.cat([decoder.embed(ids[rows]) for rows in batches(*ids.shape)])
        decoder.release_outside()
        reads_original = job.config.rounding.target == "corrected" or job.config.gradient_samples > 0
        self.original: torch.Tensor | None = None
        if restored is None:
            self.position, self.rounded = 0, embedded
            self.original = embedded.clone() if reads_original else None
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
        with products(self._precision):
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
