"""Safetensors files of one directory: which tensors they hold, read one at a time, and how they are written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from accullm_cli.errors import AccullmError
from accullm_cli.json_text import parse_json
from accullm_cli.model.integrity import TensorInfo, read_header, read_tensor
from accullm_cli.run import machine_errors, write_file, write_text

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Large enough that a 70B model has some 20 files, small enough that one fits into any machine's memory.
SHARD_BYTES = 2_000_000_000


def dtype_name(dtype: torch.dtype) -> str:
    """The name that configurations and messages use: torch.bfloat16 is 'bfloat16'."""
    return str(dtype).removeprefix("torch.")


def tensors_of(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file of an artifact, in the order of their names; none of them is read.

    Raises:
        AccullmError: as `read_header`.
    """
    return dict(sorted(read_header(path, of_source=False).items()))


class TensorFiles:
    """All tensors of a directory's safetensors files, by name. A tensor is read when asked for and not kept."""

    def __init__(self, directory: Path, infos: Mapping[str, TensorInfo]) -> None:
        self.directory = directory
        self.infos = infos

    @classmethod
    def open(cls, directory: Path, of_artifact: bool = True) -> TensorFiles:
        """Read the headers of the files that the index names (or of the one file without an index).

        Args:
            of_artifact: index and files agree exactly. Of any other checkpoint, what the files hold counts, and one
                file comes before an index, as in transformers.

        Raises:
            AccullmError: no tensors at all; the index is malformed or points outside the directory; a file is
                absent or truncated; index and files disagree about a tensor, or two files hold it.
        """
        index_path = directory / INDEX_NAME
        if not index_path.exists() or (not of_artifact and (directory / SINGLE_NAME).exists()):
            if not (directory / SINGLE_NAME).exists():
                raise AccullmError(f"holds neither {INDEX_NAME} nor {SINGLE_NAME}", directory, "copy it again")
            return cls(directory, tensors_of(directory / SINGLE_NAME))
        files_of = read_index(index_path)
        infos: dict[str, TensorInfo] = {}
        for file in sorted(set(files_of.values())):
            header = tensors_of(directory / file)
            for name in header:
                if name in infos:
                    raise AccullmError(f"tensor {name} is in {infos[name].file.name} already", directory / file)
                if of_artifact and files_of.get(name) != file:
                    raise AccullmError(f"tensor {name} is not in the index under this file", directory / file)
            infos |= header
        for name, file in files_of.items():
            if name not in infos:
                raise AccullmError(f"tensor {name} is missing, which the index promises", directory / file)
        return cls(directory, infos)

    def renamed(self, stored: Mapping[str, str]) -> TensorFiles:
        """The same tensors under other names, each of them given with the one that it has now."""
        renaming = {old: new for new, old in stored.items() if old in self.infos}
        return TensorFiles(self.directory, {renaming.get(name, name): info for name, info in self.infos.items()})

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor in its stored dtype."""
        return self.tensors((name,))[name]

    def tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Several tensors."""
        for name in (names := tuple(names)):
            if name not in self.infos:
                raise AccullmError(f"tensor {name} is missing", self.directory)
        return {name: read_tensor(self.infos[name]) for name in names}


def read_index(path: Path) -> dict[str, str]:
    """The index's map from tensor to file.

    Raises:
        AccullmError: not an index, or a file's name points outside the directory.
    """
    content = read_json(path)
    files_of = content.get("weight_map")
    if not isinstance(files_of, dict) or not all(isinstance(file, str) for file in files_of.values()):
        raise AccullmError("has no map from tensors to files (weight_map)", path, "copy or download it again")
    for file in files_of.values():
        if Path(file).name != file or file in ("", ".", ".."):
            raise AccullmError(f"points outside its directory ({file})", path)
    return files_of


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        AccullmError: the file is absent or no JSON object.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AccullmError("file is missing", path, "copy or download it again") from None
    except OSError as error:
        raise AccullmError(f"cannot be read ({(error.strerror or str(error)).lower()})", path) from None
    except ValueError as error:
        raise AccullmError(f"is not valid JSON ({error})", path, "copy or download it again") from None
    if not isinstance(content, dict):
        raise AccullmError("is not a JSON object", path, "copy or download it again")
    return content


# -- writing -----------------------------------------------------------------------------------------------


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one safetensors file at once."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    # transformers up to 4.x asks for this entry.
    write_file(path, lambda temporary: save_file(contiguous, temporary, metadata={"format": "pt"}))


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy where the file system cannot link."""
    try:
        os.link(source, target)
    except OSError:
        write_file(target, lambda temporary: shutil.copyfile(source, temporary))


def shards_of(tensors: Iterator[tuple[str, torch.Tensor]], limit: int) -> Iterator[dict[str, torch.Tensor]]:
    """Collect streamed tensors into groups of at most `limit` bytes (a larger tensor is a group of its own)."""
    batch: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if name in batch:
            raise AccullmError(f"tensor {name} comes twice")
        if batch and size + tensor.nbytes > limit:
            yield batch
            batch, size = {}, 0
        batch[name] = tensor
        size += tensor.nbytes
    if batch:
        yield batch


def write_index(directory: Path, shards: Iterable[Path]) -> None:
    """Write the index of finished shards.

    Raises:
        AccullmError: two shards hold a tensor of the same name.
    """
    files_of: dict[str, str] = {}
    total = 0
    for shard in shards:
        for name, info in tensors_of(shard).items():
            if name in files_of:
                raise AccullmError(f"tensor {name} is in {files_of[name]} already", shard)
            files_of[name] = shard.name
            total += info.bytes
    content = {"metadata": {"total_size": total}, "weight_map": files_of}
    write_text(directory / INDEX_NAME, json.dumps(content, indent=1, sort_keys=True) + "\n")


def rename(source: Path, target: Path) -> None:
    """Rename, with the operating system's refusals as one line."""
    with machine_errors(target):
        os.replace(source, target)
