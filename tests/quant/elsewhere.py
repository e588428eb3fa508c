"""A stand-in for a GPU, for torch's part of the work: tensors that say they are on one, and refuse to meet others.

Such a tensor holds one of the CPU, which computes in its place. An operation that mixes the two kinds is an error, as
with a GPU; numbers (tensors without a dimension) are let through, and values may be copied from one to the other, as
there. Inside torch it is on the device "meta", for which, other than for a GPU, gradients are computed on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

THERE = torch.device("cuda", 0)
# Operations that take values from one device to the other.
TRANSFERS = {"aten::copy_", "aten::_to_copy"}
# Those whose second argument, places in the first, may lie on the CPU.
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}

# How many functions on such tensors are under way: what torch makes on the device "meta" meanwhile is for these.
_inside = 0


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a GPU."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> Elsewhere:
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, here.shape, device="meta", **layout)  # type: ignore[attr-defined]
        tensor.here = here.detach()
        return tensor

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        global _inside
        kwargs = kwargs or {}
        if function is nn.functional.scaled_dot_product_attention:
            found = _attention(*args, **kwargs)
            if found is not None:
                return found
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            args = (args[0], _with_tensors(args[1]), *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            _inside += 1
            try:
                return function(*args, **kwargs)
            finally:
                _inside -= 1

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(function, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return THERE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.here = unwrapped(value)

    def data_ptr(self) -> int:
        return self.here.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copy: torch.Tensor = Elsewhere(self.here.clone())
        memo[id(self)] = nn.Parameter(copy, self.requires_grad) if isinstance(self, nn.Parameter) else copy
        return memo[id(self)]  # type: ignore[no-any-return]


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


def pretend_streams(monkeypatch: pytest.MonkeyPatch, told: list[str]) -> None:
    """Streams of a GPU that does everything at once; `told` gets who waited for whom, and which stream was entered."""

    class Stream:
        def __init__(self, device: torch.device, name: str = "other") -> None:
            assert device == THERE
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            told.append(f"{self.name} waits for {other.name}")

        def record_event(self) -> str:
            return self.name

        def wait_event(self, event: str) -> None:
            told.append(f"{self.name} waits for {event}")

    @contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        told.append(f"in {stream.name}")
        yield

    current = Stream(THERE, "current")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)


def compute(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, on the CPU; where its result belongs is what a GPU would make of it."""
    name, device = function._schema.name, kwargs.get("device")
    there = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Elsewhere)]
    if name not in TRANSFERS:
        check_together(name, (args[:1] + args[2:] if name in INDEXED else args, kwargs))
    written = [kwargs[argument.name] for argument in function._schema.arguments if argument.is_out]
    assert not there or all(isinstance(value, Elsewhere) for value in written), f"{name}: writes to the CPU"
    stays_there = bool(there)
    if name == "aten::copy_":
        stays_there = isinstance(args[0], Elsewhere)
    if device is not None and (there or _inside or torch.device(device).type != "meta"):
        stays_there = torch.device(device).type in (THERE.type, "meta")
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if kwargs.get("pin_memory"):
        assert not stays_there, f"{name}: only memory of the CPU is pinned"
        kwargs = {**kwargs, "pin_memory": False}
    made_in_place = {id(value.here): value for value in there}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not stays_there:
            return value
        return made_in_place.get(id(value)) if id(value) in made_in_place else Elsewhere(value)

    found = function(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs))
    if name == "aten::copy_":
        return args[0]
    return tree_map(wrapped, found)


def _with_tensors(index: Any) -> Any:
    """An index whose lists are tensors: those that torch makes of them on the device "meta" hold no values."""
    if isinstance(index, tuple):
        return tuple(map(_with_tensors, index))
    return torch.tensor(index, dtype=torch.int64) if isinstance(index, list) else index


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor | None:
    """By the CPU's fused attention, where that is what a CPU would take; torch has none for the device "meta"."""
    tensors = tuple(map(unwrapped, (query, key, value, attn_mask)))
    how = {"scale": scale, "enable_gqa": enable_gqa}
    if torch._fused_sdp_choice(*tensors, dropout_p, is_causal, **how) != SDPBackend.FLASH_ATTENTION.value:
        return None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = query.new_zeros(attn_mask.shape).masked_fill(~attn_mask, -torch.inf)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    found: torch.Tensor = fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return found


def check_together(name: str, values: Any) -> None:
    tensors = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
    empty = [value for value in tensors if not isinstance(value, Elsewhere) and value.device.type == "meta"]
    assert not empty or len(empty) == len(tensors), f"{name}: tensors without values"
    others = [tuple(value.shape) for value in tensors if not isinstance(value, Elsewhere) and value.dim()]
    there = any(isinstance(value, Elsewhere) for value in tensors)
    assert not (there and others), f"{name}: tensors of the CPU, {others}, meet those of a GPU"


def unwrapped(value: Any) -> Any:
    return value.here if isinstance(value, Elsewhere) else value
