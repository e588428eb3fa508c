"""A disk that is really full, at several sizes: one line, and the same bytes once it has more room."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from accullm_cli.errors import MachineError
from accullm_cli.pipeline import convert
from tests.end_to_end.test_resume import contents
from tests.streaming import short_config
from tests.tiny import make_checkpoint

SETTINGS = {"calibration__samples": 8, "calibration__gradient_samples": 2}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory, of no size yet that means anything."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield place
    finally:
        # Lazily: what was raised still holds frames, whose tensors are mapped files.
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def undisturbed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    convert(short_config(llama, out, **SETTINGS))
    return out


# From too little for a directory to too little for the report.
@pytest.mark.parametrize("kilobytes", [4, 40, 200, 300, 420, 600])
def test_a_full_disk_is_one_line_and_with_more_room_the_same_bytes(
    kilobytes: int, llama: Path, undisturbed: Path, disk: Path
) -> None:
    config = short_config(llama, disk / "out", **SETTINGS)
    resize(disk, f"{kilobytes}k")
    with pytest.raises(MachineError) as refused:
        convert(config)
    where, _, line = refused.value.line().partition(": ")
    assert where.startswith(str(disk))
    assert line == "no space left on the disk (0 MB free); free some and run the same command again"
    assert not [path for path in disk.rglob("*") if path.name.endswith((".tmp", ".partial", ".old"))]
    resize(disk, "64m")
    convert(config)
    assert contents(disk / "out") == contents(undisturbed)
