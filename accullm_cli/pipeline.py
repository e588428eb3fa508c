"""A conversion: the stages in order, and the report at its end."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from accullm_cli.config import Config
from accullm_cli.errors import AccullmError
from accullm_cli.formats import adopted, artifact_in, open_artifact
from accullm_cli.formats.capabilities import CAPABILITIES
from accullm_cli.formats.manifest import own_files, record_fidelity
from accullm_cli.measure.contract import judge, parse_requirement
from accullm_cli.measure.measurement import Figure, exactly, judged_figures
from accullm_cli.measure.result import REPORT_SCHEMA_VERSION, Report, Trial
from accullm_cli.model.alias import aliases
from accullm_cli.model.gguf_parts import files_of
from accullm_cli.model.source import ModelSource, describe_source, open_source
from accullm_cli.places import artifact_path, artifact_paths, run_path
from accullm_cli.processors import usable_cores
from accullm_cli.progress import Event, Progress, silent
from accullm_cli.report import write_junit, write_report, write_summary
from accullm_cli.run import Reason, RunDirectory, artifact_held, locked_output, write_text
from accullm_cli.search import known_plans, search
from accullm_cli.stages.answers import check_items
from accullm_cli.stages.checks import (
    check_config,
    check_positions,
    check_sizes,
    check_speed,
    preflight,
    refuse_golden,
)
from accullm_cli.stages.device import check_format, chosen_device, describe_device
from accullm_cli.stages.estimate import Estimated, estimate
from accullm_cli.stages.graph import conversion, shared_by_plans
from accullm_cli.stages.job import Job, open_decoder, versions
from accullm_cli.stages.measures import found as what_was_found
from accullm_cli.stages.measures import measurements
from accullm_cli.stages.profile import make_plan
from accullm_cli.stages.reading import READING
from accullm_cli.stages.stage import Stage, StageOutcome, finished, foresee, named, upstream, walk
from accullm_cli.stages.summary import linear_summaries, stage_summary
from accullm_cli.stages.texts import check_texts
from accullm_cli.stages.validate import artifact_sha256

STAGES = ("calibrate", "profile", "quantize", "export", "validate")


@dataclass(frozen=True)
class StageResult:
    """What running one stage alone gave."""

    stage: str
    run: str
    outputs: tuple[str, ...]
    seconds: float
    reports: tuple[Report, ...]


@dataclass(frozen=True)
class PlannedStage:
    """One stage: whether it would run, and why or why not."""

    name: str
    reason: str
    runs: bool


@dataclass(frozen=True)
class PlannedArtifact:
    """One artifact that a conversion would write: where, and its size as in `DryRun`."""

    format: str
    path: str
    bits_per_weight: float
    artifact_bytes: int


@dataclass(frozen=True)
class DryRun:
    """What a conversion would do. Nothing was written.

    stages: as the run would find them, but that of an artifact made of changed inputs nothing is known, so that it
    counts as changed; a stage asked for alone is the last one.
    device: where weights are rounded and artifacts run. peak_bytes and seconds are estimates for the CPU; what a GPU
    saves is not in them. disk_bytes: the run's files and artifacts at their largest, those included that are there.
    artifacts: one for each format; bits_per_weight and artifact_bytes are those of the first. They are exact where
    size_is_exact says so, and otherwise the most that they may come to. artifact_bytes are the artifact's tensors and
    the tokenizer files, to which a few kilobytes of JSON and headers come.
    """

    model: str
    run: str
    artifact: str
    artifacts: tuple[PlannedArtifact, ...]
    stages: tuple[PlannedStage, ...]
    device: str
    bits_per_weight: float
    artifact_bytes: int
    size_is_exact: bool
    peak_bytes: int
    disk_bytes: int
    seconds: float


def convert(config: Config, progress: Progress = silent, fresh: bool = False) -> Report:
    """Convert a model to one artifact and validate it.

    Args:
        config: see `accullm_cli.config`; exactly one export format.
        progress: is called with an `Event` for everything that happens.
        fresh: run every stage again, whatever is finished.

    Raises:
        AccullmError: what the user can mend; see `accullm_cli.errors` for its kinds and exit codes.
    """
    if len(config.export.format) != 1:
        raise AccullmError("convert makes one artifact", "export.format", "use convert_all for several formats")
    return convert_all(config, progress, fresh)[0]


def convert_all(config: Config, progress: Progress = silent, fresh: bool = False) -> tuple[Report, ...]:
    """As `convert`, for every requested format."""
    with _open_job(config, progress, fresh) as job:
        if config.search.golden:
            reports: tuple[Report, ...] = (_convert_golden(job),)
        else:
            reports = _reports(job, list(walk(job, conversion(job))))
        return _written(job, reports)


def run_stage(name: str, config: Config, progress: Progress = silent, fresh: bool = False) -> StageResult:
    """Run one stage of a conversion; the stages before it must be finished and up to date.

    Args:
        name: one of STAGES.

    Raises:
        AccullmError: an earlier stage has not run for this configuration.
    """
    refuse_golden(config, name)
    with _open_job(config, progress, fresh, only=name) as job:
        own, stages = _alone(job, name)
        outcomes = list(walk(job, stages))
        records = [outcome.record for outcome in outcomes if outcome.name in own]
        return StageResult(
            stage=name,
            run=str(job.run.path),
            outputs=tuple(str(job.run.file(output)) for record in records for output in record.outputs),
            seconds=sum(record.seconds for record in records),
            reports=_written(job, _reports(job, outcomes)) if name == "validate" else (),
        )


def validate_artifact(artifact: Path, config: Config, progress: Progress = silent, fresh: bool = False) -> Report:
    """Measure a finished artifact, wherever and by whatever tool it was made, against its original.

    Args:
        artifact: its directory, or the file of somebody else that is one.
        config: `config.model` names the original, or is `artifact` itself: then the original is the one that its
            manifest names. An artifact of another tool has none, and that it was made from this model is not known.
            `config.validation` and `config.calibration.seq_len` count. Working files go to `config.machine.run`, by
            default the artifact's directory with .validation behind.

    Raises:
        AccullmError: it is not an artifact, or it was made from another model than the original.
    """
    run = config.machine.run or artifact.with_name(f"{artifact.resolve().name}.validation")
    given = artifact_in(artifact)
    with tempfile.TemporaryDirectory() as scratch:
        artifact = adopted(given, Path(scratch) / given.stem) if given.is_file() else given
        opened = open_artifact(artifact)
        provenance = opened.manifest.provenance if opened.manifest is not None else {}
        check_format(config, opened.format)
        if Path(config.model).resolve() in (artifact.resolve(), given.resolve()):
            config = config.model_copy(update={"model": named_original(given, provenance)})
        with _open_job(config, progress, fresh, run=run, converts=False) as job, artifact_held(given):
            # The name alone proves nothing: the content must be the one it was made from.
            made_from = provenance.get("source_sha256")
            if made_from is not None and made_from != job.source.sha256:
                raise AccullmError(
                    f"was made from another model than {job.source.origin}", given, "name its original with --original"
                )
            check_sizes(job, artifact, given)
            if config.validation.speed:
                check_speed(job, open_decoder(job))
            check_texts(job, calibrates=False)
            check_items(job)
            outcomes = list(walk(job, [READING, *measurements(job, {opened.format: artifact})]))
            return _written(job, (_finish_report(job, opened.format, artifact, outcomes, shown=given),))[0]


def dry_run(config: Config, progress: Progress = silent, fresh: bool = False, only: str | None = None) -> DryRun:
    """The plan of a conversion, its size, and estimates of memory and time. Writes nothing.

    Args:
        fresh: as for `convert`.
        only: one of STAGES, where `run_stage` is what would be called.

    Raises:
        AccullmError: whatever would stop the conversion before its first forward pass.
    """
    if only is not None:
        refuse_golden(config, only)
    run = RunDirectory(run_path(config))
    check_config(config, run, converts=True, only_validates=only == "validate")
    with tempfile.TemporaryDirectory() as scratch, _threads(run, config):
        # Where nothing was made yet, no content decides what has to run: a large model takes minutes to read.
        described = None if run.stages() else describe_source(config.model, Path(scratch))
        source = described or open_source(config.model, Path(scratch), progress)
        job = Job(config, run, _source_for(config, source), progress, only, fresh)
        found = _estimates(job)
        estimated = found[job.format]
        return DryRun(
            model=job.source.origin,
            run=str(run.path),
            artifact=str(artifact_path(config)),
            artifacts=tuple(
                PlannedArtifact(name, str(job.artifacts[name]), its.bits_per_weight, its.artifact_bytes)
                for name, its in found.items()
            ),
            stages=tuple(_foreseen(job)),
            device=describe_device(job.compute.device),
            bits_per_weight=estimated.bits_per_weight,
            artifact_bytes=estimated.artifact_bytes,
            size_is_exact=estimated.size_is_exact,
            peak_bytes=estimated.peak_bytes,
            disk_bytes=sum(its.disk_bytes for its in found.values()),
            seconds=estimated.seconds,
        )


def _source_for(config: Config, source: ModelSource) -> ModelSource:
    """The source without what the model has no place for, where no format that is made has one either."""
    keep = any(CAPABILITIES[name].keeps_others for name in config.export.format)
    return source if keep else source.without_kept()


def estimates(config: Config) -> dict[str, Estimated] | None:
    """What the artifact of each format takes, from headers alone, so that the answer comes at once. Writes nothing.

    None for a model that would have to be fetched or imported first.

    Raises:
        AccullmError: whatever would stop the conversion before its first forward pass, but for what weights hold.
    """
    run = RunDirectory(run_path(config))
    check_config(config, run, converts=True, only_validates=False)
    with tempfile.TemporaryDirectory() as scratch, _threads(run, config):
        source = describe_source(config.model, Path(scratch))
        return None if source is None else _estimates(Job(config, run, source, silent))


def _estimates(job: Job) -> dict[str, Estimated]:
    check_positions(job)
    decoder = preflight(job)
    return {own.format: estimate(own, decoder, make_plan(own, decoder)) for own in map(job.of, job.artifacts)}


def _alone(job: Job, command: str) -> tuple[set[str], list[Stage]]:
    """The names of the stages that a command runs, and all that are walked for them."""
    stages = conversion(job)
    own = {stage.name for stage in stages if command in stage.commands}
    return own, upstream(stages, own)


def _foreseen(job: Job) -> Iterator[PlannedStage]:
    """What the job's command will find; of a golden search no more is known than where it begins and may end."""
    if job.config.search.golden:
        stages = shared_by_plans(job)
    else:
        stages = conversion(job) if job.only is None else _alone(job, job.only)[1]
    decided = foresee(job, stages)
    for decision in decided:
        yield PlannedStage(decision.stage, str(decision.reason), decision.reason.runs)
    if job.config.search.golden:
        known = 0 if job.fresh else known_plans(job, {decision.stage: decision for decision in decided})
        begun = f", and {known} known from an earlier search" if known else ""
        plans = f"up to {job.config.search.max_plans} plans{begun}; time is estimated for one"
        yield PlannedStage("search", str(Reason("new", plans)), True)


