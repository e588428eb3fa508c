"""The golden search: the smallest average of bits with which an artifact meets its contract.

Calibrate runs once. Every plan that is tried is a conversion of its own, in a run directory of its own below the
first one's, with links to what calibrate left; it is measured on held-out text that the contract is not judged on.
Where to go next is told by the loss that plans are expected to have (quant.budget): it is off by a factor, which the
plans that were measured give away.

It leaves in the run directory
    search/trials.json          what was measured of every plan, by its average; a plan is never measured twice
    search/plan-4.412/          the run directory of the best plan, and of the last one tried
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from accullm_cli.errors import AccullmError
from accullm_cli.formats import open_artifact
from accullm_cli.formats.manifest import read_manifest
from accullm_cli.formats.shards import link_or_copy
from accullm_cli.measure.contract import (
    Requirement,
    judge,
    room_for_loss,
    search_demands,
)
from accullm_cli.measure.measurement import Measurement, judged_figures
from accullm_cli.measure.result import Clause, Trial
from accullm_cli.progress import Event
from accullm_cli.run import RunDirectory, key_of, write_text
from accullm_cli.stages.export import PLACE, exporting
from accullm_cli.stages.job import Job, open_decoder
from accullm_cli.stages.measures import SEARCH_MEASURES, found, search_measurements
from accullm_cli.stages.profile import average_choices, load_stats, planning
from accullm_cli.stages.quantize import rounding
from accullm_cli.stages.stage import Before, Stage, StageOutcome, finished, foresee, named, walk

STAGE = "search"
# Where the search begins, unless --bits is an average.
START = 4.5
# Averages that lie nearer to each other than this are not told apart: rounding is chaotic, and sums in another order
# move the KL as much.
RESOLUTION = 0.02
# For the same reason the search aims at a loss smaller by this factor than what a clause leaves room for.
AIM = 1.02
# How much steeper or less steep than expected losses may be found to fall, where all plans lie on one side of the goal.
STEEPEST = 4.0
# Stands for 0 where a logarithm is wanted.
TINY = 1e-300
# Linears that are named where no plan meets the contract.
NAMED = 5


@dataclass(frozen=True)
class Measured:
    """A plan that was converted, and what was measured of it on the search's text.

    bits: the average it was made for, of which it takes bits_per_weight.
    """

    bits: float
    bits_per_weight: float
    artifact_bytes: int
    measurements: tuple[Measurement, ...]


@dataclass(frozen=True)
class Found:
    """Where a search ended.

    job: of the chosen plan alone, in whose run directory its finished blocks are.
    trials: every plan that was measured, from the smallest to the largest.
    """

    job: Job
    trials: tuple[Trial, ...]


def search(job: Job, shared: Sequence[StageOutcome]) -> Found:
    """Find the smallest plan that meets the contract; where none does, the one that came nearest.

    Args:
        shared: what all plans have in common, finished in the job's run directory: reading, calibrate, the references.

    Raises:
        AccullmError: the contract asks for nothing that bits could bring about, no plan is as small as it must be, or
            the text is too short to search on.
    """
    demands = search_demands(job.config.validation.require)
    job.progress(Event(STAGE, "start"))
    decoder = open_decoder(job)
    choices = average_choices(job, decoder, load_stats(job, decoder))
    curve = choices.curve(job.config.search.max_bits_per_weight)
    lowest, highest = _bounds(job, curve)
    key = _key(job, finished(shared))
    known = [] if job.fresh else _load(job, key)
    measured = [plan for plan in known if plan.bits <= highest]
    beyond = [plan for plan in known if plan.bits > highest]  # of a search that was allowed more
    for _ in range(job.config.search.max_plans):
        rooms = [(plan.bits, _room(demands, plan)) for plan in measured]
        bits = next_average(rooms, curve, lowest, highest, _start(job))
        if bits is None:
            break
        plan = _measure(job, bits, shared)
        measured = sorted([*measured, plan], key=lambda entry: entry.bits)
        _store(job, key, [*measured, *beyond])
        job.progress(Event(STAGE, "record", f"plan {len(measured)}: {_sentence(demands, plan)}"))
        _clear(job, keep={bits, _best(demands, measured).bits})
    best = _best(demands, measured)
    chosen = replace(_plan_job(job, best.bits, shared), fresh=False)
    if _room(demands, best) >= 1:
        verdict = (
            f"the smallest that meets the contract on the search's text has {best.bits_per_weight:.3f} bits per weight"
        )
    else:
        limit = f", the most that --spend {job.config.plan.spend} can take," if highest < _allowed(job) else ""
        losses = choices.loss_of(choices.within(best.bits))
        verdict = f"no plan of up to {highest:g} bits per weight{limit} meets the contract on the search's text; most "
        verdict += f"of the expected loss is in {_largest(losses)}"
    job.progress(Event(STAGE, "record", verdict))
    _clear(job, keep={best.bits})
    job.progress(Event(STAGE, "end"))
    trials = tuple(
        Trial(plan.bits_per_weight, plan.artifact_bytes, _clauses(demands, plan), _room(demands, plan) >= 1)
        for plan in measured
    )
    return Found(chosen, trials)


def next_average(
    rooms: Sequence[tuple[float, float]],
    curve: Sequence[tuple[float, float]],
    lowest: float,
    highest: float,
    start: float = START,
) -> float | None:
    """The average to try next; None where the smallest good one is known, or that there is none.

    Args:
        rooms: for each plan that was measured its average, and by which factor its loss might grow until all is just
            met (1 and more where all is met).
        curve: (bits per weight, expected loss), ascending in bits.
    """
    if not rooms:
        return min(max(start, lowest), highest)
    good = min((bits for bits, room in rooms if room >= 1), default=None)
    bad = max((bits for bits, room in rooms if room < 1 and (good is None or bits < good)), default=None)
    if good is None and bad is not None and bad >= highest:
        return None
    guess = min(max(_aim(rooms, curve, good, bad), lowest), highest)
    if bad is not None:
        guess = min(max(guess, bad + RESOLUTION), highest)
    if good is not None and guess > good - RESOLUTION:
        return None
    return round(guess, 3)


def _aim(
    rooms: Sequence[tuple[float, float]], curve: Sequence[tuple[float, float]], good: float | None, bad: float | None
) -> float:
    """Where all should be just met: on the line through the two plans around it, or else the two nearest to it.

    The line is that of the logarithm of a plan's room against that of its expected loss. Through one plan alone it
    falls as the expected loss rises.
    """
    averages = np.array([average for average, _ in curve])
    falls = -np.log([max(loss, TINY) for _, loss in curve])
    points = [
        (float(np.interp(bits, averages, falls)), math.log(min(max(room, TINY), 1 / TINY)))
        for bits, room in rooms
        if bits in (good, bad) or good is None or bad is None
    ]
    points.sort(key=lambda point: abs(point[1]))
    (fall, room), slope = points[0], 1.0
    if len(points) > 1 and points[1][0] != fall:
        found = (points[1][1] - room) / (points[1][0] - fall)
        slope = min(max(found, 1 / STEEPEST), STEEPEST) if good is None or bad is None else found
    return float(np.interp(fall + (math.log(AIM) - room) / slope, falls, averages))


# -- plans -------------------------------------------------------------------------------------------------


def _start(job: Job) -> float:
    return float(job.config.plan.bits) if job.config.plan.is_average else START


def _bounds(job: Job, curve: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The averages between which the search may choose: what there are plans for, and what was allowed.

    Raises:
        AccullmError: the smallest plan takes more than what is allowed.
    """
    allowed = _allowed(job)
    lowest = math.ceil(1000 * curve[0][0]) / 1000
    if allowed < lowest:
        raise AccullmError(
            f"{allowed:g} is less than the smallest plan takes, {lowest:.3f}, scales included",
            "--max-bits-per-weight",
            "give more, or larger groups",
        )
    return lowest, min(allowed, math.ceil(1000 * curve[-1][0]) / 1000)


