"""JSON that somebody else wrote."""

from __future__ import annotations

import json
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