# -- before the first stage --------------------------------------------------------------------------------


@contextmanager
def _open_job(
    config: Config,
    progress: Progress,
    fresh: bool,
    only: str | None = None,
    run: Path | None = None,
    converts: bool = True,
) -> Iterator[Job]:
    """Lock the run directory, fix the thread count, open the source and refuse what cannot work."""
    directory = RunDirectory(run or run_path(config))
    check_config(config, directory, converts, only_validates=only == "validate" or not converts)
    with ExitStack() as held:
        held.enter_context(directory.locked())
        held.enter_context(directory.removed_if_refused())
        writes_artifact = converts and only in (None, "export", "validate")
        for artifact in artifact_paths(config).values() if writes_artifact else ():
            held.enter_context(locked_output(artifact))
        threads = held.enter_context(_threads(directory, config))
        source = _source_for(config, open_source(config.model, directory.path, progress))
        job = Job(config, directory, source, progress, only, fresh)
        if told := chosen_device(config):
            progress(Event("device", "record", told))
        check_positions(job)
        if converts:
            preflight(job)
        resolved = config.model_dump(mode="json")
        resolved["machine"]["threads"] = threads
        write_text(directory.file("run.yaml"), yaml.safe_dump(resolved, sort_keys=False))
        yield job


def chosen_threads(run: RunDirectory, config: Config) -> int | None:
    """The configured number of threads, else the one this run began with; None where there is neither."""
    if config.machine.threads is not None or not run.file("run.yaml").exists():
        return config.machine.threads
    remembered: int | None = yaml.safe_load(run.file("run.yaml").read_text())["machine"]["threads"]
    return remembered


