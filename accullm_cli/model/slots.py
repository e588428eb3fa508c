"""Where the linear weights of a decoder are, found from its module graph.

A slot is one matrix [N, K] that multiplies an input: the weight of a torch.nn.Linear, of transformers' Conv1D
(stored [K, N]), or one expert's slice of a parameter that stacks experts [E, N, K].
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from accullm_cli.errors import AccullmError


@dataclass(frozen=True)
class LinearSlot:
    """One linear weight of a block.

    name: its full name in the model ("model.layers.0.mlp.up_proj"; an expert's has its number behind the parameter's
        name: "model.layers.0.mlp.experts.down_proj.3").
    parameter: name of the parameter within the block ("mlp.up_proj.weight").
    expert: the slice of the parameter, for experts.
    """

    name: str
    parameter: str
    kind: Literal["linear", "conv1d", "expert"]
    out_features: int
    in_features: int
    expert: int | None = None

    def read(self, block: nn.Module) -> torch.Tensor:
        """The weight [N, K] in `block`, as a view."""
        parameter = block.get_parameter(self.parameter).data
        if self.kind == "conv1d":
            return parameter.T
        return parameter if self.expert is None else parameter[self.expert]

    def write(self, block: nn.Module, weight: torch.Tensor) -> None:
        """Put `weight` [N, K] into `block`. An expert's slice is overwritten in place, others are replaced."""
        if self.expert is not None:
            block.get_parameter(self.parameter).data[self.expert] = weight
            return
        module_name, _, attribute = self.parameter.rpartition(".")
        stored = weight.T.contiguous() if self.kind == "conv1d" else weight.contiguous()
        setattr(block.get_submodule(module_name), attribute, nn.Parameter(stored, requires_grad=False))


def find_blocks(model: nn.Module) -> list[str]:
    """The names of the decoder's blocks in order: the outermost ModuleList with the most linear weights.

    Raises:
        AccullmError: no ModuleList holds a linear weight.
    """
    best: list[str] = []
    best_weights = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not _inside(name, best):
            children = [f"{name}.{child}" for child, _ in module.named_children()]
            weights = sum(slot.out_features * slot.in_features for child in module for slot in find_slots(child, ""))
            if weights > best_weights:
                best, best_weights = children, weights
    if not best:
        raise AccullmError("no list of decoder blocks with linear layers in this architecture", type(model).__name__)
    return best


def find_slots(block: nn.Module, name: str) -> list[LinearSlot]:
    """The linear weights of a block, in module order. Routers of experts are not among them: they stay in 16 bits."""
    slots = []
    for path, module in block.named_modules():
        full = ".".join(part for part in (name, path) if part)
        prefix = f"{path}." if path else ""
        if isinstance(module, Conv1D):
            rows, columns = module.weight.shape
            slots.append(LinearSlot(full, f"{prefix}weight", "conv1d", columns, rows))
        elif isinstance(module, nn.Linear):
            if not _is_router(block, path, module):
                slots.append(LinearSlot(full, f"{prefix}weight", "linear", module.out_features, module.in_features))
        for attribute, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3:
                if getattr(module, "is_transposed", False):
                    raise AccullmError("experts stored [experts, in, out] are not supported", f"{full}.{attribute}")
                experts, rows, columns = parameter.shape
                slots += [
                    LinearSlot(f"{full}.{attribute}.{e}", f"{prefix}{attribute}", "expert", rows, columns, e)
                    for e in range(experts)
                ]
    return slots


def share_weights(block: nn.Module, slots: list[LinearSlot]) -> nn.Module:
    """A second block on the same weights; writing a slot of one leaves the other as it is."""
    stacks = {slot.parameter for slot in slots if slot.expert is not None}
    tensors: list[torch.Tensor] = [tensor for name, tensor in block.named_parameters() if name not in stacks]
    tensors += list(block.buffers())
    return copy.deepcopy(block, {id(tensor): tensor for tensor in tensors})


# Functions that multiply an input by a weight, and the position of the input among their arguments.
PRODUCTS = {
    nn.functional.linear: 0,
    torch.matmul: 0,
    torch.Tensor.matmul: 0,
    torch.Tensor.__matmul__: 0,
    torch.addmm: 1,
}
# Functions that add two tensors.
_SUMS = {
    torch.add,
    torch.Tensor.add,
    torch.Tensor.add_,
    torch.Tensor.__add__,
    torch.Tensor.__radd__,
    torch.Tensor.__iadd__,
}


class CaptureInputs(TorchFunctionMode):
    """While active, calls `on_input(name, x)` for every product of an input with a slot's weight.

    x is the input as the model passed it, [..., K]. One mechanism serves modules and stacked experts: the product is
    recognized by the address of its weight. Where all that becomes of a product is that it is added to a tensor of its
    own shape, the residual stream as a rule, `on_sum(name, sum)` is called with the sum, [..., N]. `on_output(name, y)`
    is called with each product itself, [..., N].
    """

    def __init__(
        self,
        block: nn.Module,
        slots: list[LinearSlot],
        on_input: Callable[[str, torch.Tensor], None],
        on_sum: Callable[[str, torch.Tensor], None] | None = None,
        on_output: Callable[[str, torch.Tensor], None] | None = None,
    ):
        super().__init__()
        self._name_of = {slot.read(block).data_ptr(): slot.name for slot in slots}
        self._on_input = on_input
        self._on_sum = on_sum
        self._on_output = on_output
        # By address, and kept alive, so that no address is used twice.
        self._products: dict[int, tuple[str, torch.Tensor]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        name = None
        position = PRODUCTS.get(func)
        if position is not None:
            value, weight = args[position : position + 2]
            name = self._name_of.get(weight.data_ptr())
            if name is not None:
                self._on_input(name, value)
        result = func(*args, **kwargs)
        if name is not None and self._on_output is not None:
            self._on_output(name, result)
        if self._on_sum is not None and isinstance(result, torch.Tensor):
            for used in self._take_used(func, args, result):
                self._on_sum(used, result)
            if name is not None:
                self._products[result.data_ptr()] = name, result
        return result

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


class InputIdentity:
    """Tells whether two tensors are the same input: same memory, same layout, not written in between.

    It keeps what it has seen alive, so that no address is used twice.
    """

    def __init__(self) -> None:
        self._seen: list[torch.Tensor] = []

    def key(self, value: torch.Tensor) -> tuple[object, ...]:
        self._seen.append(value)
        return value.data_ptr(), tuple(value.shape), value.stride(), value._version


def _inside(name: str, blocks: list[str]) -> bool:
    return any(name.startswith(f"{block}.") for block in blocks)


def _is_router(block: nn.Module, path: str, linear: nn.Linear) -> bool:
    """Whether a linear scores experts: it sits beside a stack of E experts and has E (or, as a gate, 1) outputs."""
    parent = block.get_submodule(path.rpartition(".")[0]) if path else block
    return any(linear.out_features in (1, count) for count in _expert_counts(parent))


def _expert_counts(module: nn.Module) -> Iterator[int]:
    for child in module.children():
        for parameter in child.parameters(recurse=False):
            if parameter.dim() == 3:
                yield parameter.shape[0]
