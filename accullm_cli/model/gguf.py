"""Import a GGUF file as a Hugging Face directory, one parameter at a time.

What its metadata and tensors are of a model is said in `gguf_model`; the weights are streamed into one safetensors
file, whatever the model's size. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import struct
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.model.gguf_architectures import is_further
from accullm_cli.model.gguf_file import PLAIN, GgufFile, GgufTensor, read_gguf
from accullm_cli.progress import Event, Progress, silent
from accullm_cli.run import machine_errors, sync_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from accullm_cli.model.gguf_model import GgufModel

MARKER = "imported.json"
# Of what an import makes of a file; an import of another version is made again.
_VERSION = 3

_SAFETENSORS_NAME = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def import_gguf(path: Path, directory: Path, progress: Progress = silent) -> tuple[str, ...]:
    """Write the model in `path` into `directory`, unless it is there already.

    All tensors get one dtype: that of most of the weight matrices, where quantized ones count as float16.
    `directory` appears at once; after an interruption the import starts again.

    Returns: sentences about what the import changed.

    Raises:
        AccullmError: damaged, in several parts, an architecture or quantization that cannot be read, no tokenizer.
    """
    with machine_errors(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        if (records := _read_records(directory)) is not None:
            return records
        file = read_gguf(path)
        if file.others:
            # What is made of it is held against what transformers makes of the file, which knows no parts.
            what = f"one of {1 + len(file.others)} parts of a model"
            raise AccullmError(what, path, "join them with 'llama-gguf-split --merge' first")
        temporary = directory.with_name(f".{directory.name}.tmp")
        try:
            with machine_errors(directory):
                shutil.rmtree(temporary, ignore_errors=True)
                shutil.rmtree(directory, ignore_errors=True)  # unfinished, from before directories appeared at once
                temporary.mkdir()
                written = _write(file, temporary, progress)
                content = {"version": _VERSION, "source": path.name, "records": written}
                (temporary / MARKER).write_text(json.dumps(content), encoding="utf-8")
                os.replace(temporary, directory)
                sync_directory(directory.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return tuple(written)


def describe_gguf(file: GgufFile, directory: Path) -> tuple[torch.dtype, tuple[str, ...]]:
    """Write the configuration and the tokenizer of a model into `directory`, and none of its weights.

    Returns: the dtype that an import would have, and sentences about metadata that nothing follows.

    Raises:
        AccullmError: as `import_gguf`.
    """
    from accullm_cli.model.gguf_model import read_model
    from accullm_cli.model.gguf_tokenizer import read_tokenizer

    found = read_model(file)
    dtype = _choose_dtype([file.tensors[name] for own in found.parameters.values() for name in own])
    _write_description(found.model, dtype, read_tokenizer(file), directory)
    blocks = found.model.config.num_hidden_layers
    further = [name for name in file.tensors if is_further(name, blocks)]
    unread = [f"{len(further)} tensors of the GGUF file predict further tokens and are not read"] if further else []
    return dtype, (*found.records, *unread)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Let one process at a time import into `directory`; the others wait, and find it done."""
    with open(directory.with_name(f".{directory.name}.lock"), "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _read_records(directory: Path) -> tuple[str, ...] | None:
    """The records of a finished import; None where there is none of this version."""
    try:
        content = json.loads((directory / MARKER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return tuple(content["records"]) if content.get("version") == _VERSION else None


def _write(file: GgufFile, directory: Path, progress: Progress) -> list[str]:
    """Fill `directory`; returns the records."""
    from accullm_cli.model.gguf_model import read_model
    from accullm_cli.model.gguf_tokenizer import read_tokenizer

    found = read_model(file)
    used = {name for own in found.parameters.values() for name in own}
    tensors = [tensor for name, tensor in file.tensors.items() if name in used]
    dtype = _choose_dtype(tensors)
    blocks = found.model.config.num_hidden_layers
    records = [*_describe(file, tensors, dtype, used, blocks), *found.records]
    tokenizer = read_tokenizer(file)  # before the weights: a file without one is refused at once
    _write_description(found.model, dtype, tokenizer, directory)
    rounded = _write_weights(file, directory / "model.safetensors", found, dtype, progress)
    if rounded:
        records.append(f"{rounded} float32 tensors of the GGUF file rounded to {_name(dtype)}")
    return records


def _write_description(model: PreTrainedModel, dtype: torch.dtype, tokenizer: Any, directory: Path) -> None:
    model.config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _choose_dtype(tensors: Sequence[GgufTensor]) -> torch.dtype:
    """The dtype of most weights in matrices; the first of float16, bfloat16 and float32 where they draw."""
    weights: Counter[torch.dtype] = Counter(dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), 0))
    for tensor in tensors:
        if len(tensor.shape) > 1:
            weights[PLAIN.get(tensor.kind, torch.float16)] += prod(tensor.shape)
    return weights.most_common(1)[0][0]


def _describe(
    file: GgufFile, tensors: Sequence[GgufTensor], dtype: torch.dtype, used: Collection[str], blocks: int
) -> list[str]:
    """What the import changes or leaves out, known before it starts.

    Raises:
        AccullmError: it would leave out a tensor that the model computes with.
    """
    records = []
    types = Counter(tensor.kind.name for tensor in tensors if tensor.kind not in PLAIN)
    if types:
        kinds = ", ".join(f"{kind} ({count} tensors)" for kind, count in types.most_common())
        records.append(f"source weights are {kinds} in the GGUF file; dequantized to {_name(dtype)}")
    unused = [name for name in file.tensors if name not in used]
    unused = [name for name in unused if not name.startswith("rope_")]  # those have been understood
    for name in unused:
        if _changes_function(name, blocks):
            raise AccullmError(
                f"tensor {name} has no place in transformers' class for architecture "
                f"{file.metadata['general.architecture']}",
                file.path,
                "give the model's safetensors checkpoint",
            )
    if unused:
        records.append(f"{len(unused)} tensors of the GGUF file are not part of the model: {', '.join(unused[:5])}")
    return records


def _changes_function(name: str, blocks: int) -> bool:
    """Whether GGUF knows a tensor of this name as a part of what a model computes.

    Not so: the heads that predict further tokens, which lie in blocks of their own, and rotary frequencies that are
    computed anyway.
    """
    from gguf.constants import TENSOR_NAMES

    base, _, kind = name.rpartition(".")
    if is_further(name, blocks):
        return False
    base = re.sub(r"^blk\.\d+\.", "blk.{bid}.", base)
    known = base in TENSOR_NAMES.values() and ".nextn." not in base and not base.endswith("attn_rot_embd")
    return known or kind in ("bias", "scale") or "lora" in name


def _write_weights(file: GgufFile, target: Path, found: GgufModel, dtype: torch.dtype, progress: Progress) -> int:
    """Stream all parameters into a safetensors file; returns how many float32 tensors changed by the cast."""
    shapes = {name: tuple(tensor.shape) for name, tensor in found.model.state_dict().items()}
    rounded = 0
    progress(Event("source", "start", f"importing {file.path.name}", total=len(found.parameters)))
    with open(target, "wb") as out:
        _write_header(out, {name: shapes[name] for name in found.parameters}, dtype)
        for done, (name, own) in enumerate(found.parameters.items(), start=1):
            weights = found.values(name)
            cast = weights.to(dtype).contiguous()
            if bool(torch.isinf(cast).any()) and not bool(torch.isinf(weights).any()):
                raise AccullmError(f"tensor {own[0]} holds values beyond the range of {_name(dtype)}", file.path)
            out.write(cast.flatten().view(torch.uint8).numpy().data)
            if PLAIN.get(file.tensors[own[0]].kind) == torch.float32 and not torch.equal(cast.float(), weights):
                rounded += len(own)
            progress(Event("source", "step", own[-1], done=done, total=len(found.parameters)))
        out.flush()
        os.fsync(out.fileno())
    progress(Event("source", "end"))
    return rounded


def _write_header(out: Any, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """Write a safetensors header for tensors of one dtype, which follow in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        size = prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _SAFETENSORS_NAME[dtype],
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data starts at a multiple of 8
    out.write(struct.pack("<Q", len(text)) + text)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
