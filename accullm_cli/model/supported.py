"""Which models can be converted, told from config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from accullm_cli.errors import AccullmError, is_out_of_memory
from accullm_cli.json_text import parse_json


def read_config(path: Path) -> dict[str, Any]:
    """A config.json as written.

    Raises:
        AccullmError: not JSON, or not an object.
    """
    try:
        config = parse_json(path.read_bytes())
    except OSError as error:
        raise AccullmError(f"cannot be read ({error.strerror})", path) from None
    except ValueError as error:
        raise AccullmError(f"not JSON ({error})", path, "download or copy the file again") from None
    if not isinstance(config, dict):
        raise AccullmError("not a JSON object", path, "download or copy the file again")
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise AccullmError("architectures is not a list of names", path, "correct the value")
    if not isinstance(config.get("model_type", ""), str):
        raise AccullmError("model_type is not a name", path, "correct the value")
    return config


def check_supported(config: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """Refuse what is not an unquantized decoder-only causal language model that transformers itself can build.

    Returns: sentences about what of the configuration is not followed.

    Raises:
        AccullmError: already quantized, an unknown model type, an encoder or embedding model, or a configuration that
            transformers cannot read.
    """
    _check_not_quantized(config, path)
    _check_model_type(config, path)
    _check_causal(config, path)
    _check_readable(path)
    if config.get("auto_map"):
        return ("config.json names Python code of its own (auto_map); it is not run, transformers' own model is used",)
    return ()


def _check_not_quantized(config: Mapping[str, Any], path: Path) -> None:
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else "unknown"
        raise AccullmError(
            f"the weights are already quantized (quant_method {method})", path, "give the original checkpoint"
        )


def _check_model_type(config: Mapping[str, Any], path: Path) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = config.get("model_type")
    if model_type in CONFIG_MAPPING_NAMES:
        return
    if model_type is None:
        raise AccullmError("has no model_type", path, "give a Hugging Face model directory")
    if config.get("auto_map"):
        raise AccullmError(
            f"model type {model_type} needs Python code from the checkpoint (auto_map), which is never run",
            path,
            "use a checkpoint whose architecture is part of transformers",
        )
    raise AccullmError(
        f"model type {model_type} is unknown to the installed transformers", path, "a newer transformers may know it"
    )


def _check_causal(config: Mapping[str, Any], path: Path) -> None:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    model_type = config["model_type"]
    architectures = config.get("architectures") or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, model_type)]
    if config.get("is_encoder_decoder"):
        kind = "an encoder-decoder"
    elif not _is_language_model(str(architectures[0])):
        kind = "not a causal language model"
    elif model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not (config.get("is_decoder") or config.get("causal")):
        kind = "an encoder"  # transformers lends BERT and its kin a causal head, which counts with is_decoder only
    else:
        return
    raise AccullmError(
        f"architecture {', '.join(map(str, architectures))} is {kind}",
        path,
        "decoder-only causal language models (LlamaForCausalLM and the like) can be converted",
    )


def _is_language_model(architecture: str) -> bool:
    """Whether it is a class of transformers that generates text, alone or from text and images or sound."""
    from transformers.models.auto import modeling_auto

    names = {*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
    names |= {*modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values()}
    return architecture in names or (architecture.endswith("ForCausalLM") and hasattr(transformers, architecture))


def model_class(config: Any) -> type[Any]:
    """The class of transformers that a configuration names, or that `AutoModelForCausalLM` makes of it."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if named is not None and isinstance(config, named.config_class):
        return named
    found: type[Any] = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    return found


def _check_readable(path: Path) -> None:
    """transformers validates the types and relations of a configuration's fields when it builds it."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(path.parent, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # of transformers' code alone, which computes with whatever numbers the file gives it
        if is_out_of_memory(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # A validation error tells on its second line what is wrong with the field that the first line names.
        kept = lines[:2] if isinstance(error, StrictDataclassError) else lines[:1] or [repr(error)]
        reason = ": ".join(line.rstrip(":.") for line in kept)
        raise AccullmError(f"transformers cannot read it ({reason})", path, "correct the value") from None
