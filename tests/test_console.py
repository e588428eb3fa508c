"""What the user sees: lines on a pipe, bars on a terminal, tables that never wrap, JSON that is JSON."""

from __future__ import annotations

import dataclasses
import io
import json
from dataclasses import dataclass

import pytest

from accullm_cli.console import Console, plain, render, report_text, table, to_json
from accullm_cli.measure.result import Clause, Estimate, Fidelity, Report
from accullm_cli.progress import Event
from accullm_cli.run import UP_TO_DATE, Reason


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def a_report(artifact: str = "work/m-int4", clauses: tuple[Clause, ...] = (), records: tuple[str, ...] = ()) -> Report:
    fidelity = Fidelity(
        text="default",
        windows=16,
        tokens=8176,
        perplexity_original=Estimate(12.0, 11.0, 13.0),
        perplexity=Estimate(12.5, 11.5, 13.5),
        mean_kl=Estimate(0.06612, 0.061, 0.072),
        kl_p99=Estimate(0.5, 0.4, 0.6),
        kl_p999=Estimate(1.5, 1.0, 2.0),
        kl_max=3.25,
        top1_agreement=Estimate(0.912, 0.9, 0.92),
        mean_kl_floor=Estimate(3.4e-5, 3e-5, 4e-5),
        kl_of_window=(0.05, 0.08),
        kl_histogram=((0.1, 7000), (float("inf"), 1176)),
    )
    return Report(
        schema_version=1,
        model="work/m",
        source_sha256="00",
        artifact=artifact,
        format="accullm",
        artifact_sha256="11",
        bits_per_weight=4.4,
        artifact_bytes=130_000_000,
        source_bytes=270_000_000,
        fidelity=fidelity,
        contract=clauses,
        contract_met=all(clause.met for clause in clauses),
        records=records,
        stages=(),
        linears=(),
        versions={"torch": "2.13.0"},
    )


def lines_of(*events: Event, **settings: bool) -> list[str]:
    stream = io.StringIO()
    times = iter(range(0, 1000, 75))
    console = Console(stream, clock=lambda: next(times))
    for name, value in settings.items():
        setattr(console, name, value)
    for event in events:
        console.progress(event)
    console.close()
    return stream.getvalue().splitlines()


STAGES = (
    Event("calibrate", "skip", reason=UP_TO_DATE),
    Event("quantize", "start", reason=Reason("config changed", "plan.bits"), total=2),
    Event("quantize", "step", "block 0", Reason("new"), done=1, total=2),
    Event("quantize", "skip", "block 1", UP_TO_DATE, done=2, total=2),
    Event("quantize", "record", "layers.1.down_proj: damping 0.1 instead of 0.01"),
    Event("quantize", "end"),
)


# -- progress on a pipe ------------------------------------------------------------------------------------


def test_a_pipe_gets_one_line_when_a_stage_is_skipped_begins_or_ends():
    assert lines_of(*STAGES) == [
        "calibrate: up to date",
        "quantize: runs, config changed (plan.bits)",
        "quantize: note: layers.1.down_proj: damping 0.1 instead of 0.01",
        "quantize: done in 1 min 15 s",
    ]


def test_verbose_adds_a_line_for_every_step():
    assert lines_of(*STAGES, verbose=True)[2:4] == [
        "quantize: block 0 (1/2): new",
        "quantize: block 1 (2/2): up to date",
    ]


def test_quiet_says_nothing():
    assert lines_of(*STAGES, quiet=True) == []


def test_a_stage_that_ends_without_having_begun_is_drawn_all_the_same():
    assert lines_of(Event("export", "end")) == ["export: done in 0.0 s"]


