"""JSON Lines as text: what a user's file of `messages`, `text`, or `prompt` and `completion` says to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from accullm_cli.errors import AccullmError
from accullm_cli.json_text import parse_json, parse_json_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SUFFIXES = (".jsonl", ".ndjson")
# The keys of an object, by what they make it.
_KINDS = {"messages": ("messages",), "text": ("text",), "prompt and completion": ("prompt", "completion")}
_HINT = "give one object a line with messages, text, or prompt and completion"


@dataclass(frozen=True)
class JsonLines:
    """The objects of a file, all of one kind.

    rows: line number and content: a string, or a list of messages and the tools that they may use.
    """

    path: Path
    kind: str
    rows: Sequence[tuple[int, str | tuple[list[Any], Any]]]

    def render(self, row: int, tokenizer: PreTrainedTokenizerBase) -> str:
        """A row as the text that the model reads; messages go through the model's chat template.

        Raises:
            AccullmError: there is no template, or the messages do not fit it.
        """
        line, content = self.rows[row]
        if isinstance(content, str):
            return content
        if tokenizer.chat_template is None:
            raise AccullmError(
                "holds messages, but the model's tokenizer has no chat template",
                self.path,
                "put its chat_template.jinja beside the model, or give text",
            )
        messages, tools = content
        try:
            return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))
        except Exception as error:  # a template is a program: it may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            _refuse(self.path, line, f"its messages do not fit the model's chat template ({reason})", "correct them")


def parse_json_lines(text: str, path: Path) -> JsonLines | None:
    """The rows of a file of JSON Lines, by its name or its first line; None for plain text.

    Raises:
        AccullmError: other JSON: an array, an object over several lines, objects with other keys or of several kinds.
    """
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1)]
    lines = [(number, line) for number, line in lines if line]
    if not lines or not (path.suffix.lower() in _SUFFIXES or _is_object(lines[0][1])):
        _refuse_whole(text, path)
        return None
    rows: list[tuple[int, str | tuple[list[Any], Any]]] = []
    kind = ""
    for number, line in lines:
        try:
            row = parse_json_line(line)
        except ValueError as error:
            _refuse(path, number, f"not JSON ({error})", _HINT)
        if not isinstance(row, dict):
            _refuse(path, number, f"{_name_of(row)}, not an object", _HINT)
        kinds = [name for name, keys in _KINDS.items() if all(key in row for key in keys)]
        if not kinds:
            keys = ", ".join(map(str, row)) or "none"
            _refuse(path, number, f"has neither messages nor text nor prompt and completion (its keys: {keys})", _HINT)
        if len(kinds) > 1:
            _refuse(path, number, f"has both {kinds[0]} and {kinds[1]}", "keep one of them")
        if kind and kinds[0] != kind:
            _refuse(path, number, f"has {kinds[0]}, but the lines before it have {kind}", "give one file of each")
        kind = kinds[0]
        rows.append((number, _content(row, kind, path, number)))
    return JsonLines(path, kind, rows)


def _content(row: Mapping[str, Any], kind: str, path: Path, line: int) -> str | tuple[list[Any], Any]:
    values = [row[key] for key in _KINDS[kind]]
    if kind != "messages" and all(isinstance(value, str) for value in values):
        return "".join(values)
    if kind != "text" and all(map(_is_messages, values)):  # a prompt and a completion may be messages, too
        return [message for value in values for message in value], row.get("tools")
    strings = "a string" if kind == "text" else "strings"
    messages = "a list of objects with role and content"
    wanted = {"text": strings, "messages": messages}.get(kind, f"{strings}, nor lists of objects with role and content")
    _refuse(path, line, f"{kind} {'is' if len(values) == 1 else 'are'} not {wanted}", "correct it")


def _is_messages(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
            for message in value
        )
    )


def _is_object(line: str) -> bool:
    if not line.startswith("{"):
        return False
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


def _refuse_whole(text: str, path: Path) -> None:
    """Refuse a file that is JSON, but no JSON Lines: read as plain text it would teach a model to write brackets."""
    is_json = path.suffix.lower() == ".json"
    if not (is_json or text.lstrip().startswith(("{", "["))):
        return
    try:
        content = parse_json(text)
    except ValueError as error:
        if not is_json:
            return
        raise AccullmError(f"not JSON ({error})", path, _HINT) from None
    if is_json or isinstance(content, list | dict):
        raise AccullmError(f"is {_name_of(content)}, not JSON Lines", path, _HINT)


def _name_of(value: object) -> str:
    if isinstance(value, list):
        return "a JSON array"
    return "a JSON object" if isinstance(value, dict) else "a JSON value"


def _refuse(path: Path, line: int, what: str, hint: str) -> NoReturn:
    raise AccullmError(what, f"{path}:{line}", hint)
