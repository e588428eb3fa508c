"""GGUF, which llama.cpp and what is built on it read: all of a model in one file, beside what other formats have.

A linear of the plan is rows of blocks, packed by its encoding. What llama.cpp calls a tensor, and in which order it
wants the rows of some, is said in `gguf_architectures`; rows are moved with their scales, since blocks lie along them.
Tensors of one dimension and norms are float32, as llama.cpp wants them, and so are routers; what else is not quantized
keeps the source's dtype.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import AutoConfig, PreTrainedConfig

from accullm_cli.errors import AccullmError
from accullm_cli.formats.assemble import copy_companions, read_shard, refuse
from accullm_cli.formats.base import ModelShape, Objection, Parts
from accullm_cli.formats.gguf_architectures import (
    ROPE_FACTORS,
    Architecture,
    Piece,
    architecture_of,
    rope_factors,
    write_parameters,
)
from accullm_cli.formats.gguf_vocabulary import FILE as TOKENIZER
from accullm_cli.formats.gguf_vocabulary import read_vocabulary
from accullm_cli.formats.manifest import MANIFEST_NAME, Manifest, read_manifest, write_card, write_manifest
from accullm_cli.formats.shards import SHARD_BYTES, TensorFiles, read_json, shards_of, tensors_of, write_shard
from accullm_cli.formats.stored import StoredArtifact, TensorSchema, not_finite
from accullm_cli.model.gguf_file import PLAIN, GgufFile, read_gguf
from accullm_cli.model.integrity import TensorInfo
from accullm_cli.model.skeleton import build_skeleton
from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.encodings.base import StoredLinear
from accullm_cli.quant.plan import KEPT_BITS, LinearPlan, Plan
from accullm_cli.run import sync_directory, write_file, write_text

# What our reader calls the blocks of a linear NAME: NAME.blocks.
BLOCKS = "blocks"
_KIND_OF = {dtype: kind for kind, dtype in PLAIN.items()}
_NAME_OF = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# Of tensors that llama.cpp reads as float32 whatever else is quantized.
_SINGLE = ("_norm.weight", ".ffn_gate_inp.weight", ".ffn_gate_inp_shexp.weight")


class GgufFormat:
    """Writer and reader of GGUF files."""

    name = "gguf"

    def linear_bytes(self, linear: LinearPlan, dtype: torch.dtype) -> int:
        """Bytes that are stored for a linear; blocks leave no gaps."""
        return linear.stored_bytes

    def write(self, directory: Path, parts: Parts) -> None:
        """Write an artifact: a GGUF file, with config.json and companions for those who read these.

        Raises:
            AccullmError: the plan is impossible; llama.cpp has no program for the model or its tokenizer.
        """
        refuse(self.name, parts, directory)
        config = AutoConfig.for_model(**parts.config)
        architecture = architecture_of(config)
        copy_companions(directory, parts)
        name = file_name(parts)
        own = {"quantization_config": {"quant_method": self.name, "file": name}}
        write_text(directory / "config.json", json.dumps({**parts.config, **own}, indent=2) + "\n")
        shards = [*parts.blocks, *parts.embeddings]
        spooled = []
        for number, tensors in enumerate(shards_of(parts.outside, SHARD_BYTES)):
            spooled.append(directory / f".outside-{number:05d}.safetensors")
            write_shard(spooled[-1], tensors)
        layout = Layout(directory, config, architecture, parts.plan)
        writer = GGUFWriter(None, architecture.name)
        _write_head(writer, parts, layout)
        read_vocabulary(directory / TOKENIZER, config.vocab_size).write(writer, directory)
        write_file(directory / name, lambda temporary: _write_tensors(writer, temporary, layout, [*shards, *spooled]))
        for path in spooled:
            path.unlink()
        write_card(directory, parts, self.name, (directory / name).stat().st_size)
        write_manifest(directory, parts, self.name)
        sync_directory(directory)
        self.open(directory)

    def open(self, directory: Path) -> GgufArtifact:
        """Open an artifact of this format.

        Raises:
            AccullmError: a file is missing, damaged or not as its schema says.
        """
        entry = read_json(directory / "config.json").get("quantization_config", {})
        name = entry.get("file")
        if not isinstance(name, str) or Path(name).name != name:
            raise AccullmError("does not name its GGUF file", directory / "config.json", "copy the artifact again")
        manifest = read_manifest(directory) if (directory / MANIFEST_NAME).exists() else None
        if manifest is not None and manifest.format != self.name:
            raise AccullmError(f"describes an artifact of format {manifest.format}", directory / MANIFEST_NAME)
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        file = read_gguf(directory / name)
        if manifest is None:
            raise AccullmError("file is missing", directory / MANIFEST_NAME, "copy the artifact again")
        layout = Layout(directory, config, architecture_of(config), manifest.plan)
        return GgufArtifact(directory, file, layout, manifest)


FORMAT = GgufFormat()


def model_objections(shape: ModelShape) -> list[Objection]:
    """Why llama.cpp cannot run a model, whatever its plan; empty where it can."""
    hint = "choose another --format for this model"
    try:
        config = AutoConfig.for_model(**shape.config)
        architecture = architecture_of(config)
        _placed(architecture, config, shape.parameters)
        read_vocabulary(shape.companions.get(TOKENIZER, Path(TOKENIZER)), config.vocab_size)
    except AccullmError as error:
        return [Objection(error.what, error.hint or hint)]
    return [
        Objection(f"llama.cpp's architecture {architecture.name} has no tensor for {name}", hint)
        for name in shape.kept[:1]
    ]


def file_name(parts: Parts) -> str:
    """What the GGUF file of an artifact is called."""
    source = str(parts.provenance.get("source", "model")).partition("@")[0].rpartition("/")[2]
    return (re.sub(r"[^\w.-]+", "-", source).strip("-.") or "model") + ".gguf"


# -- what lies where ---------------------------------------------------------------------------------------


class Layout:
    """Which tensors of a GGUF file the parameters of a model are.

    parameters: their shapes by name, tied ones once. pieces: of each. linears: of those whose codes are stored, the
    names of their linears, in a stack one for each expert.
    """

    def __init__(self, directory: Path, config: PreTrainedConfig, architecture: Architecture, plan: Plan) -> None:
        model = build_skeleton(directory)
        self.config, self.architecture, self.plan = config, architecture, plan
        self.parameters = {
            name: tuple(parameter.shape)
            for name, parameter in model.named_parameters()
            if name not in model.all_tied_weights_keys
        }
        self.pieces = _placed(architecture, config, self.parameters)
        quantized = plan.quantized
        self.linears: dict[str, tuple[str, ...]] = {}
        for name, shape in self.parameters.items():
            own: tuple[str, ...] = (name.removesuffix(".weight"),)
            if len(shape) == 3:
                own = tuple(f"{name}.{number}" for number in range(shape[0]))
            if own[0] in quantized:
                self.linears[name] = own
        found = {linear for own in self.linears.values() for linear in own}
        for linear in quantized:
            if linear not in found:
                raise AccullmError(f"{linear} is no linear of this model", directory, "copy the artifact again")

    def row(self, parameter: str) -> LinearPlan:
        """How the linears of a parameter are stored, which for a stack is the same for all."""
        return self.plan.quantized[self.linears[parameter][0]]


def _placed(
    architecture: Architecture, config: PreTrainedConfig, parameters: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[Piece, ...]]:
    """The pieces of each parameter.

    Raises:
        AccullmError: llama.cpp has no tensor for one.
    """
    return {
        name: architecture.pieces(config, name, shape[-2] if len(shape) > 1 else shape[0])
        for name, shape in parameters.items()
    }


def _order(rows: int, heads: int) -> torch.Tensor:
    """The rows of a parameter in the order in which a piece has them: of each head the halves' rows in turn."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def _piece_of(values: torch.Tensor, piece: Piece, dim: int) -> torch.Tensor:
    """A piece of a parameter, whose rows are along `dim`."""
    if piece.rows is not None:
        values = values.narrow(dim, piece.rows[0], piece.rows[1] - piece.rows[0])
    if piece.heads:
        values = values.index_select(dim, _order(values.shape[dim], piece.heads))
    return values.float() + piece.shift if piece.shift else values


