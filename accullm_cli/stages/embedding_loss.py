"""What rounding token embedding and output head is expected to cost, in the unit of the linears' losses.

A head is a linear, but one whose outputs are tokens, of which few matter: the squared gradient with respect to the
logit of token v at a position, times the squared input feature k there, summed over positions, is how much the loss
depends on its weight (v, k). Of an embedding it is the squared gradient with respect to what is looked up, at the
positions of token v. Both are taken for products of a number for the row and one for the column, which they sum to.

Calibrate leaves calibrate/embeddings.safetensors, with the loss [K] of each column of NAME for groups of so many input
features as "NAME SIZE".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from accullm_cli.model.blocks import Decoder
from accullm_cli.model.checkpoint import Checkpoint
from accullm_cli.model.embeddings import find_embeddings
from accullm_cli.quant.encodings.base import MEASURED_BITS
from accullm_cli.quant.grid import minmax_grid, row_chunks
from accullm_cli.stages.gradients import load_embedding_gradient, load_head_gradient
from accullm_cli.stages.job import Job
from accullm_cli.stages.keyed import is_made_for, write_keyed


def embedding_losses_path(job: Job) -> Path:
    return job.run.file("calibrate/embeddings.safetensors")


def load_embedding_losses(job: Job) -> dict[str, dict[int, torch.Tensor]]:
    """By name and group size, the loss [K] that rounding each column to MEASURED_BITS is expected to cause."""
    found: dict[str, dict[int, torch.Tensor]] = {}
    for key, loss in load_file(embedding_losses_path(job)).items():
        name, _, size = key.rpartition(" ")
        found.setdefault(name, {})[int(size)] = loss
    return found


def measure_embedding_losses(job: Job, decoder: Decoder, key: str, ids: torch.Tensor, sizes: Sequence[int]) -> Path:
    """Write the losses, unless they are there for this key.

    Args:
        ids: int64 [windows, tokens], those with gradients. sizes: of groups.
    """
    path = embedding_losses_path(job)
    if is_made_for(path, key):
        return path
    assert isinstance(decoder.weights, Checkpoint)
    tensors: dict[str, torch.Tensor] = {}
    for slot in find_embeddings(decoder.model):
        weight = decoder.weights.read(slot.parameter).to(decoder.device)
        rows, columns = [], []
        if slot.is_head:
            of_rows, of_columns = (of_head.to(weight.device) for of_head in load_head_gradient(job))
            rows.append(of_rows / of_rows.sum())
            columns.append(of_columns)
        if slot.is_looked_up:
            gradient, energy = (of_input.to(weight.device) for of_input in load_embedding_gradient(job))
            tokens = ids.flatten().to(weight.device)
            # What a model multiplies by after looking up.
            looked_up = weight[tokens].float().square().mean()
            rows.append(torch.bincount(tokens, minlength=len(weight)).float() / len(tokens))
            columns.append(gradient * (energy / looked_up))
        for size in sizes:
            damages = _damage(weight, torch.stack(rows), size)
            loss = torch.stack([own * damage for own, damage in zip(columns, damages, strict=True)]).sum(0)
            tensors[f"{slot.name} {size}"] = loss.float()
    write_keyed(path, key, tensors)
    return path


def _damage(weight: torch.Tensor, rows: torch.Tensor, size: int) -> torch.Tensor:
    """The squared change that rounding makes to each column [n, K], its rows weighed in n ways, [n, N]."""
    damage = rows.new_zeros(len(rows), weight.shape[1])
    done = 0
    for part in row_chunks(weight):
        values = part.float()
        grid = minmax_grid(values, MEASURED_BITS, size, symmetric=False)
        change = (values - grid.values(grid.round_to_nearest(values))).square_()
        damage += rows[:, done : done + len(part)] @ change
        done += len(part)
    return damage
