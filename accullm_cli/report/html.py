"""report.html and report.json: what somebody who ships a model needs to see, the verdict first."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from accullm_cli.measure.measurement import Cases, Measurement, Table
from accullm_cli.measure.result import Report
from accullm_cli.progress import SHOWN, grouped
from accullm_cli.report import plots
from accullm_cli.report.figures import limit_of, of_clause, value_and_interval, verdict
from accullm_cli.report.page import bullets, collapsed, figure, html_table, page, paragraph, section, side_by_side
from accullm_cli.report.schema import to_json
from accullm_cli.run import write_text
from accullm_cli.units import duration, size


def write_report(report: Report, directory: Path) -> tuple[Path, Path]:
    """Write report.json and report.html into `directory`, and return their paths in that order.

    The same report gives the same bytes. Raises MachineError where `directory` cannot be written.
    """
    json_path, html_path = directory / "report.json", directory / "report.html"
    write_text(json_path, json.dumps(to_json(report), indent=1, allow_nan=False) + "\n")
    write_text(html_path, render(report))
    return json_path, html_path


def render(report: Report) -> str:
    """The report as one HTML document that loads nothing."""
    body = [
        _verdict(report),
        *(_measured(found) for found in report.measurements),
        *([_search(report)] if report.search else []),
        _sizes(report),
        _plots(report),
        _records(report),
        _stages(report),
        _linears(report),
        _provenance(report),
    ]
    return page(f"{report.artifact}: AccuLLM report", body)


# -- sections, from top to bottom ------------------------------------------------------------------------------


def _verdict(report: Report) -> str:
    style = "" if not report.contract else "good" if report.contract_met else "bad"
    heading = verdict(report.contract)
    parts = [
        f'<header class="verdict {style}">',
        paragraph(f"{report.model} → {report.artifact} ({report.format})", "eyebrow"),
        f"<h1>{escape(heading)}</h1>",
        paragraph(_summary(report)),
        "</header>",
    ]
    if report.contract:
        columns = [("", ""), ("Condition", "wrap"), ("Measured", "number"), ("Limit", "number")]
        rows = [
            ("met" if clause.met else "not met", clause.text, of_clause(clause, clause.measured), limit_of(clause))
            for clause in report.contract
        ]
        parts.append(html_table(columns, rows, ["good" if clause.met else "bad" for clause in report.contract]))
    return "\n".join(parts)


def _summary(report: Report) -> str:
    """The result in a few sentences."""
    found = [measurement.summary for measurement in report.measurements if measurement.summary]
    saved = (
        f"It takes {size(report.artifact_bytes)} instead of {size(report.source_bytes)}, at "
        f"{report.bits_per_weight:.2f} bits per quantized weight."
    )
    return " ".join([*found, saved])


def _measured(found: Measurement) -> str:
    """The section of one measure: its figures, what it measured, and its evidence."""
    rows = [(figure.title, *value_and_interval(figure), figure.note) for figure in found.figures if figure.title]
    columns = [("Figure", ""), ("Value", "number"), ("95% interval", "number"), ("", "quiet")]
    parts = [html_table(columns, rows)] if rows else []
    parts += [_table(table) for table in found.tables]
    parts += [figure(pairs.caption, plots.draw_pairs(pairs)) for pairs in found.pairs]
    parts += [_cases(cases) for cases in found.cases]
    parts += [paragraph(found.note, "note")] if found.note else []
    return section(found.heading, *parts)


def _table(table: Table) -> str:
    parts = [paragraph(table.caption)] if table.caption else []
    return "\n".join([*parts, html_table(table.columns, table.rows)])


def _cases(cases: Cases) -> str:
    parts = [paragraph(cases.caption), *(side_by_side(case) for case in cases.cases)]
    return "\n".join([*parts, *([paragraph(f"{cases.left_out} more like these.", "note")] if cases.left_out else [])])


def _search(report: Report) -> str:
    """The plans that a golden search measured."""
    columns = [("", ""), ("Bits per weight", "number"), ("Size", "number"), ("On the search's text", "wrap")]
    rows = [
        (
            "met" if trial.met else "not met",
            f"{trial.bits_per_weight:.3f}",
            size(trial.artifact_bytes),
            ", ".join(f"{clause.metric} {of_clause(clause, clause.measured)}" for clause in trial.clauses),
        )
        for trial in report.search
    ]
    note = "The smallest that met the contract is this artifact, judged above on text that no plan was tried on."
    return section(
        "Plans that were tried",
        html_table(columns, rows, ["good" if t.met else "bad" for t in report.search]),
        paragraph(note, "note"),
    )


def _sizes(report: Report) -> str:
    ratio = report.source_bytes / max(report.artifact_bytes, 1)
    rows = [
        ("Source's weights", size(report.source_bytes), f"{report.source_bytes:,} bytes"),
        ("Artifact", size(report.artifact_bytes), f"{report.artifact_bytes:,} bytes; {ratio:.2f} times smaller"),
        (
            "Bits per weight",
            f"{report.bits_per_weight:.3f}",
            "of the quantized linears: codes, scales, zero points, outliers and their index",
        ),
    ]
    return section("Size", html_table([("", ""), ("", "number"), ("", "quiet")], rows))


def _plots(report: Report) -> str:
    parts = []
    for found in report.measurements:
        parts += [figure(histogram.caption, plots.draw_histogram(histogram)) for histogram in found.histograms]
        parts += [figure(dots.caption, plots.draw_dots(dots)) for dots in found.dots]
    errors = plots.draw_relative_errors(report.linears)
    if errors:
        caption = "Relative error of each linear's output on the calibration text (experts: their mean)."
        parts.append(figure(caption, errors))
    bits = plots.draw_bits_per_weight(report.linears)
    if bits:
        parts.append(figure("Bits per weight of each linear; orange: left in 16 bits.", bits))
    return section("Where the loss is", *parts)


def _records(report: Report) -> str:
    if not report.records:
        content = [paragraph("Nothing: every weight was stored as planned, and no numeric fallback was needed.")]
    else:
        groups = grouped(report.records)
        few = [record for group in groups if len(group) <= SHOWN for record in group]
        many = [group for group in groups if len(group) > SHOWN]
        content = [bullets(few)] if few else []
        content += [collapsed(f"{len(group)} records like: {group[0]}", bullets(group)) for group in many]
    return section("Left as it is, or treated differently from the plan", *content)


def _stages(report: Report) -> str:
    columns = [("Stage", ""), ("", ""), ("Why", "wrap"), ("Time", "number"), ("Peak memory", "number")]
    rows = [
        (
            stage.name,
            "ran" if stage.ran else "skipped",
            stage.reason,
            duration(stage.seconds),
            size(stage.peak_bytes) if stage.peak_bytes else "–",
        )
        for stage in report.stages
    ]
    return section("Stages", html_table(columns, rows))


def _linears(report: Report) -> str:
    columns = [
        ("Linear", "wrap"),
        ("Shape", "number"),
        ("Bits", "number"),
        ("Group", "number"),
        ("Outliers", "number"),
        ("Bits per weight", "number"),
        ("Relative error", "number"),
    ]
    rows = [
        (
            linear.name,
            f"{linear.out_features} × {linear.in_features}",
            str(linear.bits),
            "row" if linear.group_size == -1 else str(linear.group_size),
            str(linear.outliers),
            f"{linear.bits_per_weight:.3f}",
            "–" if linear.relative_error is None else f"{linear.relative_error:.4f}",
        )
        for linear in report.linears
    ]
    return section("Linears", collapsed(f"All {_count(len(rows), 'linear')}", html_table(columns, rows)))


def _provenance(report: Report) -> str:
    rows = [
        ("Source", report.model),
        ("Source, SHA-256", report.source_sha256),
        ("Artifact", report.artifact),
        ("Artifact, SHA-256", report.artifact_sha256),
        ("Format", report.format),
        *((name, version) for name, version in sorted(report.versions.items())),
        ("Report schema", str(report.schema_version)),
    ]
    return section("Provenance", html_table([("", ""), ("", "wrap mono")], rows))


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"
