"""Where transformers' own rules put the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


def destinations(model: PreTrainedModel, names: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """For each stored tensor its name in the module tree, which may have no such place, and whether it is converted."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    targets = model.state_dict()
    places: dict[str, tuple[str, bool]] = {}
    for stored in names:
        name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, targets)
        if name not in targets and stored in targets:
            name, pattern = stored, None
        places[stored] = name, pattern is not None
    return places