def _whole_of(pieces: list[torch.Tensor], placed: tuple[Piece, ...], dim: int) -> torch.Tensor:
    """The inverse: a parameter from its pieces."""
    found = []
    for values, piece in zip(pieces, placed, strict=True):
        if piece.heads:
            values = values.index_select(dim, _order(values.shape[dim], piece.heads).argsort())
        found.append(values - piece.shift if piece.shift else values)
    return found[0] if len(found) == 1 else torch.cat(found, dim)


def _plain_dtype(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.dtype:
    """Of a tensor that is not quantized, by its name in the file."""
    return torch.float32 if len(shape) == 1 or name.endswith(_SINGLE) else dtype


# -- writing -----------------------------------------------------------------------------------------------


def _write_head(writer: GGUFWriter, parts: Parts, layout: Layout) -> None:
    """What the file says of the model and of how it was made."""
    parameters = sum(prod(shape) for shape in layout.parameters.values())
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(str(parts.provenance.get("source", "model")))
    writer.add_size_label(gguf.size_label(parameters, 0, 0, 0))
    writer.add_quantized_by("AccuLLM")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_file_type(parts))
    write_parameters(writer, layout.architecture, layout.config)
    writer.add_string("accullm.source_sha256", str(parts.provenance.get("source_sha256", "")))
    writer.add_string("accullm.config", json.dumps(parts.provenance.get("config", {}), sort_keys=True))
    widths = {name: row.encoding for name, row in parts.plan.quantized.items()}
    writer.add_string("accullm.plan", json.dumps(widths))


