"""Two artifacts side by side, or an artifact and a plain checkpoint, without running either."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.formats import artifact_format, open_artifact, refuse_unknown_quantization
from accullm_cli.formats.shards import TensorFiles
from accullm_cli.formats.stored import StoredArtifact
from accullm_cli.measure.result import Estimate
from accullm_cli.measure.statistics import paired_difference


@dataclass(frozen=True)
class Side:
    """One of the two.

    bits_per_weight: of the linears that either artifact has, as far as this side has them.
    """

    path: str
    format: str  # "checkpoint" for a plain model
    bits_per_weight: float | None
    tensor_bytes: int


@dataclass(frozen=True)
class FigureComparison:
    """One figure that validation recorded for either.

    a, b: None where it did not.
    difference: A's minus B's unit by unit (window, task item), where both were measured on the same.
    """

    figure: str
    a: Estimate | None
    b: Estimate | None
    difference: Estimate | None


@dataclass(frozen=True)
class LinearDifference:
    """One linear, or an embedding that either has quantized, in both.

    relative_difference: ||Wa - Wb|| / ||Wb|| (Frobenius) of the dequantized weights in float32.
    """

    name: str
    bits_per_weight_a: float
    bits_per_weight_b: float
    relative_difference: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    unmatched: linears and embeddings that only one side has.
    exceeded: a sentence for each limit that is not kept.
    """

    a: Side
    b: Side
    figures: tuple[FigureComparison, ...]
    linears: tuple[LinearDifference, ...]
    unmatched: tuple[str, ...]
    exceeded: tuple[str, ...]


def compare(a: Path, b: Path, max_mean_kl: float | None = None) -> Comparison:
    """Compare artifact `a` with artifact or original `b`.

    Args:
        max_mean_kl: limit in nats for the recorded mean KL of both (of `a` where `b` is a plain checkpoint).

    Raises:
        AccullmError: neither is an artifact; one is damaged; a limit is given and there is no recorded fidelity.
    """
    first, second = _open(a), _open(b)
    artifacts = [side for side in (first, second) if isinstance(side, StoredArtifact)]
    if not artifacts:
        raise AccullmError("neither this nor the other directory is an artifact", a, "give at least one artifact")
    sizes = {name: linear.weights for artifact in artifacts for name, linear in artifact.plan.linears.items()}
    kinds: dict[str, str] = {}
    for artifact in artifacts:
        kinds |= artifact.manifest.kinds if artifact.manifest else {}
    left, right = _Weights(a, first, kinds), _Weights(b, second, kinds)
    embeddings = [name for artifact in artifacts for name in artifact.plan.embeddings]
    differences = {name: _difference(name, left, right) for name in dict.fromkeys([*sizes, *embeddings])}
    fidelity_a, fidelity_b = _fidelity(first), _fidelity(second)
    exceeded: list[str] = []
    if max_mean_kl is not None:
        for artifact in artifacts:
            exceeded += _over_limit(artifact, max_mean_kl)
    return Comparison(
        a=_side(a, left, sizes),
        b=_side(b, right, sizes),
        figures=_figures(fidelity_a or {}, fidelity_b or {}),
        linears=tuple(difference for difference in differences.values() if difference is not None),
        unmatched=tuple(name for name, difference in differences.items() if difference is None),
        exceeded=tuple(exceeded),
    )


def _open(path: Path) -> StoredArtifact | TensorFiles:
    if path.is_dir() and artifact_format(path) is None:
        refuse_unknown_quantization(path)
        return TensorFiles.open(path, of_artifact=False)
    return open_artifact(path)


# -- weights -----------------------------------------------------------------------------------------------


class _Weights:
    """The linear weights of either kind of directory, by the linears' names."""

    def __init__(self, path: Path, source: StoredArtifact | TensorFiles, kinds: Mapping[str, str]) -> None:
        self.artifact = source if isinstance(source, StoredArtifact) else None
        self._path = path
        self.files = source.files if isinstance(source, StoredArtifact) else source
        self._kinds = kinds

    def weight(self, name: str) -> torch.Tensor | None:
        """[N, K] in float32, or None where there is none of that name."""
        if self.artifact is not None and name in self.artifact.schema:
            return self.artifact.linear(name).dequantize()
        stored = self._stored_name(name)
        if stored is None:
            return self._converted.weight(name) if self._converted else None
        tensor = self.files.tensor(stored).float()
        if not stored.endswith(".weight"):
            tensor = tensor[int(name.rpartition(".")[2])]
        return tensor.T if self._kinds.get(name) == "conv1d" else tensor

    def bits_per_weight(self, name: str) -> float | None:
        if self.artifact is not None:
            plan = self.artifact.plan.linears.get(name) or self.artifact.plan.embeddings.get(name)
            if plan is not None:
                return 8 * self.artifact.linear_bytes(name) / plan.weights
        stored = self._stored_name(name)
        if stored is None:
            return self._converted.bits_per_weight(name) if self._converted else None
        return 8.0 * self.files.infos[stored].torch_dtype.itemsize

    @property
    def tensor_bytes(self) -> int:
        if self.artifact is not None:
            return self.artifact.tensor_bytes
        return sum(info.bytes for info in self.files.infos.values())

    @cached_property
    def _converted(self) -> _Converted | None:
        """The checkpoint by the model's names; None for an artifact, and for weights without a configuration."""
        if self.artifact is not None or not (self._path / "config.json").exists():
            return None
        return _Converted(self._path)

    def _stored_name(self, name: str) -> str | None:
        """NAME.weight or the parameter that stacks experts; a checkpoint of a base model lacks the first part."""
        for base in (name, name.partition(".")[2]):
            stack, _, number = base.rpartition(".")
            for stored in (f"{base}.weight", stack if number.isdigit() else ""):
                if stored in self.files.infos:
                    return stored
        return None


