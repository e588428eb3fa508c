"""What rounding is expected to cost, by what calibrate measured: one number for each input feature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from accullm_cli.quant.outliers import expected_loss
from accullm_cli.quant.stats import InputStats
from accullm_cli.stages.calibrate import DAMAGE_GROUP_SIZES
from accullm_cli.stages.embedding_loss import load_embedding_losses
from accullm_cli.stages.job import Job


def feature_losses(
    stats: list[InputStats] | None, group_size: int, sensitivity_of: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The loss [K] that rounding each input feature of a linear to MEASURED_BITS is expected to cause.

    Args:
        sensitivity_of: the model's loss for a unit of squared change in each column of a linear. Where it says nothing
            of one, the loss is the error of the linear's own outputs.
    """
    measured = _nearest_group_size(group_size)
    found = {}
    for entry in stats or ():
        for name in entry.linears:
            known = sensitivity_of.get(name)
            weight = known if known is not None and known.any() else entry.second_moment
            found[name] = expected_loss(weight, entry.damage[name][measured])
    return found


def embedding_losses(job: Job, name: str, sizes: Sequence[int]) -> dict[int, torch.Tensor]:
    """The losses of an embedding for groups of these sizes; see `feature_losses`."""
    measured = load_embedding_losses(job)[name]
    return {size: measured[_nearest_group_size(size)] for size in sizes}


def _nearest_group_size(group_size: int) -> int:
    """The group size, of those that damage was measured for, that is nearest to the plan's."""
    if group_size == -1:
        return -1
    return min((size for size in DAMAGE_GROUP_SIZES if size > 0), key=lambda size: abs(size - group_size))
