"""Texts that are on every machine that runs this: Python's own prose and code, and licences of packages it needs.

Documents are split by a hash of their name into one part for calibration and one that only validation sees. Python's
texts repeat one another in places (the topic "compound" holds the topics "if" and "for"), so runs of lines that also
occur in the held-out part are cut out of the calibration part.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Part = Literal["calibration", "held out"]

# One document in this many is held out.
_HELD_OUT = {"prose": 3, "code": 4}
# A run of this many lines that are not blank counts as the same text if it is long enough to be no accident.
_RUN_LINES = 3
_RUN_CHARACTERS = 60

# Not everywhere (distributions package them apart), written by a machine, or tables rather than code.
_LEFT_OUT = frozenset(
    "test tests idlelib lib2to3 distutils tkinter turtledemo turtle.py ensurepip encodings pydoc_data site-packages "
    "dist-packages __pycache__ entities.py __phello__".split()
)
_FILE_SIZE = range(2_000, 200_000)  # bytes
_HEADER_SIZE = range(4_000, 200_000)
_DOCSTRING_LENGTH = 1_000  # characters; shorter ones are mostly lists of names
_LICENSED = (
    "torch transformers numpy safetensors huggingface_hub pydantic PyYAML tqdm regex packaging matplotlib".split()
)


@dataclass(frozen=True)
class Document:
    """One text and the name that decides which part it belongs to."""

    name: str
    text: str


@cache
def code(part: Part) -> Sequence[Document]:
    """The standard library's source files, found once."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if _belongs(name, part, _HELD_OUT["code"]) and _LEFT_OUT.isdisjoint(name.split("/")):
            if not path.name.startswith("_sysconfigdata") and path.stat().st_size in _FILE_SIZE:
                documents.append(Document(name, path.read_text(encoding="utf-8", errors="replace")))
    return tuple(documents)


def prose(part: Part, modules: Iterable[Document]) -> list[Document]:
    """Python's language reference by topic, and the long docstrings of `modules` (the `code` of the same part)."""
    from pydoc_data.topics import topics

    documents = [
        Document(f"topic {name}", text)
        for name, text in sorted(topics.items())
        if text.strip() and _belongs(f"topic {name}", part, _HELD_OUT["prose"])
    ]
    for module in modules:
        docstring = _module_docstring(module.text)
        if len(docstring) >= _DOCSTRING_LENGTH:
            documents.append(Document(f"docstring of {module.name}", docstring))
    return documents


def licences() -> list[Document]:
    """Licence texts of packages that are needed anyway; what several share is kept once. For calibration only."""
    seen: set[str] = set()
    documents = []
    for package in _LICENSED:
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in sorted(files):
            if re.search(r"\.dist-info/(licenses/)?(LICEN[CS]E|COPYING|NOTICE)[^/]*$", str(file)):
                text = without_runs(Path(str(file.locate())).read_text(encoding="utf-8", errors="replace"), seen)
                seen.update(line_runs(text))
                if len(text) > 500:
                    documents.append(Document(f"{package} {file.name}", text))
    return documents


def headers() -> list[Document]:
    """The C++ headers of torch's operators: a language that no other text here is written in."""
    root = Path(str(importlib.metadata.distribution("torch").locate_file("torch/include/ATen")))
    documents = []
    for path in sorted(root.glob("**/*.h")):
        # Those in `ops` are thousands, written by a machine.
        if "ops" not in path.parts and path.stat().st_size in _HEADER_SIZE:
            name = path.relative_to(root).as_posix()
            documents.append(Document(name, path.read_text(encoding="utf-8", errors="replace")))
    return documents


@cache
def held_out_runs() -> Set[str]:
    """The line runs of all that validation alone sees."""
    unseen = code("held out")
    return runs_of([*unseen, *prose("held out", unseen)])


def runs_of(documents: Iterable[Document]) -> set[str]:
    """The line runs of all these documents."""
    return {run for document in documents for run in line_runs(document.text)}


def pieces(documents: Iterable[Document], size: int, rng: random.Random) -> Iterator[str]:
    """Pieces of about `size` characters, cut between lines: one of every document, then a second of each, ...

    So a few long documents do not crowd out the others. Order and choice are `rng`'s; no piece comes twice.
    """
    queues = [[piece for piece in _cut(document.text, size) if _is_language(piece)] for document in documents]
    queues = [queue for queue in queues if queue]
    for queue in queues:
        rng.shuffle(queue)
    while queues:
        rng.shuffle(queues)
        for queue in queues:
            yield queue.pop()
        queues = [queue for queue in queues if queue]


def line_runs(text: str) -> Iterator[str]:
    """Every run of three lines that are not blank, without indentation, if it is long enough to be no accident."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for start in range(len(lines) - _RUN_LINES + 1):
        run = "\n".join(lines[start : start + _RUN_LINES])
        if len(run) >= _RUN_CHARACTERS:
            yield run


def without_runs(text: str, runs: Set[str]) -> str:
    """`text` without the lines of any of these runs."""
    lines = text.splitlines()
    while True:
        filled = [number for number, line in enumerate(lines) if line.strip()]
        shared: set[int] = set()
        for start in range(len(filled) - _RUN_LINES + 1):
            window = filled[start : start + _RUN_LINES]
            if "\n".join(lines[number].strip() for number in window) in runs:
                shared.update(window)
        if not shared:
            return "\n".join(lines)
        # What is left moves together and may form such a run anew, so look again.
        lines = [line for number, line in enumerate(lines) if number not in shared]


def _module_docstring(source: str) -> str:
    """What stands in the first triple quotes, if only comments and blank lines come before; much faster than ast."""
    lines = source.splitlines(keepends=True)
    start = sum(len(line) for line in itertools.takewhile(lambda line: line.startswith("#") or line.isspace(), lines))
    opening = re.compile(r'[rR]?"""').match(source, start)
    return source[opening.end() :].partition('"""')[0] if opening else ""


def _belongs(name: str, part: Part, every: int) -> bool:
    """Whether a document of this name is in `part`, where one of `every` documents is held out."""
    held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % every == 0
    return held_out == (part == "held out")


def _is_language(piece: str) -> bool:
    """Whether a piece is more than a table of numbers: at most one character of eight is a digit."""
    return 8 * sum(map(piece.count, "0123456789")) <= len(piece)


def _cut(text: str, size: int) -> list[str]:
    """`text` in pieces of at least `size` characters that end with a line; the last may be shorter."""
    found, start = [], 0
    while start < len(text):
        end = text.find("\n", start + size)
        end = len(text) if end < 0 else end + 1
        found.append(text[start:end])
        start = end
    return found
