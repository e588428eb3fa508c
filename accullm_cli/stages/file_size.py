"""A plan for a file that is to be no larger than so many bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from accullm_cli.errors import AccullmError
from accullm_cli.formats import FORMATS
from accullm_cli.formats.base import ModelShape
from accullm_cli.formats.gguf_pace import Pace
from accullm_cli.model.gguf_parts import files_of
from accullm_cli.quant.budget import Choices
from accullm_cli.quant.plan import LinearPlan, Plan
from accullm_cli.stages.job import Job

FLAG = "--file-size"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def file_bytes(text: str) -> int:
    """The bytes that a size ("105MB", "1.2 GiB") or a file has.

    Raises:
        AccullmError: it is neither.
    """
    path = Path(text).expanduser()
    if path.is_file():
        return sum(part.stat().st_size for part in files_of(path))
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmg]i?|)b?\s*", text, re.IGNORECASE)
    if found is None:
        raise AccullmError(f"{text!r} is neither a size nor a file", FLAG, "give 105MB, say, or the path of a file")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def pace_asked_for(job: Job) -> Pace | None:
    """That of the file that the new one is to be no larger than; None where a size is asked for by no GGUF file."""
    asked = job.config.plan.file_size
    path = None if asked is None else Path(asked).expanduser()
    format: Any = FORMATS[job.format]
    return format.pace_of(path) if path is not None and path.is_file() else None


def pace_sentences(job: Job, time_of_plan: Callable[[], float]) -> Iterator[str]:
    """What the report says where the plan is not held to the pace of a file, or cannot keep it."""
    pace = pace_asked_for(job)
    if pace is None:
        return
    name = Path(str(job.config.plan.file_size)).name
    if pace.unknown:
        unknown = ", ".join(pace.unknown)
        yield f"{name} holds {unknown}, and how fast a CPU is with that is not known here: the plan goes by size alone"
    elif (longer := time_of_plan() / pace.time - 1) > 0:
        yield f"no plan of the size of {name} is as fast as it is on a CPU; this one takes {longer:.0%} longer"


def made_from(job: Job) -> Mapping[str, Any]:
    """What an artifact says of the model and the configuration that it was made from."""
    config = job.config.model_dump(mode="json", include={"calibration", "plan", "rounding"})
    # A text is named by what it is, not where it lies, and so is a file.
    config["calibration"]["text"] = Path(config["calibration"]["text"]).name
    if config["plan"].get("file_size"):
        config["plan"]["file_size"] = str(file_bytes(config["plan"]["file_size"]))
    return {
        # A path says where the source lay on one machine; a hub id with its revision holds everywhere.
        "source": job.source.name if Path(job.source.origin).exists() else job.source.origin,
        "source_sha256": job.source.sha256,
        "config": config,
    }


def within_file(
    job: Job, shape: ModelShape, choices: Choices, sorted_out: Callable[[Plan], Plan], beside: Iterable[LinearPlan]
) -> Plan:
    """The plan of least expected loss whose file is no larger than it may be, and no slower than one that it names.

    Args:
        sorted_out: makes the plan of the model of one that has embeddings among its linears.
        beside: what takes time, too, and is not chosen.

    Raises:
        AccullmError: the smallest file is larger.
    """
    limit = file_bytes(str(job.config.plan.file_size))
    format: Any = FORMATS[job.format]
    size_of = format.file_size(shape, made_from(job))
    smallest = size_of(sorted_out(choices.smallest()))
    if smallest > limit:
        raise AccullmError(f"no file of {limit:,} bytes can be had: the smallest has {smallest:,}", FLAG, "give more")
    pace, most_time = pace_asked_for(job), math.inf
    if pace is not None and not pace.unknown:
        most_time = pace.time - sum(map(choices.time_of, beside))
    return sorted_out(choices.fitting(lambda plan: size_of(sorted_out(plan)) <= limit, most_time))
