"""The metadata of a GGUF file: every key is part of the model's configuration, harmless, named in a record, or refused.

transformers' mapping drops keys that it does not know, some of which change the function (a scaling of the rotary
positions, a soft cap of logits). What the class has a setting for is carried over; a key that the class cannot follow
is refused, unless it says what the class does by itself. Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
(their meaning as in llama.cpp's src/llama-model.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from huggingface_hub.errors import StrictDataclassError

from accullm_cli.errors import AccullmError
from accullm_cli.model.gguf_tokenizer import split_records

_EPSILONS = ("rms_norm_eps", "norm_eps", "norm_epsilon", "layer_norm_eps", "layer_norm_epsilon")
_OFF = (0, 1)  # of a factor: llama.cpp takes 0 for "not given"


@dataclass(frozen=True)
class _Meaning:
    """What a key sets.

    settings: names in the configuration; the first that the class has counts.
    neutral: values that change nothing in a class that has none of them.
    """

    settings: tuple[str, ...] = ()
    neutral: tuple[Any, ...] = ()


_MEANINGS: dict[str, _Meaning] = {
    "vocab_size": _Meaning(("vocab_size",)),
    "embedding_length": _Meaning(("hidden_size",)),
    "block_count": _Meaning(("num_hidden_layers",)),
    "attention.head_count": _Meaning(("num_attention_heads",)),
    "attention.layer_norm_epsilon": _Meaning(_EPSILONS, (1e-5,)),
    "attention.layer_norm_rms_epsilon": _Meaning(_EPSILONS),
    "attention.clamp_kqv": _Meaning(("clip_qkv",), (0,)),
    "attention.causal": _Meaning((), (True,)),
    "attention.output_scale": _Meaning((), _OFF),
    "attention.temperature_length": _Meaning((), (0,)),
    "attention.shared_kv_layers": _Meaning(("num_kv_shared_layers",), (0,)),
    "attn_logit_softcapping": _Meaning(("attn_logit_softcapping",), (0,)),
    "final_logit_softcapping": _Meaning(("final_logit_softcapping",), (0,)),
    "router_logit_softcapping": _Meaning((), (0,)),
    "logit_scale": _Meaning(("logit_scale", "logits_scaling"), _OFF),
    "residual_scale": _Meaning(("residual_multiplier",), _OFF),
    "embedding_scale": _Meaning(("embedding_multiplier",), _OFF),
    "use_parallel_residual": _Meaning(("use_parallel_residual", "parallel_attn"), (False,)),
    "expert_count": _Meaning(("num_experts", "num_local_experts"), (0,)),
    "expert_used_count": _Meaning(("num_experts_per_tok", "top_k_experts"), (0,)),
    "expert_feed_forward_length": _Meaning(("moe_intermediate_size", "intermediate_size"), (0,)),
    "expert_group_count": _Meaning(("n_group",), _OFF),
    "expert_group_used_count": _Meaning(("topk_group",), _OFF),
    "expert_weights_scale": _Meaning(("routed_scaling_factor", "route_scale"), _OFF),
    "leading_dense_block_count": _Meaning(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), (0,)),
    "moe_every_n_layers": _Meaning(("decoder_sparse_step",), _OFF),
    "interleave_moe_layer_step": _Meaning(("moe_layer_interval",), _OFF),
    "nextn_predict_layers": _Meaning((), (0,)),
    "n_deepstack_layers": _Meaning((), (0,)),
    "pooling_type": _Meaning((), (0,)),
    "embedding_length_per_layer_input": _Meaning(("hidden_size_per_layer_input",), (0,)),
    "ssm.conv_kernel": _Meaning(("conv_kernel",)),
    "ssm.state_size": _Meaning(("state_size",)),
    "ssm.inner_size": _Meaning(("intermediate_size",)),
    "ssm.time_step_rank": _Meaning(("time_step_rank",)),
    "ssm.group_count": _Meaning(("n_groups",), (0,)),
    "ssm.dt_b_c_rms": _Meaning((), (False,)),
    "shortconv.l_cache": _Meaning(("conv_L_cache",)),
}
# Which order tensors have in the file, whether a model was trained after its positions were stretched, and for what
# length before (which a stretching that needs it reads).
_HARMLESS = ("tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length")
# Of the tokenizer, what transformers' mapping follows.
_TOKENIZER = frozenset(
    "model pre tokens token_type scores merges precompiled_charsmap bos_token_id eos_token_id unknown_token_id "
    "padding_token_id add_space_prefix add_bos_token add_eos_token".split()
)
# 0 says that a model has nothing of the kind (a state-space model has no heads).
_NONE_AT_0 = ("feed_forward_length", "attention.head_count", "attention.head_count_kv", "expert_feed_forward_length")
# llama.cpp's numbers for how experts are weighed, where that is no softmax over their scores (1).
_GATING = {"minimax_m2": 2, "gpt_oss": 3, "glm4_moe": 2, "dots1": 2, "exaone_moe": 2, "afmoe": 2}
# Gemma's largest models scale attention by the hidden size for each head; no key says so, and llama.cpp tells them by
# their number of blocks.
_GEMMA_SCALED_BY_HIDDEN = {"gemma2": 46, "gemma3_text": 62}


def settle(metadata: Mapping[str, Any], architecture: str, config: Any) -> list[str]:
    """Bring a configuration that transformers made from GGUF metadata in line with all of it.

    Args:
        metadata: values by key.

    Returns: sentences about metadata that is not carried over and does not change the function.

    Raises:
        AccullmError: a key that the class cannot follow, with its value (and no place).
    """
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise AccullmError(f"holds no model (general.type = {kind})", hint="give the file of the model itself")
    own = {key.removeprefix(f"{architecture}."): key for key in metadata if key.startswith(f"{architecture}.")}
    values = {name: _decimal(metadata[key]) for name, key in own.items()}
    settler = _Settler(config, values, architecture)
    for name, value in values.items():
        settler.settle(name, value)
    settler.settle_rope()
    settler.settle_unsaid()
    return _unused({key: value for key, value in metadata.items() if key not in own.values()})


def _unused(metadata: Mapping[str, Any]) -> list[str]:
    """A sentence about the keys of the file and of the tokenizer that nothing follows."""
    unused = []
    for key in metadata:
        room, _, rest = key.partition(".")
        if room in ("adapter", "clip", "diffusion", "imatrix", "xielu"):
            raise refusal(key, metadata[key])
        if room in ("GGUF", "split", "quantize", "accullm") or (room == "general" and not rest.startswith("sampling.")):
            continue
        if room != "tokenizer" or (rest != "chat_template" and rest.removeprefix("ggml.") not in _TOKENIZER):
            unused.append(key)
    records = [f"metadata of the GGUF file that is not carried over: {', '.join(sorted(unused))}"] if unused else []
    return records + split_records(metadata)


def refusal(key: str, value: Any) -> AccullmError:
    """That a key is none that transformers' class can follow."""
    shown = str(value)
    shown = shown if len(shown) < 60 else f"{shown[:57]}..."
    return AccullmError(
        f"metadata {key} = {shown} cannot be followed by transformers' class",
        hint="give the model's safetensors checkpoint",
    )