def _file_type(parts: Parts) -> int:
    """llama.cpp's number for the encoding of most weights."""
    weights: Counter[str] = Counter()
    for row in (*parts.plan.linears.values(), *parts.plan.embeddings.values()):
        kind = _NAME_OF[parts.shape.dtype] if row.bits == KEPT_BITS else ggml_type(row).name
        weights[kind] += row.weights
    most = weights.most_common(1)[0][0]
    for name in ("ALL_F32" if most == "F32" else f"MOSTLY_{most}", f"MOSTLY_{most}_M"):
        if name in gguf.LlamaFileType.__members__:
            return int(gguf.LlamaFileType[name])
    return int(gguf.LlamaFileType.GUESSED)


def ggml_type(row: LinearPlan) -> GGMLQuantizationType:
    """What ggml calls the encoding of a row."""
    return GGMLQuantizationType[ENCODINGS[row.encoding].ggml_type]  # type: ignore[attr-defined]


def _write_tensors(writer: GGUFWriter, path: Path, layout: Layout, shards: list[Path]) -> None:
    """Announce all tensors, and then write them, those of one shard after those of another."""
    factors = rope_factors(layout.config)
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.numpy().dtype, factors.nbytes)
    for shard in shards:
        for parameter, dtype in _parameters_of(shard, layout):
            _announce(writer, layout, parameter, dtype)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    for shard in shards:
        stored = dict(read_shard(shard, layout.plan))
        for parameter, dtype in _parameters_of(shard, layout):
            for tensor in _pieces(layout, parameter, dtype, stored):
                writer.write_tensor_data(tensor)
    writer.close()


def _parameters_of(shard: Path, layout: Layout) -> Iterator[tuple[str, torch.dtype]]:
    """The parameters in a shard, in the model's order, with their dtype (of codes it says nothing).

    Raises:
        AccullmError: a tensor that is none.
    """
    infos = tensors_of(shard)
    owner_of = {linear: parameter for parameter, own in layout.linears.items() for linear in own}
    here: dict[str, torch.dtype] = {}
    for name, info in infos.items():
        owner = owner_of.get(name.rpartition(".")[0])
        if owner is None and name not in layout.parameters:
            raise AccullmError(f"llama.cpp has no tensor for {name}", "--format", "choose another for this model")
        here[owner or name] = info.torch_dtype
    yield from ((name, here[name]) for name in layout.parameters if name in here)


def _announce(writer: GGUFWriter, layout: Layout, parameter: str, dtype: torch.dtype) -> None:
    shape = layout.parameters[parameter]
    for piece in layout.pieces[parameter]:
        rows = piece.rows[1] - piece.rows[0] if piece.rows else shape[-2 if len(shape) > 1 else 0]
        own = (*shape[:-2], rows, shape[-1]) if len(shape) > 1 else (rows,)
        if parameter in layout.linears:
            row = layout.row(parameter)
            kind, octets = ggml_type(row), row.stored_bytes // row.out_features * prod(own[:-1])
        else:
            stored = _plain_dtype(piece.name, own, dtype)
            kind, octets = _KIND_OF[stored], prod(own) * stored.itemsize
        writer.add_tensor_info(piece.name, own, torch.empty(0).numpy().dtype, octets, raw_dtype=kind)


def _pieces(
    layout: Layout, parameter: str, dtype: torch.dtype, stored: Mapping[str, torch.Tensor | StoredLinear]
) -> Iterator[Any]:
    """The tensors of a parameter as arrays: bytes of blocks or of 16-bit numbers, or float32."""
    if parameter in layout.linears:
        row = layout.row(parameter)
        encoding: Any = ENCODINGS[row.encoding]
        blocks = torch.stack([encoding.pack_blocks(stored[name]) for name in layout.linears[parameter]])
        for piece in layout.pieces[parameter]:
            yield _piece_of(blocks, piece, 1).contiguous().numpy()
        return
    values = stored[parameter]
    assert isinstance(values, torch.Tensor)
    for piece in layout.pieces[parameter]:
        own = _piece_of(values, piece, max(0, values.dim() - 2))
        own = own.to(_plain_dtype(piece.name, tuple(own.shape), dtype)).contiguous()
        yield own.numpy() if own.dtype == torch.float32 else own.view(torch.uint8).numpy()


# -- reading -----------------------------------------------------------------------------------------------


