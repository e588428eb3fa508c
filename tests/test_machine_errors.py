"""What the machine refuses, and what it has."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from accullm_cli.errors import MachineError
from accullm_cli.run import (
    RunDirectory,
    available_memory,
    existing_parent,
    machine_error,
    machine_errors,
    peak_memory,
    write_text,
)


def test_a_full_disk_is_one_line_with_what_is_free(tmp_path, monkeypatch):
    path = tmp_path / "shard"

    def full(*paths: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1_234_567_890})())
    with pytest.raises(MachineError) as refused:
        write_text(path, "x")
    assert refused.value.exit_code == 4
    assert refused.value.line() == (
        f"{path}: no space left on the disk (1,235 MB free); free some and run the same command again"
    )
    assert os.listdir(tmp_path) == []


def test_a_full_disk_reported_by_safetensors_is_the_same_line(tmp_path):
    class SafetensorError(Exception):
        pass

    with pytest.raises(MachineError, match="no space left on the disk"), machine_errors(tmp_path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_quota_that_is_used_up_is_one_line_whoever_reports_it(tmp_path):
    class SafetensorError(Exception):
        pass

    line = f"{tmp_path}: the disk quota is used up; free some and run the same command again"
    error = SafetensorError(f"Error while serializing: I/O error: Disk quota exceeded (os error {errno.EDQUOT})")
    for reported in (OSError(errno.EDQUOT, "Disk quota exceeded"), error):
        with pytest.raises(MachineError) as refused, machine_errors(tmp_path):
            raise reported
        assert (refused.value.line(), refused.value.exit_code) == (line, 4)


def test_other_safetensors_errors_pass_through(tmp_path):
    class SafetensorError(Exception):
        pass

    with pytest.raises(SafetensorError), machine_errors(tmp_path):
        raise SafetensorError("InvalidHeaderLength")


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EROFS, "read-only file system"),
        (errno.EACCES, "permission denied"),
        (errno.EPERM, "operation not permitted"),
    ],
)
def test_a_path_that_cannot_be_written_names_the_way_out(number, reason):
    assert machine_error(OSError(number, "?"), Path("out")).line() == (
        f"out: cannot be written ({reason}); give a writable path with --out or --run"
    )


def test_any_other_refusal_of_the_system_can_be_resumed():
    error = machine_error(OSError(errno.EIO, "Input/output error"), Path("out"))
    assert error.line() == "out: cannot be written (Input/output error); run the same command again to resume"
    assert error.exit_code == 4


def test_the_run_directory_on_a_read_only_place_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot be written"), RunDirectory(tmp_path / "file" / "run").locked():
        pass


def test_the_nearest_existing_parent_may_be_the_path_itself(tmp_path):
    assert existing_parent(tmp_path) == tmp_path
    assert existing_parent(tmp_path / "a" / "b") == tmp_path


def test_peak_memory_counts_bytes_of_this_process():
    held = bytearray(64 << 20)
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
    assert 64 << 20 < peak_memory() < 64 << 30


# -- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({"meminfo": "MemTotal: 9 kB\nMemAvailable:    2000 kB\n"}, 2_048_000),
        ({"meminfo": "MemAvailable: 2000 kB\n", "memory.max": "max\n"}, 2_048_000),
        ({"meminfo": "MemAvailable: 2000 kB\n", "memory.max": "900000\n", "memory.current": "100000\n"}, 800_000),
        ({"meminfo": "MemAvailable: 2 kB\n", "memory.max": "900000\n", "memory.current": "100000\n"}, 2_048),
        ({"meminfo": "MemAvailable: 2 kB\n", "memory.max": "5\n", "memory.current": "6\n"}, 0),
        ({}, None),
    ],
)
def test_available_memory_is_the_less_of_what_the_machine_and_the_control_group_leave(
    files, available, tmp_path, monkeypatch
):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("accullm_cli.run.Path", lambda path: tmp_path / Path(path).name)
    assert available_memory() == available
