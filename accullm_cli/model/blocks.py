"""A decoder whose blocks are in memory one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from accullm_cli.errors import AccullmError
from accullm_cli.model.ahead import sent_ahead
from accullm_cli.model.calls import Call, Layout, is_alike
from accullm_cli.model.dry_pass import Path, is_same, replace_at, value_at
from accullm_cli.model.shortcut import Shortcut
from accullm_cli.model.slots import CaptureInputs, InputIdentity
from accullm_cli.model.structure import Structure, find_blocks, read_structure
from accullm_cli.run import give_back_memory

__all__ = ["Decoder", "Trace", "Weights", "batches", "find_blocks"]

# Tokens that go through a block at once: enough for full speed of the matrix products, and few enough that their
# activations stay in the processor's cache. On a 135M Llama, two cores busy with other work too, 512 tokens took about
# a third of the time that 4096 took, token for token.
TOKENS_PER_BATCH = 512


# What runs in place of a block: (index, hidden states, args, kwargs) of a call to hidden states.
_StandIn = Callable[[int, torch.Tensor, tuple[Any, ...], dict[str, Any]], torch.Tensor]


class _EnoughError(Exception):
    """Ends a forward pass once everything wanted from it is there."""


@dataclass(frozen=True)
class Trace:
    """How a block uses its linears, as found by running it.

    steps: in the order the block computes them; a step is a list of groups, a group the names that read one input. A
        dense block's steps have one group each; a step of experts has a group for each expert.
    summed: the linears whose output is added to a tensor of its shape, as to the residual stream.
    """

    steps: tuple[tuple[tuple[str, ...], ...], ...]
    summed: frozenset[str]


class Weights(Protocol):
    """Where a decoder's weights come from: a checkpoint, or an artifact."""

    def load(self, prefixes: Iterable[str]) -> None:
        """Put every parameter under these module names into the model."""
        ...

    def load_outside(self, blocks: Iterable[str], without: Container[str] = frozenset()) -> None:
        """Put every parameter outside the given blocks into the model, but those in `without`."""
        ...

    def warm(self, prefix: str, device: torch.device) -> None:
        """A hint that `load` will be asked for this module next, for a device."""
        ...

    def release(self, prefix: str) -> None:
        """Take the parameters of one module out of the model."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype of a parameter, by its full name."""
        ...


