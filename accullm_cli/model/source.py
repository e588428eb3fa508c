"""Where a model comes from: a directory, a GGUF file, a hub id or an alias, checked before anything is computed."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accullm_cli.errors import AccullmError
from accullm_cli.model.alias import aliases
from accullm_cli.model.files import inside, list_files, refuse_adapter, sort_files
from accullm_cli.model.gguf import MARKER
from accullm_cli.model.integrity import ContentHashes, TensorInfo, check_finite, stamp_of
from accullm_cli.model.supported import check_supported, read_config
from accullm_cli.model.weights import INDEX, WEIGHTS, read_weights, refuse_pickled
from accullm_cli.progress import Progress, silent
from accullm_cli.run import HUB_RECORDS, write_text

if TYPE_CHECKING:
    from accullm_cli.model.hub import HubId, Snapshot

# Where in the cache the directories lie that GGUF files have become.
IMPORTS = "imported"

__all__ = ["ModelSource", "TensorInfo", "check_finite", "check_shapes", "open_source"]


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint that has been checked: every weight file is whole and every tensor has a usable dtype.

    name: short, for default output directories ("llama-7b").
    origin: what the user typed, resolved ("meta-llama/Llama-2-7b-hf@<commit>", or an absolute path).
    directory: holds config.json and the safetensors files.
    tensors: by checkpoint name.
    companions: files to be copied as they are (tokenizer, templates, licences, ...), by name relative to the directory.
    sha256: hex, over the content of config.json and the weight files. companions_sha256: over that of the companions.
    weight_bytes: size of the weight files.
    records: what is not as the user may expect ("source weights are Q4_1 ...").
    untied, kept: see model.accounting; `config` is what it made of config.json.
    stamps: of the weight files, when their headers were read; by these one sees that a file was changed.
    """

    name: str
    origin: str
    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    companions: Mapping[str, Path]
    sha256: str
    companions_sha256: str
    weight_bytes: int
    records: tuple[str, ...]
    untied: bool = False
    kept: tuple[str, ...] = ()
    stamps: Mapping[Path, str] = field(default_factory=dict, repr=False)

    def without_kept(self) -> ModelSource:
        """The same without what the model has no place for: for artifacts that have none either."""
        from accullm_cli.model.accounting import KEPT, LEFT_OUT

        told = tuple(sentence.replace(KEPT, LEFT_OUT) for sentence in self.records)
        return replace(self, kept=(), records=told)

    def check_unchanged(self, files: Iterable[Path]) -> None:
        """Refuse weight files that are no longer those that this source was opened with.

        Raises:
            AccullmError: one was written to, replaced or removed since.
        """
        for file in files:
            if file in self.stamps and self.stamps[file] != stamp_of(file):
                what = "changed while it was being converted"
                raise AccullmError(what, file, "run the same command again when nobody writes to it any more")


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

    from accullm_cli.model.hub import download

    hub_id, name = _on_hub(model)
    snapshot = download(hub_id, progress)
    return open_directory(
        snapshot.directory,
        cache,
        progress,
        name=name,
        origin=f"{hub_id.repo}@{snapshot.commit}",
        left_behind=_remembered(snapshot, cache / HUB_RECORDS),
    )


