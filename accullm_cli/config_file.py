"""Load a configuration: defaults < `--config` files < `--set key=value` < flags.

Every value carries where it came from, so that a refusal names the file and line, the `--set` or the flag.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from accullm_cli.config import Config
from accullm_cli.config_options import Option, options, sections
from accullm_cli.errors import AccullmError
from accullm_cli.resources import resource

MODEL_HINT = "name a directory, a GGUF file, a hub id or an alias, or set `model` in the --config file"


@dataclass(frozen=True)
class Setting:
    """A value and where it was given: `where` is "FILE:LINE: KEY", "--set KEY" or "--FLAG".

    items: the same for each item, where the value is a list in a file.
    """

    value: Any
    where: str
    items: tuple[str, ...] = ()


def load_config(
    model: str | None = None,
    files: Iterable[str | Path] = (),
    sets: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration that these layers give, each overriding the one before.

    Args:
        model: the model, overriding the files' `model`.
        files: YAML files, or names of presets in `configs/` ("fast"); a later one overrides an earlier one.
        sets: "plan.bits=4"; the value is text, or YAML where it begins with "[" or is "null".
        flags: dotted key to value, for what was given on the command line.

    Raises:
        AccullmError: an unknown key, a value of the wrong type or out of range, an unreadable file, or no model;
            its line says where.
    """
    settings = read_config_files(files)
    settings = _checked({**settings, **dict(_parse_set(text) for text in sets)})
    flag_of = {option.key: option.flag for option in options()}
    settings.update({key: Setting(value, flag_of[key]) for key, value in (flags or {}).items()})
    if model is not None:
        settings["model"] = Setting(model, "MODEL")
    return config_of(settings)


def config_of(settings: Mapping[str, Setting]) -> Config:
    """The configuration that settings give.

    Raises:
        AccullmError: a value of the wrong type or out of range, or no model.
    """
    checked = _checked(dict(settings))
    if "model" not in checked:
        raise AccullmError("not given", "MODEL", MODEL_HINT)
    return Config.model_validate(_nested(checked))


# -- presets -----------------------------------------------------------------------------------------------

# The presets that an effort stands for.
EFFORTS: Mapping[str, tuple[str, ...]] = {"fast": ("fast",), "balanced": (), "best": ("best",)}


def presets_of(effort: str | None) -> tuple[str, ...]:
    """The names of the presets that come before all files.

    Raises:
        AccullmError: no such effort.
    """
    if effort is None:
        return ()
    if effort not in EFFORTS:
        raise AccullmError(f"'{effort}' is not allowed", "--effort", f"give {_choice_text(tuple(EFFORTS))}")
    return EFFORTS[effort]


# -- files -------------------------------------------------------------------------------------------------


def presets() -> dict[str, Path]:
    """The presets in `configs/` by name."""
    return {path.stem: path for path in sorted(resource("configs").glob("*.yaml"))}


def find_config(name: str | Path) -> Path:
    """The file that `--config NAME` means: a path that exists, else a preset."""
    if Path(name).exists():
        return Path(name)
    paths = presets()
    if str(name) in paths:
        return paths[str(name)]
    similar = difflib.get_close_matches(str(name), paths, n=1)
    hint = f"did you mean {similar[0]}?" if similar else f"give a path, or one of {', '.join(paths)}"
    raise AccullmError(f"{name} is neither a file nor a preset", "--config", hint)


def read_config_files(files: Iterable[str | Path]) -> dict[str, Setting]:
    """The settings of several files or presets, the last one winning.

    Raises:
        AccullmError: as for `load_config`.
    """
    settings: dict[str, Setting] = {}
    for file in files:
        settings = _checked({**settings, **read_config_file(find_config(file))})
    return settings


def read_config_file(path: Path) -> dict[str, Setting]:
    """The settings in a YAML file, by dotted key. Values are not yet checked.

    Raises:
        AccullmError: unreadable, not UTF-8, not YAML, not a mapping; an unknown key, or one given twice.
    """
    root = read_nodes(path)
    return {} if root is None else settings_of(path, root)


def read_nodes(path: Path) -> yaml.Node | None:
    """A YAML file as nodes, which know their lines; None for a file without any.

    Raises:
        AccullmError: unreadable, not UTF-8, not YAML.
    """
    return _compose(path, _read_text(path))


