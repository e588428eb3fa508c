"""The configuration's declaration as data: what flags, docs, completion and the JSON Schema are made of."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from accullm_cli.config import Config, Section


@dataclass(frozen=True)
class Option:
    """One option, for whoever derives something from the declaration.

    key: dotted YAML key ("plan.bits"); flag: "--bits"; section: "plan".
    kind: what its value is: "integer", "number", "boolean", "path", "text" or "choice" (then `choices` lists them).
    repeatable: the value is a list, and the flag may be given again.
    default: as declared; None where the program decides. example: a value to show, as it is typed after the flag.
    allowed: the range in words ("2 to 8"); empty where there is none.
    """

    key: str
    flag: str
    section: str
    kind: Literal["integer", "number", "boolean", "path", "text", "choice"]
    choices: tuple[str, ...]
    repeatable: bool
    default: Any
    help: str
    example: str
    allowed: str


def sections() -> dict[str, type[Section]]:
    """The sections by name, in the order of declaration."""
    return {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }


def options() -> Iterator[Option]:
    """Every option in the order of declaration: the one source of flags, docs rows and completion."""
    for section, declared in sections().items():
        for name, field in declared.model_fields.items():
            yield _option_of(section, name, field)


def _option_of(section: str, name: str, field: FieldInfo) -> Option:
    kind, choices, repeatable = _kind_of(field.annotation)
    default = field.get_default(call_default_factory=True)
    extra: Any = field.json_schema_extra
    return Option(
        key=f"{section}.{name}",
        flag=extra["flag"] or "--" + name.replace("_", "-"),
        section=section,
        kind=kind,
        choices=choices,
        repeatable=repeatable,
        default=default,
        help=field.description or "",
        example=extra["example"] or (str(default).lower() if isinstance(default, bool) else str(default)),
        allowed=allowed_values(field),
    )


def _kind_of(annotation: Any) -> tuple[Any, tuple[str, ...], bool]:
    """(kind, choices, repeatable) of a field's annotation."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is list:
        return (*_kind_of(get_args(annotation)[0])[:2], True)
    if get_origin(annotation) is Literal:
        return "choice", tuple(str(choice) for choice in get_args(annotation)), False
    return {int: "integer", float: "number", bool: "boolean", Path: "path", str: "text"}[annotation], (), False


def allowed_values(field: FieldInfo) -> str:
    """The range of a number in words: "2 to 8", "1 or more"; empty where it has none."""
    extra: Any = field.json_schema_extra or {}
    if extra.get("allowed"):
        return str(extra["allowed"])
    bounds: dict[str, Any] = {}
    for part in field.metadata:
        for name in ("ge", "gt", "le", "lt"):
            if hasattr(part, name):
                bounds[name] = getattr(part, name)
    low = f"{bounds['ge']}" if "ge" in bounds else f"more than {bounds['gt']}" if "gt" in bounds else ""
    high = f"{bounds['le']}" if "le" in bounds else f"{bounds['lt'] - 1}" if "lt" in bounds else ""
    if low and high:
        return f"{low}, up to {high}" if "gt" in bounds else f"{low} to {high}"
    return f"{low} or more" if "ge" in bounds else low


def config_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the YAML file, for editors and other programs."""
    schema = Config.model_json_schema()
    schema.pop("required", None)  # the model may also come from the command line
    for definition in (schema, *schema["$defs"].values()):
        for field in definition.get("properties", {}).values():
            for ours in ("flag", "allowed"):
                field.pop(ours, None)
            example = field.pop("example", None)
            if example is not None:
                field["examples"] = [_example_value(field, example)]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "AccuLLM configuration"}


def _example_value(field: Mapping[str, Any], text: str) -> Any:
    """An example as its YAML value, not as it is typed after a flag."""
    import yaml

    return [text] if field.get("type") == "array" else yaml.safe_load(text)
