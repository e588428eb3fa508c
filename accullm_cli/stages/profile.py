"""profile: which input features stay in 16 bits, and how every linear is stored. Arithmetic on small files.

It leaves plan.json (quant.plan.Plan) and outliers.html (a picture of where the outliers are) in the run directory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import chain, starmap
from pathlib import Path

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.formats.base import ModelShape, Stack
from accullm_cli.formats.capabilities import CAPABILITIES, KEPT_BITS
from accullm_cli.formats.objections import objections
from accullm_cli.formats.shards import dtype_name
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.embeddings import find_embeddings
from accullm_cli.quant.budget import MEASURED_BITS, Choices
from accullm_cli.quant.outliers import choose_outliers, expected_loss
from accullm_cli.quant.plan import LinearPlan, Plan
from accullm_cli.quant.stats import InputStats
from accullm_cli.report.outlier_map import draw_outlier_map
from accullm_cli.run import write_text
from accullm_cli.stages.calibrate import DAMAGE_GROUP_SIZES, load_block_stats, stats_path
from accullm_cli.stages.gradients import load_sensitivities
from accullm_cli.stages.job import Job, open_decoder, section_inputs
from accullm_cli.stages.kept import FLAG, kept_names, kept_sentence
from accullm_cli.stages.stage import Before, Decision, Stage, Work

VERSION = 2
# What a linear may get where --bits is an average. On a grid of 2 bits rounding is no longer the small change that
# losses are measured for.
WIDTHS = {"widths": (3, 4, 5, 6, 8), "outliers": (4,)}
# What the kernels are made for.
LARGEST_OUTLIER_FRACTION = 0.03


def profile(job: Job, decision: Decision) -> Work:
    """Choose outlier features by the loss they are expected to save, and write the plan."""
    decoder = open_decoder(job)
    stats = load_stats(job, decoder)
    plan = make_plan(job, decoder, stats)
    refuse_impossible(job, plan, decoder)
    plan_path, picture = job.run.file("plan.json"), job.run.file("outliers.html")
    write_text(plan_path, json.dumps(asdict(plan), indent=1))
    draw_outlier_map(stats, plan, picture)
    kept = starmap(kept_sentence, kept_linears(job, decoder).items())
    return Work((plan_path, picture), (*kept, *decoder.structure.records))


def load_stats(job: Job, decoder: Decoder) -> list[InputStats]:
    """What calibrate measured of every distinct input of the model."""
    return [entry for index in range(len(decoder.block_names)) for entry in load_block_stats(stats_path(job, index))]


def profile_inputs(job: Job, before: Before) -> dict[str, str]:
    """What the plan depends on."""
    options = job.config.plan
    spend = section_inputs("plan", options, "spend") if options.is_average else {}
    return {
        "input:calibrate": before["calibrate"].key,
        "version:profile": str(VERSION),
        "config:export.scale_dtype": scale_dtype(job),
        **section_inputs("plan", options, "bits", "symmetric", "outliers", "embedding_bits", "keep"),
        **spend,
        "config:plan.group_size": repr(options.group_sizes),
        "config:plan.scale_bits": str(scale_bits(job)),
    }


PROFILE = Stage("profile", profile_inputs, profile, ("calibrate",), ("profile",), ("plan.json", "outliers.html"))


def make_plan(job: Job, decoder: Decoder, stats: list[InputStats] | None = None) -> Plan:
    """The plan of the configuration; without statistics (before calibration) what it chooses is a placeholder."""
    options = job.config.plan
    embeddings = _embedding_plans(job, decoder)
    if options.is_average:
        plan_within = average_choices(job, decoder, stats).within(options.bits)
        return replace(plan_within, scale_dtype=scale_dtype(job), embeddings=embeddings)
    losses = _losses(stats, options.uniform_group_size)
    linears = _uniform_linears(job, decoder)
    for name, plan in linears.items():
        if plan.bits == KEPT_BITS:
            continue
        loss = losses.get(name, torch.zeros(plan.in_features))
        linears[name] = replace(plan, bits=int(options.bits), outlier_index=choose_outliers(loss, options.outliers))
    return Plan(linears, scale_dtype(job), embeddings)


def kept_linears(job: Job, decoder: Decoder) -> Mapping[str, tuple[str, ...]]:
    """For each pattern of `--keep` the linears that it leaves in 16 bits; embedding and output head are among them.

    Raises:
        AccullmError: a pattern matches nothing.
    """
    patterns = job.config.plan.keep
    if not patterns:
        return {}
    linears = [slot.name for slots in decoder.slots for slot in slots]
    return kept_names(patterns, [*linears, *_outer_names(decoder).values()])


def _outer_names(decoder: Decoder) -> dict[str, str]:
    """The names of the token embedding ("looked up") and of the output head ("head")."""
    name_of = {module: name for name, module in decoder.model.named_modules()}
    modules = {"looked up": decoder.model.get_input_embeddings(), "head": decoder.model.get_output_embeddings()}
    return {use: name_of[module] for use, module in modules.items() if module in name_of}


def _kept(job: Job, decoder: Decoder) -> set[str]:
    return set(chain.from_iterable(kept_linears(job, decoder).values()))


def _embedding_plans(job: Job, decoder: Decoder) -> dict[str, LinearPlan]:
    """How embedding and output head are quantized; empty where they are kept.

    They are rounded in parts, and each would have a table of its own: their scales are float16.
    """
    options = job.config.plan
    if options.embedding_bits == KEPT_BITS:
        return {}
    kept, outer = _kept(job, decoder), _outer_names(decoder)
    return {
        slot.name: LinearPlan(
            name=slot.name,
            out_features=slot.out_features,
            in_features=slot.in_features,
            bits=options.embedding_bits,
            group_size=options.uniform_group_size,
            symmetric=options.symmetric,
            source_itemsize=decoder.weights.dtype(slot.parameter).itemsize,
        )
        for slot in find_embeddings(decoder.model)
        if not ((slot.is_looked_up and outer["looked up"] in kept) or (slot.is_head and outer["head"] in kept))
    }


def average_choices(job: Job, decoder: Decoder, stats: list[InputStats] | None = None) -> Choices:
    """What a plan chooses from where bits are an average; without statistics all features count alike."""
    options = job.config.plan
    linears = _uniform_linears(job, decoder)
    fraction = LARGEST_OUTLIER_FRACTION if options.outliers else 0.0
    sizes = options.group_sizes
    chosen = [name for name, plan in linears.items() if plan.bits != KEPT_BITS]
    if stats is None:
        losses = {name: dict.fromkeys(sizes, torch.ones(linears[name].in_features)) for name in chosen}
    else:
        # Of an expert that no token reached, or none with a gradient, nothing is known: it keeps its bits.
        sensitivity_of = load_sensitivities(job, len(decoder.block_names))
        reached = {name for entry in stats if entry.tokens for name in entry.linears if sensitivity_of[name] > 0}
        by_size = {size: _losses(stats, size) for size in sizes}
        losses = {
            name: {size: sensitivity_of[name] * by_size[size][name] for size in sizes}
            for name in chosen
            if name in reached
        }
    return Choices(linears, losses, WIDTHS[options.spend], fraction)


def _losses(stats: list[InputStats] | None, group_size: int) -> dict[str, torch.Tensor]:
    """The output error [K] that rounding each input feature of a linear to MEASURED_BITS is expected to cause."""
    measured = _nearest_group_size(group_size)
    return {
        name: expected_loss(entry.second_moment, entry.damage[name][measured])
        for entry in stats or ()
        for name in entry.linears
    }


def _uniform_linears(job: Job, decoder: Decoder) -> dict[str, LinearPlan]:
    """Every linear at MEASURED_BITS, without outliers; or at KEPT_BITS."""
    options = job.config.plan
    kept = _kept(job, decoder)
    return {
        slot.name: LinearPlan(
            name=slot.name,
            out_features=slot.out_features,
            in_features=slot.in_features,
            bits=KEPT_BITS if slot.name in kept else MEASURED_BITS,
            group_size=options.uniform_group_size,
            scale_bits=scale_bits(job),
            symmetric=options.symmetric,
            source_itemsize=decoder.weights.dtype(f"{block}.{slot.parameter}").itemsize,
        )
        for block, slots in zip(decoder.block_names, decoder.slots, strict=True)
        for slot in slots
    }


def load_plan(path: Path) -> Plan:
    """The plan that `profile` wrote."""
    content = json.loads(path.read_text())
    linears, embeddings = (
        {
            name: replace(LinearPlan(**entry), outlier_index=tuple(entry["outlier_index"]))
            for name, entry in content[part].items()
        }
        for part in ("linears", "embeddings")
    )
    return Plan(linears, content["scale_dtype"], embeddings)


def scale_dtype(job: Job) -> str:
    """Where a format stores scales in the model's dtype, those for a bfloat16 model must be exact in both."""
    formats = [CAPABILITIES[name] for name in job.config.export.format]
    of_the_model = any(format.scale_dtype == "of the model" for format in formats)
    return "bfloat16" if of_the_model and source_dtype(job) == torch.bfloat16 else "float16"