class _Converted:
    """A checkpoint that names its linears otherwise than the model does, as most with experts do.

    Read a block at a time: the linears of one block are best asked for together.
    """

    def __init__(self, directory: Path) -> None:
        from accullm_cli.model.checkpoint import Checkpoint
        from accullm_cli.model.skeleton import build_skeleton
        from accullm_cli.model.source import open_source
        from accullm_cli.model.structure import read_structure

        with tempfile.TemporaryDirectory() as cache:
            source = open_source(str(directory), Path(cache))
        self._model = build_skeleton(source.directory, source.untied)
        self._checkpoint = Checkpoint(source, self._model)
        structure = read_structure(self._model)
        self._slots = {
            slot.name: (block, slot)
            for block, slots in zip(structure.blocks, structure.slots, strict=True)
            for slot in slots
        }
        self._loaded: str | None = None

    def weight(self, name: str) -> torch.Tensor | None:
        """[N, K] in float32, or None where there is none of that name."""
        if name not in self._slots:
            return None
        block, slot = self._slots[name]
        if self._loaded != block:
            if self._loaded is not None:
                self._checkpoint.release(self._loaded)
            self._checkpoint.load([block])
            self._loaded = block
        return slot.read(self._model.get_submodule(block)).float()

    def bits_per_weight(self, name: str) -> float | None:
        if name not in self._slots:
            return None
        block, slot = self._slots[name]
        return 8.0 * self._checkpoint.dtype(f"{block}.{slot.parameter}").itemsize


def _difference(name: str, left: _Weights, right: _Weights) -> LinearDifference | None:
    weight_a, weight_b = left.weight(name), right.weight(name)
    bits_a, bits_b = left.bits_per_weight(name), right.bits_per_weight(name)
    if weight_a is None or weight_b is None or bits_a is None or bits_b is None or weight_a.shape != weight_b.shape:
        return None
    norm = weight_b.norm().item()
    relative = (weight_a - weight_b).norm().item() / norm if norm else float(weight_a.any())
    return LinearDifference(name, bits_a, bits_b, relative)


def _side(path: Path, weights: _Weights, sizes: Mapping[str, int]) -> Side:
    bits = count = 0.0
    for name, size in sizes.items():
        per_weight = weights.bits_per_weight(name)
        if per_weight is not None:
            bits, count = bits + per_weight * size, count + size
    return Side(
        path=str(path),
        format=weights.artifact.format if weights.artifact else "checkpoint",
        bits_per_weight=bits / count if count else None,
        tensor_bytes=weights.tensor_bytes,
    )


# -- recorded fidelity -------------------------------------------------------------------------------------


def _fidelity(side: StoredArtifact | TensorFiles) -> Mapping[str, Any] | None:
    return side.manifest.fidelity if isinstance(side, StoredArtifact) and side.manifest else None


def _figures(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[FigureComparison, ...]:
    """Every figure that has an interval in either."""
    names = [name for name in dict.fromkeys([*a, *b]) if _estimate(a, name) or _estimate(b, name)]
    return tuple(FigureComparison(name, _estimate(a, name), _estimate(b, name), _paired(a, b, name)) for name in names)


def _estimate(fidelity: Mapping[str, Any], name: str) -> Estimate | None:
    value = fidelity.get(name)
    return Estimate(**value) if isinstance(value, Mapping) else None


def _paired(a: Mapping[str, Any], b: Mapping[str, Any], name: str) -> Estimate | None:
    """A's figure minus B's where both were measured on the same units."""
    first, second = (_samples(side, name) for side in (a, b))
    if first is None or second is None or first["of"] != second["of"] or len(first["values"]) != len(second["values"]):
        return None
    return paired_difference(first["values"], second["values"], seed=0)


def _samples(fidelity: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    return next((samples for samples in fidelity.get("samples", ()) if samples["figure"] == name), None)


def _over_limit(artifact: StoredArtifact, limit: float) -> list[str]:
    """A sentence where the recorded mean KL is beyond the limit.

    Raises:
        AccullmError: nothing is recorded.
    """
    mean_kl = _estimate(_fidelity(artifact) or {}, "mean_kl")
    if mean_kl is None:
        raise AccullmError("not validated yet, so there is no mean KL", artifact.path, "run accullm validate first")
    if mean_kl.value <= limit:
        return []
    return [f"{artifact.path}: mean KL {mean_kl.value:.5g} is above {limit:g}"]
