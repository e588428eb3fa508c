"""What is in a GGUF file: metadata and tensors, each held against the file before it is believed.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from gguf import dequantize
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from accullm_cli.errors import AccullmError
from accullm_cli.model.gguf_parts import part_name
from accullm_cli.model.integrity import read_octets

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
# Of a tensor in ggml.
MOST_DIMENSIONS = 4
# Nested arrays have no use so far; a chain of them is an attempt to exhaust the stack.
DEEPEST_ARRAY = 2
_LONGEST_NAME = 1 << 12
# Of the parts that llama-gguf-split makes of a file; the first has all other keys, too.
_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"
_MIXED = "the parts must be of one model: download or copy them again"

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_TYPES = {int(kind): kind for kind in GGMLQuantizationType}
PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its file, ggml's type, the shape with the length of rows last, its bytes there, the last excluded."""

    path: Path
    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def row_bytes(self) -> int:
        return (self.end - self.begin) // prod(self.shape[:-1])


@dataclass(frozen=True)
class GgufFile:
    """An opened file, or the first of the parts of a model with the tensors of all.

    metadata: by key; arrays are lists. others: the other parts.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    others: tuple[Path, ...] = ()

    def octets(self, name: str) -> torch.Tensor:
        """A tensor's bytes, uint8 [rows, bytes of a row]."""
        tensor = self.tensors[name]
        return read_octets(tensor.path, tensor.begin, tensor.end).view(-1, tensor.row_bytes)

    def values(self, name: str) -> torch.Tensor:
        """An unquantized tensor in its stored dtype."""
        tensor = self.tensors[name]
        return self.octets(name).view(PLAIN[tensor.kind]).view(tensor.shape)

    def dequantized(self, name: str) -> torch.Tensor:
        """A tensor's values, float32 in its shape.

        Raises:
            AccullmError: of a type that `gguf` does not read.
        """
        tensor = self.tensors[name]
        octets = self.octets(name).view(*tensor.shape[:-1], tensor.row_bytes)
        try:
            return torch.from_numpy(dequantize(octets.numpy(), tensor.kind))
        except NotImplementedError:
            raise AccullmError(
                f"tensor {name} is quantized as {tensor.kind.name}, which cannot be read",
                tensor.path,
                "give another quantization, or the model's safetensors checkpoint",
            ) from None


def read_gguf(path: Path) -> GgufFile:
    """Read the head of a file, and of the other parts of its model where it is the first of several; no weight is read.

    Raises:
        AccullmError: it is absent, no GGUF file, of a version that is not known, cut short, or contradicts itself; it
            is another part than the first, or one is missing or of another model.
    """
    first = _read_head(path)
    count = first.metadata.get(_COUNT, 1)
    if type(count) is not int or count < 2:
        return first
    _check_part(first, 1, count)
    return _with_others(first, count)


def _with_others(first: GgufFile, count: int) -> GgufFile:
    """A model in so many parts."""
    if part_name(first.path, 1, count) != first.path:
        hint = f"give them the names that they had, NAME-00001-of-{count:05d}.gguf and so on"
        raise AccullmError(f"is the first of {count} parts of a model, which its name does not say", first.path, hint)
    found, others = dict(first.tensors), []
    for number in range(2, count + 1):
        path = part_name(first.path, number, count)
        assert path is not None
        if not path.is_file():
            raise AccullmError(f"part {number} of {count} is missing", path, "put it beside the first")
        part = _read_head(path)
        _check_part(part, number, count)
        for name in part.tensors:
            if name in found:
                raise AccullmError(f"tensor {name} is in {found[name].path.name}, too", path, _MIXED)
        found |= part.tensors
        others.append(path)
    promised = first.metadata.get(_TENSORS, len(found))
    if promised != len(found):
        what = f"promises {promised} tensors in all parts of the model ({_TENSORS}), and they hold {len(found)}"
        raise AccullmError(what, first.path, _MIXED)
    return GgufFile(first.path, first.metadata, found, tuple(others))


def _check_part(part: GgufFile, number: int, count: int) -> None:
    """Refuse a part that is not the one that was to be here."""
    own = part.metadata.get(_NUMBER), part.metadata.get(_COUNT)
    if own == (number - 1, count):
        return
    if number > 1:
        raise AccullmError(
            f"is not part {number} of {count} ({_NUMBER}, {_COUNT} = {own[0]}, {own[1]})", part.path, _MIXED
        )
    first = part_name(part.path, 1, count)
    raise AccullmError(
        f"is a part of a model in {count} parts, and not the first",
        part.path,
        f"give {first}" if first is not None and first != part.path else "give the first",
    )


