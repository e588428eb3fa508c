"""What every artifact format offers, a writer and a reader, and what they are given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from accullm_cli.quant.encodings.base import StoredLinear
from accullm_cli.quant.plan import LinearPlan, Plan


@dataclass(frozen=True)
class Objection:
    """Why a format cannot hold a plan, and the nearest one that it can."""

    what: str
    hint: str


@dataclass(frozen=True)
class Stack:
    """How a parameter holds the weights [N, K] of its experts: one behind the other, `transposed` as [K, N] each."""

    experts: int
    transposed: bool


@dataclass(frozen=True)
class ModelShape:
    """What a format may ask about a model before any weight is read.

    kinds: for each linear of the plan, "linear" (torch.nn.Linear), "conv1d" (transformers' Conv1D, whose weight is
    stored [K, N]) or "expert" (one slice of a parameter that stacks experts); for each embedding of the plan
    "embedding", "head", or "tied" where one matrix is both.
    dtype: the dtype of the source's weights.
    stacks: by its name, how a parameter with experts holds them, where that is not [E, N, K].
    stored_as: of linears and other tensors that are called otherwise in checkpoints, the names there: an expert's
        weight may be several, one behind the other, all of as many rows. An expert that is not in here has none.
    others: names of modules with a matrix of their own that is no linear of the plan: routers, vision towers, a head.
    config: the source's config.json. companions: the files beside the weights, by name. parameters: the shapes of all
        that a checkpoint of the model holds, tied ones once. kept: names of tensors that it has no place for.
    """

    model_type: str
    dtype: torch.dtype
    kinds: Mapping[str, str]
    stacks: Mapping[str, Stack] = field(default_factory=dict)
    stored_as: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    companions: Mapping[str, Path] = field(default_factory=dict)
    parameters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    kept: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parts:
    """Everything an export assembles an artifact from.

    config: the source's config.json, without any quantization_config.
    companions: files to copy as they are (tokenizer, templates, licences, ...), by their names in the artifact.
    blocks: the shards that the quantize stage wrote, one per decoder block, in order. They are native already: for a
        quantized linear NAME its tensors NAME.qweight, NAME.scales, ... (`QuantizedLinear.to_tensors`), and every
        other tensor of the block (norms, biases, linears left in 16 bits) under its name in the module tree.
    outside: names and tensors of everything outside the blocks, streamed; tied weights appear once.
    provenance: deterministic facts for the manifest: source name and hash, resolved config, versions, records.
    embeddings: the shards of quantized embeddings (`Plan.embeddings`), like those of blocks; their weights are not in
        `outside`.
    kept: names of tensors in `outside` that the model has no place for, and that travel as they are.
    """

    config: Mapping[str, Any]
    companions: Mapping[str, Path]
    plan: Plan
    shape: ModelShape
    blocks: tuple[Path, ...]
    outside: Iterator[tuple[str, torch.Tensor]]
    provenance: Mapping[str, Any]
    embeddings: tuple[Path, ...] = ()
    kept: tuple[str, ...] = ()


class Artifact(Protocol):
    """A finished artifact, opened for reading. Tensors are read when asked for and not kept."""

    path: Path
    format: str
    plan: Plan

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of stored tensors that the model has no place for."""
        ...

    def names(self) -> tuple[str, ...]:
        """Names (in the module tree) of every stored tensor that belongs to no quantized linear and is not `kept`."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """One of those tensors, in its stored dtype."""
        ...

    def fetch(self, module: str) -> None:
        """Have the system read what is stored of a module into its page cache, while the caller goes on."""
        ...

    def linear(self, name: str) -> StoredLinear:
        """One quantized linear or embedding of the plan."""
        ...

    def weight(self, name: str) -> torch.Tensor:
        """The same in float32, [N, K], as the format's stock reader has it."""
        ...


class Format(Protocol):
    """Writer and reader of one artifact format; what it can hold is in `formats.capabilities`."""

    name: str

    def linear_bytes(self, linear: LinearPlan, dtype: torch.dtype) -> int:
        """Bytes that are stored for a linear of a plan without objections; dtype: of the source's weights."""
        ...

    def write(self, directory: Path, parts: Parts) -> None:
        """Write a complete artifact into an empty directory."""
        ...

    def open(self, directory: Path) -> Artifact:
        """Open an artifact of this format.

        Raises:
            AccullmError: a file is missing, truncated or not as its schema says.
        """
        ...
