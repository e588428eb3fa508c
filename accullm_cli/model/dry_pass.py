"""A model's own forward pass without its weights: what it calls and multiplies shows how it is built.

Every matrix is replaced by memory that is reserved and never touched, which takes none, and every product with one by
noise of its shape. What is left is the model's own Python, which takes less than a second whatever the model's size.
"""

from __future__ import annotations

import bisect
import mmap
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from accullm_cli.errors import AccullmError
from accullm_cli.model.products import Product, find_product

# Windows and tokens of a pass: unequal, and unlike the dimensions of models, so that a shape tells what it is.
WINDOWS, TOKENS = 2, 13
# Functions that choose. A product whose elements are compared by them decides where tokens go, as a router does.
_CHOICES = {
    getattr(owner, name)
    for owner in (torch, torch.Tensor)
    for name in ("topk", "argmax", "sort", "argsort", "max", "multinomial")
}
# Functions that mix activations with each other: what comes out of them is no longer the score of anything.
_MIXTURES = {
    getattr(owner, name)
    for owner in (torch, torch.Tensor)
    for name in ("matmul", "bmm", "einsum", "baddbmm", "cumsum", "__matmul__")
    if hasattr(owner, name)
} | {nn.functional.scaled_dot_product_attention}
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0  # MAP_NORESERVE of mmap(2), which Python 3.10 does not name

# Where a value is in a call: "args" or "kwargs", then an index or a key, then further ones inside of that value.
Path = tuple[Any, ...]


@dataclass(frozen=True)
class Returned:
    """What a block returns: hidden states, or a `container` of `length` values with them at `position`."""

    container: type | None = None
    length: int = 1
    position: int = 0

    @staticmethod
    def of(output: Any) -> Returned:
        """As a block's output shows it; the first tensor is the hidden states."""
        if isinstance(output, torch.Tensor):
            return Returned()
        tensors = [isinstance(value, torch.Tensor) for value in output]
        return Returned(type(output), len(output), tensors.index(True))

    def take(self, output: Any) -> torch.Tensor:
        """The hidden states in a block's output."""
        hidden: torch.Tensor = output if self.container is None else output[self.position]
        return hidden

    def wrap(self, hidden: torch.Tensor) -> Any:
        """A block's output with these hidden states, and None for all else."""
        if self.container is None:
            return hidden
        values: list[Any] = [None] * self.length
        values[self.position] = hidden
        return self.container(values)


@dataclass(frozen=True)
class Use:
    """How a matrix is multiplied: as `count` parts of it, each [N, K], stored as they are or `transposed` [K, N]."""

    count: int
    out_features: int
    in_features: int
    transposed: bool

    @staticmethod
    def of(parameter: torch.Tensor, weight: torch.Tensor, offset: int) -> Use | None:
        """As a product with `weight` shows it, a view of `parameter` from element `offset` on; [N, K] or [E, N, K].

        None where the matrix is not multiplied whole, or in equal parts one behind the other.
        """
        rows, columns = weight.shape[-2:]
        size, strides = rows * columns, weight.stride()[-2:]
        if not size or parameter.numel() % size or offset % size:
            return None
        count = parameter.numel() // size
        transposed = strides == (1, rows) and columns > 1
        if not transposed and strides != (columns, 1) and rows > 1:
            return None
        if weight.dim() > 3 or (weight.dim() == 3 and (weight.shape[0] != count or weight.stride(0) != size)):
            return None
        return Use(count, rows, columns, transposed)


@dataclass
class Visit:
    """One call of a block: what it was called with, where in that the hidden states are, and what it returned."""

    block: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: Path
    output: Any = None

    @property
    def value(self) -> torch.Tensor:
        """The hidden states that the block was passed."""
        value: torch.Tensor = value_at(self.args, self.kwargs, self.hidden)
        return value

    def leaves(self) -> dict[Path, torch.Tensor]:
        """Every other tensor that the block was passed."""
        return {path: tensor for path, tensor in leaves(self.args, self.kwargs) if path != self.hidden}


