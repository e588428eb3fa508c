"""What all opened artifacts have in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.formats.adapters import Adapter, open_adapter
from accullm_cli.formats.capabilities import CAPABILITIES
from accullm_cli.formats.manifest import Manifest
from accullm_cli.formats.readers import Reading, readings
from accullm_cli.formats.shards import TensorFiles, dtype_name
from accullm_cli.model.ahead import fetch
from accullm_cli.model.integrity import TensorInfo
from accullm_cli.quant.correction import CorrectedLinear
from accullm_cli.quant.encodings.base import StoredLinear
from accullm_cli.quant.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from accullm_cli.model.structure import Structure


@dataclass(frozen=True)
class TensorSchema:
    """What a stored tensor must be."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class StoredArtifact(ABC):
    """A finished artifact, opened for reading (see `formats.base.Artifact`).

    `schema` gives the tensors of each quantized linear and embedding by their full names; all that is stored beside
    them is `names()` and `kept`. `adapter` holds outlier features, where there is one; all that is read of linears
    contains them.
    """

    format: str
    # What is to go when this goes.
    lives_in: object = None

    def __init__(
        self,
        path: Path,
        plan: Plan,
        files: TensorFiles,
        schema: Mapping[str, Mapping[str, TensorSchema]],
        manifest: Manifest | None,
    ) -> None:
        self.path = path
        self.plan = plan
        self.files = files
        self.schema = schema
        self.manifest = manifest
        check_schema(path, files, schema)
        recorded = None if manifest is None else manifest.adapter_files
        self.adapter = open_adapter(path, plan, CAPABILITIES[self.format].adapter, recorded)
        if self.adapter is not None:
            self.plan = _with_adapter(plan, self.adapter)
        for name in plan.linears.keys() - schema.keys():
            self._kept(name)
        for name in self.kept:
            if name not in files.infos:
                raise AccullmError(f"tensor {name} is missing", path, "copy the artifact again")

    @property
    def kept(self) -> tuple[str, ...]:
        return self.manifest.kept if self.manifest is not None else ()

    @property
    def kinds(self) -> Mapping[str, str]:
        """Of linears and embeddings, see `ModelShape.kinds`; of an artifact of another tool those that show."""
        return self.manifest.kinds if self.manifest is not None else {}

    @property
    def encodings(self) -> Mapping[str, tuple[int, int, int]]:
        """Tensors, weights and bytes by the format's own names of what they are stored as; most bytes first.

        Empty where it has no such names.
        """
        return {}

    @property
    def readings(self) -> tuple[Reading, ...]:
        """What the format's readers make of it."""
        return readings(self.format, self.plan, self.kinds)

    def names(self) -> tuple[str, ...]:
        others = {name for tensors in self.schema.values() for name in tensors} | set(self.kept)
        return tuple(name for name in self.files.infos if name not in others)

    def tensor(self, name: str) -> torch.Tensor:
        return self.files.tensor(name)

    def fetch(self, module: str) -> None:
        fetch(info for name, info in self.files.infos.items() if name.startswith(f"{module}."))

    def linear(self, name: str) -> StoredLinear:
        """One quantized linear, or an embedding.

        Raises:
            AccullmError: the plan has none of that name, or leaves it in 16 bits.
        """
        linear = self._linear(name, self._stored(name))
        if self.adapter is None or name not in self.adapter.index:
            return linear
        return CorrectedLinear(linear, self.adapter.index[name], self.adapter.correction(name))

    def without_adapter(self) -> StoredArtifact:
        """The same artifact as who does not load its adapter has it."""
        alone = copy(self)
        alone.adapter = None
        return alone

    def weight(self, name: str) -> torch.Tensor:
        """A quantized linear or embedding [N, K] in float32, as the format's stock reader has it that loads in float32.

        Raises:
            AccullmError: as for `linear`.
        """
        linear, dtype = self.linear(name), self.reader_dtype(name)
        if isinstance(linear, CorrectedLinear):  # its adapter is added to products, whatever the weights' dtype
            return linear.added_to(linear.base.dequantize(dtype))
        return linear.dequantize(dtype).float()

    def reader_dtype(self, name: str) -> torch.dtype:
        """What that reader rounds a dequantized weight to."""
        return torch.float32

    def placed(self, model: PreTrainedModel, structure: Structure) -> StoredArtifact:
        """The same by the names of a model's module tree. Those of accullm's own artifacts are these.

        Raises:
            AccullmError: it does not fit the model.
        """
        return self

    def _stored(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a quantized linear, without its name in front."""
        if name not in self.schema:
            raise AccullmError(f"{name} is not a quantized linear of this artifact", self.path)
        tensors = self.files.tensors(self.schema[name])
        return {full.removeprefix(f"{name}."): tensor for full, tensor in tensors.items()}

    def linear_bytes(self, name: str) -> int:
        """Bytes that are stored for the weight of a linear or a quantized embedding."""
        if name not in self.schema:
            return self.plan.linears[name].weights * self._kept(name).torch_dtype.itemsize
        beside = 0 if self.adapter is None else self.adapter.bytes_of(name)
        return beside + sum(self.files.infos[tensor].bytes for tensor in self.schema[name])

    @property
    def tensor_bytes(self) -> int:
        """Of all tensors, those of an adapter included."""
        beside = 0 if self.adapter is None else self.adapter.bytes
        return beside + sum(info.bytes for info in self.files.infos.values())

    @property
    def bits_per_weight(self) -> float:
        """Everything stored for the linears, in bits, over their weights."""
        weights = sum(linear.weights for linear in self.plan.linears.values())
        return 8 * sum(map(self.linear_bytes, self.plan.linears)) / weights

    def _kept(self, name: str) -> TensorInfo:
        """What holds a linear that was left as it is: NAME.weight, or the parameter that stacks the experts."""
        linear = self.plan.linears[name]
        shape = (linear.out_features, linear.in_features)
        stack, _, number = name.rpartition(".")
        for stored in (f"{name}.weight", stack if number.isdigit() else ""):
            info = self.files.infos.get(stored)
            if info is not None:
                # Conv1D stores [K, N].
                if info.shape[-2:] not in (shape, shape[::-1]):
                    raise AccullmError(
                        f"tensor {stored} has shape {list(info.shape)}, expected {list(shape)}", info.file
                    )
                return info
        raise AccullmError(f"tensor {name}.weight is missing", self.path, "copy the artifact again")

    def problems(self) -> Iterator[str]:
        """Everything in the tensors' values that the format forbids, in sentences."""
        for name in self.schema:
            for problem in self._linear_problems(name, self._stored(name)):
                yield f"{name}: {problem}"
        for name in self.names():
            if self.files.infos[name].torch_dtype.is_floating_point:
                yield from not_finite(name, self.tensor(name))
        for name in () if self.adapter is None else self.adapter.index:
            yield from not_finite(f"{name}: the adapter", self.adapter.correction(name))  # type: ignore[union-attr]

    @abstractmethod
    def _linear(self, name: str, stored: Mapping[str, torch.Tensor]) -> StoredLinear: ...

    @abstractmethod
    def _linear_problems(self, name: str, stored: Mapping[str, torch.Tensor]) -> Iterator[str]: ...


def _with_adapter(plan: Plan, adapter: Adapter) -> Plan:
    """The plan with the outlier features that an adapter holds."""
    rows = {
        name: replace(plan.linears[name], outlier_index=tuple(index.tolist()), adapter=adapter.kind)
        for name, index in adapter.index.items()
    }
    return replace(plan, linears={**plan.linears, **rows})


def schema_bytes(schema: Mapping[str, TensorSchema]) -> int:
    """Bytes of the tensors that a schema has."""
    return sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in schema.values())