def scale_bits(job: Job) -> int:
    """As configured; where no format has tables, every scale may be a float16 of its own."""
    formats = [CAPABILITIES[name] for name in job.config.export.format]
    only = {bits for format in formats for storable in format.linears for bits in storable.scale_bits}
    return 16 if only == {16} else job.config.plan.scale_bits


def source_dtype(job: Job) -> torch.dtype:
    """The dtype of most of the source's weights."""
    count: dict[torch.dtype, int] = {}
    for info in job.source.tensors.values():
        count[info.torch_dtype] = count.get(info.torch_dtype, 0) + int(torch.tensor(info.shape).prod())
    return max(count, key=lambda dtype: count[dtype])


def model_shape(job: Job, decoder: Decoder) -> ModelShape:
    """What formats ask about the model before any weight is read."""
    kinds = {slot.name: slot.kind for slots in decoder.slots for slot in slots}
    stacks = {
        f"{block}.{slot.parameter}": Stack(slot.experts, slot.transposed)
        for block, slots in zip(decoder.block_names, decoder.slots, strict=True)
        for slot in slots
        if slot.expert == 0 and (slot.transposed or decoder.model.get_parameter(f"{block}.{slot.parameter}").dim() == 2)
    }
    return ModelShape(str(job.source.config.get("model_type", "")), source_dtype(job), kinds, stacks)


