"""Stand-ins for the pipeline and for what commands answer: the command line is tested without torch."""

from __future__ import annotations

import types
from dataclasses import dataclass
from pathlib import Path

from accullm_cli.measure.result import Clause
from accullm_cli.progress import Event
from tests.samples import a_report

ROOT = Path(__file__).resolve().parents[2]
CONVERTING = ("convert", "calibrate", "profile", "quantize", "export", "validate")
MISSED = Clause("mean_kl<=0.02", "mean_kl", "<=", 0.02, 0.06612, False)


@dataclass(frozen=True)
class StageResult:
    stage: str
    run: str
    outputs: tuple[str, ...]
    seconds: float
    reports: tuple[object, ...] = ()


@dataclass(frozen=True)
class PlannedStage:
    name: str
    reason: str
    runs: bool


@dataclass(frozen=True)
class PlannedArtifact:
    format: str
    path: str
    bits_per_weight: float
    artifact_bytes: int


@dataclass(frozen=True)
class DryRun:
    model: str
    artifacts: tuple[PlannedArtifact, ...]
    stages: tuple[PlannedStage, ...]
    bits_per_weight: float
    artifact_bytes: int
    size_is_exact: bool
    peak_bytes: int
    seconds: float


class Pipeline(types.ModuleType):
    """Stands for accullm_cli.pipeline: notes what it is called with, and answers with tiny results."""

    def __init__(self) -> None:
        super().__init__("accullm_cli.pipeline")
        self.calls: list[tuple] = []
        self.reports = (a_report((), artifact="work/m-int4"),)
        self.failure: BaseException | None = None

    def convert_all(self, config, progress, fresh=False):
        self.calls.append(("convert_all", config, fresh))
        progress(Event("calibrate", "skip"))
        if self.failure:
            raise self.failure
        return self.reports

    def run_stage(self, name, config, progress, fresh=False):
        self.calls.append((name, config, fresh))
        reports = self.reports if name == "validate" else ()
        return StageResult(name, "work/m.run", ("out-a", "out-b"), 1.0, reports)

    def dry_run(self, config, progress, fresh=False, only=None):
        self.calls.append(("dry_run", config, fresh, only))
        stages = (PlannedStage("calibrate", "new", True), PlannedStage("validate accullm", "up to date", False))
        artifacts = tuple(
            PlannedArtifact(name, f"work/{name}", 4.4 + more, 130_000_000 + more)
            for more, name in enumerate(config.export.format)
        )
        exact = not config.plan.is_average
        return DryRun(config.model, artifacts, stages, 4.4, 130_000_000, exact, 2_000_000_000, 3700.0)

    def validate_artifact(self, artifact, config, progress, fresh=False):
        self.calls.append(("validate_artifact", artifact, config, fresh))
        return self.reports[0]


@dataclass(frozen=True)
class Comparison:
    mean_kl: float
    exceeded: tuple[str, ...]


@dataclass(frozen=True)
class Verification:
    files: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    required: bool
    detail: str
    hint: str


@dataclass(frozen=True)
class Diagnosis:
    checks: tuple[Check, ...]
