"""Locks on directories: they vanish with the process that holds them, however it ends, and say who that is."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from accullm_cli.errors import AccullmError, MachineError

# Characters of a holder's command that a refusal shows.
SHOWN = 200
# What the system says where a file system keeps no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class HeldError(AccullmError):
    """Another process is at work on a directory."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. since: UTC, as "2026-11-30 08:15:02"."""

    pid: int
    host: str
    command: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since} UTC ({self.command})"


@contextmanager
def locked(path: Path, directory: Path, hint: str, temporary: bool = False) -> Iterator[None]:
    """Hold `path`, the lock of a directory; while this process does, the file says who it is.

    It is an flock: the system takes it back when the process ends, by kill -9 too, and what is left of the file means
    nothing then. On NFS the server keeps it between hosts, and frees it when a host is gone.

    Args:
        hint: what to do where somebody else holds it.
        temporary: remove the file in the end.

    Raises:
        HeldError: another process holds it. MachineError: the file system keeps no locks. OSError: it cannot be made.
    """
    with _acquire(path, directory, hint) as file:
        file.truncate(0)
        file.write(json.dumps(asdict(_ourselves())))
        file.flush()
        try:
            yield
        finally:
            if temporary:
                # While it is still locked: whoever opened it before finds that it is no longer the file of that name.
                path.unlink(missing_ok=True)


def _acquire(path: Path, directory: Path, hint: str) -> TextIO:
    while True:
        file = open(path, "a+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                raise HeldError(f"is in use by {_holder(file)}", directory, hint) from None
        except OSError as error:
            file.close()
            if error.errno not in _NO_LOCKS:
                raise
            what = f"cannot be locked ({os.strerror(error.errno)}): its file system keeps no locks"
            raise MachineError(what, directory, "give a directory on another one with --out and --run") from None
        with suppress(FileNotFoundError):
            if os.path.sameopenfile(file.fileno(), opened := os.open(path, os.O_RDONLY)):
                os.close(opened)
                return file
            os.close(opened)
        file.close()  # removed by the one who held it, after it was opened here


def _ourselves() -> Holder:
    program, *arguments = sys.argv or ["python"]
    name = Path(program).name
    command = shlex.join(["accullm" if name == "__main__.py" else name, *arguments])
    return Holder(os.getpid(), socket.gethostname(), command, time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()))


def _holder(file: TextIO) -> str:
    """Who holds it, as the file says; it may say nothing yet, or something else from long ago."""
    try:
        file.seek(0)
        content = json.loads(file.read(1 << 16))
        holder = Holder(**{name: content[name] for name in ("pid", "host", "command", "since")})
    except (OSError, ValueError, KeyError, TypeError):
        return "another accullm process"
    text = " ".join(str(holder.command).split())
    shortened = text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
    return str(Holder(holder.pid, holder.host, shortened, holder.since))
