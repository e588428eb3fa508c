"""Where a conversion's artifacts and working files go."""

from __future__ import annotations

import os
from pathlib import Path

from accullm_cli.config import Config
from accullm_cli.errors import AccullmError


def artifact_path(config: Config) -> Path:
    """Where the artifact goes: `export.out`, or the model's short name with -int4 (the bits) behind, here.

    Of a link it is where that leads to: an artifact appears by renaming, which would put it into the link's place.

    Raises:
        AccullmError: `export.out` is the root directory.
    """
    if (out := config.export.out) is not None:
        # Names beside it are made from its own: "." and ".." have none.
        named = out if out.name not in ("", "..") else out.resolve()
        if not named.name:
            raise AccullmError("is no place for an artifact", named, "give another directory with --out")
        return Path(os.path.realpath(named)) if named.is_symlink() else named
    name = Path(config.model.rstrip("/").partition("@")[0]).name.removesuffix(".gguf")
    return Path(f"{name or 'model'}-int{config.plan.bits}")


def artifact_paths(config: Config) -> dict[str, Path]:
    """Where the artifact of each format goes: each has a directory of its own, where there are several."""
    out, formats = artifact_path(config), config.export.format
    return {name: out / name if len(formats) > 1 else out for name in formats}


def run_path(config: Config) -> Path:
    """Where the working files go: `machine.run`, or the artifact's directory with .run behind."""
    out = artifact_path(config)
    return config.machine.run or out.with_name(f"{out.name}.run")
