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
from accullm_cli.tasks.own import is_file, own_items

__all__ = ["FAMILIES", "Family", "Item", "Task", "check_tasks", "draw", "family_of", "is_right", "parse_tasks"]

FAMILIES: dict[str, Family] = {
    module.NAME: module.FAMILY for module in (arithmetic, words, retrieval, sql, identifiers, code)
}
WHERE = "--tasks"
# A family that is named without a level takes these in turns.
_USUAL_LEVELS = ("easy", "medium")
_SMALLEST = 100  # tokens of a level that is a number


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
    if level and level not in LEVELS and not (FAMILIES[family].takes_tokens and level.isdecimal()):
        sizes = " or a number of tokens" if FAMILIES[family].takes_tokens else ""
        raise AccullmError(f"{level!r} is no level of {family}", WHERE, f"give {', '.join(LEVELS)}{sizes}")
    if level.isdecimal() and int(level) < _SMALLEST:
        raise AccullmError(f"{level} tokens are too few for {family}", WHERE, f"give {_SMALLEST} or more")
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
    """
    items: list[Item] = []
    for task in tasks:
        if task.path is not None:
            own = own_items(task.name, task.path)
            items += own[purpose == "search" :: 2] if shared else own
            continue
        family = FAMILIES[task.family]
        for number in range(count):
            level = task.level or _USUAL_LEVELS[number // len(family.kinds) % len(_USUAL_LEVELS)]
            items.append(replace(family.draw(f"{purpose} {seed}", number, level), task=task.name))
    return items


def family_of(item: Item) -> Family | None:
    """The family of an item; None for one of the user's."""
    return FAMILIES.get(item.task.partition(":")[0])


def is_right(item: Item, text: str) -> bool:
    """Whether a text answers an item."""
    family = family_of(item)
    return is_verbatim(item, text) if family is None else family.is_right(item, text)
