"""Artifacts of compressed-tensors for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accullm_cli.quant.plan import LinearPlan
from tests.artifacts import Made, write

UP_PROJ = "model.layers.1.mlp.up_proj"


def export(tmp_path: Path, made: Made) -> Path:
    """An artifact of it."""
    return write("compressed-tensors", tmp_path / "artifact", made)


def read_config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]
    return config


def row_of(
    name: str = "p", bits: int = 4, columns: int = 1536, group_size: int = 64, outliers: tuple[int, ...] = ()
) -> LinearPlan:
    """The row of a linear of 96 outputs, with zero points."""
    return LinearPlan(name, 96, columns, bits, group_size, False, outliers)
