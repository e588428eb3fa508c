"""A report as JSON, its way back, and the JSON Schema that describes it (docs/report.schema.json)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from accullm_cli.errors import AccullmError
from accullm_cli.measure.result import REPORT_SCHEMA_VERSION, Report


@cache
def _adapter() -> TypeAdapter[Report]:
    return TypeAdapter(Report)


def to_json(report: Report) -> dict[str, Any]:
    """The report as what `json.dumps` takes: tuples become lists, and a number that is not finite becomes None."""
    return json.loads(_adapter().dump_json(report))


def from_json(content: Mapping[str, Any]) -> Report:
    """The inverse of `to_json`.

    Raises:
        AccullmError: the content is of another schema version, or a field is absent or of another type.
    """
    version = content.get("schema_version")
    if version != REPORT_SCHEMA_VERSION:
        raise AccullmError(
            f"schema version {version!r} of a report is not {REPORT_SCHEMA_VERSION}",
            "report.json",
            "write it again with accullm validate",
        )
    try:
        return _adapter().validate_python(dict(content))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise AccullmError(
            f"{place}: {first['msg'].lower()}", "report.json", "write it again with accullm validate"
        ) from None


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of `to_json`, derived from the dataclasses."""
    schema = _adapter().json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "AccuLLM report"}
