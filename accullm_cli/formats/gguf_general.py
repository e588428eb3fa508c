"""What a GGUF file says of its model in general: name, size, licence, base models, how to sample (general.*).

`gguf.Metadata` makes these of a model's card and of its generation settings, as llama.cpp's convert_hf_to_gguf.py has
it do. It believes what it reads; so it is given only what it can write.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import yaml
from gguf import GGUFWriter, Metadata

from accullm_cli.formats.gguf_layout import Layout

CARD, GENERATION = "README.md", "generation_config.json"
# Of generation settings, what `Metadata` takes, by what it takes it as.
_WHOLE = ("top_k", "penalty_last_n", "mirostat")
_REAL = ("top_p", "min_p", "xtc_probability", "xtc_threshold", "temperature", "mirostat_tau", "mirostat_eta")


def write_general(writer: GGUFWriter, source: str, companions: Mapping[str, Path], layout: Layout) -> None:
    """Write what is known of a model.

    Args:
        source: "name" or "owner/name@revision". companions: the files beside its weights, by name.
    """
    shapes = layout.parameters.values()
    total = sum(map(prod, shapes))
    name = source.partition("@")[0].rpartition("/")[2] or "model"
    with TemporaryDirectory() as place:
        directory = Path(place) / name
        directory.mkdir()
        card = json.dumps(_card(companions.get(CARD)))  # JSON is YAML
        (directory / CARD).write_text(f"---\n{card}\n---\n", encoding="utf-8")
        (directory / GENERATION).write_text(json.dumps(_generation(companions.get(GENERATION))), encoding="utf-8")
        known = Metadata.load(model_path=directory, total_params=total)
    known.name = known.name or name
    if known.size_label is None:
        experts = [shape for shape in shapes if len(shape) == 3]
        one = sum(prod(shape[1:]) for shape in experts)
        shared = sum(prod(shape) for shape in shapes if len(shape) != 3)
        known.size_label = gguf.size_label(total, shared, one, experts[0][0] if experts else 0)
    if layout.plan.quantized:
        known.quantized_by = "AccuLLM"
    known.set_gguf_meta_model(writer)


def _card(path: Path | None) -> dict[str, str | list[str]]:
    """What the head of a model's card says, as text and lists of text; nothing where it is no YAML."""
    if path is None:
        return {}
    try:
        read = Metadata.load_model_card(path.parent)
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}
    found: dict[str, str | list[str]] = {}
    for key, value in read.items():
        if isinstance(value, list):
            found[str(key)] = [str(entry) for entry in value if _is_plain(entry)]
        elif _is_plain(value):
            found[str(key)] = str(value)
    return found


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool) and value != ""


def _generation(path: Path | None) -> dict[str, int | float]:
    """Of generation settings, those that are numbers as they should be."""
    if path is None:
        return {}
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    if not isinstance(read, dict):
        return {}
    found = {key: read[key] for key in _WHOLE if type(read.get(key)) is int}
    found |= {key: float(read[key]) for key in _REAL if type(read.get(key)) in (int, float)}
    repetition = read.get("penalty_repeat", read.get("repetition_penalty"))
    if isinstance(repetition, int | float) and not isinstance(repetition, bool):
        found["penalty_repeat"] = float(repetition)
    return found
