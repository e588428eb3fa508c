"""A conversion: the stages in order, and the report at its end."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from accullm_cli.config import Config
from accullm_cli.errors import AccullmError
from accullm_cli.formats import open_artifact
from accullm_cli.formats.manifest import read_manifest, record_fidelity
from accullm_cli.measure.contract import judge, parse_requirement
from accullm_cli.measure.result import REPORT_SCHEMA_VERSION, Report, Trial
from accullm_cli.model.alias import aliases
from accullm_cli.model.source import open_source
from accullm_cli.progress import Progress, silent
from accullm_cli.report import write_report
from accullm_cli.run import Reason, RunDirectory, key_of, write_text
from accullm_cli.search import known_plans, search
from accullm_cli.stages.calibrate import (
    OTHER_REFERENCE,
    OTHER_TEXT,
    calibrate,
    calibrate_inputs,
    make_other_reference,
    make_reference,
    other_reference_inputs,
    other_window_count,
)
from accullm_cli.stages.checks import (
    GOLDEN_FORMAT,
    check_config,
    check_lengths,
    check_positions,
    check_texts,
    preflight,
    refuse_golden,
)
from accullm_cli.stages.device import check_format, describe_device, device_of, wants_speed
from accullm_cli.stages.estimate import estimate
from accullm_cli.stages.export import artifact_directories, export, export_inputs, known_files
from accullm_cli.stages.job import Job, StageOutcome, decide, versions
from accullm_cli.stages.profile import make_plan, profile, profile_inputs
from accullm_cli.stages.quantize import quantize, quantize_inputs
from accullm_cli.stages.speed import STAGE as SPEED
from accullm_cli.stages.speed import load_speed, measure_speed, speed_inputs
from accullm_cli.stages.summary import linear_summaries, stage_summary
from accullm_cli.stages.validate import (
    artifact_sha256,
    hash_of_files,
    load_fidelity,
    stage_name,
    validate,
    validate_inputs,
)

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
class DryRun:
    """What a conversion would do. Nothing was written.

    stages: as the run would find them, but that of an artifact made of changed inputs nothing is known, so that it
    counts as changed; a stage asked for alone is the last one.
    device: where weights are rounded and artifacts run. peak_bytes and seconds are estimates for the CPU; what a GPU
    saves is not in them. bits_per_weight and artifact_bytes are those of the first format: exact where size_is_exact
    says so, and otherwise the most that they may come to. artifact_bytes are the artifact's tensors and the tokenizer
    files, to which a few kilobytes of JSON and headers come.
    """

    model: str
    run: str
    artifact: str
    stages: tuple[PlannedStage, ...]
    device: str
    bits_per_weight: float
    artifact_bytes: int
    size_is_exact: bool
    peak_bytes: int
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
    with _open_job(config, progress) as job:
        if config.search.golden:
            return (_convert_golden(job, fresh),)
        outcomes = list(_run_stages(job, fresh))
        return tuple(
            _finish_report(job, name, directory, outcomes)
            for name, directory in artifact_directories(job, artifact_path(config)).items()
        )


def run_stage(name: str, config: Config, progress: Progress = silent, fresh: bool = False) -> StageResult:
    """Run one stage of a conversion; the stages before it must be finished and up to date.

    Args:
        name: one of STAGES.

    Raises:
        AccullmError: an earlier stage has not run for this configuration.
    """
    refuse_golden(config, name)
    with _open_job(config, progress, only=name) as job:
        outcomes: list[StageOutcome] = []
        for outcome in _run_stages(job, fresh):
            outcomes.append(outcome)
            if outcome.name == name != "validate":
                break
        reports = []
        if name == "validate":
            for format_name, directory in artifact_directories(job, artifact_path(config)).items():
                reports.append(_finish_report(job, format_name, directory, outcomes))
        record = outcomes[-1].record
        outputs = tuple(str(job.run.file(output)) for output in record.outputs)
        return StageResult(name, str(job.run.path), outputs, record.seconds, tuple(reports))


def validate_artifact(artifact: Path, config: Config, progress: Progress = silent, fresh: bool = False) -> Report:
    """Measure a finished artifact, wherever it was made, against its original.

    Args:
        artifact: its directory.
        config: `config.model` names the original, or is `artifact` itself: then the original is the one that its
            manifest names. `config.validation` and `config.calibration.seq_len` count.
            Working files go to `config.machine.run`, by default the artifact's directory with .validation behind.

    Raises:
        AccullmError: it is not an artifact, or it was made from another model than the original.
    """
    manifest = read_manifest(artifact)
    check_format(config, manifest.format)
    run = config.machine.run or artifact.with_name(f"{artifact.resolve().name}.validation")
    if Path(config.model).resolve() == artifact.resolve():
        config = config.model_copy(update={"model": _named_original(artifact, manifest.provenance)})
    with _open_job(config, progress, run=run, checks_output=False) as job:
        # The name alone proves nothing: the content must be the one it was made from.
        made_from = manifest.provenance.get("source_sha256")
        if made_from != job.source.sha256:
            raise AccullmError(
                f"was made from another model than {job.source.origin}", artifact, "name its original with --original"
            )
        check_lengths(job)
        reference = make_reference(job, fresh)
        validated = _validate(job, manifest.format, artifact, reference.record.key, fresh)
        return _finish_report(job, manifest.format, artifact, [reference, *validated])


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
    check_config(config, run, "reference", only == "validate")
    with tempfile.TemporaryDirectory() as scratch, _threads(run, config):
        source = open_source(config.model, Path(scratch), progress)
        job = Job(config, run, source, progress, only)
        check_positions(job)
        decoder = preflight(job, artifact_path(config))
        check_texts(job)
        decided = _decide_search(job, fresh) if config.search.golden else _decide_stages(job, fresh)
        stages = tuple(PlannedStage(name, str(why), why.runs) for name, why in decided.items())
        plan = make_plan(job, decoder)
        estimated = estimate(job, decoder, plan)
        return DryRun(
            model=source.origin,
            run=str(run.path),
            artifact=str(artifact_path(config)),
            stages=stages,
            device=describe_device(device_of(config)),
            bits_per_weight=estimated.bits_per_weight,
            artifact_bytes=estimated.artifact_bytes,
            size_is_exact=estimated.size_is_exact,
            peak_bytes=estimated.peak_bytes,
            seconds=estimated.seconds,
        )


def _decide_search(job: Job, fresh: bool) -> dict[str, Reason]:
    """As `_decide_stages`, for a golden search, of which no more is known than where it begins and may end."""
    calibrating = calibrate_inputs(job)
    plans, known = job.config.search.max_plans, 0 if fresh else known_plans(job, key_of(calibrating))
    begun = f", and {known} known from an earlier search" if known else ""
    return {
        "calibrate": decide(job, "calibrate", calibrating, fresh),
        "search": Reason("new", f"up to {plans} plans{begun}; time is estimated for one"),
    }


def _decide_stages(job: Job, fresh: bool) -> dict[str, Reason]:
    """Why each stage would run, or not: what the conversion itself will find."""
    calibrating = calibrate_inputs(job)
    profiling = profile_inputs(job, key_of(calibrating))
    quantizing = quantize_inputs(job, key_of(calibrating), key_of(profiling))
    exporting = export_inputs(job, artifact_path(job.config), key_of(quantizing))
    inputs = {"calibrate": calibrating, "profile": profiling, "quantize": quantizing, "export": exporting}
    reasons: dict[str, Reason] = {}
    for name, of_stage in inputs.items():
        reasons[name] = decide(job, name, of_stage, fresh)
        if name == job.only:
            return reasons
    for format_name, directory in artifact_directories(job, artifact_path(job.config)).items():
        if not reasons["export"].runs:
            artifact = artifact_sha256(directory)
        else:
            files = known_files(job, exporting, format_name)
            artifact = hash_of_files(files) if files else "not known before it is written"
        name = stage_name(format_name)
        reasons[name] = decide(job, name, validate_inputs(job, artifact, key_of(calibrating)), fresh)
        if other_window_count(job):
            reference = other_reference_inputs(job)
            reasons[OTHER_REFERENCE] = decide(job, OTHER_REFERENCE, reference, fresh)
            name = stage_name(format_name, OTHER_TEXT)
            reasons[name] = decide(job, name, validate_inputs(job, artifact, key_of(reference)), fresh)
        if wants_speed(job.config):
            reasons[SPEED] = decide(job, SPEED, speed_inputs(job, artifact, key_of(calibrating)), fresh)
    return reasons


def artifact_path(config: Config) -> Path:
    """Where the artifact goes: `export.out`, or the model's short name with -int4 (the bits) behind, here.

    Raises:
        AccullmError: `export.out` is the root directory.
    """
    if (out := config.export.out) is not None:
        # Names beside it are made from its own: "." and ".." have none.
        named = out if out.name not in ("", "..") else out.resolve()
        if not named.name:
            raise AccullmError("is no place for an artifact", named, "give another directory with --out")
        return named
    name = Path(config.model.rstrip("/").partition("@")[0]).name.removesuffix(".gguf")
    return Path(f"{name or 'model'}-int{config.plan.bits}")


def run_path(config: Config) -> Path:
    """Where the working files go: `machine.run`, or the artifact's directory with .run behind."""
    out = artifact_path(config)
    return config.machine.run or out.with_name(f"{out.name}.run")


