"""The page that reports and outlier maps share: its style, its tables, and the one place where text is escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape

from accullm_cli.measure.measurement import Case

# The page's colours by name, on white paper and on dark. Pictures are drawn in those for white.
LIGHT = {
    "paper": "#ffffff", "ink": "#1c1d21", "soft": "#5d6270", "line": "#dfe1e6", "good": "#1b7f4b", "bad": "#b3261e",
    "blue": "#2f6db5", "right": "#d6f0e0", "wrong": "#f9d9d6",
}  # fmt: skip
DARK = {
    "paper": "#16181d", "ink": "#e6e7eb", "soft": "#a2a8b6", "line": "#343943", "good": "#5cc98d", "bad": "#ff8a80",
    "blue": "#6ea8e8", "right": "#1d4a33", "wrong": "#5f2522",
}  # fmt: skip


def _declared(colours: Mapping[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


_STYLE = (
    f"""
:root {{ color-scheme: light dark; {_declared(LIGHT)} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_declared(DARK)} }} }}"""
    + """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2.5rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.015em; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .6rem; }
p { margin: .4rem 0; max-width: 46rem; }
.soft, .note { color: var(--soft); }
.note { font-size: .88rem; }
code, .mono { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .86em; }
.eyebrow { color: var(--soft); font-size: .88rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
.verdict { border-left: 6px solid var(--soft); padding: .2rem 0 .2rem 1.3rem; }
.verdict.good { border-color: var(--good); } .verdict.good h1 { color: var(--good); }
.verdict.bad { border-color: var(--bad); } .verdict.bad h1 { color: var(--bad); }
.good td:first-child { color: var(--good); font-weight: 600; }
.bad td:first-child { color: var(--bad); font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th { text-align: left; font-weight: 600; font-size: .8rem; color: var(--soft); }
th, td { padding: .34rem .9rem .34rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.wrap { overflow-wrap: anywhere; }
td.quiet { color: var(--soft); font-size: .88rem; }
figure { margin: 1rem 0 1.8rem; break-inside: avoid; }
figcaption { color: var(--soft); font-size: .88rem; max-width: 46rem; margin-bottom: .3rem; }
figure svg { width: 100%; height: auto; display: block; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif !important; }
figure svg image { image-rendering: pixelated; }
ul { padding-left: 1.2rem; margin: .4rem 0; } li { margin: .15rem 0; overflow-wrap: anywhere; }
.case { border: 1px solid var(--line); border-radius: 6px; padding: .6rem .9rem; margin: .7rem 0; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: .9rem; } .sides h4 { margin: .2rem 0; font-size: .8rem; }
.case pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .84em;
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.case mark.good { background: var(--right); color: inherit; }
.case mark.bad { background: var(--wrong); color: inherit; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--soft); }
details table { font-size: .86rem; }
@media print { body { padding: 0; max-width: none; font-size: 11px; } h2 { break-after: avoid; }
  tr { break-inside: avoid; } * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
)
# Where a picture has one of the page's colours, it takes that of the theme.
_OF_THEME = {LIGHT[name]: f"var(--{name})" for name in ("paper", "ink", "soft", "line", "bad", "blue")}


def page(title: str, body: Sequence[str]) -> str:
    """A complete HTML document that loads nothing. `body` is HTML, `title` is text."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def section(heading: str, *parts: str) -> str:
    """A heading (text) and what belongs under it (HTML)."""
    return "\n".join([f"<section>\n<h2>{escape(heading)}</h2>", *parts, "</section>"])


def paragraph(text: str, style: str = "") -> str:
    """`style` is one of the page's classes: "soft", "note", "eyebrow"."""
    return f'<p class="{style}">{escape(text)}</p>' if style else f"<p>{escape(text)}</p>"


def figure(caption: str, svg: str) -> str:
    """A picture (SVG) under its caption (text), in the colours of the theme."""
    svg = re.sub("|".join(_OF_THEME), lambda match: _OF_THEME[match[0]], svg)
    return f"<figure>\n<figcaption>{escape(caption)}</figcaption>\n{svg}\n</figure>"


def collapsed(summary: str, content: str) -> str:
    """HTML that shows on a click on `summary` (text)."""
    return f"<details>\n<summary>{escape(summary)}</summary>\n{content}\n</details>"


def side_by_side(case: Case) -> str:
    """One item with two answers, the first token in which they differ marked."""
    sides = ""
    for heading, answer, style in (("Original", case.original, "good"), ("Artifact", case.artifact, "bad")):
        marked = f'<mark class="{style}">{escape(answer.differs)}</mark>'
        sides += f"<div><h4>{heading}</h4><pre>{escape(answer.same)}{marked}{escape(answer.rest)}</pre></div>"
    prompt = collapsed(f"{case.title}: {case.note}", f"<pre>{escape(case.prompt)}</pre>")
    return f'<div class="case">{prompt}<div class="sides">{sides}</div></div>'


def bullets(lines: Sequence[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{escape(line)}</li>" for line in lines) + "\n</ul>"


def html_table(
    columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], row_styles: Sequence[str] | None = None
) -> str:
    """A table of text.

    Args:
        columns: heading and class of each: "" for plain, "number" for right-aligned, "wrap" for long names, "quiet".
        rows: one cell of text for each column.
        row_styles: a class for each row: "good", "bad" or "".
    """
    head = "".join(f'<th class="{style}">{escape(heading)}</th>' for heading, style in columns)
    lines = []
    for row, row_style in zip(rows, row_styles or [""] * len(rows), strict=True):
        cells = "".join(
            f'<td class="{style}">{escape(cell)}</td>' for cell, (_, style) in zip(row, columns, strict=True)
        )
        lines.append(f'<tr class="{row_style}">{cells}</tr>')
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>\n</table>"
