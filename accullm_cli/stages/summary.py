"""What the report tells of stages and linears."""

from __future__ import annotations

from accullm_cli.formats.stored import StoredArtifact
from accullm_cli.measure.result import LinearSummary, StageSummary
from accullm_cli.stages.job import Job
from accullm_cli.stages.stage import StageOutcome
from accullm_cli.stages.units import block_unit, load_record


def stage_summary(outcome: StageOutcome) -> StageSummary:
    record = outcome.record
    return StageSummary(outcome.name, str(outcome.reason), outcome.reason.runs, record.seconds, record.peak_bytes)


def linear_summaries(job: Job, artifact: StoredArtifact) -> tuple[LinearSummary, ...]:
    """Every linear of the plan, with the error that quantize found where it ran here."""
    errors: dict[str, float | None] = {}
    index = 0
    while (block := load_record(job, block_unit(index))) is not None:
        errors |= block.relative_errors
        index += 1
    return tuple(
        LinearSummary(
            name=name,
            out_features=plan.out_features,
            in_features=plan.in_features,
            bits=plan.bits,
            group_size=plan.group_size,
            outliers=len(plan.outlier_index),
            bits_per_weight=8 * artifact.linear_bytes(name) / plan.weights,
            relative_error=errors.get(name),
        )
        for name, plan in artifact.plan.linears.items()
    )
