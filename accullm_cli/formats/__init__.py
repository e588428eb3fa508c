"""Artifact formats: each with what it can hold, its writer and its reader."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from accullm_cli.errors import AccullmError
from accullm_cli.formats.capabilities import CAPABILITIES
from accullm_cli.model.gguf_parts import files_of

if TYPE_CHECKING:
    from accullm_cli.formats.base import Format
    from accullm_cli.formats.stored import StoredArtifact

# The format whose shards are those that quantize writes.
NATIVE = next(iter(CAPABILITIES))

# Where tools that leave config.json as it was say how they quantized.
_BESIDE = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


class _Formats(Mapping[str, "Format"]):
    """The formats by name, each imported when it is asked for: the names alone need no torch.

    A format is the `FORMAT` of the module that is named for it.
    """

    def __getitem__(self, name: str) -> Format:
        if name not in CAPABILITIES:
            raise KeyError(name)
        format: Format = import_module(f"accullm_cli.formats.{name.replace('-', '_')}").FORMAT
        return format

    def __iter__(self) -> Iterator[str]:
        return iter(CAPABILITIES)

    def __len__(self) -> int:
        return len(CAPABILITIES)


FORMATS: Mapping[str, Format] = _Formats()


def artifact_format(path: Path) -> str | None:
    """The name of the format of an artifact, or None where `path` is none.

    Raises:
        AccullmError: its config.json is not JSON.
    """
    path = artifact_in(path)
    if path.is_file():
        return next((name for name, own in CAPABILITIES.items() if own.suffix and path.suffix == own.suffix), None)
    return _described_format(path)


def artifact_in(path: Path) -> Path:
    """The one file that is an artifact, of a directory that holds no other weights; else the path itself.

    Of an artifact in several parts, the first.

    Raises:
        AccullmError: there are several such files; its config.json is not JSON.
    """
    if not path.is_dir() or _described_format(path) is not None:
        return path
    names = sorted(file.name for file in path.iterdir() if file.is_file())
    suffixes = tuple(own.suffix for own in CAPABILITIES.values() if own.suffix)
    found = [name for name in names if name.endswith(suffixes)]
    later = {part.name for name in found for part in files_of(path / name)[1:]}
    found = [name for name in found if name not in later]
    if not found or any(name.endswith(".safetensors") for name in names):
        return path
    if len(found) > 1:
        what = f"holds {len(found)} files each of which may be a model, {found[0]} and {found[1]}"
        raise AccullmError(f"{what}{' among them' if len(found) > 2 else ''}", path, "give the path of one")
    return path / found[0]


def _described_format(path: Path) -> str | None:
    """The format that a directory's own files say it is of; None where they say nothing.

    Raises:
        AccullmError: its config.json is not JSON.
    """
    # An artifact that lost its config.json is still one; opening it says what is missing.
    fallback = NATIVE if (path / "accullm.json").exists() else None
    from accullm_cli.formats.shards import read_json

    if not (path / "config.json").exists():
        return str(read_json(path / "accullm.json").get("format", NATIVE)) if fallback else None
    config = read_json(path / "config.json")
    return next((name for name, format in CAPABILITIES.items() if format.wrote(name, config)), fallback)


def open_artifact(path: Path) -> StoredArtifact:
    """Open an artifact of any format.

    Raises:
        AccullmError: there is none, or it is not as its format says.
    """
    path = artifact_in(path)
    if path.is_file() and artifact_format(path) is not None:
        return _open_file(path)
    if not path.is_dir():
        raise AccullmError("no such directory", path, "give the directory of an artifact")
    format = artifact_format(path)
    if format is None:
        refuse_unknown_quantization(path)
        raise AccullmError(
            f"not an artifact of a known format ({', '.join(CAPABILITIES)})",
            path,
            "make one with: accullm convert MODEL",
        )
    artifact: StoredArtifact = FORMATS[format].open(path)  # type: ignore[assignment]
    if artifact.manifest is not None:
        return artifact
    from accullm_cli.formats.placing import with_kept_linears

    return with_kept_linears(artifact)


def refuse_unknown_quantization(path: Path) -> None:
    """Refuse a directory whose weights were quantized in a way that no format here reads.

    Raises:
        AccullmError: says by what it was quantized.
    """
    from accullm_cli.formats.shards import read_json

    config = read_json(path / "config.json") if (path / "config.json").exists() else {}
    described = config.get("quantization_config") or config.get("compression_config")
    beside = next((name for name in _BESIDE if (path / name).exists()), None)
    if not described and beside is None:
        return
    method = described.get("quant_method", "unknown") if isinstance(described, Mapping) else "unknown"
    told = f"quant_method {method}" if described else f"as {beside} says"
    if packing := described.get("packing_format") if isinstance(described, Mapping) else None:
        told += f", {packing}"
    raise AccullmError(
        f"the weights are quantized ({told}) in none of the formats that are read ({', '.join(CAPABILITIES)})",
        path,
        "give an artifact of one of these, or the original checkpoint",
    )


def _open_file(path: Path) -> StoredArtifact:
    """Open an artifact that is one file, in a directory that goes when the artifact goes."""
    directory = TemporaryDirectory()
    artifact = open_artifact(adopted(path, Path(directory.name) / path.stem))
    artifact.lives_in = directory
    return artifact


def adopted(path: Path, directory: Path) -> Path:
    """The artifact that a file is, made anew in a directory.

    Raises:
        AccullmError: it is none of a format whose artifacts are files, or damaged.
    """
    format = artifact_format(path)
    if format is None:
        raise AccullmError("not an artifact", path, "give the directory of one")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    FORMATS[format].adopt(path, directory)  # type: ignore[attr-defined]
    return directory
