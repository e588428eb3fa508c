"""Keys of transformers 4, held against what transformers itself makes of them."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from accullm_cli.formats.earlier_keys import with_earlier_keys

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("config", "added"),
    [
        ({}, {}),
        ({"rope_parameters": None, "layer_types": None}, {}),
        ({"rope_parameters": "what"}, {}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_theta": 5e5}),
        (
            {"rope_parameters": {**LLAMA3, "rope_theta": 5e5, "partial_rotary_factor": 0.5}},
            {"rope_theta": 5e5, "partial_rotary_factor": 0.5, "rope_scaling": LLAMA3},
        ),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_theta": 5e5}}, {}),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
                    "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
                }
            },
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        ({"layer_types": ["sliding_attention", "full_attention"] * 2}, {"sliding_window_pattern": 2}),
        (
            {"layer_types": ["sliding_attention"] * 2 + ["full_attention", "sliding_attention"]},
            {"sliding_window_pattern": 3},
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, {}),
        ({"layer_types": ["full_attention", "full_attention"]}, {}),
        ({"layer_types": ["linear_attention", "full_attention"]}, {}),
    ],
)
def test_what_only_new_keys_say_is_said_by_earlier_ones_too(config: dict[str, Any], added: dict[str, Any]) -> None:
    assert with_earlier_keys(config) == {**config, **added}
    assert with_earlier_keys({"text_config": config}) == {"text_config": {**config, **added}}


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_transformers_reads_the_same_from_either(model_type: str) -> None:
    settings: dict[str, Any] = {"num_hidden_layers": 4}
    rope: dict[str, Any] = {**LLAMA3, "rope_theta": 5e5}
    if model_type == "gemma3_text":
        rope = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}}
        rope["sliding_attention"] = {"rope_type": "default", "rope_theta": 3e4}
        settings["layer_types"] = ["sliding_attention", "full_attention"] * 2
    new = CONFIG_MAPPING[model_type](**settings, rope_parameters=rope)
    both = with_earlier_keys(new.to_dict())
    earlier = {key: value for key, value in both.items() if key not in ("rope_parameters", "layer_types")}
    earlier.pop("_sliding_window_pattern", None)
    for written in (both, earlier):
        read = CONFIG_MAPPING[model_type].from_dict(written)
        assert read.rope_parameters == new.rope_parameters
        assert getattr(read, "layer_types", None) == getattr(new, "layer_types", None)


def test_the_number_of_experts_has_the_key_of_before() -> None:
    assert with_earlier_keys({"num_local_experts": 8})["num_experts"] == 8
    assert with_earlier_keys({"num_local_experts": 8, "num_experts": 4})["num_experts"] == 4
    assert "num_experts" not in with_earlier_keys({"hidden_size": 8})