class Decoder:
    """A decoder-only model. Streams of hidden states are float32 [windows, tokens, features]; token ids int64.

    It computes on one device: what it is given is sent there, and what comes out is left there.

    Where blocks are passed more that depends on the tokens, that lies behind the hidden states in a stream's features.

    `load_outside()` must come before `embed` and `logits`. Between those, `release_outside()` makes room for blocks:
    with large vocabularies embedding and head weigh as much as several.

    Args:
        model: the skeleton, with parameters on the meta device.
        weights: what fills it.
        structure: of the model, where that is known.
        device: where it computes; by default where torch makes tensors.
        together: tokens that go through a block at once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        weights: Weights,
        structure: Structure | None = None,
        device: torch.device | None = None,
        together: int = TOKENS_PER_BATCH,
    ) -> None:
        self.model = model
        self.device = device or torch.get_default_device()
        self._together = together
        self.weights = weights
        self.structure = structure or read_structure(model)
        self.block_names = list(self.structure.blocks)
        self.slots = [list(slots) for slots in self.structure.slots]
        inside = tuple(f"{name}." for name in self.block_names)
        # The parameters outside the blocks as they were before loading, to return to.
        self._unloaded = {
            name: parameter
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if not name.startswith(inside)
        }
        self._calls: dict[tuple[int, int], list[Call]] = {}
        self._layout: Layout | None = None

    # -- weights -------------------------------------------------------------------------------------------

    def load_outside(self) -> None:
        """Read embeddings, final norm and output head, in float32."""
        self.weights.load_outside(self.block_names, self.structure.unused)
        # What text does not reach takes no memory, but lies where the rest does: models ask their first parameter.
        for name in self.structure.unused.intersection(self._unloaded):
            module_name, _, attribute = name.rpartition(".")
            idle = torch.zeros((), device=self.device).expand(self._unloaded[name].shape)
            setattr(self.model.get_submodule(module_name), attribute, nn.Parameter(idle, requires_grad=False))
        self.model.tie_weights()
        sent: dict[int, nn.Parameter] = {}
        for name in self._unloaded:
            module_name, _, attribute = name.rpartition(".")
            parameter = self.model.get_parameter(name)
            if parameter.device.type != "meta" and name not in self.structure.unused:
                if id(parameter) not in sent:
                    sent[id(parameter)] = nn.Parameter(parameter.data.to(self.device).float(), requires_grad=False)
                setattr(self.model.get_submodule(module_name), attribute, sent[id(parameter)])
        for module in self.model.modules():
            for attribute, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type != "meta":
                    module._buffers[attribute] = buffer.to(self.device)
        self.model.tie_weights()

    def release_outside(self) -> None:
        """Drop what `load_outside` read."""
        for name, parameter in self._unloaded.items():
            module_name, _, attribute = name.rpartition(".")
            setattr(self.model.get_submodule(module_name), attribute, parameter)

    def load_block(self, index: int, step: int = 1) -> nn.Module:
        """Read one block, in float32 (which holds every 16-bit value exactly), and begin to fetch the next one.

        Args:
            step: to the number of the next one; -1 on the way back.
        """
        self.weights.load([self.block_names[index]])
        # What was read of it gives way to what is read of the next one.
        block = self._block(index).to(self.device)
        if 0 <= index + step < len(self.block_names):
            self.weights.warm(self.block_names[index + step], self.device)
        block = block.float().requires_grad_(False)
        give_back_memory()
        return block

    def release_block(self, index: int) -> None:
        self.weights.release(self.block_names[index])

    # -- forward passes ------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """What goes into the first block, for token ids [windows, tokens].

        Raises:
            AccullmError: the model passes other values to its blocks than for the windows before.
        """
        calls: list[Call] = []
        values: list[torch.Tensor] = []

        def record(index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
            shape = self.structure.calls[index]
            if index == 0:
                values.append(hidden)
            extras: dict[Path, int] = {}
            for path in shape.per_token:
                value = value_at(args, kwargs, path)
                # Often one tensor for all blocks.
                extras[path] = next((n for n, other in enumerate(values) if n and is_same(value, other)), len(values))
                if extras[path] == len(values):
                    values.append(value)
            calls.append(Call(*replace_at(args, kwargs, dict.fromkeys([shape.hidden, *extras])), extras))
            if index == len(self.block_names) - 1:
                raise _EnoughError
            return hidden

        self._run_shell(ids.to(self.device), record)
        layout = Layout.of(values)
        self._layout = self._layout or layout
        known = self._calls.setdefault((ids.shape[0], ids.shape[1]), calls)
        if layout != self._layout or not all(is_alike(a, b) for a, b in zip(known, calls, strict=True)):
            raise AccullmError(
                "passes values to its blocks that depend on the text in a way that is not supported",
                type(self.model).__name__,
            )
        return layout.join(values).detach().clone()

    def states(self, stream: torch.Tensor) -> torch.Tensor:
        """The hidden states alone of a stream, as a view that may be written to."""
        assert self._layout is not None
        return stream[..., : self._layout.features]

    def embed_all(self, ids: torch.Tensor) -> torch.Tensor:
        """As `embed`, for any number of windows, some of them at a time; [windows, tokens, hidden], written once.

        It lies where the ids do; beside a GPU in pinned memory, which that reads at full speed.
        """
        hidden = torch.zeros(0, ids.shape[1], 1)
        for rows in self.batches(ids):
            part = self.embed(ids[rows])
            if not rows.start:
                pinned = part.is_cuda and not ids.is_cuda
                hidden = torch.empty(len(ids), *part.shape[1:], dtype=part.dtype, device=ids.device, pin_memory=pinned)
            hidden[rows] = part
        return hidden

    def forget_calls(self) -> None:
        """Let go of what the model passes to its blocks for windows of the shapes so far: of many lengths, the masks
        and rotary positions of each would add up."""
        self._calls.clear()

    def learn_calls(self, ids: torch.Tensor) -> None:
        """Find out what the model passes to its blocks for batches of these windows [windows, tokens].

        `embed` does that, too; this is for windows whose hidden states are there already.
        """
        rows = self.batches(ids)
        for some in rows[:1] + rows[1:][-1:]:  # the last batch may be a smaller one
            self.embed(ids[some])

    def batches(self, stream: torch.Tensor) -> list[slice]:
        """Slices of the windows of a stream, or of ids [windows, tokens], that go through a block at once."""
        return batches(stream.shape[0], stream.shape[1], self._together)

    def sent(self, stream: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """`batches` with what they hold, on the device; see `sent_ahead`."""
        rows = self.batches(stream)
        yield from zip(rows, sent_ahead((stream[some] for some in rows), self.device), strict=True)

    def run(
        self,
        index: int,
        block: nn.Module,
        hidden: torch.Tensor,
        known: Mapping[str, torch.Tensor] | None = None,
        filler: float = 0.0,
    ) -> torch.Tensor:
        """The output of block `index` with the weights of `block`; with gradients if `hidden` asks for them.

        Args:
            known: what these linears read, [T, K], where that need not be computed again: see `shortcuts`.
            filler: in place of what is then not computed.
        """
        assert self._layout is not None
        call, shape = self._calls[hidden.shape[0], hidden.shape[1]][index], self.structure.calls[index]
        states, *extras = self._layout.split(hidden.to(self.device))
        values = {path: extras[number - 1] for path, number in call.extras.items()}
        args, kwargs = replace_at(call.args, call.kwargs, {shape.hidden: states, **values})
        shortcut = Shortcut(block, self.slots[index], known, filler) if known else nullcontext()
        with torch.set_grad_enabled(hidden.requires_grad), shortcut:
            output = shape.returned.take(block(*args, **kwargs))
            return self._layout.join([output, *extras])

    def run_capturing(
        self,
        index: int,
        block: nn.Module,
        hidden: torch.Tensor,
        on_input: Callable[[str, torch.Tensor], None],
        on_sum: Callable[[str, torch.Tensor], None] | None = None,
        last: frozenset[tuple[str, str]] = frozenset(),
        on_gradient: Callable[[str, torch.Tensor, torch.Tensor], None] | None = None,
        known: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor | None:
        """As `run`, calling `on_input(name, x [..., K])` for each product of an input with a linear's weight.

        Args:
            on_sum: is called with (name, sum [..., N]) where a linear's output is added to a tensor of its shape.
            on_gradient: is called in a backward pass with (name, g [..., N], x [..., K]), the gradient of each product
                and its input.
            last: pairs of "input" or "sum" and a linear's name; stop as soon as all of these were seen. The result is
                then None.
            known: as for `run`; of products that are not computed nothing is told.
        """
        waiting = set(last)

        def watched(kind: str, tell: Callable[[str, torch.Tensor], None]) -> Callable[[str, torch.Tensor], None]:
            def seen(name: str, value: torch.Tensor) -> None:
                tell(name, value)
                if waiting:
                    waiting.discard((kind, name))
                    if not waiting:
                        raise _EnoughError

            return seen

        try:
            on_sum = None if on_sum is None else watched("sum", on_sum)
            with CaptureInputs(block, self.slots[index], watched("input", on_input), on_sum, on_gradient):
                return self.run(index, block, hidden, known)
        except _EnoughError:
            return None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [windows, tokens, vocabulary] for the last block's output; with gradients if it asks for them."""

        with torch.set_grad_enabled(hidden.requires_grad):
            output = self._run_shell_behind(hidden)
        assert output is not None
        return output.logits

    @torch.no_grad()
    def head_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the output head reads, [windows, tokens, K], for the last block's output."""
        read: list[torch.Tensor] = []

        def stop(head: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            read.append(args[0])
            raise _EnoughError

        handle = self.model.get_output_embeddings().register_forward_pre_hook(stop)
        try:
            self._run_shell_behind(hidden)
        finally:
            handle.remove()
        return read[0]

    def trace(self, index: int, block: nn.Module, hidden: torch.Tensor) -> Trace:
        """Which linears of a block share an input, and whose outputs enter a sum, found by running it.

        Raises:
            AccullmError: a linear that the block does not use as one.
        """
        identity = InputIdentity()
        slot_of = {slot.name: slot for slot in self.slots[index]}
        readers: dict[tuple[object, ...], list[str]] = {}

        def note(name: str, value: torch.Tensor) -> None:
            names = readers.setdefault(identity.key(value), [])
            if name not in names:
                names.append(name)

        summed: set[str] = set()
        self.run_capturing(index, block, hidden, note, lambda name, _: summed.add(name))
        steps: list[tuple[tuple[str, ...], ...]] = []
        stacks_done: set[str] = set()
        for names in readers.values():
            if slot_of[names[0]].expert is None:
                steps.append((tuple(names),))
                continue
            # What one expert shows holds for all of the stack, also for those that no token reached.
            stacks = [slot_of[name].parameter for name in names]
            if stacks[0] in stacks_done:
                continue
            stacks_done.update(stacks)
            members: dict[int, list[str]] = {}
            for slot in self.slots[index]:
                if slot.parameter in stacks and slot.expert is not None:
                    members.setdefault(slot.expert, []).append(slot.name)
            steps.append(tuple(tuple(group) for group in members.values()))
        found = {name for step in steps for group in step for name in group}
        unseen = [name for name in slot_of if name not in found]
        if unseen:
            raise AccullmError("is not used as a linear layer; the architecture is not supported", unseen[0])
        # Which rows an expert's output is added to depends on the routing.
        dense = {name for name in summed if slot_of[name].expert is None}
        return Trace(tuple(steps), frozenset(dense))

    def shortcuts(self, index: int, block: nn.Module, hidden: torch.Tensor, trace: Trace) -> tuple[str, ...]:
        """The linears at whose inputs a run of the block can begin, in the order the block computes them.

        With the inputs of the first n of them known, for any n, no other product that the block computes before the
        last of these enters its output: attention and MLP of most decoders come back to the residual stream through
        one linear each. It is found out by poisoning all others.
        """
        inputs: dict[str, torch.Tensor] = {}

        def keep(name: str, value: torch.Tensor) -> None:
            inputs[name] = value.reshape(-1, value.shape[-1]).clone()

        output = self.run_capturing(index, block, hidden, keep)
        assert output is not None
        found: dict[str, torch.Tensor] = {}
        before: tuple[str, ...] = ()
        for step in trace.steps:
            (group, *experts), skips = step, bool(before) and before[0] not in found
            before = group
            if len(group) > 1 or experts or not skips:
                continue
            tried = {**found, group[0]: inputs[group[0]]}
            if torch.equal(self.run(index, block, hidden, tried, filler=math.nan), output):
                found = tried
        return tuple(found)

    # -- the model around the blocks -----------------------------------------------------------------------

    def _block(self, index: int) -> nn.Module:
        return self.model.get_submodule(self.block_names[index])

    def _run_shell(self, ids: torch.Tensor, stand_in: _StandIn) -> Any:
        """Run the model with `stand_in` in place of each block; None where it stopped."""
        with self._replaced_blocks(stand_in):
            try:
                return self.model(input_ids=ids, use_cache=False)
            except _EnoughError:
                return None

    def _run_shell_behind(self, stream: torch.Tensor) -> Any:
        """As `_run_shell`, from the last block's output on."""
        assert self._layout is not None
        states = self._layout.split(stream.to(self.device))[0]
        ids = torch.zeros(stream.shape[:2], dtype=torch.int64, device=self.device)
        return self._run_shell(ids, lambda index, hidden, args, kwargs: states)

    @contextmanager
    def _replaced_blocks(self, stand_in: _StandIn) -> Iterator[None]:
        blocks = [self._block(index) for index in range(len(self.block_names))]

        def replacement(index: int) -> Callable[..., Any]:
            shape = self.structure.calls[index]

            def forward(*args: Any, **kwargs: Any) -> Any:
                return shape.returned.wrap(stand_in(index, value_at(args, kwargs, shape.hidden), args, kwargs))

            return forward

        for index, block in enumerate(blocks):
            block.forward = replacement(index)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward


def batches(windows: int, tokens: int, together: int = TOKENS_PER_BATCH) -> list[slice]:
    """Slices of windows that go through a block at once, of about `together` tokens."""
    size = max(1, together // tokens)
    return [slice(start, min(start + size, windows)) for start in range(0, windows, size)]
