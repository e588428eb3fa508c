"""Stored activation streams: which blocks they stand behind, and when they are written."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from accullm_cli.errors import MachineError
from accullm_cli.stages import streams
from accullm_cli.stages.streams import Captures, StreamStore

CPU = torch.device("cpu")
STATES = {"original": torch.arange(6.0).view(1, 2, 3), "rounded": torch.ones(1, 2, 3)}


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "SECONDS_BETWEEN_STORES", 0.0)


@pytest.mark.usefixtures("at_once")
def test_streams_come_back_with_the_number_of_blocks_before_them(tmp_path: Path) -> None:
    StreamStore(tmp_path / "streams").store_if_due("second", STATES)
    restored = StreamStore(tmp_path / "streams").restore(["first", "second", "third"])
    assert restored is not None
    assert restored[0] == 2
    assert restored[1].keys() == STATES.keys()
    assert all(torch.equal(restored[1][name], tensor) for name, tensor in STATES.items())


@pytest.mark.usefixtures("at_once")
def test_streams_of_another_chain_of_blocks_are_not_taken(tmp_path: Path) -> None:
    StreamStore(tmp_path / "streams").store_if_due("second", STATES)
    assert StreamStore(tmp_path / "streams").restore(["first", "another second"]) is None


@pytest.mark.usefixtures("at_once")
def test_a_later_store_replaces_the_earlier_one(tmp_path: Path) -> None:
    store = StreamStore(tmp_path / "streams")
    store.store_if_due("first", STATES)
    store.store_if_due("second", STATES)
    assert store.restore(["first"]) is None
    restored = store.restore(["first", "second"])
    assert restored is not None
    assert restored[0] == 2


def test_a_file_that_is_absent_or_damaged_is_as_good_as_none(tmp_path: Path) -> None:
    store = StreamStore(tmp_path / "streams")
    assert store.restore(["first"]) is None
    store.path.write_bytes(b"no tensors")
    assert store.restore(["first"]) is None


def test_streams_are_not_stored_before_they_are_due(tmp_path: Path) -> None:
    store = StreamStore(tmp_path / "streams")
    store.store_if_due("first", STATES)
    assert not store.path.exists()


@pytest.mark.usefixtures("at_once")
def test_removed_streams_are_gone_and_may_be_removed_twice(tmp_path: Path) -> None:
    store = StreamStore(tmp_path / "streams")
    store.store_if_due("first", STATES)
    store.remove()
    store.remove()
    assert not store.path.exists()


# -- captures ----------------------------------------------------------------------------------------------


def test_captures_come_back_by_batch_and_name(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    kept = {
        (batch, name): torch.randn(5 + batch, width, generator=generator)
        for batch in range(3)
        for name, width in (("input a", 7), ("sum b", 1))
    }
    with Captures(tmp_path, CPU) as captures:
        for (batch, name), value in kept.items():
            captures.write(batch, name, value)
        for (batch, name), value in reversed(kept.items()):
            assert torch.equal(captures.read(batch, name), value)


def test_a_capture_keeps_what_was_there_when_it_was_written(tmp_path: Path) -> None:
    rows = torch.arange(6.0).view(2, 3)
    with Captures(tmp_path, CPU) as captures:
        captures.write(0, "transposed", rows.T)
        rows.zero_()
        assert captures.read(0, "transposed").tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


def test_captures_lie_on_disk_where_the_device_has_no_room_left(tmp_path: Path) -> None:
    rows = torch.arange(6.0).view(2, 3)
    with Captures(tmp_path, CPU, room=rows.nbytes + 1) as captures:
        captures.write(0, "on the device", rows)
        captures.write(0, "on disk", rows)
        rows.zero_()
        captures._file.truncate(0)
        assert captures.read(0, "on the device").tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
        with pytest.raises(MachineError, match="ends too early"):
            captures.read(0, "on disk")


@pytest.mark.parametrize("room", [0, 12])
def test_captures_in_bfloat16_take_half_of_the_room(room: int, tmp_path: Path) -> None:
    rows = torch.tensor([[1.0, -2.5, 3.1415927], [0.0, 1e30, 2**-133]])
    with Captures(tmp_path, CPU, room) as captures:
        captures.write(0, "a", rows, torch.bfloat16)
        assert (captures._end, captures._room) == ((0, 0) if room else (12, 0))
        assert captures.read(0, "a").dtype == torch.float32
        assert torch.equal(captures.read(0, "a"), rows.bfloat16().float())


def test_captures_leave_no_file_behind(tmp_path: Path) -> None:
    with Captures(tmp_path, CPU) as captures:
        captures.write(0, "a", torch.ones(1000))
        assert list(tmp_path.iterdir()) == []  # no name even while it is open


def test_a_working_file_that_was_cut_is_a_refusal(tmp_path: Path) -> None:
    with Captures(tmp_path, CPU) as captures:
        captures.write(0, "a", torch.ones(1000))
        captures._file.truncate(100)
        with pytest.raises(MachineError, match=r"a working file ends too early"):
            captures.read(0, "a")


def test_a_full_disk_is_a_refusal_that_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Captures(tmp_path, CPU) as captures:

        class Full:
            def seek(self, place: int) -> None:
                pass

            def write(self, content: memoryview) -> int:
                raise OSError(errno.ENOSPC, "No space left on device")

            def close(self) -> None:
                pass

        monkeypatch.setattr(captures, "_file", Full())
        with pytest.raises(MachineError, match=r"no space left on the disk"):
            captures.write(0, "a", torch.ones(3))
