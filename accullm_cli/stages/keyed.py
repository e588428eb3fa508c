"""Files of tensors that say what they were made for, so that a later call can tell whether they are still good."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from accullm_cli.run import write_file


def write_keyed(path: Path, key: str, tensors: Mapping[str, torch.Tensor], **facts: Any) -> None:
    """Write tensors that were made for `key`, and facts about them (what JSON can hold) to read with `facts_of`.

    They come from whatever device they are on.
    """
    # One entry: safetensors writes several in an order that differs from run to run.
    metadata = {"made": json.dumps({"key": key, **facts})}
    here = {name: tensor.cpu() for name, tensor in tensors.items()}
    write_file(path, lambda temporary: save_file(here, temporary, metadata=metadata))


def facts_of(path: Path) -> dict[str, Any]:
    """The facts of a keyed file, and its "key"; empty where there is no such file, or it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            facts: dict[str, Any] = json.loads((file.metadata() or {}).get("made", "{}"))
            return facts
    except (OSError, SafetensorError):
        return {}


def is_made_for(path: Path, key: str) -> bool:
    """Whether this is the file that was written for `key`."""
    return facts_of(path).get("key") == key
