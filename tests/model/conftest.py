from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.numpy import save_file

from tests.model.checkpoints import tensors, write_config, write_index


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with a configuration, two tensors and a tokenizer file."""
    directory = tmp_path / "tiny model"
    directory.mkdir()
    write_config(directory)
    save_file(tensors(), directory / "model.safetensors")
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture
def sharded(model: Path) -> Path:
    """The same in two shards."""
    (model / "model.safetensors").unlink()
    parts = {name: f"model-{number}-of-2.safetensors" for number, name in enumerate(tensors(), start=1)}
    for name, part in parts.items():
        save_file({name: tensors()[name]}, model / part)
    write_index(model, parts)
    return model
