"""profile: which input features stay in 16 bits, and how every linear is stored. Arithmetic on small files.

Each format that was asked for gets the plan that is best for what it holds (formats.capabilities). It leaves plan.json
(quant.plan.Plan) and outliers.html (a picture of where the outliers are) in the run directory, or for another format
than the native one in a directory below it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from itertools import starmap
from pathlib import Path

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.formats import FORMATS
from accullm_cli.formats.adapters import linear_bytes
from accullm_cli.formats.capabilities import CAPABILITIES
from accullm_cli.formats.objections import objections
from accullm_cli.formats.shards import dtype_name
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.embeddings import find_embeddings
from accullm_cli.quant.budget import Choices
from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.encodings.base import MEASURED_BITS
from accullm_cli.quant.outliers import choose_outliers
from accullm_cli.quant.plan import KEPT_BITS, LinearPlan, Plan
from accullm_cli.quant.stats import InputStats
from accullm_cli.report.outlier_map import draw_outlier_map
from accullm_cli.run import key_of, write_text
from accullm_cli.stages.calibrate import load_block_stats, stats_path
from accullm_cli.stages.file_size import file_bytes, pace_asked_for, pace_sentences, within_file
from accullm_cli.stages.gradients import load_sensitivities
from accullm_cli.stages.job import Job, open_decoder, place_of, section_inputs
from accullm_cli.stages.kept import FLAG, kept_sentence
from accullm_cli.stages.losses import embedding_losses, feature_losses
from accullm_cli.stages.model_shape import model_shape, source_dtype
from accullm_cli.stages.outlier_adapter import (
    adapter_kind,
    adapter_sentences,
    feature_counts,
    largest_ranks,
    plan_average,
)
from accullm_cli.stages.rows import (
    WIDTHS,
    capabilities_of,
    counted_embeddings,
    embedding_row,
    embedding_rows,
    has_larger_groups,
    kept_linears,
    kinds_of,
    may_choose_groups,
    partners_of,
    shared_features,
    storable_rows,
    uniform_rows,
    zero_point_sentences,
)
from accullm_cli.stages.stage import Before, Decision, Stage, Work, named

VERSION = 4
# Where nobody says otherwise.
USUAL_OUTLIERS = 0.005
# What the kernels are made for.
LARGEST_OUTLIER_FRACTION = 0.03


def profile(job: Job, decision: Decision) -> Work:
    """Choose outlier features by the loss they are expected to save, and write the plan."""
    decoder = open_decoder(job)
    stats = load_stats(job, decoder)
    choices = average_choices(job, decoder, stats) if job.config.plan.is_average else None
    plan = make_plan(job, decoder, stats, choices)
    refuse_impossible(job, plan, decoder)
    plan_path, picture = job.own("plan.json"), job.own("outliers.html")
    write_text(plan_path, json.dumps(asdict(plan), indent=1))
    draw_outlier_map(stats, plan, picture)
    kept = starmap(kept_sentence, kept_linears(job, decoder).items())
    paces = pace_sentences(job, lambda: _time(job, decoder, plan))
    said = (*adapter_sentences(job, choices, plan), *zero_point_sentences(job, plan), *paces)
    records = (*kept, *said, *decoder.structure.records)
    return Work((plan_path, picture), records)


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
        **section_inputs(
            "plan", options, "bits", "symmetric", "embedding_bits", "keep", "outlier_adapter", "encodings"
        ),
        **_file_inputs(job),
        **spend,
        "config:plan.outliers": repr(outlier_fraction(job)),
        "config:plan.group_size": repr(options.group_sizes) + (" or near" if may_choose_groups(job) else ""),
        "config:plan.scale_bits": str(options.scale_bits),
        # Some encodings cannot be rounded at random.
        **({"config:rounding.method": "stochastic"} if job.config.rounding.method == "stochastic" else {}),
    }


def _file_inputs(job: Job) -> dict[str, str]:
    """What the size of a file depends on beside its weights: what lies beside the source's is told in it."""
    size = job.config.plan.file_size
    if size is None:
        return {}
    pace = pace_asked_for(job)
    return {
        "config:plan.file_size": str(file_bytes(size)) + (f" at {pace}" if pace else ""),
        "source:companions": job.source.companions_sha256,
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


def make_plan(
    job: Job, decoder: Decoder, stats: list[InputStats] | None = None, choices: Choices | None = None
) -> Plan:
    """The plan of the configuration; without statistics (before calibration) what it chooses is a placeholder.

    What the user asked for stands in it, also where the format cannot hold it: see `refuse_impossible`.

    Args:
        choices: for an average of bits, where they are known already.
    """
    options = job.config.plan
    embeddings = embedding_rows(job, decoder)
    if options.is_average:
        choices = choices or average_choices(job, decoder, stats)
        counted = counted_embeddings(job, decoder)

        def sorted_out(chosen: Plan) -> Plan:
            linears = {name: row for name, row in chosen.linears.items() if name not in counted}
            return Plan(linears, scale_dtype(job), embeddings | {name: chosen.linears[name] for name in counted})

        if options.file_size is not None:
            shape = model_shape(job, decoder, Plan({}, embeddings=embeddings))
            return within_file(job, shape, choices, sorted_out, _heads(decoder, embeddings, counted))
        return sorted_out(choices.within(options.bits) if stats is None else plan_average(job, choices))
    sensitivity_of = load_sensitivities(job, len(decoder.block_names)) if stats is not None else {}
    losses = feature_losses(stats, options.uniform_group_size, sensitivity_of)
    linears = uniform_rows(job, decoder, int(options.bits))
    counts = feature_counts(job, decoder, linears, outlier_fraction(job))
    for name, plan in linears.items():
        if plan.bits != KEPT_BITS:
            loss = losses.get(name, torch.zeros(plan.in_features))
            linears[name] = replace(plan, outlier_index=choose_outliers(loss, counts[name] / plan.in_features))
    return Plan(linears, scale_dtype(job), embeddings)


def average_choices(job: Job, decoder: Decoder, stats: list[InputStats] | None = None) -> Choices:
    """What a plan chooses from where bits are an average; without statistics all features count alike."""
    options = job.config.plan
    linears = uniform_rows(job, decoder)
    counted = counted_embeddings(job, decoder)
    ways = capabilities_of(job).embeddings
    for slot in find_embeddings(decoder.model) if counted else ():
        if slot.name in counted:
            linears[slot.name] = embedding_row(job, decoder, slot, ways, MEASURED_BITS)
    fraction = LARGEST_OUTLIER_FRACTION if outlier_fraction(job) else 0.0
    partners = partners_of(job, decoder)
    shared, kinds = shared_features(linears, partners), kinds_of(decoder)
    rows = {
        name: storable_rows(job, plan, shared[name], kinds.get(name, "embedding")) for name, plan in linears.items()
    }
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
        linears,
        losses,
        WIDTHS[options.spend],
        fraction,
        rows,
        together,
        lambda plan: linear_bytes(format, plan, dtype),
        _time_of(job, decoder),
        largest_ranks(job, decoder),
        format=job.format,
        has_larger_groups=has_larger_groups(job),
    )


