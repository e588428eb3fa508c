"""A checkpoint of two tensors, whole or sharded, and what opening it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accullm_cli.errors import AccullmError
from accullm_cli.model.source import ModelSource, open_source

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 32,
}
AGAIN = "download or copy the file again"


def tensors() -> dict[str, np.ndarray]:
    return {
        "model.norm.weight": np.ones(8, dtype=np.float16),
        "model.embed_tokens.weight": np.arange(32 * 8, dtype=np.float32).reshape(32, 8),
    }


def write_config(directory: Path, **changes: Any) -> None:
    config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def read(directory: Path) -> ModelSource:
    return open_source(str(directory), directory.parent / "cache")


def refusal(directory: Path | str, cache: Path | None = None) -> str:
    with pytest.raises(AccullmError) as caught:
        open_source(str(directory), cache or Path(directory).parent / "cache")
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.line()
    return caught.value.line()
