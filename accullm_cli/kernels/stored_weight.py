"""A module's weight as the native format stores it, and what is prepared of it for products on the device it is on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from accullm_cli.kernels.check import require_agreement
from accullm_cli.kernels.layout import TiledLinear, tile, untile, why_not_tiled
from accullm_cli.kernels.matmul import Operand, why_no_kernels
from accullm_cli.kernels.packed import PackedLinear, is_worth_packing, pack_linear, why_not_packed
from accullm_cli.quant.linear import QuantizedLinear, is_trellis

FLOAT_BUFFERS = ("scales", "scale_table", "outlier_weight")
# What tiles hold, too, so that a GPU's memory need not hold it twice.
TILED_BUFFERS = ("qweight", "scales", "qzeros")


class StoredWeight(nn.Module):
    """A weight [N, K] as codes, group scales and outlier features.

    Its buffers are those of the native format. Once it was multiplied by on a GPU, those that the tiles hold are None;
    moving the module, its state dict and `dequantize` have them all, with the bits that were stored.
    """

    def __init__(
        self,
        buffers: Mapping[str, torch.Tensor | None],
        in_features: int,
        bits: int,
        group_size: int,
        levels: tuple[int, ...] | None = None,
    ) -> None:
        """Takes buffers by suffix (`QuantizedLinear.to_tensors`), on the meta device until they are loaded."""
        super().__init__()
        self.in_features = in_features
        self.bits = bits
        self.group_size = group_size
        self.levels = levels
        for suffix, buffer in buffers.items():
            self.register_buffer(suffix, buffer)
        self._suffixes = [suffix for suffix, buffer in buffers.items() if buffer is not None]
        self._prepared: TiledLinear | PackedLinear | None = None

    def quantized(self, rows: torch.Tensor | None = None) -> QuantizedLinear:
        """The codes, unpacked; of these rows alone, int64 [R] (of a weight without outliers)."""
        if rows is not None and is_trellis(self.levels, self.bits):  # what codes stand for hangs on the rows above them
            whole = self.quantized()
            return replace(whole, codes=whole.codes[rows], scales=whole.scales[rows])
        scheme = self.in_features, self.bits, self.group_size, self.levels
        return QuantizedLinear.from_tensors(self._stored(rows), *scheme)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [N, K] in `dtype`."""
        return self.quantized().dequantize(dtype)

    def operand(self, x: torch.Tensor) -> Operand:
        """What to multiply x by: where a kernel of its device serves, what was prepared for it at the first product."""
        ready, scheme = self._prepared, (self.bits, self.group_size, x.dtype, self.levels)
        if isinstance(ready, TiledLinear) and (ready.dtype, ready.tiles.device) == (x.dtype, x.device):
            return ready
        if why_no_kernels(x.device, x.dtype) is None and why_not_tiled(*scheme) is None:
            require_agreement(x.device)
            self._prepared = tiled = tile(self.quantized(), x.dtype)
            self._buffers.update(dict.fromkeys(self._in_tiles(), None))
            return tiled
        if why_not_packed(*scheme[:3]) or not is_worth_packing(x):
            return self.quantized()
        if not isinstance(ready, PackedLinear) or ready.dtype != x.dtype:
            self._restore()
            self._prepared = ready = pack_linear(self._stored(), self.in_features, *scheme)
        return ready

    def _in_tiles(self) -> list[str]:
        return [suffix for suffix in self._suffixes if suffix in TILED_BUFFERS]

    def _stored(self, rows: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """All tensors as the artifact has them, or some rows of them."""
        tensors = {name: buffer for name in self._suffixes if (buffer := self._buffers[name]) is not None}
        if rows is not None:
            tensors = {name: buffer[rows] for name, buffer in tensors.items()}
        if isinstance(self._prepared, TiledLinear):
            tiled = untile(self._prepared, rows).to_tensors()
            tensors |= {name: tiled[name] for name in self._in_tiles()}
        return tensors

    def _restore(self) -> None:
        """Have all buffers again, and nothing beside them."""
        stored, self._prepared = self._stored(), None
        self._buffers.update(stored)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> StoredWeight:
        """`model.to(dtype)` and its like change the dtype of what is computed, not of what is stored."""
        self._restore()
        before = {name: self._buffers[name] for name in FLOAT_BUFFERS}
        super()._apply(fn, recurse)
        for name, stored in before.items():
            after = self._buffers[name]
            if stored is not None and after is not None and after.dtype != stored.dtype:
                self._buffers[name] = stored.to(after.device)
        return self

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self._restore()
        super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._restore()
        super()._load_from_state_dict(*arguments)
