"""A zoo file: the configuration of many models, what they share and what each has of its own."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from accullm_cli.config import Config
from accullm_cli.config_file import Setting, config_of, read_config_files, read_nodes, settings_of
from accullm_cli.errors import AccullmError
from accullm_cli.places import artifact_path, run_path

MODELS = "models"
EXAMPLE = "write `models:` and below it, indented, `- MODEL` for each"


@dataclass(frozen=True)
class Entry:
    """One model of a zoo.

    name: that of its artifact's directory, which no other has. where: "zoo.yaml:7", for a refusal.
    """

    name: str
    where: str
    config: Config


@dataclass(frozen=True)
class Zoo:
    """All models of a zoo file, in its order.

    out: where the page goes, and each artifact that has no place of its own.
    """

    out: Path
    entries: tuple[Entry, ...]


def read_zoo(path: Path, files: Iterable[str | Path] = (), out: Path | None = None) -> Zoo:
    """Read a zoo file: a configuration file that has a list of `models` in the place of `model`.

    An entry is a model, or a mapping with `model` and settings of its own, which override the shared ones. A model with
    *, ? or [ in it stands for all paths that match. `export.out` is the directory in which each artifact has its own
    (default: the file's name with -out behind); in an entry it is the artifact's.

    Args:
        files: configuration files or presets that the shared settings override.
        out: overrides the shared `export.out`.

    Raises:
        AccullmError: as `load_config`; no models, a pattern that nothing matches, or two models with one output.
    """
    root = read_nodes(path)
    shared, items = _parts(path, root)
    shared = {**read_config_files(files), **shared}
    base = Setting(out, "--out") if out else shared.pop("export.out", Setting(f"{path.stem}-out", str(path)))
    shared.pop("export.out", None)
    place = Path(config_of({**shared, "model": Setting("any", str(path)), "export.out": base}).export.out or ".")
    entries = tuple(entry for item in items for entry in _entries(path, item, shared, place))
    _refuse_shared_places(entries)
    return Zoo(place, entries)


def _parts(path: Path, root: yaml.Node | None) -> tuple[dict[str, Setting], list[yaml.Node]]:
    """The shared settings, and the nodes of the entries."""
    if not isinstance(root, yaml.MappingNode):
        raise AccullmError("holds no mapping of keys", path, EXAMPLE)
    lists = [(key, value) for key, value in root.value if key.value == MODELS]
    if not lists:
        raise AccullmError("names no models", path, EXAMPLE)
    if len(lists) > 1:
        where = f"{path}:{lists[1][0].start_mark.line + 1}: {MODELS}"
        raise AccullmError(
            f"given twice (first in line {lists[0][0].start_mark.line + 1})", where, "keep one of the two"
        )
    value = lists[0][1]
    if not isinstance(value, yaml.SequenceNode) or not value.value:
        raise AccullmError("is not a list of models", f"{path}:{value.start_mark.line + 1}: {MODELS}", EXAMPLE)
    others = [(key, value) for key, value in root.value if key.value != MODELS]
    settings = settings_of(path, yaml.MappingNode(root.tag, others, root.start_mark, root.end_mark))
    if "model" in settings:
        raise AccullmError("a zoo has models", settings["model"].where, EXAMPLE)
    return settings, value.value


def _entries(path: Path, item: yaml.Node, shared: Mapping[str, Setting], place: Path) -> Iterator[Entry]:
    """The models that one item of the list stands for."""
    where = f"{path}:{item.start_mark.line + 1}"
    if isinstance(item, yaml.ScalarNode):
        own = {"model": Setting(item.value, f"{where}: model")}
    else:
        own = settings_of(path, item)
        if "model" not in own:
            raise AccullmError("names no model", where, "write `model: MODEL` there")
    config = config_of({**shared, **own})
    for model in _models(config.model, own["model"].where):
        named = config.model_copy(update={"model": model})
        if "export.out" not in own:
            directory = place / artifact_path(named).name
            named = named.model_copy(update={"export": named.export.model_copy(update={"out": directory})})
        yield Entry(artifact_path(named).name, where, named)


def _models(model: str, where: str) -> list[str]:
    """The paths that a pattern matches, in order; whatever is no pattern stands for itself."""
    if not glob.has_magic(model) or os.path.exists(model):
        return [model]
    # Beside models there may be notes and scripts; whether a directory is one is for the source to say.
    found = [path for path in sorted(glob.glob(model)) if Path(path).is_dir() or path.endswith(".gguf")]
    if not found:
        raise AccullmError(f"no directory and no GGUF file matches {model}", where, "check its spelling")
    return found


def _refuse_shared_places(entries: Iterable[Entry]) -> None:
    """Two models may not write to one place."""
    taken: dict[Path, Entry] = {}
    for entry in entries:
        options = entry.config.validation
        places = {
            "export.out": artifact_path(entry.config),
            "machine.run": run_path(entry.config),
            "validation.junit": options.junit,
            "validation.summary": options.summary,
        }
        for key, place in places.items():
            if place is None:
                continue
            other = taken.setdefault(place.resolve(), entry)
            if other is not entry:
                what = f"{other.config.model} and {entry.config.model} would both write to {place}"
                raise AccullmError(what, entry.where, f"give each a {key} of its own")


def on_machine(entry: Entry, threads: int, device: str) -> Entry:
    """The same model, converted with so many threads and on this device."""
    machine = entry.config.machine.model_copy(update={"threads": threads, "device": device})
    return replace(entry, config=entry.config.model_copy(update={"machine": machine}))
