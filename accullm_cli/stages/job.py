"""What every stage gets, and what running one as part of a run means: decide, time, write into the manifest."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from accullm_cli.config import Config, Section
from accullm_cli.errors import AccullmError
from accullm_cli.model.source import ModelSource
from accullm_cli.progress import Event, Progress
from accullm_cli.run import (
    Reason,
    RunDirectory,
    StageRecord,
    file_sha256,
    peak_memory,
    reset_peak_memory,
)

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Job:
    """One conversion: its configuration, run directory, source, and who is told about progress.

    only: the one stage that may run, where a single one was asked for; the others must be up to date.
    """

    config: Config
    run: RunDirectory
    source: ModelSource
    progress: Progress
    only: str | None = None

    def may_run(self, stage: str) -> bool:
        return self.only in (None, stage.split()[0])


@dataclass(frozen=True)
class StageOutcome:
    """What became of one stage: why it ran or not, and its record in the manifest."""

    name: str
    reason: Reason
    record: StageRecord


@dataclass(frozen=True)
class Work:
    """What a stage's work function returns: the files it wrote and what it treated differently from the plan."""

    outputs: tuple[Path, ...]
    records: tuple[str, ...] = ()


def run_stage(
    job: Job, name: str, inputs: Mapping[str, str], force: bool, work: Callable[[Reason], Work]
) -> StageOutcome:
    """Run `work` if the stage's inputs changed or its outputs are gone, and put it on record.

    Args:
        inputs: `kind:name` to value; see `run.compare_inputs`.

    Raises:
        AccullmError: it would have to run, but another stage was asked for.
    """
    reason = decide(job, name, inputs, force)
    if not reason.runs:
        job.progress(Event(name, "skip", reason=reason))
        return StageOutcome(name, reason, job.run.stages()[name])
    job.progress(Event(name, "start", reason=reason))
    reset_peak_memory()
    started = time.monotonic()
    done = work(reason)
    for sentence in done.records:
        job.progress(Event(name, "record", sentence))
    record = StageRecord(
        inputs=dict(inputs),
        outputs={_relative(path, job.run.path): file_sha256(path) for path in done.outputs},
        seconds=round(time.monotonic() - started, 3),
        peak_bytes=peak_memory(),
        records=list(done.records),
        versions=versions(),
    )
    job.run.finish(name, record)
    job.progress(Event(name, "end"))
    return StageOutcome(name, reason, record)


def decide(job: Job, name: str, inputs: Mapping[str, str], force: bool) -> Reason:
    """Why a stage runs or is skipped, for a run and a dry run alike.

    Raises:
        AccullmError: it would have to run, but another stage was asked for.
    """
    reason = job.run.decide(name, inputs, force and job.may_run(name))
    if reason.runs and not job.may_run(name):
        state = "has not run" if reason.code == "new" else f"is not up to date: {reason}"
        raise AccullmError(f"{name} {state}", job.run.path, f"run accullm {name} with the same options first")
    return reason


def section_inputs(section: str, values: Section, *fields: str) -> dict[str, str]:
    """The stage inputs that a configuration section gives: `config:SECTION.FIELD` to its value."""
    chosen = fields or tuple(type(values).model_fields)
    return {f"config:{section}.{field}": repr(getattr(values, field)) for field in chosen}


def machine_inputs(device: torch.device = CPU) -> dict[str, str]:
    """What the bytes of a result depend on beside inputs and algorithm: sums differ between kinds of CPU and GPU."""
    return {
        "machine:device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "machine:instruction set": torch.backends.cpu.get_cpu_capability(),
        "machine:threads": str(torch.get_num_threads()),
        "version:torch": torch.__version__,
        "version:transformers": transformers.__version__,
    }


def versions() -> dict[str, str]:
    """Versions of what computes, for the manifest."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _relative(path: Path, base: Path) -> str:
    """`path` as the manifest names it: relative inside the run directory, absolute elsewhere."""
    path, base = path.absolute(), base.absolute()
    return str(path.relative_to(base)) if path.is_relative_to(base) else str(path)
