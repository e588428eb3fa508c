"""llama.cpp's programs that are written and read: those whose tensors are transformers' under other names, with rows in
another order, with a constant added, or cut and stacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gguf import GGUFWriter, RopeScalingType
from transformers import PreTrainedConfig

from accullm_cli.errors import AccullmError
from accullm_cli.model.gguf_architectures import (
    Architecture,
    activation_obstacle,
    head_size,
    rope_obstacle,
    rope_parameters,
    write_multipliers,
)
from accullm_cli.model.gguf_mixtures import MIXTURES, biased, tied


def _gemma2(writer: GGUFWriter, config: Any) -> None:
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def _gemma3(writer: GGUFWriter, config: Any) -> None:
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])


def _scales_by(blocks: int) -> Callable[[Any], str]:
    """Gemma's attention: llama.cpp scales by a head's size, with so many blocks by its share of the width."""

    def obstacle(config: Any) -> str:
        large = config.num_hidden_layers == blocks
        expected = config.hidden_size / config.num_attention_heads if large else head_size(config)
        if config.query_pre_attn_scalar != expected:
            return f"scales attention by {expected:g}, and the model by {config.query_pre_attn_scalar:g}"
        return ""

    return obstacle


def _gemma2_obstacle(config: Any) -> str:
    pattern = ["sliding_attention", "full_attention"]
    return _scales_by(46)(config) or _pattern_obstacle(config, pattern)


def _gemma3_obstacle(config: Any) -> str:
    if getattr(config, "attn_logit_softcapping", None):
        return "has no soft-capped attention, and the model has"
    if getattr(config, "use_bidirectional_attention", False):
        return "does not look ahead, and the model does"
    return _scales_by(62)(config) or _pattern_obstacle(config, [*["sliding_attention"] * 5, "full_attention"])


def _pattern_obstacle(config: Any, pattern: list[str]) -> str:
    for number, kind in enumerate(config.layer_types):
        if kind != pattern[number % len(pattern)]:
            return f"has {pattern[number % len(pattern)]} in block {number}, and the model {kind}"
    return ""


def _phi3(writer: GGUFWriter, config: Any) -> None:
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_sliding_window(config.sliding_window or 0)  # 0 tells Phi 4 from others


def _qwen2_moe(writer: GGUFWriter, config: Any) -> None:
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _qwen3_moe(writer: GGUFWriter, config: Any) -> None:
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _experts_obstacle(normalized: bool) -> Callable[[Any], str]:
    def obstacle(config: Any) -> str:
        if config.mlp_only_layers or config.decoder_sparse_step != 1:
            return "has experts in every block, and the model has not"
        if config.norm_topk_prob != normalized:
            does = "makes the weights of a token's experts add up to one" if normalized else "leaves them as they are"
            return f"{does}, and the model does otherwise (norm_topk_prob)"
        return ""

    return obstacle


def _olmo(writer: GGUFWriter, config: Any) -> None:
    writer.add_layer_norm_eps(1e-5)
    if config.clip_qkv is not None:
        writer.add_clamp_kqv(config.clip_qkv)


def _olmoe_obstacle(config: Any) -> str:
    if config.norm_topk_prob or config.clip_qkv:
        return "neither normalizes the weights of a token's experts nor clips its values, and the model does"
    if config.num_key_value_heads != config.num_attention_heads:
        return "has as many heads of keys as of queries, and the model has fewer"
    return ""


def _nemotron(writer: GGUFWriter, config: Any) -> None:
    writer.add_layer_norm_eps(config.norm_eps)


def _windows(writer: GGUFWriter, config: Any) -> None:
    if config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
        if "sliding_attention" in config.rope_parameters:
            writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])


def _olmo3_obstacle(config: Any) -> str:
    window = config.rope_parameters.get("sliding_attention", {}).get("rope_theta")
    if window is not None and window != rope_parameters(config).get("rope_theta"):
        return "has one base of rotary positions for all blocks, and the model another in its windows (rope_theta)"
    return ""


def _stablelm(writer: GGUFWriter, config: Any) -> None:
    writer.add_parallel_residual(config.use_parallel_residual)


def _stablelm_obstacle(config: Any) -> str:
    return "takes norms of queries and keys in one tensor" if config.qk_layernorm else ""


def _cohere(writer: GGUFWriter, config: Any) -> None:
    writer.add_logit_scale(config.logit_scale)
    if rope_parameters(config).get("rope_type", "default") == "default":
        writer.add_rope_scaling_type(RopeScalingType.NONE)


def _square(config: Any) -> str:
    if head_size(config) * config.num_attention_heads != config.hidden_size:
        return "has heads that are together as wide as the model, and the model has others (head_dim)"
    return ""


def _cohere2(writer: GGUFWriter, config: Any) -> None:
    _cohere(writer, config)
    writer.add_sliding_window(config.sliding_window)


def _cohere2_obstacle(config: Any) -> str:
    pattern = [*["sliding_attention"] * 3, "full_attention"]
    return _square(config) or biased(config) or _pattern_obstacle(config, pattern)


def _ministral3(writer: GGUFWriter, config: Any) -> None:
    rope = rope_parameters(config)
    writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    if (scale := rope.get("mscale_all_dim")) and rope.get("mscale"):
        writer.add_rope_scaling_yarn_log_mul(scale)


def _ministral3_obstacle(config: Any) -> str:
    rope = rope_parameters(config)
    if rope.get("rope_type") != "yarn" or not rope.get("llama_4_scaling_beta"):
        return "has YaRN and queries that grow with their position, and the model has not (llama_4_scaling_beta)"
    if rope.get("mscale_all_dim") and (rope.get("mscale") or 1.0) != 1.0:
        return f"has a scale of 1 for YaRN, and the model {rope['mscale']:g} (mscale)"
    return ""


def _exaone_obstacle(config: Any) -> str:
    return "has no biases, and the model has (mlp_bias)" if config.mlp_bias else biased(config)


def _exaone4(writer: GGUFWriter, config: Any) -> None:
    if config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])


def _exaone4_obstacle(config: Any) -> str:
    """Its program has windows in three of four blocks where there are 64 of them, and none in other models."""
    large = config.num_hidden_layers == 64
    if bool(config.sliding_window) != large:
        return f"has {'windows in' if large else 'no windows but in'} models of 64 blocks, and the model does otherwise"
    pattern = [*["sliding_attention"] * 3, "full_attention"] if large else ["full_attention"]
    return _square(config) or _pattern_obstacle(config, pattern)


def _falcon(writer: GGUFWriter, config: Any) -> None:
    writer.add_tensor_data_layout("jploski")  # queries, then keys, then values


def _falcon_obstacle(config: Any) -> str:
    if config.alibi:
        return "has rotary positions, and the model has not (alibi)"
    return "has no biases, and the model has (bias)" if config.bias else ""


def _gpt_neox(writer: GGUFWriter, config: Any) -> None:
    writer.add_parallel_residual(config.use_parallel_residual)


def _gpt_neox_obstacle(config: Any) -> str:
    if not config.attention_bias:
        return "has a bias behind its attention, and the model has not (attention_bias)"
    return tied(config)


def _bloom(writer: GGUFWriter, config: Any) -> None:
    writer.add_max_alibi_bias(8.0)


def _bloom_obstacle(config: Any) -> str:
    if config.apply_residual_connection_post_layernorm:
        return "adds what comes in front of norms, and the model what comes behind"
    return ""


def _mpt(writer: GGUFWriter, config: Any) -> None:
    writer.add_max_alibi_bias(float(config.attn_config.alibi_bias_max))


def _mpt_obstacle(config: Any) -> str:
    """Some of what transformers' class has settings for, it does not do itself."""
    attention = config.attn_config
    if not attention.alibi or attention.alibi_bias_max != 8:
        return "has ALiBi of up to 8, and the model other positions (attn_config)"
    if attention.clip_qkv or attention.softmax_scale or attention.qk_ln or config.logit_scale or not config.no_bias:
        return "neither clips nor scales nor has biases, and the model does (attn_config, logit_scale, no_bias)"
    return ""


