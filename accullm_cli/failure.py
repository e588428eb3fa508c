"""What an exception is to the user: one line and an exit code."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from accullm_cli.errors import EXIT_FAULT, EXIT_MACHINE, EXIT_USAGE, AccullmError, is_out_of_memory
from accullm_cli.run import machine_error

# Of a name, as many characters are shown.
SHOWN = 80


def failure_of(error: Exception, verbose: bool = False) -> tuple[str, int]:
    """The line and the exit code: what the user can mend, the machine's limit, or a fault of ours.

    Args:
        verbose: the traceback was shown.
    """
    if isinstance(error, AccullmError):
        return one_line(error.line()), error.exit_code
    if is_out_of_memory(error):
        hint = "give fewer --samples or a shorter --seq-len, or free memory, and run the same command again to resume"
        return AccullmError("out of memory", None, hint).line(), EXIT_MACHINE
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return machine_error(error, Path(error.filename or ".")).line(), EXIT_MACHINE
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        name = str(error.filename)
        shown = name if len(name) <= SHOWN else f"{name[:SHOWN]}…"
        return AccullmError(
            "no file can have a name that long", one_line(shown), "check its spelling"
        ).line(), EXIT_USAGE
    fault = one_line(f"{type(error).__name__}: {error}").rstrip(": ")
    hint = "please report it with the traceback above" if verbose else "run with --verbose for the traceback"
    return f"{fault}; this is a fault of accullm; {hint}", EXIT_FAULT


def one_line(text: str) -> str:
    """Text without line ends."""
    return re.sub(r"\s*\n\s*", " ", text.strip())
