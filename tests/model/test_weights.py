"""Index and shards that disagree without harm, as transformers reads them too, and what is said about it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.model.checkpoints import read, tensors, write_index

NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
FIRST, SECOND = "model-1-of-2.safetensors", "model-2-of-2.safetensors"


def places(directory: Path) -> dict[str, str]:
    return {name: tensor.file.name for name, tensor in read(directory).tensors.items()}


def test_a_tensor_that_the_index_does_not_name_is_read(sharded: Path) -> None:
    save_file({NORM: tensors()[NORM], "mtp.stray": np.ones(1, np.float32)}, sharded / FIRST)
    assert places(sharded) == {NORM: FIRST, EMBEDDING: SECOND, "mtp.stray": FIRST}
    assert read(sharded).records[0] == "tensors mtp.stray are in the shards, but not in the index; they are read"


def test_a_tensor_in_another_shard_than_the_index_says_is_read_from_there(sharded: Path) -> None:
    write_index(sharded, {NORM: SECOND, EMBEDDING: FIRST})
    assert places(sharded) == {NORM: FIRST, EMBEDDING: SECOND}
    assert read(sharded).records == (
        f"tensors {NORM}, {EMBEDDING} are in other shards than the index says; they are read from there",
    )


@pytest.mark.parametrize("named", [FIRST, SECOND])
def test_a_tensor_that_two_shards_hold_alike_is_read_once(sharded: Path, named: str) -> None:
    save_file({NORM: tensors()[NORM], "mtp.other": np.ones(1, np.float32)}, sharded / FIRST)
    save_file(tensors(), sharded / SECOND)
    write_index(sharded, {NORM: named, EMBEDDING: SECOND, "mtp.other": FIRST})
    assert places(sharded) == {NORM: FIRST, EMBEDDING: SECOND, "mtp.other": FIRST}
    assert read(sharded).records[0] == f"tensors {NORM} are in two shards, the same in both"


@pytest.mark.parametrize("metadata", [None, {}, {"total_size": 1}, {"total_parameters": "many"}])
def test_what_the_index_says_of_itself_is_no_concern(sharded: Path, metadata: object) -> None:
    index = sharded / "model.safetensors.index.json"
    content = {"metadata": metadata, "weight_map": {**json.loads(index.read_text())["weight_map"], "__metadata__": "x"}}
    index.write_text(json.dumps(content))
    assert places(sharded) == {NORM: FIRST, EMBEDDING: SECOND}
    assert read(sharded).records == ()


def test_a_single_file_comes_before_an_index(sharded: Path) -> None:
    save_file(tensors(), sharded / "model.safetensors")
    assert places(sharded) == {NORM: "model.safetensors", EMBEDDING: "model.safetensors"}
    assert read(sharded).records == (
        "beside model.safetensors there is model.safetensors.index.json; the former is read, as transformers does",
        f"left behind: weights that are not read ({FIRST}, {SECOND}, model.safetensors.index.json)",
    )


def test_a_shard_that_the_index_does_not_name_is_left_behind(sharded: Path) -> None:
    save_file({"old": np.ones(1, np.float32)}, sharded / "model-3-of-3.safetensors")
    assert places(sharded) == {NORM: FIRST, EMBEDDING: SECOND}
    assert read(sharded).records == ("left behind: weights that are not read (model-3-of-3.safetensors)",)
