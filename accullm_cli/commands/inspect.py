"""What is in an artifact, or in a plain checkpoint, without running it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from accullm_cli.errors import AccullmError
from accullm_cli.formats import artifact_format, artifact_in, open_artifact, refuse_unknown_quantization
from accullm_cli.formats.adapters import FOLDER
from accullm_cli.formats.manifest import flat_facts
from accullm_cli.formats.shards import TensorFiles, dtype_name, read_json
from accullm_cli.formats.stored import StoredArtifact
from accullm_cli.model.gguf_parts import files_of
from accullm_cli.quant.plan import KEPT_BITS, LinearPlan

# How many of a linear's outlier features are named.
FIRST_OUTLIERS = 8


@dataclass(frozen=True)
class LinearRow:
    """One linear or embedding: how it is stored. In a plain checkpoint: one 2-D tensor that looks like a linear."""

    name: str
    out_features: int
    in_features: int
    bits: int
    group_size: int  # -1: one scale per row, or none
    symmetric: bool
    bits_per_weight: float
    outliers: int
    first_outliers: tuple[int, ...]
    encoding: str  # of a plain checkpoint the dtype


@dataclass(frozen=True)
class AdapterRow:
    """The adapter that holds outlier features.

    kind: of its files. rank: the largest. bytes: of its tensors; they count in the bits per weight, as part of which
    they are `bits_per_weight`.
    """

    kind: str
    linears: int
    rank: int
    bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class EncodingRow:
    """What is stored in one of the types that a format has a name for."""

    name: str
    tensors: int
    weights: int
    bits_per_weight: float


@dataclass(frozen=True)
class FileRow:
    """One file of the directory."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Fact:
    """One line of provenance, of recorded fidelity, or about a program that reads the format."""

    name: str
    value: str


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    format: of an artifact; "checkpoint" for a plain model.
    parameters: weights of the model, quantized or not; tied ones once.
    bits_per_weight: of the linears, everything stored for them counted; None where there are none.
    all_bits_per_weight: of all parameters, embeddings and head among them.
    linear_bytes, other_bytes: what is stored for the linears, and for everything else (embeddings, norms, biases).
    adapter: None where the artifact's own files hold everything.
    embeddings: token embedding and output head, where they are quantized.
    encodings: where they have names of their own, in files of ggml's; the most bytes first.
    runs: for each program that is known to read the format, whether it takes this artifact; what it does not.
    validated: whether fidelity was measured and recorded.
    """

    path: str
    format: str
    model_type: str
    dtype: str
    parameters: int
    bits_per_weight: float | None
    all_bits_per_weight: float
    linear_bytes: int
    other_bytes: int
    outlier_features: int
    adapter: AdapterRow | None
    validated: bool
    linears: tuple[LinearRow, ...]
    embeddings: tuple[LinearRow, ...]
    encodings: tuple[EncodingRow, ...]
    runs: tuple[Fact, ...]
    files: tuple[FileRow, ...]
    provenance: tuple[Fact, ...]
    fidelity: tuple[Fact, ...]


def inspect(path: Path) -> Inspection:
    """Look into an artifact or a checkpoint directory; no weight is read.

    Raises:
        AccullmError: `path` is neither, or it is damaged.
    """
    if not path.is_dir() and artifact_format(path) is None:
        raise AccullmError("no such directory", path, "give the directory of an artifact or a model")
    if artifact_format(path) is None:
        refuse_unknown_quantization(path)
        return _inspect_checkpoint(path)
    found, file = _inspect_artifact(open_artifact(path)), artifact_in(path)
    # Of a file by itself, what it is opened in is no concern of anybody.
    files = found.files
    if file.is_file():
        files = tuple(FileRow(part.name, part.stat().st_size) for part in files_of(file))
    return replace(found, path=str(path), files=files)


def _inspect_artifact(artifact: StoredArtifact) -> Inspection:
    plan = artifact.plan
    rows = tuple(_linear_rows(artifact, plan.linears))
    linear_bytes = sum(artifact.linear_bytes(name) for name in plan.linears)
    linear_weights = sum(linear.weights for linear in plan.linears.values())
    stored_bytes = artifact.tensor_bytes
    quantized_weights = sum(linear.weights for linear in plan.quantized.values())
    manifest = artifact.manifest
    fidelity = None if manifest is None else manifest.fidelity
    config = read_json(artifact.path / "config.json")
    parameters = quantized_weights + sum(prod(artifact.files.infos[name].shape) for name in artifact.names())
    return Inspection(
        path=str(artifact.path),
        format=artifact.format,
        model_type=str(config.get("model_type", "")),
        dtype=dtype_name(manifest.dtype) if manifest else str(config.get("dtype", config.get("torch_dtype", ""))),
        parameters=parameters,
        bits_per_weight=8 * linear_bytes / linear_weights if linear_weights else None,
        all_bits_per_weight=8 * stored_bytes / parameters,
        linear_bytes=linear_bytes,
        other_bytes=stored_bytes - linear_bytes,
        outlier_features=sum(row.outliers for row in rows),
        adapter=_adapter_row(artifact, linear_weights),
        validated=fidelity is not None,
        linears=rows,
        embeddings=tuple(_linear_rows(artifact, plan.embeddings)),
        encodings=tuple(
            EncodingRow(name, tensors, weights, 8 * stored / weights)
            for name, (tensors, weights, stored) in artifact.encodings.items()
        ),
        runs=tuple(Fact(found.reader, found.verdict) for found in artifact.readings),
        files=tuple(_file_rows(artifact.path)),
        provenance=tuple(Fact(*fact) for fact in flat_facts(manifest.provenance)) if manifest else (),
        fidelity=tuple(_fidelity_facts(fidelity or {})),
    )


def _adapter_row(artifact: StoredArtifact, linear_weights: int) -> AdapterRow | None:
    adapter = artifact.adapter
    if adapter is None:
        return None
    return AdapterRow(adapter.kind, len(adapter.index), adapter.rank, adapter.bytes, 8 * adapter.bytes / linear_weights)


def _linear_rows(artifact: StoredArtifact, linears: Mapping[str, LinearPlan]) -> Iterator[LinearRow]:
    manifest = artifact.manifest
    for name, linear in linears.items():
        yield LinearRow(
            name=name,
            out_features=linear.out_features,
            in_features=linear.in_features,
            bits=linear.bits,
            group_size=linear.group_size,
            symmetric=linear.symmetric,
            bits_per_weight=8 * artifact.linear_bytes(name) / linear.weights,
            outliers=len(linear.outlier_index),
            first_outliers=linear.outlier_index[:FIRST_OUTLIERS],
            encoding=dtype_name(manifest.dtype) if linear.bits == KEPT_BITS and manifest else linear.encoding,
        )


def _fidelity_facts(fidelity: Mapping[str, Any]) -> Iterator[Fact]:
    """The figures that a person reads; per-window and per-bin ones are for programs."""
    for name, value in fidelity.items():
        if isinstance(value, Mapping):
            yield Fact(name, f"{value['value']:.5g} ({value['low']:.5g} to {value['high']:.5g})")
        elif not isinstance(value, list):
            yield Fact(name, f"{value:.5g}" if isinstance(value, float) else str(value))


def _inspect_checkpoint(path: Path) -> Inspection:
    config = read_json(path / "config.json")
    infos = TensorFiles.open(path, of_artifact=False).infos
    rows = [
        LinearRow(
            name=name.removesuffix(".weight"),
            out_features=info.shape[0],
            in_features=info.shape[1],
            bits=8 * info.torch_dtype.itemsize,
            group_size=-1,
            symmetric=True,
            bits_per_weight=8.0 * info.torch_dtype.itemsize,
            outliers=0,
            first_outliers=(),
            encoding=dtype_name(info.torch_dtype),
        )
        for name, info in infos.items()
        if len(info.shape) == 2 and info.torch_dtype.is_floating_point
    ]
    linear_bytes = sum(infos[f"{row.name}.weight" if f"{row.name}.weight" in infos else row.name].bytes for row in rows)
    weights = sum(row.out_features * row.in_features for row in rows)
    stored_bytes = sum(info.bytes for info in infos.values())
    by_dtype: dict[str, int] = {}
    for info in infos.values():
        by_dtype[dtype_name(info.torch_dtype)] = by_dtype.get(dtype_name(info.torch_dtype), 0) + prod(info.shape)
    return Inspection(
        path=str(path),
        format="checkpoint",
        model_type=str(config.get("model_type", "")),
        dtype=max(by_dtype, key=lambda dtype: by_dtype[dtype]) if by_dtype else "",
        parameters=sum(by_dtype.values()),
        bits_per_weight=8 * linear_bytes / weights if weights else None,
        all_bits_per_weight=8 * stored_bytes / max(1, sum(by_dtype.values())),
        linear_bytes=linear_bytes,
        other_bytes=stored_bytes - linear_bytes,
        outlier_features=0,
        adapter=None,
        validated=False,
        linears=tuple(rows),
        embeddings=(),
        encodings=(),
        runs=(),
        files=tuple(_file_rows(path)),
        provenance=(),
        fidelity=(),
    )


def _file_rows(path: Path) -> Iterator[FileRow]:
    for folder in (path, path / FOLDER):
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            if file.is_file():
                yield FileRow(file.relative_to(path).as_posix(), file.stat().st_size)
