"""Rounding as the textbooks write it, in float64: slow, without blocks, and sharing no code with the package."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from accullm_cli.quant.linear import QuantizedLinear
from accullm_cli.quant.plan import LinearPlan


@dataclass(frozen=True)
class Problem:
    """A linear and its two inputs, float64: rows X of the original model, rows Y of the model quantized so far."""

    weight: torch.Tensor  # [N, K]
    original: torch.Tensor  # X [T, K]
    quantized: torch.Tensor  # Y [T, K]

    @property
    def hessian(self) -> torch.Tensor:
        return self.quantized.T @ self.quantized / len(self.quantized)

    @property
    def pull(self) -> torch.Tensor:
        """Y^T (X - Y) W^T / T, [K, N]."""
        return self.quantized.T @ ((self.original - self.quantized) @ self.weight.T) / len(self.quantized)


def correlated_problem(rows: int, columns: int, tokens: int, seed: int) -> Problem:
    """Features that share a few causes and differ in size, as activations do; Y is X with some noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    size = torch.exp(normal(columns) * 0.7)
    shared = normal(tokens, 3) @ normal(3, columns)
    original = (normal(tokens, columns) + shared) * size
    quantized = original + 0.1 * normal(tokens, columns) * size
    return Problem(normal(rows, columns), original, quantized)


def plan_of(
    problem: Problem,
    bits: int = 4,
    group_size: int = -1,
    symmetric: bool = False,
    outliers: tuple[int, ...] = (),
    name: str = "a",
    scale_bits: int = 16,
) -> LinearPlan:
    return LinearPlan(name, *problem.weight.shape, bits, group_size, symmetric, outliers, scale_bits=scale_bits)


def columns_of(per_group: torch.Tensor, columns_per_group: int, count: int) -> np.ndarray:
    """One value per weight from one per group, by indexing: [N, G] to [N, count]."""
    return per_group.double().numpy()[:, [column // columns_per_group for column in range(count)]]


def scale_and_zero(linear: QuantizedLinear) -> tuple[np.ndarray, np.ndarray]:
    """The stored grid, for each weight: [N, K] both."""
    count = linear.codes.shape[1]
    size = count if linear.group_size == -1 else linear.group_size
    zeros = torch.full_like(linear.scales, 2 ** (linear.bits - 1)) if linear.zeros is None else linear.zeros
    return columns_of(linear.scales, size, count), columns_of(zeros, size, count)


def output_loss(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr((W - Q) H (W - Q)^T)."""
    lost = (weight - rounded.double()).numpy()
    return float(np.trace(lost @ hessian.numpy() @ lost.T))


def rounding_order(hessian: np.ndarray, outliers: tuple[int, ...], outliers_last: bool) -> list[int]:
    """Features by falling diagonal; outliers behind all others, or left out."""
    by_size = sorted(range(len(hessian)), key=lambda column: -hessian[column, column])
    rest = [column for column in by_size if column not in outliers]
    return rest + [column for column in by_size if column in outliers] if outliers_last else rest


def textbook_gptq(
    target: np.ndarray,
    hessian: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    bits: int,
    damping: float,
    outliers: tuple[int, ...] = (),
    outliers_last: bool = False,
    source_dtype: torch.dtype = torch.bfloat16,
) -> tuple[np.ndarray, np.ndarray]:
    """GPTQ (arXiv 2210.17323, algorithm 1) with blocks of one column: inverse Hessian, its Cholesky factor, updates.

    Args:
        target: [N, K]; scale, zero: [N, K].
        outliers_last: outliers are rounded to `source_dtype` after all others; else they take no part.

    Returns:
        Codes [N, K] (-1 in outlier columns), and the outliers' values [N, n] in the order of `outliers`.
    """
    order = rounding_order(hessian, outliers, outliers_last)
    H = hessian[np.ix_(order, order)]
    H = H + damping * np.mean(np.diag(H)) * np.eye(len(H))
    inverse = np.linalg.inv(H)
    upper = np.linalg.cholesky(inverse).T  # H^-1 = upper^T upper
    W = target.copy()
    codes = np.full(W.shape, -1.0)
    kept = np.zeros((len(W), len(outliers)))
    for i, column in enumerate(order):
        w = W[:, column]
        if column in outliers:
            q = torch.from_numpy(w).to(source_dtype).double().numpy()
            kept[:, outliers.index(column)] = q
        else:
            codes[:, column] = np.clip(np.rint(w / scale[:, column] + zero[:, column]), 0, 2**bits - 1)
            q = (codes[:, column] - zero[:, column]) * scale[:, column]
        error = (w - q) / upper[i, i]
        for j in range(i, len(order)):
            W[:, order[j]] = W[:, order[j]] - error * upper[i, j]
    return codes, kept


def least_squares_target(problem: Problem, damping: float, outliers: tuple[int, ...] = ()) -> np.ndarray:
    """The real-valued Q that minimizes ||X W^T - Y Q^T||^2 / T + ridge ||Q - W||^2, by least squares on the rows.

    The columns in `outliers` stay as they are. ridge = damping * mean squared size of the other columns.
    """
    W, X, Y = problem.weight.numpy(), problem.original.numpy(), problem.quantized.numpy()
    free = [column for column in range(W.shape[1]) if column not in outliers]
    tokens = len(Y)
    ridge = damping * np.mean(np.sum(Y[:, free] ** 2, axis=0) / tokens)
    wanted = X @ W.T - Y[:, list(outliers)] @ W[:, list(outliers)].T
    system = np.concatenate([Y[:, free] / tokens**0.5, ridge**0.5 * np.eye(len(free))])
    right = np.concatenate([wanted / tokens**0.5, ridge**0.5 * W[:, free].T])
    target = W.copy()
    target[:, free] = np.linalg.lstsq(system, right, rcond=None)[0].T
    return target
