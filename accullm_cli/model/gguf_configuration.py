"""The configuration of a model, from the metadata of a GGUF file of an architecture that is written here.

What a key sets is said in `gguf_metadata`. Here stand which class of transformers it is, what that needs to be made,
and what llama.cpp takes for keys that are absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from accullm_cli.errors import AccullmError
from accullm_cli.model.gguf_architectures import Architecture
from accullm_cli.model.gguf_file import GgufFile
from accullm_cli.model.gguf_metadata import refusal
from accullm_cli.model.gguf_programs import ARCHITECTURES

# Settings from which classes derive others, by the key.
_FIRST = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
# Without one of each of these llama.cpp loads no file.
_NEEDED = (
    ("context_length",),
    ("embedding_length",),
    ("block_count",),
    ("attention.head_count",),
    ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"),
)
# By a key that older files lack: a tensor with as many rows (of each expert).
_WIDTHS = {
    "expert_feed_forward_length": "blk.0.ffn_gate_exps.weight",
    "expert_shared_feed_forward_length": "blk.0.ffn_gate_shexp.weight",
}
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}


def is_written(architecture: str) -> bool:
    """Whether llama.cpp's name of an architecture is one of those that are written."""
    return any(own.name == architecture for own in ARCHITECTURES.values())


def configuration(file: GgufFile, architecture: str) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """A configuration with what its class derives others from, and the metadata, with values for keys that are absent.

    Raises:
        AccullmError: a key is absent that llama.cpp needs, or no number of things.
    """
    room = f"{architecture}."
    values = {key.removeprefix(room): value for key, value in file.metadata.items() if key.startswith(room)}
    for keys in _NEEDED:
        if not any(key in values for key in keys):
            raise _silent(file, f"{room}{keys[0]}")
    if values.get("expert_count") and not values.get("expert_used_count"):
        raise _silent(file, f"{room}expert_used_count")
    values = {**_absent(file, room, values), **values}
    blocks, further = values["block_count"], values.get("nextn_predict_layers")
    if isinstance(blocks, int) and isinstance(further, int) and 0 < further < blocks:
        values |= {"block_count": blocks - further, "nextn_predict_layers": 0}  # they stand behind the model's own
    model_type, own = _class_of(architecture, values)
    settings: dict[str, Any] = dict(own.settings)
    for key, setting in _FIRST.items():
        settings[setting] = _count(f"{room}{key}", values[key])
    settings |= {setting: values[key] for key, setting in own.first.items() if key in values}
    # An architecture of a million blocks would take long to be built, and each has tensors of its own.
    if settings["num_hidden_layers"] > len(file.tensors):
        raise refusal(f"{room}block_count", values["block_count"])
    for key, setting in _TOKENS.items():
        settings[setting] = file.metadata.get(f"tokenizer.ggml.{key}")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None and (settings["pad_token_id"] or 0) >= embedding.shape[0]:
        settings["pad_token_id"] = None  # no row is looked up for it
    settings["tie_word_embeddings"] = True
    metadata = {**file.metadata, **{f"{room}{key}": value for key, value in values.items()}}
    return CONFIG_MAPPING[model_type](**settings), metadata


def _silent(file: GgufFile, key: str) -> AccullmError:
    return AccullmError(f"says no {key}", file.path, "download or copy it again")


def _absent(file: GgufFile, room: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What llama.cpp takes for keys that a file may lack, of all that have a value in each class of transformers."""
    heads = _count(f"{room}attention.head_count", values["attention.head_count"])
    head = _count(f"{room}embedding_length", values["embedding_length"]) // heads
    found: dict[str, Any] = {
        "attention.head_count_kv": heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": values.get("attention.key_length", head),
        "rope.freq_base": 10000.0,
    }
    # In the place of rotary positions.
    if values.get("attention.max_alibi_bias") or "position_embd.weight" in file.tensors:
        found = {key: value for key, value in found.items() if not key.startswith("rope.")}
    for key, name in _WIDTHS.items():
        if name in file.tensors:
            found[key] = file.tensors[name].shape[-2]
    return found


def _class_of(architecture: str, values: Mapping[str, Any]) -> tuple[str, Architecture]:
    """The model type, of those that have this program the one whose own key the file has."""
    own = {name: found for name, found in ARCHITECTURES.items() if found.name == architecture}
    told = [name for name, found in own.items() if found.told_by and values.get(found.told_by)]
    plain = [name for name, found in own.items() if not found.told_by]
    name = [*told, *plain][0]
    return name, own[name]


def _count(key: str, value: Any) -> int:
    """A number of things, which may be said for each block.

    Raises:
        AccullmError: it is none, or another in some blocks.
    """
    found = set(value) if isinstance(value, list) and all(isinstance(one, int) for one in value) else {value}
    first = next(iter(found), None) if len(found) == 1 else None
    if not isinstance(first, int) or isinstance(first, bool) or first < 1:
        raise refusal(key, value)
    return first
