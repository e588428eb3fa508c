"""What llama.cpp wants to know of an architecture: names, metadata, and what tensors become.

llama.cpp has a program for each architecture, which finds tensors by name and hyperparameters by key. Which of them are
written stands in `gguf_programs`; here is what they have in common. What a key means is said by
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and what a file of llama.cpp's own convert_hf_to_gguf.py has
under it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from gguf import MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType, get_tensor_name_map
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from accullm_cli.errors import AccullmError
from accullm_cli.model.gguf_pieces import Piece

_ARCHITECTURES = {name: number for number, name in MODEL_ARCH_NAMES.items()}
# Scaling of rotary positions that is stored as factors of the frequencies, under this name.
ROPE_FACTORS = "rope_freqs.weight"
# Those whose programs look at all tokens before one, also where transformers' class may have a window.
_WITHOUT_WINDOWS = (
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "starcoder2",
    "smollm3",
    "ministral3",
)
# Of models whose positions have no end, what they were trained to read (BLOOM).
_UNSAID_LENGTH = 2048
# transformers' name of experts' gate and up projection in one parameter, and what GGUF's table calls the two.
_FUSED = ("gate_up_proj", ("gate_proj", "up_proj"))


Parameters = Callable[[GGUFWriter, Any], None]


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's programs, for one model type of transformers.

    name: that llama.cpp has for it.
    in_pairs: it rotates neighbouring values of a head, where transformers rotates one of its halves with the other, so
        that the rows of q and k come in another order.
    factors: it reads factors of the rotary frequencies, as which Llama 3's scaling is stored.
    norm_shift: added to the weights of norms, where transformers' norms multiply by one plus their weight.
    parameters: writes what only this architecture has. obstacle: why a configuration is none that the program follows,
        as the end of a sentence; "" where it is one.
    names: parts of parameters' names, by what GGUF's table of names has for them. first: of a file, keys whose settings
        the class derives others from, beside those of every class.
    told_by: of a file, the key that tells this model type from others with the same program; "" where there is none, or
        the file is of this type if no other's key is there. settings: what the program does, where transformers' class
        does otherwise by itself and no key says so.
    """

    name: str
    in_pairs: bool = False
    factors: bool = False
    norm_shift: float = 0.0
    parameters: Parameters = lambda writer, config: None
    obstacle: Callable[[Any], str] = lambda config: ""
    names: Mapping[str, str] = field(default_factory=dict)
    first: Mapping[str, str] = field(default_factory=dict)
    told_by: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def pieces(self, config: PreTrainedConfig, parameter: str, out_features: int) -> tuple[Piece, ...]:
        """What a parameter becomes.

        Args:
            parameter: its name in the module tree. out_features: its rows, in a stack those of an expert.

        Raises:
            AccullmError: llama.cpp has no name for it.
        """
        called = parameter
        for own, other in self.names.items():
            called = called.replace(own, other)
        base, _, last = called.rpartition(".")
        if last == _FUSED[0]:
            half = out_features // 2
            rows = ((0, half), (half, out_features))
            return tuple(
                Piece(self._name(f"{base}.{part}.weight", parameter), own)
                for part, own in zip(_FUSED[1], rows, strict=True)
            )
        shift = self.norm_shift if parameter.endswith("norm.weight") else 0.0
        heads = 0
        if self.in_pairs and base.endswith(("q_proj", "k_proj")):
            heads = config.num_key_value_heads if base.endswith("k_proj") else config.num_attention_heads
        groups = None
        if base.endswith("query_key_value"):
            groups = _key_heads(config), config.num_attention_heads // _key_heads(config)
        stacked = last not in ("weight", "bias")
        return (Piece(self._name(f"{called}.weight" if stacked else called, parameter), None, heads, groups, shift),)

    def _name(self, wanted: str, parameter: str) -> str:
        found = _name_of(self.name, wanted)
        if found is None:
            raise AccullmError(f"llama.cpp's architecture {self.name} has no tensor for {parameter}")
        return found


@cache
def _name_of(architecture: str, wanted: str) -> str | None:
    """llama.cpp's name of a tensor. A map of names is made for so many blocks, and takes milliseconds."""
    blocks = 1 + max((int(part) for part in wanted.split(".") if part.isdecimal()), default=0)
    name_map = get_tensor_name_map(_ARCHITECTURES[architecture], blocks)
    return name_map.get_name(wanted, try_suffixes=(".weight", ".bias"))


def is_further(tensor: str, blocks: int) -> bool:
    """Whether a tensor of a file belongs to a block behind the model's own: those predict further tokens."""
    found = re.match(r"blk\.(\d+)\.", tensor)
    return found is not None and int(found[1]) >= blocks


def placed(
    architecture: Architecture, config: PreTrainedConfig, parameters: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[Piece, ...]]:
    """The pieces of each parameter.

    Raises:
        AccullmError: llama.cpp has no tensor for one.
    """
    return {
        name: architecture.pieces(config, name, shape[-2] if len(shape) > 1 else shape[0])
        for name, shape in parameters.items()
    }


# -- metadata ----------------------------------------------------------------------------------------------


