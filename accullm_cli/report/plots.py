"""The report's plots, each as inline SVG that is the same, byte for byte, for the same figures."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from itertools import cycle
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from accullm_cli.measure.measurement import Dots, Histogram, Pairs
from accullm_cli.measure.result import LinearSummary
from accullm_cli.report.page import LIGHT

INK, SOFT, LINE, BLUE, RED = (LIGHT[name] for name in ("ink", "soft", "line", "blue", "bad"))
ORANGE = "#d9822b"
# Distinct for the colour-blind too (Okabe and Ito's set, yellow darkened for white paper, black as the page's ink).
KIND_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a7a00", "#56b4e9", "#e69f00", INK)
WIDTH = 8.6  # inches; the page scales it to its own

_STYLE = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's own font
    "svg.hashsalt": "accullm",  # element ids would be random otherwise
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that layouts agree between machines
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "figure.constrained_layout.use": True,
}
_NUMBER = re.compile(r"\d+")


def svg(name: str, description: str, height: float, draw: Callable[[Figure], None]) -> str:
    """Let `draw` fill a figure, and return it as an <svg> element.

    Args:
        name: unique in the page; every id of the figure begins with it.
        description: what the picture shows, for those who cannot see it.
        height: inches.
    """
    text = _rendered(height, draw)
    element = text[text.index("<svg") :].strip()
    element = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{name}-", element)
    return element.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1)


def _rendered(height: float, draw: Callable[[Figure], None]) -> str:
    """The text of an SVG file."""
    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(WIDTH, height))
        draw(figure)
        buffer = io.StringIO()
        # None drops a field; a date would make each file another.
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return buffer.getvalue()


def block_and_kind(name: str) -> tuple[int | None, str]:
    """Where a linear sits and what it is: "model.layers.3.mlp.up_proj" is (3, "mlp.up_proj").

    The first number in a name counts blocks; further ones count experts and become "*". A linear outside of the blocks
    has no block.
    """
    parts = name.split(".")
    position = next((place for place, part in enumerate(parts) if _NUMBER.fullmatch(part)), None)
    if position is None:
        return None, name
    return int(parts[position]), ".".join("*" if _NUMBER.fullmatch(part) else part for part in parts[position + 1 :])


def by_kind_and_block(figures: Iterable[tuple[str, float]]) -> dict[str, dict[int, float]]:
    """Figures of linears as kind -> block -> mean (over experts); kinds and blocks in the order they come in."""
    collected: dict[str, dict[int, list[float]]] = {}
    for name, figure in figures:
        block, kind = block_and_kind(name)
        if block is not None:
            collected.setdefault(kind, {}).setdefault(block, []).append(figure)
    return {
        kind: {block: sum(values) / len(values) for block, values in blocks.items()}
        for kind, blocks in collected.items()
    }


def plain_numbers(axis: Any) -> None:
    """Ticks of a logarithmic axis as 0.001 or 1e-06 instead of powers of ten in mathematical type."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


# Colour and line of what a plot points out.
_MARKS = {"floor": (SOFT, ":"), "mean": (ORANGE, "-"), "tail": (RED, "--"), "far tail": (RED, ":")}


def draw_histogram(histogram: Histogram) -> str:
    """The share of each bin, and what the plot points out."""
    edges = [edge for edge, _ in histogram.bins]
    counts = [count for _, count in histogram.bins]
    if histogram.logarithmic:  # the first bin has no lower edge: it is drawn as wide as the next
        edges = [edges[0] ** 2 / edges[1] if len(edges) > 1 else edges[0] / 2, *edges]
    else:
        edges = [2 * edges[0] - edges[1] if len(edges) > 1 else edges[0] - 1, *edges]
    # 0 has no place on a logarithmic axis.
    marks = [mark for mark in histogram.marks if mark.value > 0 or not histogram.logarithmic]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.stairs([100 * count / max(sum(counts), 1) for count in counts], edges, fill=True, color=BLUE, alpha=0.75)
        for mark in marks:
            colour, line = _MARKS[mark.style]
            axes.axvline(mark.value, color=colour, linestyle=line, label=f"{mark.label}: {mark.value:.2g}")
        axes.set_xlabel(histogram.values)
        axes.set_ylabel(f"{histogram.counted} (%)")
        axes.grid(False, axis="x")
        if histogram.logarithmic:
            axes.set_xscale("log")
            plain_numbers(axes.xaxis)
        if marks:
            axes.legend(loc="upper left")

    return svg(histogram.name, histogram.description, 2.9, draw)