def _heads(decoder: Decoder, embeddings: Mapping[str, LinearPlan], chosen: Collection[str] = ()) -> list[LinearPlan]:
    """The output head, unless it is chosen for; one that is kept as a row of that kind."""
    found = []
    for slot in find_embeddings(decoder.model):
        if slot.is_head and slot.name not in chosen:
            itemsize = decoder.weights.dtype(slot.parameter).itemsize
            kept = LinearPlan(slot.name, slot.out_features, slot.in_features, KEPT_BITS, -1, False, (), itemsize)
            found.append(embeddings.get(slot.name, kept))
    return found


def _time_of(job: Job, decoder: Decoder) -> Callable[[LinearPlan], float]:
    """What a runtime takes over each linear, where the plan is to be as fast as a file; to look up takes nothing."""
    pace = pace_asked_for(job)
    if pace is None or pace.unknown:
        return lambda row: 0.0
    kinds, free = kinds_of(decoder), {slot.name for slot in find_embeddings(decoder.model) if not slot.is_head}
    return lambda row: 0.0 if row.name in free else pace.of_row(row, kinds.get(row.name) == "expert")


def _time(job: Job, decoder: Decoder, plan: Plan) -> float:
    """What a runtime takes over all of a plan, see `_time_of`."""
    return sum(map(_time_of(job, decoder), (*plan.linears.values(), *_heads(decoder, plan.embeddings))))


def load_plan(path: Path) -> Plan:
    """The plan that `profile` wrote.

    Raises:
        AccullmError: it is damaged, or was changed into one that no encoding can store.
    """
    hint = "run profile again with --fresh"
    try:
        content = json.loads(path.read_text())
        linears, embeddings = (
            {
                name: replace(LinearPlan(**entry), outlier_index=tuple(entry["outlier_index"]))
                for name, entry in content[part].items()
            }
            for part in ("linears", "embeddings")
        )
        plan = Plan(linears, content["scale_dtype"], embeddings)
        problems = {name: ENCODINGS[row.encoding].problem(row) for name, row in plan.quantized.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AccullmError(f"not a plan of this version ({error})", path, hint) from None
    for name, problem in problems.items():
        if problem:
            raise AccullmError(f"{name} {problem}", path, hint)
    return plan


def scale_dtype(job: Job) -> str:
    """Where a format stores scales in the model's dtype, those for a bfloat16 model must be exact in both."""
    of_the_model = CAPABILITIES[job.format].scale_dtype == "of the model"
    return "bfloat16" if of_the_model and source_dtype(job) == torch.bfloat16 else "float16"


def outlier_fraction(job: Job) -> float:
    """As asked for; else the usual share, where the format holds outliers in the file."""
    if job.config.plan.outliers is not None:
        return job.config.plan.outliers
    held = CAPABILITIES[job.format].outliers == "in the file" or adapter_kind(job) is not None
    return USUAL_OUTLIERS if held else 0.0


def refuse_impossible(job: Job, plan: Plan, decoder: Decoder) -> None:
    """Ask the format whether it can hold the plan.

    Raises:
        AccullmError: with the first objection and the nearest plan that fits; or outliers in several dtypes; or nothing
            is quantized.
    """
    shape = model_shape(job, decoder, plan)
    if not plan.quantized:
        raise AccullmError("keeps every linear, so that nothing is left to round", FLAG, "keep fewer")
    for block, slots in zip(decoder.block_names, decoder.slots, strict=True):
        for slot in slots:
            dtype = decoder.weights.dtype(f"{block}.{slot.parameter}")
            row = plan.linears[slot.name]
            if dtype != shape.dtype and row.outlier_index and not row.adapter:
                raise AccullmError(
                    f"{slot.name} is stored in {dtype_name(dtype)} and most weights in {dtype_name(shape.dtype)}, "
                    "but an artifact keeps all outliers in one dtype",
                    job.source.directory,
                    "use --outliers 0, or convert the checkpoint to one dtype",
                )
    for objection in objections(job.format, plan, shape):
        raise AccullmError(objection.what, f"--format {job.format}", objection.hint)
