"""Whether an artifact is what its manifest says: every file by its hash, every tensor by its schema."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from accullm_cli.errors import AccullmError
from accullm_cli.formats import NATIVE, artifact_format, open_artifact
from accullm_cli.formats.manifest import MANIFEST_NAME, Manifest, artifact_files, read_manifest
from accullm_cli.run import file_sha256


@dataclass(frozen=True)
class Verification:
    """What `verify` found; without problems the artifact is intact."""

    path: str
    files_checked: int
    tensors_checked: int
    problems: tuple[str, ...]

    @property
    def intact(self) -> bool:
        return not self.problems


def verify(path: Path) -> Verification:
    """Check every file against the manifest's size and hash, and every tensor against the format.

    Hidden files (a checkout's .git, a download's .cache) are not looked at. An artifact that another tool wrote has no
    manifest: its tensors are checked.

    Raises:
        AccullmError: `path` is no artifact at all.
    """
    if artifact_format(path) is None:
        open_artifact(path)  # says why
    problems: list[str] = []
    files_checked = 0
    if (path / MANIFEST_NAME).exists() or artifact_format(path) == NATIVE:
        manifest = read_manifest(path)
        files_checked = len(manifest.files)
        problems += _file_problems(path, manifest)
    try:
        artifact = open_artifact(path)
    except AccullmError as error:
        # The reason why it does not open is the finding; what is behind it cannot be looked at.
        return Verification(str(path), files_checked, 0, (*problems, error.line()))
    problems += artifact.problems()
    beside = 0 if artifact.adapter is None else len(artifact.adapter.tensors.infos)
    return Verification(str(path), files_checked, len(artifact.files.infos) + beside, tuple(problems))


def _file_problems(path: Path, manifest: Manifest) -> Iterator[str]:
    for name, entry in manifest.files.items():
        file = path / name
        if not os.path.isfile(file):  # nor is one whose name is too long
            yield f"{name} is missing"
        elif file.stat().st_size != entry.bytes:
            yield f"{name} has {file.stat().st_size} bytes, expected {entry.bytes}"
        elif file_sha256(file) != entry.sha256:
            yield f"{name} differs: its SHA-256 is not the manifest's"
    for name in artifact_files(path):
        if name not in manifest.files:
            yield f"{name} is not in {MANIFEST_NAME}"