def draw_dots(dots: Dots) -> str:
    """The value of each unit, with the interval of the overall mean."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        mean = dots.mean
        axes.axhspan(mean.low, mean.high, color=ORANGE, alpha=0.15, linewidth=0, label="95% interval of the mean")
        axes.axhline(mean.value, color=ORANGE, label="mean")
        axes.plot(range(1, len(dots.points) + 1), dots.points, "o", color=BLUE, markersize=4)
        axes.set_ylim(0, 1.15 * max(mean.high, *dots.points) or None)
        axes.set_xlabel(dots.unit)
        axes.set_ylabel(dots.values)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(False, axis="x")
        axes.legend(loc="best", ncols=2)

    return svg(dots.name, dots.description, 2.3, draw)


def draw_pairs(pairs: Pairs) -> str:
    """The artifact's value of each unit against the original's; those below 0 in red."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for colour, points in (
            (BLUE, [point for point in pairs.points if point[1] > 0]),
            (RED, [point for point in pairs.points if point[1] <= 0]),
        ):
            axes.plot([x for x, _ in points], [y for _, y in points], "o", color=colour, markersize=3, alpha=0.6)
        ends = [0.0, max((x for x, _ in pairs.points), default=1.0)]
        axes.plot(ends, ends, color=SOFT, linewidth=0.8, label="unchanged")
        axes.axhline(0, color=RED, linewidth=0.8)
        axes.set_xlabel(f"original's {pairs.values}")
        axes.set_ylabel(f"artifact's {pairs.values}")
        axes.legend(loc="upper left")

    return svg(pairs.name, pairs.description, 3.6, draw)


def draw_lines_by_block(name: str, label: str, kinds: dict[str, dict[int, float]], height: float = 3.0) -> str:
    """One line over the blocks for each kind of linear."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        lines_by_block(axes, kinds)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("block")
        axes.set_ylabel(label)
        figure.legend(loc="outside right upper")

    return svg(name, f"{label} by block", height, draw)


def lines_by_block(axes: Any, kinds: dict[str, dict[int, float]], labelled: bool = True) -> None:
    """Draw each kind's figures over the blocks; colours repeat with another marker."""
    markers = cycle("o" * len(KIND_COLOURS) + "s" * len(KIND_COLOURS) + "^" * len(KIND_COLOURS))
    for (kind, blocks), colour, marker in zip(kinds.items(), cycle(KIND_COLOURS), markers, strict=False):
        numbers = sorted(blocks)
        axes.plot(
            numbers,
            [blocks[number] for number in numbers],
            color=colour,
            marker=marker,
            markersize=3,
            label=kind if labelled else None,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(False, axis="x")


def draw_relative_errors(linears: Sequence[LinearSummary]) -> str:
    """Relative output error by block, a line for each kind of linear; "" where none was measured."""
    measured = [(linear.name, linear.relative_error) for linear in linears if linear.relative_error is not None]
    kinds = by_kind_and_block(measured)
    return draw_lines_by_block("relative-errors", "relative output error", kinds) if kinds else ""


def draw_bits_per_weight(linears: Sequence[LinearSummary]) -> str:
    """Bits per weight as a map of kinds by blocks, linears left in 16 bits in orange; "" without linears in blocks."""
    kinds = by_kind_and_block((linear.name, linear.bits_per_weight) for linear in linears)
    blocks = sorted({block for figures in kinds.values() for block in figures})
    if not blocks:
        return ""
    missing = float("nan")
    values = [[figures.get(block, missing) for block in blocks] for figures in kinds.values()]
    quantized = [value for row in values for value in row if value < 16]
    low, high = (min(quantized), max(quantized)) if quantized else (0.0, 16.0)
    # Equal bits everywhere would leave the colours without a scale.
    margin = max(0.05, (high - low) * 0.02)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        colours = matplotlib.colormaps["Blues"].with_extremes(over=ORANGE, bad="white")
        picture = axes.pcolormesh(
            [block - 0.5 for block in blocks] + [blocks[-1] + 0.5],
            range(len(kinds) + 1),
            values,
            cmap=colours,
            vmin=low - margin,
            vmax=high + margin,
            edgecolors="white",
            linewidth=0.8,
        )
        axes.set_yticks([place + 0.5 for place in range(len(kinds))], list(kinds))
        axes.invert_yaxis()
        axes.grid(False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("block")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(picture, ax=axes, label="bits per weight", fraction=0.04, pad=0.02).outline.set_visible(False)

    return svg("bits-per-weight", "Bits per weight by kind of linear and block", 1.0 + 0.26 * len(kinds), draw)
