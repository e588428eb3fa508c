"""Keys of config.json that transformers wrote up to version 4, for programs that read no others.

Version 5 writes rotary frequencies, the order of layers and the number of experts under new keys. A program that does
not know these takes its own default, and computes something else without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def with_earlier_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the earlier keys, where only the new ones say the same; nothing that is there changes.

    `rope_theta`, `rope_scaling`, `rope_local_base_freq` and `partial_rotary_factor` are made of `rope_parameters`,
    `sliding_window_pattern` of `layer_types`, and `num_experts` of `num_local_experts`.
    """
    changed = dict(config)
    text = config.get("text_config")
    if isinstance(text, Mapping):
        changed["text_config"] = with_earlier_keys(text)
    found = {**_rotary_keys(config.get("rope_parameters")), **_pattern_key(config.get("layer_types"))}
    if "num_local_experts" in config:
        found["num_experts"] = config["num_local_experts"]
    return {**changed, **{key: value for key, value in found.items() if config.get(key) is None}}


def _rotary_keys(parameters: object) -> dict[str, Any]:
    if not isinstance(parameters, Mapping):
        return {}
    local = parameters.get("sliding_attention")
    full = parameters.get("full_attention", parameters)
    if not isinstance(full, Mapping):
        return {}
    found = {key: full[key] for key in ("rope_theta", "partial_rotary_factor") if key in full}
    if isinstance(local, Mapping) and "rope_theta" in local:
        found["rope_local_base_freq"] = local["rope_theta"]
    if full.get("rope_type", "default") != "default":
        found["rope_scaling"] = {key: value for key, value in full.items() if key not in found}
    return found


def _pattern_key(layer_types: object) -> dict[str, int]:
    """The number of layers of which the last one attends to everything, where such a number says it all."""
    if not isinstance(layer_types, list) or set(layer_types) != {"sliding_attention", "full_attention"}:
        return {}
    pattern = layer_types.index("full_attention") + 1
    wanted = [
        "sliding_attention" if number % pattern else "full_attention" for number in range(1, len(layer_types) + 1)
    ]
    return {"sliding_window_pattern": pattern} if layer_types == wanted else {}
