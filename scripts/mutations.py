"""Mutants of the mathematics for `mutants.py`: edits that make the code wrong, and the tests that must notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One edit: `old`, which occurs once in `file`, becomes `new`; one of `tests` must fail."""

    why: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


ROUNDING = "accullm_cli/quant/rounding.py"
FEEDBACK = "accullm_cli/quant/feedback.py"
LOOPS = "accullm_cli/quant/loops.py"
GRID = "accullm_cli/quant/grid.py"
SCALES = "accullm_cli/quant/scales.py"
PACKING = "accullm_cli/quant/packing.py"

OF_THE_MATHEMATICS = (
    # -- rounding ------------------------------------------------------------------------------------------
    Mutant(
        "errors of earlier blocks of columns are not fed on",
        FEEDBACK,
        "fed = error[part, :start] @ feedback[:start]",
        "fed = 0 * (error[part, :start] @ feedback[:start])",
        ("tests/quant/test_rounding.py",),
    ),
    Mutant(
        "the error of the column just before is not fed on",
        LOOPS,
        "for j in range(k + 1, columns):",
        "for j in range(k + 2, columns):",
        ("tests/quant/test_rounding.py",),
    ),
    Mutant(
        "a column's error is taken against what was fed to it",
        LOOPS,
        "lost = wanted[n, k] - (code - offset) * step",
        "lost = wanted[n, k] + feedback - (code - offset) * step",
        ("tests/quant/test_rounding.py",),
    ),
    Mutant(
        "descent forgets what a changed code does to the slopes of its row",
        LOOPS,
        "product[n, j] -= moved * hessian[k, j]",
        "product[n, j] -= 0 * moved * hessian[k, j]",
        ("tests/quant/test_descent.py",),
    ),
    Mutant(
        "descent forgets what a changed code does to the slopes of other rows",
        LOOPS,
        "weight = fisher[m, n] * moved",
        "weight = fisher[m, n] * moved if m == n else 0 * moved",
        ("tests/quant/test_descent.py",),
    ),
    Mutant(
        "descent moves codes of outlier features",
        LOOPS,
        "if not movable[k] or not curvature > lowest:",
        "if not curvature > lowest:",
        ("tests/quant/test_descent.py",),
    ),
    Mutant(
        "a row passes on its errors without what was fed to it",
        LOOPS,
        "row_fed[n, k] += weight * (error[m, k] + fed[m, k])",
        "row_fed[n, k] += weight * error[m, k]",
        ("tests/quant/test_row_feedback.py",),
    ),
    Mutant(
        "rows of earlier blocks pass nothing on",
        FEEDBACK,
        "(down[:top].T @ carried[:top, columns], down[top:])",
        "(0 * (down[:top].T @ carried[:top, columns]), down[top:])",
        ("tests/quant/test_row_feedback.py",),
    ),
    Mutant(
        "compensating columns do not see the errors of earlier blocks",
        FEEDBACK,
        "fed = torch.addmm(wanted[:, start:end], error[:, :start], feedback[:start])",
        "fed = wanted[:, start:end].clone()",
        ("tests/quant/test_rounding.py",),
    ),
    Mutant(
        "the loss is that of the text's tokens, not of drawn ones",
        "accullm_cli/stages/gradients.py",
        'loss = nn.functional.cross_entropy(logits, drawn, reduction="sum")',
        'loss = nn.functional.cross_entropy(logits, logits.argmax(-1), reduction="sum")',
        ("tests/stages/test_gradients.py",),
    ),
    Mutant(
        "a gradient is not taken back through its block",
        "accullm_cli/stages/gradients.py",
        "found.append(torch.autograd.grad(output, inputs, gradient[rows].float())[0])",
        "torch.autograd.grad(output, inputs, gradient[rows].float()); found.append(gradient[rows].float())",
        ("tests/stages/test_gradients.py",),
    ),
    Mutant(
        "all linears matter alike",
        "accullm_cli/stages/profile.py",
        "name: {size: sensitivity_of[name] * by_size[size][name] for size in sizes}",
        "name: {size: by_size[size][name] for size in sizes}",
        ("tests/stages/test_profile.py",),
    ),
    Mutant(
        "an outlier is charged half its bits",
        "accullm_cli/quant/budget.py",
        "of_an_outlier = price * 8 * (plan.source_itemsize * plan.out_features + 4)",
        "of_an_outlier = price * 4 * (plan.source_itemsize * plan.out_features + 4)",
        ("tests/quant/test_budget.py",),
    ),
    Mutant(
        "columns come in rising order",
        FEEDBACK,
        "by_size = torch.argsort(diagonal, descending=True, stable=True)",
        "by_size = torch.argsort(diagonal, descending=False, stable=True)",
        ("tests/quant/test_rounding.py",),
    ),
    Mutant(
        "untouched outliers enlarge the damping of the rest",
        FEEDBACK,
        "mean = float(diagonal[order].mean())",
        "mean = float(diagonal.mean())",
        ("tests/quant/test_rounding.py",),
    ),
    Mutant(
        "compensating outliers are stored in the order of rounding",
        FEEDBACK,
        "kept[row_order] = compensating[:, torch.argsort(order[rounded_features:])]",
        "kept[row_order] = compensating",
        ("tests/quant/test_rounding.py",),
    ),
    Mutant(
        "the target moves the wrong way",
        FEEDBACK,
        "rows[:, reverse] += torch.linalg",
        "rows[:, reverse] -= torch.linalg",
        ("tests/quant/test_rounding.py",),
    ),
    Mutant(
        "weights near the grid's end get all of their feedback",
        LOOPS,
        "received = min(max(fed * share, -limit), limit)",
        "received = fed",
        ("tests/quant/test_stochastic.py",),
    ),
    Mutant(
        "Philox stops a round early",
        "accullm_cli/quant/philox.py",
        "_ROUNDS = 10",
        "_ROUNDS = 9",
        ("tests/quant/test_stochastic.py",),
    ),
    Mutant(
        "other random numbers, and so other bytes, under the same version",
        ROUNDING,
        "zlib.crc32(plan.name.encode())",
        "zlib.adler32(plan.name.encode())",
        ("tests/test_pinned.py",),
    ),
    # -- packing, grids, statistics, outliers --------------------------------------------------------------
    Mutant(
        "nibbles are swapped",
        PACKING,
        "torch.stack((packed & 15, packed >> 4), dim=-1)",
        "torch.stack((packed >> 4, packed & 15), dim=-1)",
        ("tests/quant/test_packing.py",),
    ),
    Mutant(
        "the last, partly filled byte is cut off",
        PACKING,
        "return (count * bits + 7) // 8",
        "return max(1, count * bits // 8)",
        ("tests/quant/test_packing.py",),
    ),
    Mutant(
        "an asymmetric range need not include 0",
        GRID,
        "return padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0), size",
        "return padded.amin(-1), padded.amax(-1).clamp(min=0), size",
        ("tests/quant/test_grid.py",),
    ),
    Mutant(
        "the search keeps the worst range",
        GRID,
        "better = error < best_error",
        "better = error > best_error",
        ("tests/quant/test_grid.py",),
    ),
    Mutant(
        "the largest scale overflows in bfloat16",
        SCALES,
        "LARGEST_BFLOAT16_SCALE = 65280.0",
        "LARGEST_BFLOAT16_SCALE = 65536.0",
        ("tests/quant/test_grid.py",),
    ),
    Mutant(
        "the drift has the wrong sign",
        "accullm_cli/quant/stats.py",
        "original_rows.to(rows.dtype) - rows",
        "rows - original_rows.to(rows.dtype)",
        ("tests/quant/test_stats.py",),
    ),
    Mutant(
        "the lower half of the Hessian stays empty",
        "accullm_cli/quant/stats.py",
        "hessian[end:, start:end] = hessian[start:end, end:].T",
        "pass",
        ("tests/quant/test_stats.py",),
    ),
    Mutant(
        "the residual stream's error pulls the wrong way",
        "accullm_cli/stages/block_rounding.py",
        'captures.read(batch, f"sum {name}") - _as_rows(value)',
        '_as_rows(value) - captures.read(batch, f"sum {name}")',
        ("tests/stages/test_quantize.py::test_each_input_is_that_of_the_model_rounded_so_far",),
    ),
    Mutant(
        "an activation of a product passes for a sum with the residual stream",
        "accullm_cli/model/slots.py",
        'elif result.data_ptr() != address or func.__name__.endswith("_"):  # no mere view of it',
        "elif result is argument:",
        ("tests/model/test_slots.py",),
    ),
    Mutant(
        "a fitted scale is kept where it costs",
        GRID,
        "gains = difference * (difference * curvature - 2 * slope) < 0",
        "gains = difference * (difference * curvature - 2 * slope) > 0",
        ("tests/quant/test_grid.py",),
    ),
    Mutant(
        "a fitted scale is forgotten when the next group's is fitted",
        GRID,
        "error[:, columns] -= difference[:, None] * own",
        "error[:, columns] -= 0 * own",
        ("tests/quant/test_rounding.py",),
    ),
    Mutant(
        "the features that lose least become outliers",
        "accullm_cli/quant/outliers.py",
        "torch.argsort(loss, descending=True, stable=True)",
        "torch.argsort(loss, descending=False, stable=True)",
        ("tests/quant/test_outliers.py",),
    ),
)
