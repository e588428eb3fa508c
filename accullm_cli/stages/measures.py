"""What can be asked of an artifact: every measure, in the order in which reports show them.

A measure is a name, the stages that make what it needs of the original, the stage that runs it on an artifact, and
what it found. Each has a key of its own, so that asking for other texts or other tasks runs that measure alone. A new
measure is one more entry here, and a file that gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from accullm_cli.measure.fidelity import (
    DIVERGENCE,
    DIVERGENCE_WITHOUT_ADAPTER,
    SPEED,
    divergence_found,
    divergence_found_alone,
    divergence_found_elsewhere,
    speed_found,
)
from accullm_cli.measure.measurement import Measurement
from accullm_cli.measure.result import Fidelity
from accullm_cli.measure.retention import TASKS, Held, retention_found
from accullm_cli.stages.answers import (
    JUDGED,
    SEARCHED,
    Purpose,
    artifact_answers,
    load_agreement,
    load_answers,
    original_answers,
    questions_of,
    wants_tasks,
)
from accullm_cli.stages.job import Job
from accullm_cli.stages.reference import reference
from accullm_cli.stages.speed import load_speed, speed
from accullm_cli.stages.stage import Stage
from accullm_cli.stages.texts import FURTHER, OTHER, SEARCH, VALIDATION, Text, texts_of
from accullm_cli.stages.validate import load_fidelity, validation


@dataclass(frozen=True)
class Measure:
    """One question that is asked of an artifact.

    wanted: whether the configuration asks for it.
    needs: the stages that make, of the original alone, what it needs, also for a search over plans.
    run: the stage that measures the artifact of a format, in a directory.
    found: what that stage found.
    """

    name: str
    wanted: Callable[[Job], bool]
    needs: Callable[[Job], Sequence[Stage]]
    run: Callable[[Job, str, Path], Stage]
    found: Callable[[Job, str], Measurement]


def retention_of(job: Job, format_name: str, purpose: Purpose) -> Measurement:
    """What became of the original's right answers, once both have answered."""
    prompter, questions = questions_of(job, purpose)
    answers = (load_answers(job, purpose, name) for name in (None, format_name))
    agreement = load_agreement(job, purpose, format_name)
    held = [Held(*entry) for entry in zip(questions, *answers, agreement, strict=True)]
    return retention_found(held, prompter.text_of, job.config.machine.seed)


def _on_text(
    name: str,
    text: Text,
    found: Callable[[Fidelity], Measurement],
    is_wanted: Callable[[Job], bool] = lambda job: True,
    searched: tuple[Text, ...] = (),
    alone: bool = False,
) -> Measure:
    """How far next-token distributions on a text are from the original's.

    Args:
        searched: what a search asks instead. alone: those of an artifact without its adapter.
    """
    return Measure(
        name,
        wanted=is_wanted,
        needs=lambda job: [reference(of) for of in (text, *(searched if job.config.search.golden else ()))],
        run=lambda job, format_name, artifact: validation(format_name, artifact, text, alone),
        found=lambda job, format_name: found(load_fidelity(job, format_name, text, alone)),
    )


def _on_other_text(text: Text) -> Measure:
    """The same on text of another kind, if that is asked for."""
    name = f"other text, {text.kind}" if text.kind else "other text"
    return _on_text(name, text, partial(divergence_found_elsewhere, name), lambda job: text in texts_of(job))


def _on_tasks(purpose: Purpose, searched: tuple[Purpose, ...] = ()) -> Measure:
    """How many of the original's right answers are kept; `searched`: what a search asks instead."""
    return Measure(
        TASKS,
        wanted=wants_tasks,
        needs=lambda job: [original_answers(of) for of in (purpose, *(searched if job.config.search.golden else ()))],
        run=lambda job, format_name, artifact: artifact_answers(format_name, artifact, purpose),
        found=lambda job, format_name: retention_of(job, format_name, purpose),
    )


MEASURES: tuple[Measure, ...] = (
    _on_text(DIVERGENCE, VALIDATION, divergence_found, searched=(SEARCH,)),
    *map(_on_other_text, (OTHER, *FURTHER)),
    _on_text(
        DIVERGENCE_WITHOUT_ADAPTER,
        VALIDATION,
        divergence_found_alone,
        lambda job: job.config.plan.outlier_adapter,
        alone=True,
    ),
    _on_tasks(JUDGED, searched=(SEARCHED,)),
    Measure(
        SPEED,
        wanted=lambda job: job.config.validation.speed,
        needs=lambda job: (),
        run=lambda job, format_name, artifact: speed(format_name, artifact),
        found=lambda job, format_name: speed_found(load_speed(job)),
    ),
)
# What a search over plans asks of each, on text and items of its own.
SEARCH_MEASURES: tuple[Measure, ...] = (_on_text(DIVERGENCE, SEARCH, divergence_found), _on_tasks(SEARCHED))


def measurements(job: Job, artifacts: Mapping[str, Path]) -> list[Stage]:
    """The stages that hold artifacts, by format, against their original."""
    stages: list[Stage] = []
    for measure in _wanted(job, MEASURES):
        stages += measure.needs(job)
        stages += [measure.run(job, name, directory) for name, directory in artifacts.items()]
    return stages


def search_measurements(job: Job) -> list[Stage]:
    """The stages that measure the artifact of one plan of a search; what they need of the original is there."""
    ((name, directory),) = job.artifacts.items()
    return [measure.run(job, name, directory) for measure in _wanted(job, SEARCH_MEASURES)]


def found(job: Job, format_name: str, measures: Sequence[Measure] = MEASURES) -> tuple[Measurement, ...]:
    """What was measured of one artifact, once these stages are done."""
    return tuple(measure.found(job, format_name) for measure in _wanted(job, measures))


def needed_of_original(job: Job) -> list[Stage]:
    """What all artifacts of a job need, those of a search included."""
    return [stage for measure in _wanted(job, MEASURES) for stage in measure.needs(job)]


def _wanted(job: Job, measures: Sequence[Measure]) -> list[Measure]:
    return [measure for measure in measures if measure.wanted(job)]
