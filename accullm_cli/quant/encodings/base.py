"""What a way to store the weight of a linear offers; each family of them is a file beside this one.

An encoding is mathematics: tensors in, tensors out. Which of them a file format holds, and in which widths and group
sizes, is said by the format's capabilities.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch

from accullm_cli.quant.grid import Grid

if TYPE_CHECKING:
    from accullm_cli.quant.plan import LinearPlan


# The width that losses are measured for.
MEASURED_BITS = 4
OUTLIER_SUFFIXES = ("outlier_index", "outlier_weight")


class StoredLinear(Protocol):
    """A weight [N, K] as its encoding stores it: codes, what their grid is made of, and outlier features."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that it stands for: [N, K], computed in float32 and rounded once to `dtype`."""
        ...

    def to(self, device: torch.device) -> StoredLinear:
        """The same linear on a device."""
        ...

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """What a shard holds of it, by suffix; `Encoding.from_tensors` reads it back."""
        ...


class Encoding(ABC):
    """One way to store a linear, but for its outlier features.

    A row of the plan (`LinearPlan`) names it, and has what there is to choose: bits, group size, bits of a scale,
    whether it is symmetric.
    """

    name: str
    # Of the tensors that a shard holds of a linear, those of outlier features included.
    suffixes: ClassVar[tuple[str, ...]]
    # Whether `grid` can leave a margin, without which stochastic rounding is biased.
    rounds_at_random: ClassVar[bool] = True
    # Of a scale's place in a table, where nobody says otherwise and a format has tables.
    table_bits: ClassVar[int] = 6

    @abstractmethod
    def problem(self, row: LinearPlan) -> str:
        """Why a linear cannot be stored like this, as the end of a sentence that begins with its name; "" if it can."""

    def levels(self, row: LinearPlan) -> tuple[int, ...] | None:
        """What codes stand for in units of the scale, where that is a table of whole numbers; None: steps of one size.

        Only of encodings whose linears are stored as `QuantizedLinear`.
        """
        return None

    def relative_damage(self, row: LinearPlan) -> float:
        """The squared error of rounding to a row's grid, over that of MEASURED_BITS with a scale and a zero point.

        Here by the square of the step's size.
        """
        return float(((2**MEASURED_BITS - 1) / (2**row.bits - 1)) ** 2)

    @abstractmethod
    def stored_bytes(self, row: LinearPlan) -> int:
        """Bytes of everything that is stored, but for outlier features."""

    @abstractmethod
    def grid(
        self,
        weight: torch.Tensor,
        row: LinearPlan,
        scale_dtype: str,
        importance: torch.Tensor | None = None,
        ignored: torch.Tensor | None = None,
        margin: float = 0,
        ignored_weight: float = 0,
    ) -> tuple[Grid, list[str]]:
        """A grid whose every value can be stored, and a sentence for all that was treated otherwise than asked for.

        Args:
            weight: [N, K], float32 or float64 (the working dtype).
            scale_dtype: what scales and offsets of 16 bits are exact in: "float16", or "bfloat16" for both.
            importance: [K], weight of a column's squared error for a search; None to span the range of the weights.
            ignored: bool [K], columns that the grid need not hold.
            margin: codes kept free at either end, where the range is spanned; see `minmax_grid`.
            ignored_weight: how much of its importance an ignored column's error has in a search.
        """

    @abstractmethod
    def store(
        self, grid: Grid, codes: torch.Tensor, row: LinearPlan, outliers: torch.Tensor, kept: torch.Tensor
    ) -> StoredLinear:
        """The linear as it is stored; no value changes.

        Args:
            grid: from `grid`, or what `Grid.fitted` made of it.
            codes: uint8 [N, K]; those of outlier features are overwritten.
            outliers: int64 [n], ascending. kept: their weights [N, n].
        """

    @abstractmethod
    def from_tensors(self, tensors: Mapping[str, torch.Tensor], row: LinearPlan) -> StoredLinear:
        """The inverse of `StoredLinear.to_tensors`.

        Raises:
            AccullmError: a tensor is absent, or its shape does not fit the row.
        """
