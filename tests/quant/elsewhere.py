"""A stand-in for a GPU, for torch's part of rounding: tensors that say they are on one, and refuse to meet others.

Such a tensor holds one of the CPU, which computes in its place. An operation that mixes the two kinds is an error, as
with a GPU; numbers (tensors without a dimension) are let through, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

THERE = torch.device("cuda", 0)


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a GPU."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> Elsewhere:
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, here.shape, device=THERE, **layout)  # type: ignore[attr-defined]
        tensor.here = here
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(function, args, kwargs or {})

    # What torch does for these asks the GPU's driver.

    def __float__(self) -> float:
        return float(self.here)

    def __int__(self) -> int:
        return int(self.here)

    def __invert__(self) -> torch.Tensor:
        return torch.bitwise_not(self)

    def copy_(self, source: torch.Tensor, *_: Any) -> torch.Tensor:  # from any device
        self.here.copy_(unwrapped(source))
        return self

    def __getitem__(self, index: Any) -> torch.Tensor:
        check_together("getitem", [self, index])
        return Elsewhere(self.here[tree_map(unwrapped, index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        check_together("setitem", [self, index, value])
        self.here[tree_map(unwrapped, index)] = unwrapped(value)


@contextmanager
def as_if_there_were_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Tensors asked for on a GPU are `Elsewhere`; gives what puts one there."""

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return compute(function, args, kwargs or {})

    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    # torch.tensor(..., device=THERE) is made on the CPU, and then sent.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with Mode():
            yield Elsewhere
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


def compute(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, on the CPU; where its result belongs is what a GPU would make of it."""
    name, device = function._schema.name, kwargs.get("device")
    there = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Elsewhere)]
    check_together(name, (args, kwargs))
    written = [kwargs[argument.name] for argument in function._schema.arguments if argument.is_out]
    assert not there or all(isinstance(value, Elsewhere) for value in written), f"{name}: writes to the CPU"
    stays_there = bool(there)
    if device is not None:
        stays_there = torch.device(device).type == THERE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    made_in_place = {id(value.here): value for value in there}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not stays_there:
            return value
        return made_in_place.get(id(value)) if id(value) in made_in_place else Elsewhere(value)

    return tree_map(wrapped, function(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs)))


def check_together(name: str, values: Any) -> None:
    tensors = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
    others = [tuple(value.shape) for value in tensors if not isinstance(value, Elsewhere) and value.dim()]
    there = any(isinstance(value, Elsewhere) for value in tensors)
    assert not (there and others), f"{name}: tensors of the CPU, {others}, meet those of a GPU"


def unwrapped(value: Any) -> Any:
    return value.here if isinstance(value, Elsewhere) else value
