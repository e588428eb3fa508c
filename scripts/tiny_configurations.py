"""What a tiny model of each architecture needs: sizes by all their names, and what only one type has.

A variant of a type has a name behind a colon.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VOCABULARY = 288  # 256 bytes, three special tokens, and some that stand for images and sound

# Every size under all the names that configurations have for it; a configuration takes those that it knows.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("eos_token_id", "sep_token_id"), 256),
    **dict.fromkeys(("bos_token_id", "cls_token_id", "decoder_start_token_id"), 257),
    "pad_token_id": 258,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "n_embed", "embedding_size", "emb_dim", "lru_width"), 64),
    **dict.fromkeys(("word_embed_proj_dim", "attention_hidden_size"), 64),
    **dict.fromkeys(("intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "ffn_hidden_size"), 96),
    **dict.fromkeys(("dff", "dim_ff", "d_inner", "intermediate_size_mlp", "dense_intermediate_size"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 3),
    "num_decoder_layers": 3,
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(
        ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_global_key_value_heads"), 2
    ),
    **dict.fromkeys(("head_dim", "dim_head", "d_head", "kv_channels", "swa_head_dim", "global_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length"), 256),
    **dict.fromkeys(("original_max_position_embeddings", "max_target_positions", "max_source_positions"), 256),
    "context_length": 256,
    **dict.fromkeys(("sliding_window", "window_size", "sliding_window_size", "attention_window_size"), 32),
    **dict.fromkeys(("attention_chunk_size", "local_attention", "block_size"), 32),
    # Experts.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    "zero_expert_num": 2,
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 64),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 64),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    # Latent attention.
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "index_topk"), 32),
    "qk_rope_head_dim": 8,
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("index_n_heads", "o_groups"), 2),
    # State spaces and linear attention.
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_dt_rank", "time_step_rank"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 32),
    "mamba_d_ssm": 128,
    "linear_num_key_heads": 2,
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    # The rest.
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "loop_gate_rank", "hc_lowrank"), 16),
    **dict.fromkeys(("d_rel", "gated_norm_rank", "rotary_dim"), 8),
    "rel_extent": 32,
    "type_vocab_size": 2,
    "layerdrop": 0.0,
    **dict.fromkeys(("logit_scale", "logits_mup_width_multiplier"), 1.0),
    "default_language": "en_XX",
}

S, F, L, C = "sliding_attention", "full_attention", "linear_attention", "conv"
HYBRID, HYBRID_SLIDING, INDEXED = "hybrid", "hybrid_sliding", "indexed_attention"
ABSENT: Any = ...  # a field that is to keep its default
_WINDOWS_THEN_FULL = {"layer_types": [S, S, F]}
_DECODER = {"is_decoder": True}
_ROBERTA = {"is_decoder": True, "pad_token_id": 1}
_QWEN3_NEXT = {"layer_types": [L, L, F]}
_GEMMA3N = {"num_hidden_layers": 4, "layer_types": [S, F, S, F]}
_GEMMA4 = {**_GEMMA3N, "global_head_dim": 16}
_GEMMA4_DENSE = {**_GEMMA4, **dict.fromkeys(("num_experts", "top_k_experts", "moe_intermediate_size"), ABSENT)}
_GEMMA4_EXPERTS = {**_GEMMA4, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
_GEMMA4_EXPERTS |= {"moe_intermediate_size": 32}
_DORY = {"layer_types": [S, F, S], "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1}
_DORY |= {"ngpt_alpha_init": 0.3}  # by default so small that a block hardly matters
_INKLING = {"unpadded_vocab_size": VOCABULARY, "layer_types": [HYBRID_SLIDING, HYBRID, HYBRID_SLIDING]}
_ZAMBA = {"num_hidden_layers": 5, "layers_block_type": [L, HYBRID, L, HYBRID, L]}
_COMPRESSED = ["heavily_compressed_attention", "compressed_sparse_attention"]

# What a type needs beyond SIZES.
SPECIAL: dict[str, dict[str, Any]] = {
    "afmoe": {"num_hidden_layers": 4, "mup_enabled": True},
    "bailing_hybrid": {"layer_group_size": 3, "num_key_value_heads": 4},
    "bamba": {"attn_layer_indices": [1]},
    "beam": {"num_hidden_layers": 4, "layer_types": [S, S, S, F], "mlp_layer_types": ["dense", *["sparse"] * 3]},
    **dict.fromkeys(("bert", "bert-generation", "electra", "ernie", "megatron-bert", "roformer"), _DECODER),
    "big_bird": {"is_decoder": True, "attention_type": "original_full"},
    **dict.fromkeys(("camembert", "data2vec-text", "roberta", "roberta-prelayernorm"), _ROBERTA),
    **dict.fromkeys(("cohere2", "cohere2_moe", "exaone4", "exaone_moe", "gemma3_text", "olmo3"), _WINDOWS_THEN_FULL),
    "cohere_compass_text": {
        **_WINDOWS_THEN_FULL,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in (S, F)},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2:lite": {"q_lora_rank": None},
    "deepseek_v4": {
        "head_dim": 16,
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "partial_rotary_factor": 0.5,
        "layer_types": _COMPRESSED * 2,
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
    },
    "doge:moe": {"is_moe": True, "num_experts": 16},
    "dory": _DORY,
    "dory:oneloop": {**_DORY, "n_recurrent_loops": 1},
    "dots3_note_text": {
        **dict.fromkeys(("num_key_value_heads", "swa_num_attention_heads", "swa_num_key_value_heads"), 4),
        **dict.fromkeys(("head_dim", "swa_head_dim"), 24),
        **dict.fromkeys(("swa_q_lora_rank", "swa_kv_lora_rank"), 32),
        **dict.fromkeys(("swa_qk_nope_head_dim", "swa_v_head_dim"), 16),
        "layer_types": [INDEXED, S, INDEXED],
    },
    "falcon:alibi": {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True, "num_kv_heads": 4},
    "falcon:new": {"new_decoder_architecture": True},
    "flint": {"num_hidden_layers": 4, "layer_types": [F, S, S, F], "mlp_only_layers": [0]},
    "gemma3n_text": {**_GEMMA3N, "num_kv_shared_layers": 2},
    "gemma3n_text:unshared": {**_GEMMA3N, "num_kv_shared_layers": 0},
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), _GEMMA4_DENSE),
    "gemma4_text:e2b": {**_GEMMA4_DENSE, "num_kv_shared_layers": 2, "use_double_wide_mlp": True},
    "gemma4_text:dense": {**_GEMMA4_DENSE, "hidden_size_per_layer_input": 0},
    "gemma4_text:moe": {**_GEMMA4_EXPERTS, "hidden_size_per_layer_input": 0},
    "gemma4_unified_text:moe": _GEMMA4_EXPERTS,
    "gpt_bigcode:mha": {"multi_query": False},
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "granitemoehybrid:dense": {"layer_types": ["attention"] * 3, "num_local_experts": 0},
    "hrm_text": {"num_hidden_layers": 2, "H_cycles": 2, "L_cycles": 2, "L_bp_cycles": [2]},
    "inkling2_text": {**_INKLING, "n_layers_per_attn_res_block": 2},
    "inkling2_loop_text": {
        **_INKLING,
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
    },
    "inkling_text": {"layer_types": _INKLING["layer_types"], "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    "kimi_linear": {"layer_types": [L, L, F], "num_key_value_heads": 4},
    "kolibri1": _WINDOWS_THEN_FULL,
    "laguna": {"layer_types": [F, S, S]},
    "lara_mini": {"layer_types": [L, S, F]},
    "lfm2": {"layer_types": [C, C, F], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": [C, C, F]},
    "lfm3": {"num_hidden_layers": 4, "layer_types": [C, F, C, S]},
    "llama4_text": {"num_hidden_layers": 4, "interleave_moe_layer_step": 2},
    "longcat_flash": {"num_layers": 2, "head_dim": 8},
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": [F, S, S]},
    "ministral": {"layer_types": [S, F, S]},
    "mllama_text_model": {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
    "nemotron_h": {"num_hidden_layers": ABSENT, "sliding_window": ABSENT, "layers_block_type": [L, "moe", F, "mlp"]},
    "olmo_hybrid": {"num_hidden_layers": 4, "linear_num_key_heads": 4},
    "opt": {"word_embed_proj_dim": 32},
    "phi:qk_layernorm": {"qk_layernorm": True},
    "prophetnet": {"pad_token_id": 1, "num_encoder_layers": 1, "num_decoder_layers": 2},
    "qwen2:sliding": {"use_sliding_window": True, "max_window_layers": 1},
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _QWEN3_NEXT),
    "qwen4_exp_text": {
        "layer_types": [L, L, INDEXED],
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 32},
        **{"indexer_compress_ratio": 4, "ple_layer_ids": [1], "ple_embed_dim": 64, "heads_per_ngram": 2},
        **{"ngram_vocab_size_base": 100, "make_ngram_vocab_size_divisible_by": 16, "split_ngram_parts": 4},
    },
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh", "local"],
        **{"axial_pos_shape": [16, 16], "axial_pos_embds_dim": [32, 32], "attention_head_size": 16},
        **{"feed_forward_size": 96, "local_attn_chunk_length": 16, "lsh_attn_chunk_length": 16},
        **{"num_buckets": 4, "hash_seed": 0},
    },
    "rembert": {"is_decoder": True, "input_embedding_size": 32, "output_embedding_size": 64},
    "roc_bert": {
        **_ROBERTA,
        **{
            "pronunciation_embed_dim": 32,
            "pronunciation_vocab_size": 64,
            "shape_embed_dim": 32,
            "shape_vocab_size": 64,
        },
    },
    "smollm3": {"num_hidden_layers": 4},
    "stablelm:parallel": {"use_parallel_residual": True, "qk_layernorm": True},
    "xglm": {"pad_token_id": 1},
    "xlm": {"causal": True},
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl", "xmod"), _ROBERTA),
    "xlnet": {"attn_type": "uni"},
    "zamba": {**_ZAMBA, "attention_hidden_size": 128},
    "zamba2": {
        **_ZAMBA,
        **{"adapter_rank": 16, "n_mamba_heads": 8, "num_key_value_heads": 4, "use_shared_attention_adapter": True},
        **dict.fromkeys(("attention_hidden_size", "kv_channels"), ABSENT),
    },
    "zaya": {"num_experts_per_tok": 1, "layer_types": [HYBRID, HYBRID_SLIDING, HYBRID], "router_hidden_size": 32},
}

# Sizes of vision towers, by name as in SIZES.
TOWER: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "projection_dim", "mm_embed_dim", "output_proj_dims"), 32),
    "audio_embed_dim": 32,
    **dict.fromkeys(("intermediate_size", "mlp_dim", "out_hidden_size", "text_hidden_size"), 64),
    **dict.fromkeys(("projector_input_dim", "projector_output_dim", "position_embedding_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_attention_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("attention_heads", "mlp_ratio", "window_size", "pooling_kernel_size"), 2),
    **dict.fromkeys(("head_dim", "num_position_embeddings", "output_channels", "mm_posemb_size"), 16),
    **dict.fromkeys(("image_size", "crop_size"), 32),
    "patch_size": 8,
    "vocab_size": 8,
    "max_position_embeddings": 64,
    "vision_output_dim": 96,
    **dict.fromkeys(("num_global_layers", "max_num_tiles"), 1),
    "global_attn_indexes": [1],
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0, 1],
    "intermediate_layers_indices": [0, 1],
}


@dataclass(frozen=True)
class Composite:
    """A configuration with others in it.

    text: the type of its text_config. text_values, vision: values of these parts beyond SIZES and TOWER.
    values: of the whole, which takes SIZES as well where it `has_sizes`. parts: other parts, with all values.
    """

    text: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)
    text_values: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    has_sizes: bool = False


_IMAGE, _IMAGE_INDEX = {"image_token_id": 280}, {"image_token_index": 280}
_QWEN = {"image_token_id": 280, "video_token_id": 281, "vision_start_token_id": 282, "vision_end_token_id": 283}
_GEMMA4_IDS = {"image_token_id": 280, "video_token_id": 281, "audio_token_id": 282}
_CLIP, _SIGLIP = {"model_type": "clip_vision_model"}, {"model_type": "siglip_vision_model"}
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_AUDIO = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_BYTES = {name: SIZES[name] for name in ("hidden_size", "num_attention_heads", "intermediate_size")}
_BYTES |= {"num_hidden_layers": 2, "max_position_embeddings": 256}

COMPOSITE: dict[str, Composite] = {
    "aria": Composite("aria_text", _IMAGE_INDEX, {"model_type": "idefics3_vision"}),
    "aya_vision": Composite("cohere", _IMAGE_INDEX, _SIGLIP),
    "cohere2_vision": Composite("cohere2", {**_IMAGE, "alignment_intermediate_size": 64}, _SIGLIP),
    "dots3_note": Composite(
        "dots3_note_text",
        _QWEN,
        {"mlp_layer_types": ["dense", "dense"], "adapter_in_dim": 32, "adapter_out_dim": 64},
        parts={
            "audio_config": {
                **_AUDIO,
                **{"feature_size": 16, "downsample_hidden_size": 16, "adapter_input_size": 32, "adapter_out_dim": 64},
            }
        },
    ),
    "emu3": Composite(
        "emu3_text_model",
        {"vocabulary_map": {"<image>": 280}},
        parts={
            "vq_config": {
                **{"codebook_size": 32, "embed_dim": 8, "latent_channels": 8, "base_channels": 32},
                **{"channel_multiplier": [1, 1], "num_res_blocks": 1, "attn_resolutions": []},
            }
        },
    ),
    "fuyu": Composite(
        "persimmon",
        {
            **_IMAGE,
            **_BYTES,
            **{"num_hidden_layers": 3, "vocab_size": VOCABULARY, "patch_size": 4},
        },
    ),
    "gemma3": Composite(
        "gemma3_text",
        {**_IMAGE_INDEX, "mm_tokens_per_image": 4, "boi_token_index": 281, "eoi_token_index": 282},
        _SIGLIP,
    ),
    "gemma4": Composite("gemma4_text", _GEMMA4_IDS),
    "gemma4_unified": Composite("gemma4_unified_text", _GEMMA4_IDS),
    "git": Composite(has_sizes=True),
    "git:base": Composite(vision={"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4}, has_sizes=True),
    "glm4v": Composite("glm4v_text", _QWEN, text_values=_SECTIONS),
    "glm4v_moe": Composite(
        "glm4v_moe_text",
        _QWEN,
        text_values={"rope_parameters": {**_SECTIONS["rope_parameters"], "mrope_section": [1, 1, 2]}},
    ),
    "got_ocr2": Composite("qwen2", _IMAGE_INDEX),
    "idefics2": Composite("mistral", _IMAGE),
    "idefics3": Composite("llama", _IMAGE),
    "internvl": Composite("qwen2", _IMAGE, {"image_size": [32, 32], "patch_size": [8, 8]}),
    "kimi_k25": Composite("deepseek_v3", _IMAGE),
    "lfm2_vl": Composite("lfm2", _IMAGE_INDEX, {"model_type": "siglip2_vision_model"}),
    "llama4": Composite("llama4_text", _IMAGE_INDEX),
    "llava": Composite("llama", _IMAGE_INDEX, _CLIP),
    "llava_next": Composite("mistral", _IMAGE_INDEX, _CLIP),
    "llava_onevision": Composite("qwen2", _IMAGE_INDEX, _SIGLIP),
    "minimax_m3_vl": Composite("minimax_m3_vl_text", _IMAGE_INDEX),
    "mistral3": Composite("mistral", _IMAGE_INDEX, {"model_type": "pixtral"}),
    "mllama": Composite("mllama_text_model", _IMAGE_INDEX, {"max_num_tiles": 4}),
    "moss_transcribe_diarize": Composite(
        "qwen3",
        {"audio_token_id": 280},
        parts={"audio_config": {**_AUDIO, "num_mel_bins": 16, "max_source_positions": 64}},
    ),
    "ovis2": Composite("qwen2", _IMAGE),
    "paligemma": Composite("gemma", {**_IMAGE_INDEX, "hidden_size": 64, "projection_dim": 64}, _SIGLIP),
    "phi4_multimodal": Composite(
        has_sizes=True,
        values=dict.fromkeys(("sliding_window", "rotary_dim"), ABSENT),
        vision=_IMAGE,
        parts={
            "audio_config": {
                **{"hidden_size": 32, "intermediate_size": 64, "num_blocks": 2, "num_attention_heads": 2},
                **{"audio_token_id": 281, "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32},
                **{"nemo_conv_channels": 32, "input_size": 16},
            }
        },
    ),
    "qwen2_vl": Composite("qwen2_vl_text", _QWEN, {"hidden_size": 64}, _SECTIONS),
    "qwen2_5_vl": Composite("qwen2_5_vl_text", _QWEN, text_values=_SECTIONS),
    **{name: Composite(f"{name}_text", _QWEN) for name in ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")},
    "qwen4_exp": Composite("qwen4_exp_text", _QWEN),
    "smolvlm": Composite("llama", _IMAGE),
    "voxtral": Composite(
        "llama",
        {"audio_token_id": 280},
        parts={"audio_config": {**_AUDIO, "num_mel_bins": 16, "max_source_positions": 64, "head_dim": 16}},
    ),
    # No multimodal one: bytes are encoded in patches and decoded again, by decoders of their own.
    **{
        name: Composite(
            values={
                "vocab_size": VOCABULARY,
                "encoder_hash_byte_group_vocab": 100,
                "local_attention_window_len": 32,
                "max_position_embeddings": 256,
            },
            parts={
                "patcher_config": {**_BYTES, "num_hidden_layers": 1, "vocab_size": VOCABULARY},
                "encoder_config": {**_BYTES, "vocab_size": VOCABULARY, "hidden_size_global": 64},
                "decoder_config": {**_BYTES, "vocab_size": VOCABULARY, "hidden_size_global": 64},
                "global_config": {**_BYTES, "num_hidden_layers": layers},
            },
        )
        for name, layers in {"blt": 2, "blt:global": 6}.items()
    },
}

# Types that are no models of their own, or need what transformers does not bring along.
NOT_BUILT = {
    "gemma3n": "its vision tower needs the package timm (its language part: gemma3n_text)",
    "gemma4_assistant": "drafts for another model, whose states it reads in place of tokens",
    "gemma4_unified_assistant": "drafts for another model, whose states it reads in place of tokens",
    "musicgen": "makes sound from text; no language model",
    "musicgen_melody": "makes sound from text; no language model",
}
# Decoders of encoder-decoders, which the mapping lends a causal head.
HALVES = frozenset(
    "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet trocr whisper".split()
)
# Language parts that transformers loads, but does not list.
UNLISTED = {"mllama_text_model": "MllamaForCausalLM", "emu3_text_model": "Emu3ForCausalLM"}
