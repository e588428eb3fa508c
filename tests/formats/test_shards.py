"""Files of tensors: what writing them refuses, and how streams are split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from accullm_cli.errors import AccullmError
from accullm_cli.formats.shards import TensorFiles, shards_of, write_index


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    shards = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for shard in shards:
        save_file({"w": torch.zeros(1)}, shard)
    with pytest.raises(AccullmError) as error:
        write_index(tmp_path, shards)
    assert error.value.line() == f"{tmp_path}/b.safetensors: tensor w is in a.safetensors already"


def test_a_tensor_that_comes_twice_in_a_stream_is_refused() -> None:
    with pytest.raises(AccullmError) as error:
        list(shards_of(iter([("w", torch.zeros(1)), ("w", torch.zeros(1))]), 100))
    assert error.value.line() == "tensor w comes twice"


def test_batches_keep_the_limit_and_the_order() -> None:
    sizes = {"a": 10, "b": 30, "c": 50, "d": 10, "e": 20}  # a float32 is 4 bytes
    found = list(shards_of(((name, torch.zeros(size)) for name, size in sizes.items()), 160))
    assert [list(batch) for batch in found] == [["a", "b"], ["c"], ["d", "e"]]


def test_one_file_without_an_index_opens(tmp_path: Path) -> None:
    save_file({"w": torch.arange(3.0)}, tmp_path / "model.safetensors")
    files = TensorFiles.open(tmp_path)
    assert files.tensor("w").tolist() == [0, 1, 2]
    with pytest.raises(AccullmError) as error:
        files.tensor("v")
    assert error.value.line() == f"{tmp_path}: tensor v is missing"


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint64, torch.float64, torch.float8_e4m3fn, torch.bool])
def test_every_dtype_of_a_buffer_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3, dtype=dtype)}, tmp_path / "model.safetensors")
    files = TensorFiles.open(tmp_path)
    info = files.infos["w"]
    assert (info.torch_dtype, info.shape, info.bytes) == (dtype, (3,), 3 * dtype.itemsize)
    assert info.file == tmp_path / "model.safetensors"
    assert files.tensor("w").dtype == dtype


def test_a_checkpoint_s_files_count_where_its_index_says_otherwise(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1), "stray": torch.zeros(2)}, tmp_path / "a.safetensors")
    save_file({"v": torch.zeros(3)}, tmp_path / "b.safetensors")
    index = {"weight_map": {"w": "b.safetensors", "v": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    files = TensorFiles.open(tmp_path, of_artifact=False)
    assert {name: info.file.name for name, info in files.infos.items()} == {
        "w": "a.safetensors",
        "stray": "a.safetensors",
        "v": "b.safetensors",
    }
    with pytest.raises(AccullmError) as error:
        TensorFiles.open(tmp_path)
    assert error.value.line() == f"{tmp_path}/a.safetensors: tensor stray is not in the index under this file"
    save_file({"w": torch.zeros(1), "v": torch.zeros(3)}, tmp_path / "b.safetensors")
    with pytest.raises(AccullmError) as error:
        TensorFiles.open(tmp_path, of_artifact=False)
    assert error.value.line() == f"{tmp_path}/b.safetensors: tensor w is in a.safetensors already"
    save_file({"single": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert list(TensorFiles.open(tmp_path, of_artifact=False).infos) == ["single"]
