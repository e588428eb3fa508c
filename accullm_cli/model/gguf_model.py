"""A GGUF file as a model of transformers: its configuration, and which tensors each parameter is made of.

Of the architectures in `gguf_programs` both are read from what is written there, backwards; of others by
transformers' own mapping.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from accullm_cli.errors import AccullmError, is_refusal_of_library
from accullm_cli.model.gguf_architectures import ROPE_FACTORS, placed, rope_factors
from accullm_cli.model.gguf_by_transformers import ByTransformers
from accullm_cli.model.gguf_configuration import configuration, is_written
from accullm_cli.model.gguf_file import GgufFile
from accullm_cli.model.gguf_metadata import settle
from accullm_cli.model.gguf_pieces import whole_of
from accullm_cli.model.gguf_programs import ARCHITECTURES
from accullm_cli.model.skeleton import stored_shapes

# Settings that no key speaks of, and whose tensors, where there are any, say that they are on.
_TOLD_BY_TENSORS = {
    "attention_bias": ("attn_q.bias", "attn_qkv.bias"),
    "attention_out_bias": ("attn_output.bias",),
    "mlp_bias": ("ffn_up.bias",),
    "qkv_bias": ("attn_q.bias",),
    "use_bias": ("ffn_up.bias",),
    "use_qkv_bias": ("attn_q.bias",),
    "use_qk_norm": ("attn_q_norm.weight",),
}
# The parameters of Llama 3.1, 3.2 and 3.3, which differ in `factor` alone. GGUF stores what they amount to, a factor
# per frequency; whether they are the right ones is checked against it.
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_HINT = "give the model's safetensors checkpoint"


@dataclass(frozen=True)
class GgufModel:
    """A file as a model.

    model: on the meta device, for its names, shapes and configuration.
    parameters: the names of the tensors that each parameter is made of; a tied head is none of its own.
    values: a parameter by its name, float32 in its shape.
    records: sentences about metadata that nothing follows.
    """

    model: PreTrainedModel
    parameters: Mapping[str, tuple[str, ...]]
    values: Callable[[str], torch.Tensor]
    records: tuple[str, ...]


def read_model(file: GgufFile) -> GgufModel:
    """What a file is as a model; no weight is read, but for factors of rotary frequencies.

    Raises:
        AccullmError: of an architecture that is not read, with metadata that cannot be followed, or without a tensor
            that the model needs.
    """
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise AccullmError("names no architecture (general.architecture)", file.path, "download or copy it again")
    others = None if is_written(architecture) else ByTransformers(file, architecture)
    model, records = _skeleton(file, architecture, others)
    if others is not None:
        shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
        parameters, values = others.tensors(model)
    else:
        shapes = stored_shapes(model)
        parameters, values = _by_pieces(file, model.config, shapes)
    for name in shapes:
        if name not in parameters:
            raise AccullmError(f"holds no tensor for {name}", file.path, _HINT)
    return GgufModel(model, parameters, values, tuple(records))


def _skeleton(file: GgufFile, architecture: str, others: ByTransformers | None) -> tuple[PreTrainedModel, list[str]]:
    """The model without weights, and sentences about metadata that nothing follows."""
    try:
        if others is not None:
            config, metadata = others.config(), file.metadata
        else:
            config, metadata = configuration(file, architecture)
        records = settle(metadata, architecture, config)
        _restore_rope_scaling(file, config)
        _settle_by_tensors(file, config)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config), records
    except AccullmError as error:
        raise AccullmError(error.what, file.path, error.hint or _HINT) from None
    except BaseException as error:
        if not is_refusal_of_library(error):
            raise
        reason = " ".join(str(error).split())
        raise AccullmError(
            f"architecture {architecture} is not a causal language model of transformers ({reason})", file.path, _HINT
        ) from None


def _settle_by_tensors(file: GgufFile, config: Any) -> None:
    """What the file has is used, whatever the class does by itself."""
    own = {name.split(".", 2)[2] for name in file.tensors if re.match(r"blk\.\d+\.", name)}
    for setting, tensors in _TOLD_BY_TENSORS.items():
        if hasattr(config, setting):
            setattr(config, setting, not own.isdisjoint(tensors))
    if config.model_type == "stablelm":  # the key says so of models that are not, and llama.cpp does not read it
        config.use_parallel_residual = "ffn_norm.weight" not in own
    if config.model_type == "falcon":
        norms = 2 if "attn_norm_2.weight" in own else 1
        config.new_decoder_architecture = norms > 1 or config.num_kv_heads > 1
        config.num_ln_in_parallel_attn = norms if config.new_decoder_architecture else None
    if "output.weight" in file.tensors:
        config.tie_word_embeddings = False
    if "token_embd.weight" in file.tensors:
        # A tokenizer may have more tokens than the embedding has rows.
        config.vocab_size = file.tensors["token_embd.weight"].shape[0]


def _restore_rope_scaling(file: GgufFile, config: Any) -> None:
    """Put Llama 3's rope scaling back into the configuration: GGUF stores its result.

    Raises:
        AccullmError: the file holds frequency factors of another kind.
    """
    stored = [name for name in file.tensors if name.startswith("rope_")]
    if not stored:
        return
    plain = (config.rope_parameters or {}).get("rope_type") == "default"
    if plain and stored == [ROPE_FACTORS]:
        factors = file.dequantized(ROPE_FACTORS)
        theta = config.rope_parameters["rope_theta"]
        config.rope_parameters = {**_LLAMA3_ROPE, "rope_theta": theta, "factor": round(float(factors.max()), 4)}
        found = rope_factors(config)
        if found is not None and found.shape == factors.shape and torch.allclose(found, factors, rtol=1e-3):
            return
    raise AccullmError(
        f"tensor {stored[0]} scales the rotary frequencies in a way that cannot be imported", file.path, _HINT
    )


def _by_pieces(
    file: GgufFile, config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[str, ...]], Callable[[str], torch.Tensor]]:
    """The tensors of each parameter of an architecture that is written, and how its values are put together."""
    pieces = placed(ARCHITECTURES[config.model_type], config, shapes)
    found: dict[str, tuple[str, ...]] = {}
    for name, own in pieces.items():
        if any(piece.name not in file.tensors for piece in own):
            continue
        for piece in own:
            stored = file.tensors[piece.name].shape
            if not piece.is_shape(stored, shapes[name]):
                part = "" if piece.rows is None else f" {list(piece.shape(shapes[name]))} of"
                what = f"tensor {piece.name} has shape {list(stored)}, but the model's {name} has{part}"
                raise AccullmError(f"{what} {list(shapes[name])}", file.path)
        found[name] = tuple(piece.name for piece in own)

    def values(name: str) -> torch.Tensor:
        shape, own = shapes[name], pieces[name]
        parts = [file.dequantized(piece.name).view(piece.shape(shape)) for piece in own]
        return whole_of(parts, own, max(0, len(shape) - 2))

    return found, values
