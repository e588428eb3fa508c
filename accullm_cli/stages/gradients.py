"""The backward pass of calibrate: the loss's gradient with respect to each block's output, one block at a time.

The loss of a window is the negative log-likelihood, summed over its positions, of tokens that are drawn from the
model's own predictions, so that the gradients' second moment is the Fisher matrix itself, and not the "empirical" one
of the text's tokens (Martens, arXiv 1412.1193, section 5). Quantize makes of them the Fisher matrix of each linear's
outputs, by which rounding carries errors from row to row.

It leaves for every block
    calibrate/gradient-00000.safetensors        the gradient, bfloat16 [windows, tokens, hidden]
    calibrate/sensitivity-00000.safetensors     for each linear, see `load_sensitivities` and `load_token_weights`,
        sensitivity NAME        float32 [K]
        edges NAME              float32 [B - 1]
        weights NAME            float32 [B]; both of dense linears only
    calibrate/head-gradient.safetensors         of the output head: "rows" [N] and "columns" [K]
    calibrate/embedding-gradient.safetensors    of what is looked up: "columns" [K], and its mean square "energy" []
While it is under way, calibrate/input-00000.safetensors holds what went into each block.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from accullm_cli.model.blocks import Decoder
from accullm_cli.model.slots import LinearSlot
from accullm_cli.progress import Event
from accullm_cli.quant.philox import uniform
from accullm_cli.quant.token_weights import TokenWeights
from accullm_cli.run import UP_TO_DATE, Reason, key_of, write_file
from accullm_cli.stages.job import Job
from accullm_cli.stages.keyed import is_made_for, write_keyed
from accullm_cli.stages.streams import POSITIONS


def gradient_path(job: Job, index: int) -> Path:
    """Where the gradient with respect to the output of block `index` lies."""
    return job.run.file(f"calibrate/gradient-{index:05d}.safetensors")


def sensitivity_path(job: Job, index: int) -> Path:
    """Where the sensitivities of the linears of block `index` lie."""
    return job.run.file(f"calibrate/sensitivity-{index:05d}.safetensors")


def load_gradient(job: Job, index: int) -> torch.Tensor | None:
    """The gradient with respect to a block's output, bfloat16 [windows, tokens, hidden]; None if none was asked for."""
    if not job.config.gradient_samples:
        return None
    return load_file(gradient_path(job, index))["gradient"]


