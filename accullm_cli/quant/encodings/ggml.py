"""GGUF's encodings: blocks of 32 weights, or of 256, as llama.cpp reads them.

What is stored of a linear are the blocks themselves, byte for byte, so that a file takes them as they are. See
`ggml_layout` for what they are made of, `ggml_grid` for their grids, and `ggml_search` for how numbers are found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.quant.encodings.base import OUTLIER_SUFFIXES, Encoding
from accullm_cli.quant.encodings.ggml_grid import BlockGrid, nonzero, points_of
from accullm_cli.quant.encodings.ggml_layout import BlockType, pack_blocks, unpack_blocks
from accullm_cli.quant.encodings.ggml_search import BlockSearch
from accullm_cli.quant.grid import Grid, row_chunks
from accullm_cli.quant.linear import ELEMENTS_TOGETHER, check_outlier_index, spread

if TYPE_CHECKING:
    from accullm_cli.quant.plan import LinearPlan

# Of normally distributed weights, all features alike: the squared error of the nearest values of the grid that the
# search finds, over that of integer codes of MEASURED_BITS in groups of 32.
RELATIVE_DAMAGE = {
    "Q4_0": 0.99,
    "Q4_1": 0.74,
    "Q5_0": 0.244,
    "Q5_1": 0.176,
    "Q8_0": 0.0037,
    "Q3_K": 3.11,
    "Q4_K": 0.74,
    "Q5_K": 0.18,
    "Q6_K": 0.044,
    "IQ4_NL": 0.82,
    "IQ4_XS": 0.83,
}
# Of the mean importance, the least of a feature: one that calibration never saw counts where no other does.
LEAST_IMPORTANCE = 1e-6


@dataclass(frozen=True)
class BlockLinear:
    """A weight [N, K] as blocks, and outlier input features.

    Every weight is computed in float32, as llama.cpp does, and rounded once; the columns of the outlier features are
    replaced by `outlier_weight`. Their own codes are the nearest to it, for readers without outliers.
    """

    blocks: torch.Tensor  # uint8 [N, bytes of a row]
    outlier_index: torch.Tensor  # int32 [n], ascending
    outlier_weight: torch.Tensor  # source dtype [N, n]
    kind: BlockType

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that the artifact stands for: [N, K] in `dtype`."""
        weight = self.without_outliers(dtype)
        weight[:, self.outlier_index.long()] = self.outlier_weight.to(dtype)
        return weight

    def without_outliers(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What a reader makes of the blocks, that knows nothing of outliers: [N, K] in `dtype`."""
        kind, row_bytes = self.kind, self.blocks.shape[1]
        count = row_bytes // kind.bytes_of_block * kind.block
        weight = torch.empty(len(self.blocks), count, dtype=dtype, device=self.blocks.device)
        together = max(1, ELEMENTS_TOGETHER // max(1, count))
        for start in range(0, len(weight), together):
            part = slice(start, start + together)
            weight[part] = dequantized(self.blocks[part], kind)
        return weight

    def to(self, device: torch.device) -> BlockLinear:
        """The same linear on a device."""
        moved = {name: part.to(device) for name, part in vars(self).items() if isinstance(part, torch.Tensor)}
        return replace(self, **moved)  # type: ignore[arg-type]

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of a shard, by suffix."""
        tensors = {"blocks": self.blocks}
        if len(self.outlier_index):
            tensors |= {"outlier_index": self.outlier_index, "outlier_weight": self.outlier_weight}
        return tensors


class GgmlBlocks(Encoding):
    """One of ggml's types; its rows of a plan have the bits of its codes and the group size of its sub-blocks."""

    suffixes = ("blocks", *OUTLIER_SUFFIXES)
    rounds_at_random = False

    def __init__(self, kind: BlockType) -> None:
        self.kind = kind
        self.name = kind.name
        self.ggml_type = kind.name  # in `GGMLQuantizationType`

    def problem(self, row: LinearPlan) -> str:
        kind = self.kind
        if row.bits != kind.bits:
            return f"is to have {row.bits} bits, and {kind.name} has {kind.bits}"
        if row.group_size != kind.group:
            return f"is to have group size {row.group_size}, and {kind.name} has {kind.group}"
        if row.symmetric == kind.has_offset or row.scale_bits != 16:
            return f"is to have other scales or offsets than {kind.name} has"
        if row.in_features % kind.block:
            return (
                f"has {row.in_features} input features, which are no multiple of {kind.name}'s blocks of {kind.block}"
            )
        return ""

    def relative_damage(self, row: LinearPlan) -> float:
        """See `Encoding.relative_damage`; as measured, for a search is not told by the size of a step."""
        return RELATIVE_DAMAGE[self.kind.name]

    def stored_bytes(self, row: LinearPlan) -> int:
        return row.out_features * self._row_bytes(row)

    def grid(
        self,
        weight: torch.Tensor,
        row: LinearPlan,
        scale_dtype: str,
        importance: torch.Tensor | None = None,
        ignored: torch.Tensor | None = None,
        margin: float = 0,
        ignored_weight: float = 0,
    ) -> tuple[BlockGrid, list[str]]:
        """See `Encoding.grid`. `scale_dtype` says nothing here: blocks hold float16 alone.

        Raises:
            AccullmError: there is to be a margin, for which float16s and integers leave no room.
        """
        if margin:
            what = f"{self.name} cannot be rounded at random: its grid need not hold the range of the weights"
            raise AccullmError(what, row.name, "use another --rounding")
        columns = torch.ones_like(weight[0]) if importance is None else importance.to(weight.dtype)
        mean = columns.mean()
        columns = torch.where(mean > 0, (columns / nonzero(mean)).clamp(min=LEAST_IMPORTANCE), 1)
        if ignored is not None:
            columns = torch.where(ignored, columns * ignored_weight, columns)
        parts, clamped = [], 0
        for part in row_chunks(weight):
            search = BlockSearch(self.kind, part, columns)
            parts.append(search.spanning() if importance is None else search.best())
            clamped += search.beyond()
        sentences = []
        if clamped:
            of = f"{clamped} of {weight.numel() // self.kind.block} blocks"
            sentences.append(f"{of} hold weights that no float16 reaches, and were clamped")
        return parts[0].joined(parts), sentences

    def store(
        self, grid: Grid, codes: torch.Tensor, row: LinearPlan, outliers: torch.Tensor, kept: torch.Tensor
    ) -> BlockLinear:
        assert isinstance(grid, BlockGrid)
        if len(outliers):
            # Of whole columns, for a table of levels has no formula: an outlier in a hundred columns.
            places = torch.zeros_like(codes, dtype=grid.scale.dtype)
            places[:, outliers] = kept.to(places.dtype)
            codes[:, outliers] = grid.round_to_nearest(places)[:, outliers].to(torch.uint8)
        together = len(row_chunks(codes)[0])
        starts = range(0, len(codes), together)
        parts = [
            _packed(grid.rows(slice(start, start + together)), codes[start : start + together]) for start in starts
        ]
        return BlockLinear(
            blocks=torch.cat(parts),
            outlier_index=outliers.to(torch.int32),
            outlier_weight=kept.contiguous(),
            kind=self.kind,
        )

    def from_tensors(self, tensors: Mapping[str, torch.Tensor], row: LinearPlan) -> BlockLinear:
        index = tensors.get("outlier_index", torch.zeros(0, dtype=torch.int32))
        shapes = {"blocks": (row.out_features, self._row_bytes(row))}
        shapes |= {"outlier_weight": (row.out_features, len(index))} if len(index) else {}
        for suffix, shape in shapes.items():
            if suffix not in tensors:
                raise AccullmError(f"tensor {suffix} is missing")
            if tensors[suffix].shape != shape:
                raise AccullmError(f"tensor {suffix} has shape {list(tensors[suffix].shape)}, expected {list(shape)}")
        if tensors["blocks"].dtype != torch.uint8:
            raise AccullmError(
                f"tensor blocks is of {str(tensors['blocks'].dtype).removeprefix('torch.')}, expected uint8"
            )
        check_outlier_index(index, row.in_features)
        none = torch.zeros(row.out_features, 0, dtype=torch.float16)
        return BlockLinear(tensors["blocks"], index, tensors.get("outlier_weight", none), self.kind)

    def pack_blocks(self, stored: BlockLinear) -> torch.Tensor:
        """The blocks of a linear, as a GGUF file holds them: uint8 [N, bytes of a row]. Outliers are not in there."""
        return stored.blocks

    def unpack_blocks(self, octets: torch.Tensor, row: LinearPlan) -> BlockLinear:
        """The inverse of `pack_blocks`, for whatever was written by others.

        Raises:
            AccullmError: another number of bytes than the row takes.
        """
        return self.from_tensors({"blocks": octets}, row)

    def _row_bytes(self, row: LinearPlan) -> int:
        return row.in_features // self.kind.block * self.kind.bytes_of_block


def dequantized(blocks: torch.Tensor, kind: BlockType) -> torch.Tensor:
    """The weights [N, K] in float32 of blocks, uint8 [N, bytes of a row]; every bit as ggml computes them."""
    parts = unpack_blocks(blocks, kind)
    count = parts["codes"].shape[1]
    scale = parts["half"].float()
    if kind.is_super:
        scale = spread(scale, kind.groups_of_block, count // kind.group) * (
            parts["integers"].float() + kind.integers[0]
        )
    weight = points_of(parts["codes"], kind).mul_(spread(scale, kind.group, count))
    if not kind.has_offset:
        return weight
    offset = parts["half_offset"].float()
    if not kind.is_super:
        return weight.add_(spread(offset, kind.group, count))
    return weight.sub_(
        spread(spread(offset, kind.groups_of_block, count // kind.group) * parts["lifts"], kind.group, count)
    )


def _packed(grid: BlockGrid, codes: torch.Tensor) -> torch.Tensor:
    """The blocks of some rows, uint8 [R, bytes of a row]."""
    kind = grid.kind
    parts = {"codes": codes, "half": grid.half.to(torch.float16), "half_offset": grid.half_offset.to(torch.float16)}
    parts["integers"] = (grid.integers - kind.integers[0]).to(torch.uint8)
    parts["lifts"] = (-grid.lifts).to(torch.uint8) if kind.is_super else torch.zeros_like(parts["integers"])
    return pack_blocks(parts, kind)
