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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from accullm_cli.quant.correction import codes_after_the_rest, store_linear
from accullm_cli.quant.descent import Draft
from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.encodings.base import StoredLinear
from accullm_cli.quant.feedback import (
    ROWS_TOGETHER,
    Factor,
    corrected_target,
    damping_for,
    factor_hessian,
    require_finite,
    round_with_feedback,
)
from accullm_cli.quant.grid import Grid
from accullm_cli.quant.loops import COMPILED, Loops
from accullm_cli.quant.plan import LinearPlan

# The Fisher matrix is a noisy one, so that half of it is taken to be alike for all outputs. Two conversions of a 135M
# Llama each (4.318 and 4.400 bits, 64 x 512 tokens of gradients) had a mean KL of 0.0437 and 0.0359 at 0.1, and of
# 0.0413 and 0.0348 at 1: little more than single conversions differ by chance.
ROW_DAMPING = 1.0
# Of its importance, what an outlier feature's error counts in the choice of a grid where an adapter takes that error
# away: for readers without the adapter. With 8 features in q and up of the first block of a 135M Llama, at 4 bits, it
# costs 9% and 1% of the loss with adapter; without, the loss falls to a twentieth and to a half (to a fortieth and to a
# third with `codes_after_the_rest`).
BESIDE_WEIGHT = 0.1
# Of the Hessian in the corrected target, where none is asked for. What earlier layers lost is less the same in other
# text than what a column's rounding does to the others: smaller damping, which feedback gains by, does harm here.
TARGET_DAMPING = 0.3
# How often codes and scales are fitted to each other in turns; a third time gains less than a thousandth.
DESCENTS = 2


@dataclass(frozen=True)
class RoundingOptions:
    """How to round; the fields are those of the configuration's `rounding` section.

    damping: of the target and of feedback; None for TARGET_DAMPING and what loses least on held-out rows.
    """

    method: Literal["nearest", "feedback", "stochastic"] = "feedback"
    outlier_mode: Literal["untouched", "compensating"] = "untouched"
    target: Literal["corrected", "original"] = "corrected"
    grid: Literal["fit", "search", "minmax"] = "fit"
    damping: float | None = 0.01
    seed: int = 0
    scale_dtype: str = "float16"


