"""What the stages should find, from transformers' own forward passes and loops in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# Where the sum of the residual stream and a linear's output can be seen: as the input of this module of the block, or
# as the block's own output.
SUM_READERS = {"self_attn.o_proj": "post_attention_layernorm", "attn.c_proj": "ln_2"}
LAST_WRITERS = ("mlp.down_proj", "mlp.c_proj")


@dataclass(frozen=True)
class Seen:
    """What every linear of a model reads and makes in one forward pass, by its name, as rows in float64.

    outputs: of a linear that writes to the residual stream, what this becomes; of others their own.
    """

    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]


def rows_of(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1, value.shape[-1]).double().clone()


def seen(model: PreTrainedModel, ids: torch.Tensor) -> Seen:
    """One forward pass, observed by hooks."""
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    read: dict[str, torch.Tensor] = {}
    made: dict[str, torch.Tensor] = {}

    def hook(name: str):  # type: ignore[no-untyped-def]
        def note(module: nn.Module, args: tuple[torch.Tensor, ...], result: object) -> None:
            if isinstance(module, nn.Linear | Conv1D):
                inputs[name], outputs[name] = rows_of(args[0]), rows_of(result)  # type: ignore[arg-type]
            elif isinstance(result, torch.Tensor):
                made[name] = result
                if args:
                    read[name] = args[0]

        return note

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    for name in outputs:
        block, own = ".".join(name.split(".")[:3]), ".".join(name.split(".")[3:])
        if own in SUM_READERS:
            outputs[name] = rows_of(read[f"{block}.{SUM_READERS[own]}"])
        elif own in LAST_WRITERS:
            outputs[name] = rows_of(made[block])
    return Seen(inputs, outputs)


def inputs_of(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The rows [T, K] in float64 that every linear of the model reads, by its name."""
    return seen(model, ids).inputs


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
