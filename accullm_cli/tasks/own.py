"""A user's own tasks: JSON Lines with prompt (or messages) and answer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from accullm_cli.errors import AccullmError
from accullm_cli.json_text import parse_json_line
from accullm_cli.tasks.item import Item

_SUFFIXES = (".jsonl", ".ndjson")
_HINT = "give one object a line with prompt (or messages) and answer"


def is_file(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES)


def own_items(task: str, path: Path) -> list[Item]:
    """Every line of the file as an item; one that asks what an earlier one does is left out.

    A prompt is a turn of the user's in a chat where the model has a template, and a text to continue where not.
    `answer` is a string, or a list of strings of which each is right.

    Raises:
        AccullmError: it cannot be read, or a line is not what it should be; the line is named.
    """
    items = [_item(task, path, number, line) for number, line in _lines(path)]
    if not items:
        raise AccullmError("holds no item", path, _HINT)
    # Two that are one would count twice in every interval, and be in a search and in what judges it.
    first: dict[object, Item] = {}
    for item in items:
        first.setdefault((item.question, item.messages, frozenset((item.answer, *item.also))), item)
    return list(first.values())


def repeated(path: Path) -> int:
    """How many lines of the file `own_items` leaves out."""
    return len(_lines(path)) - len(own_items("", path))


def _lines(path: Path) -> list[tuple[int, str]]:
    """The number and the text of each line that is not empty."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # other line ends may stand in a JSON string
    except (OSError, UnicodeDecodeError) as error:
        raise AccullmError(f"cannot be read ({error})", path, "give a file of JSON Lines in UTF-8") from None
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _item(task: str, path: Path, number: int, line: str) -> Item:
    def refuse(what: str, hint: str = _HINT) -> NoReturn:
        raise AccullmError(what, f"{path}:{number}", hint)

    try:
        row = parse_json_line(line)
    except ValueError as error:
        refuse(f"not JSON ({error})")
    if not isinstance(row, dict):
        refuse("is no object")
    if ("prompt" in row) == ("messages" in row):
        refuse("has both prompt and messages" if "prompt" in row else "has neither prompt nor messages")
    answers = row.get("answer")
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        refuse("its answer is no text, and no list of texts")
    common: dict[str, Any] = {
        "task": task, "level": "", "kind": f"line {number}", "answer": answers[0], "also": tuple(answers[1:]),
    }  # fmt: skip
    if "prompt" in row:
        if not isinstance(row["prompt"], str) or not row["prompt"].strip():
            refuse("its prompt is no text")
        return Item(question=row["prompt"], completion=True, **common)
    messages = row["messages"]
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        refuse("its messages are not a list of objects with role and content, both texts")
    if messages[-1]["role"] == "assistant":
        refuse("its messages end with the assistant's", "leave out the answer there, and give it as answer")
    turns = tuple((message["role"], message["content"]) for message in messages)
    return Item(question=turns[-1][1], messages=turns, **common)


def _is_message(message: object) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