class GgufTensors(TensorFiles):
    """The tensors of a GGUF file under the names of the model: NAME.blocks of a quantized linear, parameters else."""

    def __init__(self, file: GgufFile, layout: Layout) -> None:
        self.file, self.layout = file, layout
        self._owner_of = {
            f"{linear}.{BLOCKS}": (parameter, number)
            for parameter, own in layout.linears.items()
            for number, linear in enumerate(own)
        }
        infos: dict[str, TensorInfo] = {}
        placed = {piece.name for pieces in layout.pieces.values() for piece in pieces}
        for name in file.tensors:
            if name not in placed and name != ROPE_FACTORS:
                raise AccullmError(f"tensor {name} has no place in the model", file.path, "copy the artifact again")
        for parameter in layout.parameters:
            infos |= self._infos(parameter)
        super().__init__(file.path.parent, infos)

    def _infos(self, parameter: str) -> dict[str, TensorInfo]:
        """What is stored of a parameter.

        Raises:
            AccullmError: a piece is missing, or has another type or shape.
        """
        shape, path = self.layout.parameters[parameter], self.file.path
        size, begin, dtype = 0, 0, torch.float32
        for piece in self.layout.pieces[parameter]:
            tensor = self.file.tensors.get(piece.name)
            if tensor is None:
                raise AccullmError(f"tensor {piece.name} is missing", path, "copy the artifact again")
            rows = piece.rows[1] - piece.rows[0] if piece.rows else shape[-2 if len(shape) > 1 else 0]
            wanted = (*shape[:-2], rows, shape[-1]) if len(shape) > 1 else (rows,)
            if tensor.shape != wanted:
                raise AccullmError(f"tensor {piece.name} has shape {list(tensor.shape)}, expected {list(wanted)}", path)
            if parameter in self.layout.linears:
                kind = ggml_type(self.layout.row(parameter))
                if tensor.kind != kind:
                    raise AccullmError(f"tensor {piece.name} is {tensor.kind.name}, expected {kind.name}", path)
            elif tensor.kind not in PLAIN:
                raise AccullmError(f"tensor {piece.name} is {tensor.kind.name}, expected it unquantized", path)
            else:
                dtype = PLAIN[tensor.kind]
            size, begin = size + tensor.end - tensor.begin, begin or tensor.begin
        if parameter not in self.layout.linears:
            return {parameter: TensorInfo(path, _NAME_OF[dtype], shape, begin, begin + size)}
        own = self.layout.linears[parameter]
        size //= len(own)
        rows = self.layout.row(parameter).out_features
        return {
            f"{linear}.{BLOCKS}": TensorInfo(path, "U8", (rows, size // rows), begin, begin + size) for linear in own
        }

    def tensors(self, names: Any) -> dict[str, torch.Tensor]:
        """Several tensors; those of a stack of experts come from one reading."""
        read: dict[str, torch.Tensor] = {}
        found: dict[str, torch.Tensor] = {}
        for name in names:
            if name not in self.infos:
                raise AccullmError(f"tensor {name} is missing", self.directory)
            parameter, number = self._owner_of.get(name, (name, -1))
            if parameter not in read:
                read[parameter] = self._read(parameter)
            found[name] = read[parameter] if number < 0 else read[parameter][number]
        return found

    def _read(self, parameter: str) -> torch.Tensor:
        """A parameter in the order of the model; of linears the blocks, uint8 [experts, N, bytes of a row]."""
        shape, placed = self.layout.parameters[parameter], self.layout.pieces[parameter]
        if parameter in self.layout.linears:
            experts = len(self.layout.linears[parameter])
            pieces = [self.file.octets(piece.name) for piece in placed]
            return _whole_of([piece.view(experts, -1, piece.shape[-1]) for piece in pieces], placed, 1)
        pieces = [self.file.values(piece.name) for piece in placed]
        return _whole_of(pieces, placed, max(0, len(shape) - 2))


class GgufArtifact(StoredArtifact):
    """An opened GGUF file."""

    format = "gguf"

    def __init__(self, path: Path, file: GgufFile, layout: Layout, manifest: Manifest | None) -> None:
        self.layout = layout
        schema = {
            linear: {f"{linear}.{BLOCKS}": TensorSchema(torch.uint8, _blocks_shape(layout.plan.quantized[linear]))}
            for own in layout.linears.values()
            for linear in own
        }
        super().__init__(path, layout.plan, GgufTensors(file, layout), schema, manifest)

    def _linear(self, name: str, stored: Mapping[str, torch.Tensor]) -> StoredLinear:
        row = self.plan.quantized[name]
        encoding: Any = ENCODINGS[row.encoding]
        linear: StoredLinear = encoding.unpack_blocks(stored[BLOCKS], row)
        return linear

    def _linear_problems(self, name: str, stored: Mapping[str, torch.Tensor]) -> Iterator[str]:
        yield from not_finite("a block", self._linear(name, stored).dequantize())


def _blocks_shape(row: LinearPlan) -> tuple[int, int]:
    return row.out_features, row.stored_bytes // row.out_features
