"""Outlier features beside a linear, not in it: what their columns lost in rounding, as a matrix of low rank.

A runtime that knows nothing of outlier features reads a weight Q [N, K] of codes alone. With n of the features chosen,
W = Q + B A puts back what Q lost in their columns: A [n, K] has a single 1 in each row, where its feature is, and
B [N, n] holds original - Q in these columns. That is a low-rank adapter (LoRA, arXiv 2106.09685), which runtimes load.

B is stored in float16, so that a column differs from its original w by no more than

    2^-11 |w - Q| + 2^-25,

and the rounding of the sum to the dtype it is computed in. |w - Q| is half a step of the grid, or what the column lies
beyond it; 2^-25 is half of float16's smallest step.

The artifact's own files alone should be of use, too. So the grid counts these columns a little (`BESIDE_WEIGHT` in
quant.rounding), and their codes make up for what the others lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.encodings.base import StoredLinear
from accullm_cli.quant.feedback import factor_hessian, round_with_feedback
from accullm_cli.quant.grid import Grid, row_chunks
from accullm_cli.quant.linear import check_outlier_index
from accullm_cli.quant.loops import COMPILED, Loops
from accullm_cli.quant.plan import LinearPlan

# Of the outliers' Hessian. They are few and large; the damping of all columns would drown what they share.
DAMPING = 0.01
SUFFIXES = ("outlier_index", "outlier_correction")
CORRECTION_DTYPE = torch.float16


@dataclass(frozen=True)
class CorrectedLinear:
    """A weight [N, K] as a linear without outliers, and what is added to some of its columns."""

    base: StoredLinear
    outlier_index: torch.Tensor  # int32 [n], ascending
    correction: torch.Tensor  # B, float16 [N, n]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Q + B A: [N, K], computed in float32 and rounded once to `dtype`."""
        return self.added_to(self.base.dequantize(torch.float32)).to(dtype)

    def added_to(self, base: torch.Tensor) -> torch.Tensor:
        """The sum of B A and Q [N, K] as a reader has rounded it, float32."""
        weight = base.to(torch.float32, copy=True)
        weight[:, self.outlier_index.long()] += self.correction.float()
        return weight

    def to(self, device: torch.device) -> CorrectedLinear:
        """The same linear on a device."""
        return CorrectedLinear(self.base.to(device), self.outlier_index.to(device), self.correction.to(device))

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of a shard, by suffix."""
        beside = dict(zip(SUFFIXES, (self.outlier_index, self.correction), strict=True))
        return {**self.base.to_tensors(), **beside}


def store_linear(
    grid: Grid, codes: torch.Tensor, row: LinearPlan, outliers: torch.Tensor, kept: torch.Tensor
) -> StoredLinear:
    """A linear as its row of the plan stores it; no value changes but those of corrected columns, by their bound.

    Args:
        grid, codes: see `Encoding.store`. Codes of corrected columns are stored as they are: `codes_after_the_rest`.
        outliers: int64 [n], ascending. kept: their weights [N, n].

    Raises:
        AccullmError: a column lies so far beyond its grid that float16 cannot hold what it lost.
    """
    encoding = ENCODINGS[row.encoding]
    if not row.adapter or not len(outliers):
        return encoding.store(grid, codes, row, outliers, kept)
    base = encoding.store(grid, codes, row, outliers[:0], kept[:, :0])
    correction = (kept.float() - base.dequantize(torch.float32)[:, outliers]).to(CORRECTION_DTYPE)
    if not correction.isfinite().all():
        raise AccullmError("an outlier feature's weights are beyond what float16 holds", row.name, "use --outliers 0")
    return CorrectedLinear(base, outliers.to(torch.int32), correction.contiguous())


def codes_after_the_rest(
    target: torch.Tensor,
    grid: Grid,
    codes: torch.Tensor,
    outliers: torch.Tensor,
    hessian: torch.Tensor,
    where: str,
    loops: Loops = COMPILED,
) -> torch.Tensor:
    """Codes of corrected columns for readers without the correction: uint8 [N, n].

    With the errors e of all other columns as they are, the loss is least where those of these columns are
    -e H_ro H_oo^-1. So the columns come last in the order: rounded, with feedback among them, from what makes up for e.

    Args:
        target: W*, [N, K]. codes: uint8 [N, K], of all other columns.
        outliers: int64 [n], ascending.
    """
    own = hessian[outliers][:, outliers]
    factor = factor_hessian(own, DAMPING, where=where)
    own.diagonal().add_(factor.ridge)
    between = hessian[:, outliers]
    between[outliers] = 0
    wanted = target[:, outliers].clone()
    start = 0
    for part in row_chunks(codes):
        rows = slice(start, start := start + len(part))
        error = target[rows] - grid.rows(rows).values(part.to(target.dtype))
        wanted[rows] += torch.linalg.solve(own, (error @ between).T).T
    return round_with_feedback(wanted, grid.of_columns(outliers), wanted[:, :0], factor, loops=loops)[0]


def read_linear(tensors: Mapping[str, torch.Tensor], row: LinearPlan) -> StoredLinear:
    """The linear of a shard from its tensors, by suffix.

    Raises:
        AccullmError: a tensor is absent, or its shape does not fit the row.
    """
    own = dict(tensors)
    index, correction = (own.pop(suffix, None) for suffix in SUFFIXES) if row.adapter else (None, None)
    base = ENCODINGS[row.encoding].from_tensors(own, row)
    if index is None or correction is None:
        return base
    if correction.shape != (row.out_features, len(index)):
        found, expected = list(correction.shape), [row.out_features, len(index)]
        raise AccullmError(f"tensor {SUFFIXES[1]} has shape {found}, expected {expected}")
    check_outlier_index(index, row.in_features)
    return CorrectedLinear(base, index, correction)


def without_correction(linear: StoredLinear) -> StoredLinear:
    """What an artifact's own files store of a linear."""
    return linear.base if isinstance(linear, CorrectedLinear) else linear
