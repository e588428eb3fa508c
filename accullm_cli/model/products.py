"""Products of an input with a weight, recognized in the functions of torch that a model calls for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Functions that multiply their arguments at these positions.
_MATMULS = {
    torch.matmul: (0, 1),
    torch.mm: (0, 1),
    torch.bmm: (0, 1),
    torch.Tensor.matmul: (0, 1),
    torch.Tensor.mm: (0, 1),
    torch.Tensor.bmm: (0, 1),
    torch.Tensor.__matmul__: (0, 1),
    torch.Tensor.__rmatmul__: (1, 0),
    torch.addmm: (1, 2),
    torch.baddbmm: (1, 2),
    torch.Tensor.addmm: (1, 2),
    torch.Tensor.baddbmm: (1, 2),
}


@dataclass(frozen=True)
class Product:
    """One product of an input with a weight.

    weight: as the product reads it, [N, K], or [E, N, K] where each of E inputs is multiplied by a weight of its own.
    value: the input [..., K], or [E, T, K].
    position: the input's place among the function's arguments.
    is_columns: the function was passed the input as [..., K, T] and gives [..., N, T].
    """

    weight: torch.Tensor
    value: torch.Tensor
    position: int
    is_columns: bool

    def rows(self, output: torch.Tensor) -> torch.Tensor:
        """The product as [..., N]."""
        return output.mT if self.is_columns else output


def find_product(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    is_weight: Callable[[torch.Tensor], bool],
) -> Product | None:
    """The product with a weight that a call of `func` is, None where it is none.

    Args:
        is_weight: whether a tensor is the weight, or a part or a transpose of it.
    """
    if func is nn.functional.linear:
        value, weight = (*args, *kwargs.values())[:2]
        return Product(weight, value, 0, is_columns=False) if is_weight(weight) else None
    places = _MATMULS.get(func)
    if places is None or len(args) <= max(places):
        return None
    left, right = (args[place] for place in places)
    if right.dim() > 1 and is_weight(right):
        return Product(right.mT, left, places[0], is_columns=False)
    if right.dim() > 1 and left.dim() > 1 and is_weight(left):
        return Product(left, right.mT, places[1], is_columns=True)
    return None
