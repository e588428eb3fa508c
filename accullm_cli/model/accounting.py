"""Every tensor of a checkpoint is used, kept, or named in a record: what is done with those that the model has no place
for, and with tied weights that are stored twice. It is decided from names, and from the values of small tensors.

- What hangs inside a module that runs changes what the model computes: it is refused. Three kinds do not: what
  transformers itself ignores or computes, biases of zeros, and scales of ones.
- What hangs beside the blocks (layers of multi-token prediction, value and reward heads, towers for images and sound)
  is not run by a causal language model: it travels as it is.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from accullm_cli.errors import AccullmError
from accullm_cli.model.integrity import TensorInfo, read_rows, read_tensor
from accullm_cli.model.names import Destination, destinations
from accullm_cli.model.skeleton import build_skeleton
from accullm_cli.model.structure import find_blocks
from accullm_cli.units import size

# Values of two tensors that are compared at once.
_CHUNK = 1 << 22

# Parts of names that peft gives to what it trains (lora, ia3, vera, oft, ...) and to the layers that it wraps.
_ADAPTER = re.compile(
    r"(^|\.)(lora_\w+|base_layer|modules_to_save|original_module|ia3_\w+|vera_\w+|hada_\w+|lokr_\w+)(\.|$)"
)
_UNMERGED = ("is part of an adapter", "merge the adapter into the weights first (peft: merge_and_unload)")
# Names of what hangs beside the blocks of published checkpoints and is not run for the next token's distribution.
_SIDE_BRANCH = re.compile(
    r"mtp|nextn|medusa|eagle|hydra|talker|visual|vision|image|video|audio|speech|code2wav|token2wav|mm_projector"
    r"|multi_modal|^(v|value|reward|score|critic|classifier|cls|qa_outputs|regression|summary)(_?head)?s?$"
)
# Buffers that older versions of transformers stored: constants of rotary embeddings, positions, a mask's value.
_FORMER_BUFFER = re.compile(
    r"rotary_emb\.(original_)?(inv_freq|cos_cached|sin_cached)$|rope\.freqs$|(^|\.)(position_ids|masked_bias)$"
)
# Configuration keys that say how many layers of multi-token prediction follow the decoder's own.
_EXTRA_LAYER_KEYS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_num_layers")


# In the sentence of a record, what becomes of it.
KEPT, LEFT_OUT = "kept in the artifact as stored", "left out of the artifact"


@dataclass(frozen=True)
class Accounting:
    """What becomes of the tensors that the model has no place for.

    config: config.json, which ties nothing where `untied`.
    untied: config.json ties weights that are stored with different values: all of them are used as they are stored.
    kept: checkpoint names of what goes into the artifact as it is.
    records: a sentence for each kind that was kept, left out or untied.
    """

    config: Mapping[str, Any]
    untied: bool
    kept: tuple[str, ...]
    records: tuple[str, ...]


def account(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Accounting:
    """Decide about every stored tensor; reads headers, tied pairs, and biases that have no place.

    Raises:
        AccullmError: a tensor without a place changes what the model computes; two tensors of one parameter differ.
    """
    model = build_skeleton(directory)
    places = destinations(model, tensors)
    _check_doubles(directory, model, places, tensors)
    untied = _untied_pair(directory, model, places, tensors)
    records = []
    if untied is not None:
        target, source = untied
        records.append(
            f"config.json ties {target} to {source}, but the checkpoint stores other values for it: they are used, and "
            "the artifact's config.json says tie_word_embeddings false"
        )
        config = _without_ties(config)
    judged = _Judge(model, {stored: place.name for stored, place in places.items()}, directory, tensors)
    records += judged.records()
    return Accounting(config, untied is not None, tuple(judged.kept), tuple(records))


# -- tied weights, and tensors that are stored twice -------------------------------------------------------


def _check_doubles(
    directory: Path,
    model: PreTrainedModel,
    places: Mapping[str, Destination],
    tensors: Mapping[str, TensorInfo],
) -> None:
    """Refuse two tensors of different values for one parameter (with and without the base model's prefix)."""
    targets = model.state_dict()
    first_of: dict[str, str] = {}
    for stored, (place, converted, _) in places.items():
        if converted or place not in targets:
            continue
        first = first_of.setdefault(place, stored)
        if first != stored and not _same_values(tensors, first, stored):
            raise AccullmError(
                f"tensors {first} and {stored} are one parameter of {type(model).__name__}, but hold different values",
                directory,
                "delete the one that is not meant",
            )


def _untied_pair(
    directory: Path,
    model: PreTrainedModel,
    places: Mapping[str, Destination],
    tensors: Mapping[str, TensorInfo],
) -> tuple[str, str] | None:
    """The first tied parameter, and what it is tied to, that are stored with different values; None where none are.

    Raises:
        AccullmError: others are tied as well and not stored, so that they cannot be untied.
    """
    ties = model.all_tied_weights_keys
    stored_as = {place.name: stored for stored, place in places.items()}
    for target, source in ties.items():
        if target not in stored_as or source not in stored_as:
            continue
        if _same_values(tensors, stored_as[target], stored_as[source]):
            continue
        for other in {*ties.keys(), *ties.values()}:
            if other not in stored_as:
                raise AccullmError(
                    f"tensor {target} differs from {source}, to which config.json ties it, while {other} is not stored",
                    directory,
                    "delete the one that is not meant, or store all and set tie_word_embeddings to false",
                )
        return target, source
    return None


def _same_values(tensors: Mapping[str, TensorInfo], first: str, second: str) -> bool:
    """Whether two stored tensors hold the same values; they are read a part at a time."""
    one, other = tensors[first], tensors[second]
    if one.shape != other.shape:
        return False
    rows = max(1, _CHUNK // max(1, math.prod(one.shape[1:])))
    if not one.shape:
        return torch.equal(read_tensor(one).float(), read_tensor(other).float())
    return all(
        torch.equal(read_rows(one, start, start + rows).float(), read_rows(other, start, start + rows).float())
        for start in range(0, one.shape[0], rows)
    )


def _without_ties(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with tie_word_embeddings false, in the parts for text and others, too."""
    content = copy.deepcopy(dict(config))
    content["tie_word_embeddings"] = False
    for key, part in content.items():
        if isinstance(part, dict) and (key == "text_config" or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    return content


# -- tensors without a place -------------------------------------------------------------------------------


class _Judge:
    """Sorts the tensors that a model has no place for. `kept` and `left_out` are checkpoint names by their reason."""

    def __init__(
        self,
        model: PreTrainedModel,
        places: Mapping[str, str],
        directory: Path,
        tensors: Mapping[str, TensorInfo],
    ) -> None:
        self.model = model
        self.directory = directory
        self.tensors = tensors
        blocks = find_blocks(model)
        self._list = blocks[0].rpartition(".")[0]
        self._blocks = len(blocks)
        self._buffers = {name for name, _ in model.named_buffers()}
        self._ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
        base = model.base_model_prefix
        self._has_prefix = bool(base) and any(stored.startswith(f"{base}.") for stored in places)
        targets = model.state_dict()
        homeless = {stored: place for stored, place in places.items() if place not in targets}
        self._matrices = {place.split(".")[0] for stored, place in homeless.items() if len(tensors[stored].shape) > 1}
        self.kept: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        refused: dict[str, tuple[str, str]] = {}
        for stored, place in homeless.items():
            self._judge(stored, place, refused)
        self._refuse(refused)

    def records(self) -> Iterator[str]:
        """A sentence for each group of tensors that were kept or left out."""
        name = type(self.model).__name__
        for branch, members in _grouped(self.kept).items():
            amount = size(sum(self.tensors[member].end - self.tensors[member].begin for member in members))
            yield f"{name} does not run {branch}: {_counted(members)} {KEPT}, {amount}"
        for reason, members in _grouped(self.left_out).items():
            yield f"{members[0]}{_more(members)} left out: {reason}"

    def _judge(self, stored: str, place: str, refused: dict[str, tuple[str, str]]) -> None:
        """Put one tensor into `kept`, `left_out` or `refused`."""
        owner, rest = self._deepest_module(place)
        ignored = any(pattern.search(place) for pattern in self._ignored)
        if _ADAPTER.search(place):
            refused[stored] = (
                "is part of an adapter",
                "merge the adapter into the weights first (peft: merge_and_unload)",
            )
        elif owner == self._list and rest[0].isdigit():
            self._judge_layer(stored, int(rest[0]), ignored, refused)
        elif self._is_beside_blocks(owner, rest, ignored):
            self.kept[stored] = ".".join(part for part in (owner, rest[0]) if part)
        elif ignored or self._is_computed(stored, place):
            self.left_out[stored] = f"{type(self.model).__name__} computes it or does not use it"
        elif (reason := self._without_effect(stored, rest)) is not None:
            self.left_out[stored] = reason
        else:
            refused[stored] = (
                f"has no place in {type(self.model).__name__} as config.json describes it",
                self._hint(rest),
            )

    def _judge_layer(self, stored: str, index: int, ignored: bool, refused: dict[str, tuple[str, str]]) -> None:
        """A tensor of a layer beyond the last one: multi-token prediction, or else config.json was cut."""
        config = self.model.config.get_text_config()
        counts = [getattr(config, key, 0) for key in _EXTRA_LAYER_KEYS]
        extra = max(count for count in counts if isinstance(count, int))
        if ignored or index < self._blocks + extra:
            self.kept[stored] = f"{self._list}.{index}"
            return
        refused[stored] = (
            f"belongs to layer {index}, but config.json makes {self._blocks} layers",
            "correct config.json, or take it and the weights from one place",
        )

    def _deepest_module(self, place: str) -> tuple[str, list[str]]:
        """The innermost module on the way to a name, and the rest of the name."""
        module: nn.Module = self.model
        parts = place.split(".")
        depth = 0
        while depth < len(parts) - 1 and parts[depth] in module._modules:
            child = module._modules[parts[depth]]
            if child is None:
                break
            module = child
            depth += 1
        return ".".join(parts[:depth]), parts[depth:]

    def _is_beside_blocks(self, owner: str, rest: list[str], ignored: bool) -> bool:
        """Whether a tensor belongs to a module of its own that hangs where the list of blocks does, or further out."""
        if owner == self._list or (owner and not self._list.startswith(f"{owner}.")):
            return False
        is_module = len(rest) > 1
        # Beside the base model there are heads alone; what has no matrix is none.
        is_head = is_module and not owner and self._has_prefix and rest[0] in self._matrices
        return (is_module and ignored) or is_head or bool(_SIDE_BRANCH.search(rest[0]))

    def _is_computed(self, stored: str, place: str) -> bool:
        """Whether a tensor is a buffer that the class makes by itself, or made in earlier versions."""
        shape = self.tensors[stored].shape
        is_mask = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
        return place in self._buffers or is_mask or bool(_FORMER_BUFFER.search(place))

    def _without_effect(self, stored: str, rest: list[str]) -> str | None:
        """Why a tensor of a module that runs changes nothing; None where it may change something."""
        if len(rest) > 1 or len(self.tensors[stored].shape) != 1 or rest[0] not in ("bias", "weight"):
            return None
        values = read_tensor(self.tensors[stored]).float()
        if rest[0] == "bias" and not bool(values.any()):
            return "a bias of zeros changes nothing"
        # A norm whose class has no weight; some keep it as its difference to one.
        if rest[0] == "weight" and (bool((values == 1).all()) or not bool(values.any())):
            return "a scale by one changes nothing"
        return None

    def _hint(self, rest: list[str]) -> str:
        config = self.model.config.get_text_config().to_dict()
        flags = [key for key, value in config.items() if "bias" in key and value is False] if rest == ["bias"] else []
        if flags:
            return f"if the model was made with it, set {' or '.join(flags)} to true in config.json; else delete it"
        return "correct config.json if the model was made with it; else delete it from the checkpoint"

    def _refuse(self, refused: Mapping[str, tuple[str, str]]) -> None:
        if not refused:
            return
        # Where there is an adapter, it may have renamed everything else.
        verdict = _UNMERGED if _UNMERGED in refused.values() else next(iter(refused.values()))
        names = [stored for stored, reason in refused.items() if reason == verdict]
        raise AccullmError(f"tensor {names[0]}{_more(names)} {verdict[0]}", self.directory, verdict[1])


def _grouped(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for stored, reason in reasons.items():
        groups.setdefault(reason, []).append(stored)
    return groups


def _counted(names: list[str]) -> str:
    return f"{len(names):,} tensors" if len(names) > 1 else f"tensor {names[0]}"


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1:,} more)" if len(names) > 1 else ""
