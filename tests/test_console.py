"""What the user sees: lines on a pipe, bars on a terminal, tables that never wrap, JSON that is JSON."""

from __future__ import annotations

import dataclasses
import io
import json
import time
from dataclasses import dataclass, replace

import pytest

from accullm_cli.console import PATIENCE, Console, json_text, plain, render, report_text, text_table
from accullm_cli.measure.fidelity import divergence_found, divergence_found_elsewhere, speed_found
from accullm_cli.measure.result import Clause, Report
from accullm_cli.progress import Event, alike, grouped
from accullm_cli.run import UP_TO_DATE, Reason
from tests.samples import FIDELITY, SPEED, a_report, measuring


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines_of(*events: Event, **settings: bool) -> list[str]:
    stream = io.StringIO()
    now = 0.0
    console = Console(stream, clock=lambda: now)
    for name, value in settings.items():
        setattr(console, name, value)
    for event in events:
        now += 75.0 if event.kind == "end" else 0.0
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


def records(count: int) -> list[Event]:
    sentences = [f"model.layers.{number}.up_proj: damping {number / 10} instead of 0.01" for number in range(count)]
    return [Event("quantize", "record", sentence) for sentence in [*sentences, "a dead feature in block 3"]]


def test_of_many_records_that_are_alike_the_first_few_are_printed():
    lines = lines_of(Event("quantize", "start"), *records(10), Event("quantize", "end"))
    assert lines == [
        "quantize: runs",
        "quantize: note: model.layers.0.up_proj: damping 0.0 instead of 0.01",
        "quantize: note: model.layers.1.up_proj: damping 0.1 instead of 0.01",
        "quantize: note: model.layers.2.up_proj: damping 0.2 instead of 0.01",
        "quantize: note: model.layers.3.up_proj: damping 0.3 instead of 0.01",
        "quantize: note: a dead feature in block 3",
        "quantize: note: 6 more like these; --verbose prints all, and the report lists them",
        "quantize: done in 1 min 15 s",
    ]


def test_verbose_prints_all_records():
    lines = lines_of(Event("quantize", "start"), *records(10), Event("quantize", "end"), verbose=True)
    assert len(lines) == 1 + 11 + 1


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("h.0.up: damping 0.1", "h.11.down: damping 1e-05", True),
        ("plan 1: 4.5 bits", "plan 12: 4.25 bits", True),
        ("expert 3 of model.layers.0 was never reached", "expert 3 of model.layers.0 was reached once", False),
    ],
)
def test_records_are_alike_that_differ_in_names_and_numbers_alone(one, other, same):
    assert (alike(one) == alike(other)) == same
    assert grouped([one, other, one]) == ([[one, other, one]] if same else [[one, one], [other]])


# -- a log that would be silent ----------------------------------------------------------------------------