class _Settler:
    """Sets what the metadata say in a configuration, where its class has a setting for it."""

    def __init__(self, config: Any, values: Mapping[str, Any], architecture: str) -> None:
        self.config = config
        self.values = values
        self.architecture = architecture
        plain = type(config)()
        self._settings = {*plain.to_dict(), *plain.attribute_map, *getattr(plain, "__dataclass_fields__", {})}
        self._special: dict[str, Callable[[Any], bool]] = {
            "context_length": self._settle_positions,
            "attention.head_count_kv": self._settle_key_heads,
            "attention.key_length": self._settle_head,
            "attention.value_length": self._settle_head,
            "attention.scale": self._settle_attention_scale,
            "attention.sliding_window": self._settle_window,
            "attention.sliding_window_pattern": self._settle_window_pattern,
            "attention.temperature_scale": lambda value: value == 0 or config.model_type == "ministral3",
            "attention.max_alibi_bias": lambda value: value == (8 if config.model_type in ("bloom", "mpt") else 0),
            "expert_shared_feed_forward_length": self._settle_shared_width,
            "expert_shared_count": self._settle_shared,
            "expert_weights_norm": lambda value: self._set(("norm_topk_prob",), value) or value == _normalizes(config),
            "expert_gating_func": lambda value: value in (0, _GATING.get(config.model_type, 1)),
            "feed_forward_length": self._settle_width,
            # Of Granite it says whether positions are rotated at all.
            "rope.scaling.finetuned": lambda value: bool(value) or not config.model_type.startswith("granite"),
        }

    def settle(self, name: str, value: Any) -> None:
        """Follow one key of the architecture; those of the rotary positions are settled together."""
        if name in _NONE_AT_0 and value == 0:
            return
        if name in self._special:
            followed = self._special[name](value)
        elif name in _HARMLESS or name.startswith("rope."):
            return
        else:
            meaning = _MEANINGS.get(name)
            if value == 0 and meaning is not None and meaning.neutral == _OFF:
                value = 1
            followed = meaning is not None and (self._set(meaning.settings, value) or value in meaning.neutral)
        if not followed:
            raise refusal(f"{self.architecture}.{name}", value)

    def _set(self, settings: tuple[str, ...], value: Any) -> bool:
        """Give the first of the settings that the class has this value, unless it has it; False where it has none."""
        name = next((name for name in settings if name in self._settings), None)
        if name is None:
            return False
        if isinstance(value, list):  # one for each block
            if len(set(value)) != 1:
                return False
            value = value[0]
        current = getattr(self.config, name)
        if _equal(current, value):
            return True
        if isinstance(value, int | float) and not isinstance(value, bool) and isinstance(current, int | float):
            value = int(value) if isinstance(current, int) and value == int(value) else value
            value = float(value) if isinstance(current, float) else value
        try:
            setattr(self.config, name, value)
        except StrictDataclassError:
            return False
        return True

    def _settle_positions(self, value: Any) -> bool:
        # A class without the setting has no limit.
        names = ("max_position_embeddings", "max_seq_len")
        return self._set(names, value) or self._settings.isdisjoint(names)

    def _settle_width(self, value: Any) -> bool:
        widths = ("intermediate_size", "ffn_hidden_size", "n_inner")
        return self._set(widths, value) or value == 4 * self.config.hidden_size

    def _settle_shared(self, value: Any) -> bool:
        settings = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
        return self._set(settings, value) or value == (1 if self.config.model_type == "hunyuan_v1_moe" else 0)

    def _settle_shared_width(self, value: Any) -> bool:
        """Some classes have a width for it, others that of the experts, as often as it stands for one."""
        settings = ("shared_expert_intermediate_size", "shared_intermediate_size")
        width, count = (self.values.get(f"expert_{key}") or 1 for key in ("feed_forward_length", "shared_count"))
        return self._set(settings, value) or value in (0, width * count)

    def _settle_key_heads(self, value: Any) -> bool:
        if isinstance(value, list) and self.config.model_type == "lfm2":
            return max(value) == self.config.num_key_value_heads  # 0 for blocks without attention
        heads = ("num_key_value_heads", "num_kv_heads")
        return self._set(heads, value) or value == self.config.num_attention_heads

    def _settle_head(self, value: Any) -> bool:
        """Some classes take a size that they do not declare; one that ignores it has projections of other shapes."""
        sizes = {self.values.get(f"attention.{name}_length", value) for name in ("key", "value")}
        if len(sizes) > 1:
            return False
        if not self._set(("head_dim",), value) and self._head() != value:
            self.config.head_dim = value
        return True

    def _settle_attention_scale(self, value: Any) -> bool:
        if value == 0:
            return True
        if "query_pre_attn_scalar" in self._settings:
            return self._set(("query_pre_attn_scalar",), round(value**-2, 3))
        return self._set(("attention_multiplier",), value) or math.isclose(value, self._head() ** -0.5, rel_tol=1e-4)

    def _settle_window(self, value: Any) -> bool:
        """A window as long as the context is none."""
        kinds = getattr(self.config, "layer_types", None)
        windowed = kinds is None or "sliding_attention" in kinds
        if value and windowed and self._set(("sliding_window",), value):
            return True
        return value == 0 or value >= self.values.get("context_length", math.inf)

    def _settle_window_pattern(self, value: Any) -> bool:
        """Which blocks have a window: one flag for each, or every so manieth has none."""
        kinds = getattr(self.config, "layer_types", None)
        if kinds is None:
            return False
        if isinstance(value, list):
            windowed = [bool(flag) for flag in value]
        else:
            windowed = [bool(value) and (block + 1) % value != 0 for block in range(len(kinds))]
        if len(windowed) != len(kinds) or not {*kinds} <= {"sliding_attention", "full_attention"}:
            return False
        if [kind == "sliding_attention" for kind in kinds] != windowed:
            self.config.layer_types = ["sliding_attention" if flag else "full_attention" for flag in windowed]
        return True

    def settle_unsaid(self) -> None:
        """Undo defaults of transformers' classes where llama.cpp does otherwise, and no key says so."""
        if not self.values.get("attention.sliding_window"):
            if self.config.model_type == "mistral":
                self.config.sliding_window = None
            if self.config.model_type == "gemma3_text" and "attention.sliding_window_pattern" not in self.values:
                self.config.layer_types = ["full_attention"] * self.config.num_hidden_layers
        if not self.values.get("logit_scale") and self.config.model_type == "cohere":
            self.config.logit_scale = 1.0
        if not self.values.get("attention.scale") and self.config.model_type.startswith("granite"):
            self.config.attention_multiplier = self._head() ** -0.5
        blocks = _GEMMA_SCALED_BY_HIDDEN.get(self.config.model_type)
        if blocks is not None and not self.values.get("attention.scale"):
            large = self.config.num_hidden_layers == blocks
            scalar = self.config.hidden_size / self.config.num_attention_heads if large else self._head()
            self._set(("query_pre_attn_scalar",), scalar)

    def _head(self) -> int:
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads)

    # -- rotary positions ----------------------------------------------------------------------------------

    def settle_rope(self) -> None:
        """Set the base, the width and the scaling of the rotary positions."""
        values = {name.removeprefix("rope."): value for name, value in self.values.items() if name.startswith("rope.")}
        all_rope: dict[str, Any] = getattr(self.config, "rope_parameters", None) or {}
        if not all_rope:
            self._refuse_rope(values)
            return
        nested = "full_attention" in all_rope
        rope = dict(all_rope["full_attention"] if nested else all_rope)
        scaling = self._scaling(values, rope)
        if self.config.model_type == "ministral3" and not scaling[0].get("llama_4_scaling_beta"):
            raise refusal(f"{self.architecture}.attention.temperature_scale", scaling[0].get("llama_4_scaling_beta"))
        rope.pop("type", None)  # the older name of rope_type
        used = {"freq_base", "dimension_count", *scaling[1]}
        if base := values.get("freq_base"):
            rope["rope_theta"] = float(base)
        if (width := values.get("dimension_count")) is not None:
            share = rope.get("partial_rotary_factor", getattr(self.config, "partial_rotary_factor", None))
            if width != int(self._head() * (1.0 if share is None else share)):
                if share is None:
                    self._refuse_rope({"dimension_count": width})
                share = width / self._head()
                rope["partial_rotary_factor"] = (
                    share if int(self._head() * share) == width else math.nextafter(share, 1)
                )
        rope |= scaling[0]
        rest = {name: value for name, value in values.items() if name not in used}
        if nested:
            all_rope = dict(all_rope)
            if "freq_base_swa" in rest:
                window = {**all_rope["sliding_attention"], "rope_theta": float(rest.pop("freq_base_swa"))}
                all_rope["sliding_attention"] = window
            all_rope["full_attention"] = rope
        else:
            all_rope = rope
        self._refuse_rope(rest)
        if all_rope != self.config.rope_parameters:
            self.config.rope_parameters = all_rope

    def _scaling(self, values: Mapping[str, Any], rope: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
        """The scaling as transformers' parameters, and the keys that it is made of."""
        factor = values.get("scaling.factor") or values.get("scale_linear") or 0
        kind = values.get("scaling.type", "linear")  # so llama.cpp
        names = {"scaling.type", "scaling.factor", "scale_linear"}
        if kind == "none" or (kind in ("linear", "yarn") and factor in _OFF):
            return {}, names
        if kind == "linear":
            return {"rope_type": "linear", "factor": float(factor)}, names
        if kind != "yarn":
            return {}, set()
        original = values.get("scaling.original_context_length") or self.values.get("context_length")
        yarn: dict[str, Any] = {"rope_type": "yarn", "factor": float(factor)}
        yarn["original_max_position_embeddings"] = original
        for name in ("beta_fast", "beta_slow"):
            if value := values.get(f"scaling.yarn_{name}"):
                yarn[name] = float(value)
        if self.config.model_type == "ministral3":
            scale = self.values.get("rope.scaling.yarn_log_multiplier")
            names.add("scaling.yarn_log_multiplier")
            yarn |= {"mscale": 1.0, "mscale_all_dim": scale, "max_position_embeddings": self.values["context_length"]}
            yarn["llama_4_scaling_beta"] = self.values.get("attention.temperature_scale", 0.0)
        names |= {"scaling.original_context_length", "scaling.yarn_beta_fast", "scaling.yarn_beta_slow"}
        attention = 1.0
        for name in ("scaling.attn_factor", "scaling.yarn_attn_factor"):
            attention *= values.get(name) or 1.0
            names.add(name)
        if not math.isclose(attention, 1.0, rel_tol=1e-6):
            yarn["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
        if values.get("scaling.yarn_ext_factor", 1) in (1, -1):
            names.add("scaling.yarn_ext_factor")
        if not values.get("scaling.yarn_log_multiplier"):
            names.add("scaling.yarn_log_multiplier")
        return yarn, names

    def _refuse_rope(self, values: Mapping[str, Any]) -> None:
        """Refuse keys that nothing has followed, but for those that say that there is nothing to follow."""
        for name, value in values.items():
            is_factor = name in ("scaling.factor", "scale_linear", "scaling.attn_factor", "scaling.yarn_attn_factor")
            if f"rope.{name}" not in _HARMLESS and value not in (_OFF if is_factor else (0, "none")):
                raise refusal(f"{self.architecture}.rope.{name}", value)


def _normalizes(config: Any) -> bool:
    """Whether a class without a setting for it makes the weights of a token's experts add up to one."""
    return config.model_type == "afmoe"


def _decimal(value: Any) -> Any:
    """A number as whoever wrote it in float32 is likely to have had it: the shortest that is the same there."""
    if not isinstance(value, float) or float(np.float32(value)) != value:
        return value
    return float(str(np.float32(value)))


def _equal(current: Any, value: Any) -> bool:
    """Whether a setting has a value already; GGUF keeps numbers in float32."""
    if isinstance(current, int | float) and isinstance(value, int | float) and not isinstance(current, bool):
        return math.isclose(current, value, rel_tol=1e-6)
    return bool(current == value)
