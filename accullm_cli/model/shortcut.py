"""Running a block again from the middle: what some of its linears read is known from an earlier run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from accullm_cli.model.slots import LinearSlot, SlotWeights


class Shortcut(TorchFunctionMode):
    """While active, these linears multiply what is known to be their input, whatever the block passes to them.

    Until the last of them has, the block's other products, and its attention, are not computed: nobody reads them any
    more, if what depends on them goes through the known inputs alone. Whether that is so is for the caller to find out,
    by a filler that would show (NaN).
    """

    def __init__(
        self, block: nn.Module, slots: list[LinearSlot], inputs: Mapping[str, torch.Tensor], filler: float = 0.0
    ) -> None:
        """`inputs`: by the name of a linear, [T, K]. `filler`: what stands in for a product that is not computed."""
        super().__init__()
        self._weights = SlotWeights(block, slots)
        self._inputs = dict(inputs)
        self._filler = filler

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if not self._inputs:
            return func(*args, **kwargs)
        match = self._weights.find(func, args, kwargs)
        # Only of the plain form; whatever else is multiplied goes on as it is.
        if match is not None and len(match[1]) == 1 and not match[0].is_columns and not kwargs:
            product, (slot,) = match
            if slot.name in self._inputs:
                known = self._inputs.pop(slot.name).view(product.value.shape)
                return func(*args[: product.position], known, *args[product.position + 1 :])
            return product.value.new_full((*product.value.shape[:-1], slot.out_features), self._filler)
        if func is nn.functional.scaled_dot_product_attention:
            query, _, values = args[:3]
            return query.new_full((*query.shape[:-1], values.shape[-1]), self._filler)
        return func(*args, **kwargs)