def check_schema(path: Path, files: TensorFiles, schema: Mapping[str, Mapping[str, TensorSchema]]) -> None:
    """Hold the files' headers against the schema.

    Raises:
        AccullmError: a tensor is missing, has another dtype or shape, or a weight is stored beside its codes.
    """
    for linear, tensors in schema.items():
        for name, wanted in tensors.items():
            info = files.infos.get(name)
            if info is None:
                raise AccullmError(f"tensor {name} is missing", path, "copy the artifact again")
            _check_tensor(name, info, wanted)
        # Programs that do not know the format would take it for the model's weight.
        if f"{linear}.weight" in files.infos.keys() - tensors.keys():
            raise AccullmError(f"tensor {linear}.weight is stored beside the codes of {linear}", path)


def _check_tensor(name: str, info: TensorInfo, wanted: TensorSchema) -> None:
    dtype = info.torch_dtype
    if dtype != wanted.dtype:
        raise AccullmError(f"tensor {name} is {dtype_name(dtype)}, expected {dtype_name(wanted.dtype)}", info.file)
    if info.shape != wanted.shape:
        raise AccullmError(f"tensor {name} has shape {list(info.shape)}, expected {list(wanted.shape)}", info.file)


def not_finite(name: str, tensor: torch.Tensor) -> Iterator[str]:
    """A sentence where a tensor holds NaN or infinity."""
    if not tensor.isfinite().all():
        yield f"{name} holds NaN or infinity"
