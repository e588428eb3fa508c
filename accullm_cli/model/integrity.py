"""Is a file of weights whole, and what is in it: safetensors headers, content hashes, NaN and Inf."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from accullm_cli.errors import AccullmError
from accullm_cli.json_text import parse_json
from accullm_cli.progress import Event, Progress, silent
from accullm_cli.run import file_sha256, write_text

# All that a file may hold, by safetensors' names.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# What a weight may be stored in. Integer and boolean tensors (position ids, causal masks) are buffers, not weights.
WEIGHT_DTYPES = ("F32", "F16", "BF16")
BUFFER_DTYPES = ("BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64")


@dataclass(frozen=True)
class TensorInfo:
    """Where a stored tensor is and what it looks like.

    dtype: safetensors' name ("BF16").
    begin, end: its bytes in the file; the last one excluded.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def bytes(self) -> int:
        return self.end - self.begin


def read_header(path: Path, of_source: bool = True) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name, without reading them.

    Args:
        of_source: refuse what no weight of a source may be stored in.

    Raises:
        AccullmError: the file is absent, no safetensors file or cut short; a tensor's dtype is not supported.
    """
    try:
        # safetensors validates the whole header: JSON, dtypes, shapes, offsets without gaps up to the file's end.
        with safe_open(path, framework="numpy"):
            pass
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = parse_json(file.read(length))
    except SafetensorError as error:
        raise AccullmError(_diagnose(path, str(error)), path, "download or copy the file again") from None
    except FileNotFoundError:
        raise AccullmError("file is missing", path, "copy or download it again") from None
    except OSError as error:
        raise AccullmError(f"cannot be read ({error.strerror or error})", path) from None
    header.pop("__metadata__", None)
    tensors = {name: _tensor_info(path, 8 + length, entry) for name, entry in header.items()}
    for name, tensor in tensors.items():
        if of_source and tensor.dtype not in WEIGHT_DTYPES + BUFFER_DTYPES:
            raise AccullmError(
                f"tensor {name} is stored as {tensor.dtype}; weights must be F32, F16 or BF16",
                path,
                "convert it to bfloat16 first",
            )
        if tensor.dtype not in DTYPES:
            raise AccullmError(f"tensor {name} has dtype {tensor.dtype}, which is not supported", path)
    return tensors


def read_octets(path: Path, begin: int, end: int, room: torch.Tensor | None = None) -> torch.Tensor:
    """The bytes of a file from `begin` to before `end`, uint8.

    They are read, and not mapped: whoever touches a mapped page of a file that was cut short is killed (SIGBUS).

    Args:
        room: where to put them, uint8 [end - begin]; by default memory of their own.

    Raises:
        AccullmError: the file ends before.
    """
    found = torch.empty(end - begin, dtype=torch.uint8) if room is None else room
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(begin)
            left = found.numpy().data
            while len(left):
                count = file.readinto(left)
                if not count:
                    raise AccullmError("was cut short while it was read", path, "copy or download it again")
                left = left[count:]
    except OSError as error:
        raise AccullmError(f"cannot be read ({(error.strerror or str(error)).lower()})", path) from None
    return found


def read_tensor(info: TensorInfo, room: torch.Tensor | None = None) -> torch.Tensor:
    """A stored tensor in its dtype.

    Raises:
        AccullmError: as for `read_octets`.
    """
    return read_octets(info.file, info.begin, info.end, room).view(info.torch_dtype).view(info.shape)


def read_rows(info: TensorInfo, start: int, stop: int) -> torch.Tensor:
    """Rows of a stored tensor, from `start` to before `stop` or the last.

    Raises:
        AccullmError: as for `read_octets`.
    """
    size, stop = info.bytes // info.shape[0], min(stop, info.shape[0])
    content = read_octets(info.file, info.begin + start * size, info.begin + stop * size)
    return content.view(info.torch_dtype).view(stop - start, *info.shape[1:])


def _tensor_info(path: Path, data: int, entry: Mapping[str, Any]) -> TensorInfo:
    """One entry of a header; its offsets count from the header's end at byte `data`."""
    begin, end = entry["data_offsets"]
    return TensorInfo(path, entry["dtype"], tuple(entry["shape"]), data + begin, data + end)


def _diagnose(path: Path, reason: str) -> str:
    """What is wrong with a file that safetensors refuses for `reason`."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        try:
            header = parse_json(file.read(length)) if 0 < length <= size - 8 else {}
            promised = 8 + length + max(entry["data_offsets"][1] for key, entry in header.items() if key[:2] != "__")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            promised = 0
    if promised > size:
        return f"cut short: its header promises {promised:,} bytes, the file has {size:,}"
    return f"not a whole safetensors file ({reason.removeprefix('Error while deserializing header: ')})"


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor that holds NaN or Inf.

    Raises:
        AccullmError: names the tensor, how many values are not finite, and the first one's index.
    """
    finite = torch.isfinite(tensor)
    if bool(finite.all()):
        return
    wrong = (~finite).nonzero()
    values = "1 NaN or Inf value" if len(wrong) == 1 else f"{len(wrong):,} NaN or Inf values"
    raise AccullmError(
        f"tensor {name} holds {values}, the first at {wrong[0].tolist()}",
        hint="the checkpoint is damaged: download it again, or take another",
    )


class ContentHashes:
    """SHA-256 of files, remembered in `cache/source-hashes.json` so that a resumed run does not read them again.

    A remembered hash counts as long as the file's size, modification time and inode are the same.
    """

    def __init__(self, cache: Path, progress: Progress = silent) -> None:
        self._file = cache / "source-hashes.json"
        self._progress = progress

    def of(self, paths: Sequence[Path]) -> dict[Path, str]:
        """The hash of every file."""
        remembered = self._read()
        stamps = {path: stamp_of(path) for path in paths}
        to_read = [path for path in paths if stamps[path] not in remembered]
        if to_read:
            self._progress(Event("source", "start", "hashing the source", total=len(to_read)))
        for done, path in enumerate(to_read, start=1):
            try:
                remembered[stamps[path]] = file_sha256(path)
            except OSError as error:
                raise AccullmError(f"cannot be read ({str(error.strerror).lower()})", path) from None
            self._progress(Event("source", "step", path.name, done=done, total=len(to_read)))
        if to_read:
            # A file that changed while it was read has another stamp by now: what was read of it is not remembered.
            kept = {stamps[path]: remembered[stamps[path]] for path in to_read if stamp_of(path) == stamps[path]}
            write_text(self._file, json.dumps(self._read() | kept, indent=1, sort_keys=True))
            self._progress(Event("source", "end"))
        return {path: remembered[stamps[path]] for path in paths}

    def _read(self) -> dict[str, str]:
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}  # absent or damaged: it holds nothing that cannot be found again
        if not isinstance(content, Mapping):
            return {}
        return {key: value for key, value in content.items() if isinstance(value, str)}


def stamp_of(path: Path) -> str:
    """What tells whether a file is still the same, without reading it; "" where there is none any more."""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    return f"{os.path.abspath(path)}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"
