"""JSON that somebody else wrote."""

from __future__ import annotations

import json
import re
from typing import Any


def parse_json(content: str | bytes) -> Any:
    """What a JSON text stands for.

    Raises:
        ValueError: it is not JSON, not UTF-8, or nested deeper than any such file is.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("brackets are nested too deep") from None


def parse_json_line(line: str) -> Any:
    """As `parse_json`, of what a model shall read: no string in it may hold half of a character.

    Raises:
        ValueError: as there, or an escape such as \\ud83d stands without its other half.
    """
    found = parse_json(line)
    try:
        half = re.search("[\ud800-\udfff]", json.dumps(found, ensure_ascii=False))
    except RecursionError:
        raise ValueError("brackets are nested too deep") from None
    if half is not None:
        raise ValueError(f"\\u{ord(half[0]):04x} is half of a character")
    return found
