"""Copy edits of code: one change, and nothing else."""

from __future__ import annotations

import random
import re

from accullm_cli.tasks.item import Family, Item, fenced, is_verbatim, unfenced
from accullm_cli.tasks.wordlist import THINGS

NAME = "code"
KINDS = ("repeat", "rename", "constant", "delete")
_LINES = {"easy": 2, "medium": 4, "hard": 10}


def make(rng: random.Random, kind: str, level: str) -> Item:
    names = rng.sample(THINGS, 4)
    lines = _function(rng, names[:3], _LINES[level])
    edited = [*lines]
    if kind == "repeat":
        what = "Repeat this code exactly"
    elif kind == "rename":
        # A function has its name in one place, a variable in many.
        old, new = names[0] if level == "easy" else names[1], names[3]
        what = f"Rename {old} to {new} and change nothing else"
        edited = [re.sub(rf"\b{old}\b", new, line) for line in lines]
    elif kind == "constant":
        place = rng.randrange(1, len(lines) - 1)
        value, other = lines[place].rpartition(" ")[2], str(rng.randint(100, 999))
        what = f"Replace the number {value} by {other} and change nothing else"
        edited[place] = f"{lines[place].removesuffix(value)}{other}"
    else:
        place = rng.randrange(1, len(lines) - 1)
        what = f"Delete the line with the number {lines[place].rpartition(' ')[2]} and change nothing else"
        del edited[place]
    question = f"{fenced(chr(10).join(lines), 'python')}\n{what}. Answer with the code only."
    code = "\n".join(edited)
    return Item(NAME, level, kind, question, fenced(code, "python"), (code, fenced(code, "")))


def _function(rng: random.Random, names: list[str], count: int) -> list[str]:
    """A function of two arguments with so many lines, each with a number of its own."""
    function, first, second = names
    lines = [f"def {function}({first}, {second}):"]
    for number in rng.sample(range(2, 100), count):
        target, other = rng.sample((first, second), 2)
        lines.append(f"    {target} = {other} {rng.choice('+-*')} {number}")
    return [*lines, f"    return {first} + {second}"]


def is_right(item: Item, text: str) -> bool:
    """Line by line; fences, and spaces at the end of a line, do not count."""
    return is_verbatim(item, text) or _stripped(text) == _stripped(item.answer)


def _stripped(text: str) -> list[str]:
    return [line.rstrip() for line in unfenced(text).splitlines()]


FAMILY = Family(NAME, KINDS, make, is_right)
