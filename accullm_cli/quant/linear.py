"""One quantized linear, as the artifact stores it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.quant.packing import pack, packed_length, unpack
from accullm_cli.quant.trellis import codes_of_places, places_of_codes

# Weights that are dequantized at once, so that beside the matrix of a vocabulary there is no second one in float32. Any
# linear of a small model is one step.
ELEMENTS_TOGETHER = 1 << 24


@dataclass(frozen=True)
class QuantizedLinear:
    """A weight of shape [N, K] as integer codes, group scales and outlier input features.

    The dequantized weight is (code - zero) * scale, or levels[code] * scale, computed in float32 and rounded once to
    the compute dtype; the columns of the outlier features are replaced by `outlier_weight`, and their own codes stand
    for 0. Of a trellis, `codes` are the places of levels that its stored codes stand for (see quant.trellis).
    """

    codes: torch.Tensor  # uint8 [N, K], each below 2**bits; of a trellis below 2**(bits + 1)
    scales: torch.Tensor  # float16 [N, G], G = ceil(K / group size)
    zeros: torch.Tensor | None  # uint8 [N, G]; None where symmetric: the zero point is then 2**(bits-1)
    outlier_index: torch.Tensor  # int32 [n], ascending
    outlier_weight: torch.Tensor  # source dtype [N, n]
    bits: int
    group_size: int  # -1: one group per row
    scale_table: torch.Tensor | None = None  # float16 [2**scale bits], ascending, all scales among them; None: no table
    # Of 8 bits, ascending, 0 among them: 2**bits, or 2**(bits + 1) of a trellis; None: steps from the zero point.
    levels: tuple[int, ...] | None = None

    @property
    def columns_per_group(self) -> int:
        return self.codes.shape[1] if self.group_size == -1 else self.group_size

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that the artifact stands for: [N, K] in `dtype`."""
        size, count = self.columns_per_group, self.codes.shape[1]
        weight = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        together = max(1, ELEMENTS_TOGETHER // count)
        for start in range(0, len(weight), together):
            part = slice(start, start + together)
            weight[part] = self._points(part).mul_(spread(self.scales[part].to(torch.float32), size, count))
        weight[:, self.outlier_index.long()] = self.outlier_weight.to(dtype)
        return weight

    def _points(self, rows: slice) -> torch.Tensor:
        """What the codes of some rows stand for, in steps of the scale: float32 [R, K]."""
        codes = self.codes[rows]
        if self.levels is not None:
            return of_table(torch.tensor(self.levels, dtype=torch.float32, device=codes.device), codes)
        zero: int | torch.Tensor = self.zero_code
        if self.zeros is not None:
            zero = spread(self.zeros[rows].to(torch.int16), self.columns_per_group, codes.shape[1])
        return (codes.to(torch.int16) - zero).to(torch.float32)

    @property
    def zero_code(self) -> int:
        """The code that stands for 0 where no zero points are stored."""
        if self.levels is None:
            return 2 ** (self.bits - 1)
        return zero_place(self.levels)

    @property
    def is_trellis(self) -> bool:
        return is_trellis(self.levels, self.bits)

    def to(self, device: torch.device) -> QuantizedLinear:
        """The same linear on a device."""
        moved = {name: part.to(device) for name, part in vars(self).items() if isinstance(part, torch.Tensor)}
        return replace(self, **moved)  # type: ignore[arg-type]

    @property
    def scale_bits(self) -> int:
        """Bits that are stored for a scale."""
        return 16 if self.scale_table is None else (len(self.scale_table) - 1).bit_length()

    @property
    def stored_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.to_tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Everything stored for this linear, in bits, over N * K."""
        return 8 * self.stored_bytes / self.codes.numel()

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the native format, by suffix: see docs/format.md."""
        tensors = {"qweight": pack(codes_of_places(self.codes) if self.is_trellis else self.codes, self.bits)}
        if self.scale_table is None:
            tensors["scales"] = self.scales
        else:
            index = torch.searchsorted(self.scale_table.float(), self.scales.float()).to(torch.uint8)
            tensors |= {"qscales": pack(index, self.scale_bits), "scale_table": self.scale_table}
        if self.zeros is not None:
            tensors["qzeros"] = pack(self.zeros, self.bits)
        if len(self.outlier_index):
            tensors["outlier_index"] = self.outlier_index
            tensors["outlier_weight"] = self.outlier_weight
        return tensors

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, torch.Tensor],
        in_features: int,
        bits: int,
        group_size: int,
        levels: tuple[int, ...] | None = None,
    ) -> QuantizedLinear:
        """The inverse of `to_tensors`, which does not have the levels.

        Raises:
            AccullmError: a tensor is absent, or its shape does not fit `in_features`, `bits` and `group_size`; outlier
                features that do not exist or do not ascend (looked at on the CPU alone, so that no GPU is waited for).
        """
        groups = 1 if group_size == -1 else -(-in_features // group_size)
        table, index = tensors.get("scale_table"), tensors.get("outlier_index", torch.zeros(0, dtype=torch.int32))
        widths = {"qweight": packed_length(in_features, bits)}
        if table is None:
            widths["scales"] = groups
        else:
            scale_bits = (len(table) - 1).bit_length()
            widths["qscales"] = packed_length(groups, scale_bits)
        if "qzeros" in tensors:
            widths["qzeros"] = packed_length(groups, bits)
        if len(index) or "outlier_weight" in tensors:
            widths["outlier_weight"] = len(index)
        for suffix, width in widths.items():
            if suffix not in tensors:
                raise AccullmError(f"tensor {suffix} is missing")
            shape = (len(tensors["qweight"]), width)
            if tensors[suffix].shape != shape:
                raise AccullmError(f"tensor {suffix} has shape {list(tensors[suffix].shape)}, expected {list(shape)}")
        if index.device.type == "cpu" and not torch.compiler.is_compiling():
            check_outlier_index(index, in_features)
        scales = tensors["scales"] if table is None else table[unpack(tensors["qscales"], scale_bits, groups).long()]
        codes = unpack(tensors["qweight"], bits, in_features)
        return cls(
            codes=places_of_codes(codes) if is_trellis(levels, bits) else codes,
            scales=scales,
            zeros=unpack(tensors["qzeros"], bits, groups) if "qzeros" in tensors else None,
            outlier_index=index,
            outlier_weight=tensors.get("outlier_weight", scales.new_zeros(scales.shape[0], 0)),
            bits=bits,
            group_size=group_size,
            scale_table=table,
            levels=levels,
        )


def is_trellis(levels: Sequence[float] | None, bits: int) -> bool:
    """Whether a table of levels is for codes of so many bits that are a trellis."""
    return levels is not None and len(levels) > 2**bits


def zero_place(levels: tuple[int, ...]) -> int:
    """The place of the level 0. A trellis has two of them, and the upper one may stand above and below itself."""
    return len(levels) - 1 - levels[::-1].index(0)


def check_outlier_index(
    index: torch.Tensor, in_features: int, name: str = "outlier_index", where: object = None
) -> None:
    """Refuse outlier features that do not exist or do not ascend.

    Args:
        index: integers [n].
        name: of the tensor; where: the file that it is in.

    Raises:
        AccullmError: names the first feature that does not exist, or says that they do not ascend.
    """
    outside = index[(index < 0) | (index >= in_features)]
    if len(outside):
        raise AccullmError(f"tensor {name} names feature {int(outside[0])} of {in_features}", where)
    if not bool((index[1:] > index[:-1]).all()):
        raise AccullmError(f"tensor {name} is not ascending", where)


def of_table(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """What a table [2**bits] has for codes [N, K], by the fastest of torch's ways."""
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


def spread(per_group: torch.Tensor, columns_per_group: int, count: int) -> torch.Tensor:
    """Repeat one value per group to one per column: [N, G] to [N, count] (the last group may be shorter)."""
    return per_group.repeat_interleave(columns_per_group, dim=1)[:, :count]
