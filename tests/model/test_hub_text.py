"""Data sets of the hub as calibration text."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from accullm_cli.model.text import calibration_windows
from tests.model.texts import byte_tokenizer, refusal, text_of


def test_a_hub_dataset_needs_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refusal("hub:owner/name") == "hub:owner/name: needs the package datasets; pip install datasets"


class FakeDataset(list):
    def shuffle(self, seed: int, buffer_size: int) -> FakeDataset:
        return self


def fake_datasets(monkeypatch: pytest.MonkeyPatch, rows: Any) -> None:
    """A `datasets` whose load_dataset gives these rows, or fails."""

    def load_dataset(name: str, split: str, streaming: bool) -> Any:
        assert (name, split, streaming) == ("owner/name", "train", True)
        if isinstance(rows, Exception):
            raise rows
        return FakeDataset(rows)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


@pytest.mark.parametrize(("text", "letter"), [("hub:owner/name", "b"), ("hub:owner/name:other", "c")])
def test_a_hub_dataset_gives_its_first_or_the_named_text_column(
    monkeypatch: pytest.MonkeyPatch, text: str, letter: str
) -> None:
    fake_datasets(monkeypatch, [{"id": 1, "text": "b" * 40, "other": "c" * 40}] * 9)
    windows = calibration_windows(text, byte_tokenizer(), 2, 16, 0)
    assert text_of(windows, byte_tokenizer()) == [letter * 16] * 2
    assert windows.description == f"2 windows of 16 tokens from {text}"


def test_a_hub_dataset_without_the_column_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, [{"id": 1, "body": "b"}])
    assert refusal("hub:owner/name:text") == ("hub:owner/name:text: has no text column text; its columns are id, body")


def test_a_hub_dataset_that_cannot_be_reached_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, ConnectionError("no network\nat all"))
    assert refusal("hub:owner/name") == (
        "hub:owner/name: the dataset cannot be had (no network); connect to the network, or give a local file"
    )


@pytest.mark.parametrize(
    "error",
    [
        # datasets 3 and before, and 4
        ValueError("The repository for owner/name contains custom code which must be executed ... `trust_remote_code`"),
        RuntimeError("Dataset scripts are no longer supported, but found name.py"),
    ],
)
def test_a_hub_dataset_that_is_a_script_is_refused(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    fake_datasets(monkeypatch, error)
    assert refusal("hub:owner/name") == (
        "hub:owner/name: the dataset is a script, Python code that is never run; give one in Parquet or JSON, or a file"
    )


def test_a_version_of_datasets_that_would_run_code_is_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []

    def load_dataset(name: str, split: str, streaming: bool, trust_remote_code: bool | None = None) -> FakeDataset:
        told.append(trust_remote_code)
        return FakeDataset([{"text": "b" * 40}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    calibration_windows("hub:owner/name", byte_tokenizer(), 1, 16, 0)
    assert told == [False]


def test_a_hub_dataset_with_too_little_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, [{"text": "few"}])
    assert refusal("hub:owner/name") == (
        "hub:owner/name: holds too little text for one window; give more text or a smaller --seq-len"
    )
