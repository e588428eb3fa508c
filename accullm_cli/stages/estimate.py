"""What a conversion will take: size exactly, memory and time from counting."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from accullm_cli.model.blocks import TOKENS_PER_BATCH, Decoder
from accullm_cli.quant.plan import Plan
from accullm_cli.stages.job import Job

FLOAT = 4
# Quantize runs the original and the rounded block once for each distinct input (four in a Llama block), up to that
# input; that adds up to some 2.5 whole passes for either stream.
PASSES_IN_QUANTIZE = 5.0
# The interpreter, torch and transformers before any weight is read.
BASE_BYTES = 600_000_000


@dataclass(frozen=True)
class Estimated:
    """What a conversion takes.

    artifact_bytes: tensors of the native format and the tokenizer files beside them. peak_bytes: resident memory.
    seconds: wall clock, all stages.
    """

    artifact_bytes: int
    peak_bytes: int
    seconds: float


def estimate(job: Job, decoder: Decoder, plan: Plan) -> Estimated:
    """Size, peak memory and time of converting with `plan`."""
    calibration, validation = job.config.calibration, job.config.validation
    tokens = calibration.samples * calibration.seq_len
    held_out = validation.windows * calibration.seq_len
    linear_weights = sum(linear.weights for linear in plan.linears.values())
    tied = set(decoder.model.all_tied_weights_keys)
    parameters = {name: value for name, value in decoder.model.named_parameters() if name not in tied}
    all_weights = sum(parameter.numel() for parameter in parameters.values())
    source_bytes = sum(value.numel() * decoder.weights.dtype(name).itemsize for name, value in parameters.items())
    in_blocks = [
        sum(parameter.numel() for parameter in decoder.model.get_submodule(name).parameters())
        for name in decoder.block_names
    ]
    outside = all_weights - sum(in_blocks)
    unquantized = source_bytes - sum(linear.weights * linear.source_itemsize for linear in plan.linears.values())
    stored = unquantized + sum(linear.stored_bytes for linear in plan.linears.values())
    stored += sum(path.stat().st_size for path in job.source.companions)
    widest = max(linear.in_features for linear in plan.linears.values())
    hidden = decoder.model.get_input_embeddings().weight.shape[1]
    streams = 2 * tokens * hidden
    # A block and its stored form, together with what surrounds the blocks, or with its rounded copy and the Hessian
    # that is being factored (three [K, K]; while Gram matrices grow, two of them and a few activations).
    block = max(in_blocks)
    peak = BASE_BYTES + FLOAT * (max(outside + 1.5 * block, 1.5 * block + 3 * widest**2) + streams)
    peak += FLOAT * 4 * TOKENS_PER_BATCH * widest

    forward = 2.0 * linear_weights
    passes = tokens * (1 + PASSES_IN_QUANTIZE) + 3 * held_out
    rounding = sum(2.0 * linear.weights * linear.in_features for linear in plan.linears.values())
    inputs = {(name.rpartition(".")[0], linear.in_features) for name, linear in plan.linears.items()}
    grams = sum(4.0 * tokens * features**2 for _, features in inputs)
    head = 2.0 * decoder.model.get_input_embeddings().weight.numel() * 4 * held_out
    seconds = (forward * passes + rounding + grams + head) / _operations_per_second()
    return Estimated(stored, int(peak), round(seconds, 1))


def _operations_per_second() -> float:
    """What a float32 matrix product reaches here, measured in a moment."""
    left, right = torch.ones(512, 1024), torch.ones(1024, 1024)
    left @ right
    started = time.perf_counter()
    for _ in range(10):
        left @ right
    return 10 * 2.0 * 512 * 1024 * 1024 / (time.perf_counter() - started)
