"""The linear weights of a decoder's blocks, and who reads and writes them while a block runs.

A slot is one matrix [N, K] that multiplies an input: the weight of a torch.nn.Linear, of transformers' Conv1D
(stored [K, N]), or one expert's part of a parameter that holds those of all experts one behind the other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from accullm_cli.model.products import Product, find_product


@dataclass(frozen=True)
class LinearSlot:
    """One linear weight of a block.

    name: its full name in the model ("model.layers.0.mlp.up_proj"; an expert's has its number behind the parameter's
        name: "model.layers.0.mlp.experts.down_proj.3").
    parameter: name of the parameter within the block ("mlp.up_proj.weight").
    expert: the number of the part, of `experts` equal ones that the parameter holds.
    transposed: whether the parameter holds it as [K, N].
    """

    name: str
    parameter: str
    kind: Literal["linear", "conv1d", "expert"]
    out_features: int
    in_features: int
    expert: int | None = None
    experts: int = 1
    transposed: bool = False

    def read(self, block: nn.Module) -> torch.Tensor:
        """The weight [N, K] in `block`, as a view."""
        weight = block.get_parameter(self.parameter).data
        if self.expert is not None:
            weight = weight.view(self.experts, -1, weight.shape[-1])[self.expert]
        return weight.T if self.transposed else weight

    def write(self, block: nn.Module, weight: torch.Tensor) -> None:
        """Put `weight` [N, K] into `block`. An expert's slice is overwritten in place, others are replaced."""
        if self.expert is not None:
            self.read(block).copy_(weight)
            return
        module_name, _, attribute = self.parameter.rpartition(".")
        stored = weight.T.contiguous() if self.transposed else weight.contiguous()
        setattr(block.get_submodule(module_name), attribute, nn.Parameter(stored, requires_grad=False))


def share_weights(block: nn.Module) -> nn.Module:
    """A second block on the same weights; writing a slot of one leaves the other as it is, but for experts.

    An expert is overwritten in both: a second stack of all would take as much memory as the block.
    """
    tensors: list[torch.Tensor] = [*block.parameters(), *block.buffers()]
    return copy.deepcopy(block, {id(tensor): tensor for tensor in tensors})


# Functions that add two tensors.
_SUMS = {
    torch.add,
    torch.Tensor.add,
    torch.Tensor.add_,
    torch.Tensor.__add__,
    torch.Tensor.__radd__,
    torch.Tensor.__iadd__,
}


class SlotWeights:
    """Finds the slots whose weights in a block a product reads, by the addresses of the weights."""

    def __init__(self, block: nn.Module, slots: list[LinearSlot]) -> None:
        self._slots: dict[int, list[LinearSlot]] = {}
        by_parameter: dict[str, list[LinearSlot]] = {}
        for slot in slots:
            by_parameter.setdefault(slot.parameter, []).append(slot)
            self._slots[slot.read(block).data_ptr()] = [slot]
        # Where a stack of experts begins, a product may read the first of them or all.
        self._stacks = {stack[0].read(block).data_ptr(): stack for stack in by_parameter.values()}

    def find(
        self, func: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Product, list[LinearSlot]] | None:
        """The product that a call of a function is, and the slot whose weight it reads, or the whole stack of slots."""
        product = find_product(func, args, kwargs, lambda tensor: tensor.data_ptr() in self._slots)
        if product is None:
            return None
        of_address = self._slots if product.weight.dim() == 2 else self._stacks
        slots = of_address.get(product.weight.data_ptr(), [])
        count = 1 if product.weight.dim() == 2 else len(product.weight)
        wanted = (slots[0].out_features, slots[0].in_features) if slots else ()
        return (product, slots) if len(slots) == count and product.weight.shape[-2:] == wanted else None


class CaptureInputs(TorchFunctionMode):
    """While active, calls `on_input(name, x)` for every product of an input with a slot's weight.

    x is the input, [..., K]. One mechanism serves modules and stacked experts: the product is recognized by the address
    of its weight. Where all that becomes of a product is that it is added to a tensor of its own shape, the residual
    stream as a rule, `on_sum(name, sum)` is called with the sum, [..., N]. `on_gradient(name, g, x)` is called in
    a backward pass with the gradient of each product, [..., N], and its input.
    """

    def __init__(
        self,
        block: nn.Module,
        slots: list[LinearSlot],
        on_input: Callable[[str, torch.Tensor], None],
        on_sum: Callable[[str, torch.Tensor], None] | None = None,
        on_gradient: Callable[[str, torch.Tensor, torch.Tensor], None] | None = None,
    ):
        super().__init__()
        self._weights = SlotWeights(block, slots)
        self._on_input = on_input
        self._on_sum = on_sum
        self._on_gradient = on_gradient
        # By address, and kept alive, so that no address is used twice.
        self._products: dict[int, tuple[str, torch.Tensor]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        match = self._weights.find(func, args, kwargs)
        if match is not None:
            product, slots = match
            for slot, value in _of_slots(slots, product.value):
                self._on_input(slot.name, value)
        result = func(*args, **kwargs)
        if match is not None and self._on_gradient is not None and result.requires_grad:
            # Without its own part of the graph: that would stay with whoever keeps it.
            told = replace(product, value=product.value.detach())
            result.register_hook(lambda gradient: self._tell_gradient(slots, told.rows(gradient), told.value))
        if self._on_sum is not None and isinstance(result, torch.Tensor):
            for used in self._take_used(func, args, result):
                self._on_sum(used, result)
            if match is not None and len(slots) == 1 and not product.is_columns:
                self._products[result.data_ptr()] = slots[0].name, result
        return result

    def _tell_gradient(self, slots: list[LinearSlot], gradient: torch.Tensor, value: torch.Tensor) -> None:
        assert self._on_gradient is not None
        for (slot, part), (_, own) in zip(_of_slots(slots, gradient), _of_slots(slots, value), strict=True):
            self._on_gradient(slot.name, part, own)

    def _take_used(self, func: Callable[..., object], args: tuple[object, ...], result: torch.Tensor) -> list[str]:
        """Stop watching the products that a function used; the names of those that it added to something whole."""
        added = []
        for argument in args:
            if not isinstance(argument, torch.Tensor) or argument.data_ptr() not in self._products:
                continue
            address = argument.data_ptr()
            name, product = self._products[address]
            operands = [value for value in args[:2] if isinstance(value, torch.Tensor)]
            is_sum = func in _SUMS and len(operands) == 2 and operands[0].shape == operands[1].shape
            if is_sum and argument.numel() == product.numel() and argument.is_contiguous():
                added.append(name)
                del self._products[address]
            elif result.data_ptr() != address or func.__name__.endswith("_"):  # no mere view of it
                del self._products[address]
        return added


def _of_slots(slots: list[LinearSlot], values: torch.Tensor) -> Iterable[tuple[LinearSlot, torch.Tensor]]:
    """Each slot with its part of [E, T, K], or the only one with all of [..., K]."""
    return zip(slots, values if len(slots) > 1 else [values], strict=True)


class InputIdentity:
    """Tells whether two tensors are the same input: same memory, same layout, not written in between.

    It keeps what it has seen alive, so that no address is used twice.
    """

    def __init__(self) -> None:
        self._seen: list[torch.Tensor] = []

    def key(self, value: torch.Tensor) -> tuple[object, ...]:
        self._seen.append(value)
        return value.data_ptr(), tuple(value.shape), value.stride(), value._version
