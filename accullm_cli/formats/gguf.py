"""GGUF, which llama.cpp and what is built on it read: all of a model in one file, beside what other formats have.

A linear of the plan is rows of blocks, packed by its encoding. What llama.cpp calls a tensor, and in which order it
wants the rows of some, is said in `gguf_programs`; rows are moved with their scales, since blocks lie along them.
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
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import AutoConfig

from accullm_cli.errors import AccullmError
from accullm_cli.formats.assemble import copy_companions, read_shard, refuse
from accullm_cli.formats.base import ModelShape, Objection, Parts
from accullm_cli.formats.capabilities import CAPABILITIES
from accullm_cli.formats.gguf_adoption import adopt
from accullm_cli.formats.gguf_artifact import GgufArtifact
from accullm_cli.formats.gguf_general import write_general
from accullm_cli.formats.gguf_layout import Layout, ggml_type
from accullm_cli.formats.gguf_pace import Pace, pace_of
from accullm_cli.formats.gguf_vocabulary import FILE as TOKENIZER
from accullm_cli.formats.gguf_vocabulary import read_vocabulary
from accullm_cli.formats.manifest import MANIFEST_NAME, manifest_of, write_card, write_manifest
from accullm_cli.formats.shards import SHARD_BYTES, read_json, shards_of, tensors_of, write_shard
from accullm_cli.model.gguf_architectures import ROPE_FACTORS, placed, rope_factors, write_parameters
from accullm_cli.model.gguf_file import ALIGNMENT, PLAIN, read_gguf
from accullm_cli.model.gguf_pieces import piece_of
from accullm_cli.model.gguf_programs import ARCHITECTURES, architecture_of
from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.encodings.base import StoredLinear
from accullm_cli.quant.plan import KEPT_BITS, LinearPlan, Plan
from accullm_cli.run import sync_directory, write_file, write_text

_KIND_OF = {dtype: kind for kind, dtype in PLAIN.items()}
_NAME_OF = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# Of tensors that llama.cpp reads as float32 whatever else is quantized.
_SINGLE = ("_norm.weight", ".ffn_gate_inp.weight", ".ffn_gate_inp_shexp.weight", ".bias")


class GgufFormat:
    """Writer and reader of GGUF files."""

    name = "gguf"

    def file_size(self, shape: ModelShape, facts: Mapping[str, Any]) -> FileSize:
        """What the file of a model weighs under a plan; facts: as `Parts.provenance`."""
        return FileSize(shape, facts)

    def pace_of(self, path: Path) -> Pace | None:
        """How long llama.cpp takes over a token with a file; None where it is no GGUF."""
        return pace_of(path)

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
        layout = Layout.of(directory, config, architecture, parts.plan)
        writer = GGUFWriter(None, architecture.name)
        write_head(writer, parts.provenance, parts.companions, parts.shape.dtype, layout)
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
        manifest = manifest_of(directory, self.name)
        if manifest is None:
            raise AccullmError("file is missing", directory / MANIFEST_NAME, "copy the artifact again")
        content = read_json(directory / "config.json")
        name = content.get("quantization_config", {}).get("file")
        if not isinstance(name, str) or Path(name).name != name:
            raise AccullmError("does not name its GGUF file", directory / "config.json", "copy the artifact again")
        file = read_gguf(directory / name)
        if content.get("model_type") not in ARCHITECTURES:
            raise AccullmError("names no model_type that is read", directory / "config.json", "copy the artifact again")
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        layout = Layout.of(directory, config, architecture_of(config), manifest.plan)
        return GgufArtifact(directory, file, layout, manifest)

    def adopt(self, path: Path, directory: Path) -> None:
        """Make an artifact, in an empty directory, of a file that somebody else wrote.

        Raises:
            AccullmError: it is damaged, or of an architecture or a type that is not read.
        """
        schemes = {
            entry.encoding: (entry.encoding, entry.bits[0], entry.group_sizes[0], entry.symmetric[0])
            for entry in CAPABILITIES[self.name].linears
        }
        adopt(path, directory, self.name, schemes)


FORMAT = GgufFormat()


def model_objections(shape: ModelShape) -> list[Objection]:
    """Why llama.cpp cannot run a model, whatever its plan; empty where it can."""
    hint = "choose another --format for this model"
    try:
        config = AutoConfig.for_model(**shape.config)
        architecture = architecture_of(config)
        placed(architecture, config, shape.parameters)
        read_vocabulary(shape.companions.get(TOKENIZER, Path(TOKENIZER)), config.vocab_size)
    except AccullmError as error:
        return [Objection(error.what, error.hint or hint)]
    alone = "make the GGUF file in a run of its own, which leaves it out"
    return [
        Objection(f"llama.cpp's architecture {architecture.name} has no tensor for {name}", alone)
        for name in shape.kept[:1]
    ]


def file_name(parts: Parts) -> str:
    """What the GGUF file of an artifact is called."""
    source = str(parts.provenance.get("source", "model")).partition("@")[0].rpartition("/")[2]
    return (re.sub(r"[^\w.-]+", "-", source).strip("-.") or "model") + ".gguf"


# -- writing -----------------------------------------------------------------------------------------------


def write_head(
    writer: GGUFWriter, facts: Mapping[str, Any], companions: Mapping[str, Path], dtype: torch.dtype, layout: Layout
) -> None:
    """What the file says of the model, but for its tokenizer, and of how it was made."""
    source = str(facts.get("source", "model"))
    writer.add_type(gguf.GGUFType.MODEL)
    write_general(writer, source, companions, layout)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_file_type(layout.plan, dtype))
    write_parameters(writer, layout.architecture, layout.config)
    writer.add_string("accullm.source", source)
    writer.add_string("accullm.source_sha256", str(facts.get("source_sha256", "")))
    writer.add_string("accullm.config", json.dumps(facts.get("config", {}), sort_keys=True))
    writer.add_string("accullm.plan", _plan_text(layout.plan))


def _plan_text(plan: Plan) -> str:
    return json.dumps({name: row.encoding for name, row in plan.quantized.items()})


def _file_type(plan: Plan, dtype: torch.dtype) -> int:
    """llama.cpp's number for the encoding of most weights."""
    weights: Counter[str] = Counter()
    for row in (*plan.linears.values(), *plan.embeddings.values()):
        kind = _NAME_OF[dtype] if row.bits == KEPT_BITS else ggml_type(row).name
        weights[kind] += row.weights
    most = weights.most_common(1)[0][0]
    for name in ("ALL_F32" if most == "F32" else f"MOSTLY_{most}", f"MOSTLY_{most}_M"):
        if name in gguf.LlamaFileType.__members__:
            return int(gguf.LlamaFileType[name])
    return int(gguf.LlamaFileType.GUESSED)


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
        linear, _, suffix = name.rpartition(".")
        owner = owner_of.get(linear)
        if owner is not None and suffix not in ENCODINGS[layout.row(owner).encoding].suffixes:
            owner = None  # a bias
        if owner is None and name not in layout.parameters:
            raise AccullmError(f"llama.cpp has no tensor for {name}", "--format", "choose another for this model")
        here[owner or name] = info.torch_dtype
    yield from ((name, here[name]) for name in layout.parameters if name in here)


