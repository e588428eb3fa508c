"""llama.cpp's programs of mixtures of experts, beside those of `gguf_programs` that the first of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gguf import ExpertGatingFuncType, GGUFWriter, RopeScalingType

from accullm_cli.model.gguf_architectures import Architecture, rope_parameters, write_multipliers

_SIGMOID = ExpertGatingFuncType.SIGMOID
# What llama.cpp does where a file does not say otherwise.
_UNSAID = {"norm_topk_prob": False, "routed_scaling_factor": 1.0, "first_k_dense_replace": 0}
_CORRECTION = {"e_score_correction_bias": "e_score_correction.bias"}
_GRANITE = {
    "block_sparse_moe.router.weight": "block_sparse_moe.gate.weight",
    "block_sparse_moe.experts.": "mlp.experts.",
    "shared_mlp.input_linear.weight": "mlp.shared_experts.gate_up_proj",
}


def _all_of(*obstacles: Callable[[Any], str]) -> Callable[[Any], str]:
    """The first of several obstacles that there is."""
    return lambda config: next(filter(None, (obstacle(config) for obstacle in obstacles)), "")


def _grouped(config: Any) -> str:
    if config.n_group > 1 and config.topk_group >= config.n_group:
        return "takes fewer groups of experts than there are, and the model all of them (topk_group)"
    return ""


def tied(config: Any) -> str:
    return "has an output head of its own, and the model has not" if config.tie_word_embeddings else ""


def _windowed(config: Any) -> str:
    return "has no windows, and the model has (layer_types)" if "sliding_attention" in config.layer_types else ""


def _fewer_keys(config: Any) -> str:
    if config.num_key_value_heads != config.num_attention_heads:
        return "has as many heads of keys as of queries, and the model has fewer"
    return ""


def biased(config: Any) -> str:
    if config.attention_bias:
        return "has no bias behind its attention, and the model has (attention_bias)"
    return ""


def _routed(writer: GGUFWriter, config: Any) -> None:
    """Experts chosen by a sigmoid with a correction, beside shared ones, behind blocks without any."""
    shared = config.num_shared_experts if config.model_type == "exaone_moe" else config.n_shared_experts
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(shared)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_gating_func(_SIGMOID)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_group_count(config.n_group)
    writer.add_expert_group_used_count(config.topk_group)


def _granite(writer: GGUFWriter, config: Any) -> None:
    write_multipliers(writer, config)
    if shared := getattr(config, "shared_intermediate_size", 0):
        writer.add_expert_shared_feed_forward_length(shared)


def _granite_obstacle(config: Any) -> str:
    return "" if config.num_local_experts else "has experts, and the model has none"


def _ernie(writer: GGUFWriter, config: Any) -> None:
    writer.add_interleave_moe_layer_step(config.moe_layer_interval)
    writer.add_leading_dense_block_count(config.moe_layer_start_index)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.moe_num_shared_experts)
    if shared := config.moe_num_shared_experts:
        writer.add_expert_shared_feed_forward_length(config.moe_intermediate_size * shared)


def _ernie_obstacle(config: Any) -> str:
    if config.moe_layer_interval != 1 or config.moe_layer_end_index != config.num_hidden_layers - 1:
        return "has experts in every block behind the first of them, and the model has not"
    return "has no biases, and the model has (use_bias)" if config.use_bias else ""


def _minimax(writer: GGUFWriter, config: Any) -> None:
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_expert_gating_func(_SIGMOID)


def _hunyuan(writer: GGUFWriter, config: Any) -> None:
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_expert_shared_feed_forward_length(config.intermediate_size)
    writer.add_expert_shared_count(1)


def _hunyuan_obstacle(config: Any) -> str:
    for setting in ("num_experts", "moe_topk"):
        value = getattr(config, setting)
        if isinstance(value, list) and len(set(value)) != 1:
            return f"has as many experts in each block, and the model has not ({setting})"
    return ""


def _exaone(writer: GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    _routed(writer, config)
    writer.add_expert_shared_feed_forward_length(config.moe_intermediate_size * config.num_shared_experts)
    writer.add_nextn_predict_layers(0)
    writer.add_rope_scaling_type(RopeScalingType.NONE)


def _exaone_obstacle(config: Any) -> str:
    first = config.first_k_dense_replace
    if config.mlp_layer_types != ["dense"] * first + ["sparse"] * (config.num_hidden_layers - first):
        return "has experts in all blocks but the first, and the model in others (mlp_layer_types)"
    if rope_parameters(config).get("rope_type", "default") not in ("default", "llama3"):
        return f"does not scale rotary positions, and the model does ({rope_parameters(config)['rope_type']})"
    return ""


def _afmoe(writer: GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.num_shared_experts)
    writer.add_expert_gating_func(_SIGMOID)
    writer.add_expert_weights_scale(config.route_scale)
    writer.add_expert_weights_norm(True)
    writer.add_leading_dense_block_count(config.num_dense_layers)


def _afmoe_obstacle(config: Any) -> str:
    if not config.mup_enabled:
        return "multiplies embeddings by the square root of their width, and the model does not (mup_enabled)"
    for number, kind in enumerate(config.layer_types):
        if (kind == "sliding_attention") != ((number + 1) % 4 != 0):
            return "has a window in all blocks but every fourth, and the model in others (layer_types)"
    if not config.sliding_window or not config.num_shared_experts:
        return "has windows and shared experts, and the model has not both"
    return ""


MIXTURES: Mapping[str, Architecture] = {
    "glm4_moe": Architecture("glm4moe", parameters=_routed, obstacle=_grouped, names=_CORRECTION, settings=_UNSAID),
    "granitemoe": Architecture(
        "granitemoe", in_pairs=True, factors=True, parameters=_granite, obstacle=_granite_obstacle, names=_GRANITE
    ),
    "granitemoeshared": Architecture(
        "granitemoe",
        in_pairs=True,
        factors=True,
        parameters=_granite,
        obstacle=_granite_obstacle,
        names=_GRANITE,
        told_by="expert_shared_feed_forward_length",
    ),
    "ernie4_5_moe": Architecture(
        "ernie4_5-moe",
        parameters=_ernie,
        obstacle=_ernie_obstacle,
        names={**_CORRECTION, "gate.moe_statics.": "moe_statics."},
        settings={"moe_num_shared_experts": 0, "moe_layer_start_index": 0},
    ),
    "dots1": Architecture(
        "dots1",
        parameters=_routed,
        obstacle=_all_of(_grouped, tied, _windowed, _fewer_keys, biased),
        names=_CORRECTION,
        settings=_UNSAID,
    ),
    "minimax_m2": Architecture(
        "minimax-m2",
        parameters=_minimax,
        obstacle=tied,
        names=_CORRECTION,
        settings={"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
    ),
    "hunyuan_v1_moe": Architecture("hunyuan-moe", parameters=_hunyuan, obstacle=_all_of(_hunyuan_obstacle, biased)),
    "exaone_moe": Architecture(
        "exaone-moe",
        factors=True,
        parameters=_exaone,
        obstacle=_all_of(_grouped, tied, _exaone_obstacle),
        names=_CORRECTION,
        first={"leading_dense_block_count": "first_k_dense_replace"},
        settings=_UNSAID,
    ),
    "afmoe": Architecture(
        "afmoe",
        parameters=_afmoe,
        obstacle=_all_of(_afmoe_obstacle, biased),
        names={"mlp.expert_bias": "mlp.expert_bias.bias"},
        settings={"mup_enabled": True, "num_dense_layers": 0, "route_scale": 1.0},
    ),
}
