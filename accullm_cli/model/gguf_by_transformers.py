"""GGUF files of architectures that are not written here, as transformers' own mapping reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from accullm_cli.errors import AccullmError, is_refusal_of_library
from accullm_cli.model.gguf_file import GgufFile


class ByTransformers:
    """The mapping of one file.

    Raises:
        AccullmError: transformers has none for the architecture.
    """

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file = file
        try:
            settings = load_gguf_checkpoint(str(file.path), return_tensors=False)["config"]
        except BaseException as error:
            if not is_refusal_of_library(error):
                raise
            raise AccullmError(
                f"architecture {architecture} cannot be read from GGUF by the installed transformers",
                file.path,
                "give the model's safetensors checkpoint",
            ) from None
        self.processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=dict(settings))

    def config(self) -> Any:
        """The configuration, as far as the mapping follows the metadata."""
        return AutoConfig.from_pretrained(self.file.path.parent, gguf_file=self.file.path.name)

    def tensors(self, model: PreTrainedModel) -> tuple[dict[str, tuple[str, ...]], Callable[[str], torch.Tensor]]:
        """The names of the tensors of each parameter that the file has, and how its values are put together."""
        try:
            names: dict[str, str] = get_gguf_hf_weights_map(model, self.processor)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise AccullmError(f"its tensors cannot be named ({reason})", self.file.path) from None
        found: dict[str, tuple[str, ...]] = {}
        for stored in self.file.tensors:
            if stored in names:
                found[names[stored]] = (*found.get(names[stored], ()), stored)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}

        def values(name: str) -> torch.Tensor:
            # The processor merges experts that come in several tensors into one parameter, through this dict.
            merged: dict[str, torch.Tensor] = {}
            for stored in found[name]:
                result = self.processor.process(
                    weights=self.file.dequantized(stored).numpy(),
                    name=stored,
                    tensor_key_mapping=names,
                    parsed_parameters={"tensors": merged},
                )
                if result.name is not None:
                    merged[name] = torch.tensor(result.weights, dtype=torch.float32)
            if tuple(merged[name].shape) != shapes[name]:
                raise AccullmError(
                    f"tensor {found[name][0]} has shape {list(merged[name].shape)}, but the model's {name} has "
                    f"{list(shapes[name])}",
                    self.file.path,
                )
            return merged[name]

        return found, values
