"""`accullm models`: the models that have a short name."""

from __future__ import annotations

from dataclasses import dataclass

from accullm_cli.model.alias import aliases


@dataclass(frozen=True)
class ModelAlias:
    """A short name that stands for a model on the hub.

    source: the hub id, with `@revision` where one is fixed; size: bytes of its weight files.
    cached: config.json and all weight files are on this machine already.
    """

    name: str
    source: str
    parameters: int
    size: int
    license: str
    cached: bool
    notes: str


def models() -> tuple[ModelAlias, ...]:
    """Every alias in configs/models/, in alphabetical order. Needs no network.

    Raises:
        AccullmError: an alias file does not follow the schema.
    """
    from accullm_cli.model.hub import HubId, is_cached

    return tuple(
        ModelAlias(
            name=alias.name,
            source=str(HubId(alias.source, alias.revision)),
            parameters=alias.parameters,
            size=alias.size,
            license=alias.license,
            cached=is_cached(HubId(alias.source, alias.revision)),
            notes=alias.notes,
        )
        for alias in aliases().values()
    )
