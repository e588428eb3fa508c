"""Where a model comes from: a directory, a GGUF file, a hub id or an alias, checked before anything is computed."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accullm_cli.errors import AccullmError
from accullm_cli.model.alias import aliases
from accullm_cli.model.integrity import ContentHashes, TensorInfo, check_finite, read_header
from accullm_cli.model.supported import check_supported, read_config
from accullm_cli.progress import Progress, silent

__all__ = ["ModelSource", "TensorInfo", "check_finite", "check_shapes", "open_source"]

# Why it is dangerous to follow a name out of the model's directory: companions are copied into artifacts.
_OUTSIDE_HINT = "a model's files must lie in its own directory; copy the file there if you trust it"


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint that has been checked: every weight file is whole and every tensor has a usable dtype.

    name: short, for default output directories ("llama-7b").
    origin: what the user typed, resolved ("meta-llama/Llama-2-7b-hf@<commit>", or an absolute path).
    directory: holds config.json and the safetensors files.
    tensors: by checkpoint name.
    companions: tokenizer, generation config, chat template and licence files, to be copied as they are.
    sha256: hex, over the content of config.json, the weight files and the companions.
    weight_bytes: size of the weight files.
    records: what is not as the user may expect ("source weights are Q4_1 ...").
    untied, kept: see model.accounting; `config` is what it made of config.json.
    """

    name: str
    origin: str
    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    companions: tuple[Path, ...]
    sha256: str
    weight_bytes: int
    records: tuple[str, ...]
    untied: bool = False
    kept: tuple[str, ...] = ()


def open_source(model: str, cache: Path, progress: Progress = silent) -> ModelSource:
    """Find and check a model; reads headers and hashes files, but loads no weights.

    Args:
        model: an existing path, else an alias, else a hub id `owner/name[@revision]`.
        cache: directory for content hashes and imported GGUF files.

    Raises:
        AccullmError: nothing of that name; damaged, pickled or quantized weights; an unsupported architecture.
    """
    path = Path(model).expanduser()
    if path.exists():
        if path.is_dir():
            return open_directory(path, cache, progress)
        if path.suffix == ".gguf":
            return _open_gguf(path, cache, progress)
        raise AccullmError("is neither a model directory nor a GGUF file", path, "give the directory that it lies in")
    if model.startswith((".", "/", "~")) or model.endswith(".gguf"):
        raise AccullmError("no such file or directory", model, "check its spelling")

    from accullm_cli.model.hub import HubId, download, parse_hub_id

    known = aliases()
    alias = known.get(model)
    hub_id = HubId(alias.source, alias.revision) if alias else parse_hub_id(model)
    if hub_id is None:
        near = difflib.get_close_matches(model.lower(), known, n=1)
        raise AccullmError(
            "no directory, GGUF file, alias or hub id (owner/name) of this name",
            model,
            f"did you mean {near[0]}?" if near else "'accullm models' lists the aliases",
        )
    directory, commit = download(hub_id)
    name = alias.name if alias else hub_id.repo.rpartition("/")[2]
    return open_directory(directory, cache, progress, name=name, origin=f"{hub_id.repo}@{commit}")


def open_directory(
    directory: Path,
    cache: Path,
    progress: Progress = silent,
    *,
    name: str | None = None,
    origin: str | None = None,
    records: tuple[str, ...] = (),
) -> ModelSource:
    """`open_source` for a Hugging Face directory: one model.safetensors, or shards with an index."""
    from accullm_cli.model.accounting import account
    from accullm_cli.model.hub import COMPANIONS, INDEX, WEIGHTS, refuse_pickled

    directory = Path(os.path.abspath(directory))
    names = sorted(entry.name for entry in directory.iterdir() if entry.is_file())
    if "config.json" not in names:
        if not any(entry.endswith(".safetensors") for entry in names):
            refuse_pickled(names, directory, str(directory))
        raise AccullmError("holds no config.json", directory, "give a Hugging Face model directory")
    config_file = _inside(directory, "config.json", directory)
    config = read_config(config_file)
    records += check_supported(config, config_file)
    refuse_pickled(names, directory, str(directory))
    if WEIGHTS in names:
        files = [_inside(directory, WEIGHTS, directory)]
        tensors = read_header(files[0])
    else:
        tensors = _read_shards(directory, directory / INDEX)
        files = sorted({tensor.file for tensor in tensors.values()})
    companions = tuple(
        _inside(directory, entry, directory)
        for entry in names
        if any(fnmatch.fnmatchcase(entry, pattern) for pattern in COMPANIONS)
    )
    accounting = account(directory, config, tensors)
    hashes = ContentHashes(cache, progress).of([config_file, *files, *companions])
    content = sorted(f"{path.name} {digest}" for path, digest in hashes.items())
    return ModelSource(
        name=name or _short_name(directory),
        origin=origin or str(directory),
        directory=directory,
        config=accounting.config,
        tensors=tensors,
        companions=companions,
        sha256=hashlib.sha256("\n".join(content).encode()).hexdigest(),
        weight_bytes=sum(path.stat().st_size for path in files),
        records=records + accounting.records,
        untied=accounting.untied,
        kept=accounting.kept,
    )


