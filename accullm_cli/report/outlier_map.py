"""The outlier map: which input features of which layers are strong, and which of them the plan keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from accullm_cli.quant.plan import Plan
from accullm_cli.quant.stats import LLM_INT8_THRESHOLD, InputStats
from accullm_cli.report.page import collapsed, figure, html_table, page, paragraph, section
from accullm_cli.report.plots import (
    ORANGE,
    RED,
    block_and_kind,
    by_kind_and_block,
    draw_lines_by_block,
    lines_by_block,
    plain_numbers,
    svg,
)
from accullm_cli.run import write_text

# Columns of a heat map; a page is some 900 pixels wide.
_COLUMNS = 600
# Colour begins at the median second moment (weaker features are no outliers) and ends at 1000 times that, in log10.
_LOWEST, _HIGHEST = 0.0, 3.0
# LLM.int8() (arXiv 2208.07339) asks that a feature exceed 6.0 for at least this share of tokens.
_LLM_INT8_SHARE = 0.06


@dataclass(frozen=True)
class _Input:
    """One distinct input, ready to draw."""

    name: str  # of the first linear that reads it
    kinds: str  # of all linears that read it
    block: int | None
    stats: InputStats
    chosen: tuple[int, ...]  # features that at least one of its linears keeps as outliers

    @property
    def strength(self) -> torch.Tensor:
        """log10 of each feature's second moment over the median one: float64 [K]."""
        moments = self.stats.second_moment.double()
        # A feature that is always 0 has no logarithm; it is as weak as float32 can tell.
        return (moments.clamp(min=1e-38) / moments.median().clamp(min=1e-38)).log10()

    @property
    def energy_share(self) -> float:
        """Share of the input's summed squares that the chosen features hold."""
        moments = self.stats.second_moment.double()
        total = moments.sum().item()
        return moments[list(self.chosen)].sum().item() / total if total else 0.0

    @property
    def largest(self) -> float:
        return self.stats.absolute_maximum.max().item()

    @property
    def beyond_threshold(self) -> int:
        """Features that LLM.int8() would call outliers by their magnitude in this input."""
        return int((self.stats.share_beyond_threshold >= _LLM_INT8_SHARE).sum())


def draw_outlier_map(inputs: Sequence[InputStats], plan: Plan, path: Path) -> None:
    """Write the picture as one HTML file that loads nothing.

    For each kind of input a heat map of features by block, with the features that the plan keeps marked; then, block
    by block, how many they are and how strong, so that one sees where early and late layers differ.
    """
    drawn = [_prepare(stats, plan) for stats in inputs]
    groups: dict[str, list[_Input]] = {}
    for entry in drawn:
        if entry.block is not None and entry.stats.tokens:
            groups.setdefault(entry.kinds, []).append(entry)
    chosen = sum(len(entry.chosen) for entry in drawn)
    features = sum(len(entry.stats.second_moment) for entry in drawn)
    body = [
        "<h1>Outlier map</h1>",
        paragraph(
            f"{chosen:,} of {features:,} input features ({chosen / max(features, 1):.2%}) stay in the source's dtype, "
            f"in {len(drawn):,} distinct inputs."
        ),
    ]
    if groups:
        body += [_maps(groups), _by_block(groups)]
    body.append(_table(drawn))
    write_text(path, page("Outlier map", body))


def _prepare(stats: InputStats, plan: Plan) -> _Input:
    planned = [plan.linears[name] for name in stats.linears if name in plan.linears]
    chosen = sorted({feature for linear in planned for feature in linear.outlier_index})
    kinds = ", ".join(dict.fromkeys(block_and_kind(name)[1] for name in stats.linears))
    return _Input(stats.linears[0], kinds, block_and_kind(stats.linears[0])[0], stats, tuple(chosen))


# -- features by layer -----------------------------------------------------------------------------------------


def _maps(groups: dict[str, list[_Input]]) -> str:
    parts = []
    for number, (kinds, entries) in enumerate(groups.items()):
        width = max(len(entry.stats.second_moment) for entry in entries)
        pooled = math.ceil(width / _COLUMNS)
        caption = f"Input of {kinds}: {width:,} features."
        if pooled > 1:
            caption += f" Each column shows the strongest of {pooled} neighbouring features."
        parts.append(figure(caption, svg(f"map-{number}", caption, *_heat_map(entries, width, pooled))))
    return section(
        "Features by layer",
        paragraph(
            "Colour: a feature's mean square over the median one of its input. Orange circles: kept by the plan. A "
            "vertical line is a feature that stands out in many layers.",
            "note",
        ),
        *parts,
    )


