"""Keyed files: they know what they were made for, and are the same bytes every time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from accullm_cli.stages.keyed import facts_of, is_made_for, write_keyed

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(1, dtype=torch.int64)}


def test_a_file_is_made_for_its_key_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "states.safetensors"
    write_keyed(path, "3f", TENSORS, text="a file", linears=["q", "k"])
    assert is_made_for(path, "3f")
    assert not is_made_for(path, "3e")
    assert facts_of(path) == {"key": "3f", "text": "a file", "linears": ["q", "k"]}
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], value) for name, value in TENSORS.items())
    before = path.read_bytes()
    write_keyed(path, "3f", TENSORS, text="a file", linears=["q", "k"])
    assert path.read_bytes() == before


@pytest.mark.parametrize("what", ["absent", "damaged", "without a key"])
def test_what_says_nothing_is_made_for_nothing(what: str, tmp_path: Path) -> None:
    path = tmp_path / "states.safetensors"
    if what == "damaged":
        path.write_bytes(b"no tensors")
    elif what == "without a key":
        save_file(TENSORS, path)
    assert facts_of(path) == {}
    assert not is_made_for(path, "3f")
