"""How a decoder is built, seen from its own forward pass (model.dry_pass): there is no table of architectures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from accullm_cli.errors import AccullmError
from accullm_cli.model.dry_pass import (
    TOKENS,
    WINDOWS,
    DryPass,
    Path,
    Returned,
    StandIns,
    Use,
    is_same,
    token_ids,
)
from accullm_cli.model.slots import LinearSlot

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Of the weights in blocks, so much may be left alone by text. The decoder of an encoder-decoder has a quarter or more
# in the attention to its encoder; what else is left alone (adapters, say) is far less.
_LARGEST_UNUSED = 0.1


@dataclass(frozen=True)
class BlockCall:
    """How a model calls one of its blocks.

    hidden: where it passes the hidden states. returned: how it gets them back.
    per_token: where it passes what depends on the tokens otherwise, such as embeddings of their own for each block.
    """

    hidden: Path
    returned: Returned
    per_token: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Structure:
    """How a decoder is built.

    blocks: their names, in the order they are called. calls: of each block. slots: each block's linear weights.
    unused: parameters that text does not reach, such as those of a vision tower.
    records: sentences about the matrices that are neither slots nor embedding or output head, and why.
    """

    blocks: tuple[str, ...]
    calls: tuple[BlockCall, ...]
    slots: tuple[tuple[LinearSlot, ...], ...]
    unused: frozenset[str]
    records: tuple[str, ...]


def read_structure(model: PreTrainedModel) -> Structure:
    """Find out how a decoder is built. Its weights are not read; the parameters may be on the meta device.

    Raises:
        AccullmError: its blocks cannot be run one after another on their own; says why.
    """
    with StandIns(model) as stand_ins:
        blocks = _find_blocks(model, stand_ins)
        seen = DryPass(model, stand_ins, blocks)
        seen.run(token_ids())
        _check_chain(model, blocks, seen)
        calls = _learn_calls(model, stand_ins, blocks, seen)
    slots, unused, records = _sort_matrices(model, blocks, seen)
    return Structure(tuple(blocks), calls, slots, unused, records)


def find_blocks(model: PreTrainedModel) -> list[str]:
    """The names of a decoder's blocks in order.

    Raises:
        AccullmError: as for `read_structure`.
    """
    return list(read_structure(model).blocks)


# -- blocks ------------------------------------------------------------------------------------------------


def _find_blocks(model: PreTrainedModel, stand_ins: StandIns) -> list[str]:
    """The children that are called for text of the ModuleList with most weights in such children.

    Raises:
        AccullmError: there is none, or another list has layers of its own.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    called: dict[int, None] = {}
    handles = [
        child.register_forward_pre_hook(lambda module, _: called.setdefault(id(module)))
        for module in lists.values()
        for child in module
    ]
    try:
        plain = DryPass(model, stand_ins)
        plain.run(token_ids())
    finally:
        for handle in handles:
            handle.remove()
    children = {
        name: [f"{name}.{child}" for child, block in module.named_children() if id(block) in called]
        for name, module in lists.items()
    }
    # Only what multiplies counts: a list of embeddings is none of layers.
    weights = {name: _count(stand_ins, plain.uses, blocks) for name, blocks in children.items()}
    best = max(weights, key=lambda name: weights[name], default="")
    where = type(model).__name__
    if not weights or not weights[best]:
        raise AccullmError("no list of decoder blocks with linear layers in this architecture", where)
    for name, count in weights.items():
        nested = any(f"{name}.".startswith(f"{block}.") for block in children[best]) or f"{best}.".startswith(
            f"{name}."
        )
        layered = any(not isinstance(model.get_submodule(child), nn.Linear) for child in children[name])
        if count and layered and not nested:
            raise AccullmError(
                f"its layers are in more than one list ({best} and {name}), which is not supported", where
            )
    order = {identity: number for number, identity in enumerate(called)}
    return sorted(children[best], key=lambda block: order[id(model.get_submodule(block))])


def _count(stand_ins: StandIns, names: Iterable[str], blocks: Sequence[str]) -> int:
    """The weights of those matrices that lie in blocks."""
    prefixes = tuple(f"{block}." for block in blocks)
    return sum(stand_ins.matrices[name].numel() for name in names if name.startswith(prefixes))


