"""`accullm.json`, which says what an artifact is made of, and the model card, which says the same to people.

Both are deterministic: the same artifact has the same bytes, so neither holds times or absolute paths.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.formats import FORMATS
from accullm_cli.formats.adapters import FOLDER, adapter_of, largest_rank, linear_bytes
from accullm_cli.formats.base import Parts
from accullm_cli.formats.capabilities import ADAPTERS, CAPABILITIES
from accullm_cli.formats.readers import readings
from accullm_cli.formats.shards import dtype_name, read_json
from accullm_cli.measure.measurement import recorded_name
from accullm_cli.progress import SHOWN, grouped
from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.plan import KEPT_BITS, LinearPlan, Plan
from accullm_cli.run import file_sha256, write_text

if TYPE_CHECKING:
    from accullm_cli.measure.result import Report

MANIFEST_NAME = "accullm.json"
CARD_NAME = "README.md"
# The newest version, and the oldest that is still written: what can be said in it is, for older readers.
FORMAT_VERSION = 4
OLDEST_WRITTEN = 2
# What a linear is stored in where nothing else is said.
USUAL_ENCODING = "integer"
# What readers of version 2 would take for steps of one size, by the version that has them.
_SINCE = {"levels": 3, "trellis": 4}

_FIDELITY_START, _FIDELITY_END = "<!-- fidelity -->", "<!-- /fidelity -->"


@dataclass(frozen=True)
class FileEntry:
    """What the manifest keeps of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of `accullm.json`.

    plan: as the artifact was made, but without outlier features: these are tensors of the artifact.
    outliers: number of outlier features by linear.
    kinds, stored_as: as in `ModelShape`.
    dtype: of the source's weights.
    provenance: facts about where the artifact comes from.
    files: every file of the artifact but `accullm.json`.
    fidelity: figures by name, "samples" unit by unit for paired comparisons, and the contract; None before validation.
    kept: names of tensors that the model has no place for; they are stored as the source has them.
    """

    format: str
    plan: Plan
    outliers: Mapping[str, int]
    kinds: Mapping[str, str]
    dtype: torch.dtype
    provenance: Mapping[str, Any]
    files: Mapping[str, FileEntry]
    fidelity: Mapping[str, Any] | None
    kept: tuple[str, ...] = ()
    stored_as: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def adapter_files(self) -> dict[str, str]:
        """SHA-256 of the files of the adapter that holds the artifact's outlier features, by their names there."""
        folder = f"{FOLDER}/"
        return {
            name.removeprefix(folder): entry.sha256 for name, entry in self.files.items() if name.startswith(folder)
        }


# -- reading -----------------------------------------------------------------------------------------------