def refuse_impossible(job: Job, plan: Plan, decoder: Decoder) -> None:
    """Ask every requested format whether it can hold the plan.

    Raises:
        AccullmError: with the first objection and the nearest plan that fits; or outliers in several dtypes; or nothing
            is quantized.
    """
    shape = model_shape(job, decoder)
    if not plan.quantized:
        raise AccullmError("keeps every linear, so that nothing is left to round", FLAG, "keep fewer")
    for block, slots in zip(decoder.block_names, decoder.slots, strict=True):
        for slot in slots:
            dtype = decoder.weights.dtype(f"{block}.{slot.parameter}")
            if dtype != shape.dtype and plan.linears[slot.name].outlier_index:
                raise AccullmError(
                    f"{slot.name} is stored in {dtype_name(dtype)} and most weights in {dtype_name(shape.dtype)}, "
                    "but an artifact keeps all outliers in one dtype",
                    job.source.directory,
                    "use --outliers 0, or convert the checkpoint to one dtype",
                )
    for name in job.config.export.format:
        for objection in objections(name, plan, shape):
            raise AccullmError(objection.what, f"--format {name}", objection.hint)


def _nearest_group_size(group_size: int) -> int:
    """The group size, of those that damage was measured for, that is nearest to the plan's."""
    if group_size == -1:
        return -1
    return min((size for size in DAMAGE_GROUP_SIZES if size > 0), key=lambda size: abs(size - group_size))
