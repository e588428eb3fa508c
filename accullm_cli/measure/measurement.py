"""What a measure finds, in the one form that contract, console, report, card and `compare` read.

None of these knows a measure by its name: a measure is a file that gives a `Measurement`, and nothing else changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A measured figure with its 95% confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Figure:
    """One named estimate.

    name: as conditions and JSON name it; "retention.sql" is a part of "retention".
    estimate: None where too little was measured for one; `note` says so.
    has_interval: whether low and high are bounds of a 95% interval; otherwise they equal the value.
    label: as the console names it; "" where the console leaves it out.
    title: as page and card name it; "" where the evidence shows it.
    digits: Python's format of the value on the console; unit: behind it; aside: what the console says beside it.
    form: "nats", or Python's format of the value on the page; note: what the page says beside it.
    best: the value that an artifact without any loss has; None where there is no such value.
    curve: where the measure can tell, the values to expect if the artifact's loss were larger by these factors:
        (factor, value), ascending in the factor.
    """

    name: str
    estimate: Estimate | None
    has_interval: bool = True
    label: str = ""
    title: str = ""
    digits: str = ".5g"
    unit: str = ""
    aside: str = ""
    form: str = "nats"
    note: str = ""
    best: float | None = None
    curve: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Samples:
    """A figure unit by unit (window of text, task item), for paired comparisons.

    of: names the units: two measurements are paired where it is the same. It holds no directory of this machine.
    """

    figure: str
    unit: str
    of: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Mark:
    """A value that a plot points out. style: "floor", "mean", "tail" or "far tail"."""

    label: str
    value: float
    style: str


@dataclass(frozen=True)
class Histogram:
    """Counts by value, for a plot.

    name: unique in a report. bins: (upper edge, count). logarithmic: the axis of values.
    """

    name: str
    caption: str
    description: str
    values: str  # what lies on the axis
    counted: str  # "tokens"
    logarithmic: bool
    bins: tuple[tuple[float, int], ...]
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Dots:
    """A figure unit by unit, for a plot beside the estimate over all of them."""

    name: str
    caption: str
    description: str
    unit: str
    values: str
    points: tuple[float, ...]
    mean: Estimate


@dataclass(frozen=True)
class Pairs:
    """The original's value and the artifact's for each unit, for a plot of one against the other.

    points: (original, artifact).
    """

    name: str
    caption: str
    description: str
    values: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Table:
    """Text in rows. columns: heading and kind of each: "", "number", "wrap" or "quiet"."""

    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class Answer:
    """One of two answers: what both begin with, the first token in which they differ, and the rest."""

    same: str
    differs: str
    rest: str = ""


@dataclass(frozen=True)
class Case:
    """One item where original and artifact part, side by side."""

    title: str
    prompt: str
    original: Answer
    artifact: Answer
    note: str = ""


@dataclass(frozen=True)
class Cases:
    """Items where original and artifact part, the worst first."""

    caption: str
    cases: tuple[Case, ...]
    left_out: int = 0


@dataclass(frozen=True)
class Group:
    """A part of what was measured, as one test of a test suite.

    failure: why it fails; "" where it does not. skipped: why nothing is said of it. output: what it has to say.
    """

    name: str
    failure: str = ""
    skipped: str = ""
    output: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measurement:
    """What one measure found of one artifact.

    measure: its name, unique in a report. heading: of its section.
    about: what was measured and on what, one sentence for the artifact's card, without directories of this machine.
    judged: whether conditions may name its figures; those of others bear the measure's name in front.
    counts: how much it was measured on: ("windows", 16), ("tokens", 8192).
    facts: lines for the console below the figures: what it was measured on, and how.
    summary: a sentence for the top of the page; "" where it says nothing there.
    note: a paragraph below the figures on the page.
    """

    measure: str
    heading: str
    about: str
    figures: tuple[Figure, ...]
    judged: bool = True
    counts: tuple[tuple[str, int], ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    summary: str = ""
    note: str = ""
    samples: tuple[Samples, ...] = ()
    tables: tuple[Table, ...] = ()
    histograms: tuple[Histogram, ...] = ()
    dots: tuple[Dots, ...] = ()
    pairs: tuple[Pairs, ...] = ()
    cases: tuple[Cases, ...] = ()
    groups: tuple[Group, ...] = ()


def exactly(value: float) -> Estimate:
    """A figure that needs no interval."""
    return Estimate(float(value), float(value), float(value))


def judged_figures(measurements: Sequence[Measurement]) -> dict[str, Figure]:
    """The figures that conditions may name."""
    return {figure.name: figure for found in measurements if found.judged for figure in found.figures}


def recorded_name(measurement: Measurement, name: str) -> str:
    """A figure's name where those of all measures stand beside each other."""
    return name if measurement.judged else f"{measurement.measure}.{name}"
