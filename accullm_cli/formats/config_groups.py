"""`config_groups` in a config.json: which scheme each quantized module has, as its readers look it up.

A group lists targets: names of modules, regular expressions behind `re:` that match from a name's beginning, and names
of classes. A module has the scheme of the first target that matches it: exact names come first, then expressions, then
classes, each sorted; a target that is in two groups counts for the last. What `ignore` matches has none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accullm_cli.errors import AccullmError
from accullm_cli.formats.capabilities import WHOLE_ROWS
from accullm_cli.quant.plan import LinearPlan

FORMAT = "pack-quantized"
# Classes of modules, as groups name them.
LINEAR, EMBEDDING = "Linear", "Embedding"
# Schemes that a group may be named for instead of having one: integers, and what is computed is 16 bits.
_PRESET = re.compile(r"W([2-8])A16(_ASYM)?", re.IGNORECASE)
_PRESET_GROUP_SIZE = 128
_EXPRESSION = "re:"
# All experts of the model. Those in stacked parameters are no modules, so that readers look for this form of target.
EXPERTS = r"re:.*\.experts\.\d+\..*"


@dataclass(frozen=True, order=True)
class Scheme:
    """How the weights of a module are stored; group_size -1: one scale per output row."""

    bits: int
    group_size: int
    symmetric: bool

    @classmethod
    def of(cls, row: LinearPlan) -> Scheme:
        return cls(row.bits, row.group_size, row.symmetric)


def groups_of(targets: Mapping[Scheme, Iterable[str]]) -> dict[str, Any]:
    """The groups of a config.json, one for each scheme."""
    return {
        f"group_{number}": {
            "targets": [*names],
            "weights": {
                "num_bits": scheme.bits,
                "type": "int",
                "symmetric": scheme.symmetric,
                "strategy": "channel" if scheme.group_size == WHOLE_ROWS else "group",
                "group_size": None if scheme.group_size == WHOLE_ROWS else scheme.group_size,
                "dynamic": False,
                "actorder": None,
            },
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }
        for number, (scheme, names) in enumerate(targets.items())
    }


class Schemes:
    """The schemes of a quantization_config that another program may have written.

    Raises:
        AccullmError: something in it is not supported; says what.
    """

    def __init__(self, config: Mapping[str, Any], path: Path) -> None:
        """path: of the config.json, for messages."""
        self._path = path
        self._check_whole(config)
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise self._refusal("has no config_groups")
        found: dict[str, Scheme] = {}
        for name, group in groups.items():
            targets = group if isinstance(group, list) else group.get("targets") if isinstance(group, dict) else None
            if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
                raise self._refusal(f"{name} of config_groups names no targets")
            scheme = self._preset(name) if isinstance(group, list) else self._scheme(name, group, config)
            found |= dict.fromkeys(targets, scheme)
        self._by_target = dict(sorted(found.items()))
        self._ignored = dict.fromkeys(target for target in config.get("ignore") or [] if isinstance(target, str))
        for target in (*self._by_target, *self._ignored):
            try:
                re.compile(target.removeprefix(_EXPRESSION) if target.startswith(_EXPRESSION) else "")
            except re.error as error:
                raise self._refusal(f"has a target that is no regular expression ({target}: {error})") from None

    def find(self, name: str, class_name: str) -> Scheme:
        """The scheme of a module that is stored as codes.

        Args:
            class_name: LINEAR or EMBEDDING.

        Raises:
            AccullmError: none has this module for a target, or it is to be ignored.
        """
        if (matching := _first_match(name, class_name, self._by_target)) is None:
            raise self._refusal(f"no target in config_groups is {name}, which is stored as codes")
        if (ignored := _first_match(name, class_name, self._ignored)) is not None:
            raise self._refusal(f"ignores {name} ({ignored}), which is stored as codes")
        return self._by_target[matching]

    def _check_whole(self, config: Mapping[str, Any]) -> None:
        """What counts for all groups."""
        formats = config.get("format")
        if formats not in (FORMAT, "mixed-precision"):
            raise self._refusal(f"is in format {formats}, of which only {FORMAT} is supported")
        if config.get("quantization_status", "compressed") != "compressed":
            raise self._refusal(f"has the status {config['quantization_status']}, and only compressed is supported")
        if config.get("kv_cache_scheme"):
            raise self._refusal("quantizes the key-value cache, too, which is not supported")
        if config.get("transform_config"):
            raise self._refusal("transforms weights or activations, too, which is not supported")

    def _scheme(self, name: str, group: Mapping[str, Any], config: Mapping[str, Any]) -> Scheme:
        where = f"{name} of config_groups"
        if (stored := group.get("format") or config["format"]) != FORMAT:
            raise self._refusal(f"{where} is in format {stored}, of which only {FORMAT} is supported")
        for activations in ("input_activations", "output_activations"):
            if group.get(activations):
                raise self._refusal(f"{where} quantizes {activations.replace('_', ' ')}, which is not supported")
        weights = group.get("weights")
        if not isinstance(weights, dict):
            raise self._refusal(f"{where} says nothing of weights")
        bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
        if kind != "int" or bits not in range(2, 9):
            raise self._refusal(
                f"{where} has weights of {bits} bits ({kind}), and only integers of 2 to 8 are supported"
            )
        if weights.get("actorder") in (True, "group", "dynamic"):
            raise self._refusal(f"{where}: reordered inputs (actorder {weights['actorder']}) are not supported")
        size = weights.get("group_size")
        strategy = weights.get("strategy") or ("channel" if size in (None, WHOLE_ROWS) else "group")
        if strategy == "group" and isinstance(size, int) and size > 0:
            return Scheme(bits, size, bool(weights.get("symmetric", True)))
        if strategy == "channel":
            return Scheme(bits, WHOLE_ROWS, bool(weights.get("symmetric", True)))
        raise self._refusal(f"{where} has the strategy {strategy}, and only group and channel are supported")

    def _preset(self, name: str) -> Scheme:
        preset = _PRESET.fullmatch(name)
        if preset is None:
            raise self._refusal(f"{name} of config_groups is a scheme that is not supported")
        return Scheme(int(preset[1]), _PRESET_GROUP_SIZE, preset[2] is None)

    def _refusal(self, what: str) -> AccullmError:
        return AccullmError(what, self._path)


def _first_match(name: str, class_name: str, targets: Mapping[str, object]) -> str | None:
    """The first of sorted targets that a module has: its name, an expression that matches it, its class."""
    if name in targets:
        return name
    for target in targets:
        if target.startswith(_EXPRESSION) and re.match(target.removeprefix(_EXPRESSION), name):
            return target
    return class_name if class_name in targets else None
