"""Running one stage as part of a run: decided, told, timed, put on record; or refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from accullm_cli.config import Calibration, Config
from accullm_cli.errors import AccullmError
from accullm_cli.model.source import ModelSource
from accullm_cli.progress import Event
from accullm_cli.run import Reason, RunDirectory
from accullm_cli.stages.job import Job, Work, machine_inputs, run_stage, section_inputs, versions

SOURCE = ModelSource("tiny", "/models/tiny", Path("/models/tiny"), {}, {}, (), "0" * 64, 0, ())


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def job(tmp_path: Path, events: list[Event]) -> Iterator[Job]:
    run = RunDirectory(tmp_path / "run")
    with run.locked():
        yield Job(Config(model="tiny"), run, SOURCE, events.append)


def only(job: Job, stage: str) -> Job:
    return Job(job.config, job.run, job.source, job.progress, stage)


class Worker:
    """Writes one file, and remembers why."""

    def __init__(self, path: Path, records: tuple[str, ...] = ()) -> None:
        self.path, self.records = path, records
        self.reasons: list[Reason] = []

    def __call__(self, reason: Reason) -> Work:
        self.reasons.append(reason)
        self.path.write_text(f"{len(self.reasons)}")
        return Work((self.path,), self.records)


def test_a_new_stage_runs_and_is_on_record(job: Job, events: list[Event]) -> None:
    work = Worker(job.run.file("a.txt"), ("something was different",))
    outcome = run_stage(job, "profile", {"config:plan.bits": "4"}, False, work)
    assert (outcome.name, outcome.reason) == ("profile", Reason("new"))
    record = job.run.stages()["profile"]
    assert outcome.record == record
    assert record.inputs == {"config:plan.bits": "4"}
    assert record.outputs == {"a.txt": hashlib.sha256(b"1").hexdigest()}
    assert record.records == ["something was different"]
    assert record.versions == versions()
    assert record.seconds >= 0
    assert record.peak_bytes > 10_000_000
    assert [(event.stage, event.kind, event.label) for event in events] == [
        ("profile", "start", ""),
        ("profile", "record", "something was different"),
        ("profile", "end", ""),
    ]


def test_a_finished_stage_is_skipped_with_its_record(job: Job, events: list[Event]) -> None:
    work = Worker(job.run.file("a.txt"))
    first = run_stage(job, "profile", {"config:plan.bits": "4"}, False, work)
    events.clear()
    second = run_stage(job, "profile", {"config:plan.bits": "4"}, False, work)
    assert len(work.reasons) == 1
    assert second.reason == Reason("up to date")
    assert second.record == first.record
    assert [(event.kind, str(event.reason)) for event in events] == [("skip", "up to date")]


@pytest.mark.parametrize(
    ("inputs", "force", "lose", "reason"),
    [
        ({"config:plan.bits": "3"}, False, False, "config changed (plan.bits)"),
        ({"config:plan.bits": "4"}, True, False, "forced"),
        ({"config:plan.bits": "4"}, False, True, "output missing (a.txt)"),
    ],
)
def test_a_stage_runs_again_and_says_why(
    inputs: dict[str, str], force: bool, lose: bool, reason: str, job: Job, events: list[Event]
) -> None:
    work = Worker(job.run.file("a.txt"))
    run_stage(job, "profile", {"config:plan.bits": "4"}, False, work)
    if lose:
        work.path.unlink()
    events.clear()
    outcome = run_stage(job, "profile", inputs, force, work)
    assert (str(outcome.reason), str(work.reasons[1]), str(events[0].reason)) == (reason, reason, reason)
    assert job.run.stages()["profile"].outputs == {"a.txt": hashlib.sha256(b"2").hexdigest()}


def test_a_stage_that_fails_is_not_on_record(job: Job, events: list[Event]) -> None:
    def fail(reason: Reason) -> Work:
        raise AccullmError("no")

    with pytest.raises(AccullmError):
        run_stage(job, "profile", {}, False, fail)
    assert job.run.stages() == {}
    assert [event.kind for event in events] == ["start"]


@pytest.mark.parametrize(
    ("finished", "line"),
    [
        (False, "{run}: calibrate has not run; run accullm calibrate with the same options first"),
        (
            True,
            "{run}: calibrate is not up to date: config changed (x); run accullm calibrate with the same options first",
        ),
    ],
)
def test_alone_a_stage_does_not_run_those_before_it(finished: bool, line: str, job: Job) -> None:
    work = Worker(job.run.file("a.txt"))
    if finished:
        run_stage(job, "calibrate", {"config:x": "1"}, False, work)
    before = len(work.reasons)
    with pytest.raises(AccullmError) as refusal:
        run_stage(only(job, "profile"), "calibrate", {"config:x": "2"}, False, work)
    assert refusal.value.line() == line.format(run=job.run.path)
    assert len(work.reasons) == before


def test_alone_a_stage_forces_itself_and_nothing_before_it(job: Job) -> None:
    before, itself = Worker(job.run.file("a.txt")), Worker(job.run.file("b.txt"))
    run_stage(job, "calibrate", {}, False, before)
    run_stage(job, "profile", {}, False, itself)
    alone = only(job, "profile")
    assert run_stage(alone, "calibrate", {}, True, before).reason == Reason("up to date")
    assert run_stage(alone, "profile", {}, True, itself).reason == Reason("forced")


def test_validate_alone_may_run_for_every_format(job: Job) -> None:
    alone = only(job, "validate")
    assert [alone.may_run(name) for name in ("validate accullm", "validate compressed-tensors")] == [True, True]
    assert not alone.may_run("export")


def test_outputs_elsewhere_are_named_in_full(job: Job, tmp_path: Path) -> None:
    run_stage(job, "export", {}, False, Worker(tmp_path / "elsewhere.txt"))
    assert list(job.run.stages()["export"].outputs) == [str(tmp_path / "elsewhere.txt")]


def test_a_section_gives_an_input_for_each_field() -> None:
    values = Calibration(text="a.txt", samples=3, seq_len=16)
    assert section_inputs("calibration", values) == {
        "config:calibration.text": "'a.txt'",
        "config:calibration.samples": "3",
        "config:calibration.seq_len": "16",
        "config:calibration.gradient_samples": "None",
    }
    assert section_inputs("calibration", values, "samples") == {"config:calibration.samples": "3"}


def test_the_number_of_threads_is_an_input() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = machine_inputs()
        torch.set_num_threads(1)
        one = machine_inputs()
    finally:
        torch.set_num_threads(before)
    assert {name for name in one if one[name] != two[name]} == {"machine:threads"}
