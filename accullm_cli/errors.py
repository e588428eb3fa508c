"""What can go wrong, as one sentence each: what, where, and what to do about it."""

from __future__ import annotations

EXIT_OK = 0
EXIT_FAULT = 1
EXIT_USAGE = 2
EXIT_NOT_SO = 3
EXIT_MACHINE = 4


class AccullmError(Exception):
    """A refusal that the user can act on; the console prints it as one line and exits with `exit_code`.

    Args:
        what: what is wrong, without a full stop ("tensor model.norm.weight holds NaN").
        where: the file, key or flag it was found in.
        hint: what to do ("download the shard again").
    """

    exit_code = EXIT_USAGE

    def __init__(self, what: str, where: object | None = None, hint: str | None = None) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.hint = hint
        super().__init__(self.line())

    def line(self) -> str:
        """The error as the one line that the user reads."""
        parts = [part for part in (self.where, self.what) if part]
        line = ": ".join(parts)
        return f"{line}; {self.hint}" if self.hint else line


class MachineError(AccullmError):
    """The machine could not: out of memory or disk, or an unwritable path. The run can be resumed."""

    exit_code = EXIT_MACHINE


class NotSoError(AccullmError):
    """Looked, and it is not so: a hash differs, a limit is exceeded, a contract is not met."""

    exit_code = EXIT_NOT_SO


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python's or torch's says that memory ran out."""
    # torch has a type of its own, which must not be imported here.
    is_memory_error = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_memory_error or "can't allocate memory" in str(error)


def is_refusal_of_library(error: BaseException) -> bool:
    """Whether an exception says that another library's code cannot read what it was given.

    It is for calls of such code alone, which computes with whatever a file says: then it may be any exception, and a
    panic of Rust, but none of our own, and not that memory ran out.
    """
    is_theirs = isinstance(error, Exception) or type(error).__name__ == "PanicException"
    return is_theirs and not isinstance(error, AccullmError) and not is_out_of_memory(error)
