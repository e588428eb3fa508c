"""Rounding the token embedding and the output head, some rows at a time: they are as large as several blocks.

Of an embedding that is only looked up nothing is known but its weights: each is rounded to the nearest grid value. A
head is a linear like others, and its input is what the final norm makes of the stream behind the last block. Where one
matrix is both, it is rounded as a head, but towards its own weights: what would correct the logits for the errors of
the blocks would be an error where tokens are looked up.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from accullm_cli.model.blocks import Decoder
from accullm_cli.model.checkpoint import Checkpoint
from accullm_cli.model.embeddings import EmbeddingSlot
from accullm_cli.quant.plan import Plan
from accullm_cli.quant.rounding import round_linears
from accullm_cli.quant.stats import GramMatrices
from accullm_cli.stages.block_rounding import evidence_saved, rounding_options
from accullm_cli.stages.job import Job

# Weights that are rounded at once: the dozen float32 matrices of their size weigh no more than a large block. The
# Hessian is factored again for each such part, which takes a thirtieth of the part's time at 4096 columns.
ELEMENTS_TOGETHER = 1 << 24


def round_embedding(
    job: Job, decoder: Decoder, plan: Plan, slot: EmbeddingSlot, gram: GramMatrices | None
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Round an embedding or a head.

    Args:
        gram: of a head's input, which is used up; None for nearest rounding on a grid that weighs all columns alike.

    Returns:
        Its tensors in the native format by suffix, and a sentence for everything that was treated differently.
    """
    assert isinstance(decoder.weights, Checkpoint)
    stored = decoder.weights.read(slot.parameter)
    options = rounding_options(job, plan)
    hessian = drift = None
    if gram is None:
        options = replace(options, method="nearest")
    else:
        hessian, drift = gram.take_hessian(), gram.take_drift()
    parts: list[dict[str, torch.Tensor]] = []
    records: list[str] = []
    done = 0
    for rows in stored.split(max(1, ELEMENTS_TOGETHER // slot.in_features)):
        weight = rows.to(decoder.device).float()
        # A name of its own, by which stochastic rounding draws numbers of its own.
        name = f"{slot.name} part {len(parts)}"
        own = replace(plan.embeddings[slot.name], name=name, out_features=len(weight))
        pulls = {} if drift is None else {name: drift @ weight.T}
        with evidence_saved(job):
            found = round_linears(
                {name: weight}, {name: own}, options, stored.dtype, hessian, pulls, loops=job.compute.loops
            )[name]
        # How many were clamped differs from part to part.
        of_part = f"rows {done} to {done + len(weight) - 1}: " if len(weight) < len(stored) else ""
        done += len(weight)
        parts.append({suffix: tensor.cpu() for suffix, tensor in found.linear.to_tensors().items()})
        records += [of_part + sentence for sentence in found.records]
    return {suffix: torch.cat([part[suffix] for part in parts]) for suffix in parts[0]}, records


def head_gram(
    job: Job, decoder: Decoder, slot: EmbeddingSlot, original: torch.Tensor | None, rounded: torch.Tensor
) -> GramMatrices:
    """The Gram matrices of the head's input over the calibration text.

    Args:
        original: the original's hidden states behind the last block [S, T, hidden]; may be None where the head's target
            is not corrected.
        rounded: those of the model quantized so far.
    """
    corrected = job.config.rounding.target == "corrected" and not slot.is_looked_up
    gram = GramMatrices(slot.in_features, corrected, device=decoder.device)
    decoder.load_outside()
    for rows in decoder.batches(rounded):
        before = decoder.head_input(original[rows]).flatten(0, -2) if corrected and original is not None else None
        gram.add(decoder.head_input(rounded[rows]).flatten(0, -2), before)
    decoder.release_outside()
    return gram
