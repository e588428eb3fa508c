"""The results of many models: one table, as text and Markdown, one page, and one file of JUnit XML."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from accullm_cli.measure.measurement import Group
from accullm_cli.measure.result import ModelResult, Report
from accullm_cli.report.figures import nats
from accullm_cli.report.junit import junit
from accullm_cli.report.markdown import markdown_table, summary
from accullm_cli.report.page import html_table, page, paragraph, section
from accullm_cli.run import write_text
from accullm_cli.units import duration, size

PAGE = "zoo.html"
# Heading and class on the page of each column.
COLUMNS = (
    ("", ""),
    ("model", "wrap"),
    ("format", ""),
    ("bits per weight", "number"),
    ("size", "number"),
    ("mean KL", "number"),
    ("top-1", "number"),
    ("time", "number"),
    ("artifact, or what is wrong", "wrap"),
)


def zoo_rows(results: Sequence[ModelResult]) -> list[tuple[str, ...]]:
    """A row for each artifact, in the order of COLUMNS, and one for each model that has none."""
    rows: list[tuple[str, ...]] = []
    for result in results:
        if not result.reports:
            rows.append(("failed", result.model, *["–"] * 5, duration(result.seconds), result.error))
        for report in result.reports:
            missed = [f"{clause.text} (measured {clause.told})" for clause in report.contract if not clause.met]
            kl, agreement = _figure(report, "mean_kl"), _figure(report, "top1_agreement")
            rows.append(
                (
                    "not met" if missed else "met" if report.contract else "done",
                    result.model,
                    report.format,
                    f"{report.bits_per_weight:.3f}",
                    size(report.artifact_bytes),
                    "–" if kl is None else nats(kl),
                    "–" if agreement is None else f"{agreement:.2%}",
                    duration(result.seconds),
                    ": ".join([report.artifact, *([", ".join(missed)] if missed else [])]),
                )
            )
    return rows


def zoo_verdict(results: Sequence[ModelResult], models: int) -> str:
    """ "2 of 3 models converted, 1 contract not met, 1 failed"."""
    failed = sum(not result.reports for result in results)
    missed = sum(not report.contract_met for result in results for report in result.reports)
    parts = [f"{len(results) - failed} of {models} model{'s' if models > 1 else ''} converted"]
    parts += [f"{missed} contract{'s' if missed > 1 else ''} not met"] if missed else []
    parts += [f"{failed} failed"] if failed else []
    return ", ".join(parts)


def write_zoo_page(results: Sequence[ModelResult], models: int, directory: Path) -> Path:
    """Write the page into `directory`, and return its path. Raises MachineError where that cannot be written.

    Args:
        models: how many there will be in the end.
    """
    good = len(results) == models and all(result.exit_code == 0 for result in results)
    heading = zoo_verdict(results, models)
    rows = zoo_rows(results)
    styles = {"failed": "bad", "not met": "bad", "met": "good"}
    reports = [(result, report) for result in results for report in result.reports if report.directory]
    links = "\n".join(
        f'<li><a href="{quote(os.path.relpath(Path(report.directory) / "report.html", directory))}">'
        f"{escape(report.artifact)}</a></li>"
        for _, report in reports
    )
    body = [
        f'<header class="verdict {"good" if good else "bad"}">\n<h1>{escape(heading)}</h1>\n</header>',
        html_table(COLUMNS, rows, [styles.get(row[0], "") for row in rows]),
        section("Reports", f"<ul>\n{links}\n</ul>") if links else paragraph("No model has a report.", "note"),
    ]
    write_text(directory / PAGE, page("AccuLLM zoo", body))
    return directory / PAGE


def write_zoo_summary(results: Sequence[ModelResult], path: Path) -> None:
    """Raises MachineError where it cannot be written."""
    good = all(result.exit_code == 0 for result in results)
    heading = f"# {'✅' if good else '❌'} {zoo_verdict(results, len(results))}\n"
    table = markdown_table([heading for heading, _ in COLUMNS], zoo_rows(results))
    reports = summary([report for result in results for report in result.reports])
    write_text(path, "\n".join([heading, *table, reports]))


def write_zoo_junit(results: Sequence[ModelResult], path: Path) -> None:
    """Raises MachineError where it cannot be written."""
    failures = [Group(result.model, failure=result.error, output=(result.error,)) for result in results if result.error]
    write_text(path, junit([report for result in results for report in result.reports], failures))


def _figure(report: Report, name: str) -> float | None:
    try:
        return report.figure(name).value
    except KeyError:
        return None
