"""The contract: conditions given with --require, and whether an artifact meets them.

Parsing needs no numbers and no torch, so that a mistyped condition is refused before anything is computed.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from accullm_cli.errors import AccullmError
from accullm_cli.measure.catalogue import KINDS, Kind
from accullm_cli.measure.measurement import Estimate, Figure
from accullm_cli.measure.result import Clause

# What can be asked for. Those with an interval also take .low and .high.
METRICS = tuple(sorted(KINDS, key=lambda name: not KINDS[name].interval))
BOUNDS = ("low", "high")

_WHERE = "--require"
_EXAMPLE = "write METRIC<=VALUE or METRIC>=VALUE, such as mean_kl<=0.02"
_CONDITION = re.compile(r"\s*([^<>=]*[^\s<>=])\s*(<=|>=|<|>)\s*([^\s<>=]+)\s*")
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True)
class Requirement:
    """One condition.

    text: as the user wrote it.
    metric: one of METRICS. part: of what was measured, as in retention.sql; "" for the whole.
    bound: "low" or "high" where a bound of the 95% confidence interval is held against the limit, "" for the value.
    comparison: "<=", ">=", "<" or ">".
    """

    text: str
    metric: str
    bound: str
    comparison: str
    limit: float
    part: str = ""

    @property
    def figure(self) -> str:
        """The name of the figure that is held against the limit."""
        return f"{self.metric}.{self.part}" if self.part else self.metric


def parse_requirement(text: str) -> Requirement:
    """Read a condition such as `mean_kl<=0.02`, `top1_agreement>=85%` or `mean_kl.high<=0.02`.

    Raises:
        AccullmError: it is not a condition, the metric is unknown or has no interval, or no artifact could have the
            limit.
    """
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise AccullmError(f"{text!r} is not a condition", _WHERE, _EXAMPLE)
    name, comparison, limit = match.groups()
    metric, dot, bound = name.partition(".")
    kind = KINDS.get(metric)
    if kind is None:
        raise AccullmError(f"unknown metric {metric!r} in {text!r}", _WHERE, _suggestion(metric))
    if dot and not kind.interval:
        raise AccullmError(
            f"{metric} has no confidence interval, in {text!r}", _WHERE, f"write {metric} without .{bound}"
        )
    part = ""
    if dot and kind.parts:
        part, dot, last = bound.rpartition(".")
        part, bound = (part, last) if last in BOUNDS else (bound, "")
        if not part and not bound:
            raise AccullmError(f"names no part of {metric}, in {text!r}", _WHERE, f"write {metric}, or {metric}.sql")
    elif dot and bound not in BOUNDS:
        raise AccullmError(f"unknown bound {bound!r} in {text!r}", _WHERE, f"write {metric}.low or {metric}.high")
    return Requirement(text, metric, bound, comparison, _parse_limit(limit, kind, text), part)


def _suggestion(metric: str) -> str:
    near = difflib.get_close_matches(metric.lower(), METRICS, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"choose one of {', '.join(METRICS)}"


def _parse_limit(limit: str, kind: Kind, text: str) -> float:
    """A number of at least 0; for a share, one of at most 1 or a percentage."""
    metric, percent = kind.name, limit.endswith("%") and kind.share
    try:
        value = float(limit[:-1]) / 100 if percent else float(limit)
    except ValueError:
        raise AccullmError(f"{limit!r} is not a number, in {text!r}", _WHERE, _EXAMPLE) from None
    if not math.isfinite(value) or value < 0:
        raise AccullmError(f"{limit} is not a possible value of {metric}, in {text!r}", _WHERE, "give 0 or more")
    if kind.share and value > 1:
        raise AccullmError(
            f"{limit} is not a share, in {text!r}", _WHERE, f"write a share such as {metric}>=0.85 or {metric}>=85%"
        )
    return value


def judge(requirements: Sequence[Requirement], figures: Mapping[str, Figure]) -> tuple[Clause, ...]:
    """Hold what was measured against each requirement, in their order.

    Args:
        figures: by name; one that is missing, or of which too little was measured, meets no condition.
    """
    return tuple(_clause(requirement, figures.get(requirement.figure)) for requirement in requirements)


def search_demands(contract: Sequence[str]) -> list[Requirement]:
    """What a search for the smallest plan asks of one: the contract's clauses on fidelity.

    A figure that comes with a 95% interval must meet the limit with its worse end, if its kind says so.

    Raises:
        AccullmError: the contract has no such clause.
    """
    found = [parse_requirement(text) for text in contract]
    found = [requirement for requirement in found if bounds_loss(requirement)]
    if not found:
        raise AccullmError(
            "needs a contract on how faithful the artifact is",
            "--golden",
            "give, for example, --require 'mean_kl<=0.03'",
        )
    return [
        replace(requirement, bound="high" if "<" in requirement.comparison else "low")
        if KINDS[requirement.metric].interval and KINDS[requirement.metric].worse_end and not requirement.bound
        else requirement
        for requirement in found
    ]


def bounds_loss(requirement: Requirement) -> bool:
    """Whether a condition asks for fidelity, so that fewer errors can bring it about."""
    better = KINDS[requirement.metric].better
    return (better == "lower" and "<" in requirement.comparison) or (
        better == "higher" and ">" in requirement.comparison
    )


def room_for_loss(requirement: Requirement, figure: Figure) -> float:
    """By which factor the loss might grow until a condition that `bounds_loss` is just met; below 1 where it is not.

    For small losses KL and the excess of perplexity grow as the loss does, and the share of tokens that change places
    as its square root.
    """
    if figure.curve and not requirement.bound:
        return _room_on_curve(requirement, figure.curve)
    if figure.estimate is None or figure.best is None:
        return 0.0
    sign = 1 if KINDS[requirement.metric].better == "lower" else -1
    power = 1 / KINDS[requirement.metric].power
    allowed = max(sign * (requirement.limit - figure.best), 0.0)
    found = sign * (_bound_of(requirement, figure.estimate) - figure.best)
    return math.inf if found <= 0 else (allowed**power) / (found**power)


def _room_on_curve(requirement: Requirement, curve: Sequence[tuple[float, float]]) -> float:
    """The factor up to which all values of a curve meet a condition, between two points by their logarithms."""
    compare, before = _COMPARISONS[requirement.comparison], curve[0]
    for factor, value in curve:
        if not compare(value, requirement.limit):
            if value == before[1]:
                return factor
            share = (requirement.limit - before[1]) / (value - before[1])
            return before[0] * (factor / before[0]) ** min(max(share, 0.0), 1.0)
        before = factor, value
    return before[0]


def check_needed(requirements: Sequence[Requirement], tasks: Sequence[str]) -> None:
    """Refuse conditions on what would not be measured.

    Args:
        tasks: the names of the exact tasks that were asked for.

    Raises:
        AccullmError: no tasks, or not the one that a condition names.
    """
    for requirement in requirements:
        needs = KINDS[requirement.metric].needs
        if needs and not tasks:
            raise AccullmError(
                f"{requirement.metric} needs exact tasks, in {requirement.text!r}", _WHERE, f"give {needs}"
            )
        if requirement.part and requirement.part not in tasks:
            raise AccullmError(
                f"{requirement.part!r} is no task of this run, in {requirement.text!r}",
                _WHERE,
                f"the tasks are {', '.join(tasks)}",
            )


def _bound_of(requirement: Requirement, estimate: Estimate) -> float:
    return {"": estimate.value, "low": estimate.low, "high": estimate.high}[requirement.bound]


def _clause(requirement: Requirement, figure: Figure | None) -> Clause:
    estimate = None if figure is None else figure.estimate
    measured = None if estimate is None else _bound_of(requirement, estimate)
    return Clause(
        text=requirement.text,
        metric=f"{requirement.figure}.{requirement.bound}" if requirement.bound else requirement.figure,
        comparison=requirement.comparison,
        limit=requirement.limit,
        measured=measured,
        met=measured is not None and _COMPARISONS[requirement.comparison](measured, requirement.limit),
    )
