"""Figures as text."""

from __future__ import annotations

from accullm_cli.measure.catalogue import KINDS
from accullm_cli.measure.measurement import Figure
from accullm_cli.measure.result import Clause


def nats(value: float) -> str:
    """Three significant digits, small values in scientific form: 0.0664, 3.40e-05."""
    return "0" if value == 0 else f"{value:.2e}" if abs(value) < 1e-3 else f"{value:#.3g}".rstrip(".")


def value_and_interval(figure: Figure) -> tuple[str, str]:
    """A figure's value and its interval."""
    if figure.estimate is None:
        return "–", ""

    def text(value: float) -> str:
        return nats(value) if figure.form == "nats" else format(value, figure.form)

    interval = f"{text(figure.estimate.low)} to {text(figure.estimate.high)}" if figure.has_interval else ""
    return text(figure.estimate.value), interval


def of_clause(clause: Clause, value: float | None) -> str:
    """A value that a condition speaks of, in the unit of its figure."""
    if value is None:
        return clause.told
    kind = KINDS.get(clause.metric.partition(".")[0])
    if kind is not None and kind.share:
        return f"{100 * value:.6g}%"
    return f"{value:,.0f}" if clause.metric == "artifact_bytes" else f"{value:.6g}"


def limit_of(clause: Clause) -> str:
    comparison = {"<=": "≤", ">=": "≥"}.get(clause.comparison, clause.comparison)
    return f"{comparison} {of_clause(clause, clause.limit)}"


def verdict(report_contract: tuple[Clause, ...]) -> str:
    """The heading of a report."""
    missed = sum(not clause.met for clause in report_contract)
    if not report_contract:
        return "Measured; no contract was asked for"
    if not missed:
        return "Contract met"
    conditions = "1 condition" if len(report_contract) == 1 else f"{len(report_contract):,} conditions"
    return f"Contract not met: {missed} of {conditions} missed"
