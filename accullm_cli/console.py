"""What the user sees: progress and tables on stderr, results as text or JSON for stdout, the one line of an error.

Nothing here wraps or cuts a line, so that paths can be copied; no escape codes are written unless stderr is a terminal.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from accullm_cli.progress import SHOWN, Event, Pace, alike
from accullm_cli.units import duration, size

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from accullm_cli.measure.result import Estimate, Report, Speed
    from accullm_cli.pipeline import DryRun

JSON_SCHEMA_VERSION = 1
# Seconds after which a log that is no terminal hears of a stage that is still at work. The docs promise 30: this leaves
# some for a thread that is scheduled late. Continuous integration takes a job that is silent for minutes for dead.
PATIENCE = 25.0


class Console:
    """One command's output. `progress` is the callback that the stages call.

    quiet: nothing but errors; verbose: a line for every step, and tracebacks of faults.
    patience: seconds of silence after which `still_at_work` is called, by a thread of its own.
    """

    def __init__(
        self,
        stderr: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        patience: float = PATIENCE,
    ) -> None:
        self._stderr = stderr or sys.stderr
        self._clock = clock
        self._patience = patience
        self._paces: dict[str, Pace] = {}
        self._records: dict[str, dict[str, int]] = {}  # by stage, how many of each kind
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._printing = threading.RLock()
        self._last_line = clock()
        self._ended = threading.Event()
        self._watch: threading.Thread | None = None
        self.quiet = False
        self.verbose = False

    # -- lines -------------------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """A line (or table) on stderr, above the progress bars where there are any; nothing when quiet."""
        if self.quiet:
            return
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            with self._printing:
                self._last_line = self._clock()
                print(text, file=self._stderr, flush=True)

    def error(self, line: str) -> None:
        """The one line of an error."""
        self.close()
        print(f"{self._styled('error:', '31;1')} {line}", file=self._stderr, flush=True)

    def _styled(self, text: str, code: str) -> str:
        # https://no-color.org: set and not empty means no colour.
        colourful = self._stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        return f"\x1b[{code}m{text}\x1b[0m" if colourful else text

    # -- progress ----------------------------------------------------------------------------------------

    def progress(self, event: Event) -> None:
        """Draw one event: bars on a terminal, else a line for what begins, ends or is skipped."""
        if self.quiet:
            return
        if event.kind == "record":
            self._record(event)
        elif event.kind == "start":
            self._paces[event.stage] = Pace(self._clock())
            self.note(f"{event.stage}: runs" + (f", {event.reason}" if event.reason else ""))
            self._open_bar(event)
            self._watch_over_silence()
        elif event.kind == "end":
            now = self._clock()
            pace = self._paces.pop(event.stage, Pace(now))
            self._move_bar(event, finished=True)
            self._say_what_was_left_out(event.stage)
            self.note(f"{event.stage}: done in {duration(now - pace.started)}")
        elif event.kind == "skip" and not event.label:
            self.note(f"{event.stage}: {event.reason or 'up to date'}")
        else:
            if event.stage in self._paces:
                self._paces[event.stage].advance(event, self._clock())
            self._move_bar(event)
            if self.verbose:
                self.note(self._step_line(event))

    def _record(self, event: Event) -> None:
        """A line for each record, but of many that are alike the first few alone."""
        of_stage = self._records.setdefault(event.stage, {})
        of_stage[alike(event.label)] = number = of_stage.get(alike(event.label), 0) + 1
        if number <= SHOWN or self.verbose:
            self.note(f"{event.stage}: note: {event.label}")

    def _say_what_was_left_out(self, stage: str) -> None:
        left_out = sum(max(count - SHOWN, 0) for count in self._records.pop(stage, {}).values())
        if left_out and not self.verbose:
            self.note(f"{stage}: note: {left_out} more like these; --verbose prints all, and the report lists them")

    def _step_line(self, event: Event) -> str:
        why = f": {event.reason}" if event.reason else ": up to date" if event.kind == "skip" else ""
        return f"{event.stage}: {_how_far(event) or 'step'}{why}"

    # -- a log -------------------------------------------------------------------------------------------

    def still_at_work(self) -> None:
        """Where nothing was printed for as long as patience lasts: a line on the stage that runs, and how far it is."""
        with self._printing:
            now = self._clock()
            if not self._paces or now - self._last_line < self._patience:
                return
            stage, pace = list(self._paces.items())[-1]  # a search is at work as long as the stages in it
            left = pace.seconds_left(now)
            parts = [_how_far(pace.step)] if pace.step else []
            parts.append(f"{duration(now - pace.started)} so far")
            parts.append("time left not known" if left is None else f"about {duration(left)} left")
            self.note(f"{stage}: {', '.join(parts)}")

    def _watch_over_silence(self) -> None:
        """Begin to call `still_at_work`, unless there are bars, which move."""
        if self._bars is None and self._watch is None:
            self._ended.clear()
            self._watch = threading.Thread(target=self._call_when_silent, name="progress", daemon=True)
            self._watch.start()

    def _call_when_silent(self) -> None:
        while not self._ended.wait(max(self._last_line + self._patience - self._clock(), self._patience / 250)):
            try:
                self.still_at_work()
            except (OSError, ValueError):  # nobody reads any more
                return

    # -- bars --------------------------------------------------------------------------------------------

    def _open_bar(self, event: Event) -> None:
        if not self._stderr.isatty() or os.environ.get("TERM") == "dumb":
            return
        if self._bars is None:
            self._bars = _new_bars(self._stderr)
            self._bars.start()
        self._tasks[event.stage] = self._bars.add_task(event.stage, total=event.total or None, step="")

    def _move_bar(self, event: Event, finished: bool = False) -> None:
        if self._bars is None or event.stage not in self._tasks:
            return
        if finished:
            # The line "done in" stays on the screen in the bar's place.
            self._bars.remove_task(self._tasks.pop(event.stage))
            return
        self._bars.update(
            self._tasks[event.stage], completed=event.done, total=event.total or None, step=event.label, refresh=True
        )

    def close(self) -> None:
        """Take the bars off the screen and end the watch over silence; safe to call twice."""
        if self._watch is not None:
            self._ended.set()
            self._watch.join(timeout=1)  # longer, if nobody reads what it writes
            self._watch = None
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            self._tasks.clear()

    # -- the report --------------------------------------------------------------------------------------

    def report(self, report: Report) -> None:
        """The table of a finished conversion or validation."""
        self.close()
        self.note("\n" + report_text(report, self._verdict))

    def _verdict(self, met: bool) -> str:
        return self._styled("met", "32") if met else self._styled("NOT MET", "31;1")


def _how_far(step: Event) -> str:
    """ "block 12/30", or "the artifact (1/2)"."""
    count = f"{step.done}/{step.total}"
    return step.label if not step.total or count in step.label else f"{step.label} ({count})".strip()


def _new_bars(stderr: TextIO) -> Bars:
    from rich.console import Console as RichConsole
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description:<10}", markup=False),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[step]}", markup=False),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=RichConsole(file=stderr),
        transient=True,
        # Blocks take seconds to minutes each: rich's default of 30 s would see one or none of them.
        speed_estimate_period=600,
    )


# -- text --------------------------------------------------------------------------------------------------


def report_text(report: Report, verdict: Callable[[bool], str] = lambda met: "met" if met else "NOT MET") -> str:
    """A report as aligned lines: what it is, how large, how faithful, and the contract clause by clause."""
    fidelity = report.fidelity
    floor = fidelity.mean_kl_floor
    rows = [
        ("model", report.model),
        ("format", report.format),
        ("bits per weight", f"{report.bits_per_weight:.3f}"),
        (
            "size",
            f"{size(report.artifact_bytes)} ({report.artifact_bytes / max(report.source_bytes, 1):.1%} of "
            f"{size(report.source_bytes)})",
        ),
        ("perplexity, original", _estimate(fidelity.perplexity_original, "{:.3f}")),
        ("perplexity, artifact", _estimate(fidelity.perplexity, "{:.3f}")),
        ("mean KL", f"{_estimate(fidelity.mean_kl, '{:.5f}')} nats; noise floor {floor.value:.2g}"),
        ("KL, 99th percentile", f"{_estimate(fidelity.kl_p99, '{:.4f}')} nats"),
        ("KL, 99.9th percentile", f"{_estimate(fidelity.kl_p999, '{:.4f}')} nats"),
        ("KL, maximum", f"{fidelity.kl_max:.4f} nats"),
        ("top-1 agreement", _estimate(fidelity.top1_agreement, "{:.2%}")),
        ("measured on", f"{fidelity.tokens} tokens: {fidelity.text}"),
    ]
    if fidelity.arithmetic != "float32":
        rows.append(("computed in", fidelity.arithmetic))
    if report.other is not None:
        other = report.other
        rows += [
            ("mean KL, other text", f"{_estimate(other.mean_kl, '{:.5f}')} nats"),
            ("top-1, other text", _estimate(other.top1_agreement, "{:.2%}")),
            ("the other text", f"{other.tokens} tokens: {other.text}"),
        ]
    if report.speed is not None:
        rows += _speed_rows(report.speed)
    rows += [
        (f"require {clause.text}", f"{verdict(clause.met)} (measured {clause.measured:.6g})")
        for clause in report.contract
    ]
    if report.records:
        rows.append(("notes", f"{len(report.records)}, listed in the report"))
    rows.append(("artifact", report.artifact))
    if report.directory:
        rows.append(("report", str(Path(report.directory) / "report.html")))
    return text_table(rows)


def _speed_rows(speed: Speed) -> list[tuple[str, str]]:
    return [
        (f"prefill, {speed.prompt_tokens} tokens", _speed(speed.artifact.prefill, speed.original.prefill)),
        (f"decode, {speed.decoded_tokens} tokens", _speed(speed.artifact.decode, speed.original.decode)),
        ("engine of prefill", speed.prefill_engine),
        ("engine of decode", speed.decode_engine),
        ("timed on", f"{speed.device}, {speed.dtype}"),
    ]


def _speed(artifact: float, original: float) -> str:
    return f"{artifact:.4g} tokens/s; original {original:.4g} ({artifact / original:.3g} times)"


def _estimate(estimate: Estimate, form: str) -> str:
    """A figure with its 95% confidence interval."""
    low, high = form.format(estimate.low), form.format(estimate.high)
    return f"{form.format(estimate.value)} [{low} to {high}]"


def text_table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
    """Rows as columns aligned by spaces; the last column is as long as it needs to be."""
    lines = [list(header), *map(list, rows)] if header else [list(row) for row in rows]
    if not lines:
        return ""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def dry_run_text(planned: DryRun) -> str:
    """A dry run, as far as it knows: "at most" stands before a size that calibration will decide.

    Several artifacts are a table; of one, the lines above it say everything.
    """
    content = _fields(planned)
    at_most = "" if content.pop("size_is_exact") else "at most "

    def sized(fields: dict[str, Any]) -> dict[str, Any]:
        sizes = {name: at_most + _cell(name, fields[name]) for name in ("bits_per_weight", "artifact_bytes")}
        return {**fields, **sizes}

    if len(planned.artifacts) == 1:
        del content["artifacts"]
        return render(sized(content))
    del content["bits_per_weight"], content["artifact_bytes"]
    content["artifacts"] = [sized(_fields(artifact)) for artifact in planned.artifacts]
    return render(content)


def render(value: object) -> str:
    """Any result as text: a dataclass as `name  value` lines with its tuples of dataclasses as tables below."""
    if isinstance(value, tuple):
        return _render_tuple(value)
    rows: list[tuple[str, str]] = []
    below: list[str] = []
    for name, content in _fields(value).items():
        if isinstance(content, (tuple, list)) and content:
            below.append(f"{_words(name)}:\n{_indent(_render_tuple(tuple(content)))}")
        elif (dataclasses.is_dataclass(content) or isinstance(content, Mapping)) and content:
            below.append(f"{_words(name)}:\n{_indent(render(content))}")
        else:
            rows.append((_words(name), _cell(name, content)))
    return "\n\n".join(part for part in (text_table(rows), *below) if part)


def _render_tuple(values: tuple[Any, ...]) -> str:
    if not values:
        return "none"
    first = values[0]
    if dataclasses.is_dataclass(first) or isinstance(first, Mapping):
        names = list(_fields(first))
        rows = [[_cell(name, _fields(value)[name]) for name in names] for value in values]
        return text_table(rows, [_words(name) for name in names])
    if isinstance(first, (tuple, list)):
        return text_table([[_cell("", cell) for cell in value] for value in values])
    return "\n".join(_cell("", value) for value in values)


def _fields(value: object) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {str(name): content for name, content in value.items()}
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"{type(value).__name__} is neither a dataclass nor a mapping")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" if line else "" for line in text.splitlines())


def _cell(name: str, value: object) -> str:
    """A scalar as text; the field's name says its unit."""
    if value is None or value == () or value == [] or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and (name.endswith("bytes") or name == "size"):
        return size(value)
    if isinstance(value, (int, float)) and name.endswith("seconds"):
        return duration(value)
    if isinstance(value, float):
        return f"{value:.3f}" if name.endswith("bits_per_weight") else f"{value:.4g}"
    if isinstance(value, (tuple, list)):
        return ", ".join(_cell("", item) for item in value)
    return str(value)


# -- JSON --------------------------------------------------------------------------------------------------


def json_text(**content: object) -> str:
    """One JSON object, `schema_version` first; what JSON cannot hold (NaN, infinities) is null."""
    return json.dumps({"schema_version": JSON_SCHEMA_VERSION, **plain(content)}, indent=1)


def plain(value: object) -> Any:
    """A value as what JSON knows."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value):
        return {name: plain(content) for name, content in _fields(value).items()}
    if isinstance(value, Mapping):
        return {str(name): plain(content) for name, content in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, (str, int)) or value is None:
        return value
    return str(value)