def _read_head(path: Path) -> GgufFile:
    """What one file holds."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise _refusal(path, "the file is empty")
            return _Head(path, file, size).read()
    except FileNotFoundError:
        raise AccullmError("file is missing", path, "copy or download it again") from None
    except OSError as error:
        raise AccullmError(f"cannot be read ({error.strerror or error})", path) from None


class _Head:
    """A place in a file, which goes on with each number that is read."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size, self.place = path, file, size, 0

    def read(self) -> GgufFile:
        if self.take(4, "the magic number") != MAGIC:
            raise _refusal(self.path, "it does not begin with GGUF")
        version = self.number("I", "the version")
        if version not in VERSIONS:
            known = " and ".join(map(str, VERSIONS))
            raise _refusal(self.path, f"it is of version {version} (or of another byte order); {known} are read")
        tensors, keys = self.number("Q", "the number of tensors"), self.number("Q", "the number of keys")
        # A key takes 13 bytes or more, a tensor 24.
        if 13 * keys + 24 * tensors > self.size:
            raise _refusal(self.path, f"it promises {keys:,} keys and {tensors:,} tensors in {self.size:,} bytes")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self.name("a key")
            if key in metadata:
                raise _refusal(self.path, f"key {key} comes twice")
            metadata[key] = self.value(self.kind(key), key)
        infos: dict[str, tuple[GGMLQuantizationType, tuple[int, ...], int]] = {}
        for _ in range(tensors):
            name = self.name("a tensor's name")
            if name in infos:
                raise _refusal(self.path, f"tensor {name} comes twice")
            infos[name] = self.info(name)
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > self.size:
            raise _refusal(self.path, f"general.alignment is {alignment!r}")
        data = -(-self.place // alignment) * alignment
        found = {name: self.tensor(name, *info, data, alignment) for name, info in infos.items()}
        self.check_overlap(found)
        return GgufFile(self.path, metadata, found)

    # -- numbers and names ---------------------------------------------------------------------------------

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.place:
            raise _refusal(self.path, f"the file ends within {what}, which takes {count:,} bytes")
        found = self.file.read(count)
        if len(found) < count:
            raise _refusal(self.path, f"it was cut short within {what} while it was read")
        self.place += count
        return found

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def name(self, what: str) -> str:
        length = self.number("Q", what)
        if not 0 < length <= _LONGEST_NAME:
            raise _refusal(self.path, f"{what} is said to have {length:,} bytes")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise _refusal(self.path, f"{what} is not UTF-8") from None

    def kind(self, key: str) -> GGUFValueType:
        number = self.number("I", f"the type of {key}")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise _refusal(self.path, f"{key} is of type {number}, which is not known") from None

    def value(self, kind: GGUFValueType, key: str, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], key)
        if kind == GGUFValueType.STRING:
            return self.text(key)
        if depth == DEEPEST_ARRAY:
            raise _refusal(self.path, f"{key} is an array of arrays of arrays")
        of, count = self.kind(key), self.number("Q", key)
        # A string or an array takes 8 bytes or more.
        least = struct.calcsize(f"<{_SCALARS[of]}") if of in _SCALARS else 8
        if count * least > self.size - self.place:
            raise _refusal(self.path, f"{key} is said to have {count:,} entries, for which the file is too short")
        if of in _SCALARS:
            return list(struct.unpack(f"<{count}{_SCALARS[of]}", self.take(count * least, key)))
        return [self.value(of, key, depth + 1) for _ in range(count)]

    def text(self, key: str) -> str:
        # Tokens may be parts of characters.
        return self.take(self.number("Q", key), key).decode("utf-8", errors="surrogateescape")

    # -- tensors -------------------------------------------------------------------------------------------

    def info(self, name: str) -> tuple[GGMLQuantizationType, tuple[int, ...], int]:
        """Type, shape and offset of a tensor."""
        count = self.number("I", f"tensor {name}")
        if not 0 < count <= MOST_DIMENSIONS:
            raise _refusal(self.path, f"tensor {name} has {count} dimensions")
        shape = tuple(self.number("Q", f"tensor {name}") for _ in range(count))[::-1]
        if 0 in shape:
            raise _refusal(self.path, f"tensor {name} has shape {list(shape)}")
        number, offset = self.number("I", f"tensor {name}"), self.number("Q", f"tensor {name}")
        if number not in _TYPES:
            raise _refusal(self.path, f"tensor {name} is of type {number}, which is not known")
        return _TYPES[number], shape, offset

    def tensor(
        self, name: str, kind: GGMLQuantizationType, shape: tuple[int, ...], offset: int, data: int, alignment: int
    ) -> GgufTensor:
        block, octets = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise _refusal(self.path, f"tensor {name} has rows of {shape[-1]:,}, which {kind.name} cannot hold")
        if offset % alignment:
            raise _refusal(self.path, f"tensor {name} lies at {offset:,}, which {alignment} does not divide")
        begin, size = data + offset, prod(shape) // block * octets
        if begin + size > self.size:
            raise _refusal(self.path, f"tensor {name} ends at {begin + size:,}, and the file at {self.size:,}")
        return GgufTensor(self.path, name, kind, shape, begin, begin + size)

    def check_overlap(self, tensors: Mapping[str, GgufTensor]) -> None:
        ordered = sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end))
        for before, after in pairwise(ordered):
            if after.begin < before.end:
                raise _refusal(self.path, f"tensors {before.name} and {after.name} lie on each other")


def _refusal(path: Path, what: str) -> AccullmError:
    return AccullmError(f"damaged or not a GGUF file ({what})", path, "download or copy it again")
