"""Heads of GGUF files: what `gguf` writes is read, and whatever contradicts itself is refused in one line."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accullm_cli.errors import AccullmError
from accullm_cli.model.gguf_file import read_gguf

VALUES = np.arange(2 * 64, dtype=np.float32).reshape(2, 64)
HINT = "download or copy it again"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with values of every kind, a plain tensor and a quantized one."""
    return write(tmp_path / "a.gguf")


def write(path: Path) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("a.count", 7)
    writer.add_float32("a.share", 0.5)
    writer.add_bool("a.flag", True)
    writer.add_string("a.text", "wörd")
    writer.add_array("a.list", ["one", "two"])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_tensor("plain", VALUES)
    writer.add_tensor("blocks", quantize(VALUES, GGMLQuantizationType.Q8_0), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def head(keys: bytes = b"", tensors: bytes = b"", counts: tuple[int, int] = (0, 0), data: int = 0) -> bytes:
    """A file of these keys and tensors, of which counts = (tensors, keys) are promised, and so many bytes behind."""
    content = b"GGUF" + struct.pack("<IQQ", 3, *counts) + keys + tensors
    return content + bytes(-len(content) % 32 + data)


def key(name: str, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def test_metadata_and_tensors_are_those_that_the_package_reads(path: Path) -> None:
    file = read_gguf(path)
    reader = GGUFReader(path)
    assert file.metadata == {
        "general.architecture": "llama",
        "a.count": 7,
        "a.share": 0.5,
        "a.flag": True,
        "a.text": "wörd",
        "a.list": ["one", "two"],
        "a.numbers": [1, 2, 3],
    }
    for known in reader.tensors:
        found = file.tensors[known.name]
        assert (found.kind, found.shape) == (known.tensor_type, tuple(int(size) for size in known.shape[::-1]))
        assert (found.begin, found.end - found.begin) == (known.data_offset, known.n_bytes)
    assert torch.equal(file.values("plain"), torch.from_numpy(VALUES))
    assert np.array_equal(file.octets("blocks").numpy(), reader.tensors[1].data)


def numbers(code: str, *values: int) -> bytes:
    return struct.pack(f"<{code}", *values)


# UINT8 0, UINT32 4, STRING 8, ARRAY 9, as the specification has them; F32 0 and Q8_0 8 among tensors.
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "another file": (b"GGML" + bytes(60), "it does not begin with GGUF"),
    "an old version": (
        b"GGUF" + numbers("I", 1) + bytes(60),
        "it is of version 1 (or of another byte order); 2 and 3 are read",
    ),
    "too short": (b"GGUF\x03", "the file ends within the version, which takes 4 bytes"),
    "huge counts": (
        head(counts=(2**60, 7)),
        "it promises 7 keys and 1,152,921,504,606,846,976 tensors in 32 bytes",
    ),
    "a huge name": (
        head(numbers("Q", 2**62), counts=(0, 1), data=64),
        "a key is said to have 4,611,686,018,427,387,904 bytes",
    ),
    "a name that is none": (head(numbers("Q", 2) + b"\xff\xfe", counts=(0, 1), data=64), "a key is not UTF-8"),
    "a huge text": (
        head(key("a", 8, numbers("Q", 2**63)), counts=(0, 1), data=64),
        "the file ends within a, which takes 9,223,372,036,854,775,808 bytes",
    ),
    "a huge list": (
        head(key("a", 9, numbers("IQ", 8, 2**61)), counts=(0, 1), data=64),
        "a is said to have 2,305,843,009,213,693,952 entries, for which the file is too short",
    ),
    "nested lists": (
        head(key("a", 9, numbers("IQIQIQ", 9, 1, 9, 1, 9, 1)), counts=(0, 1), data=64),
        "a is an array of arrays of arrays",
    ),
    "an unknown kind": (head(key("a", 99, b""), counts=(0, 1), data=64), "a is of type 99, which is not known"),
    "a key twice": (head(2 * key("a", 0, b"\x01"), counts=(0, 2), data=64), "key a comes twice"),
    "alignment": (
        head(key("general.alignment", 4, numbers("I", 3)), counts=(0, 1), data=64),
        "general.alignment is 3",
    ),
    "a tensor twice": (head(tensors=2 * tensor("t", (4,)), counts=(2, 0), data=64), "tensor t comes twice"),
    "no dimensions": (head(tensors=tensor("t", ()), counts=(1, 0), data=64), "tensor t has 0 dimensions"),
    "many dimensions": (head(tensors=tensor("t", (1,) * 9), counts=(1, 0), data=64), "tensor t has 9 dimensions"),
    "nothing in it": (head(tensors=tensor("t", (4, 0)), counts=(1, 0), data=64), "tensor t has shape [0, 4]"),
    "an unknown type": (
        head(tensors=tensor("t", (4,), 250), counts=(1, 0), data=64),
        "tensor t is of type 250, which is not known",
    ),
    "half a block": (
        head(tensors=tensor("t", (48, 2), 8), counts=(1, 0), data=512),
        "tensor t has rows of 48, which Q8_0 cannot hold",
    ),
    "a crooked offset": (
        head(tensors=tensor("t", (4,), 0, 8), counts=(1, 0), data=512),
        "tensor t lies at 8, which 32 does not divide",
    ),
    "beyond the end": (
        head(tensors=tensor("t", (4, 1000)), counts=(1, 0), data=512),
        "tensor t ends at 16,096, and the file at 608",
    ),
    "an overflow": (
        head(tensors=tensor("t", (2**62, 2**62, 4)), counts=(1, 0), data=512),
        f"tensor t ends at {2**128 + 96:,}, and the file at 608",
    ),
    "on each other": (
        head(tensors=tensor("t", (16,)) + tensor("u", (16,), 0, 32), counts=(2, 0), data=512),
        "tensors t and u lie on each other",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_contradicts_itself_is_refused(name: str, tmp_path: Path) -> None:
    content, reason = DAMAGED[name]
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(AccullmError) as refusal:
        read_gguf(path)
    assert refusal.value.what == f"damaged or not a GGUF file ({reason})"
    assert refusal.value.hint == HINT


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AccullmError, match="file is missing"):
        read_gguf(tmp_path / "none.gguf")


def test_a_file_that_is_cut_short_anywhere_is_refused(path: Path) -> None:
    content = path.read_bytes()
    for length in range(len(content) - 32):  # the last tensor is padded to a multiple of 32
        path.write_bytes(content[:length])
        with pytest.raises(AccullmError):
            read_gguf(path)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_are_read_or_refused_in_one_line(path: Path, edits: list[tuple[int, int]]) -> None:
    content = bytearray(write(path).read_bytes())
    for place, value in edits:
        content[place] = value
    path.write_bytes(content)
    try:
        file = read_gguf(path)
    except AccullmError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    for tensor in file.tensors.values():
        assert len(file.octets(tensor.name)) * tensor.row_bytes == tensor.end - tensor.begin