def _allowed(job: Job) -> float:
    """The largest average, in thousandths, as plans are named: it is then known when it is met."""
    return math.floor(1000 * job.config.search.max_bits_per_weight) / 1000


def _planned(job: Job, bits: float, run: RunDirectory) -> Job:
    """The conversion to an average of `bits`, which is not a search, in a run directory of its own."""
    update = {
        "plan": job.config.plan.model_copy(update={"bits": float(bits)}),
        "export": job.config.export.model_copy(update={"out": run.file("artifact")}),
        "search": job.config.search.model_copy(update={"golden": False}),
    }
    return replace(job, run=run, config=job.config.model_copy(update=update))


def _plan_job(job: Job, bits: float, shared: Sequence[StageOutcome]) -> Job:
    """As `_planned`, with links to what all plans have in common."""
    run = RunDirectory(job.run.file(f"search/plan-{bits:.3f}"))
    for outcome in shared:
        # Not all may be there of a directory that was being removed when the search was killed.
        is_whole = all(run.file(output).exists() for output in outcome.record.outputs)
        if not is_whole or run.stages().get(outcome.name) != outcome.record:
            for output in outcome.record.outputs:
                run.file(output).parent.mkdir(parents=True, exist_ok=True)
                run.file(output).unlink(missing_ok=True)
                link_or_copy(job.run.file(output), run.file(output))
            run.finish(outcome.name, outcome.record)
    return _planned(job, bits, run)