def _check_chain(model: PreTrainedModel, blocks: Sequence[str], seen: DryPass) -> None:
    """Refuse a model whose blocks are no chain: each called once, with what the one before returned and nothing else.

    Raises:
        AccullmError: says what is different.
    """
    where = type(model).__name__
    visited = [visit.block for visit in seen.visits]
    for block in blocks:
        if visited.count(block) > 1:
            what = f"block {block} runs {visited.count(block)} times for each token (a looped decoder)"
            raise AccullmError(f"{what}, which is not supported", where)
    for before, visit in pairwise(seen.visits):
        if not is_same(visit.value, Returned.of(before.output).take(before.output)):
            what = f"hidden states are changed between blocks {before.block} and {visit.block}"
            raise AccullmError(f"{what}, which is not supported", where)
    for visit in seen.visits:
        if visit.value.shape[:2] != (WINDOWS, TOKENS):
            what = f"block {visit.block} reads hidden states of shape {list(visit.value.shape)}"
            raise AccullmError(f"{what} for {WINDOWS} windows of {TOKENS} tokens, which is not supported", where)
    if seen.crossing:
        what = f"block {seen.crossing[0]} reads what block {seen.crossing[1]} computed beside its hidden states"
        raise AccullmError(f"{what}, which is not supported", where)


def _learn_calls(
    model: PreTrainedModel, stand_ins: StandIns, blocks: Sequence[str], seen: DryPass
) -> tuple[BlockCall, ...]:
    """How each block is called, and which values depend on the tokens: those that other ids change.

    Raises:
        AccullmError: a value depends on what earlier blocks computed, or is none for each token.
    """
    where = type(model).__name__
    returned = [Returned.of(visit.output) for visit in seen.visits]

    def run(first_id: int, seed: int) -> DryPass:
        generator = torch.Generator().manual_seed(seed)
        noise = lambda number, hidden: returned[number].wrap(torch.randn(hidden.shape, generator=generator))  # noqa: E731
        dry_pass = DryPass(model, stand_ins, blocks, noise)
        dry_pass.run(token_ids(first_id))
        return dry_pass

    base, other_states, other_ids = run(3, seed=1), run(3, seed=2), run(3 + WINDOWS * TOKENS, seed=1)
    calls = []
    for number, visit in enumerate(base.visits):
        drifted, changed = other_states.visits[number].leaves(), other_ids.visits[number].leaves()
        per_token = []
        for path, value in visit.leaves().items():
            if not _is_equal(value, drifted.get(path)):
                what = f"block {visit.block} is passed what earlier blocks computed ({_named(path)})"
                raise AccullmError(f"{what}, which is not supported", where)
            if not _is_equal(value, changed.get(path)):
                if value.shape[:2] != (WINDOWS, TOKENS):
                    what = f"block {visit.block} is passed {_named(path)} of shape {list(value.shape)}"
                    why = "which depends on the text but is not one value for each token; that is not supported"
                    raise AccullmError(f"{what}, {why}", where)
                per_token.append(path)
        calls.append(BlockCall(seen.visits[number].hidden, returned[number], tuple(per_token)))
    # The last product is the output head's.
    if not _is_equal(base.last_read, other_ids.last_read):
        raise AccullmError("its output reads more than what the last block returns, which is not supported", where)
    return tuple(calls)


def _named(path: Path) -> str:
    kind, *rest = map(str, path)
    return ".".join(rest) if kind == "kwargs" else f"argument {'.'.join(rest)}"


def _is_equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return (
        a is not None and b is not None and a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
    )


# -- matrices ----------------------------------------------------------------------------------------------


