"""profile: which input features stay in 16 bits, and how every linear is stored. Arithmetic on small files.

Each format that was asked for gets the plan that is best for what it holds (formats.capabilities). It leaves plan.json
(quant.plan.Plan) and outliers.html (a picture of where the outliers are) in the run directory, or for another format
than the native one in a directory below it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain, starmap
from pathlib import Path

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.formats import FORMATS
from accullm_cli.formats.base import ModelShape, Stack
from accullm_cli.formats.capabilities import CAPABILITIES, WHOLE_ROWS, Storable
from accullm_cli.formats.objections import nearest_group_sizes, objections
from accullm_cli.formats.shards import dtype_name
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.embeddings import EmbeddingSlot, find_embeddings
from accullm_cli.quant.budget import Choices
from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.encodings.base import MEASURED_BITS
from accullm_cli.quant.outliers import choose_outliers
from accullm_cli.quant.plan import KEPT_BITS, LinearPlan, Plan
from accullm_cli.quant.stats import InputStats
from accullm_cli.report.outlier_map import draw_outlier_map
from accullm_cli.run import key_of, write_text
from accullm_cli.stages.calibrate import load_block_stats, stats_path
from accullm_cli.stages.file_size import file_bytes, within_file
from accullm_cli.stages.gradients import load_sensitivities
from accullm_cli.stages.job import Job, open_decoder, place_of, section_inputs
from accullm_cli.stages.kept import FLAG, kept_names, kept_sentence
from accullm_cli.stages.losses import embedding_losses, feature_losses
from accullm_cli.stages.stage import Before, Decision, Stage, Work, named

VERSION = 3
# What a linear may get where --bits is an average. On a grid of 2 bits rounding is no longer the small change that
# losses are measured for.
WIDTHS = {"widths": (3, 4, 5, 6, 8), "outliers": (4,)}
# Where nobody says otherwise.
USUAL_OUTLIERS = 0.005
USUAL_SCALE_BITS = 6
USUAL_EMBEDDING_BITS = 8
# What the kernels are made for.
LARGEST_OUTLIER_FRACTION = 0.03


def profile(job: Job, decision: Decision) -> Work:
    """Choose outlier features by the loss they are expected to save, and write the plan."""
    decoder = open_decoder(job)
    stats = load_stats(job, decoder)
    plan = make_plan(job, decoder, stats)
    refuse_impossible(job, plan, decoder)
    plan_path, picture = job.own("plan.json"), job.own("outliers.html")
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
        "version:capabilities": key_of({job.format: repr(CAPABILITIES[job.format])}),
        "config:export.scale_dtype": scale_dtype(job),
        **section_inputs("plan", options, "bits", "symmetric", "embedding_bits", "keep"),
        **({} if options.file_size is None else {"config:plan.file_size": str(file_bytes(options.file_size))}),
        **spend,
        "config:plan.outliers": repr(outlier_fraction(job)),
        "config:plan.group_size": repr(options.group_sizes) + (" or near" if _may_choose_groups(job) else ""),
        "config:plan.scale_bits": str(scale_bits(job)),
    }


def planning(format: str) -> Stage:
    """The stage that plans for a format."""
    place = place_of(format)
    return Stage(
        named("profile", format),
        lambda job, before: profile_inputs(job.of(format), before),
        lambda job, decision: profile(job.of(format), decision),
        ("calibrate",),
        ("profile",),
        (f"{place}plan.json", f"{place}outliers.html"),
        format,
    )


def make_plan(job: Job, decoder: Decoder, stats: list[InputStats] | None = None) -> Plan:
    """The plan of the configuration; without statistics (before calibration) what it chooses is a placeholder.

    What the user asked for stands in it, also where the format cannot hold it: see `refuse_impossible`.
    """
    options = job.config.plan
    embeddings = _embedding_plans(job, decoder)
    if options.is_average:
        choices = average_choices(job, decoder, stats)
        counted = _counted_embeddings(job, decoder)

        def sorted_out(chosen: Plan) -> Plan:
            linears = {name: row for name, row in chosen.linears.items() if name not in counted}
            return Plan(linears, scale_dtype(job), embeddings | {name: chosen.linears[name] for name in counted})

        if options.file_size is None:
            return sorted_out(choices.within(options.bits))
        return within_file(job, model_shape(job, decoder), choices, sorted_out)
    sensitivity_of = load_sensitivities(job, len(decoder.block_names)) if stats is not None else {}
    losses = feature_losses(stats, options.uniform_group_size, sensitivity_of)
    linears = _uniform_linears(job, decoder, int(options.bits))
    fraction = outlier_fraction(job)
    for name, plan in linears.items():
        if plan.bits != KEPT_BITS:
            loss = losses.get(name, torch.zeros(plan.in_features))
            linears[name] = replace(plan, outlier_index=choose_outliers(loss, fraction))
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
    asked, format = job.config.plan.embedding_bits, CAPABILITIES[job.format]
    bits = asked or (USUAL_EMBEDDING_BITS if format.counts_embeddings else KEPT_BITS)
    if bits == KEPT_BITS or _counted_embeddings(job, decoder):
        return {}
    # One that holds none objects to what was asked for, whatever it is.
    ways = format.embeddings or format.linears
    return {slot.name: _embedding_row(job, decoder, slot, ways, bits) for slot in _rounded_embeddings(job, decoder)}


def _rounded_embeddings(job: Job, decoder: Decoder) -> list[EmbeddingSlot]:
    """Those that no --keep leaves as they are."""
    kept, outer = _kept(job, decoder), _outer_names(decoder)
    return [
        slot
        for slot in find_embeddings(decoder.model)
        if not ((slot.is_looked_up and outer["looked up"] in kept) or (slot.is_head and outer["head"] in kept))
    ]


def _counted_embeddings(job: Job, decoder: Decoder) -> tuple[str, ...]:
    """The embeddings that are planned with the linears: where bits are an average over all that a format stores."""
    options = job.config.plan
    if not (options.is_average and options.embedding_bits is None and CAPABILITIES[job.format].counts_embeddings):
        return ()
    return tuple(slot.name for slot in _rounded_embeddings(job, decoder))


def _embedding_row(job: Job, decoder: Decoder, slot: EmbeddingSlot, ways: Sequence[Storable], bits: int) -> LinearPlan:
    row = LinearPlan(
        name=slot.name,
        out_features=slot.out_features,
        in_features=slot.in_features,
        bits=bits,
        group_size=job.config.plan.uniform_group_size,
        symmetric=False,
        source_itemsize=decoder.weights.dtype(slot.parameter).itemsize,
    )
    return _stored_like(job, row, ways)


def _stored_like(job: Job, row: LinearPlan, ways: Sequence[Storable]) -> LinearPlan:
    """A row by the first way of its width that it can be stored in; where there is none, by one that is objected to."""
    found = [
        replace(
            row,
            encoding=way.encoding,
            group_size=_group_size(job, way, row.in_features),
            symmetric=_symmetric(job, way),
        )
        for way in [way for way in ways if row.bits in way.bits] or ways[:1]
    ]
    return next((own for own in found if not ENCODINGS[own.encoding].problem(own)), found[0])


def average_choices(job: Job, decoder: Decoder, stats: list[InputStats] | None = None) -> Choices:
    """What a plan chooses from where bits are an average; without statistics all features count alike."""
    options = job.config.plan
    linears = _uniform_linears(job, decoder)
    counted = _counted_embeddings(job, decoder)
    ways = CAPABILITIES[job.format].embeddings
    for slot in find_embeddings(decoder.model) if counted else ():
        if slot.name in counted:
            linears[slot.name] = _embedding_row(job, decoder, slot, ways, MEASURED_BITS)
    fraction = LARGEST_OUTLIER_FRACTION if outlier_fraction(job) else 0.0
    partners = _partners(job, decoder)
    rows = {name: _ways(job, plan, _shared_features(plan, linears, partners)) for name, plan in linears.items()}
    chosen = [name for name, plan in linears.items() if plan.bits != KEPT_BITS and rows[name]]
    sizes = {name: tuple(dict.fromkeys(row.group_size for row in rows[name])) for name in chosen}
    if stats is None:
        losses = {name: dict.fromkeys(sizes[name], torch.ones(linears[name].in_features)) for name in chosen}
    else:
        # Of an expert that no token reached, or none with a gradient, nothing is known: it keeps its bits.
        sensitivity_of = load_sensitivities(job, len(decoder.block_names))
        reached = {name for entry in stats if entry.tokens for name in entry.linears if sensitivity_of[name].any()}
        by_size = {
            size: feature_losses(stats, size, sensitivity_of)
            for size in sorted({size for own in sizes.values() for size in own})
        }
        losses = {name: {size: by_size[size][name] for size in sizes[name]} for name in chosen if name in reached}
        losses |= {name: embedding_losses(job, name, sizes[name]) for name in counted}
    format, dtype = FORMATS[job.format], source_dtype(job)
    together = [names for names in partners if all(name in rows and rows[name] for name in names)]
    return Choices(
        linears, losses, WIDTHS[options.spend], fraction, rows, together, lambda plan: format.linear_bytes(plan, dtype)
    )


def _uniform_linears(job: Job, decoder: Decoder, bits: int = MEASURED_BITS) -> dict[str, LinearPlan]:
    """Every linear with the same bits, without outliers; or at KEPT_BITS."""
    kept, format = _kept(job, decoder), CAPABILITIES[job.format]
    linears = {
        slot.name: _stored_like(
            job,
            LinearPlan(
                name=slot.name,
                out_features=slot.out_features,
                in_features=slot.in_features,
                bits=bits,
                group_size=job.config.plan.uniform_group_size,
                scale_bits=scale_bits(job),
                symmetric=False,
                source_itemsize=decoder.weights.dtype(f"{block}.{slot.parameter}").itemsize,
            ),
            format.linears,
        )
        for block, slots in zip(decoder.block_names, decoder.slots, strict=True)
        for slot in slots
    }
    partners = _partners(job, decoder)
    shared = {name: _shared_features(plan, linears, partners) for name, plan in linears.items()}
    storable = {name: format.storable(plan) or format.linears[0] for name, plan in linears.items()}
    return {
        name: replace(
            plan,
            bits=KEPT_BITS if name in kept else bits,
            group_size=_group_size(job, storable[name], shared[name]),
        )
        for name, plan in linears.items()
    }


def _ways(job: Job, plan: LinearPlan, features: int) -> list[LinearPlan]:
    """All rows by which the format can store a linear, of the widths and group sizes that are to choose from.

    Args:
        features: that groups must divide, where they must divide any.
    """
    options, format = job.config.plan, CAPABILITIES[job.format]
    widths = [bits for bits in WIDTHS[options.spend] if bits in format.bits] or format.bits
    found = []
    for storable in format.linears:
        sizes = [size for size in options.group_sizes if storable.holds_group_size(size, features)]
        if not sizes and options.group_size is None:
            sizes = [_group_size(job, storable, features)]
        row = replace(plan, encoding=storable.encoding, symmetric=_symmetric(job, storable))
        found += [
            replace(row, bits=bits, group_size=size)
            for size in sizes
            for bits in widths
            if bits in storable.bits and storable.holds_group_size(size, features) and storable.holds_scales(row)
        ]
    return [row for row in found if not ENCODINGS[row.encoding].problem(row)]


def _partners(job: Job, decoder: Decoder) -> tuple[tuple[str, ...], ...]:
    """The linears that the format's runtime needs alike."""
    return CAPABILITIES[job.format].partners({slot.name: slot.kind for slots in decoder.slots for slot in slots})


