"""What a tool is told to quantize, and what it made; see run_peer.py, which imports nothing of accullm."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

BITS = 4


@dataclass(frozen=True)
class Task:
    """What is to be quantized.

    calibration: token ids, int64 [windows, tokens].
    iterations: of AutoRound, for each block; of mlx_lm.dwq, of the model.
    artifact: directory that the tool saves to.
    started: time.monotonic() before the tool was imported.
    """

    model: Path
    calibration: torch.Tensor
    group_size: int
    symmetric: bool
    iterations: int
    artifact: Path
    started: float

    def cost(self) -> Cost:
        """What it took up to now: taken once the tool has saved, before its files are read back."""
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Cost(time.monotonic() - self.started, peak_bytes)


@dataclass(frozen=True)
class Cost:
    """From loading the model to the end of saving. peak_bytes: resident memory."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Quantized:
    """What a tool made.

    stored: every tensor that it saved, by name.
    weights: dequantized from `stored`, float32 [N, K] by the linear's name.
    in_memory: the same as the tool itself has or computes them, to check against.
    settings: what it was told, as it was told.
    """

    cost: Cost
    stored: Mapping[str, torch.Tensor]
    weights: Mapping[str, torch.Tensor]
    in_memory: Mapping[str, torch.Tensor]
    settings: Mapping[str, Any]


def stored_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor in a directory's safetensors files."""
    return {
        name: tensor for path in sorted(directory.rglob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def unpack(packed: torch.Tensor, bits: int = BITS) -> torch.Tensor:
    """int32 [rows, words] to codes [rows, 32 * words / bits], low bits first; a code may lie in two words."""
    places = torch.arange(32, dtype=torch.int32)
    single = ((packed.unsqueeze(-1) >> places) & 1).flatten(1).unflatten(1, (-1, bits))
    return (single << places[:bits]).sum(-1, dtype=torch.int32)