# -- before the first stage --------------------------------------------------------------------------------


@contextmanager
def _open_job(
    config: Config,
    progress: Progress,
    only: str | None = None,
    run: Path | None = None,
    checks_output: bool = True,
) -> Iterator[Job]:
    """Lock the run directory, fix the thread count, open the source and refuse what cannot work."""
    directory = RunDirectory(run or run_path(config))
    foreign, only_validates = ("reference", only == "validate") if checks_output else ("calibrate", True)
    check_config(config, directory, foreign, only_validates)
    with directory.locked(), directory.removed_if_refused(), _threads(directory, config) as threads:
        source = open_source(config.model, directory.path, progress)
        job = Job(config, directory, source, progress, only)
        check_positions(job)
        if checks_output:
            preflight(job, artifact_path(config))
        resolved = config.model_dump(mode="json")
        resolved["machine"]["threads"] = threads
        write_text(directory.file("run.yaml"), yaml.safe_dump(resolved, sort_keys=False))
        yield job


@contextmanager
def _threads(run: RunDirectory, config: Config) -> Iterator[int]:
    """Use the configured number of threads, else the one this run began with, else all that the process may use."""
    count = config.machine.threads
    if count is None and run.file("run.yaml").exists():
        count = yaml.safe_load(run.file("run.yaml").read_text())["machine"]["threads"]
    if count is None:
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)