def _shared_features(plan: LinearPlan, linears: Mapping[str, LinearPlan], partners: tuple[tuple[str, ...], ...]) -> int:
    """What divides the input features of a linear and of its partners."""
    own = next((names for names in partners if plan.name in names), (plan.name,))
    return math.gcd(*(linears[name].in_features for name in own))


def _group_size(job: Job, storable: Storable, features: int) -> int:
    """The group size that was asked for; else the one of those that may be stored that is nearest to the usual."""
    options, usual = job.config.plan, job.config.plan.uniform_group_size
    if options.group_size is not None or storable.holds_group_size(usual, features):
        return usual
    sizes = storable.group_sizes or nearest_group_sizes(usual, features)
    usable = [size for size in sizes if size > 0 and storable.holds_group_size(size, features)]
    if usable:
        return min(usable, key=lambda size: (abs(size - usual), size))
    return WHOLE_ROWS if storable.holds_group_size(WHOLE_ROWS, features) else usual


def _may_choose_groups(job: Job) -> bool:
    """Whether a group size that nobody asked for may differ from linear to linear."""
    return job.config.plan.group_size is None and any(entry.whole_groups for entry in CAPABILITIES[job.format].linears)


def _symmetric(job: Job, storable: Storable) -> bool:
    """As asked for; where nobody asked, symmetric if there is nothing else."""
    return job.config.plan.symmetric or False not in storable.symmetric


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
    of_the_model = CAPABILITIES[job.format].scale_dtype == "of the model"
    return "bfloat16" if of_the_model and source_dtype(job) == torch.bfloat16 else "float16"