def manifest_of(directory: Path, format_name: str) -> Manifest | None:
    """The manifest of an artifact of a format; None where another tool wrote it.

    Raises:
        AccullmError: malformed, of a newer format version, or of another format.
    """
    if not (directory / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(directory)
    if manifest.format != format_name:
        raise AccullmError(f"describes an artifact of format {manifest.format}", directory / MANIFEST_NAME)
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """The manifest of an artifact.

    Raises:
        AccullmError: absent, malformed, or of a newer format version.
    """
    path = directory / MANIFEST_NAME
    content = read_json(path)
    check_version(content.get("format_version"), path)
    try:
        dtype = getattr(torch, content["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype {content['dtype']}")
        for name in content["files"]:
            if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
                raise ValueError(f"file {name!r} lies outside")
        if not isinstance(content["provenance"], dict) or not isinstance(content["fidelity"], dict | None):
            raise TypeError("provenance and fidelity are objects")
        linears = {name: _linear_plan(name, entry, dtype) for name, entry in content["linears"].items()}
        described = content.get("embeddings", {})
        embeddings = {name: _linear_plan(name, entry, dtype) for name, entry in described.items()}
        return Manifest(
            format=content["format"],
            plan=Plan(linears, content["scale_dtype"], embeddings),
            outliers={name: entry["outliers"] for name, entry in content["linears"].items()},
            kinds={
                name: entry["kind"]
                for name, entry in (*content["linears"].items(), *described.items())
                if "kind" in entry
            },
            dtype=dtype,
            provenance=content["provenance"],
            files={name: FileEntry(**entry) for name, entry in content["files"].items()},
            fidelity=content["fidelity"],
            kept=tuple(str(name) for name in content.get("kept", [])),
            stored_as={name: tuple(names) for name, names in content.get("stored_as", {}).items()},
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise AccullmError(
            f"not a manifest of format version {content['format_version']} ({type(error).__name__}: {error})",
            path,
            "copy the artifact again",
        ) from None


def version_of(plan: Plan) -> int:
    """The version that says how a plan's linears are stored."""
    return max((_SINCE.get(row.encoding, OLDEST_WRITTEN) for row in plan.quantized.values()), default=OLDEST_WRITTEN)


def check_version(version: object, where: Path) -> None:
    """Refuse what a newer accullm wrote.

    Raises:
        AccullmError: `version` is no number, or newer than this program knows.
    """
    if not isinstance(version, int):
        raise AccullmError("has no format_version", where, "copy the artifact again")
    if version > FORMAT_VERSION:
        raise AccullmError(
            f"format version {version} is newer than {FORMAT_VERSION}, the newest that this accullm reads",
            where,
            "upgrade with: pip install -U accullm",
        )


def _linear_plan(name: str, entry: Mapping[str, Any], dtype: torch.dtype) -> LinearPlan:
    out_features, in_features = entry["shape"]
    numbers = out_features, in_features, entry["bits"], entry["group_size"], entry.get("scale_bits", 16)
    if not all(type(number) is int for number in (*numbers, entry.get("outliers", 0))):
        raise TypeError(f"the numbers that describe {name} are none")
    _, _, bits, group_size, scale_bits = numbers
    is_whole = min(out_features, in_features) > 0 and (group_size > 0 or group_size == -1)
    if not is_whole or not {bits, scale_bits} <= {*range(1, 17)} or not isinstance(entry["symmetric"], bool):
        raise ValueError(f"{name} is no linear")
    row = LinearPlan(
        name=name,
        out_features=out_features,
        in_features=in_features,
        bits=entry["bits"],
        group_size=entry["group_size"],
        scale_bits=entry.get("scale_bits", 16),  # version 1 had no tables
        symmetric=entry["symmetric"],
        source_itemsize=dtype.itemsize,
        encoding=entry.get("encoding", USUAL_ENCODING),
    )
    if row.encoding not in ENCODINGS:
        raise ValueError(f"{name} has an unknown encoding")
    problem = "" if bits == KEPT_BITS else ENCODINGS[row.encoding].problem(row)
    if problem:
        raise ValueError(f"{name} {problem}")
    return row


# -- writing -----------------------------------------------------------------------------------------------


def write_card(directory: Path, parts: Parts, format_name: str, artifact_bytes: int) -> None:
    """Write the model card of an artifact that is not validated yet."""
    write_text(directory / CARD_NAME, "\n".join(_card(parts, format_name, artifact_bytes)) + "\n")


def write_manifest(directory: Path, parts: Parts, format_name: str) -> None:
    """Write `accullm.json` over all files that are there: the last file of an artifact to appear."""
    embeddings = {
        name: {
            **({"kind": parts.shape.kinds[name]} if name in parts.shape.kinds else {}),
            "shape": [embedding.out_features, embedding.in_features],
            "bits": embedding.bits,
            "group_size": embedding.group_size,
            "symmetric": embedding.symmetric,
            **_encoding(embedding),
        }
        for name, embedding in parts.plan.embeddings.items()
    }
    content = {
        "format": format_name,
        "format_version": version_of(parts.plan),
        "dtype": dtype_name(parts.shape.dtype),
        "scale_dtype": parts.plan.scale_dtype,
        "bits_per_weight": _bits_per_weight(parts, format_name),
        "linears": {
            name: {
                "kind": parts.shape.kinds[name],
                "shape": [linear.out_features, linear.in_features],
                "bits": linear.bits,
                "group_size": linear.group_size,
                "scale_bits": linear.scale_bits,
                "symmetric": linear.symmetric,
                **_encoding(linear),
                "outliers": len(linear.outlier_index),
            }
            for name, linear in parts.plan.linears.items()
        },
        **({"embeddings": embeddings} if embeddings else {}),
        **({"kept": [*parts.kept]} if parts.kept else {}),
        **({"stored_as": parts.shape.stored_as} if parts.shape.stored_as else {}),
        # The linears keep the model's order; the order of these facts is nobody's promise.
        "provenance": json.loads(json.dumps(parts.provenance, sort_keys=True)),
        "files": {name: asdict(_entry(directory / name)) for name in artifact_files(directory)},
        "fidelity": None,
    }
    _write_content(directory, content)


def _encoding(linear: LinearPlan) -> dict[str, str]:
    return {} if linear.encoding == USUAL_ENCODING else {"encoding": linear.encoding}


def _bits_per_weight(parts: Parts, format_name: str) -> float:
    """Everything that the format stores for the linears, in bits, over their weights."""
    linears, format = parts.plan.linears.values(), FORMATS[format_name]
    stored = sum(linear_bytes(format, linear, parts.shape.dtype) for linear in linears)
    return 8 * stored / sum(linear.weights for linear in linears)


def record_fidelity(directory: Path, report: Report) -> None:
    """Add what validation measured to an artifact's model card and manifest.

    The card changes first: killed in between, the artifact still opens, and the next validation records again.

    Raises:
        AccullmError: `directory` holds no artifact.
    """
    read_manifest(directory)
    content = read_json(directory / MANIFEST_NAME)
    fidelity: dict[str, Any] = {}
    for found in report.measurements:
        for figure in found.figures:
            if figure.estimate is not None:
                recorded = asdict(figure.estimate) if figure.has_interval else figure.estimate.value
                fidelity[recorded_name(found, figure.name)] = recorded
    fidelity["samples"] = [
        asdict(replace(samples, figure=recorded_name(found, samples.figure)))
        for found in report.measurements
        for samples in found.samples
    ]
    fidelity["contract"] = [asdict(clause) for clause in report.contract]
    fidelity["contract_met"] = report.contract_met
    card = directory / CARD_NAME
    if card.exists():
        before, _, rest = card.read_text(encoding="utf-8").partition(_FIDELITY_START)
        after = rest.partition(_FIDELITY_END)[2]
        write_text(card, "\n".join([before.rstrip("\n"), "", *_fidelity_lines(report)]) + after)
        content["files"][CARD_NAME] = asdict(_entry(card))
    content["fidelity"] = fidelity
    _write_content(directory, content)


def artifact_files(directory: Path) -> Iterator[str]:
    """Relative names of all files of an artifact but `accullm.json` and hidden ones, sorted."""
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        if path.is_file() and str(name) != MANIFEST_NAME and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix()


def own_files(directory: Path) -> tuple[str, ...]:
    """Relative names of the files that make an artifact: those of its manifest; all, where another tool wrote it."""
    if not (directory / MANIFEST_NAME).exists():
        return tuple(artifact_files(directory))
    return tuple(read_manifest(directory).files)


def _entry(path: Path) -> FileEntry:
    return FileEntry(path.stat().st_size, file_sha256(path))


def _write_content(directory: Path, content: Mapping[str, Any]) -> None:
    write_text(directory / MANIFEST_NAME, json.dumps(content, indent=1) + "\n")


# -- the model card ----------------------------------------------------------------------------------------


def _card(parts: Parts, format_name: str, artifact_bytes: int) -> Iterator[str]:
    plan = parts.plan
    kept = [linear for linear in plan.linears.values() if linear.bits == 16]
    outliers = sum(len(linear.outlier_index) for linear in plan.linears.values())
    yield from ("---", "library_name: transformers", "tags:", "- accullm", "- quantized", "---", "")
    yield from ("# Quantized model", "")
    yield f"A {parts.shape.model_type} model whose linear layers are quantized, in the format `{format_name}`, made"
    yield from ("with AccuLLM. `accullm inspect` shows what is in it, `accullm verify` checks every file.", "")
    found = readings(format_name, plan, parts.shape.kinds)
    if not any(reading.is_transformers and reading.obstacle for reading in found):
        yield from _loading_lines(format_name)
        yield from _adapter_lines(parts.plan)
    yield from ("| | |", "| --- | --- |")
    yield f"| bits per weight of the linear layers, everything counted | {_bits_per_weight(parts, format_name):.3f} |"
    yield f"| linear layers quantized | {len(plan.linears) - len(kept)} |"
    yield f"| linear layers left in 16 bits | {len(kept)} |"
    adapter = adapter_of(plan)
    place = f"in the adapter `{FOLDER}`" if adapter else f"kept in {dtype_name(parts.shape.dtype)}"
    yield f"| outlier input features {place} | {outliers} |"
    if adapter:
        held = sum(linear.outlier_bytes * len(linear.outlier_index) for linear in plan.linears.values())
        weights = sum(linear.weights for linear in plan.linears.values())
        yield f"| of the bits per weight, the adapter's | {8 * held / weights:.3f} |"
        yield f"| largest rank of the adapter | {largest_rank(plan)} |"
    for name, embedding in plan.embeddings.items():
        yield f"| bits of {name}, not counted above | {embedding.bits} |"
    yield f"| size of the tensors | {artifact_bytes / 1e6:.1f} MB |"
    if found:
        yield from ("", "## Where it runs", "", "| | |", "| --- | --- |")
        yield from (f"| {reading.reader} | {reading.verdict} |" for reading in found)
    yield from ("", "## Fidelity", "", _FIDELITY_START, "Not validated yet.", _FIDELITY_END, "")
    yield from ("## Where it comes from", "")
    provenance = {**parts.provenance, "records": _shortened(parts.provenance.get("records", ()))}
    yield from (f"- {name}: {value}" for name, value in flat_facts(provenance))


def _shortened(records: Sequence[str]) -> list[str]:
    """Of many records that are alike the first few alone: a mixture of experts may have thousands."""
    lines = []
    for group in grouped(records):
        lines += group[:SHOWN]
        if len(group) > SHOWN:
            lines.append(f"and {len(group) - SHOWN} more like these, in {MANIFEST_NAME}")
    return lines


def _loading_lines(format_name: str) -> Iterator[str]:
    format = CAPABILITIES[format_name]
    if format.module:
        yield from ("```python", f"import {format.module}  # teaches transformers the format")
    elif format.package or format.loader:
        yield from ("```python", f"# needs the package {format.package or format.loader}")
    else:
        return
    yield from ("from transformers import AutoModelForCausalLM", "")
    yield from ('model = AutoModelForCausalLM.from_pretrained("path/of/this/directory")', "```", "")


def _adapter_lines(plan: Plan) -> Iterator[str]:
    """How to load artifact and adapter together."""
    kind = adapter_of(plan)
    if not kind:
        return
    yield f"Outlier features are in the folder `{FOLDER}`: a low-rank adapter (LoRA) that belongs to these"
    yield from ("weights. What was measured is both together; the weights alone lose more.", "", "```python")
    room = ADAPTERS[kind].room(largest_rank(plan))
    yield from (line.format(folder=FOLDER, rank=room) for line in ADAPTERS[kind].loading)
    yield from ("```", "")


def _fidelity_lines(report: Report) -> list[str]:
    lines = [_FIDELITY_START]
    for found in report.measurements:
        if not found.judged:
            continue
        lines += [found.about, "", "| | measured | 95% confidence interval |", "| --- | --- | --- |"]
        for figure in found.figures:
            if figure.title and (value := figure.estimate) is not None:
                name = f"{figure.title} (nats per token)" if figure.name == "mean_kl" else figure.title
                interval = f"{value.low:.5g} to {value.high:.5g}" if figure.has_interval else ""
                lines.append(f"| {name} | {value.value:.5g} | {interval} |")
        lines.append("")
    if report.contract:
        lines += ["| condition | measured | |", "| --- | --- | --- |"]
    for clause in report.contract:
        lines.append(f"| contract {clause.text} | {clause.told} | {'met' if clause.met else 'not met'} |")
    return [*lines, _FIDELITY_END]


def flat_facts(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts as lines: ("source.name", "smollm2"), sorted by name; a list gives one line per entry."""
    for key in sorted(facts):
        value, name = facts[key], f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flat_facts(value, f"{name}.")
        elif isinstance(value, list | tuple):
            yield from ((name, str(entry)) for entry in value)
        else:
            yield name, str(value)