def load_head_gradient(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    """How much the loss depends on the rows [N] and columns [K] of the output head, as sums over the other.

    Of a weight it is the squared gradient with respect to its output times its squared input, the mean over tokens.
    """
    tensors = load_file(_head_path(job))
    return tensors["rows"], tensors["columns"]


def load_embedding_gradient(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean squared gradient [K] with respect to what goes into the first block, and the mean square of that []."""
    tensors = load_file(_embedding_path(job))
    return tensors["columns"], tensors["energy"]


def keep_input(job: Job, decoder: Decoder, index: int, hidden: torch.Tensor) -> None:
    """Keep what goes into a block, [windows, tokens, hidden], until the gradient has passed it.

    Hidden states alone in bfloat16. What lies behind them may be token ids, which that holds up to 256 only.
    """
    tensors = {"hidden": hidden.to(torch.bfloat16) if decoder.states(hidden).shape == hidden.shape else hidden}
    write_file(_input_path(job, index), lambda path: save_file(tensors, path))


def load_sensitivities(job: Job, blocks: int) -> dict[str, torch.Tensor]:
    """How much the loss depends on each column of each linear's weight, float32 [K]; empty without gradients.

    That is E[g^2 x_k^2], with g^2 the mean square of the gradient with respect to one output at a token and x_k the
    input feature there: the diagonal of the Gauss-Newton matrix, its mean over outputs. The two must not be averaged
    apart: where a few tokens have inputs a thousand times as large (massive activations, arXiv 2402.17762), what they
    become depends least on them. The sum goes over the tokens that reach the linear and is divided by all tokens, so
    that an expert counts as often as it is used.
    """
    if not job.config.gradient_samples:
        return {}
    found: dict[str, torch.Tensor] = {}
    for index in range(blocks):
        found |= _of_kind("sensitivity", load_file(sensitivity_path(job, index)))
    return found


def load_token_weights(job: Job, index: int) -> dict[str, TokenWeights]:
    """How much a token counts for each dense linear of a block that the loss depends on; empty without gradients."""
    if not job.config.gradient_samples:
        return {}
    tensors = load_file(sensitivity_path(job, index))
    edges = _of_kind("edges", tensors)
    return {name: TokenWeights(edges[name], weights) for name, weights in _of_kind("weights", tensors).items()}


def _of_kind(kind: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    start = f"{kind} "
    return {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}


def run_backward(job: Job, decoder: Decoder, stage: str, key: str, last: torch.Tensor) -> tuple[Path, ...]:
    """Take the loss back through all blocks; those that were passed for this key already are left out.

    Args:
        key: of what the gradients depend on.
        last: the last block's output, float32 [windows, tokens, hidden]; `keep_input` has seen the blocks' inputs.
    """
    total = len(decoder.block_names)
    keys = [key_of({"stage": key, "gradient": str(index)}) for index in range(total)]
    if not (is_made_for(gradient_path(job, total - 1), keys[-1]) and is_made_for(_head_path(job), keys[-1])):
        gradient, of_head = _of_the_loss(decoder, last, job, stage)
        write_keyed(_head_path(job), keys[-1], of_head)
        write_keyed(gradient_path(job, total - 1), keys[-1], {"gradient": gradient.to(torch.bfloat16)})
    for index in reversed(range(total)):
        reason = UP_TO_DATE
        passed = is_made_for(sensitivity_path(job, index), keys[index])
        passed = passed and (bool(index) or is_made_for(_embedding_path(job), keys[0]))
        if not passed or (index and not is_made_for(gradient_path(job, index - 1), keys[index - 1])):
            reason = Reason("new")
            gradient, sensitivities = _through_block(job, decoder, index)
            if not index:
                write_keyed(_embedding_path(job), keys[0], _of_the_input(job, gradient))
            else:
                before = {"gradient": gradient.to(torch.bfloat16)}
                write_keyed(gradient_path(job, index - 1), keys[index - 1], before)
            write_keyed(sensitivity_path(job, index), keys[index], sensitivities)
        job.progress(Event(stage, "step", f"gradient {total - index}/{total}", reason, total - index, total))
    for index in range(total):
        _input_path(job, index).unlink(missing_ok=True)
    of_blocks = [path(job, index) for index in range(total) for path in (gradient_path, sensitivity_path)]
    return (*of_blocks, _head_path(job), _embedding_path(job))


def _of_the_loss(
    decoder: Decoder, hidden: torch.Tensor, job: Job, stage: str
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The gradient with respect to the last block's output, and what it says of the output head."""
    decoder.load_outside()
    head = decoder.model.get_output_embeddings()
    passed: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = head.register_forward_hook(lambda module, args, output: passed.append((args[0], output)))
    rows, columns = (head.weight.new_zeros(count) for count in head.weight.shape)
    gradients = []
    try:
        for number, window in enumerate(hidden):
            for first in range(0, len(window), POSITIONS):
                inputs = window[None, first : first + POSITIONS].to(decoder.device, copy=True).requires_grad_()
                passed.clear()
                logits = decoder.logits(inputs)
                ((read, given),) = passed
                # Of the negative log-likelihood with respect to the logits: the probabilities, less 1 at the token.
                of_logits = torch.softmax(logits[0].detach().float(), -1)
                drawn = draw_tokens(of_logits, job.config.machine.seed, number, first)
                of_logits[torch.arange(len(drawn), device=drawn.device), drawn] -= 1
                gradient, of_head = torch.autograd.grad(logits, (inputs, given), of_logits[None].to(logits.dtype))
                gradients.append(gradient[0].cpu())
                squares, energy = of_head[0].float().square(), read[0].detach().float().square()
                rows += energy.sum(1) @ squares
                columns += squares.sum(1) @ energy
            label = f"head gradient {number + 1}/{len(hidden)}"
            job.progress(Event(stage, "step", label, None, number + 1, len(hidden)))
    finally:
        handle.remove()
    decoder.release_outside()
    tokens = hidden.shape[0] * hidden.shape[1]
    return torch.cat(gradients).view_as(hidden), {"rows": rows / tokens, "columns": columns / tokens}


def _of_the_input(job: Job, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the gradient with respect to the first block's input says of what is looked up."""
    hidden = load_file(_input_path(job, 0))["hidden"]
    energy = hidden[..., : gradient.shape[-1]].float().square().mean()
    return {"columns": gradient.float().square().flatten(0, -2).mean(0), "energy": energy}


def draw_tokens(probabilities: torch.Tensor, seed: int, window: int, first: int = 0) -> torch.Tensor:
    """A token for each position by its probabilities, from random numbers that no device makes differently.

    Args:
        probabilities: float32 [T, V], of a window's positions from `first` on.
        window: its number.

    Returns:
        int64 [T].
    """
    positions = first + torch.arange(len(probabilities), device=probabilities.device)
    numbers = uniform(seed, window, positions, 1).double()
    reached = probabilities.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(reached, numbers * reached[:, -1:], right=True).squeeze(1)


def _through_block(job: Job, decoder: Decoder, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """From the gradient with respect to a block's output the one with respect to its input, and sensitivities."""
    hidden = load_file(_input_path(job, index))["hidden"]
    gradient = load_file(gradient_path(job, index))["gradient"]
    block = decoder.load_block(index, step=-1)
    of_linears = {slot.name: _OfLinear(slot, decoder.device) for slot in decoder.slots[index]}

    def add(name: str, of_output: torch.Tensor, value: torch.Tensor) -> None:
        of_linears[name].add(value, of_output)

    found = []
    for rows in decoder.batches(hidden):
        inputs = hidden[rows].to(decoder.device).float().requires_grad_()
        output = decoder.run_capturing(index, block, inputs, lambda name, value: None, on_gradient=add)
        assert output is not None
        of_output = gradient[rows].to(decoder.device).float()
        found.append(torch.autograd.grad(output, inputs, of_output)[0].cpu())
    decoder.release_block(index)
    tensors = {}
    for slot in decoder.slots[index]:
        own = of_linears[slot.name]
        tensors[f"sensitivity {slot.name}"] = (own.sensitivity / (hidden.shape[0] * hidden.shape[1])).float()
        if (weights := own.token_weights()) is not None:
            tensors |= {f"edges {slot.name}": weights.edges, f"weights {slot.name}": weights.weights}
    return torch.cat(found), tensors


class _OfLinear:
    """What gradients say of one linear, summed up over batches."""

    def __init__(self, slot: LinearSlot, device: torch.device) -> None:
        self.sensitivity = torch.zeros(slot.in_features, dtype=torch.float64, device=device)
        # Of an expert's few tokens no function of their size can be told.
        self._weighs_tokens = slot.expert is None
        self._norms: list[torch.Tensor] = []
        self._squares: list[torch.Tensor] = []

    def add(self, rows: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add some tokens: what the linear reads, [..., K], and the loss's gradient with respect to its output there,
        [..., N]."""
        squares = gradient.square().mean(-1).flatten()
        magnitudes = rows.reshape(len(squares), -1).square()
        self.sensitivity += squares @ magnitudes
        if self._weighs_tokens:
            self._norms.append(magnitudes.sum(1).cpu())
            self._squares.append(squares.cpu())

    def token_weights(self) -> TokenWeights | None:
        """None of an expert, and where the loss does not depend on the linear."""
        if not self._squares or not any(bool(squares.any()) for squares in self._squares):
            return None
        return TokenWeights.fitted(torch.cat(self._norms), torch.cat(self._squares))


def _head_path(job: Job) -> Path:
    return job.run.file("calibrate/head-gradient.safetensors")


def _embedding_path(job: Job) -> Path:
    return job.run.file("calibrate/embedding-gradient.safetensors")


def _input_path(job: Job, index: int) -> Path:
    return job.run.file(f"calibrate/input-{index:05d}.safetensors")