def settings_of(path: Path, node: yaml.Node) -> dict[str, Setting]:
    """The settings that a node of a file gives, by dotted key. Values are not yet checked.

    Raises:
        AccullmError: not a mapping; an unknown key, or one given twice.
    """
    return dict(_walk(path, node, "", {}))


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise AccullmError(f"cannot be read ({reason})", path, "give a YAML file") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        where = f"{path}:{line}"
        raise AccullmError(f"not UTF-8 (byte 0x{content[error.start]:02x})", where, "save the file as UTF-8") from None


def _compose(path: Path, text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except (RecursionError, ValueError, OverflowError) as error:  # the last two of an escape that is no character
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise AccullmError(f"not valid YAML ({reason})", path, "correct it") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise AccullmError(f"not valid YAML ({error.problem})", f"{path}:{line}", "correct this line") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"not valid YAML (character #x{ord(text[error.position]):04x} is not allowed)"
        raise AccullmError(problem, f"{path}:{line}", "remove it") from None


def _walk(path: Path, node: yaml.Node, prefix: str, lines: dict[str, int]) -> Iterable[tuple[str, Setting]]:
    """The settings below `node`, whose own dotted key is `prefix`; `lines` remembers where a key was seen."""
    if not isinstance(node, yaml.MappingNode):
        if prefix and _value(path, node) is None:  # a section whose keys are all commented out
            return
        where = f"{path}:{node.start_mark.line + 1}"
        problem = f"{_show(_value(path, node))} is not a mapping of keys"
        example = f"{prefix}:" if prefix else "plan:"
        key = next(option.key.split(".")[1] for option in options() if option.section == (prefix or "plan"))
        raise AccullmError(
            problem,
            f"{where}: {prefix}" if prefix else where,
            f"write `{example}` and below it, indented, `{key}: VALUE`",
        )
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise AccullmError("a key is no word", f"{path}:{key_node.start_mark.line + 1}", "correct this line")
        key = f"{prefix}.{key_node.value}" if prefix else str(key_node.value)
        line = key_node.start_mark.line + 1
        where = f"{path}:{line}: {key}"
        if key in lines:
            raise AccullmError(f"given twice (first in line {lines[key]})", where, "keep one of the two")
        lines[key] = line
        if key in sections():
            yield from _walk(path, value_node, key, lines)
            continue
        _require_known(key, where)
        items = value_node.value if isinstance(value_node, yaml.SequenceNode) else ()
        yield (
            key,
            Setting(
                _value(path, value_node),
                f"{path}:{value_node.start_mark.line + 1}: {key}",
                tuple(f"{path}:{item.start_mark.line + 1}: {key}" for item in items),
            ),
        )


def _value(path: Path, node: yaml.Node) -> Any:
    """What a node stands for, by YAML's safe rules."""
    try:
        return yaml.SafeLoader("").construct_document(node)
    except yaml.MarkedYAMLError as error:
        where = f"{path}:{node.start_mark.line + 1}"
        raise AccullmError(f"not valid YAML ({error.problem})", where, "correct this line") from None
    except RecursionError:
        raise AccullmError("not valid YAML (nested too deep)", path, "correct it") from None
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        # A date such as 2024-99-99, or a tag that its value does not suit: !!int "", !!bool x.
        raise AccullmError(
            f"not valid YAML ({error})", f"{path}:{node.start_mark.line + 1}", "put it in quotes"
        ) from None


# -- --set -------------------------------------------------------------------------------------------------


def _parse_set(text: str) -> tuple[str, Setting]:
    key, equals, value = text.partition("=")
    key = key.strip()
    where = f"--set {key}"
    if not equals:
        raise AccullmError("no value given", where, f"write --set {key}=VALUE")
    if key in sections():
        raise AccullmError("this is a section", where, f"name one of its keys, as in --set {_first_key(key)}=VALUE")
    _require_known(key, where)
    value = value.strip()
    if value != "null" and not value.startswith("["):
        return key, Setting(value, where)
    try:
        return key, Setting(yaml.safe_load(value), where)
    except yaml.YAMLError:
        raise AccullmError(f"'{value}' is not a YAML list", where, "write it as [one, two]") from None


def _first_key(section: str) -> str:
    return next(option.key for option in options() if option.section == section)


# -- keys --------------------------------------------------------------------------------------------------


def _require_known(key: str, where: str) -> None:
    """Refuse a key that no option has, and suggest the nearest that one has."""
    keys = ["model", *(option.key for option in options())]
    if key not in keys:
        nearest = _nearest(key, keys)
        hint = f"did you mean {nearest}?" if nearest else _keys_hint(key)
        raise AccullmError("unknown key", where, hint)


def _nearest(key: str, keys: list[str]) -> str | None:
    """The known key that `key` was most likely meant to be."""
    leaf = key.rpartition(".")[2].replace("-", "_")
    same_leaf = [name for name in keys if name.rpartition(".")[2] == leaf]
    if same_leaf:
        return max(same_leaf, key=lambda name: difflib.SequenceMatcher(None, name, key).ratio())
    by_flag = {option.flag.removeprefix("--").replace("-", "_"): option.key for option in options()}
    if leaf in by_flag:
        return by_flag[leaf]
    for candidates in (["model", *sections()], keys):
        if similar := difflib.get_close_matches(key, candidates, n=1, cutoff=0.7):
            return similar[0]
    similar = difflib.get_close_matches(leaf, [name.rpartition(".")[2] for name in keys], n=1, cutoff=0.7)
    return next((name for name in keys if similar and name.rpartition(".")[2] == similar[0]), None)


def _keys_hint(key: str) -> str:
    section = key.partition(".")[0]
    if section in sections():
        return f"the keys of {section} are {', '.join(sections()[section].model_fields)}"
    return f"the keys here are model, {', '.join(sections())}"


# -- values ------------------------------------------------------------------------------------------------


def _checked(settings: dict[str, Setting]) -> dict[str, Setting]:
    """`settings`, if their values are valid; layer by layer, so that an override does not hide a mistake below it."""
    try:
        Config.model_validate({"model": "unknown as yet", **_nested(settings)})
    except ValidationError as error:
        raise _refusal(error, settings) from None
    return settings


def _nested(settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Dotted keys as nested dicts."""
    nested: dict[str, Any] = {}
    for key, setting in settings.items():
        section, dot, name = key.rpartition(".")
        (nested.setdefault(section, {}) if dot else nested)[name] = setting.value
    return nested


def _refusal(error: ValidationError, settings: Mapping[str, Setting]) -> AccullmError:
    """The first of pydantic's findings as our one line."""
    finding = error.errors(include_url=False)[0]
    names = [str(part) for part in finding["loc"] if not isinstance(part, int)]
    index = next((part for part in finding["loc"] if isinstance(part, int)), None)
    key = ".".join(names)
    setting = settings[key]
    value, where = setting.value, setting.where
    if index is not None:
        value = value[index]
        where = setting.items[index] if setting.items else where
    option = next((option for option in options() if option.key == key), None)
    problem, hint = _phrase(finding["type"], finding.get("ctx", {}), value, option)
    return AccullmError(problem, where, hint)


def _phrase(kind: str, context: Mapping[str, Any], value: Any, option: Option | None) -> tuple[str, str | None]:
    """(what, hint) for one of pydantic's error types."""
    allowed = f"give {option.allowed}" if option and option.allowed else None
    if kind == "value_error":
        problem, _, hint = str(context["error"]).partition("; ")
        return problem, hint or allowed or f"give, for example, {option.example if option else 'a name'}"
    bound = next((context[name] for name in ("ge", "gt", "le", "lt") if name in context), None)
    bound = f"{bound:g}" if isinstance(bound, float) else bound
    if kind.startswith("greater_than"):
        return f"{value} is {'below' if 'ge' in context else 'not above'} {bound}", allowed
    if kind.startswith("less_than"):
        return f"{value} is {'above' if 'le' in context else 'not below'} {bound}", allowed
    if kind == "literal_error" and option:
        # 6 is not a misspelt 16.
        similar = [] if str(value).isdecimal() else difflib.get_close_matches(str(value), option.choices, n=1)
        hint = f"did you mean {similar[0]}?" if similar else f"give {_choice_text(option.choices)}"
        return f"{_show(value)} is not allowed", hint
    if kind == "list_type" and option:
        return f"{_show(value)} is not a list", f"write it as [{value}]"
    if kind == "too_short":
        return "the list is empty", "give at least one"
    if kind == "string_pattern_mismatch":
        return f"{_show(value)} is not allowed", allowed
    meant, advice = {
        "int": ("a whole number", allowed),
        "float": ("a number", allowed),
        "bool": ("true or false", "give true or false"),
        "string": ("text", "put it in quotes"),
        "path": ("a path", "put it in quotes"),
    }[kind.split("_")[0]]
    return f"{_show(value)} is not {meant}", advice


def _choice_text(choices: Sequence[str]) -> str:
    """ "a, b or c"."""
    return " or ".join([", ".join(choices[:-1]), choices[-1]]) if len(choices) > 1 else choices[0]


def _show(value: Any) -> str:
    """A value as its author would recognise it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return repr(value) if isinstance(value, str) else str(value)
