"""Tensors are read as safetensors reads them, and a file that is cut short in the meantime is a line and no crash."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from accullm_cli.errors import AccullmError
from accullm_cli.formats.shards import TensorFiles, tensors_of
from accullm_cli.model.integrity import DTYPES, read_header, read_rows, read_tensor


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    octets = [value.contiguous().flatten().view(torch.uint8) for value in (left, right)]
    return (left.dtype, left.shape) == (right.dtype, right.shape) and torch.equal(*octets)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    values = torch.randint(0, 2, (5, 3))
    tensors = {name: values.to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "nothing": torch.empty(0, 4), "one": torch.ones(1, dtype=torch.int8)}
    save_file(tensors, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_a_tensor_of_every_dtype_is_the_one_that_safetensors_reads(path: Path) -> None:
    expected = load_file(path)
    infos = read_header(path, of_source=False)
    assert infos.keys() == expected.keys()
    for name, info in infos.items():
        assert same(read_tensor(info), expected[name]), name


def test_rows_are_those_of_the_tensor(path: Path) -> None:
    expected, info = load_file(path)["BF16"], read_header(path, of_source=False)["BF16"]
    assert same(read_rows(info, 1, 3), expected[1:3])
    assert same(read_rows(info, 4, 9), expected[4:])


def test_a_file_that_is_cut_short_after_it_was_opened_is_one_line(path: Path) -> None:
    """Of a mapped file, the process would be killed."""
    files = TensorFiles(path.parent, tensors_of(path))
    os.truncate(path, 700)
    last = max(files.infos.values(), key=lambda info: info.end)
    with pytest.raises(AccullmError) as caught:
        read_tensor(last)
    assert caught.value.line() == f"{path}: was cut short while it was read; copy or download it again"
    path.unlink()
    with pytest.raises(AccullmError) as caught:
        files.tensor("BF16")
    assert caught.value.line() == f"{path}: cannot be read (no such file or directory)"
