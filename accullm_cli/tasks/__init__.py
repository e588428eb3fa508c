"""Exact tasks: questions without end, each with one right answer and an exact scorer.

A family is one file: a seeded generator, and what counts as right. `--tasks` names families, a family at one level of
difficulty (`arithmetic:hard`, `retrieval:8000`), files of the user's own, or `default` for all families.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from accullm_cli.errors import AccullmError
from accullm_cli.tasks import arithmetic, code, identifiers, retrieval, sql, words
from accullm_cli.tasks.item import LEVELS, Family, Item, is_verbatim
from accullm_cli.tasks.own import is_file, own_items, repeated

__all__ = [
    "FAMILIES", "Family", "Item", "Task", "check_tasks", "draw", "family_of", "is_right", "parse_tasks", "repetitions",
]  # fmt: skip

FAMILIES: dict[str, Family] = {
    module.NAME: module.FAMILY for module in (arithmetic, words, retrieval, sql, identifiers, code)
}
WHERE = "--tasks"
# A family that is named without a level takes these in turns.
_USUAL_LEVELS = ("easy", "medium")
_SMALLEST, _LARGEST = 100, 1_000_000  # tokens of a level that is a number


@dataclass(frozen=True)
class Task:
    """One task that was asked for.

    name: as conditions name it: as it was written, or a file's name without its ending.
    family, level: of a generated one; path: of the user's file.
    """

    name: str
    family: str = ""
    level: str = ""
    path: Path | None = None


def parse_tasks(text: str) -> tuple[Task, ...]:
    """What `--tasks` asks for, in its order; nothing for "none".

    Raises:
        AccullmError: a name that is no family's, a level that a family does not have, a file that is not there, one
            name for two tasks.
    """
    if text.strip() == "none":
        return ()
    tasks: list[Task] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        tasks += [Task(family, family) for family in FAMILIES] if name == "default" else [_parse(name)]
    if not tasks:
        raise AccullmError("names no task", WHERE, f"give default, or some of {', '.join(FAMILIES)}")
    for place, task in enumerate(tasks):
        if task.name in {other.name for other in tasks[:place]}:
            raise AccullmError(f"{task.name} is given twice", WHERE, "give it once, or rename a file")
    return tuple(tasks)


def _parse(name: str) -> Task:
    if is_file(name):
        path = Path(name).expanduser()
        if not path.is_file():
            raise AccullmError("no such file", f"{WHERE} {name}", "give a file of JSON Lines")
        return Task(path.stem, path=path)
    family, _, level = name.partition(":")
    if family not in FAMILIES:
        raise AccullmError(
            f"{family!r} is no task", WHERE, f"give default, some of {', '.join(FAMILIES)}, or a file ending in .jsonl"
        )
    is_size = FAMILIES[family].takes_tokens and level.isascii() and level.isdecimal() and len(level) < 20
    if level and level not in LEVELS and not is_size:
        sizes = " or a number of tokens" if FAMILIES[family].takes_tokens else ""
        raise AccullmError(f"{level!r} is no level of {family}", WHERE, f"give {', '.join(LEVELS)}{sizes}")
    if is_size and not _SMALLEST <= int(level) <= _LARGEST:
        few = int(level) < _SMALLEST
        limit = f"{_SMALLEST} or more" if few else f"{_LARGEST:,} at most"
        raise AccullmError(f"{level} tokens are too {'few' if few else 'many'} for {family}", WHERE, f"give {limit}")
    return Task(name, family, level)


def check_tasks(text: str) -> None:
    """Refuse what `--tasks` cannot mean, before anything is computed; a user's file is read.

    Raises:
        AccullmError: as `parse_tasks`, or a line of a file is not what it should be.
    """
    for task in parse_tasks(text):
        if task.path is not None:
            own_items(task.name, task.path)


def draw(tasks: Sequence[Task], count: int, seed: int, purpose: str, shared: bool = False) -> list[Item]:
    """Items of each task: `count` of a generated one, all of a user's file.

    Args:
        purpose: "judged" or "search": items of one are never those of the other.
        shared: whether both purposes are in use, so that a user's file has to serve both: every second item each.

    Raises:
        AccullmError: a line of a file is not what it should be, or a file cannot serve both.
    """
    items: list[Item] = []
    for task in tasks:
        if task.path is not None:
            own = own_items(task.name, task.path)
            if shared and len(own) < 2:
                raise AccullmError(
                    "holds one item, and a search needs others than those that its choice is judged on",
                    task.path,
                    "give two or more, or leave out --golden",
                )
            items += own[purpose == "search" :: 2] if shared else own
            continue
        family = FAMILIES[task.family]
        for number in range(count):
            level = task.level or _USUAL_LEVELS[number // len(family.kinds) % len(_USUAL_LEVELS)]
            items.append(replace(family.draw(f"{purpose} {seed}", number, level), task=task.name))
    return items


def repetitions(tasks: Sequence[Task]) -> tuple[str, ...]:
    """A sentence for each file with lines that are left out."""
    paths = [task.path for task in tasks if task.path is not None]
    counts = ((path, repeated(path)) for path in paths)
    return tuple(
        f"{count} of the lines of {path.name} ask{'s' if count == 1 else ''} what an earlier one does, and "
        f"{'is' if count == 1 else 'are'} left out"
        for path, count in counts
        if count
    )


def family_of(item: Item) -> Family | None:
    """The family of an item; None for one of the user's, whatever the file is called."""
    return None if item.completion or item.messages else FAMILIES.get(item.task.partition(":")[0])


def is_right(item: Item, text: str) -> bool:
    """Whether a text answers an item."""
    family = family_of(item)
    return is_verbatim(item, text) if family is None else family.is_right(item, text)