def _sort_matrices(
    model: PreTrainedModel, blocks: Sequence[str], seen: DryPass
) -> tuple[tuple[tuple[LinearSlot, ...], ...], frozenset[str], tuple[str, ...]]:
    """The linear weights of each block, the parameters that text does not use, and sentences on all other matrices."""
    slots: dict[str, list[LinearSlot]] = {block: [] for block in blocks}
    left: dict[str, tuple[str, int]] = {}
    used: set[str] = set()
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    outer = {id(parameter) for module in ends if module is not None for parameter in module.parameters()}
    # Tied parameters are watched under the first of their names; each is used where its own block uses it.
    names_of: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.dim() < 2:
            continue
        if id(parameter) in outer:
            used.add(name)
            continue
        watched, *others = names_of[id(parameter)]
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        visits = {blocks.index(block)} if others and block else {None, *range(len(blocks))}
        uses = {use for visit in visits for use in seen.uses.get(watched, {}).get(visit, ())}
        is_read = bool(visits & seen.read.get(watched, set()))
        module = model.get_submodule(name.rpartition(".")[0])
        reason = _why_left(parameter, module, block, uses, is_read, watched in seen.choosing)
        if reason != _UNUSED:
            used.add(name)
        if reason is not None:
            left[name] = reason, parameter.numel()
        elif block is not None:
            (use,) = uses
            assert use is not None
            slots[block] += _slots_of(name, name.removeprefix(f"{block}."), module, parameter, use)
    unused = frozenset(name for name, (reason, _) in left.items() if reason == _UNUSED)
    _check_used(model, blocks, unused)
    return tuple(tuple(slots[block]) for block in blocks), unused, _sentences(left, used)


_UNUSED = "not used for text"


def _why_left(
    parameter: torch.Tensor, module: nn.Module, block: str | None, uses: set[Use | None], is_read: bool, chooses: bool
) -> str | None:
    """Why a matrix is not rounded; None where it is a linear weight of a block.

    Args:
        uses: how it is multiplied. is_read: whether something else than a product reads it.
        chooses: whether its product is compared to choose by.
    """
    use = next(iter(uses)) if len(uses) == 1 else None
    if not uses and not is_read:
        return _UNUSED
    if isinstance(module, _CONVOLUTIONS):
        return "convolution"
    if chooses:
        return "router"
    if use is None or is_read:
        return "embedding" if isinstance(module, nn.Embedding) else "not multiplied as a linear layer"
    if block is None:
        return "outside of the blocks"
    is_linear = isinstance(module, nn.Linear | Conv1D)
    if is_linear != (use.count == 1) and not (parameter.dim() == 3 and parameter.shape[0] == use.count):
        return "no linear layer or stack of experts"
    if use.out_features == 1:
        return "gate"
    return None


def _slots_of(name: str, parameter_name: str, module: nn.Module, parameter: torch.Tensor, use: Use) -> list[LinearSlot]:
    shape = use.out_features, use.in_features
    if isinstance(module, nn.Linear | Conv1D):
        kind: Literal["conv1d", "linear"] = "conv1d" if isinstance(module, Conv1D) else "linear"
        return [LinearSlot(name.removesuffix(".weight"), parameter_name, kind, *shape, transposed=use.transposed)]
    return [
        LinearSlot(f"{name}.{number}", parameter_name, "expert", *shape, number, use.count, use.transposed)
        for number in range(use.count)
    ]


def _check_used(model: PreTrainedModel, blocks: Sequence[str], unused: frozenset[str]) -> None:
    """Refuse a decoder that is half of something else.

    Raises:
        AccullmError: a large part of the blocks' weights is not used for text.
    """
    prefixes = tuple(f"{block}." for block in blocks)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if name.startswith(prefixes)}
    idle = [name for name in sizes if name in unused]
    if sum(sizes[name] for name in idle) > _LARGEST_UNUSED * sum(sizes.values()):
        raise AccullmError(
            f"its blocks need more than text: {idle[0].removesuffix('.weight')} and others are not used without it",
            type(model).__name__,
            "decoder-only language models can be converted, not the decoder of an encoder-decoder",
        )


def _sentences(left: Mapping[str, tuple[str, int]], used: Iterable[str]) -> tuple[str, ...]:
    """One sentence for all matrices that are alike but for numbers in their names, or lie in one unused module."""
    busy = {name[:end] for name in used for end, character in enumerate(name) if character == "."}
    groups: dict[tuple[str, str], list[int]] = {}
    for name, (reason, weights) in left.items():
        place = name.removesuffix(".weight")
        if reason == _UNUSED:
            ends = [end for end, character in enumerate(name) if character == "."]
            place = next((name[:end] for end in ends if name[:end] not in busy), place)
        groups.setdefault((reason, re.sub(r"(?<=\.)\d+(?=\.|$)", "*", place)), []).append(weights)
    return tuple(
        f"kept as stored: {place} ({reason}; {sum(sizes):,} weights)" for (reason, place), sizes in groups.items()
    )
