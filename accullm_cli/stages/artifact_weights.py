"""A finished artifact as the weights of a decoder: what validation runs is what was written."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from accullm_cli.errors import AccullmError
from accullm_cli.formats.base import Artifact
from accullm_cli.model.slots import LinearSlot, find_blocks, find_slots


class ArtifactWeights:
    """Fills `model` from an artifact, linears dequantized to float32 (see model.blocks.Weights)."""

    def __init__(self, artifact: Artifact, model: PreTrainedModel) -> None:
        self.artifact = artifact
        self.model = model
        self._meta = dict(model.named_parameters(remove_duplicate=False))
        self._slots: dict[str, list[LinearSlot]] = {
            name: find_slots(model.get_submodule(name), name) for name in find_blocks(model)
        }

    def load(self, prefixes: Iterable[str]) -> None:
        """Put every tensor of the given blocks into the model."""
        for prefix in prefixes:
            self._place([name for name in self.artifact.names() if name.startswith(f"{prefix}.")])
            block = self.model.get_submodule(prefix)
            for slot in self._slots[prefix]:
                plan = self.artifact.plan.linears.get(slot.name)
                if plan is None or plan.bits == 16:
                    continue
                if slot.expert == 0:
                    stack = torch.empty(self._meta[f"{prefix}.{slot.parameter}"].shape)
                    self._set(f"{prefix}.{slot.parameter}", stack)
                slot.write(block, self.artifact.linear(slot.name).dequantize(torch.float32))
            self._check_filled(block, prefix)

    def load_outside(self, blocks: Iterable[str]) -> None:
        prefixes = tuple(f"{block}." for block in blocks)
        self._place([name for name in self.artifact.names() if not name.startswith(prefixes)])
        self.model.tie_weights()
        outside = [name for name, _ in self.model.named_parameters() if not name.startswith(prefixes)]
        for name in outside:
            if self.model.get_parameter(name).device.type == "meta":
                raise AccullmError(f"tensor {name} is missing", self.artifact.path, "copy the artifact again")

    def release(self, prefix: str) -> None:
        for name, _ in list(self.model.get_submodule(prefix).named_parameters()):
            self._set(f"{prefix}.{name}", self._meta[f"{prefix}.{name}"])

    def dtype(self, name: str) -> torch.dtype:
        return self.artifact.tensor(name).dtype

    def _place(self, names: list[str]) -> None:
        for name in names:
            self._set(name, self.artifact.tensor(name))

    def _set(self, name: str, value: torch.Tensor) -> None:
        module_name, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(module_name)
        if attribute in module._parameters:
            parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
            setattr(module, attribute, parameter)
        elif attribute in module._buffers:
            setattr(module, attribute, value)
        else:
            raise AccullmError(f"tensor {name} has no place in this model", self.artifact.path, "convert it again")

    def _check_filled(self, block: nn.Module, prefix: str) -> None:
        for name, parameter in block.named_parameters():
            if parameter.device.type == "meta":
                raise AccullmError(
                    f"tensor {prefix}.{name} is missing", self.artifact.path, "copy the artifact again"
                )