def check_shapes(source: ModelSource, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint whose tensors are not those that its config.json describes.

    Args:
        expected: shapes by checkpoint name; tensors beyond these are no concern.

    Raises:
        AccullmError: names the first tensor that is missing or of another shape, and how many more there are.
    """
    missing = [name for name in expected if name not in source.tensors]
    wrong = [name for name in expected if name in source.tensors and source.tensors[name].shape != expected[name]]
    if missing:
        raise AccullmError(
            f"tensor {missing[0]} is missing{_more(missing)}",
            source.directory,
            "download the weights again, or correct config.json",
        )
    if wrong:
        stored, wanted = list(source.tensors[wrong[0]].shape), list(expected[wrong[0]])
        raise AccullmError(
            f"tensor {wrong[0]} has shape {stored}, but config.json makes it {wanted}{_more(wrong)}",
            source.directory,
            "config.json and weights belong to different models: take both from one place",
        )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1:,} more)" if len(names) > 1 else ""


def _open_gguf(path: Path, cache: Path, progress: Progress) -> ModelSource:
    from accullm_cli.model.gguf import import_gguf

    path = Path(os.path.abspath(path))
    digest = ContentHashes(cache, progress).of([path])[path]
    name = _short_name(path.with_suffix(""))
    directory = cache / "imported" / f"{name}-{digest[:16]}"
    records = import_gguf(path, directory, progress)
    return open_directory(directory, cache, progress, name=name, origin=str(path), records=records)


def _read_shards(directory: Path, index: Path) -> dict[str, TensorInfo]:
    """The tensors of a sharded checkpoint; index and shards must agree exactly."""
    try:
        weight_map: Mapping[str, str] = json.loads(_inside(directory, index.name, directory).read_bytes())["weight_map"]
        shards = sorted(set(weight_map.values()))
        if not shards or not all(isinstance(shard, str) for shard in shards):
            raise TypeError("weight_map names no files")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AccullmError(f"not an index of shards ({error})", index, "download it again") from None
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        file = _inside(directory, shard, index)
        if not file.is_file():
            raise AccullmError(f"names {shard}, which is absent", index, "download the missing file")
        for name, tensor in read_header(file).items():
            if weight_map.get(name) != shard:
                place = f"puts it into {weight_map[name]}" if name in weight_map else "does not name it"
                raise AccullmError(f"{shard} holds tensor {name}, but the index {place}", index, "download both again")
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors:
            raise AccullmError(f"puts tensor {name} into {shard}, which does not hold it", index, "download both again")
    return {name: tensors[name] for name in weight_map}


def _inside(directory: Path, name: str, named_by: Path) -> Path:
    """The path of a model's file, after links; it must not lead out of the model's directory.

    One exception: in the hub's cache, a snapshot's files are links into the blobs of the same repository.
    """
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise AccullmError(f"names {name}, outside the model's directory", named_by, _OUTSIDE_HINT)
    file = directory / name
    target = Path(os.path.realpath(file))
    allowed = [Path(os.path.realpath(directory))]
    if directory.parent.name == "snapshots":
        allowed.append(Path(os.path.realpath(directory.parent.parent / "blobs")))
    if not any(target.is_relative_to(root) for root in allowed):
        raise AccullmError(f"{name} is a link to {target}, outside the model's directory", named_by, _OUTSIDE_HINT)
    return file


def _short_name(path: Path) -> str:
    """A directory's name as a name for other directories."""
    return re.sub(r"[^\w.-]+", "-", Path(os.path.abspath(path)).name).strip("-.") or "model"