class StandIns:
    """While active, the model's matrices lie in memory that was never touched, and its vectors are ones.

    Each matrix has addresses of its own, so that a view of it can be told from any other tensor.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names: list[str] = []
        self._starts: list[int] = []
        self._swapped: list[tuple[dict[str, Any], str, Any]] = []
        self.matrices: dict[str, torch.Tensor] = {}

    def __enter__(self) -> StandIns:
        parameters = dict(self._model.named_parameters())
        total = sum(4 * parameter.numel() for parameter in parameters.values() if parameter.dim() > 1)
        memory = mmap.mmap(-1, total + 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
        replacement: dict[int, nn.Parameter] = {}
        offset = 0
        for name, parameter in parameters.items():
            values = torch.ones(parameter.shape) if parameter.dim() < 2 else torch.empty(0)
            if parameter.dim() > 1 and parameter.numel():
                values = torch.frombuffer(memory, dtype=torch.float32, count=parameter.numel(), offset=offset)
                values = values.view(parameter.shape)
                offset += 4 * parameter.numel()
                self._names.append(name)
                self._starts.append(values.data_ptr())
                self.matrices[name] = values
            replacement[id(parameter)] = nn.Parameter(values, requires_grad=False)
        for module in self._model.modules():
            for attribute, kept in list(module._parameters.items()):
                if kept is not None:
                    self._swap(module._parameters, attribute, replacement[id(kept)])
            for attribute, buffer in list(module._buffers.items()):
                if buffer is not None and buffer.device.type == "meta":
                    self._swap(module._buffers, attribute, torch.zeros(buffer.shape, dtype=buffer.dtype))
        return self

    def __exit__(self, *exception: object) -> None:
        for place, attribute, before in self._swapped:
            place[attribute] = before

    def _swap(self, place: dict[str, Any], attribute: str, value: torch.Tensor) -> None:
        self._swapped.append((place, attribute, place[attribute]))
        place[attribute] = value

    def locate(self, tensor: torch.Tensor) -> tuple[str, int] | None:
        """The matrix that a tensor is a view of, and the element of it that the view begins with."""
        number = bisect.bisect_right(self._starts, tensor.data_ptr()) - 1
        if number < 0:
            return None
        offset = (tensor.data_ptr() - self._starts[number]) // 4
        return (self._names[number], offset) if offset < self.matrices[self._names[number]].numel() else None


class DryPass(TorchFunctionMode):
    """One forward pass, and what is seen of it.

    Args:
        blocks: names of modules whose calls are noted.
        stand_in: what they return in place of what they compute, for (number of the visit, hidden states).

    Attributes:
        visits: the calls of blocks, in order.
        uses: how each matrix was multiplied, by its name and the number of the visit, None outside of blocks.
        read: the visits in which something else than a product read a matrix.
        choosing: the matrices whose products are scores to choose by.
        last_read: what the last product outside of blocks read.
        crossing: two blocks, the first of which read what the second computed beside its hidden states.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stand_ins: StandIns,
        blocks: Sequence[str] = (),
        stand_in: Callable[[int, torch.Tensor], Any] | None = None,
    ) -> None:
        super().__init__()
        self._model = model
        self._stand_ins = stand_ins
        self._blocks = blocks
        self._stand_in = stand_in
        self.visits: list[Visit] = []
        self.uses: dict[str, dict[int | None, set[Use | None]]] = {}
        self.choosing: set[str] = set()
        self.read: dict[str, set[int | None]] = {}
        self.last_read: torch.Tensor | None = None
        self.crossing: tuple[str, str] | None = None
        self._generator = torch.Generator().manual_seed(0)
        self._running: int | None = None
        # The visit that computed a tensor, and the matrices whose products it is a score of.
        self._creator = WeakTensorKeyDictionary()
        self._scores = WeakTensorKeyDictionary()

    def run(self, ids: torch.Tensor) -> Any:
        """What the model returns for token ids [WINDOWS, TOKENS].

        Raises:
            AccullmError: the model cannot be run on text alone.
        """
        with torch.no_grad(), self._watched(), self:
            try:
                return self._model(input_ids=ids, use_cache=False)
            except AccullmError:
                raise
            except Exception as error:  # whatever modeling code may raise: it is told, and nothing is computed
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                raise AccullmError(f"cannot be run on text alone ({reason})", type(self._model).__name__) from error

    # -- blocks --------------------------------------------------------------------------------------------

    @contextmanager
    def _watched(self) -> Iterator[None]:
        modules = {name: self._model.get_submodule(name) for name in self._blocks}
        for name, module in modules.items():
            module.forward = self._watch(name, module.forward)
        try:
            yield
        finally:
            for module in modules.values():
                del module.forward

    def _watch(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            number, outer = len(self.visits), self._running
            visit = Visit(name, args, dict(kwargs), self._find_hidden(args, kwargs))
            self.visits.append(visit)
            if self._stand_in is not None:
                visit.output = self._stand_in(number, visit.value)
                return visit.output
            self._running = number
            try:
                visit.output = forward(*args, **kwargs)
            finally:
                self._running = outer
            return visit.output

        return call

    def _find_hidden(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Path:
        """Where in a call the hidden states are: what the block before returned, or what comes first."""
        places = dict(leaves(args, kwargs))
        if self.visits:
            before = self.visits[-1].output
            outputs = [value for _, value in _walk((), before)]
            for path, value in places.items():
                if any(is_same(value, output) for output in outputs):
                    return path
        for path in (("args", 0), ("kwargs", "hidden_states"), *places):
            if path in places and places[path].is_floating_point() and places[path].dim() > 2:
                return path
        raise AccullmError("a block is not passed any hidden states", type(self._model).__name__)

    # -- functions of torch --------------------------------------------------------------------------------

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        tensors = [tensor for _, tensor in leaves(args, kwargs)]
        self._note_crossing(tensors)
        place_of = {id(tensor): self._stand_ins.locate(tensor) for tensor in tensors}
        product = find_product(func, args, kwargs, lambda tensor: place_of.get(id(tensor)) is not None)
        if product is not None:
            result = self._multiply(func, args, kwargs, product)
        elif func is nn.functional.embedding and (place := place_of[id(args[1])]) is not None:
            ids, weight = args[:2]
            self.read.setdefault(place[0], set()).add(self._running)
            result = torch.sin(ids.unsqueeze(-1) * (1.0 + torch.arange(weight.shape[-1]) % 7) + 1)
        else:
            result = func(*args, **kwargs)
            if any(self._stand_ins.locate(tensor) is None for _, tensor in _walk((), result)):  # no mere view
                for name in {place[0] for place in place_of.values() if place is not None}:
                    self.read.setdefault(name, set()).add(self._running)
            self._follow_scores(func, tensors, result)
        for _, tensor in _walk((), result):
            self._creator.setdefault(tensor, self._running)
        return result

    def _multiply(
        self, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], product: Product
    ) -> torch.Tensor:
        place = self._stand_ins.locate(product.weight)
        assert place is not None
        name, offset = place
        use = Use.of(self._stand_ins.matrices[name], product.weight, offset)
        self.uses.setdefault(name, {}).setdefault(self._running, set()).add(use)
        shape = func(*map(_shape, args), **{key: _shape(value) for key, value in kwargs.items()}).shape
        # Of rank 4: that differs between tokens and features, and takes a tenth of the time of numbers all drawn.
        left, right = (torch.randn(size, generator=self._generator) for size in ((*shape[:-1], 4), (4, shape[-1])))
        noise = (left @ right).to(product.value.dtype)
        product.rows(noise).add_(product.value.mean(-1, keepdim=True))  # it depends on what is multiplied, still
        if self._running is None:
            self.last_read = product.value
        self._scores[noise] = frozenset({name})
        return noise

    def _follow_scores(self, func: Callable[..., Any], tensors: Sequence[torch.Tensor], result: Any) -> None:
        names = frozenset[str]().union(*(self._scores.get(tensor, ()) for tensor in tensors))
        if not names or func in _MIXTURES:
            return
        results = [tensor for _, tensor in _walk((), result)]
        if func in _CHOICES and any(not tensor.is_floating_point() for tensor in results):
            self.choosing |= names
        for tensor in results:
            if tensor.is_floating_point():
                self._scores[tensor] = names

    def _note_crossing(self, tensors: Sequence[torch.Tensor]) -> None:
        if self._running is None or self.crossing is not None:
            return
        visit = self.visits[self._running]
        for tensor in tensors:
            creator = self._creator.get(tensor)
            if creator not in (None, self._running) and not is_same(tensor, visit.value):
                self.crossing = visit.block, self.visits[creator].block


def token_ids(first: int = 3) -> torch.Tensor:
    """Ids [WINDOWS, TOKENS], all different, from `first` on; the lowest ids are often those of padding."""
    return torch.arange(first, first + WINDOWS * TOKENS).reshape(WINDOWS, TOKENS)


def is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same elements of the same memory."""
    return a is b or (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


def leaves(args: Any, kwargs: Any) -> Iterator[tuple[Path, torch.Tensor]]:
    """Every tensor in a call, and its place."""
    yield from _walk(("args",), args)
    yield from _walk(("kwargs",), kwargs)


def _walk(path: Path, value: Any) -> Iterator[tuple[Path, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _walk((*path, key), entry)
    elif isinstance(value, tuple | list):
        for index, entry in enumerate(value):
            yield from _walk((*path, index), entry)


def value_at(args: Any, kwargs: Any, path: Path) -> Any:
    """What is at a place in a call."""
    value = {"args": args, "kwargs": kwargs}
    for key in path:
        value = value[key]
    return value


def replace_at(args: Any, kwargs: Any, values: Mapping[Path, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call with other values in some places."""

    def replaced(path: Path, value: Any) -> Any:
        if path in values:
            return values[path]
        if not any(place[: len(path)] == path for place in values):
            return value
        if isinstance(value, Mapping):
            return {key: replaced((*path, key), entry) for key, entry in value.items()}
        return type(value)(replaced((*path, index), entry) for index, entry in enumerate(value))

    return replaced(("args",), args), replaced(("kwargs",), kwargs)


def _shape(value: Any) -> Any:
    return torch.empty(value.shape, device="meta") if isinstance(value, torch.Tensor) else value
