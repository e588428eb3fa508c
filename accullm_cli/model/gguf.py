"""Import a GGUF file as a Hugging Face directory, one tensor at a time.

Names, permutations and the configuration come from transformers' own GGUF mapping, so that the result is the model
that transformers would load from the file; but the weights are streamed, a tensor at a time, into one safetensors file,
whatever the model's size. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from accullm_cli.errors import AccullmError, is_refusal_of_library
from accullm_cli.model.gguf_file import PLAIN, GgufFile, GgufTensor, read_gguf
from accullm_cli.model.gguf_metadata import settle
from accullm_cli.progress import Event, Progress, silent
from accullm_cli.run import machine_errors, sync_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MARKER = "imported.json"
# Of what an import makes of a file; an import of another version is made again.
_VERSION = 2

_SAFETENSORS_NAME = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

# Settings that no key speaks of, and whose biases, where there are any, say that they are on.
_BIASES = {
    "attention_bias": {"attn_q", "attn_qkv"},
    "attention_out_bias": {"attn_output"},
    "mlp_bias": {"ffn_up"},
    "qkv_bias": {"attn_q"},
    "use_bias": {"ffn_up"},
    "use_qkv_bias": {"attn_q"},
}

# The parameters of Llama 3.1, 3.2 and 3.3, which differ in `factor` alone. GGUF stores what they amount to, a factor
# per frequency; whether they are the right ones is checked against it.
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class _Contents:
    """An opened GGUF file.

    tensors: those of all parts, if it is the first of several.
    settings: the model's configuration as transformers' mapping gives it.
    metadata: by key; None for the tokenizer's lists.
    """

    path: Path
    file: GgufFile
    tensors: Sequence[GgufTensor]
    architecture: str
    settings: Mapping[str, Any]
    metadata: Mapping[str, Any]


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
        contents = _open(path)
        if contents.file.others:
            # What is made of it is held against what transformers makes of the file, which knows no parts.
            what = f"one of {1 + len(contents.file.others)} parts of a model"
            raise AccullmError(what, path, "join them with 'llama-gguf-split --merge' first")
        temporary = directory.with_name(f".{directory.name}.tmp")
        try:
            with machine_errors(directory):
                shutil.rmtree(temporary, ignore_errors=True)
                shutil.rmtree(directory, ignore_errors=True)  # unfinished, from before directories appeared at once
                temporary.mkdir()
                written = _write(contents, temporary, progress)
                content = {"version": _VERSION, "source": path.name, "records": written}
                (temporary / MARKER).write_text(json.dumps(content), encoding="utf-8")
                os.replace(temporary, directory)
                sync_directory(directory.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return tuple(written)


def describe_gguf(path: Path, directory: Path) -> torch.dtype:
    """Write a file's configuration and tokenizer into a directory, and no weights.

    Returns: the dtype that its weights would have as a source.

    Raises:
        AccullmError: as for `import_gguf`.
    """
    contents = _open(path)
    model, _ = _build_skeleton(contents)
    _, names = _map_names(contents, model)
    dtype = _choose_dtype([tensor for tensor in contents.tensors if tensor.name in names])
    _write_description(model, dtype, _read_tokenizer(contents.path), directory)
    return dtype


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


def _open(path: Path) -> _Contents:
    """Read the file's metadata."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    file = read_gguf(path)
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise AccullmError("names no architecture (general.architecture)", path, "download or copy it again")
    try:
        settings = load_gguf_checkpoint(str(path), return_tensors=False)["config"]
    except BaseException as error:
        if not is_refusal_of_library(error):
            raise
        raise AccullmError(
            f"architecture {architecture} cannot be read from GGUF by the installed transformers",
            path,
            "give the model's safetensors checkpoint",
        ) from None
    metadata = {
        key: None if key.startswith("tokenizer.") and isinstance(value, list) and len(value) > 1 else value
        for key, value in file.metadata.items()
    }
    return _Contents(path, file, tuple(file.tensors.values()), architecture, settings, metadata)


def _write(contents: _Contents, directory: Path, progress: Progress) -> list[str]:
    """Fill `directory`; returns the records."""
    model, unused = _build_skeleton(contents)
    processor, names = _map_names(contents, model)
    tensors = [tensor for tensor in contents.tensors if tensor.name in names]
    dtype = _choose_dtype(tensors)
    records = [*_describe(contents, tensors, dtype, names, model.config.num_hidden_layers), *unused]

    tokenizer = _read_tokenizer(contents.path)  # before the weights: a file without one is refused at once
    _write_description(model, dtype, tokenizer, directory)
    rounded = _write_weights(contents, directory / "model.safetensors", model, processor, names, dtype, progress)
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


