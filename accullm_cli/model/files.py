"""What each file of a model's directory is for: read, copied into artifacts, or left behind and named.

Files are copied by exclusion: whatever is neither weights nor code nor hidden travels, whatever its name.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from accullm_cli.errors import AccullmError

# Endings of weights (of any program), of a training's state and of tables that say where weights are.
WEIGHT_ENDINGS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".distcp"),
    *(".gguf", ".ggml", ".onnx", ".onnx_data", ".onnx.data", ".h5", ".hdf5", ".keras", ".pb", ".msgpack", ".ot"),
    *(".tflite", ".mlmodel", ".nemo", ".pdparams", ".llamafile", ".engine", ".pte", ".index.json"),
)
CODE_ENDINGS = (
    *(".py", ".pyc", ".pyi", ".ipynb", ".sh", ".bat", ".ps1", ".so", ".dll", ".dylib", ".exe", ".whl"),
    *(".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp"),
)
# The largest tokenizers have some 40 MB; what is much larger is data that happens to lie here.
LARGEST_COMPANION = 500_000_000
# The files by which a directory of our own is known, be it an artifact's or a run's.
_OUR_MARKS = ("accullm.json", "run.yaml")
_ADAPTER = "adapter_config.json"

_WEIGHTS, _CODE, _HIDDEN = "weights that are not read", "code", "hidden files"
_LARGE = f"files of more than {LARGEST_COMPANION // 1_000_000} MB"
_MODELS, _OUTPUTS = "directories with a model of their own", "what accullm wrote"
_LINKS, _BROKEN = "links to directories", "broken links"

# Why it is dangerous to follow a name out of the model's directory: companions are copied into artifacts.
_OUTSIDE_HINT = "a model's files must lie in its own directory; copy the file there if you trust it"


@dataclass(frozen=True)
class SortedFiles:
    """Names, relative to the model's directory.

    companions: to be copied as they are.
    left_behind: by the reason for it.
    """

    companions: tuple[str, ...]
    left_behind: Mapping[str, tuple[str, ...]]

    @property
    def records(self) -> tuple[str, ...]:
        """A sentence that names what is left behind; none where that is nothing."""
        parts = [f"{reason} ({_few(names)})" for reason, names in self.left_behind.items()]
        return (f"left behind: {'; '.join(parts)}",) if parts else ()


def sort_files(
    sizes: Mapping[str, int], used: Collection[str], unseen: Mapping[str, tuple[str, ...]] | None = None
) -> SortedFiles:
    """Tell companions from what is left behind.

    Args:
        sizes: bytes of each file by name, with / between the directories.
        used: those that are read themselves.
        unseen: what is left behind in any case, by the reason.
    """
    nested = _nested_models(sizes)
    companions: list[str] = []
    left = {reason: [*names] for reason, names in (unseen or {}).items()}
    for name in sorted(sizes):
        if name in used:
            continue
        reason, named = _why_left(name, sizes[name], nested)
        if not reason:
            companions.append(name)
        elif named not in left.setdefault(reason, []):
            left[reason].append(named)
    return SortedFiles(tuple(companions), {reason: tuple(names) for reason, names in left.items()})


def _why_left(name: str, size: int, nested: Mapping[str, str]) -> tuple[str, str]:
    """Why a file is left behind ("" if it is not), and the name of the file or of its directory."""
    path = PurePosixPath(name)
    for directory in (path, *path.parents):
        if str(directory) in nested:
            return nested[str(directory)], f"{directory}/"
    for number, part in enumerate(path.parts, start=1):
        if part.startswith(".") or part == "__pycache__":
            shown = "/".join(path.parts[:number])
            return _HIDDEN, f"{shown}/" if number < len(path.parts) or name.endswith("/") else shown
    lower = name.lower()
    if lower.endswith(WEIGHT_ENDINGS):
        return _WEIGHTS, name
    if lower.endswith(CODE_ENDINGS):
        return _CODE, name
    if name in _OUR_MARKS:
        return _OUTPUTS, name
    return (_LARGE, name) if size > LARGEST_COMPANION else ("", name)


def _nested_models(names: Iterable[str]) -> dict[str, str]:
    """Directories below the model's own that hold another model (a training's checkpoint, an adapter) or our output."""
    inside: dict[str, list[str]] = {}
    for name in names:
        directory, _, file = name.rpartition("/")
        if directory:
            inside.setdefault(directory, []).append(file)
    nested = {}
    for directory, files in inside.items():
        if not set(_OUR_MARKS).isdisjoint(files):
            nested[directory] = _OUTPUTS
        elif _ADAPTER in files or ("config.json" in files and any(f.lower().endswith(WEIGHT_ENDINGS) for f in files)):
            nested[directory] = _MODELS
    return nested


def list_files(directory: Path, run: Path) -> tuple[dict[str, int], dict[str, tuple[str, ...]]]:
    """The size of every file below a directory by its name, and what is not looked at, by the reason.

    Hidden directories are not looked into: what they are is told from their names. Nor is the directory of the run.
    """
    sizes: dict[str, int] = {}
    broken: list[str] = []
    links: list[str] = []
    outputs: list[str] = []
    for folder, folders, files in os.walk(directory):
        place = Path(folder).relative_to(directory)
        for entry in list(folders):
            name = (place / entry).as_posix()
            if os.path.islink(os.path.join(folder, entry)):
                links.append(name)
            elif os.path.realpath(os.path.join(folder, entry)) == os.path.realpath(run):
                folders.remove(entry)
                outputs.append(f"{name}/")
            elif entry.startswith("."):
                folders.remove(entry)
                sizes[f"{name}/"] = 0
        for entry in files:
            path = Path(folder) / entry
            name = (place / entry).as_posix()
            if path.is_file():
                sizes[name] = path.stat().st_size
            else:
                broken.append(name)  # a link to nowhere, or no file at all: a socket, a pipe
    unseen = {_LINKS: links, _BROKEN: broken, _OUTPUTS: outputs}
    return sizes, {reason: tuple(sorted(names)) for reason, names in unseen.items() if names}


def refuse_adapter(names: Collection[str], where: object) -> None:
    """Refuse a model beside which a LoRA lies that has not been merged: transformers would load both.

    Raises:
        AccullmError: adapter_config.json is among the names.
    """
    if _ADAPTER not in names:
        return
    beside = "config.json" in names
    raise AccullmError(
        f"{'holds an unmerged adapter (LoRA) beside' if beside else 'is an adapter (LoRA), not'} a model ({_ADAPTER})",
        where,
        "merge it into the model first (peft: merge_and_unload, then save_pretrained)"
        + (", or take it away to convert the model without it" if beside else ""),
    )


def inside(directory: Path, name: str, named_by: Path) -> Path:
    """The path of a model's file; links must not lead out of the model's directory.

    One exception: in the hub's cache, a snapshot's files are links into the blobs of its repository, and a directory
    may hold links to a snapshot's files.

    Raises:
        AccullmError: the name or the link leads out.
    """
    if not _is_name(name):
        raise AccullmError(f"names {name[:100]!r}, which no file can have", named_by, "download it again")
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise AccullmError(f"names {name}, outside the model's directory", named_by, _OUTSIDE_HINT)
    file = directory / name
    target = Path(os.path.realpath(file))
    if not target.is_relative_to(os.path.realpath(directory)) and not _is_hub_blob(target):
        raise AccullmError(f"{name} is a link to {target}, outside the model's directory", named_by, _OUTSIDE_HINT)
    return file


def _is_name(name: str) -> bool:
    """Whether the system could have a file of this name."""
    try:
        parts = os.fsencode(name).split(b"/")
    except UnicodeEncodeError:
        return False
    return b"\0" not in os.fsencode(name) and all(len(part) <= 255 for part in parts) and len(name) < 4096


def _is_hub_blob(path: Path) -> bool:
    """Whether a file is one that huggingface_hub keeps: .../models--OWNER--NAME/blobs/HASH."""
    repository = path.parent.parent
    return (
        path.parent.name == "blobs" and repository.name.startswith("models--") and (repository / "snapshots").is_dir()
    )


def _few(names: tuple[str, ...], limit: int = 20) -> str:
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit:,} more" if len(names) > limit else shown
