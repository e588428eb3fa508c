"""Rounding with error feedback: each column's rounding error is carried into the columns that follow.

The problem. A linear with weight W [N, K] reads rows X [T, K] in the full-precision model and rows Y [T, K] in the
model quantized so far, and its output is added to residuals R and P [T, N] (zero where it is not added to anything).
Choose Q on a grid so that ||(R + X W^T) - (P + Y Q^T)||^2 is small. What differs between the two models while this
linear still has its own weight is (R + X W^T) - (P + Y W^T) =: O. With H = Y^T Y and the pull C = Y^T O, completing
the square gives

    ||O + Y (W - Q)^T||^2 = tr((W* - Q) H (W* - Q)^T) + const,      W* = W + C^T H^-1

so the past enters as a corrected target W* (without residuals: Qronos, arXiv 2505.11695; GPTAQ, arXiv 2504.02692),
and what remains is rounding W* under the quadratic form H. Write H = U S U^T with U unit upper triangular and S
diagonal. Then

    tr((W* - Q) H (W* - Q)^T) = sum_k S_kk ||e_k + sum_{i<k} e_i U_ik||^2,      e = W* - Q  (columns)

and going through the columns in order, each term is as small as it can be if column k is rounded from

    w*_k + sum_{i<k} e_i U_ik.

This is GPTQ (arXiv 2210.17323), in the form that needs one Cholesky factorization and no inverse (LDLQ; QuIP, arXiv
2307.13304, theorem 6 shows that both give the same result).

Rows. A change of the outputs by d [T, N] costs about tr(d G d^T) / 2 nats, where G [N, N] is the Fisher matrix of the
outputs, the second moment of the loss's gradient with respect to them. The loss is then tr(G (W* - Q) H (W* - Q)^T) (a
Kronecker-factored quadratic form: K-FAC, arXiv 1503.05671), of the same W*. With G = V R V^T, V unit upper triangular,

    tr(G e H e^T) = sum_n sum_k R_nn S_kk (V^T e U)_nk^2

and going through rows and columns in order, each term is as small as it can be if weight (n, k) is rounded from

    w*_nk + a_nk + sum_{m<n} V_mn (e_mk + a_mk),      a_nk = sum_{i<k} e_ni U_ik      (YAQA, arXiv 2505.22988).

Outlier features. Untouched, they carry no error: the sums run over the rest, whose H is the sub-matrix of the rest.
Compensating, they come last in the order and are "rounded" to the source's dtype, so they take up what is left.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.quant.compiled import COMPILED
from accullm_cli.quant.draft import Draft
from accullm_cli.quant.feedback import ROWS_TOGETHER, Factor, corrected_target, factor_hessian, round_with_feedback
from accullm_cli.quant.grid import SEARCHED_RANGES, Grid, minmax_grid, scale_table, searched_grid
from accullm_cli.quant.linear import QuantizedLinear
from accullm_cli.quant.loops import Loops
from accullm_cli.quant.plan import LinearPlan
from accullm_cli.quant.scales import StorableScales

# The Fisher matrix is a noisy one, so that half of it is taken to be alike for all outputs. Two conversions of a 135M
# Llama each (4.318 and 4.400 bits, 64 x 512 tokens of gradients) had a mean KL of 0.0437 and 0.0359 at 0.1, and of
# 0.0413 and 0.0348 at 1: little more than single conversions differ by chance.
ROW_DAMPING = 1.0
# How often codes and scales are fitted to each other in turns; a third time gains less than a thousandth.
DESCENTS = 2


@dataclass(frozen=True)
class RoundingOptions:
    """How to round; the fields are those of the configuration's `rounding` section."""

    method: Literal["nearest", "feedback", "stochastic"] = "feedback"
    outlier_mode: Literal["untouched", "compensating"] = "untouched"
    target: Literal["corrected", "original"] = "corrected"
    grid: Literal["fit", "search", "minmax"] = "fit"
    damping: float = 0.01
    seed: int = 0
    scale_dtype: str = "float16"


@dataclass(frozen=True)
class RoundedLinear:
    """A quantized linear with what is known about its making.

    relative_error: ||Y (W - Q)^T|| / ||Y W^T||; None where there are no rows.
    records: one sentence for everything that was treated differently from the plan.
    """

    linear: QuantizedLinear
    relative_error: float | None
    records: tuple[str, ...]