def _bigcode_obstacle(config: Any) -> str:
    if not config.multi_query:
        return "has one head of keys, and the model has more (multi_query)"
    if not config.scale_attn_weights:
        return "scales attention, and the model does not (scale_attn_weights)"
    return ""


def _smollm3_obstacle(config: Any) -> str:
    for number, rotates in enumerate(config.no_rope_layers):
        if bool(rotates) != ((number + 1) % 4 != 0):
            return "leaves out rotary positions in every fourth block, and the model does otherwise"
    return ""


_BLOOM = {f"transformer.{name}": name for name in ("word_embeddings", "h.", "ln_f")}

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", in_pairs=True, factors=True),
    "mistral": Architecture("llama", in_pairs=True, factors=True, told_by="attention.sliding_window"),
    "mixtral": Architecture("llama", in_pairs=True, factors=True, told_by="expert_count"),
    "iquestcoder": Architecture("llama", in_pairs=True, factors=True),
    "internlm3": Architecture("llama", in_pairs=True, factors=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen2_moe": Architecture("qwen2moe", parameters=_qwen2_moe, obstacle=_experts_obstacle(normalized=False)),
    "qwen3_moe": Architecture(
        "qwen3moe",
        parameters=_qwen3_moe,
        obstacle=_experts_obstacle(normalized=True),
        settings={"norm_topk_prob": True},
    ),
    "gemma": Architecture("gemma", norm_shift=1.0),
    "gemma2": Architecture("gemma2", norm_shift=1.0, parameters=_gemma2, obstacle=_gemma2_obstacle),
    "gemma3_text": Architecture("gemma3", norm_shift=1.0, parameters=_gemma3, obstacle=_gemma3_obstacle),
    "phi3": Architecture("phi3", parameters=_phi3),
    "olmo": Architecture("olmo", in_pairs=True, parameters=_olmo),
    "olmo2": Architecture("olmo2"),
    "olmo3": Architecture("olmo2", parameters=_windows, obstacle=_olmo3_obstacle, told_by="attention.sliding_window"),
    "olmoe": Architecture("olmoe", obstacle=_olmoe_obstacle),
    "granite": Architecture("granite", in_pairs=True, factors=True, parameters=write_multipliers),
    "starcoder2": Architecture("starcoder2"),
    "stablelm": Architecture("stablelm", parameters=_stablelm, obstacle=_stablelm_obstacle),
    "cohere": Architecture("command-r", parameters=_cohere),
    "smollm3": Architecture("smollm3", in_pairs=True, obstacle=_smollm3_obstacle),
    "seed_oss": Architecture("seed_oss"),
    "arcee": Architecture("arcee", in_pairs=True, factors=True),
    "ernie4_5": Architecture("ernie4_5"),
    "nemotron": Architecture("nemotron", norm_shift=1.0, parameters=_nemotron),
    "cohere2": Architecture("cohere2", parameters=_cohere2, obstacle=_cohere2_obstacle),
    "glm": Architecture("chatglm", obstacle=_square),
    "glm4": Architecture("glm4"),
    "exaone": Architecture("exaone", factors=True, obstacle=_exaone_obstacle),
    "exaone4": Architecture("exaone4", factors=True, parameters=_exaone4, obstacle=_exaone4_obstacle),
    "hunyuan_v1_dense": Architecture("hunyuan-dense", obstacle=biased),
    "phi": Architecture("phi2", obstacle=tied),
    "jais2": Architecture("jais2"),
    "ministral3": Architecture("mistral3", in_pairs=True, parameters=_ministral3, obstacle=_ministral3_obstacle),
    "gpt_neox": Architecture("gptneox", parameters=_gpt_neox, obstacle=_gpt_neox_obstacle),
    "falcon": Architecture("falcon", parameters=_falcon, obstacle=_falcon_obstacle),
    "mpt": Architecture("mpt", parameters=_mpt, obstacle=_mpt_obstacle),
    "gpt_bigcode": Architecture("starcoder", obstacle=_bigcode_obstacle),
    "bloom": Architecture("bloom", names=_BLOOM, parameters=_bloom, obstacle=_bloom_obstacle),
    **MIXTURES,
}


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The architecture of a model.

    Raises:
        AccullmError: none that can be written, or the configuration asks for what llama.cpp's program does not do.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise AccullmError(f"models of type {config.model_type} cannot be written for llama.cpp")
    if obstacle := found.obstacle(config) or rope_obstacle(config, found.factors) or activation_obstacle(config):
        raise AccullmError(f"llama.cpp's architecture {found.name} {obstacle}")
    return found
