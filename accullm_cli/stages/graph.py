"""All stages in the order in which they can run: what every command walks.

    reading ──► calibrate ──► profile ──► quantize ──► export ──► validate FORMAT [on other text], validate speed
                    ┊     └─► profile FORMAT ──► quantize FORMAT ─┘   ▲
                    └┈┈┈┈┈┈ reference, other reference ───────────────┘

Calibrate makes the references along the way, where they are missing: they depend on the original and their text alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from accullm_cli.stages.calibrate import CALIBRATE
from accullm_cli.stages.device import wants_speed
from accullm_cli.stages.export import exporting
from accullm_cli.stages.job import Job
from accullm_cli.stages.profile import planning
from accullm_cli.stages.quantize import rounding
from accullm_cli.stages.reading import READING
from accullm_cli.stages.reference import reference
from accullm_cli.stages.speed import speed
from accullm_cli.stages.stage import Stage
from accullm_cli.stages.texts import texts_of
from accullm_cli.stages.validate import validation


def conversion(job: Job) -> list[Stage]:
    """From the source to artifacts that were measured."""
    made = [stage(name) for name in job.artifacts for stage in (planning, rounding)]
    return [READING, CALIBRATE, *made, exporting(job.artifacts), *measurements(job, job.artifacts)]


def shared_by_plans(job: Job) -> list[Stage]:
    """Of a search over plans, what is done once for all of them."""
    return [READING, CALIBRATE, *(reference(text) for text in texts_of(job))]


def measurements(job: Job, artifacts: Mapping[str, Path]) -> list[Stage]:
    """What holds artifacts, by format, against their original."""
    stages: list[Stage] = []
    for text in texts_of(job):
        stages.append(reference(text))
        stages += [validation(name, directory, text) for name, directory in artifacts.items()]
    if wants_speed(job.config):
        stages += [speed(name, directory) for name, directory in artifacts.items()]
    return stages
