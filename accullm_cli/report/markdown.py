"""Reports as Markdown, for a pull request: the verdict first, the figures, and what was lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from accullm_cli.measure.measurement import Answer, Cases, Measurement
from accullm_cli.measure.result import Report
from accullm_cli.report.figures import limit_of, of_clause, value_and_interval, verdict
from accullm_cli.run import write_text
from accullm_cli.units import size

# Cases that a summary shows; the report has more.
SHOWN = 10


def write_summary(reports: Sequence[Report], path: Path) -> None:
    """Raises MachineError where it cannot be written."""
    write_text(path, summary(reports))


def summary(reports: Sequence[Report]) -> str:
    return "\n".join(line for report in reports for line in _lines(report))


def _lines(report: Report) -> Iterator[str]:
    mark = "" if not report.contract else "✅ " if report.contract_met else "❌ "
    yield f"## {mark}{verdict(report.contract)}\n"
    yield f"{_text(report.model)} → {_text(report.artifact)} ({_text(report.format)})\n"
    saved = f"{size(report.artifact_bytes)} instead of {size(report.source_bytes)}"
    told = [found.summary for found in report.measurements if found.summary]
    yield " ".join([*told, f"It takes {saved}, at {report.bits_per_weight:.3f} bits per quantized weight."]) + "\n"
    if report.contract:
        rows = [
            ("met" if c.met else "**not met**", f"`{c.text}`", of_clause(c, c.measured), limit_of(c))
            for c in report.contract
        ]
        yield from markdown_table(("", "Condition", "Measured", "Limit"), rows, escaped=False)
    for found in report.measurements:
        yield from _measured(found)


def _measured(found: Measurement) -> Iterator[str]:
    yield f"### {_text(found.heading)}\n"
    rows = [(figure.title, *value_and_interval(figure), figure.note) for figure in found.figures if figure.title]
    if rows:
        yield from markdown_table(("Figure", "Value", "95% interval", ""), rows)
    for table in found.tables:
        yield from markdown_table([heading for heading, _ in table.columns], table.rows)
    for cases in found.cases:
        yield from _cases(cases)


def _cases(cases: Cases) -> Iterator[str]:
    count = len(cases.cases) + cases.left_out
    yield f"<details><summary>{escape(cases.caption)} ({count})</summary>\n"
    for case in cases.cases[:SHOWN]:
        yield f"**{_text(case.title)}**: {_text(case.note)}\n"
        for name, answer in (("original", case.original), ("artifact", case.artifact)):
            yield f"{name}: <code>{_marked(answer)}</code>\n"
    if count > SHOWN:
        yield f"{count - SHOWN} more, in the report.\n"
    yield "</details>\n"


def _marked(answer: Answer) -> str:
    """One line of HTML, the token that differs in bold."""
    same, differs, rest = (escape(part).replace("\n", "⏎") for part in (answer.same, answer.differs, answer.rest))
    return f"{same}<b>{differs}</b>{rest}"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], escaped: bool = True) -> Iterator[str]:
    """The lines of a table; `escaped` where cells are text, and not Markdown."""
    yield f"| {' | '.join(columns)} |"
    yield f"| {' | '.join('---' for _ in columns)} |"
    for row in rows:
        yield f"| {' | '.join(_text(cell) if escaped else cell.replace('|', chr(92) + '|') for cell in row)} |"
    yield ""


def _text(text: str) -> str:
    """Text in which nothing is markup."""
    for character in ("\\", "`", "*", "_", "[", "]", "|", "#"):
        text = text.replace(character, f"\\{character}")
    return " ".join(escape(text, quote=False).split())
