"""A finished artifact as the weights of a decoder: what validation runs is what was written."""

from __future__ import annotations

from collections.abc import Container, Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from accullm_cli.errors import AccullmError
from accullm_cli.formats import open_artifact
from accullm_cli.formats.base import Artifact
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.skeleton import build_skeleton
from accullm_cli.model.structure import Structure, read_structure
from accullm_cli.stages.compute import ON_CPU, Compute


class ArtifactWeights:
    """Fills `model` from an artifact, linears and embeddings dequantized (see model.blocks.Weights)."""

    def __init__(self, artifact: Artifact, model: PreTrainedModel, structure: Structure) -> None:
        self.artifact = artifact
        self.model = model
        self._meta = dict(model.named_parameters(remove_duplicate=False))
        self._slots = dict(zip(structure.blocks, structure.slots, strict=True))

    def load(self, prefixes: Iterable[str]) -> None:
        """Put every tensor of the given blocks into the model."""
        for prefix in prefixes:
            block = self.model.get_submodule(prefix)
            stored = {name for name in self.artifact.names() if name.startswith(f"{prefix}.")}
            for slot in self._slots[prefix]:
                parameter = f"{prefix}.{slot.parameter}"
                if parameter in stored:  # a linear, or a whole stack of experts, that was left in 16 bits
                    continue
                if slot.expert == 0:
                    self._set(parameter, torch.empty(self._meta[parameter].shape))
                slot.write(block, self._weight(slot.name))
                stored.discard(f"{slot.name}.weight")
            slots = {slot.name for slot in self._slots[prefix]}
            for name in self.artifact.plan.quantized.keys() - slots:  # a router that another tool quantized
                if name.startswith(f"{prefix}."):
                    self._set(f"{name}.weight", self.artifact.weight(name))
            self._place(sorted(stored))
            self._check_filled(block, prefix)

    def load_outside(self, blocks: Iterable[str], without: Container[str] = frozenset()) -> None:
        prefixes = tuple(f"{block}." for block in blocks)
        self._place([name for name in self.artifact.names() if not name.startswith(prefixes) and name not in without])
        for name in self.artifact.plan.embeddings:
            self._set(f"{name}.weight", self.artifact.weight(name))
        self.model.tie_weights()
        outside = [
            name for name, _ in self.model.named_parameters() if not name.startswith(prefixes) and name not in without
        ]
        for name in outside:
            if self.model.get_parameter(name).device.type == "meta":
                raise AccullmError(f"tensor {name} is missing", self.artifact.path, "copy the artifact again")

    def warm(self, prefix: str, device: torch.device) -> None:
        """Begin to fetch what is stored of a block: of an artifact larger than memory, what was written or hashed a
        moment ago is in the page cache no more."""
        self.artifact.fetch(prefix)

    def release(self, prefix: str) -> None:
        for name, _ in list(self.model.get_submodule(prefix).named_parameters(remove_duplicate=False)):
            self._set(f"{prefix}.{name}", self._meta[f"{prefix}.{name}"])

    def dtype(self, name: str) -> torch.dtype:
        return self.artifact.tensor(name).dtype

    def _weight(self, name: str) -> torch.Tensor:
        plan = self.artifact.plan.linears.get(name)
        if plan is None or plan.bits == 16:
            return self.artifact.tensor(f"{name}.weight").float()
        return self.artifact.weight(name)

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
                raise AccullmError(f"tensor {prefix}.{name} is missing", self.artifact.path, "copy the artifact again")


def open_artifact_decoder(directory: Path, compute: Compute = ON_CPU) -> Decoder:
    """A finished artifact as a decoder whose blocks are in memory one at a time, dequantized."""
    model = build_skeleton(directory)
    structure = read_structure(model)
    artifact = open_artifact(directory).placed(model, structure)
    weights = ArtifactWeights(artifact, model, structure)
    return Decoder(model, weights, structure, compute.device, compute.tokens)
