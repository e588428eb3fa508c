"""Every key of a GGUF file's metadata is followed by the configuration, changes nothing, is named, or is refused."""

from __future__ import annotations

from typing import Any

import gguf
import pytest
from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    NemotronConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    StableLmConfig,
    Starcoder2Config,
)

from accullm_cli.errors import AccullmError
from accullm_cli.model.gguf_metadata import settle

SHAPE: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}


def settled(architecture: str, config: PreTrainedConfig, **values: Any) -> PreTrainedConfig:
    metadata = {f"{architecture}.{name.replace('__', '.')}": value for name, value in values.items()}
    assert settle(metadata, architecture, config) == []
    return config


def refusal(architecture: str, config: PreTrainedConfig, metadata: dict[str, Any]) -> str:
    with pytest.raises(AccullmError) as caught:
        settle({f"{architecture}.{name}": value for name, value in metadata.items()}, architecture, config)
    assert caught.value.hint == "give the model's safetensors checkpoint"
    return caught.value.what


def llama(**settings: Any) -> LlamaConfig:
    return LlamaConfig(**SHAPE, num_key_value_heads=2, **settings)


# -- rotary positions --------------------------------------------------------------------------------------------

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 512,
}


@pytest.mark.parametrize(
    ("keys", "parameters"),
    [
        ({"scaling.type": "linear", "scaling.factor": 4.0}, LINEAR),
        ({"scaling.factor": 4.0}, LINEAR),  # llama.cpp takes it for linear
        ({"scale_linear": 4.0}, LINEAR),  # the older key
        ({"scaling.type": "none", "scaling.factor": 4.0}, None),
        ({"scaling.type": "linear", "scaling.factor": 1.0, "scaling.attn_factor": 1.0}, None),
        ({"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 512}, YARN),
        (
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.finetuned": True, "scaling.yarn_ext_factor": -1.0},
            {**YARN, "original_max_position_embeddings": 2048},
        ),
        (
            {
                "scaling.type": "yarn",
                "scaling.factor": 4.0,
                "scaling.original_context_length": 512,
                "scaling.yarn_beta_fast": 16.0,
                "scaling.yarn_beta_slow": 2.0,
                "scaling.attn_factor": 2.0,
            },
            {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 2 * 1.1386294361119891},  # 0.1 ln 4 + 1
        ),
        ({"freq_base": 500000.0}, {"rope_type": "default", "rope_theta": 500000.0}),
        ({"dimension_count": 16}, None),
    ],
)
def test_the_rotary_scaling_of_the_file_is_the_configuration_s(
    keys: dict[str, Any], parameters: dict[str, Any] | None
) -> None:
    config = llama()
    metadata = {f"llama.rope.{name}": value for name, value in keys.items()} | {"llama.context_length": 2048}
    assert settle(metadata, "llama", config) == []
    assert config.rope_parameters == (parameters or {"rope_type": "default", "rope_theta": 10000.0})


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"scaling.type": "longrope", "scaling.factor": 4.0}, "scaling.type = longrope"),
        (
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.yarn_ext_factor": 0.5},
            "scaling.yarn_ext_factor = 0.5",
        ),
        (
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.yarn_log_multiplier": 0.1},
            "scaling.yarn_log_multiplier = 0.1",
        ),
        ({"scaling.type": "linear", "scaling.factor": 4.0, "scaling.attn_factor": 2.0}, "scaling.attn_factor = 2.0"),
        ({"scaling.alpha": 1000.0}, "scaling.alpha = 1000.0"),
        ({"dimension_count": 8}, "dimension_count = 8"),
        ({"dimension_sections": [4, 2, 2, 0]}, "dimension_sections = [4, 2, 2, 0]"),
        ({"freq_base_swa": 1000.0}, "freq_base_swa = 1000.0"),
    ],
)
def test_a_rotary_setting_that_the_class_has_not_is_refused(keys: dict[str, Any], named: str) -> None:
    assert refusal("llama", llama(), {f"rope.{name}": value for name, value in keys.items()}) == (
        f"metadata llama.rope.{named} cannot be followed by transformers' class"
    )


def test_gemma_3_stretches_the_positions_of_its_blocks_without_a_window_alone() -> None:
    config = settled(
        "gemma3",
        Gemma3TextConfig(**SHAPE),
        rope__scaling__type="linear",
        rope__scaling__factor=8.0,
        rope__freq_base=5e5,
        rope__freq_base_swa=2e4,
    )
    assert config.rope_parameters == {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }


def test_the_rotary_width_is_the_file_s_where_the_class_has_one() -> None:
    config = settled("nemotron", NemotronConfig(**SHAPE, head_dim=16), rope__dimension_count=12)
    assert config.rope_parameters["partial_rotary_factor"] == 0.75
    assert settled("starcoder2", Starcoder2Config(**SHAPE), rope__freq_base=1e6).rope_parameters["rope_theta"] == 1e6


