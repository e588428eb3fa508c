"""A tiny random model of every architecture that transformers loads as a causal or multimodal language model.

A configuration is made by the type's own class, from tiny_configurations.py. Models are 64 wide and have each kind of
layer that their type has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from random_model import write_tokenizer
from tiny_configurations import ABSENT, COMPOSITE, NOT_BUILT, SIZES, SPECIAL, TOWER, UNLISTED
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D


def architectures() -> list[str]:
    """The name of every tiny model, those of the causal mapping first."""
    every = dict.fromkeys((*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *UNLISTED, *SPECIAL, *COMPOSITE))
    return [name for name in every if name not in NOT_BUILT and model_type(name) in CONFIG_MAPPING]


def model_type(name: str) -> str:
    """The type in transformers of a tiny model."""
    return name.partition(":")[0]


def make_architecture(name: str, directory: Path) -> None:
    """Save a random checkpoint in bfloat16, and a tokenizer of bytes."""
    torch.manual_seed(sum(map(ord, name)))
    model = _model(name)
    _randomize(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(directory)
    write_tokenizer(directory)


def _model(name: str) -> PreTrainedModel:
    config, kind = tiny_config(name), model_type(name)
    multimodal = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(kind) if name in COMPOSITE else None
    class_name = multimodal or UNLISTED.get(kind)
    if class_name is None:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return getattr(transformers, class_name)(config).float()


def tiny_config(name: str, values: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """The configuration of a tiny model, with other `values`."""
    kind = CONFIG_MAPPING[model_type(name)]
    composite = COMPOSITE.get(name)
    if composite is None:
        sizes = _of_fields(kind, SIZES)
        if "qk_rope_head_dim" in sizes:
            sizes.pop("head_dim", None)  # which is made of two there
        if "kv_lora_rank" in sizes:
            sizes["num_key_value_heads"] = SIZES["num_attention_heads"]
        return kind(**_present({**sizes, **SPECIAL.get(name, {}), **(values or {})}))
    parts: dict[str, Any] = dict(composite.parts)
    if composite.text:
        text = tiny_config(composite.text, composite.text_values).to_dict()
        parts["text_config"] = {**text, "model_type": composite.text}
    if "vision_config" in kind.sub_configs:
        vision = composite.vision.get("model_type")
        vision_class = CONFIG_MAPPING[vision] if vision else kind.sub_configs["vision_config"]
        tower = {"model_type": vision_class.model_type, **_of_fields(vision_class, TOWER), **composite.vision}
        parts["vision_config"] = _present(tower)
    ids = {key: SIZES[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = _of_fields(kind, SIZES) if composite.has_sizes else ids
    return kind(**_present({**parts, **sizes, **composite.values}))


def _of_fields(kind: type[PreTrainedConfig], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those values that a configuration has a field for, which is no other name for one."""
    try:
        fields: Sequence[str] = list(kind().to_dict())
    except (TypeError, ValueError, AttributeError):  # it cannot be made without values
        fields = list(getattr(kind, "__dataclass_fields__", ()))
    aliases = kind.attribute_map or {}
    return {key: value for key, value in values.items() if key in fields and key not in aliases}


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not ABSENT}


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def _randomize(model: PreTrainedModel) -> None:
    """Weights large enough for a divergence to mean something; nothing that may be left out unseen stays zero."""
    scaled: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in scaled:
                continue
            inputs = _inputs(module, name, parameter)
            if inputs:
                parameter.normal_(0, 1.5 / inputs**0.5)
                scaled.add(id(parameter))
            elif name.endswith("bias") and not parameter.any():
                parameter.normal_(0, 0.1)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx] = 0  # as transformers reads it back
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and buffer.is_floating_point() and not buffer.any():
                buffer.normal_(0, 0.1)
    model.tie_weights()


def _inputs(module: nn.Module, name: str, parameter: nn.Parameter) -> int:
    """How many inputs a matrix multiplies, 0 for what is none or has a scale of its own."""
    kind = type(module).__name__.lower()
    if isinstance(module, _CONVOLUTIONS) or parameter.dim() < 2:
        return 0
    if isinstance(module, Conv1D) or (parameter.dim() == 3 and getattr(module, "is_transposed", False)):
        return parameter.shape[-2]
    chooses = name == "weight" and any(word in kind for word in ("router", "gate", "topk", "gating"))
    stacked = parameter.dim() == 3 and min(parameter.shape) > 1
    is_linear = isinstance(module, nn.Linear | nn.Embedding) and name == "weight"
    in_one_matrix = name in ("w1", "v1", "w2")  # all experts of DBRX
    return parameter.shape[-1] if is_linear or stacked or chooses or in_one_matrix else 0
