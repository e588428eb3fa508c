"""Where transformers' own rules put the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


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