def test_a_class_without_rotary_positions_refuses_them() -> None:
    settled("bloom", BloomConfig(n_head=4), rope__scaling__type="none", attention__max_alibi_bias=8.0)
    assert refusal("bloom", BloomConfig(), {"rope.freq_base": 1e4}) == (
        "metadata bloom.rope.freq_base = 10000.0 cannot be followed by transformers' class"
    )


# -- everything else ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "config", "key", "value", "setting", "expected"),
    [
        ("llama", llama(), "attention.layer_norm_rms_epsilon", 1e-3, "rms_norm_eps", 1e-3),
        ("llama", llama(head_dim=16), "attention.key_length", 32, "head_dim", 32),
        ("nemotron", NemotronConfig(), "attention.layer_norm_epsilon", 1e-3, "norm_eps", 1e-3),
        ("starcoder2", Starcoder2Config(), "attention.layer_norm_epsilon", 1e-3, "norm_epsilon", 1e-3),
        ("qwen3", Qwen3Config(), "attention.key_length", 64, "head_dim", 64),
        ("qwen3moe", Qwen3MoeConfig(), "attention.key_length", 128, "head_dim", 128),  # 2048 / 32 without it
        ("qwen2moe", Qwen2MoeConfig(), "expert_feed_forward_length", 96, "moe_intermediate_size", 96),
        ("qwen2moe", Qwen2MoeConfig(), "expert_shared_feed_forward_length", 80, "shared_expert_intermediate_size", 80),
        ("qwen2moe", Qwen2MoeConfig(), "expert_weights_norm", True, "norm_topk_prob", True),
        ("gemma2", Gemma2Config(), "final_logit_softcapping", 20.0, "final_logit_softcapping", 20.0),
        ("gemma2", Gemma2Config(), "attn_logit_softcapping", 40.0, "attn_logit_softcapping", 40.0),
        ("gemma2", Gemma2Config(), "attention.scale", 144**-0.5, "query_pre_attn_scalar", 144.0),
        ("phi3", Phi3Config(), "attention.sliding_window", 2047, "sliding_window", 2047),
        ("gemma3", Gemma3TextConfig(**SHAPE), "attention.sliding_window_pattern", 2, "layer_types",
         ["sliding_attention", "full_attention"] * 2),
        ("gemma3", Gemma3TextConfig(**SHAPE), "attention.sliding_window_pattern", [True, False, False, True],
         "layer_types", ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]),
    ],
)  # fmt: skip
def test_what_the_class_has_a_setting_for_is_carried_over(
    architecture: str, config: PreTrainedConfig, key: str, value: Any, setting: str, expected: Any
) -> None:
    assert settle({f"{architecture}.{key}": value}, architecture, config) == []
    assert getattr(config, setting) == expected


@pytest.mark.parametrize(
    ("architecture", "config", "key", "value"),
    [
        ("llama", llama(), "attention.clamp_kqv", 8.0),
        ("llama", llama(), "attention.max_alibi_bias", 8.0),
        ("llama", llama(), "attention.causal", False),
        ("llama", llama(), "attention.scale", 0.5),
        ("llama", llama(), "attention.sliding_window", 16),
        ("llama", llama(), "logit_scale", 0.0625),
        ("llama", llama(), "residual_scale", 0.22),
        ("llama", llama(), "embedding_scale", 12.0),
        ("llama", llama(), "final_logit_softcapping", 30.0),
        ("llama", llama(), "use_parallel_residual", True),
        ("llama", llama(), "expert_count", 8),
        ("llama", llama(), "head_count_of_the_future", 1),
        ("qwen2", Qwen2Config(), "attention.sliding_window", 16),  # its blocks have no window
        ("qwen2moe", Qwen2MoeConfig(), "expert_weights_scale", 2.5),
        ("qwen2moe", Qwen2MoeConfig(), "expert_gating_func", 2),
        ("qwen2moe", Qwen2MoeConfig(), "leading_dense_block_count", 3),
        ("gemma3", Gemma3TextConfig(**SHAPE), "attention.sliding_window_pattern", [True] * 3),
        ("llama", llama(), "feed_forward_length", [64, 64, 32, 64]),
    ],
)
def test_what_the_class_has_no_setting_for_is_refused_by_name(
    architecture: str, config: PreTrainedConfig, key: str, value: Any
) -> None:
    assert refusal(architecture, config, {"context_length": 2048, key: value}) == (
        f"metadata {architecture}.{key} = {value} cannot be followed by transformers' class"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.clamp_kqv", 0.0),
        ("attention.max_alibi_bias", 0.0),
        ("attention.causal", True),
        ("attention.scale", 0.25),
        ("attention.value_length", 16),
        ("attention.sliding_window", 2048),
        ("logit_scale", 1.0),
        ("embedding_scale", 0.0),
        ("expert_count", 0),
        ("expert_used_count", 0),
        ("feed_forward_length", [11008] * 4),
        ("tensor_data_layout", "Meta AI original pth"),
        ("rope.scaling.original_context_length", 4096),
    ],
)
def test_what_says_what_the_class_does_anyway_changes_nothing(key: str, value: Any) -> None:
    before = llama(head_dim=16).to_dict()
    config = llama(head_dim=16)
    assert settle({"llama.context_length": 2048, f"llama.{key}": value}, "llama", config) == []
    assert config.to_dict() == before