def _announce(writer: GGUFWriter, layout: Layout, parameter: str, dtype: torch.dtype) -> None:
    for name, shape, kind, octets in _tensors(layout, parameter, dtype):
        writer.add_tensor_info(name, shape, torch.empty(0).numpy().dtype, octets, raw_dtype=kind)


def _tensors(
    layout: Layout, parameter: str, dtype: torch.dtype
) -> Iterator[tuple[str, tuple[int, ...], GGMLQuantizationType, int]]:
    """Names, shapes, types and bytes of the tensors of a parameter; dtype: that it has in the source."""
    shape = layout.parameters[parameter]
    for piece in layout.pieces[parameter]:
        own = piece.shape(shape)
        if parameter in layout.linears:
            row = layout.row(parameter)
            yield piece.name, own, ggml_type(row), row.stored_bytes // row.out_features * prod(own[:-1])
        else:
            stored = _plain_dtype(piece.name, own, dtype)
            yield piece.name, own, _KIND_OF[stored], prod(own) * stored.itemsize


class FileSize:
    """What a model's file weighs under a plan.

    Args:
        facts: what the file says of how it was made, as `Parts.provenance`.
    """

    def __init__(self, shape: ModelShape, facts: Mapping[str, Any]) -> None:
        self._shape, self._facts = shape, facts
        self._config = AutoConfig.for_model(**shape.config)
        self._architecture = architecture_of(self._config)
        self._fixed: int | None = None

    def __call__(self, plan: Plan) -> int:
        """Bytes of the file."""
        layout = Layout(self._shape.parameters, self._config, self._architecture, plan)
        if self._fixed is None:
            # Of the head, all but its plan is the same for all.
            self._fixed = self._head(layout) - len(_plan_text(plan))
        head = GGUFWriter.ggml_pad(self._fixed + len(_plan_text(plan)), ALIGNMENT)
        data = sum(
            GGUFWriter.ggml_pad(octets, ALIGNMENT)
            for parameter in layout.parameters
            for _, _, _, octets in _tensors(layout, parameter, self._shape.dtype)
        )
        factors = rope_factors(self._config)
        return head + data + (0 if factors is None else GGUFWriter.ggml_pad(factors.nbytes, ALIGNMENT))

    def _head(self, layout: Layout) -> int:
        """Bytes in front of the data."""
        writer = GGUFWriter(None, self._architecture.name)
        write_head(writer, self._facts, self._shape.companions, self._shape.dtype, layout)
        tokenizer = self._shape.companions[TOKENIZER]
        read_vocabulary(tokenizer, self._config.vocab_size).write(writer, tokenizer.parent)
        if (factors := rope_factors(self._config)) is not None:
            writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.numpy().dtype, factors.nbytes)
        for parameter in layout.parameters:
            _announce(writer, layout, parameter, self._shape.dtype)
        with TemporaryDirectory() as place:
            path = Path(place) / "head"
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            return path.stat().st_size


def _pieces(
    layout: Layout, parameter: str, dtype: torch.dtype, stored: Mapping[str, torch.Tensor | StoredLinear]
) -> Iterator[Any]:
    """The tensors of a parameter as arrays: bytes of blocks or of 16-bit numbers, or float32."""
    if parameter in layout.linears:
        row = layout.row(parameter)
        encoding: Any = ENCODINGS[row.encoding]
        blocks = torch.stack([encoding.pack_blocks(stored[name]) for name in layout.linears[parameter]])
        for piece in layout.pieces[parameter]:
            yield piece_of(blocks, piece, 1).contiguous().numpy()
        return
    values = stored[parameter]
    assert isinstance(values, torch.Tensor)
    for piece in layout.pieces[parameter]:
        own = piece_of(values, piece, max(0, values.dim() - 2))
        own = own.to(_plain_dtype(piece.name, tuple(own.shape), dtype)).contiguous()
        yield own.numpy() if own.dtype == torch.float32 else own.view(torch.uint8).numpy()


def _plain_dtype(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.dtype:
    """Of a tensor that is not quantized, by its name in the file."""
    return torch.float32 if len(shape) == 1 or name.endswith(_SINGLE) else dtype