def _stages(own: Job) -> list[Stage]:
    """What is done for one plan."""
    return [planning(own.format), rounding(own.format), exporting(own.artifacts), *search_measurements(own)]


def _measure(job: Job, bits: float, shared: Sequence[StageOutcome]) -> Measured:
    """Convert to one plan, and measure the artifact on the search's text."""
    own = _plan_job(job, bits, shared)
    list(walk(own, _stages(own), finished(shared)))
    directory = own.artifacts[own.format]
    artifact = open_artifact(directory)
    return Measured(
        bits,
        artifact.bits_per_weight,
        sum(entry.bytes for entry in read_manifest(directory).files.values()),
        found(own, own.format, SEARCH_MEASURES),
    )


def _clear(job: Job, keep: set[float]) -> None:
    """Remove the run directories of all other plans; what was measured of them is on record."""
    kept = {f"plan-{bits:.3f}" for bits in keep}
    for directory in job.run.file("search").glob("plan-*"):
        if directory.name not in kept:
            shutil.rmtree(directory)


# -- what was measured -------------------------------------------------------------------------------------


def known_plans(job: Job, before: Before) -> int:
    """How many plans an earlier search measured that this one would begin with."""
    return len(_load(job, _key(job, before)))


def _key(job: Job, before: Before) -> str:
    """Of all that the figures depend on, but for the average."""
    own = _planned(job, START, RunDirectory(job.run.file("search/plan")))
    decided = foresee(own, _stages(own), before)
    inputs = {name: value for decision in decided for name, value in decision.inputs.items()}
    made = (f"input:{named(stage, own.format)}" for stage in ("profile", "quantize"))
    for name in ("config:plan.bits", *made, "input:artifact", PLACE.format(own.format)):
        del inputs[name]
    return key_of(inputs)


def _trials_path(job: Job) -> Path:
    return job.run.file("search/trials.json")


def _load(job: Job, key: str) -> list[Measured]:
    """What an earlier search measured, whatever contract it had."""
    path = _trials_path(job)
    content = json.loads(path.read_text()) if path.exists() else {}
    if content.get("key") != key:
        return []
    return TypeAdapter(list[Measured]).validate_python(content["plans"])


def _store(job: Job, key: str, measured: Sequence[Measured]) -> None:
    write_text(_trials_path(job), json.dumps({"key": key, "plans": [asdict(plan) for plan in measured]}, indent=1))


def _clauses(demands: Sequence[Requirement], plan: Measured) -> tuple[Clause, ...]:
    return judge(demands, judged_figures(plan.measurements))


def _room(demands: Sequence[Requirement], plan: Measured) -> float:
    """By which factor the loss might grow until all demands are just met."""
    figures = judged_figures(plan.measurements)
    return min(room_for_loss(demand, figures[demand.figure]) for demand in demands)


def _best(demands: Sequence[Requirement], measured: Sequence[Measured]) -> Measured:
    """The smallest plan that meets all demands, else the one that comes nearest."""
    good = [plan for plan in measured if _room(demands, plan) >= 1]
    return min(good, key=lambda plan: plan.bits) if good else max(measured, key=lambda plan: _room(demands, plan))


def _sentence(demands: Sequence[Requirement], plan: Measured) -> str:
    """ "4.400 bits per weight, mean_kl.high 0.0387 (meets <=0.04)"."""
    parts = [
        f"{clause.metric} {clause.measured:.4g} "
        f"({'meets' if clause.met else 'misses'} {clause.comparison}{clause.limit:g})"
        for clause in _clauses(demands, plan)
    ]
    return f"{plan.bits_per_weight:.3f} bits per weight, {', '.join(parts)}"


def _largest(losses: Mapping[str, float]) -> str:
    """The linears with the largest part of the expected loss: "model.layers.0.mlp.down_proj (4.1%), ..."."""
    total = sum(losses.values()) or 1.0
    largest = sorted(losses, key=lambda name: losses[name], reverse=True)[:NAMED]
    return ", ".join(f"{name} ({losses[name] / total:.1%})" for name in largest)