def _keys(room: type) -> list[str]:
    own = [value for name, value in vars(room).items() if isinstance(value, str) and value.startswith("{arch}.")]
    return own + [key for value in vars(room).values() if isinstance(value, type) for key in _keys(value)]


@pytest.mark.parametrize("key", _keys(gguf.Keys))
def test_no_key_that_gguf_knows_is_ignored(key: str) -> None:
    """A value that no llama has is refused, or ends up in the configuration."""
    name = key.removeprefix("{arch}.")
    config = llama(head_dim=16)
    before = config.to_dict()
    refused = ""
    try:
        settle({"llama.context_length": 2048, f"llama.{name}": 7}, "llama", config)
    except AccullmError as error:
        refused = error.what
    harmless = {"tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length"}
    assert f"llama.{name} = 7 " in refused or config.to_dict() != before or name in harmless


@pytest.mark.parametrize(
    ("architecture", "config", "metadata"),
    [
        (
            "falcon",
            FalconConfig,
            {"tensor_data_layout": "jploski", "context_length": 2048, "embedding_length": 4544,
             "feed_forward_length": 18176, "attention.head_count": 71, "attention.head_count_kv": 71},
        ),
        (
            "bloom",
            BloomConfig,
            {"context_length": 2048, "feed_forward_length": 256, "attention.head_count": 8,
             "attention.head_count_kv": 8, "attention.layer_norm_epsilon": 1e-5},
        ),
        (
            "gpt-oss",
            GptOssConfig,
            {"attention.sliding_window": 128, "expert_feed_forward_length": 2880, "attention.key_length": 64,
             "rope.scaling.type": "yarn", "rope.scaling.factor": 32.0, "rope.freq_base": 150000.0,
             "rope.scaling.original_context_length": 4096, "context_length": 131072, "expert_count": 128},
        ),
        (
            "stablelm",
            StableLmConfig,
            {"rope.dimension_count": 20, "use_parallel_residual": False, "attention.layer_norm_epsilon": 1e-5},
        ),
        (
            "gemma2",
            Gemma2Config,
            {"context_length": 8192, "attention.sliding_window": 4096, "attention.key_length": 256,
             "attention.value_length": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        ),
    ],
)  # fmt: skip
def test_what_llama_cpp_writes_of_a_model_with_the_class_s_defaults_changes_nothing(
    architecture: str, config: type[PreTrainedConfig], metadata: dict[str, Any]
) -> None:
    made = config()
    assert settle({f"{architecture}.{name}": value for name, value in metadata.items()}, architecture, made) == []
    assert made.to_dict() == config().to_dict()


def test_keys_and_values_of_two_sizes_are_refused() -> None:
    assert refusal("llama", llama(), {"attention.key_length": 24, "attention.value_length": 16}) == (
        "metadata llama.attention.key_length = 24 cannot be followed by transformers' class"
    )


def test_a_state_space_model_says_that_it_has_no_attention() -> None:
    before = MambaConfig().to_dict()
    config = settled(
        "mamba", MambaConfig(), context_length=2**20, feed_forward_length=0, attention__head_count=0, ssm__state_size=16
    )
    assert config.to_dict() == before


def test_mistral_has_no_window_where_the_file_names_none() -> None:
    assert settled("mistral", MistralConfig(**SHAPE)).sliding_window is None
    assert settled("mistral", MistralConfig(**SHAPE), attention__sliding_window=64).sliding_window == 64


@pytest.mark.parametrize(("blocks", "scalar"), [(42, 256), (46, 144)])
def test_the_largest_gemma_2_scales_attention_by_the_hidden_size(blocks: int, scalar: int) -> None:
    config = Gemma2Config(hidden_size=4608, num_attention_heads=32, num_hidden_layers=blocks, head_dim=256)
    assert settled("gemma2", config).query_pre_attn_scalar == scalar


def test_a_file_of_something_else_than_a_model_is_refused() -> None:
    with pytest.raises(AccullmError) as caught:
        settle({"general.type": "adapter", "adapter.lora.alpha": 16.0}, "llama", llama())
    assert caught.value.what == "holds no model (general.type = adapter)"
