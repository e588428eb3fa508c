"""A GGUF file as an artifact: its tensors under the names of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.formats.gguf_layout import Layout, ggml_type
from accullm_cli.formats.manifest import Manifest
from accullm_cli.formats.shards import TensorFiles
from accullm_cli.formats.stored import StoredArtifact, TensorSchema, not_finite
from accullm_cli.model.gguf_architectures import ROPE_FACTORS, is_further
from accullm_cli.model.gguf_file import PLAIN, GgufFile
from accullm_cli.model.gguf_pieces import whole_of
from accullm_cli.model.integrity import TensorInfo
from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.encodings.base import StoredLinear
from accullm_cli.quant.plan import LinearPlan

# What a linear NAME's blocks are called: NAME.blocks.
BLOCKS = "blocks"
_NAME_OF = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


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
        predicts = file.metadata.get(f"{layout.architecture.name}.nextn_predict_layers")
        for name in file.tensors:
            if predicts and is_further(name, layout.config.num_hidden_layers):
                continue
            if name not in placed and name != ROPE_FACTORS:
                path = file.tensors[name].path
                raise AccullmError(f"tensor {name} has no place in the model", path, "copy the artifact again")
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
            path = tensor.path
            if not piece.is_shape(tensor.shape, shape):
                wanted = list(piece.shape(shape))
                raise AccullmError(f"tensor {piece.name} has shape {list(tensor.shape)}, expected {wanted}", path)
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
            return whole_of([piece.view(experts, -1, piece.shape[-1]) for piece in pieces], placed, 1)
        pieces = [self.file.values(piece.name).view(piece.shape(shape)) for piece in placed]
        return whole_of(pieces, placed, max(0, len(shape) - 2))


class GgufArtifact(StoredArtifact):
    """An opened GGUF file."""

    format = "gguf"

    def __init__(self, path: Path, file: GgufFile, layout: Layout, manifest: Manifest | None) -> None:
        self.layout, self.gguf = layout, file
        schema = {
            linear: {f"{linear}.{BLOCKS}": TensorSchema(torch.uint8, _blocks_shape(layout.plan.quantized[linear]))}
            for own in layout.linears.values()
            for linear in own
        }
        super().__init__(path, layout.plan, GgufTensors(file, layout), schema, manifest)

    @property
    def encodings(self) -> Mapping[str, tuple[int, int, int]]:
        """See `StoredArtifact.encodings`."""
        found: dict[str, tuple[int, int, int]] = {}
        for tensor in self.gguf.tensors.values():
            tensors, weights, stored = found.get(tensor.kind.name, (0, 0, 0))
            found[tensor.kind.name] = tensors + 1, weights + prod(tensor.shape), stored + tensor.end - tensor.begin
        return dict(sorted(found.items(), key=lambda entry: -entry[1][2]))

    def _linear(self, name: str, stored: Mapping[str, torch.Tensor]) -> StoredLinear:
        row = self.plan.quantized[name]
        encoding: Any = ENCODINGS[row.encoding]
        linear: StoredLinear = encoding.unpack_blocks(stored[BLOCKS], row)
        return linear

    def _linear_problems(self, name: str, stored: Mapping[str, torch.Tensor]) -> Iterator[str]:
        yield from not_finite("a block", self._linear(name, stored).dequantize())


def _blocks_shape(row: LinearPlan) -> tuple[int, int]:
    return row.out_features, row.stored_bytes // row.out_features
