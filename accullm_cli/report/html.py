"""report.html and report.json: what somebody who ships a model needs to see, the verdict first."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from accullm_cli.measure.result import Clause, Estimate, Fidelity, Report, Speed
from accullm_cli.progress import SHOWN, grouped
from accullm_cli.report import plots
from accullm_cli.report.page import bullets, collapsed, figure, html_table, page, paragraph, section
from accullm_cli.report.schema import to_json
from accullm_cli.run import write_text
from accullm_cli.units import duration, size

# Below this, 95% intervals hold the truth less often than they say (docs/measures.md).
_FEW_WINDOWS = 6


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
        _figures("Fidelity", report.fidelity),
        *([] if report.other is None else [_figures("Fidelity on text of another kind", report.other)]),
        *([_search(report)] if report.search else []),
        _sizes(report),
        *([] if report.speed is None else [_speed(report.speed)]),
        _plots(report),
        _records(report),
        _stages(report),
        _linears(report),
        _provenance(report),
    ]
    return page(f"{report.artifact}: AccuLLM report", body)


# -- sections, from top to bottom ------------------------------------------------------------------------------


def _verdict(report: Report) -> str:
    missed = sum(not clause.met for clause in report.contract)
    if not report.contract:
        style, heading = "", "Measured; no contract was asked for"
    elif report.contract_met:
        style, heading = "good", "Contract met"
    else:
        style, heading = "bad", f"Contract not met: {missed} of {_count(len(report.contract), 'condition')} missed"
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
            ("met" if clause.met else "not met", clause.text, _clause(clause, clause.measured), _limit(clause))
            for clause in report.contract
        ]
        parts.append(html_table(columns, rows, ["good" if clause.met else "bad" for clause in report.contract]))
    return "\n".join(parts)


def _summary(report: Report) -> str:
    """The result in two sentences."""
    found = report.fidelity
    change = found.perplexity.value / found.perplexity_original.value - 1
    return (
        f"On {found.tokens:,} held-out tokens the artifact puts the original's most likely token first "
        f"{found.top1_agreement.value:.1%} of the time, and its perplexity is {found.perplexity.value:#.4g} instead of "
        f"{found.perplexity_original.value:#.4g} ({change:+.1%}). It takes {size(report.artifact_bytes)} instead of "
        f"{size(report.source_bytes)}, at {report.bits_per_weight:.2f} bits per quantized weight."
    )


def _clause(clause: Clause, value: float) -> str:
    if clause.metric.startswith("top1_agreement"):
        return f"{100 * value:.6g}%"
    if clause.metric == "artifact_bytes":
        return f"{value:,.0f}"
    return f"{value:.6g}"


def _limit(clause: Clause) -> str:
    comparison = {"<=": "≤", ">=": "≥"}.get(clause.comparison, clause.comparison)
    return f"{comparison} {_clause(clause, clause.limit)}"


def _figures(heading: str, found: Fidelity) -> str:
    ratio = found.perplexity.value / found.perplexity_original.value
    floor = found.mean_kl_floor
    over_floor = f"{_factor(found.mean_kl.value / floor.value)} times the noise floor" if floor.value > 0 else ""
    agreement = found.top1_agreement
    rows = [
        ("Mean KL divergence", *_estimate(found.mean_kl), f"nats per token; {over_floor}".rstrip("; ")),
        ("Its noise floor", *_estimate(floor), "the original against itself with one bfloat16 rounding per block"),
        ("KL, 99th percentile", *_estimate(found.kl_p99), "one token in 100 is further off"),
        ("KL, 99.9th percentile", *_estimate(found.kl_p999), "one token in 1,000 is further off"),
        ("KL, largest", nats(found.kl_max), "", "the worst token"),
        (
            "Top-1 agreement",
            f"{agreement.value:.2%}",
            f"{agreement.low:.2%} to {agreement.high:.2%}",
            "the same most likely next token",
        ),
        ("Perplexity of the original", *_estimate(found.perplexity_original, "{:#.4g}"), ""),
        ("Perplexity of the artifact", *_estimate(found.perplexity, "{:#.4g}"), f"{ratio:.4f} times the original's"),
    ]
    columns = [("Figure", ""), ("Value", "number"), ("95% interval", "number"), ("", "quiet")]
    note = (
        f"KL(original ‖ artifact) of the next-token distributions at {found.tokens:,} positions in {found.windows} "
        f"windows, the artifact in {found.arithmetic}. Text: {found.text}. Intervals come from resampling whole "
        "windows."
    )
    if found.windows < _FEW_WINDOWS:
        note += f" From {found.windows} windows they are too narrow: measure more."
    return section(heading, html_table(columns, rows), paragraph(note, "note"))


def _search(report: Report) -> str:
    """The plans that a golden search measured."""
    columns = [("", ""), ("Bits per weight", "number"), ("Size", "number"), ("On the search's text", "wrap")]
    rows = [
        (
            "met" if trial.met else "not met",
            f"{trial.bits_per_weight:.3f}",
            size(trial.artifact_bytes),
            ", ".join(f"{clause.metric} {_clause(clause, clause.measured)}" for clause in trial.clauses),
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


def _speed(found: Speed) -> str:
    columns = [("Tokens per second", ""), ("Artifact", "number"), ("Original", "number"), ("", "number"), ("", "quiet")]
    figures = (
        ("Prefill", f"{found.prompt_tokens} tokens at once", "prefill", found.prefill_engine),
        ("Decode", f"{found.decoded_tokens} tokens, one after the other", "decode", found.decode_engine),
    )
    rows = []
    for name, what, phase, engine in figures:
        artifact, original = getattr(found.artifact, phase), getattr(found.original, phase)
        ratio = f"{artifact / original:.3g} times"
        rows.append((name, f"{artifact:.4g}", f"{original:.4g}", ratio, f"{what}; the artifact by {engine}"))
    note = f"On {found.device}, both in {found.dtype}; medians of several runs, one sequence at a time."
    return section("Speed", html_table(columns, rows), paragraph(note, "note"))


def _plots(report: Report) -> str:
    parts = [
        figure("How far single tokens are off. The scale is logarithmic.", plots.draw_kl_histogram(report.fidelity)),
        figure(
            "Texts differ in how hard they are; a window far above the others is worth reading.",
            plots.draw_kl_of_windows(report.fidelity),
        ),
    ]
    errors = plots.draw_relative_errors(report.linears)
    if errors:
        caption = "Relative error of each linear's output on the calibration text (experts: their mean)."
        parts.append(figure(caption, errors))
    bits = plots.draw_bits_per_weight(report.linears)
    if bits:
        parts.append(figure("Bits per weight of each linear; black: left in 16 bits.", bits))
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


# -- figures as text -------------------------------------------------------------------------------------------


def nats(value: float) -> str:
    """Three significant digits, small values in scientific form: 0.0664, 3.40e-05."""
    return "0" if value == 0 else f"{value:.2e}" if abs(value) < 1e-3 else f"{value:#.3g}".rstrip(".")


def _estimate(estimate: Estimate, form: str = "") -> tuple[str, str]:
    """A figure and its interval; in nats where no form is given."""

    def text(value: float) -> str:
        return form.format(value) if form else nats(value)

    return text(estimate.value), f"{text(estimate.low)} to {text(estimate.high)}"


def _factor(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"