class Log:
    """A console on a pipe, and the time as the test sets it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.stream = io.StringIO()
        self.console = Console(self.stream, clock=lambda: self.now, patience=30)

    def at(self, now: float, *events: Event) -> str | None:
        """The line, if any, that the console writes at a time by itself, after these events."""
        self.now = now
        for event in events:
            self.console.progress(event)
        said = len(self.stream.getvalue())
        self.console.still_at_work()
        return self.stream.getvalue()[said:].rstrip("\n") or None


@pytest.fixture
def log():
    log = Log()
    yield log
    log.console.close()


def block(done: int, total: int = 4, reason: Reason | None = None) -> Event:
    return Event("quantize", "step", f"block {done}/{total}", reason, done, total)


def test_a_log_hears_of_a_long_stage_every_thirty_seconds(log):
    assert log.at(0, Event("quantize", "start")) is None
    assert log.at(29) is None
    assert log.at(30) == "quantize: 30 s so far, time left not known"
    assert log.at(40, block(1)) is None
    assert log.at(60) == "quantize: block 1/4, 1 min 00 s so far, about 1 min 40 s left"
    assert log.at(89) is None
    assert log.at(90, block(2)) == "quantize: block 2/4, 1 min 30 s so far, about 1 min 30 s left"


def test_a_block_that_takes_longer_than_those_before_leaves_those_behind_it(log):
    log.at(0, Event("quantize", "start"))
    log.at(10, block(1))
    assert log.at(500) == "quantize: block 1/4, 8 min 20 s so far, about 20 s left"


def test_blocks_of_an_earlier_run_are_no_measure_of_time(log):
    log.at(0, Event("quantize", "start"), block(1, reason=UP_TO_DATE), block(2, reason=UP_TO_DATE))
    assert log.at(30) == "quantize: block 2/4, 30 s so far, time left not known"
    assert log.at(60, block(3)) == "quantize: block 3/4, 1 min 00 s so far, about 1 min 00 s left"


def test_what_is_counted_after_the_blocks_is_timed_for_itself(log):
    log.at(0, Event("calibrate", "start"))
    log.at(100, Event("calibrate", "step", "block 2/2", Reason("new"), 2, 2))
    line = log.at(130, Event("calibrate", "step", "gradient 1/2", Reason("new"), 1, 2))
    assert line == "calibrate: gradient 1/2, 2 min 10 s so far, about 30 s left"


def test_work_behind_the_last_block_is_not_said_to_be_over(log):
    log.at(0, Event("quantize", "start"))
    assert log.at(40, block(4)) == "quantize: block 4/4, 40 s so far, time left not known"


def test_a_step_without_its_count_in_its_name_gets_it(log):
    log.at(0, Event("speed", "start"))
    line = log.at(31, Event("speed", "step", "the original", None, 1, 2))
    assert line == "speed: the original (1/2), 31 s so far, about 31 s left"


def test_of_two_stages_the_inner_one_is_told_and_a_finished_one_no_more(log):
    log.at(0, Event("search", "start"), Event("quantize", "start"))
    assert log.at(30) == "quantize: 30 s so far, time left not known"
    log.at(40, Event("quantize", "end"))
    assert log.at(70) == "search: 1 min 10 s so far, time left not known"
    log.at(80, Event("search", "end"))
    assert log.at(1000) is None


def test_any_other_line_is_as_good_as_one_on_the_stage(log):
    log.at(0, Event("quantize", "start"))
    assert log.at(25, Event("quantize", "record", "damped")) is None
    assert log.at(54) is None


def test_a_quiet_log_stays_silent(log):
    log.console.quiet = True
    assert log.at(0, Event("quantize", "start")) is None
    assert log.at(60) is None


def lines_while_a_stage_sleeps(stream: io.StringIO) -> str:
    console = Console(stream, patience=0.05)
    console.progress(Event("quantize", "start"))
    deadline = time.monotonic() + 20
    while "so far" not in stream.getvalue() and time.monotonic() < deadline and not stream.isatty():
        time.sleep(0.01)
    time.sleep(0.2 if stream.isatty() else 0)
    console.close()
    written = stream.getvalue()
    time.sleep(0.2)
    assert stream.getvalue() == written
    return written


def test_the_line_comes_while_the_stage_itself_says_nothing_and_no_more_after_the_end():
    assert "quantize: 0." in lines_while_a_stage_sleeps(io.StringIO())


def test_a_console_is_less_patient_than_the_docs_promise():
    assert PATIENCE <= 25


def test_bars_that_move_need_no_such_line(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "so far" not in lines_while_a_stage_sleeps(Terminal())


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
    report = dataclasses.replace(a_report(()), directory="out/name-int4.run/report")
    assert report_text(report).splitlines() == [
        "model                  owner/name",
        "format                 accullm",
        "bits per weight        4.402",
        "size                   113 MB (42.0% of 269 MB)",
        "perplexity, original   15.610 [14.000 to 17.000]",
        "perplexity, artifact   16.400 [14.900 to 18.100]",
        "mean KL                0.06640 [0.05000 to 0.08300] nats; noise floor 3.3e-05",
        "KL, 99th percentile    0.6100 [0.5000 to 0.7200] nats",
        "KL, 99.9th percentile  1.4000 [1.1000 to 1.9000] nats",
        "KL, maximum            2.2500 nats",
        "top-1 agreement        84.59% [81.27% to 87.40%]",
        "measured on            1536 tokens: default",
        "artifact               out/name-int4",
        "report                 out/name-int4.run/report/report.html",
    ]


def test_the_report_says_where_an_artifact_was_not_run_in_float32():
    report = a_report(())
    assert "computed in" not in report_text(report)
    on_gpu = divergence_found(dataclasses.replace(FIDELITY, arithmetic="bfloat16 on Some GPU"))
    assert "computed in            bfloat16 on Some GPU\n" in report_text(measuring(report, on_gpu))


def test_the_report_gives_the_verdict_clause_by_clause():
    met = Clause("mean_kl<=0.07", "mean_kl", "<=", 0.07, 0.06612, True)
    missed = Clause("kl_max<=1", "kl_max", "<=", 1.0, 3.25, False)
    text = report_text(a_report((met, missed), records=("a", "b")))
    assert "require mean_kl<=0.07  met (measured 0.06612)\n" in text
    assert "require kl_max<=1      NOT MET (measured 3.25)\n" in text
    assert "notes                  2, listed in the report\n" in text


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
    assert text_table([["a", "b" * 300], ["cc", "d"]]).splitlines() == ["a   " + "b" * 300, "cc  d"]


# -- JSON --------------------------------------------------------------------------------------------------


def test_json_is_one_versioned_object_and_strict():
    unbounded = dataclasses.replace(FIDELITY, kl_histogram=((0.1, 7000), (float("inf"), 1176)))
    report = measuring(a_report(), divergence_found(unbounded))
    content = json.loads(json_text(reports=(report,)), parse_constant=lambda name: pytest.fail(name))
    assert content["schema_version"] == 1
    [written] = content["reports"]
    [measured] = written["measurements"]
    estimates = {figure["name"]: figure["estimate"] for figure in measured["figures"]}
    assert estimates["mean_kl"] == {"value": 0.0664, "low": 0.05, "high": 0.083}
    assert measured["histograms"][0]["bins"] == [[0.1, 7000], [None, 1176]]
    assert written.keys() == {field.name for field in dataclasses.fields(Report)}


def test_what_json_does_not_know_is_text():
    assert plain({1: Reason("new"), "none": None}) == {"1": {"code": "new", "detail": ""}, "none": None}


def test_speed_has_lines_of_its_own() -> None:
    text = " ".join(report_text(measuring(a_report(), speed_found(SPEED))).split())
    assert (
        "prefill, 512 tokens 220 tokens/s; original 400 (0.55 times) "
        "decode, 32 tokens 25 tokens/s; original 20 (1.25 times) "
        "engine of prefill torch: dequantize, then multiply (210 linears) "
        "engine of decode CPU: packed 4-bit (210 linears) "
        "timed on CPU with AVX512, 2 threads, float32 require"
    ) in text
    assert "tokens/s" not in report_text(a_report())


def test_the_other_text_has_lines_of_its_own() -> None:
    other = replace(FIDELITY, text="C++ headers", tokens=77)
    text = " ".join(report_text(measuring(a_report(), divergence_found_elsewhere("other text", other))).split())
    assert "mean KL, other text 0.06640 [0.05000 to 0.08300] nats top-1, other text" in text
    assert "the other text 77 tokens: C++ headers require" in text
    assert "other text" not in report_text(a_report())
