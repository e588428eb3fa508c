"""What a command leaves."""

from __future__ import annotations

from dataclasses import dataclass

from accullm_cli.console import json_text, render
from accullm_cli.errors import EXIT_OK


@dataclass(frozen=True)
class Outcome:
    """What a command leaves: the text for stdout and the exit code."""

    text: str
    code: int = EXIT_OK


def result_of(as_json: bool, name: str, value: object, code: int = EXIT_OK) -> Outcome:
    """A result that is itself what was asked for: a table, or JSON under `name`."""
    return Outcome(json_text(**{name: value}) if as_json else render(value), code)