def _build_skeleton(contents: _Contents) -> tuple[PreTrainedModel, list[str]]:
    """The model on the meta device, for its names and shapes, and sentences about metadata that nothing follows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    stored = {tensor.name: tensor for tensor in contents.tensors}
    try:
        config = AutoConfig.from_pretrained(contents.path.parent, gguf_file=contents.path.name)
        unused = settle(contents.metadata, contents.architecture, config)
        _restore_rope_scaling(contents, config)
        biased = {name.split(".")[2] for name in stored if re.fullmatch(r"blk\.\d+\.\w+\.bias", name)}
        for setting, tensors in _BIASES.items():
            if hasattr(config, setting):
                setattr(config, setting, not biased.isdisjoint(tensors))
        if "output.weight" in stored:  # what the file has is used, whatever the class does by itself
            config.tie_word_embeddings = False
        if "token_embd.weight" in stored:
            # A tokenizer may have more tokens than the embedding has rows.
            config.vocab_size = stored["token_embd.weight"].shape[0]
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config), unused
    except AccullmError as error:
        raise AccullmError(error.what, contents.path, error.hint) from None
    except BaseException as error:
        if not is_refusal_of_library(error):
            raise
        reason = " ".join(str(error).split())
        raise AccullmError(
            f"architecture {contents.architecture} is not a causal language model of transformers ({reason})",
            contents.path,
            "give the model's safetensors checkpoint",
        ) from None


def _restore_rope_scaling(contents: _Contents, config: Any) -> None:
    """Put Llama 3's rope scaling back into the configuration: GGUF stores its result, and transformers drops that.

    Raises:
        AccullmError: the file holds frequency factors of another kind.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stored = [tensor for tensor in contents.tensors if tensor.name.startswith("rope_")]
    if not stored:
        return
    plain = (config.rope_parameters or {}).get("rope_type") == "default"
    if plain and [tensor.name for tensor in stored] == ["rope_freqs.weight"]:
        factors = torch.tensor(_dequantized(contents, stored[0]), dtype=torch.float32)
        theta = config.rope_parameters["rope_theta"]
        config.rope_parameters = {**_LLAMA3_ROPE, "rope_theta": theta, "factor": round(float(factors.max()), 4)}
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        unscaled = theta ** (-torch.arange(len(scaled), dtype=torch.float32) / len(scaled))
        if scaled.shape == factors.shape and torch.allclose(unscaled / scaled, factors, rtol=1e-3):
            return
    raise AccullmError(
        f"tensor {stored[0].name} scales the rotary frequencies in a way that cannot be imported",
        contents.path,
        "give the model's safetensors checkpoint",
    )


def _map_names(contents: _Contents, model: PreTrainedModel) -> tuple[Any, dict[str, str]]:
    """transformers' processor for the architecture, and the parameter's name by the GGUF tensor's."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor = TENSOR_PROCESSORS.get(contents.architecture, TensorProcessor)(config=dict(contents.settings))
    try:
        names: dict[str, str] = get_gguf_hf_weights_map(model, processor)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise AccullmError(f"its tensors cannot be named ({reason})", contents.path) from None
    stored = {tensor.name for tensor in contents.tensors}
    used = {name: names[name] for name in names if name in stored}
    # A tied head is not stored; named_parameters lists it once, under its first name.
    required = dict(model.named_parameters())
    absent = [name for name in required if name not in used.values()]
    if absent:
        raise AccullmError(f"holds no tensor for {absent[0]}", contents.path, "give the model's safetensors checkpoint")
    return processor, used


def _choose_dtype(tensors: Sequence[GgufTensor]) -> torch.dtype:
    """The dtype of most weights in matrices; the first of float16, bfloat16 and float32 where they draw."""
    weights: Counter[torch.dtype] = Counter(dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), 0))
    for tensor in tensors:
        if len(tensor.shape) > 1:
            weights[PLAIN.get(tensor.kind, torch.float16)] += prod(tensor.shape)
    return weights.most_common(1)[0][0]


def _describe(
    contents: _Contents, tensors: Sequence[GgufTensor], dtype: torch.dtype, names: Mapping[str, str], blocks: int
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
    unused = [tensor.name for tensor in contents.tensors if tensor.name not in names]
    unused = [name for name in unused if not name.startswith("rope_")]  # those have been understood
    for name in unused:
        if _changes_function(name, blocks):
            raise AccullmError(
                f"tensor {name} has no place in transformers' class for architecture {contents.architecture}",
                contents.path,
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
    block = re.match(r"blk\.(\d+)\.", base)
    if block and int(block[1]) >= blocks:
        return False
    base = re.sub(r"^blk\.\d+\.", "blk.{bid}.", base)
    known = base in TENSOR_NAMES.values() and ".nextn." not in base and not base.endswith("attn_rot_embd")
    return known or kind in ("bias", "scale") or "lora" in name


def _read_tokenizer(path: Path) -> Any:
    """The tokenizer in the file, with its chat template."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except BaseException as error:
        if not is_refusal_of_library(error):
            raise
        reason = " ".join(repr(error).split())
        raise AccullmError(
            f"holds no tokenizer that transformers can read ({reason})",
            path,
            "give the model's safetensors checkpoint",
        ) from None