def round_linears(
    weights: dict[str, torch.Tensor],
    plans: dict[str, LinearPlan],
    options: RoundingOptions,
    source_dtype: torch.dtype,
    hessian: torch.Tensor | None = None,
    pulls: Mapping[str, torch.Tensor] | None = None,
    importance: torch.Tensor | None = None,
    fishers: Mapping[str, torch.Tensor] | None = None,
    loops: Loops = COMPILED,
) -> dict[str, RoundedLinear]:
    """Round the linears that read one input.

    Args:
        weights: the source's weight [N, K] of each linear, in the working dtype (float32; float64 in tests).
        plans: how each is stored; 2 to 8 bits.
        source_dtype: dtype that outlier weights are kept in.
        hessian: Y^T Y / T, [K, K] in the working dtype; None where calibration reached no row: nearest rounding then.
        pulls: C = Y^T O / T of each linear, [K, N]; a linear without one is rounded towards its own weight.
        importance: [K], weight of a column's squared error for the choice of grids; default: the Hessian's diagonal.
        fishers: G of each linear, [N, N]; in one that has none, rows do not feed each other.
        loops: what decides weight after weight. Everything goes to its device, a linear at a time, and comes back.

    Returns:
        For each linear the quantized weight, on the device of its weight, and records. One factorization is made for
        each distinct set of outlier features, however many linears share it.

    Raises:
        AccullmError: a matrix holds NaN or Inf, or the Hessian cannot be factored at any damping up to its own mean.
    """
    pulls, fishers, device = dict(pulls or {}), fishers or {}, loops.device
    hessian = _sent(hessian, device)
    for name, what, matrix in (
        (next(iter(weights)), "Hessian", hessian),
        *((name, "pull of earlier errors", pull) for name, pull in pulls.items()),
        *((name, "Fisher matrix", fisher) for name, fisher in fishers.items()),
    ):
        if matrix is not None and not bool(torch.isfinite(matrix).all()):
            raise AccullmError(f"the {what} holds NaN or Inf", name, "check the calibration text and model")
    if importance is None and hessian is not None:
        importance = hessian.diagonal()
    importance = _sent(importance, device)
    without_data: tuple[str, ...] = ()
    if hessian is None and options.method != "nearest":
        options = replace(options, method="nearest")
        without_data = ("no calibration token reached its input: rounded to nearest without data",)
    if options.target == "original":
        pulls = {}
    linears: dict[str, QuantizedLinear] = {}
    records: dict[str, tuple[str, ...]] = {}
    for outliers in sorted({plans[name].outlier_index for name in weights}):
        names = [name for name in weights if plans[name].outlier_index == outliers]
        factor = None
        if hessian is not None and options.method != "nearest":
            factor = factor_hessian(hessian, options.damping, outliers, options.outlier_mode == "compensating")
        for name in names:
            linears[name], own_records = _round_one(
                weights[name].to(device), _sent(pulls.pop(name, None), device), plans[name], options, source_dtype,
                importance, hessian, factor, _sent(fishers.get(name), device), loops,
            )  # fmt: skip
            records[name] = without_data + own_records
        del factor  # before the errors are measured, which takes room for whole weights
    return {
        name: RoundedLinear(
            linears[name].to(weight.device),
            relative_error(weight.to(device), linears[name], hessian),
            records[name],
        )
        for name, weight in weights.items()
    }


