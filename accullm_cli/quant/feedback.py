"""Feedback in itself: factors of the quadratic form, the corrected target, and the rounding of all columns in order.

The mathematics is in `accullm_cli.quant.rounding`, and on one page in docs/rounding.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.quant.grid import Grid
from accullm_cli.quant.loops import COMPILED, ChainTile, Chance, CodeTile, Loops, RowFeedback, Tile
from accullm_cli.quant.stochastic import feedback_share
from accullm_cli.quant.trellis import SEGMENT

# Columns whose mutual feedback is applied one by one; that of all earlier columns comes as one matrix product.
COLUMN_BLOCK = 128
# The same for rows, where rows feed each other.
ROW_BLOCK = SEGMENT
# Rows of a weight that meet a Hessian or its factor at once: enough for full speed, a fraction of a weight's memory.
ROWS_TOGETHER = 512
# Where a Hessian is not positive definite at the configured damping, it grows by this factor, and a record says so.
DAMPING_STEP = 10.0
# From where it grows if none was asked for.
SMALLEST_DAMPING = 1e-6
# What feedback may be damped by. Below the first of them it gains nothing more on text that it does not know.
DAMPINGS = (0.03, 0.1, 0.3, 1.0)
# Noise is not what rounding leaves: codes end where the grid does, and the descent over codes finds more with little
# feedback than with much. So the loss falls by some 2% less than is expected from one damping to the next smaller one.
MARGIN = 1.02


class NumericalError(AccullmError):
    """A matrix that nothing can be rounded with.

    Attributes:
        matrix: the evidence, on the CPU.
        kind: what it is, for people.
    """

    def __init__(self, kind: str, what: str, where: str, hint: str, matrix: torch.Tensor) -> None:
        super().__init__(f"the {kind} {what}", where, hint)
        self.kind = kind
        self.matrix = matrix.detach().cpu()


def require_finite(matrix: torch.Tensor | None, kind: str, where: str) -> None:
    """Refuse NaN and Inf.

    Args:
        where: the linear or linears that the matrix is for.

    Raises:
        NumericalError: there are some.
    """
    # A few rows at a time: to test all at once takes nearly twice the matrix's memory.
    if matrix is None or all(bool(torch.isfinite(rows).all()) for rows in matrix.split(ROWS_TOGETHER)):
        return
    count = int((~torch.isfinite(matrix)).sum())
    what = f"holds NaN or Inf in {count} of its {matrix.numel()} entries"
    raise NumericalError(kind, what, where, "check the calibration text and model", matrix)


@dataclass(frozen=True)
class Factor:
    """H = U S U^T for the columns in `order`, U unit upper triangular.

    order: int64 [M], the features in the order they are rounded.
    cholesky: [M, M], the lower Cholesky factor of the damped H in this order, reversed. U is this with rows and
        columns reversed and divided by its diagonal.
    damping: what was added to H's diagonal, as a fraction of its mean; ridge: the same as a number.
    is_raised: it was not positive definite with the damping that was asked for.
    """

    order: torch.Tensor
    cholesky: torch.Tensor
    damping: float
    ridge: float
    is_raised: bool = False

    @property
    def variances(self) -> torch.Tensor:
        """The diagonal of S, [M]."""
        return self.cholesky.diagonal().flip(0).square()

    def feedback(self, start: int, end: int) -> torch.Tensor:
        """Columns `start` to `end` of U down to row `end`, below which they are zero: [end, end - start]."""
        count = len(self.order)
        reversed_columns = self.cholesky[count - end :, count - end : count - start].flip(0, 1)
        return reversed_columns / self.cholesky.diagonal().flip(0)[start:end]

    def expected_loss(self, rows: torch.Tensor, last: int = 0) -> float:
        """What rounding with this feedback may be expected to lose on some inputs, but for a common factor.

        Where e U = -n with noise n that is alike and independent for all columns, e H e^T has a mean proportional to
        the trace of U^-1 H U^-T. So this is the sum of the squares of U^-1 Z^T.

        Args:
            rows: Z, [n, K].
            last: so many of the last columns in the order have no noise of their own.
        """
        loss, reverse, diagonal = 0.0, self.order.flip(0), self.cholesky.diagonal()[:, None]
        for part in rows.split(ROWS_TOGETHER):
            solved = torch.linalg.solve_triangular(self.cholesky, part[:, reverse].T, upper=False)
            loss += float(solved.mul_(diagonal)[last:].square_().sum(dtype=torch.float64))
        return loss


def factor_hessian(
    hessian: torch.Tensor,
    damping: float,
    outliers: tuple[int, ...] = (),
    compensating: bool = False,
    kind: str = "Hessian",
    where: str = "",
    sorts: bool = True,
) -> Factor:
    """Order the columns, the largest input first, and factor the damped Hessian in that order.

    Rounding the features with the largest second moment first leaves the most columns to make up for their errors
    (GPTQ's activation order). Untouched outliers are left out; compensating ones come last.

    Args:
        hessian: H, [K, K]; or another second moment, which `kind` names.
        where: the linear or linears that it is for.
        sorts: False for the columns as they are.

    Raises:
        NumericalError: not positive definite even with damping equal to the mean of the diagonal.
    """
    diagonal = hessian.diagonal()
    is_outlier = torch.zeros(len(diagonal), dtype=torch.bool, device=hessian.device)
    is_outlier[list(outliers)] = True
    by_size = torch.argsort(diagonal if sorts else torch.zeros_like(diagonal), descending=True, stable=True)
    order = by_size[~is_outlier[by_size]]
    if compensating:
        order = torch.cat([order, by_size[is_outlier[by_size]]])
    # Of the columns that take part alone: an untouched outlier a thousand times as large would drown the others.
    mean = float(diagonal[order].mean())
    # A dead input (all features always zero) makes every rounding equally good; any positive number will do.
    mean = mean if mean > 0 else 1.0
    reverse, asked = order.flip(0), damping
    while True:
        # H = R R^T with R upper triangular is the Cholesky factorization of H with rows and columns reversed. It takes
        # the place of its argument, laid out by columns (which H, being symmetric, is as well).
        cholesky = hessian[reverse[:, None], reverse].T
        cholesky.diagonal().add_(damping * mean)
        failed = torch.empty((), dtype=torch.int32, device=hessian.device)
        torch.linalg.cholesky_ex(cholesky, out=(cholesky, failed))
        if not failed:
            break
        if damping >= 1.0:
            what = "cannot be factored at any damping up to its mean"
            raise NumericalError(kind, what, where, "use more samples", hessian)
        damping = min(max(damping, SMALLEST_DAMPING) * DAMPING_STEP, 1.0)
    return Factor(order, cholesky, damping, damping * mean, damping > asked)


def damping_for(
    hessian: torch.Tensor, held_out: torch.Tensor, outliers: tuple[int, ...] = (), compensating: bool = False
) -> float:
    """The damping with which feedback that knows nothing of some rows is expected to lose least on them.

    With little text, or inputs a few of which are large, H is a noisy estimate, and feedback that follows it closely
    makes errors elsewhere. How noisy differs from linear to linear. Of DAMPINGS it is the largest whose loss is within
    MARGIN of the least.

    Args:
        hessian: H, [K, K]. held_out: rows Z [n, K], of which Z^T Z is their part of H.
        outliers, compensating: as for `factor_hessian`.
    """
    last = len(outliers) if compensating else 0
    if len(held_out) > held_out.shape[1]:  # as many rows as features have the same Gram matrix
        held_out = torch.linalg.qr(held_out, mode="r").R
    rest = torch.addmm(hessian, held_out.T, held_out, alpha=-1)

    def loss(damping: float) -> float:
        try:
            return factor_hessian(rest, damping, outliers, compensating).expected_loss(held_out, last)
        except NumericalError:  # next to nothing is left, and H as a whole may do
            return torch.inf

    losses = {damping: loss(damping) for damping in DAMPINGS}
    return max(damping for damping in DAMPINGS if losses[damping] <= MARGIN * min(losses.values()))


def corrected_target(weight: torch.Tensor, pull: torch.Tensor, factor: Factor) -> torch.Tensor:
    """W* = W + C^T H^-1 on the columns in `factor.order` (others as they are); [N, K].

    Args:
        pull: C, [K, N].
    """
    reverse = factor.order.flip(0)
    target = weight.clone()
    for rows, pull_of_rows in zip(target.split(ROWS_TOGETHER), pull.split(ROWS_TOGETHER, dim=1), strict=True):
        # Two triangular solves, as torch.cholesky_solve copies the factor first.
        half = torch.linalg.solve_triangular(factor.cholesky, pull_of_rows[reverse], upper=False)
        rows[:, reverse] += torch.linalg.solve_triangular(factor.cholesky.T, half, upper=True).T
    return target


def round_with_feedback(
    target: torch.Tensor,
    grid: Grid,
    kept: torch.Tensor,
    factor: Factor,
    rows: Factor | None = None,
    generator: tuple[int, int] | None = None,
    loops: Loops = COMPILED,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Round the columns of `target` in order, each from its value plus the errors fed forward to it.

    Args:
        target: [N, K], in the working dtype.
        kept: the outliers' weights [N, n] in the source's dtype, in the order of their features. Where `factor` has
            them too, last in its order, they take up what the other columns feed to them (compensating).
        factor: of the Hessian of M columns, K or K - n.
        rows: of the outputs' Fisher matrix [N, N], for feedback from row to row as well; not with a generator. Of a
            trellis not sorted.
        generator: (seed, stream) of stochastic rounding; None for nearest.

    Returns:
        Codes as uint8 [N, K] (outlier columns hold 0), what becomes of `kept`, and how many targets stochastic rounding
        found outside the grid and clamped.
    """
    assert generator is None or rows is None, "rows do not feed each other at random"
    assert generator is None or grid.levels is None, "codes are drawn between steps of one size"
    levels = grid.table()
    rounded_features = target.shape[1] - kept.shape[1]
    order, count = factor.order, len(target)
    row_order = torch.arange(count, device=target.device) if rows is None else rows.order
    row_block = count if rows is None else ROW_BLOCK
    group = order // grid.columns_per_group
    wanted = target[:, order] if rows is None else target[row_order[:, None], order]
    scale, zero = grid.scale[row_order], grid.zero[row_order]
    error = torch.empty_like(wanted)
    # The errors with all that their row fed to them: what a row passes on to those below it.
    carried = torch.empty_like(wanted) if rows is not None else wanted[:0]
    codes = torch.zeros(target.shape, dtype=torch.uint8, device=target.device)
    clamped, share, gridded = 0, None, slice(0, rounded_features)
    if generator is not None:
        own_scale = scale[:, group[gridded]]
        position = wanted[:, gridded] / own_scale + zero[:, group[gridded]]
        clamped = int(((position < 0) | (position > grid.largest_code)).sum())
        whole = factor.feedback(0, rounded_features)
        share = feedback_share(position.T, own_scale.T, whole, grid.largest_code).T
        del own_scale, position, whole
    several = loops.round_fed if rows is not None else None
    down, down_to = None, slice(0)
    variances = None if rows is None else rows.variances
    for wave in _waves(count, row_block, rounded_features, several is not None):
        tiles: list[Tile] = []
        for part, columns in wave:
            feedback = factor.feedback(columns.start, columns.stop)
            fed = error[part, : columns.start] @ feedback[: columns.start]
            from_above, chance = None, None
            if rows is not None and part != down_to:
                down, down_to = rows.feedback(part.start, part.stop), part
            if down is not None and variances is not None:
                passed_on = down[: part.start].T @ carried[: part.start, columns]
                from_above = RowFeedback(passed_on, down[part.start :], variances[part])
            own: dict[str, Any] = {
                "wanted": wanted[part, columns], "fed": fed, "upper": feedback[columns.start :], "scale": scale[part],
                "group": group[columns], "rows": from_above,
            }  # fmt: skip
            if grid.is_trellis and levels is not None:
                tiles.append(ChainTile(**own, levels=levels))
                continue
            if generator is not None and share is not None:
                chance = Chance(share[:, columns], *generator, order[columns])
            tiles.append(CodeTile(**own, zero=zero[part], largest_code=grid.largest_code, levels=levels, chance=chance))
        results = [loops.round_tile(tile) for tile in tiles] if several is None else several(tiles)
        for (part, columns), tile, (own_codes, own_error) in zip(wave, tiles, results, strict=True):
            error[part, columns] = own_error
            codes[row_order[part, None], order[columns]] = own_codes
            if rows is not None:
                carried[part, columns] = own_error + tile.fed
    if len(order) > rounded_features:
        compensating = _round_to_source(wanted, error, factor, rounded_features, kept.dtype)
        kept = torch.empty_like(compensating)
        kept[row_order] = compensating[:, torch.argsort(order[rounded_features:])]
    return codes, kept, clamped


def _waves(rows: int, row_block: int, columns: int, several: bool) -> Iterator[list[tuple[slice, slice]]]:
    """Tiles (rows, columns) that may be rounded together, after those before; with `several`, as many as can be.

    A tile waits for those to its left, which feed its columns, and for those above it, which feed its rows.
    """
    heights = [slice(start, min(start + row_block, rows)) for start in range(0, rows, row_block)]
    widths = [slice(start, min(start + COLUMN_BLOCK, columns)) for start in range(0, columns, COLUMN_BLOCK)]
    if not several or not widths:
        yield from ([(part, own)] for part in heights for own in widths)
        return
    for step in range(len(heights) + len(widths) - 1):
        first, last = max(0, step - len(widths) + 1), min(len(heights) - 1, step)
        yield [(heights[number], widths[step - number]) for number in range(first, last + 1)]


def _round_to_source(
    wanted: torch.Tensor, error: torch.Tensor, factor: Factor, rounded_features: int, source_dtype: torch.dtype
) -> torch.Tensor:
    """The compensating columns, last in the order, take up what the others feed to them: [N, n] in `source_dtype`.

    What they leave is a rounding error of 16 bits, so rows have next to nothing to pass on here.

    Args:
        error: [N, M]; those of these columns are written.
    """
    count = len(factor.order)
    kept = torch.empty_like(wanted[:, rounded_features:], dtype=source_dtype)
    for start in range(rounded_features, count, COLUMN_BLOCK):
        end = min(start + COLUMN_BLOCK, count)
        feedback = factor.feedback(start, end)
        fed = torch.addmm(wanted[:, start:end], error[:, :start], feedback[:start])
        for k in range(start, end):
            value = torch.addmv(fed[:, k - start], error[:, start:k], feedback[start:k, k - start])
            kept[:, k - rounded_features] = value.to(source_dtype)
            error[:, k] = wanted[:, k] - kept[:, k - rounded_features]
    return kept
