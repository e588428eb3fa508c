"""quantize: round every linear, block by block, each block into a shard of its own.

Two streams of hidden states go through the blocks: the original model's, and that of the model quantized so far.
Within a block the linears are rounded in the order the block computes them, so that each one is rounded for the
input it will really get, and its target makes up for what was lost before it (see quant.rounding). An embedding that
is only looked up is rounded before the blocks, if it is to be quantized at all, and the output head behind them.

Rounding happens on the device that was asked for (quant.rounding); streams, Hessians and all else stay on the CPU.

It leaves in the run directory, for each block,
    quantize/block-00000.safetensors    the block as the native format stores it (docs/format.md)
    quantize/block-00000.json           its key, relative errors and records
and the same for `embedding` and `head` where these are quantized; `head` is both where they are tied. Shards for
another format than the native one lie in a directory below; what two formats have alike, from the first block on, is
rounded once.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import torch
from torch import nn

from accullm_cli.formats.shards import link_or_copy
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.embeddings import EmbeddingSlot
from accullm_cli.model.slots import share_weights
from accullm_cli.progress import Event
from accullm_cli.quant.plan import Plan
from accullm_cli.quant.rounding import RoundedLinear
from accullm_cli.run import UP_TO_DATE, Reason, compare_inputs, file_sha256, key_of
from accullm_cli.stages.block_rounding import BlockPair, round_with_streams, round_without_streams
from accullm_cli.stages.embedding_rounding import head_gram, round_embedding
from accullm_cli.stages.job import Job, open_decoder, place_of, section_inputs
from accullm_cli.stages.profile import load_plan
from accullm_cli.stages.stage import Before, Decision, Stage, Work, named
from accullm_cli.stages.two_streams import TwoStreams
from accullm_cli.stages.units import Unit, UnitRecord, load_record, shard_path, units_of, write_unit

VERSION = 6


def quantize(job: Job, decision: Decision) -> Work:
    """Round every linear of the plan; finished blocks whose inputs did not change are kept."""
    plan = load_plan(job.own("plan.json"))
    # What is particular to a block comes from its rows of the plan, not from the plan as a whole.
    shared = {name: value for name, value in decision.inputs.items() if not name.startswith("input:profile")}
    with job.compute.products("float32"):
        return _quantize(job, open_decoder(job), plan, shared, decision.reason.code == "forced")


def quantize_inputs(job: Job, before: Before) -> dict[str, str]:
    """What the shards depend on."""
    rounding = job.config.rounding
    # Nearest rounding multiplies no activations, and only stochastic rounding draws numbers.
    streams: dict[str, str] = {}
    if rounding.method != "nearest":
        streams = section_inputs("rounding", rounding, "outlier_mode", "target", "damping")
        streams["machine:precision"] = job.compute.precision
    seed = {"config:machine.seed": str(job.config.machine.seed)} if rounding.method == "stochastic" else {}
    return {
        "source:sha256": job.source.sha256,
        "version:quantize": str(VERSION),
        "input:calibrate": before["calibrate"].key,
        f"input:{(planned := named('profile', job.format))}": before[planned].key,
        **section_inputs("rounding", rounding, "method", "grid"),
        **streams,
        **seed,
        **job.compute.inputs(),
    }


def rounding(format: str) -> Stage:
    """The stage that rounds as the plan for a format says."""
    return Stage(
        named("quantize", format),
        lambda job, before: quantize_inputs(job.of(format), before),
        lambda job, decision: quantize(job.of(format), decision),
        ("calibrate", named("profile", format)),
        ("quantize",),
        (f"{place_of(format)}quantize/*",),
        format,
    )


# -- the stage, top to bottom ------------------------------------------------------------------------------


def _quantize(job: Job, decoder: Decoder, plan: Plan, shared: dict[str, str], force: bool) -> Work:
    units = units_of(decoder, plan)
    total = len(units)
    reasons, unit_inputs = _decide_units(job, units, plan, shared, force)
    finished = next((number for number, reason in enumerate(reasons) if reason.runs), total)
    streams: TwoStreams | None = None
    for number, unit in enumerate(units):
        if unit.block == 0:
            # Behind a quantized embedding, as the rounded model's stream begins with it.
            streams = TwoStreams.needed(job, decoder, units, finished, unit_inputs)
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
        if not force and (record is None or record.inputs != inputs) and _take_over(job, unit, inputs):
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


def _take_over(job: Job, unit: Unit, inputs: dict[str, str]) -> bool:
    """Link the shard that was made for another format of this conversion from the same inputs; whether there is one."""
    for other in map(job.of, job.config.export.format):
        record, shard = load_record(other, unit.name), shard_path(other, unit.name)
        if other.format != job.format and record is not None and record.inputs == inputs:
            if file_sha256(shard) == record.sha256:
                own = shard_path(job, unit.name)
                own.parent.mkdir(parents=True, exist_ok=True)
                for path in (own, own.with_suffix(".json")):
                    path.unlink(missing_ok=True)
                link_or_copy(shard, own)
                link_or_copy(shard.with_suffix(".json"), own.with_suffix(".json"))
                return True
    return False


def _quantize_block(
    job: Job, decoder: Decoder, plan: Plan, unit: Unit, index: int, streams: TwoStreams | None, inputs: dict[str, str]
) -> UnitRecord:
    block = decoder.load_block(index)
    pair = BlockPair(decoder, index, block, share_weights(block))
    if streams is None:
        rounded = round_without_streams(job, plan, pair)
    else:
        rounded = round_with_streams(job, plan, pair, streams.original, streams.rounded)
        streams.position = index + 1
    record = write_unit(
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
    streams: TwoStreams | None,
    inputs: dict[str, str],
) -> UnitRecord:
    gram = None
    if slot.is_head and streams is not None:
        gram = head_gram(job, decoder, slot, streams.original, streams.rounded)
    tensors, records = round_embedding(job, decoder, plan, slot, gram)
    named = {f"{slot.name}.{suffix}": tensor for suffix, tensor in tensors.items()}
    return write_unit(job, unit, inputs, named, {}, [f"{slot.name}: {sentence}" for sentence in records])


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
