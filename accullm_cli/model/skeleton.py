"""A model without its weights."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from transformers import AutoConfig, PreTrainedModel

from accullm_cli.errors import AccullmError, is_out_of_memory
from accullm_cli.model.supported import model_class


def build_skeleton(directory: Path, untied: bool = False) -> PreTrainedModel:
    """The model that `directory`/config.json describes, in float32: parameters on the meta device, buffers real.

    Experts run one after another ("eager"), so that each product with an expert's weight can be seen.

    Args:
        untied: tie no weights, whatever config.json says.
    """
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if untied:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = model_class(config)._from_config(
                config, dtype=torch.float32, experts_implementation="eager"
            )
    except AssertionError as error:  # torch's: an embedding's padding lies beyond it
        raise AccullmError(
            f"transformers cannot build the model ({error}; pad_token_id is {config.get_text_config().pad_token_id})",
            directory / "config.json",
            "correct the value",
        ) from None
    except Exception as error:  # of transformers' code alone, which computes with whatever numbers the file gives it
        if isinstance(error, AccullmError) or is_out_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        what = f"transformers cannot build the model ({reason})"
        raise AccullmError(what, directory / "config.json", "correct the value") from None
    return model.eval().requires_grad_(False)


def stored_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """The shapes of what a checkpoint of the model holds: parameters and buffers by name, tied ones once."""
    tied = model.all_tied_weights_keys
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}
