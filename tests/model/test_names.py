"""What transformers calls tensors in checkpoints, held against what it writes itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from accullm_cli.model.names import checkpoint_modules, checkpoint_names, expert_names
from accullm_cli.model.structure import read_structure
from tests.kinds import KINDS
from tests.tiny import CONFIGS


def build(kind: str) -> PreTrainedModel:
    if kind in KINDS:
        return KINDS[kind].build()
    config = CONFIGS[kind]()
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")


def saved(model: PreTrainedModel, directory: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(directory)
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


@pytest.mark.parametrize(
    "kind", ["mixtral", "qwen2-moe", "latent attention, router with a correction", "router in a module of its own"]
)
def test_the_rows_of_experts_are_those_that_transformers_saves(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    stored = saved(model, tmp_path)
    structure = read_structure(model)
    experts = 0
    for block, slots in zip(structure.blocks, structure.slots, strict=True):
        named = expert_names(model, block, slots)
        assert named.keys() == {slot.name for slot in slots if slot.expert is not None}
        for slot in slots:
            if slot.expert is None:
                continue
            weight = torch.cat([stored[f"{name}.weight"] for name in named[slot.name]])
            assert torch.equal(weight, slot.read(model.get_submodule(block))), slot.name
            experts += 1
    assert experts


@pytest.mark.parametrize("kind", ["experts [E, K, N]", "experts in one product", "experts in one matrix"])
def test_experts_that_are_saved_together_have_no_names(kind: str) -> None:
    model = build(kind)
    structure = read_structure(model)
    pairs = list(zip(structure.blocks, structure.slots, strict=True))
    assert any(slot.expert is not None for _, slots in pairs for slot in slots)
    assert not any(expert_names(model, block, slots) for block, slots in pairs)


@pytest.mark.parametrize("kind", ["mixtral", "vision tower", "llama", "one stored tensor, several parameters"])
def test_other_tensors_are_called_as_transformers_saves_them(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    stored = saved(model, tmp_path)
    named = checkpoint_names(model, model.state_dict())
    assert bool(named) == (kind != "llama")
    for name, other in named.items():
        assert torch.equal(stored[other], model.state_dict()[name]), name
    for name, tensor in model.state_dict().items():
        # What has its own name there, too, or is made of several.
        assert name in named or name not in stored or torch.equal(stored[name], tensor)


def test_modules_are_renamed_with_all_that_belongs_to_them() -> None:
    model = build("vision tower")
    linear = "model.visual.blocks.0.mlp.fc1"
    assert checkpoint_modules(model, [linear, "lm_head"]) == {linear: "visual.blocks.0.mlp.fc1"}
