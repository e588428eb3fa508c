"""A whole model on one device, as somebody who uses it has it: the artifact through the kernels, and its original."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from accullm_cli.kernels.matmul import ENGINE, engine
from accullm_cli.stages.job import Job, open_decoder


def load_artifact(directory: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A native artifact in transformers, its linears multiplied by what serves on `device`."""
    import accullm_cli.hf  # noqa: F401  teaches transformers the format

    transformers.logging.disable_progress_bar()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


def load_original(job: Job, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The source, every weight of it in `dtype`; experts run one after another, as the artifact's do."""
    decoder = open_decoder(job)
    for index in range(len(decoder.block_names)):
        for parameter in decoder.load_block(index).parameters():
            parameter.data = parameter.data.to(dtype)
    decoder.load_outside()
    for parameter in decoder.model.parameters():
        parameter.data = parameter.data.to(dtype)
    return decoder.model.to(device)


def engines(model: PreTrainedModel, tokens: int) -> str:
    """What multiplies so many tokens by the quantized linears and output head of `model`, and by how many of them."""
    from accullm_cli.hybrid import HybridExperts, HybridLinear, HybridWeight, TiedHead

    counts: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, HybridExperts):
            # Experts are dequantized, whatever their number of tokens.
            names = [ENGINE for expert in module.children() if isinstance(expert, HybridWeight)]
        elif isinstance(module, HybridLinear | TiedHead):
            weight = module if isinstance(module, HybridLinear) else module._shared[0]
            device = next(weight.buffers()).device
            x = torch.empty(1, dtype=model.dtype, device=device).expand(tokens, weight.in_features)
            names = [engine(weight.operand(x), tokens)]
        else:
            continue
        for name in names:
            counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{name} ({count} linears)" for name, count in counts.items())
