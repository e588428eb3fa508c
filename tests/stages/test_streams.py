"""Stored activation streams: which blocks they stand behind, and when they are written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from accullm_cli.stages import streams
from accullm_cli.stages.streams import StreamStore

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
