"""Tiny models of the kinds of architecture that differ in what a converter must notice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from tests.tiny import VOCABULARY, make_tokenizer

_TOKENS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "max_position_embeddings": 256,
}
_SHAPE: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}


@dataclass(frozen=True)
class Kind:
    """A class of transformers, the type of its configuration, and its fields."""

    architecture: str
    model_type: str
    fields: dict[str, Any]

    def build(self) -> PreTrainedModel:
        """The model, its weights and buffers large enough to matter."""
        torch.manual_seed(sum(map(ord, self.model_type)))
        config = CONFIG_MAPPING[self.model_type](**self.fields)
        model = getattr(transformers, self.architecture)._from_config(config, experts_implementation="eager").float()
        with torch.no_grad():
            for module in model.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    if parameter.dim() > 1 and not isinstance(module, nn.Conv1d):
                        parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
                    elif name.endswith("bias") and not parameter.any():
                        parameter.normal_(0, 0.1)
                for name, buffer in module.named_buffers(recurse=False):
                    if name not in module._non_persistent_buffers_set and not buffer.any():
                        buffer.normal_(0, 0.3)  # as the correction of a router: it decides where tokens go
        model.tie_weights()
        return model.eval()

    def save(self, directory: Path) -> Path:
        """As a user would have it on disk."""
        self.build().to(torch.bfloat16).save_pretrained(directory)
        make_tokenizer().save_pretrained(directory)
        return directory


def _kind(architecture: str, model_type: str, **fields: Any) -> Kind:
    return Kind(architecture, model_type, fields)


KINDS: dict[str, Kind] = {
    "convolution and attention mixed": _kind(
        "Lfm2ForCausalLM",
        "lfm2",
        **_SHAPE,
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    ),
    "state space, weights on the left": _kind(
        "MambaForCausalLM", "mamba", **_TOKENS, hidden_size=64, num_hidden_layers=2, state_size=8, time_step_rank=8
    ),
    "buffers computed when the model is built": _kind(
        "FalconH1ForCausalLM",
        "falcon_h1",
        **_SHAPE,
        head_dim=16,
        mamba_d_ssm=128,
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_n_groups=1,
        mamba_d_state=16,
        mamba_chunk_size=32,
    ),
    "latent attention, router with a correction": _kind(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        **{**_SHAPE, **_LATENT},
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "router in a module of its own": _kind(
        "HunYuanMoEV1ForCausalLM", "hunyuan_v1_moe", **_SHAPE, head_dim=16, num_experts=4, moe_topk=2
    ),
    "experts [E, K, N]": _kind(
        "GptOssForCausalLM",
        "gpt_oss",
        **_SHAPE,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=16,
    ),
    "experts in one product": _kind(
        "Llama4ForCausalLM",
        "llama4_text",
        **_SHAPE,
        head_dim=16,
        intermediate_size_mlp=96,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        attention_chunk_size=32,
    ),
    "experts in one matrix": _kind(
        "DbrxForCausalLM",
        "dbrx",
        vocab_size=VOCABULARY,
        d_model=64,
        n_heads=4,
        n_layers=2,
        max_seq_len=256,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "embeddings for each block, scalars in buffers": _kind(
        "Gemma4ForCausalLM",
        "gemma4_text",
        **_SHAPE,
        head_dim=16,
        global_head_dim=16,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=16,
        num_kv_shared_layers=0,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "weights tied between blocks": _kind(
        "Zamba2ForCausalLM",
        "zamba2",
        **{**_SHAPE, "num_hidden_layers": 4, "num_key_value_heads": 4},
        layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
        adapter_rank=4,
        n_mamba_heads=8,
        mamba_d_state=16,
        chunk_size=32,
        mamba_ngroups=1,
        use_shared_attention_adapter=True,
    ),
    "parameters in activations": _kind("ApertusForCausalLM", "apertus", **_SHAPE),
    "blocks that return lists": _kind(
        "OpenAIGPTLMHeadModel", "openai-gpt", vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=256
    ),
    "one stored tensor, several parameters": _kind(
        "Glm4MoeForCausalLM",
        "sarvam_moe",
        **_SHAPE,
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "vision tower": _kind(
        "Qwen2VLForConditionalGeneration",
        "qwen2_vl",
        text_config={
            **_SHAPE,
            "model_type": "qwen2_vl_text",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        vision_config={"depth": 1, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 64, "patch_size": 8},
    ),
    "language part with a class of its own": _kind(
        "Qwen3_5ForConditionalGeneration",
        "qwen3_5",
        text_config={
            **_SHAPE,
            "model_type": "qwen3_5_text",
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
        },
    ),
}