@dataclass(frozen=True)
class RoundedLinear:
    """A quantized linear with what is known about its making.

    relative_error: ||Y (W - Q)^T|| / ||Y W^T||; None where there are no rows.
    records: one sentence for everything that was treated differently from the plan.
    """

    linear: StoredLinear
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
    held_out: torch.Tensor | None = None,
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
        held_out: some rows of Y [n, K], scaled as the Hessian is: what damping is chosen by.
        loops: what decides weight after weight. Everything goes to its device, a linear at a time, and comes back.

    Returns:
        For each linear the quantized weight, on the device of its weight, and records. One factorization is made for
        each distinct set of outlier features, however many linears share it.

    Raises:
        NumericalError: a matrix holds NaN or Inf, or one cannot be factored at any damping up to its own mean.
    """
    pulls, fishers, device = dict(pulls or {}), fishers or {}, loops.device
    hessian, importance, held_out = (_sent(matrix, device) for matrix in (hessian, importance, held_out))
    require_finite(hessian, "Hessian", ", ".join(weights))
    for kind, matrices in (("pull of earlier errors", pulls), ("Fisher matrix", fishers)):
        for name, matrix in matrices.items():
            require_finite(matrix, kind, name)
    if importance is None and hessian is not None:
        importance = hessian.diagonal()
    without_data: tuple[str, ...] = ()
    if hessian is None and options.method != "nearest":
        options = replace(options, method="nearest")
        without_data = ("no calibration token reached its input: rounded to nearest without data",)
    if options.target == "original":
        pulls = {}
    corrected = frozenset(pulls) if hessian is not None and options.method != "nearest" else frozenset()
    stochastic = options.method == "stochastic"
    fits = options.grid == "fit" and not stochastic
    linears: dict[str, StoredLinear] = {}
    records: dict[str, tuple[str, ...]] = {}
    for name, target, factor in _with_targets(weights, pulls, plans, options, hessian, held_out, device):
        weight, plan, sentences = weights[name].to(device), plans[name], list(without_data)
        fisher = _sent(fishers.get(name), device)
        require_finite(target, "corrected target" if name in corrected else "weight", name)
        outliers = torch.tensor(plan.outlier_index, dtype=torch.int64, device=device)
        grid, clamps = _grid(target, importance, plan, options, outliers)
        sentences += clamps
        kept = weight[:, outliers].to(source_dtype)
        if factor is None or hessian is None:
            codes = grid.round_to_nearest(target).to(torch.uint8)
        else:
            chance = (options.seed, zlib.crc32(plan.name.encode())) if stochastic else None
            rows = None
            if fisher is not None and not stochastic:
                sorts = not grid.is_trellis  # whose chains are of neighbours
                rows = factor_hessian(fisher, ROW_DAMPING, kind="Fisher matrix", where=name, sorts=sorts)
            first = None if fits else rows
            codes, kept, clamped = round_with_feedback(target, grid, kept, factor, first, chance, loops)
            if fits:
                draft = Draft(target, grid, codes, outliers, kept, hessian, factor.ridge)
                draft.fit_scales()
                grid = draft.grid
                del codes, draft  # they weigh as much as the artifact's, beside the next ones
                codes, kept, _ = round_with_feedback(target, grid, kept, factor, rows, None, loops)
                draft = Draft(target, grid, codes, outliers, kept, hessian, factor.ridge)
                if rows is not None and fisher is not None:
                    fisher = fisher.clone()
                    fisher.diagonal().add_(rows.ridge)
                    draft.descend(fisher, loops)
                for _ in range(DESCENTS if rows is None else 0):
                    draft.descend(loops=loops)
                    draft.fit_scales()
                grid = draft.grid
            if factor.is_raised:
                sentences.append(f"Hessian not positive definite: damping raised to {factor.damping:g}")
            if clamped:
                sentences.append(f"{clamped} weights lie outside the grid of stochastic rounding and were clamped")
        if plan.adapter and len(outliers) and factor is not None and hessian is not None:
            codes[:, outliers] = codes_after_the_rest(target, grid, codes, outliers, hessian, name, loops)
        linears[name] = store_linear(grid, codes, plan, outliers, kept)
        records[name] = tuple(sentences)
        del factor  # before the next one is made, and before errors are measured, which takes room for whole weights
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


def _with_targets(
    weights: Mapping[str, torch.Tensor],
    pulls: dict[str, torch.Tensor],
    plans: Mapping[str, LinearPlan],
    options: RoundingOptions,
    hessian: torch.Tensor | None,
    held_out: torch.Tensor | None,
    device: torch.device,
) -> Iterator[tuple[str, torch.Tensor, Factor | None]]:
    """Each linear with its target, and the factor that those with its outliers share; None for nearest rounding.

    Targets take the place of the pulls, which are as large.
    """
    compensating = options.outlier_mode == "compensating"
    chooses = options.damping is None and held_out is not None
    for outliers in sorted({plans[name].outlier_index for name in weights}):
        names = [name for name in weights if plans[name].outlier_index == outliers]
        where = ", ".join(names)
        factor, targets = None, {}
        if hessian is not None and options.method != "nearest":
            if not chooses or not pulls.keys().isdisjoint(names):
                damping = TARGET_DAMPING if options.damping is None else options.damping
                factor = factor_hessian(hessian, damping, outliers, compensating, where=where)
            for name in pulls.keys() & set(names):
                assert factor is not None
                targets[name] = corrected_target(weights[name].to(device), pulls.pop(name).to(device), factor)
            if chooses and held_out is not None:
                del factor  # before the next one is made
                damping = damping_for(hessian, held_out, outliers, compensating)
                factor = factor_hessian(hessian, damping, outliers, compensating, where=where)
        for name in names:
            yield name, targets.pop(name) if name in targets else weights[name].to(device), factor
        del factor


def _grid(
    target: torch.Tensor,
    importance: torch.Tensor | None,
    plan: LinearPlan,
    options: RoundingOptions,
    outliers: torch.Tensor,
) -> tuple[Grid, list[str]]:
    """The grid for a linear's target, and what is to be said about it.

    That of stochastic rounding holds the whole range, whatever its zero point.
    """
    is_outlier = torch.zeros(target.shape[1], dtype=torch.bool, device=target.device)
    is_outlier[outliers] = True
    stochastic = options.method == "stochastic"
    if options.grid == "minmax" or stochastic:
        importance = None
    elif importance is None:  # "fit" begins with what the search finds
        importance = torch.ones(target.shape[1], device=target.device)
    encoding = ENCODINGS[plan.encoding]
    beside = BESIDE_WEIGHT if plan.adapter else 0
    return encoding.grid(target, plan, options.scale_dtype, importance, is_outlier, 0.5 if stochastic else 0, beside)


def relative_error(weight: torch.Tensor, linear: StoredLinear, hessian: torch.Tensor | None) -> float | None:
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
