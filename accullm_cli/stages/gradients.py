"""The backward pass of calibrate: the loss's gradient with respect to each block's output, one block at a time.

The loss of a window is the negative log-likelihood, summed over its positions, of tokens that are drawn from the
model's own predictions, so that the gradients' second moment is the Fisher matrix itself, and not the "empirical" one
of the text's tokens (Martens, arXiv 1412.1193, section 5). Quantize makes of them the Fisher matrix of each linear's
outputs, by which rounding carries errors from row to row.

It leaves calibrate/gradient-00000.safetensors, bfloat16 [windows, tokens, hidden], for every block. While it is under
way, calibrate/input-00000.safetensors holds what went into each block.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from accullm_cli.model.blocks import Decoder, batches
from accullm_cli.progress import Event
from accullm_cli.run import UP_TO_DATE, Reason, key_of, write_file
from accullm_cli.stages.job import Job


def gradient_path(job: Job, index: int) -> Path:
    """Where the gradient with respect to the output of block `index` lies."""
    return job.run.file(f"calibrate/gradient-{index:05d}.safetensors")


def load_gradient(job: Job, index: int) -> torch.Tensor | None:
    """The gradient with respect to a block's output, bfloat16 [windows, tokens, hidden]; None if none was asked for."""
    if not job.config.calibration.gradient_samples:
        return None
    return load_file(gradient_path(job, index))["gradient"]


def keep_input(job: Job, index: int, hidden: torch.Tensor) -> None:
    """Keep what goes into a block, [windows, tokens, hidden], until the gradient has passed it."""
    tensors = {"hidden": hidden.to(torch.bfloat16)}
    write_file(_input_path(job, index), lambda path: save_file(tensors, path))


def run_backward(job: Job, decoder: Decoder, stage: str, key: str, last: torch.Tensor) -> tuple[Path, ...]:
    """Write the gradients of all blocks; those that are there for this key already are kept.

    Args:
        key: of what the gradients depend on.
        last: the last block's output, float32 [windows, tokens, hidden]; `keep_input` has seen the blocks' inputs.
    """
    total = len(decoder.block_names)
    keys = [key_of({"stage": key, "gradient": str(index)}) for index in range(total)]
    for index in reversed(range(total)):
        path = gradient_path(job, index)
        reason = UP_TO_DATE
        if _key(path) != keys[index]:
            reason = Reason("new")
            if index == total - 1:
                gradient = _of_the_loss(decoder, last, job.config.machine.seed)
            else:
                gradient = _through_block(job, decoder, index + 1)
            _store(path, keys[index], gradient)
        job.progress(Event(stage, "step", f"gradient {total - index}/{total}", reason, total - index, total))
    for index in range(total):
        _input_path(job, index).unlink(missing_ok=True)
    return tuple(gradient_path(job, index) for index in range(total))


def _of_the_loss(decoder: Decoder, hidden: torch.Tensor, seed: int) -> torch.Tensor:
    """The gradient with respect to the last block's output."""
    generator = torch.Generator().manual_seed(seed)
    decoder.load_outside()
    gradients = []
    for window in hidden:
        inputs = window[None].clone().requires_grad_()
        logits = decoder.logits(inputs)[0].float()
        drawn = torch.multinomial(torch.softmax(logits.detach(), -1), 1, generator=generator).squeeze(1)
        loss = nn.functional.cross_entropy(logits, drawn, reduction="sum")
        gradients.append(torch.autograd.grad(loss, inputs)[0])
    decoder.release_outside()
    return torch.cat(gradients)


def _through_block(job: Job, decoder: Decoder, index: int) -> torch.Tensor:
    """The gradient with respect to a block's input, from the one with respect to its output."""
    hidden = load_file(_input_path(job, index))["hidden"]
    gradient = load_file(gradient_path(job, index))["gradient"]
    block = decoder.load_block(index)
    found = []
    for rows in batches(*hidden.shape[:2]):
        inputs = hidden[rows].float().requires_grad_()
        output = decoder.run(index, block, inputs)
        found.append(torch.autograd.grad(output, inputs, gradient[rows].float())[0])
    decoder.release_block(index)
    return torch.cat(found)


def _store(path: Path, key: str, gradient: torch.Tensor) -> None:
    tensors = {"gradient": gradient.to(torch.bfloat16)}
    write_file(path, lambda temporary: save_file(tensors, temporary, metadata={"key": key}))


def _input_path(job: Job, index: int) -> Path:
    return job.run.file(f"calibrate/input-{index:05d}.safetensors")


def _key(path: Path) -> str | None:
    """The key that a gradient was written for; None where there is none."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("key")
    except (OSError, SafetensorError):
        return None
