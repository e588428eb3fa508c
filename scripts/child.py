"""A conversion in a process of its own, as a user would start it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from accullm_cli.errors import AccullmError


def report_of(command: Sequence[str], where: str) -> dict[str, Any]:
    """The report of a command "accullm convert ... --json".

    Raises:
        AccullmError: it failed; `where` is what errors call it.
    """
    program = [sys.executable, "-m", "accullm_cli", *command[1:]]
    done = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise AccullmError(f"accullm convert ended with exit code {done.returncode}", where)
    (report,) = json.loads(done.stdout)["reports"]
    found: dict[str, Any] = report
    return found