def _write_weights(
    contents: _Contents,
    target: Path,
    model: PreTrainedModel,
    processor: Any,
    names: Mapping[str, str],
    dtype: torch.dtype,
    progress: Progress,
) -> int:
    """Stream all tensors into a safetensors file; returns how many float32 tensors changed by the cast."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # Experts may arrive in several tensors that the processor merges into one parameter, through this dict.
    merged: dict[str, torch.Tensor] = {}
    pending = Counter(names.values())
    tensors = [tensor for tensor in contents.tensors if tensor.name in names]
    rounded = 0
    progress(Event("source", "start", f"importing {contents.path.name}", total=len(tensors)))
    with open(target, "wb") as file:
        offsets = _write_header(file, {name: shapes[name] for name in pending}, dtype)
        for done, tensor in enumerate(tensors, start=1):
            name = names[tensor.name]
            try:
                result = processor.process(
                    weights=_dequantized(contents, tensor),
                    name=tensor.name,
                    tensor_key_mapping=names,
                    parsed_parameters={"tensors": merged},
                )
            except RuntimeError:
                raise AccullmError(
                    f"tensor {tensor.name} is quantized as {tensor.kind.name}, which cannot be read",
                    contents.path,
                    "give another quantization, or the model's safetensors checkpoint",
                ) from None
            pending[name] -= 1
            if result.name is not None:
                merged[name] = torch.tensor(result.weights, dtype=torch.float32)
            if pending[name] == 0:
                weights = merged.pop(name)
                if tuple(weights.shape) != shapes[name]:
                    raise AccullmError(
                        f"tensor {tensor.name} has shape {list(weights.shape)}, but the model's {name} has "
                        f"{list(shapes[name])}",
                        contents.path,
                    )
                rounded += _write_tensor(file, offsets[name], weights, dtype, tensor, contents.path)
            progress(Event("source", "step", tensor.name, done=done, total=len(tensors)))
        file.flush()
        os.fsync(file.fileno())
    progress(Event("source", "end"))
    return rounded


def _dequantized(contents: _Contents, tensor: GgufTensor) -> Any:
    """The values of a tensor, float32 in its shape.

    Raises:
        NotImplementedError: of a type that `gguf` does not read.
    """
    from gguf import dequantize

    octets = contents.file.octets(tensor.name).view(*tensor.shape[:-1], tensor.row_bytes)
    return dequantize(octets.numpy(), tensor.kind)


def _write_header(file: Any, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, int]:
    """Write a safetensors header for tensors of one dtype; returns the position of each tensor in the file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {
            "dtype": _SAFETENSORS_NAME[dtype],
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data starts at a multiple of 8
    file.write(struct.pack("<Q", len(text)) + text)
    start = 8 + len(text)
    return {name: start + header[name]["data_offsets"][0] for name in shapes}


def _write_tensor(
    file: Any, position: int, weights: torch.Tensor, dtype: torch.dtype, stored: GgufTensor, path: Path
) -> bool:
    """Cast and write one tensor [as the model has it], float32; returns whether a float32 tensor lost anything."""
    cast = weights.to(dtype).contiguous()
    if bool(torch.isinf(cast).any()) and not bool(torch.isinf(weights).any()):
        raise AccullmError(f"tensor {stored.name} holds values beyond the range of {_name(dtype)}", path)
    file.seek(position)
    file.write(cast.flatten().view(torch.uint8).numpy().data)
    return PLAIN.get(stored.kind) == torch.float32 and not torch.equal(cast.float(), weights)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
