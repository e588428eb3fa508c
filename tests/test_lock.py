"""One process at a time in a directory, and what another is told."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from pathlib import Path

import pytest

from accullm_cli.errors import MachineError
from accullm_cli.lock import HeldError, locked
from accullm_cli.run import RunDirectory, locked_output


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


HOLD = """
import sys; from pathlib import Path; from accullm_cli.run import RunDirectory, locked_output
what, path = sys.argv[1], Path(sys.argv[2])
with RunDirectory(path).locked() if what == "run" else locked_output(path): print('held', flush=True); sys.stdin.read()
"""


@contextmanager
def held_elsewhere(what: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a lock until it is killed."""
    command = [sys.executable, "-c", HOLD, what, str(path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield holder
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize(("what", "flag"), [("run", "--run"), ("output", "--out")])
def test_who_holds_a_directory_is_said_and_a_killed_holder_leaves_nothing_that_is_refused(tmp_path, what, flag):
    path = tmp_path / "new" / "here"

    def lock() -> AbstractContextManager[None]:
        return RunDirectory(path).locked() if what == "run" else locked_output(path)

    with held_elsewhere(what, path) as holder:
        with pytest.raises(HeldError) as refused, lock():
            pass
        assert refused.value.exit_code == 2
        since = re.search(r"since (.*) UTC", refused.value.line())[1]
        datetime.strptime(since, "%Y-%m-%d %H:%M:%S")
        assert refused.value.line() == (
            f"{path}: is in use by process {holder.pid} on {socket.gethostname()} since {since} UTC "
            f"(-c {what} {path}); wait for it to end, or give another directory with {flag}"
        )
    if what == "output":
        assert os.listdir(path.parent) == [".here.lock"]  # of the one that was killed
    with lock():
        pass
    assert what == "run" or os.listdir(path.parent) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', "\x00\xff"])
def test_a_holder_that_has_not_said_who_it_is(tmp_path, content):
    path = tmp_path / "lock"
    path.write_text(content, encoding="latin-1")
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(HeldError, match="is in use by another accullm process; wait"), locked(path, path, "wait"):
            pass


def test_a_holder_is_shown_on_one_line(tmp_path):
    path = tmp_path / "lock"
    command = "accullm convert 'a\nb' " + 99 * "long "
    path.write_text(json.dumps({"pid": 7, "host": "there", "command": command, "since": "2026-11-30 08:15:02"}))
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(HeldError) as refused, locked(path, path, "wait"):
            pass
    shown = "process 7 on there since 2026-11-30 08:15:02 UTC (accullm convert 'a b' long"
    assert refused.value.what.startswith(f"is in use by {shown}")
    assert refused.value.what.endswith("…)")


def test_a_lock_file_that_was_removed_while_it_was_opened_is_no_lock(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    flock, removed = fcntl.flock, []

    def slow(file: object, how: int) -> None:
        flock(file, how)
        if not removed:  # the holder before, who ends just now
            removed.append(path.unlink())

    monkeypatch.setattr("fcntl.flock", slow)
    with locked(path, path, ""):
        assert path.exists()
        with pytest.raises(HeldError), locked(path, path, ""):
            pass


def test_a_file_system_without_locks_is_refused(run, monkeypatch):
    def no_locks(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(MachineError) as refused, run.locked():
        pass
    assert refused.value.line() == (
        f"{run.path}: cannot be locked (No locks available): its file system keeps no locks; give a directory on "
        "another one with --out and --run"
    )


def test_the_lock_is_free_again_after_use(run):
    for _ in range(2):
        with run.locked():
            assert run.path.is_dir()