def scale_bits(job: Job) -> int:
    """As asked for; else those of a table, where the format has such."""
    asked, held = job.config.plan.scale_bits, CAPABILITIES[job.format].linears[0].scale_bits
    return asked or (USUAL_SCALE_BITS if USUAL_SCALE_BITS in held else 16)


def outlier_fraction(job: Job) -> float:
    """As asked for; else the usual share, where the format holds outliers in the file."""
    if job.config.plan.outliers is not None:
        return job.config.plan.outliers
    return USUAL_OUTLIERS if CAPABILITIES[job.format].outliers == "in the file" else 0.0


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
    tied = decoder.model.all_tied_weights_keys
    shapes = {name: tuple(value.shape) for name, value in decoder.model.named_parameters() if name not in tied}
    return ModelShape(
        str(job.source.config.get("model_type", "")),
        source_dtype(job),
        kinds,
        stacks,
        config={key: value for key, value in job.source.config.items() if key != "quantization_config"},
        companions=job.source.companions,
        parameters=shapes,
        kept=job.source.kept,
    )


def refuse_impossible(job: Job, plan: Plan, decoder: Decoder) -> None:
    """Ask the format whether it can hold the plan.

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
    for objection in objections(job.format, plan, shape):
        raise AccullmError(objection.what, f"--format {job.format}", objection.hint)