@contextmanager
def _threads(run: RunDirectory, config: Config) -> Iterator[int]:
    """Use the configured number of threads, else the one this run began with, else all that the process may use."""
    count = chosen_threads(run, config) or usable_cores()
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)


# -- the report at the end ---------------------------------------------------------------------------------


def _convert_golden(job: Job) -> Report:
    """Search for the smallest plan, export it, and judge it on text that the search never saw."""
    shared = list(walk(job, shared_by_plans(job)))
    found = search(job, shared)
    out = job.config.export.model_copy(update={"out": job.artifacts[job.format]})
    chosen = replace(found.job, config=found.job.config.model_copy(update={"export": out}))
    before = finished(shared)
    outcomes = walk(chosen, [stage for stage in conversion(chosen) if stage.name not in before], before)
    destination = report_path(job, job.format)
    directory = chosen.artifacts[job.format]
    return _finish_report(chosen, job.format, directory, [*shared, *outcomes], found.trials, destination)


def _reports(job: Job, outcomes: Sequence[StageOutcome]) -> tuple[Report, ...]:
    """One for each artifact."""
    return tuple(_finish_report(job, name, directory, outcomes) for name, directory in job.artifacts.items())


def _finish_report(
    job: Job,
    format_name: str,
    directory: Path,
    outcomes: Sequence[StageOutcome],
    trials: tuple[Trial, ...] = (),
    destination: Path | None = None,
    shown: Path | None = None,
) -> Report:
    """Judge the contract, write the report, and put the measured figures into the artifact.

    Args:
        shown: what people call the artifact, where that is not its directory.
        trials: of a golden search.
        destination: directory of the report, where it is not the job's own.
    """
    destination = destination or report_path(job, format_name)
    artifact = open_artifact(directory)
    found = what_was_found(job, format_name)
    bits_per_weight = artifact.bits_per_weight
    own_names = [directory / name for name in own_files(directory)]
    files = files_of(shown) if shown is not None and shown.is_file() else own_names
    size = sum(path.stat().st_size for path in files)
    own = [outcome for outcome in outcomes if outcome.format in ("", format_name)]
    records = tuple(dict.fromkeys(sentence for outcome in own for sentence in outcome.record.records))
    requirements = [parse_requirement(text) for text in job.config.validation.require]
    # What profile says is the plan, and no deviation from it.
    plans = [outcome.record for outcome in own if outcome.name == named("profile", format_name)]
    planned = {sentence for record in plans for sentence in record.records}
    fallbacks = [sentence for sentence in records if sentence not in planned]
    sizes = {"bits_per_weight": bits_per_weight, "artifact_bytes": size, "fallbacks": len(fallbacks)}
    figures = {name: Figure(name, exactly(value), has_interval=False) for name, value in sizes.items()}
    contract = judge(requirements, judged_figures(found) | figures)
    report = Report(
        schema_version=REPORT_SCHEMA_VERSION,
        model=job.source.origin,
        source_sha256=job.source.sha256,
        artifact=str(shown or directory),
        format=format_name,
        artifact_sha256=artifact_sha256(directory),
        bits_per_weight=bits_per_weight,
        artifact_bytes=size,
        source_bytes=job.source.weight_bytes,
        measurements=found,
        contract=contract,
        contract_met=all(clause.met for clause in contract),
        records=records,
        stages=tuple(stage_summary(outcome) for outcome in outcomes),
        linears=linear_summaries(job.of(format_name), artifact),
        versions=versions(),
        search=trials,
        directory=str(destination),
    )
    write_report(report, destination)
    if artifact.manifest is not None:
        record_fidelity(directory, report)
    return report


def _written(job: Job, reports: tuple[Report, ...]) -> tuple[Report, ...]:
    """The reports, once they are in the files that were asked for."""
    options = job.config.validation
    if options.junit is not None:
        write_junit(reports, options.junit)
    if options.summary is not None:
        write_summary(reports, options.summary)
    return reports


def named_original(artifact: Path, provenance: Mapping[str, Any]) -> str:
    """The model that an artifact says it was made from: a hub id, an alias, or a directory that may not be here."""
    name = str(provenance.get("source", ""))
    if "/" not in name and name not in aliases():
        raise AccullmError(f"was made from {name or 'an unnamed model'}", artifact, "name its place with --original")
    return name


def report_path(job: Job, format_name: str) -> Path:
    """The directory of a report: `report` in the run directory, and a directory below it for each format."""
    return job.run.file("report") / format_name
