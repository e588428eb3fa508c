"""A stage as a value, and the one walk over stages: decide, run, time, write into the manifest."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from accullm_cli.errors import AccullmError
from accullm_cli.formats import NATIVE
from accullm_cli.progress import Event
from accullm_cli.run import (
    UP_TO_DATE,
    Reason,
    StageRecord,
    file_sha256,
    give_back_memory,
    key_of,
    peak_memory,
    reset_peak_memory,
)
from accullm_cli.stages.job import Job, versions


@dataclass(frozen=True)
class Decision:
    """Whether a stage runs and why, and what its outputs then depend on.

    In a walk that runs stages, one that is finished is up to date for those behind it; in one that only looks ahead,
    it still has to run.
    """

    stage: str
    inputs: Mapping[str, str]
    reason: Reason

    @property
    def key(self) -> str:
        return key_of(self.inputs)


# What was decided of the stages before one, by name.
Before = Mapping[str, Decision]


@dataclass(frozen=True)
class Work:
    """What a stage's work gives: the files it wrote and what it treated differently from the plan."""

    outputs: tuple[Path, ...]
    records: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One stage of a conversion.

    name: in the manifest, and for people.
    inputs: everything that its outputs depend on, `kind:name` to value; see `run.compare_inputs`.
    work: makes the outputs.
    after: the stages that must be finished before it.
    commands: those that may run it beside `convert`, which may run all.
    files: patterns of what it leaves in the run directory, finished or not.
    format: what it makes is for this format alone; "" for all.
    """

    name: str
    inputs: Callable[[Job, Before], dict[str, str]]
    work: Callable[[Job, Decision], Work]
    after: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    format: str = ""

    def may_run(self, job: Job) -> bool:
        """Whether the command that was given runs it."""
        return job.only is None or job.only in self.commands


@dataclass(frozen=True)
class StageOutcome:
    """What became of one stage: why it ran or not, and its record in the manifest; `format` as in `Stage`."""

    name: str
    reason: Reason
    record: StageRecord
    format: str = ""


def named(stage: str, format: str) -> str:
    """The name of a stage that each format has for itself: the native one's is the stage's."""
    return stage if format == NATIVE else f"{stage} {format}"


def upstream(stages: Sequence[Stage], names: Collection[str]) -> list[Stage]:
    """The stages of these names and all that must be finished before them, in the order in which they are given."""
    needed = set(names)
    for stage in reversed(stages):
        if stage.name in needed:
            needed.update(stage.after)
    return [stage for stage in stages if stage.name in needed]


def finished(outcomes: Iterable[StageOutcome]) -> dict[str, Decision]:
    """Stages that were walked before, for a walk that goes on from there."""
    return {outcome.name: Decision(outcome.name, outcome.record.inputs, UP_TO_DATE) for outcome in outcomes}


def decide(job: Job, stage: Stage, before: Before) -> Decision:
    """Whether a stage runs: the same in a run and in a dry run.

    Raises:
        AccullmError: it would have to, but the command that was given does not run it.
    """
    inputs = stage.inputs(job, before)
    reason = job.run.decide(stage.name, inputs, job.fresh and stage.may_run(job))
    if reason.runs and not stage.may_run(job):
        state = "has not run" if reason.code == "new" else f"is not up to date: {reason}"
        command = stage.commands[0]
        raise AccullmError(f"{command} {state}", job.run.path, f"run accullm {command} with the same options first")
    return Decision(stage.name, inputs, reason)


def foresee(job: Job, stages: Sequence[Stage], before: Before = MappingProxyType({})) -> list[Decision]:
    """What `walk` would find. Nothing runs, and nothing is written."""
    known = dict(before)
    for stage in stages:
        known[stage.name] = decide(job, stage, known)
    return [known[stage.name] for stage in stages]


def walk(job: Job, stages: Sequence[Stage], before: Before = MappingProxyType({})) -> Iterator[StageOutcome]:
    """Run each stage whose inputs changed or whose outputs are gone, and put it on record.

    Args:
        before: stages that need not be looked at any more.

    Raises:
        AccullmError: one would have to run that the command that was given does not run.
    """
    known, told = dict(before), set[str]()
    # Removed at once, before the first of them runs: whatever a later one finds is then of this call.
    stale = [pattern for stage in stages if job.fresh and stage.may_run(job) for pattern in stage.files]
    for stage in stages:
        decision = decide(job, stage, known)
        if decision.reason.code == "forced":
            job.run.remove(stale)
            stale = []
        yield _run(job, stage, decision, told)
        known[stage.name] = replace(decision, reason=UP_TO_DATE)


def _run(job: Job, stage: Stage, decision: Decision, told: set[str]) -> StageOutcome:
    """Do a stage's work, unless it is up to date.

    Args:
        told: the records of stages before, of which nobody need hear again.
    """
    name, reason = stage.name, decision.reason
    if not reason.runs:
        job.progress(Event(name, "skip", reason=reason))
        return StageOutcome(name, reason, job.run.stages()[name], stage.format)
    job.progress(Event(name, "start", reason=reason))
    give_back_memory()
    reset_peak_memory()
    started = time.monotonic()
    done = stage.work(job, decision)
    for sentence in done.records:
        if sentence not in told:
            job.progress(Event(name, "record", sentence))
    told.update(done.records)
    record = StageRecord(
        inputs=dict(decision.inputs),
        outputs={_relative(path, job.run.path): file_sha256(path) for path in done.outputs},
        seconds=round(time.monotonic() - started, 3),
        peak_bytes=peak_memory(),
        records=list(done.records),
        versions=versions(),
    )
    job.run.finish(name, record)
    job.progress(Event(name, "end"))
    return StageOutcome(name, reason, record, stage.format)


def _relative(path: Path, base: Path) -> str:
    """`path` as the manifest names it: relative inside the run directory, absolute elsewhere."""
    path, base = path.absolute(), base.absolute()
    return str(path.relative_to(base)) if path.is_relative_to(base) else str(path)
