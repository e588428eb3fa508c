"""Artifact formats: each with its objections, its writer and its reader."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from accullm_cli.errors import AccullmError

if TYPE_CHECKING:
    from accullm_cli.formats.base import Format
    from accullm_cli.formats.stored import StoredArtifact

_CLASSES = {
    "accullm": ("accullm_cli.formats.accullm", "AccullmFormat"),
    "compressed-tensors": ("accullm_cli.formats.compressed_tensors", "CompressedTensorsFormat"),
}


class _Formats(Mapping[str, "Format"]):
    """The formats by name, each imported when it is asked for: the names alone need no torch."""

    def __getitem__(self, name: str) -> Format:
        module, class_name = _CLASSES[name]
        format: Format = getattr(import_module(module), class_name)()
        return format

    def __iter__(self) -> Iterator[str]:
        return iter(_CLASSES)

    def __len__(self) -> int:
        return len(_CLASSES)


FORMATS: Mapping[str, Format] = _Formats()


def artifact_format(path: Path) -> str | None:
    """The name of the format of an artifact, or None where `path` is none.

    Raises:
        AccullmError: its config.json is not JSON.
    """
    # An artifact that lost its config.json is still one; opening it says what is missing.
    fallback = "accullm" if (path / "accullm.json").exists() else None
    if not (path / "config.json").exists():
        return fallback
    from accullm_cli.formats.shards import read_json

    config = read_json(path / "config.json").get("quantization_config")
    method = config.get("quant_method") if isinstance(config, dict) else None
    return method if method in _CLASSES else fallback


def open_artifact(path: Path) -> StoredArtifact:
    """Open an artifact of any format.

    Raises:
        AccullmError: there is none, or it is not as its format says.
    """
    if not path.is_dir():
        raise AccullmError("no such directory", path, "give the directory of an artifact")
    format = artifact_format(path)
    if format is None:
        raise AccullmError(
            f"not an artifact of a known format ({', '.join(_CLASSES)})", path, "make one with: accullm convert MODEL"
        )
    artifact: StoredArtifact = FORMATS[format].open(path)  # type: ignore[assignment]
    return artifact