# -- the stages in order -----------------------------------------------------------------------------------


def _run_stages(job: Job, fresh: bool) -> Iterator[StageOutcome]:
    """calibrate, profile, quantize, export, and validate once for each format."""
    calibrated = calibrate(job, fresh)
    yield calibrated
    profiled = profile(job, calibrated.record.key, fresh)
    yield profiled
    quantized = quantize(job, calibrated.record.key, profiled.record.key, fresh)
    yield quantized
    out = artifact_path(job.config)
    yield export(job, out, quantized.record.key, fresh)
    for name, directory in artifact_directories(job, out).items():
        yield from _validate(job, name, directory, calibrated.record.key, fresh)


def _validate(job: Job, format_name: str, directory: Path, reference_key: str, fresh: bool) -> Iterator[StageOutcome]:
    """Measure an artifact on the text that the contract is judged on, and on text of another kind."""
    yield validate(job, directory, format_name, reference_key, fresh)
    if other_window_count(job):
        other = make_other_reference(job, fresh)
        yield other
        yield validate(job, directory, format_name, other.record.key, fresh, OTHER_TEXT)
    if wants_speed(job.config):
        yield measure_speed(job, directory, artifact_sha256(directory), reference_key, fresh)


def _convert_golden(job: Job, fresh: bool) -> Report:
    """Search for the smallest plan, export it, and judge it on text that the search never saw."""
    calibrated = calibrate(job, fresh)
    found = search(job, calibrated, fresh)
    out = artifact_path(job.config)
    exported = export(found.job, out, found.outcomes[-1].record.key, fresh)
    validated = _validate(found.job, GOLDEN_FORMAT, out, calibrated.record.key, fresh)
    outcomes = [*found.outcomes, exported, *validated]
    return _finish_report(found.job, GOLDEN_FORMAT, out, outcomes, found.trials, report_path(job, GOLDEN_FORMAT))


