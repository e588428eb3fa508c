"""Short names for well-known models: configs/models/NAME.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from accullm_cli.errors import AccullmError
from accullm_cli.resources import resource


class _AliasFile(BaseModel):
    """The schema of an alias file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    source: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    revision: str | None = None
    parameters: int = Field(gt=0)
    size: int = Field(gt=0)
    license: str
    notes: str = ""


@dataclass(frozen=True)
class Alias:
    """A short name for a model on the hub.

    source: the hub id; revision: a branch, tag or commit, None for the newest; size: bytes of its weight files.
    """

    name: str
    source: str
    revision: str | None
    parameters: int
    size: int
    license: str
    notes: str


def aliases() -> dict[str, Alias]:
    """All aliases by name, in alphabetical order.

    Raises:
        AccullmError: an alias file does not follow the schema.
    """
    files = sorted(resource("configs", "models").glob("*.yaml"))
    return {path.stem: read_alias(path) for path in files}


def read_alias(path: Path) -> Alias:
    """One alias file.

    Raises:
        AccullmError: it does not follow the schema.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(loaded, dict):
            raise AccullmError("not keys with values", path)
        content = _AliasFile.model_validate(loaded)
    except yaml.YAMLError as error:
        raise AccullmError(f"not YAML ({' '.join(str(error).split())})", path) from None
    except ValidationError as error:
        first = error.errors()[0]
        raise AccullmError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", path) from None
    return Alias(name=path.stem, **content.model_dump())