def describe_source(model: str, cache: Path) -> ModelSource | None:
    """`open_source` for a look at a model: no content is read, so that both of its SHA-256 are empty.

    None for a model that would have to be fetched from the hub first, or imported from a GGUF file.

    Raises:
        AccullmError: as `open_source`, but for what the weights hold.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return open_directory(path, cache, hashed=False)
    if path.exists() and path.suffix != ".gguf":
        return open_source(model, cache)  # which refuses it
    if not path.exists():
        _on_hub(model)
    return None


def _on_hub(model: str) -> tuple[HubId, str]:
    """What a name that is no path stands for on the hub, and a short name."""
    if model.startswith((".", "/", "~")) or model.endswith(".gguf"):
        raise AccullmError("no such file or directory", model, "check its spelling")

    from accullm_cli.model.hub import HubId, parse_hub_id

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
    return hub_id, alias.name if alias else hub_id.repo.rpartition("/")[2]


def open_directory(
    directory: Path,
    cache: Path,
    progress: Progress = silent,
    *,
    name: str | None = None,
    origin: str | None = None,
    records: tuple[str, ...] = (),
    left_behind: tuple[str, ...] | None = None,
    hashed: bool = True,
) -> ModelSource:
    """`open_source` for a Hugging Face directory: one model.safetensors, or shards with an index.

    Args:
        left_behind: what of the model was not fetched, where that is known.
        hashed: otherwise no content is read, and both SHA-256 are empty.
    """
    from accullm_cli.model.accounting import account

    directory = Path(os.path.abspath(directory))
    names = {entry.name for entry in directory.iterdir() if entry.is_file()}
    for wanted in ("config.json", WEIGHTS, INDEX):
        if wanted not in names and (directory / wanted).is_symlink():
            target = os.readlink(directory / wanted)
            raise AccullmError(f"{wanted} is a link to {target}, which is no file", directory, "download it again")
    refuse_adapter(names, directory)
    if "config.json" not in names:
        if not any(entry.endswith(".safetensors") for entry in names):
            refuse_pickled(names, directory, str(directory))
        raise AccullmError("holds no config.json", directory, "give a Hugging Face model directory")
    config_file = inside(directory, "config.json", directory)
    config = read_config(config_file)
    records += check_supported(config, config_file)
    # Before anything is read of them: what changes from here on is noticed.
    stamps = {path: stamp_of(path) for path in sorted(directory.rglob("*.safetensors"))}
    weights = read_weights(directory, names)
    sizes, unseen = list_files(directory, cache)
    imported = {MARKER} if directory.parent == Path(os.path.abspath(cache / IMPORTS)) else set()
    files = sort_files(sizes, {"config.json", *imported, *weights.files}, unseen)
    companions = {name: inside(directory, name, directory) for name in files.companions}
    shards = sorted({tensor.file for tensor in weights.tensors.values()})
    accounting = account(directory, config, weights.tensors)
    contents, beside = [config_file, *shards], [*companions.values()]
    hashes = ContentHashes(cache, progress).of([*contents, *beside]) if hashed else {}
    return ModelSource(
        name=name or _short_name(directory),
        origin=origin or str(directory),
        directory=directory,
        config=accounting.config,
        tensors=weights.tensors,
        companions=companions,
        sha256=_digest(directory, hashes, contents) if hashed else "",
        companions_sha256=_digest(directory, hashes, beside) if hashed else "",
        weight_bytes=sum(path.stat().st_size for path in shards),
        records=(
            *records,
            *weights.records,
            *(files.records if left_behind is None else left_behind),
            *accounting.records,
        ),
        untied=accounting.untied,
        kept=accounting.kept,
        stamps={path: stamps[path] for path in shards if path in stamps},
    )


def _digest(directory: Path, hashes: Mapping[Path, str], files: Sequence[Path]) -> str:
    lines = sorted(f"{file.relative_to(directory).as_posix()} {hashes[file]}" for file in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


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


def _remembered(snapshot: Snapshot, path: Path) -> tuple[str, ...] | None:
    """What the hub has beside what was fetched: as it says now, else as it said when this run began.

    So a run that resumes without a network writes the same artifact.
    """
    if snapshot.left_behind is not None:
        write_text(path, json.dumps({snapshot.commit: snapshot.left_behind}))
        return snapshot.left_behind
    try:
        content: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return tuple(content[snapshot.commit]) if snapshot.commit in content else None


def _open_gguf(path: Path, cache: Path, progress: Progress) -> ModelSource:
    from accullm_cli.model.gguf import import_gguf

    path = Path(os.path.abspath(path))
    digest = ContentHashes(cache, progress).of([path])[path]
    name = _short_name(path.with_suffix(""))
    directory = cache / IMPORTS / f"{name}-{digest[:16]}"
    records = import_gguf(path, directory, progress)
    return open_directory(directory, cache, progress, name=name, origin=str(path), records=records)


def _short_name(path: Path) -> str:
    """A directory's name as a name for other directories."""
    return re.sub(r"[^\w.-]+", "-", Path(os.path.abspath(path)).name).strip("-.") or "model"
