"""Where transformers' own rules put the tensors of a checkpoint, and what it calls them when it saves one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    rename_source_key,
    revert_weight_conversion,
)

from accullm_cli.model.slots import LinearSlot


class Destination(NamedTuple):
    """Where a stored tensor goes.

    name: in the module tree, which may have no such place. is_converted: it is cut, joined or re-ordered on the way.
    others: what else is made of it, of a conversion with several results.
    """

    name: str
    is_converted: bool
    others: tuple[str, ...] = ()


def destinations(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Destination]:
    """The destination of each stored tensor."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    converter_of = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    targets = model.state_dict()
    places: dict[str, Destination] = {}
    for stored in names:
        name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, targets)
        if name not in targets and stored in targets:
            name, pattern = stored, None
        if pattern is None:
            places[stored] = Destination(name, False)
            continue
        first, *others = converter_of[pattern].target_patterns
        places[stored] = Destination(name, True, tuple(name.replace(first, other) for other in others))
    return places


def checkpoint_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """What tensors of the module tree are called in checkpoints, of those alone that have another name there.

    One that is converted on the way (cut, joined, stacked) keeps its name in the tree, which transformers reads, too.
    """
    rules = [rule for rule in get_model_conversion_mapping(model, add_legacy=False) if not _is_prefix(rule)]
    reverse = [rule.reverse_transform() for rule in reversed(rules)]
    renamings = [rule for rule in reverse if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in reverse if isinstance(rule, WeightConverter)]
    renamed = {}
    for name in names:
        if apply_converters(name, converters)[1] is None and (other := apply_renamings(name, renamings)) != name:
            renamed[name] = other
    places = destinations(model, renamed.values())
    return {name: other for name, other in renamed.items() if places[other] == Destination(name, False)}


def checkpoint_modules(model: PreTrainedModel, modules: Iterable[str]) -> dict[str, str]:
    """The same of modules with a weight, where what belongs to it (scales) is renamed with it."""
    modules = tuple(modules)
    companions = ("weight", "weight_scale")
    renamed = checkpoint_names(model, [f"{module}.{companion}" for module in modules for companion in companions])
    found = {}
    for module in modules:
        names = {renamed.get(f"{module}.{companion}", "").removesuffix(f".{companion}") for companion in companions}
        if len(names) == 1 and (name := names.pop()):
            found[module] = name
    return found


def expert_names(model: PreTrainedModel, block: str, slots: Iterable[LinearSlot]) -> dict[str, tuple[str, ...]]:
    """For each slot that is an expert, the names of the linears in a checkpoint that its rows are, in order.

    Where transformers saves the experts of a parameter otherwise (all in one, rows in another order), they are not in
    here.

    Args:
        block: that the slots are in.
    """
    found: dict[str, tuple[str, ...]] = {}
    stacks: dict[str, list[LinearSlot]] = {}
    for slot in slots:
        if slot.expert is not None:
            stacks.setdefault(slot.parameter, []).append(slot)
    for parameter, experts in stacks.items():
        found |= _parts(model, f"{block}.{parameter}", experts)
    return found


def _parts(model: PreTrainedModel, parameter: str, experts: list[LinearSlot]) -> dict[str, tuple[str, ...]]:
    """The names that the rows of each expert are saved by: a parameter that holds its own places is saved."""
    rows = experts[0].out_features
    places = torch.arange(len(experts) * rows).view(len(experts), rows, 1)
    if model.get_parameter(parameter).dim() != 3:
        return {}
    saved = revert_weight_conversion(model, {parameter: places.mT if experts[0].transposed else places})
    named: dict[int, str] = {}
    for name, part in saved.items():
        first = int(part.flatten()[0])
        owner, _, last = name.rpartition(".")
        in_order = torch.equal(part, torch.arange(first, first + len(part)).view(-1, 1))
        if last != "weight" or not in_order or ".experts." not in owner:
            return {}
        named[first] = owner
    each = [sorted(first for first in named if first // rows == number) for number in range(len(experts))]
    count = len(each[0])
    if not count or any(first % (rows // count) for first in named) or any(len(firsts) != count for firsts in each):
        return {}
    return {slot.name: tuple(named[first] for first in firsts) for slot, firsts in zip(experts, each, strict=True)}


def _is_prefix(rule: object) -> bool:
    """Whether a rule adds or removes a prefix: a checkpoint may have it or not."""
    return isinstance(rule, PrefixChange)