def _finish_report(
    job: Job,
    format_name: str,
    directory: Path,
    outcomes: Sequence[StageOutcome],
    trials: tuple[Trial, ...] = (),
    destination: Path | None = None,
) -> Report:
    """Judge the contract, write the report, and put the measured figures into the artifact.

    Args:
        trials: of a golden search.
        destination: directory of the report, where it is not the job's own.
    """
    destination = destination or report_path(job, format_name)
    artifact = open_artifact(directory)
    fidelity = load_fidelity(job, format_name)
    manifest = read_manifest(directory)
    weights = sum(linear.weights for linear in artifact.plan.linears.values())
    bits_per_weight = 8 * sum(artifact.linear_bytes(name) for name in artifact.plan.linears) / weights
    size = sum(entry.bytes for entry in manifest.files.values())
    records = tuple(dict.fromkeys(sentence for outcome in outcomes for sentence in outcome.record.records))
    requirements = [parse_requirement(text) for text in job.config.validation.require]
    # What profile says is the plan, and no deviation from it.
    planned = {sentence for outcome in outcomes if outcome.name == "profile" for sentence in outcome.record.records}
    fallbacks = [sentence for sentence in records if sentence not in planned]
    contract = judge(requirements, fidelity, bits_per_weight, size, fallbacks)
    report = Report(
        schema_version=REPORT_SCHEMA_VERSION,
        model=job.source.origin,
        source_sha256=job.source.sha256,
        artifact=str(directory),
        format=format_name,
        artifact_sha256=artifact_sha256(directory),
        bits_per_weight=bits_per_weight,
        artifact_bytes=size,
        source_bytes=job.source.weight_bytes,
        fidelity=fidelity,
        contract=contract,
        contract_met=all(clause.met for clause in contract),
        records=records,
        stages=tuple(stage_summary(outcome) for outcome in outcomes),
        linears=linear_summaries(job, artifact),
        versions=versions(),
        other=load_fidelity(job, format_name, OTHER_TEXT) if other_window_count(job) else None,
        speed=load_speed(job) if wants_speed(job.config) else None,
        search=trials,
        directory=str(destination),
    )
    write_report(report, destination)
    record_fidelity(directory, report)
    return report


def _named_original(artifact: Path, provenance: Mapping[str, Any]) -> str:
    """The model that an artifact says it was made from: a hub id, an alias, or a directory that may not be here."""
    name = str(provenance.get("source", ""))
    if "/" not in name and name not in aliases():
        raise AccullmError(f"was made from {name or 'an unnamed model'}", artifact, "name its place with --original")
    return name


def report_path(job: Job, format_name: str) -> Path:
    """The directory of a report: `report` in the run directory, and a directory below it for each format."""
    return job.run.file("report") / format_name
