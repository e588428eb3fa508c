"""A model as plain transformers reads and runs it: what everything else is held against."""

from __future__ import annotations

import gc
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from accullm_cli.model.supported import model_class

# What `from_pretrained` may put into its report of loading, and how a person says it.
_KINDS = {
    "missing_keys": "it finds nothing for",
    "unexpected_keys": "it has no place for",
    "mismatched_keys": "it expects another shape of",
}


@dataclass(frozen=True)
class PlainModel:
    """A model in evaluation mode, and in words what transformers could not place when it loaded it ("" for nothing)."""

    model: PreTrainedModel
    misfits: str


@contextmanager
def plain_model(
    directory: Path,
    scratch: Path | None = None,
    gguf: Path | None = None,
    dtype: torch.dtype = torch.float32,
    own_experts: bool = False,
) -> Iterator[PlainModel]:
    """The model of a directory, by the class that transformers has for it, on the CPU; nothing of it is left behind.

    Args:
        scratch: where given, weights stay on disk and are read module by module; what transformers has to convert
            (experts that are stored one by one) is written into a folder there for as long as the model lives.
        gguf: take the weights from this file, as transformers dequantizes them, and of `directory` config.json alone.
        dtype: that weights are rounded to; what is computed is float32.
        own_experts: how experts are run is left to the program that reads the model's format. Otherwise one after
            another, as blocks run them here: sums in one order, in float32.
    """
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # says for every model that its weights are on disk
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    options: dict[str, Any] = {"config": config, "dtype": dtype, "local_files_only": True, "output_loading_info": True}
    with tempfile.TemporaryDirectory(prefix=".plain-", dir=scratch) as folder:
        if gguf is not None:
            options["gguf_file"] = gguf.name
        else:
            options["use_safetensors"] = True
        if not own_experts:
            options["experts_implementation"] = "eager"
        if scratch is not None:
            options |= {"device_map": {"": "disk"}, "offload_folder": folder}
        place = directory if gguf is None else gguf.parent
        # The readers of GGUF files and of other formats draw bars of their own, whatever the settings.
        with redirect_stderr(StringIO()):
            model, report = model_class(config).from_pretrained(place, **options)
        if dtype != torch.float32 or not own_experts:
            # `model.float()` is refused for what comes from a GGUF file; some readers leave experts in another dtype.
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.float()
        try:
            yield PlainModel(model.eval().requires_grad_(False), _misfits(report))
        finally:
            # A model's modules refer to each other in circles.
            del model
            gc.collect()


def _misfits(report: dict[str, Any]) -> str:
    sentences = []
    for kind, words in _KINDS.items():
        # A mismatched tensor comes with its shapes.
        names = sorted(entry if isinstance(entry, str) else entry[0] for entry in report.get(kind, ()))
        if names:
            more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            sentences.append(f"{words} {names[0]}{more}")
    return ", ".join(sentences)