def _heat_map(entries: Sequence[_Input], width: int, pooled: int) -> tuple[float, Callable[[Figure], None]]:
    """Height in inches, and what draws features [columns] by blocks [rows]."""
    blocks = sorted({entry.block for entry in entries if entry.block is not None})
    row_of = {block: row for row, block in enumerate(blocks)}
    values = torch.full((len(blocks), math.ceil(width / pooled)), _LOWEST, dtype=torch.float64)
    marks: set[tuple[float, int]] = set()
    for entry in entries:
        if entry.block is None:
            continue
        row = row_of[entry.block]
        strongest = _pool(entry.strength, pooled)
        # Experts of one block share a row, which shows the strongest of them.
        values[row, : len(strongest)] = torch.maximum(values[row, : len(strongest)], strongest)
        marks.update((feature // pooled * pooled + (pooled - 1) / 2, row) for feature in entry.chosen)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        picture = axes.imshow(
            values.numpy(),
            cmap="Blues",
            vmin=_LOWEST,
            vmax=_HIGHEST,
            aspect="auto",
            interpolation="none",
            extent=(-0.5, values.shape[1] * pooled - 0.5, len(blocks) - 0.5, -0.5),
        )
        if marks:
            columns, rows = zip(*sorted(marks), strict=True)
            # Tens of thousands of vector marks would make a file of megabytes: they become one image.
            axes.scatter(
                columns,
                rows,
                s=11,
                facecolors="none",
                edgecolors=ORANGE,
                linewidths=0.8,
                rasterized=len(marks) > 2000,
            )
        step = max(1, math.ceil(len(blocks) / 12))
        axes.set_yticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]])
        axes.set_ylabel("block")
        axes.set_xlabel("input feature")
        axes.grid(False)
        bar = figure.colorbar(picture, ax=axes, fraction=0.03, pad=0.015, ticks=[0, 1, 2, 3])
        bar.ax.set_yticklabels(["1×", "10×", "100×", "1000×"])
        bar.outline.set_visible(False)

    return 1.0 + min(4.5, max(0.5, 0.085 * len(blocks))), draw


def _pool(strength: torch.Tensor, pooled: int) -> torch.Tensor:
    """The largest of each `pooled` neighbours: [K] to [ceil(K / pooled)]."""
    padded = torch.full((math.ceil(len(strength) / pooled) * pooled,), -math.inf, dtype=strength.dtype)
    padded[: len(strength)] = strength
    return padded.view(-1, pooled).amax(1)


# -- early and late layers ---------------------------------------------------------------------------------------


def _by_block(groups: dict[str, list[_Input]]) -> str:
    entries = [entry for group in groups.values() for entry in group]
    chosen = _figures(entries, lambda entry: len(entry.chosen))
    share = _figures(entries, lambda entry: 100 * entry.energy_share)
    beyond = _figures(entries, lambda entry: entry.beyond_threshold)
    return section(
        "Early and late layers",
        figure("Features that the plan keeps.", draw_lines_by_block("chosen", "features kept", chosen, 2.4)),
        figure(
            "How much of the input's energy (the sum of its squares) the kept features hold.",
            draw_lines_by_block("energy", "energy of kept features (%)", share, 2.4),
        ),
        figure(
            f"The largest value seen. LLM.int8() counts magnitudes from {LLM_INT8_THRESHOLD:g} (dashed).",
            _largest(_figures(entries, lambda entry: entry.largest)),
        ),
        figure(
            f"Features beyond {LLM_INT8_THRESHOLD:g} in at least {_LLM_INT8_SHARE:.0%} of tokens.",
            draw_lines_by_block("beyond", "features", beyond, 2.4),
        ),
    )


def _figures(entries: Iterable[_Input], figure_of: Callable[[_Input], float]) -> dict[str, dict[int, float]]:
    """A figure of each input as kind -> block -> value, named by the first linear that reads the input."""
    return by_kind_and_block((entry.name, figure_of(entry)) for entry in entries)


def _largest(kinds: dict[str, dict[int, float]]) -> str:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axhline(LLM_INT8_THRESHOLD, color=RED, linestyle="--", linewidth=1)
        lines_by_block(axes, kinds)
        if any(value > 0 for blocks in kinds.values() for value in blocks.values()):
            axes.set_yscale("log")
            plain_numbers(axes.yaxis)
        axes.set_xlabel("block")
        axes.set_ylabel("largest magnitude")
        figure.legend(loc="outside right upper")

    return svg("largest", "Largest magnitude by block", 2.4, draw)


# -- every input -------------------------------------------------------------------------------------------------


def _table(drawn: Sequence[_Input]) -> str:
    columns = [
        ("Input of", "wrap"),
        ("Features", "number"),
        ("Kept", "number"),
        ("Their energy", "number"),
        ("Largest", "number"),
        (f"Beyond {LLM_INT8_THRESHOLD:g}", "number"),
        ("Tokens", "number"),
    ]
    rows = [
        (
            ", ".join(entry.stats.linears),
            f"{len(entry.stats.second_moment):,}",
            f"{len(entry.chosen):,}",
            f"{entry.energy_share:.1%}",
            f"{entry.largest:.3g}",
            str(entry.beyond_threshold),
            f"{entry.stats.tokens:,}",
        )
        for entry in drawn
    ]
    return section("Inputs", collapsed(f"All {len(rows):,} distinct inputs", html_table(columns, rows)))
