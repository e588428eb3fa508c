"""The conversions of a zoo: all checked before the first begins, then one after the other, each a row of the result."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from accullm_cli import pipeline
from accullm_cli.errors import EXIT_NOT_SO, EXIT_OK, AccullmError
from accullm_cli.failure import failure_of
from accullm_cli.lock import HeldError
from accullm_cli.measure.result import ModelResult, Report
from accullm_cli.places import artifact_paths
from accullm_cli.progress import Event, Progress, silent
from accullm_cli.report.zoo import write_zoo_junit, write_zoo_page, write_zoo_summary
from accullm_cli.run import locked_output
from accullm_cli.stages.checks import check_result_file
from accullm_cli.stages.estimate import Estimated
from accullm_cli.zoo.file import Entry, Zoo

# Of each model, by format; None where it would first have to be fetched or imported.
Estimates = Mapping[str, Mapping[str, Estimated] | None]
# Converts entries somewhere, and hands over each result as it comes.
Converter = Callable[[Sequence[Entry], Progress], Iterable[ModelResult]]


@dataclass(frozen=True)
class PlannedModel:
    """An artifact that a zoo would make, and what that takes, as in `pipeline.DryRun`; None where nothing is known."""

    model: str
    format: str
    artifact: str
    bits_per_weight: float | None = None
    artifact_bytes: int | None = None
    size_is_exact: bool | None = None
    peak_bytes: int | None = None
    disk_bytes: int | None = None
    seconds: float | None = None


def check_zoo(zoo: Zoo) -> Estimates:
    """Refuse what would stop any conversion before its first forward pass, and estimate what each takes.

    Raises:
        AccullmError: of the first model that cannot be converted as asked, with its place in the zoo file.
    """
    estimates = {}
    for entry in zoo.entries:
        try:
            estimates[entry.name] = pipeline.estimates(entry.config)
        except AccullmError as error:
            where = entry.where if error.where is None else f"{entry.where}: {error.where}"
            raise type(error)(error.what, where, error.hint) from None
    return estimates


def plan_zoo(zoo: Zoo) -> tuple[PlannedModel, ...]:
    """What a zoo would make. Writes nothing.

    Raises:
        AccullmError: as for `check_zoo`.
    """
    estimates = check_zoo(zoo)
    planned = []
    for entry in zoo.entries:
        for name, path in artifact_paths(entry.config).items():
            known = estimates[entry.name]
            found = vars(known[name]) if known is not None else {}
            planned.append(PlannedModel(entry.config.model, name, str(path), **found))
    return tuple(planned)


def convert_zoo(
    zoo: Zoo,
    convert: Converter,
    progress: Progress = silent,
    junit: Path | None = None,
    summary: Path | None = None,
) -> tuple[ModelResult, ...]:
    """Convert all models, and write one page of results into the zoo's directory, anew after each model.

    A model that fails is a row; the others go on. Every conversion has its run directory: the same call resumes.

    Raises:
        AccullmError: another process is at work on the same zoo, or its page, or a file of results, cannot be written.
    """
    check_result_file("--junit", junit)
    check_result_file("--summary", summary)
    results: dict[str, ModelResult] = {}
    with locked_output(zoo.out):
        for result in convert(zoo.entries, progress):
            results[result.name] = result
            ordered = tuple(results[entry.name] for entry in zoo.entries if entry.name in results)
            write_zoo_page(ordered, len(zoo.entries), zoo.out)
    if junit is not None:
        write_zoo_junit(ordered, junit)
    if summary is not None:
        write_zoo_summary(ordered, summary)
    return ordered


def convert_here(fresh: bool) -> Converter:
    """One model after the other, in this process."""

    def convert(entries: Sequence[Entry], progress: Progress) -> Iterable[ModelResult]:
        return (convert_entry(entry, told_of(entry, progress), fresh) for entry in entries)

    return convert


def convert_entry(entry: Entry, progress: Progress, fresh: bool = False, patience: float = 0.0) -> ModelResult:
    """Convert one model; what goes wrong is in the result.

    Args:
        patience: seconds for which a directory that another process holds is waited for.
    """
    started = time.monotonic()
    reports: tuple[Report, ...] = ()
    line, code, trace = "", EXIT_OK, ""
    try:
        reports = _convert(entry, progress, fresh, started + patience)
        code = EXIT_OK if all(report.contract_met for report in reports) else EXIT_NOT_SO
    except Exception as error:
        line, code = failure_of(error)
        trace = "" if isinstance(error, AccullmError) else traceback.format_exc()
    return ModelResult(entry.name, entry.config.model, code, line, round(time.monotonic() - started, 1), reports, trace)


def _convert(entry: Entry, progress: Progress, fresh: bool, deadline: float) -> tuple[Report, ...]:
    while True:
        try:
            return pipeline.convert_all(entry.config, progress, fresh)
        except HeldError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(1)


def told_of(entry: Entry, progress: Progress) -> Progress:
    """A callback for one model's events, which names it before the stage."""

    def tell(event: Event) -> None:
        progress(replace(event, stage=f"{entry.name}: {event.stage}"))

    return tell