def _sent(matrix: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if matrix is None else matrix.to(device)


def _round_one(
    weight: torch.Tensor,
    pull: torch.Tensor | None,
    plan: LinearPlan,
    options: RoundingOptions,
    source_dtype: torch.dtype,
    importance: torch.Tensor | None,
    hessian: torch.Tensor | None,
    factor: Factor | None,
    fisher: torch.Tensor | None,
    loops: Loops,
) -> tuple[QuantizedLinear, tuple[str, ...]]:
    """Round one linear of weight [N, K]; with what was treated differently from the plan.

    Args:
        pull: [K, N], for the corrected target; None where the target is the weight.
        factor: None for nearest rounding.
        fisher: [N, N]; None where rows do not feed each other.
    """
    records: tuple[str, ...] = ()
    if factor is not None and factor.damping > options.damping:
        records += (f"Hessian not positive definite: damping raised to {factor.damping:g}",)
    target = weight if factor is None or pull is None else corrected_target(weight, pull, factor)
    del pull
    outliers = torch.tensor(plan.outlier_index, dtype=torch.int64, device=weight.device)
    is_outlier = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    is_outlier[outliers] = True
    if importance is None:
        importance = torch.ones(weight.shape[1], device=weight.device)
    grid = _grid(target, importance, plan, options, is_outlier)
    kept = weight[:, outliers].to(source_dtype)
    if factor is None or hessian is None:
        codes = grid.round_to_nearest(target).to(torch.uint8)
    else:
        stochastic = options.method == "stochastic"
        generator = (options.seed, zlib.crc32(plan.name.encode())) if stochastic else None
        rows = None if fisher is None or stochastic else factor_hessian(fisher, ROW_DAMPING)
        fits = options.grid == "fit" and not stochastic
        codes, kept, clamped = _round_columns(
            target, grid, factor, kept, source_dtype, generator, None if fits else rows, loops
        )
        if fits:
            grid = Draft(target, grid, codes, outliers, kept, hessian, factor.ridge).fitted().grid
            del codes  # they weigh as much as the artifact's, beside the next ones
            codes, kept, _ = _round_columns(target, grid, factor, kept, source_dtype, None, rows, loops)
            draft = Draft(target, grid, codes, outliers, kept, hessian, factor.ridge)
            if rows is not None and fisher is not None:
                fisher = fisher.clone()
                fisher.diagonal().add_(rows.ridge)
                draft.descend(fisher)
            for _ in range(DESCENTS if rows is None else 0):
                draft.descend(loops=loops)
                draft = draft.fitted()
            grid = draft.grid
        if clamped:
            records += (f"{clamped} weights lie outside the grid of stochastic rounding and were clamped",)
    codes[:, outliers] = grid.zero[:, outliers // grid.columns_per_group].to(torch.uint8)
    linear = QuantizedLinear(
        codes=codes,
        scales=grid.scale.to(torch.float16),
        scale_table=grid.storable.table,
        zeros=None if plan.symmetric else grid.zero.to(torch.uint8),
        outlier_index=outliers.to(torch.int32),
        outlier_weight=kept.contiguous(),
        bits=plan.bits,
        group_size=plan.group_size,
    )
    return linear, records


def _round_columns(
    target: torch.Tensor,
    grid: Grid,
    factor: Factor,
    kept: torch.Tensor,
    source_dtype: torch.dtype,
    generator: tuple[int, int] | None,
    rows: Factor | None,
    loops: Loops,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """`round_with_feedback` with the outlier weights [N, n] in the order of their features.

    Args:
        kept: outlier weights as the source has them; what compensating ones become is returned in their place.
    """
    rounded_features = target.shape[1] - kept.shape[1]
    codes, compensating, clamped = round_with_feedback(
        target, grid, factor, rounded_features, source_dtype, generator, rows, loops
    )
    if compensating.shape[1]:
        kept = compensating[:, torch.argsort(factor.order[rounded_features:])].to(source_dtype)
    return codes, kept, clamped


def _grid(
    target: torch.Tensor,
    importance: torch.Tensor,
    plan: LinearPlan,
    options: RoundingOptions,
    is_outlier: torch.Tensor,
) -> Grid:
    """The grid for a linear's target; that of stochastic rounding holds the whole range, whatever its zero point."""
    stochastic = options.method == "stochastic"
    searches = options.grid != "minmax" and not stochastic  # "fit" begins with what the search finds
    margin = 0.5 if stochastic else 0
    storable = StorableScales(options.scale_dtype)
    if plan.scale_bits < 16:
        smallest = SEARCHED_RANGES[-1] if searches else 1.0
        storable = scale_table(
            target, plan.bits, plan.group_size, plan.symmetric, plan.scale_bits, storable, is_outlier, margin, smallest
        )
    if searches:
        return searched_grid(target, importance, plan.bits, plan.group_size, plan.symmetric, storable, is_outlier)
    return minmax_grid(target, plan.bits, plan.group_size, plan.symmetric, storable, is_outlier, margin)


def relative_error(weight: torch.Tensor, linear: QuantizedLinear, hessian: torch.Tensor | None) -> float | None:
    """||Y (W - Q)^T|| / ||Y W^T|| from H = Y^T Y; None without H or where the output is zero."""
    if hessian is None:
        return None
    rounded = linear.dequantize(torch.float32)
    energy = loss = 0.0
    for part, rounded_part in zip(weight.split(ROWS_TOGETHER), rounded.split(ROWS_TOGETHER), strict=True):
        lost = part - rounded_part
        energy += float(((part @ hessian) * part).sum(dtype=torch.float64))
        loss += float(((lost @ hessian) * lost).sum(dtype=torch.float64))
    return (max(loss, 0.0) / energy) ** 0.5 if energy > 0 else None
