"""What the stages should find, from transformers' own forward passes and loops in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


@contextmanager
def seen_inputs(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """The rows [T, K] in float64 that every linear of the model reads, by its name."""
    rows: dict[str, torch.Tensor] = {}

    def hook(name: str):  # type: ignore[no-untyped-def]
        def note(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            rows[name] = args[0].reshape(-1, args[0].shape[-1]).double().clone()

        return note

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def inputs_of(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs of one forward pass: see `seen_inputs`."""
    with seen_inputs(model) as rows, torch.no_grad():
        model(input_ids=ids)
    return rows


def weight_of(model: PreTrainedModel, name: str) -> torch.Tensor:
    """[N, K], as stored in float32."""
    module = model.get_submodule(name)
    return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data


def set_weight(model: PreTrainedModel, name: str, weight: torch.Tensor) -> None:
    """Put `weight` [N, K] in its place."""
    weight_of(model, name).copy_(weight)


def rounding_damage(weight: torch.Tensor, group_size: int) -> np.ndarray:
    """||w - nearest(w)||^2 of each column on a 4-bit grid from the smallest to the largest weight of each group: [K].

    A scale is rounded to float16; the zero point is the code nearest to 0.
    """
    values = weight.double().numpy()
    rows, columns = values.shape
    size = columns if group_size == -1 else group_size
    damage = np.zeros(columns)
    for row in range(rows):
        for start in range(0, columns, size):
            group = values[row, start : start + size]
            low, high = min(0.0, group.min()), max(0.0, group.max())
            scale = float(np.float16((high - low) / 15))
            zero = round(-low / scale)
            codes = np.clip(np.rint(group / scale + zero), 0, 15)
            damage[start : start + size] += (group - (codes - zero) * scale) ** 2
    return damage
