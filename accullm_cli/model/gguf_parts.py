"""The files that a model in GGUF is in: one, or parts, known by the names that llama-gguf-split gives them."""

from __future__ import annotations

import re
from pathlib import Path

_PART = re.compile(r"(?P<model>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def part_name(path: Path, number: int, count: int) -> Path | None:
    """What a part is called, counted from 1, of a model one part of which is at `path`; None where that has no such
    name."""
    found = _PART.fullmatch(path.name)
    return path.with_name(f"{found['model']}-{number:05d}-of-{count:05d}.gguf") if found else None


def files_of(path: Path) -> tuple[Path, ...]:
    """The files of the model that begins at `path`, as far as they are there."""
    found = _PART.fullmatch(path.name)
    if found is None or int(found["number"]) != 1:
        return (path,)
    names = (part_name(path, number, int(found["count"])) for number in range(2, int(found["count"]) + 1))
    return (path, *(name for name in names if name is not None and name.is_file()))
