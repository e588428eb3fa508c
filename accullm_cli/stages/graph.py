"""All stages in the order in which they can run: what every command walks.

    reading ──► calibrate ──► profile ──► quantize ──► export ──► validate FORMAT [on other text], validate speed
                    ┊     └─► profile FORMAT ──► quantize FORMAT ─┘   ▲
                    └┈┈┈┈┈┈ reference, other reference ───────────────┘

Calibrate makes the references along the way, where they are missing: they depend on the original and their text alone.
Everything behind export comes from `stages.measures`.
"""

from __future__ import annotations

from accullm_cli.stages.calibrate import CALIBRATE
from accullm_cli.stages.export import exporting
from accullm_cli.stages.job import Job
from accullm_cli.stages.measures import measurements, needed_of_original
from accullm_cli.stages.profile import planning
from accullm_cli.stages.quantize import rounding
from accullm_cli.stages.reading import READING
from accullm_cli.stages.stage import Stage


def conversion(job: Job) -> list[Stage]:
    """From the source to artifacts that were measured."""
    made = [stage(name) for name in job.artifacts for stage in (planning, rounding)]
    return [READING, CALIBRATE, *made, exporting(job.artifacts), *measurements(job, job.artifacts)]


def shared_by_plans(job: Job) -> list[Stage]:
    """Of a search over plans, what is done once for all of them."""
    return [READING, CALIBRATE, *needed_of_original(job)]
