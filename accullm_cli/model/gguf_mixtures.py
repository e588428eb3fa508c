"""llama.cpp's programs of mixtures of experts, beside those of `gguf_programs` that the first of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gguf import ExpertGatingFuncType, GGUFWriter

from accullm_cli.model.gguf_architectures import Architecture

_SIGMOID = ExpertGatingFuncType.SIGMOID
# What llama.cpp does where a file does not say otherwise.
_UNSAID = {"norm_topk_prob": False, "routed_scaling_factor": 1.0, "first_k_dense_replace": 0}
_CORRECTION = {"gate.e_score_correction_bias": "gate.e_score_correction.bias"}


def _all_of(*obstacles: Callable[[Any], str]) -> Callable[[Any], str]:
    """The first of several obstacles that there is."""
    return lambda config: next(filter(None, (obstacle(config) for obstacle in obstacles)), "")


def _grouped(config: Any) -> str:
    if config.n_group != 1:
        return f"chooses among all experts, and the model among groups of them (n_group = {config.n_group})"
    return ""


def _tied(config: Any) -> str:
    return "has an output head of its own, and the model has not" if config.tie_word_embeddings else ""


def _windowed(config: Any) -> str:
    return "has no windows, and the model has (layer_types)" if "sliding_attention" in config.layer_types else ""


def _fewer_keys(config: Any) -> str:
    if config.num_key_value_heads != config.num_attention_heads:
        return "has as many heads of keys as of queries, and the model has fewer"
    return ""


def _routed(writer: GGUFWriter, config: Any) -> None:
    """Experts chosen by a sigmoid with a correction, beside shared ones, behind blocks without any."""
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_gating_func(_SIGMOID)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)


MIXTURES: Mapping[str, Architecture] = {
    "glm4_moe": Architecture("glm4moe", parameters=_routed, obstacle=_grouped, names=_CORRECTION, settings=_UNSAID),
    "dots1": Architecture(
        "dots1",
        parameters=_routed,
        obstacle=_all_of(_grouped, _tied, _windowed, _fewer_keys),
        names=_CORRECTION,
        settings=_UNSAID,
    ),
}