def test_a_pipe_gets_no_escape_codes(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    console = Console(stream)
    for event in STAGES:
        console.progress(event)
    console.report(a_report())
    console.error("broken")
    assert "\x1b" not in stream.getvalue()


# -- a terminal --------------------------------------------------------------------------------------------


def on_a_terminal(monkeypatch, **environment: str) -> str:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = Terminal()
    console = Console(stream)
    for event in STAGES[:4]:
        console.progress(event)
    console.close()
    console.error("broken")
    return stream.getvalue()


def test_a_terminal_gets_a_bar_with_stage_step_count_and_times(monkeypatch):
    drawn = on_a_terminal(monkeypatch)
    for part in ("quantize", "block 0", "1/2", "elapsed", "left", "━"):
        assert part in drawn
    assert "\x1b[31;1merror:\x1b[0m broken" in drawn


def test_no_color_is_respected(monkeypatch):
    drawn = on_a_terminal(monkeypatch, NO_COLOR="1")
    assert "error: broken" in drawn
    assert "\x1b[3" not in drawn.replace("\x1b[?25", "")


def test_a_dumb_terminal_gets_lines(monkeypatch):
    assert "\x1b" not in on_a_terminal(monkeypatch, TERM="dumb")


def test_a_line_longer_than_the_terminal_is_not_wrapped(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    console = Console(stream)
    console.progress(STAGES[1])
    path = "/a/" + "long/" * 30 + "path [bold]"
    console.note(path)
    console.close()
    assert path in stream.getvalue()


# -- the report --------------------------------------------------------------------------------------------


def test_the_report_shows_every_figure_with_its_interval():
    report = dataclasses.replace(a_report(), directory="work/m.run/report")
    assert report_text(report).splitlines() == [
        "model                  work/m",
        "format                 accullm",
        "bits per weight        4.400",
        "size                   130 MB (48.1% of 270 MB)",
        "perplexity, original   12.000 [11.000 to 13.000]",
        "perplexity, artifact   12.500 [11.500 to 13.500]",
        "mean KL                0.06612 [0.06100 to 0.07200] nats; noise floor 3.4e-05",
        "KL, 99th percentile    0.5000 [0.4000 to 0.6000] nats",
        "KL, 99.9th percentile  1.5000 [1.0000 to 2.0000] nats",
        "KL, maximum            3.2500 nats",
        "top-1 agreement        91.20% [90.00% to 92.00%]",
        "measured on            8176 tokens: default",
        "artifact               work/m-int4",
        "report                 work/m.run/report/report.html",
    ]


def test_the_report_gives_the_verdict_clause_by_clause():
    met = Clause("mean_kl<=0.07", "mean_kl", "<=", 0.07, 0.06612, True)
    missed = Clause("kl_max<=1", "kl_max", "<=", 1.0, 3.25, False)
    text = report_text(a_report(clauses=(met, missed), records=("a", "b")))
    assert "require mean_kl<=0.07  met (measured 0.06612)\n" in text
    assert "require kl_max<=1      NOT MET (measured 3.25)\n" in text
    assert "notes                  2 (treated otherwise than planned; see the report)\n" in text


# -- tables ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    name: str
    bits: int
    stored_bytes: int
    error: float | None


@dataclass(frozen=True)
class Found:
    path: str
    healthy: bool
    total_seconds: float
    layers: tuple[Layer, ...]
    problems: tuple[str, ...]
    versions: dict[str, str]
    pairs: tuple[tuple[str, int], ...]


FOUND = Found(
    path="a/b",
    healthy=True,
    total_seconds=0.25,
    layers=(Layer("q_proj", 4, 1500, 0.01234567), Layer("o", 16, 2_000_000, None)),
    problems=(),
    versions={"torch": "2.13"},
    pairs=(("x", 1), ("long", 22)),
)


def test_any_dataclass_is_drawn_as_values_and_tables():
    assert render(FOUND).splitlines() == [
        "path           a/b",
        "healthy        yes",
        "total seconds  0.2 s",
        "problems       -",
        "",
        "layers:",
        "  name    bits  stored bytes  error",
        "  q_proj  4     1.5 kB        0.01235",
        "  o       16    2 MB          -",
        "",
        "versions:",
        "  torch  2.13",
        "",
        "pairs:",
        "  x     1",
        "  long  22",
    ]


def test_a_tuple_of_dataclasses_is_one_table_and_an_empty_one_says_so():
    assert render(FOUND.layers).startswith("name    bits")
    assert render(()) == "none"


def test_what_is_not_a_result_is_refused():
    with pytest.raises(TypeError, match="int is neither a dataclass nor a mapping"):
        render(7)


def test_a_table_is_as_wide_as_its_cells():
    assert table([["a", "b" * 300], ["cc", "d"]]).splitlines() == ["a   " + "b" * 300, "cc  d"]


# -- JSON --------------------------------------------------------------------------------------------------


def test_json_is_one_versioned_object_and_strict():
    content = json.loads(to_json(reports=(a_report(),)), parse_constant=lambda name: pytest.fail(name))
    assert content["schema_version"] == 1
    [report] = content["reports"]
    assert report["fidelity"]["mean_kl"] == {"value": 0.06612, "low": 0.061, "high": 0.072}
    assert report["fidelity"]["kl_histogram"] == [[0.1, 7000], [None, 1176]]
    assert report.keys() == {field.name for field in dataclasses.fields(Report)}


def test_what_json_does_not_know_is_text():
    assert plain({1: Reason("new"), "none": None}) == {"1": {"code": "new", "detail": ""}, "none": None}