def write_parameters(writer: GGUFWriter, architecture: Architecture, config: Any) -> None:
    """Write the hyperparameters that llama.cpp's program reads."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(_width(config))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(_key_heads(config))
    writer.add_vocab_size(config.vocab_size)
    _write_rope(writer, config)
    for name in ("rms_norm_eps", "norm_eps"):
        if (epsilon := getattr(config, name, None)) is not None:
            writer.add_layer_norm_rms_eps(epsilon)
            break
    for name in ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"):
        if (epsilon := getattr(config, name, None)) is not None:
            writer.add_layer_norm_eps(epsilon)
            break
    if experts := getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        writer.add_expert_count(experts)
        used = config.num_experts_per_tok
        writer.add_expert_used_count(used[0] if isinstance(used, list) else used)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    if hasattr(config, "rope_parameters"):
        writer.add_rope_dimension_count(_rotated(config))
    architecture.parameters(writer, config)


def write_multipliers(writer: GGUFWriter, config: Any) -> None:
    """Granite's."""
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _width(config: Any) -> int:
    """Of the MLP."""
    own = (getattr(config, name, None) for name in ("intermediate_size", "ffn_hidden_size", "n_inner"))
    return int(next(filter(None, own), getattr(config, "expansion_ratio", 4) * config.hidden_size))


def _key_heads(config: Any) -> int:
    if config.model_type == "gpt_bigcode":
        return 1 if config.multi_query else int(config.num_attention_heads)
    if config.model_type == "falcon":
        return int(config.num_kv_heads if config.new_decoder_architecture or not config.multi_query else 1)
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _rotated(config: Any) -> int:
    """The values of a head that are rotated."""
    share = rope_parameters(config).get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None)
    return int(head_size(config) * (1.0 if share is None else share))


def _context_length(config: Any) -> int:
    """Up to where llama.cpp does what the model does: an architecture without a sliding window has it in full."""
    window = getattr(config, "sliding_window", None)
    if window and config.model_type in _WITHOUT_WINDOWS and getattr(config, "use_sliding_window", True):
        return int(min(window, config.max_position_embeddings))
    if config.model_type == "cohere":  # whose configuration has beside these what the model was trained to read
        return int(getattr(config, "model_max_length", None) or config.max_position_embeddings)
    own = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return int(next(filter(None, own), _UNSAID_LENGTH))


def rope_parameters(config: Any) -> Mapping[str, Any]:
    """Those of blocks with full attention."""
    found = getattr(config, "rope_parameters", None) or {}
    own: Mapping[str, Any] = found.get("full_attention", found)
    return own


def _stretched(config: Any) -> float | None:
    """Hunyuan's base of rotary positions where it is stretched by a constant, whatever a text's length."""
    rope = rope_parameters(config)
    if not config.model_type.startswith("hunyuan") or rope.get("rope_type") != "dynamic" or not rope.get("alpha"):
        return None
    size = head_size(config)
    return float(rope["rope_theta"] * rope["alpha"] ** (size / (size - 2)))


def rope_obstacle(config: Any, factors: bool) -> str:
    """Why rotary positions are not scaled as in the model; factors: see `Architecture`."""
    rope = rope_parameters(config)
    kind = rope.get("rope_type", "default")
    if _stretched(config):
        return ""
    if kind not in ("default", "linear", "yarn", *(["llama3"] if factors else [])):
        return f"scales rotary positions otherwise than the model ({kind})"
    if kind == "yarn":
        own = rope.get("attention_factor"), rope.get("beta_slow")
        usual = 0.1 * math.log(rope["factor"]) + 1.0, 1.0
        if rope.get("truncate") is False:
            return "rounds the bounds between which YaRN scales, and the model does not (truncate)"
        if rope.get("mscale") and rope.get("mscale_all_dim") and config.model_type != "ministral3":
            return "has no scale of its own for YaRN, and the model has (mscale_all_dim)"
        if any(value is not None and not math.isclose(value, other) for value, other in zip(own, usual, strict=True)):
            return "has an attention_factor and a beta_slow of its own for YaRN, and the model has others"
    window = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention", {})
    if window.get("rope_type", "default") != "default":
        return f"does not scale rotary positions in its windows ({window['rope_type']})"
    return ""


def activation_obstacle(config: Any) -> str:
    """A program has one activation, which is that of its class's models; GELU has one way to be computed."""
    usual = type(config)()
    for setting in ("hidden_act", "hidden_activation", "activation"):
        own, expected = getattr(config, setting, None), getattr(usual, setting, None)
        if own and expected and own.partition("_")[0] != expected.partition("_")[0]:
            return f"has {expected} in its MLP, and the model {own}"
    return ""


def _write_rope(writer: GGUFWriter, config: Any) -> None:
    rope = rope_parameters(config)
    if (theta := _stretched(config) or rope.get("rope_theta")) is not None:
        writer.add_rope_freq_base(theta)
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if (fast := rope.get("beta_fast")) is not None:
            writer.add_rope_scaling_yarn_beta_fast(fast)
        if (slow := rope.get("beta_slow")) is not None:
            writer.add_rope_scaling_yarn_beta_slow(slow)


def rope_factors(config: PreTrainedConfig) -> torch.Tensor | None:
    """What the rotary frequencies are divided by, float32 [values rotated / 2]; None where they are as their base says.

    Llama 3's scaling has no keys in a GGUF file, only its result.
    """
    rope = rope_parameters(config)
    if rope.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = rope["rope_theta"] ** (-torch.arange(len(scaled), dtype=torch.float32) / len(scaled))
    return plain / scaled
