"""Tiny random models: checkpoints with a tokenizer, as a user would have them on disk, and models in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from accullm_cli.config import Config
from accullm_cli.config_file import load_config

VOCABULARY = 260

_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
_PLAIN: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SHAPE),
    "llama-tied": lambda: LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "olmo": lambda: OlmoConfig(**_SHAPE),
    "mistral": lambda: MistralConfig(**_SHAPE, sliding_window=16),
    "qwen2": lambda: Qwen2Config(**_SHAPE),
    "qwen3": lambda: Qwen3Config(**_SHAPE, head_dim=16),
    "gemma2": lambda: Gemma2Config(**_SHAPE, head_dim=16, sliding_window=16),
    "gemma3": lambda: Gemma3TextConfig(
        **_SHAPE, head_dim=16, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": lambda: Phi3Config(**_SHAPE),
    "gpt2": lambda: GPT2Config(
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=256,
        vocab_size=VOCABULARY,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    ),
    "opt": lambda: OPTConfig(**_PLAIN, ffn_dim=96, word_embed_proj_dim=32),
    "gpt-neox": lambda: GPTNeoXConfig(**_PLAIN, intermediate_size=96),
    "mixtral": lambda: MixtralConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "qwen2-moe": lambda: Qwen2MoeConfig(
        **_SHAPE,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
    ),
}


# A model that stays in memory needs no tokenizer, and fewer tokens.
_SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def tiny_llama(tied: bool = False, dtype: torch.dtype = torch.float32, hidden: int = 64) -> PreTrainedModel:
    """With a bias at each linear of the attention."""
    shape = {**_SHAPE, **_SMALL, "hidden_size": hidden}
    return _in_memory(LlamaConfig(**shape, tie_word_embeddings=tied, attention_bias=True), dtype)


def tiny_gpt2() -> PreTrainedModel:
    """Conv1D layers, each with a bias."""
    return _in_memory(GPT2Config(**_SMALL, n_embd=48, n_layer=2, n_head=4))


def tiny_mixtral(hidden: int = 48, intermediate: int = 40) -> PreTrainedModel:
    """Four experts, of widths that are no multiple of 32 unless they are asked for."""
    shape = {**_SHAPE, **_SMALL, "hidden_size": hidden, "intermediate_size": intermediate}
    return _in_memory(MixtralConfig(**shape, num_local_experts=4, num_experts_per_tok=2))


def tiny_gemma3() -> PreTrainedModel:
    """Its embedding multiplies each row it looks up by a number, which is no part of the weights."""
    layer_types = ["sliding_attention", "full_attention"]
    return _in_memory(Gemma3TextConfig(**_SHAPE | _SMALL, head_dim=16, layer_types=layer_types))


def _in_memory(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    config.dtype = dtype
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero at first, where a lost one would not show
            torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).eval()


def tokens(batch: int = 2, length: int = 11) -> torch.Tensor:
    """Ids for the models in memory."""
    return torch.randint(0, _SMALL["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))


def make_checkpoint(name: str, directory: Path, dtype: torch.dtype = torch.bfloat16, shard_size: str = "5GB") -> Path:
    """Save a random model of the architecture `name`, weights and biases large enough to matter, and a tokenizer."""
    torch.manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                # Logits must differ enough between tokens for a divergence to mean something.
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
            elif parameter.abs().max() == 0:
                parameter.normal_(0, 0.1)
    model.tie_weights()
    model.to(dtype).save_pretrained(directory, max_shard_size=shard_size)
    make_tokenizer().save_pretrained(directory)
    return directory


def edit_checkpoint(
    directory: Path, changes: Mapping[str, torch.Tensor], drop: Sequence[str] = ()
) -> dict[str, torch.Tensor]:
    """Add or replace tensors of a checkpoint in one file, and drop others; returns those that were there."""
    before = load_file(directory / "model.safetensors")
    after = {name: tensor for name, tensor in (before | dict(changes)).items() if name not in drop}
    save_file({name: tensor.contiguous() for name, tensor in after.items()}, directory / "model.safetensors")
    return before


def edit_config(directory: Path, **changes: object) -> None:
    """Change keys of a checkpoint's config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: one token for each byte, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def tiny_config(model: Path, out: Path, **settings: object) -> Config:
    """A configuration of small windows, on a CPU and in float32 on every one; `settings` are keys with __ for dots."""
    sets = ["calibration.samples=6", "calibration.seq_len=48", "validation.windows=3", "plan.group_size=32"]
    sets += ["plan.outliers=0.05", "machine.threads=1", "validation.other_text=none", f"export.out={out}"]
    sets += ["machine.precision=float32", "machine.device=cpu"]
    sets += [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    return load_config(str(model), sets=sets)
