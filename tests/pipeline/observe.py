"""What a caller of the pipeline sees: files, and the one line of a refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from accullm_cli.errors import AccullmError


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time of change."""
    paths = sorted(directory.rglob("*"))
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file()}


def refusal(call: Callable[[], object]) -> str:
    """The line of an error that the user can mend."""
    with pytest.raises(AccullmError) as caught:
        call()
    assert caught.value.exit_code == 2
    return caught.value.line()
