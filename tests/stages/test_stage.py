"""Stages in a walk: decided, told, timed, put on record; or refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from accullm_cli.config import Config
from accullm_cli.errors import AccullmError
from accullm_cli.model.source import ModelSource
from accullm_cli.progress import Event
from accullm_cli.run import Reason, RunDirectory
from accullm_cli.stages.job import Job, versions
from accullm_cli.stages.stage import Before, Decision, Stage, StageOutcome, Work, finished, foresee, upstream, walk

SOURCE = ModelSource("tiny", "/models/tiny", Path("/models/tiny"), {}, {}, {}, "0" * 64, "1" * 64, 0, ())


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def job(tmp_path: Path, events: list[Event]) -> Iterator[Job]:
    run = RunDirectory(tmp_path / "run")
    with run.locked():
        yield Job(Config(model="tiny"), run, SOURCE, events.append)


class Worker:
    """The work of a stage that writes one file, and remembers why."""

    def __init__(self, path: Path, records: tuple[str, ...] = ()) -> None:
        self.path, self.records = path, records
        self.reasons: list[Reason] = []

    def __call__(self, job: Job, decision: Decision) -> Work:
        self.reasons.append(decision.reason)
        self.path.write_text(f"{len(self.reasons)}")
        return Work((self.path,), self.records)

    def stage(self, name: str, after: tuple[str, ...] = (), **inputs: str) -> Stage:
        def all_inputs(job: Job, before: Before) -> dict[str, str]:
            return {f"config:{key}": value for key, value in inputs.items()} | {
                f"input:{earlier}": before[earlier].key for earlier in after
            }

        return Stage(name, all_inputs, self, after, (name,), (self.path.name,))


def done(job: Job, *stages: Stage) -> list[StageOutcome]:
    return list(walk(job, stages))


def test_a_new_stage_runs_and_is_on_record(job: Job, events: list[Event]) -> None:
    work = Worker(job.run.file("a.txt"), ("something was different",))
    (outcome,) = done(job, work.stage("profile", bits="4"))
    assert (outcome.name, outcome.reason) == ("profile", Reason("new"))
    record = job.run.stages()["profile"]
    assert outcome.record == record
    assert record.inputs == {"config:bits": "4"}
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
    (first,) = done(job, work.stage("profile", bits="4"))
    events.clear()
    (second,) = done(job, work.stage("profile", bits="4"))
    assert len(work.reasons) == 1
    assert second.reason == Reason("up to date")
    assert second.record == first.record
    assert [(event.kind, str(event.reason)) for event in events] == [("skip", "up to date")]


@pytest.mark.parametrize(
    ("bits", "fresh", "lose", "reason"),
    [
        ("3", False, False, "config changed (bits)"),
        ("4", True, False, "forced"),
        ("4", False, True, "output missing (a.txt)"),
    ],
)
def test_a_stage_runs_again_and_says_why(
    bits: str, fresh: bool, lose: bool, reason: str, job: Job, events: list[Event]
) -> None:
    work = Worker(job.run.file("a.txt"))
    done(job, work.stage("profile", bits="4"))
    if lose:
        work.path.unlink()
    events.clear()
    again = replace(job, fresh=fresh)
    assert [str(decision.reason) for decision in foresee(again, [work.stage("profile", bits=bits)])] == [reason]
    (outcome,) = done(again, work.stage("profile", bits=bits))
    assert (str(outcome.reason), str(work.reasons[1]), str(events[0].reason)) == (reason, reason, reason)
    assert job.run.stages()["profile"].outputs == {"a.txt": hashlib.sha256(b"2").hexdigest()}


def test_a_stage_that_fails_is_not_on_record(job: Job, events: list[Event]) -> None:
    def fail(job: Job, decision: Decision) -> Work:
        raise AccullmError("no")

    with pytest.raises(AccullmError):
        done(job, Stage("profile", lambda job, before: {}, fail))
    assert job.run.stages() == {}
    assert [event.kind for event in events] == ["start"]


def test_a_stage_runs_again_with_what_it_is_made_of(job: Job) -> None:
    first, second = Worker(job.run.file("a.txt")), Worker(job.run.file("b.txt"))

    def stages(bits: str) -> list[Stage]:
        return [first.stage("calibrate", bits=bits), second.stage("profile", ("calibrate",))]

    done(job, *stages("4"))
    foreseen = [str(decision.reason) for decision in foresee(job, stages("3"))]
    assert foreseen == ["config changed (bits)", "input changed (calibrate)"]
    assert [str(outcome.reason) for outcome in done(job, *stages("3"))] == foreseen


def test_what_stages_before_said_is_not_told_again(job: Job, events: list[Event]) -> None:
    said = ("weights were Q4",)
    first, second = Worker(job.run.file("a.txt"), said), Worker(job.run.file("b.txt"), (*said, "and more"))
    outcomes = done(job, first.stage("calibrate"), second.stage("reference"))
    assert [event.label for event in events if event.kind == "record"] == ["weights were Q4", "and more"]
    assert [outcome.record.records for outcome in outcomes] == [["weights were Q4"], ["weights were Q4", "and more"]]


def test_a_walk_may_go_on_from_stages_of_another_one(job: Job, events: list[Event]) -> None:
    first, second = Worker(job.run.file("a.txt")), Worker(job.run.file("b.txt"))
    outcomes = done(job, first.stage("calibrate", bits="4"))
    events.clear()
    (outcome,) = walk(job, [second.stage("profile", ("calibrate",))], finished(outcomes))
    assert outcome.record.inputs == {"input:calibrate": outcomes[0].record.key}
    assert {event.stage for event in events} == {"profile"}


# -- afresh ------------------------------------------------------------------------------------------------


def test_afresh_nothing_of_an_earlier_call_is_found(job: Job) -> None:
    """Of no stage, by the time that the first of them runs: it may make what a later one then finds."""
    first, second = Worker(job.run.file("a.txt")), Worker(job.run.file("b.txt"))
    stages = [first.stage("calibrate"), second.stage("profile")]
    done(job, *stages)

    def look(job: Job, decision: Decision) -> Work:
        assert not first.path.exists()
        assert not second.path.exists()
        return first(job, decision)

    done(replace(job, fresh=True), replace(stages[0], work=look), stages[1])
    assert [str(reason) for reason in first.reasons + second.reasons] == ["new", "forced"] * 2


# -- one stage alone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("is_finished", "line"),
    [
        (False, "{run}: calibrate has not run; run accullm calibrate with the same options first"),
        (
            True,
            "{run}: calibrate is not up to date: config changed (x); run accullm calibrate with the same options first",
        ),
    ],
)
def test_alone_a_stage_does_not_run_those_before_it(is_finished: bool, line: str, job: Job) -> None:
    work = Worker(job.run.file("a.txt"))
    if is_finished:
        done(job, work.stage("calibrate", x="1"))
    before = len(work.reasons)
    alone, stages = replace(job, only="profile"), [work.stage("calibrate", x="2"), work.stage("profile")]
    for call in (foresee, lambda job, stages: done(job, *stages)):
        with pytest.raises(AccullmError) as refusal:
            call(alone, stages)
        assert refusal.value.line() == line.format(run=job.run.path)
    assert len(work.reasons) == before


def test_alone_a_stage_forces_itself_and_nothing_before_it(job: Job) -> None:
    before, itself = Worker(job.run.file("a.txt")), Worker(job.run.file("b.txt"))
    stages = [before.stage("calibrate"), itself.stage("profile")]
    done(job, *stages)
    outcomes = done(replace(job, only="profile", fresh=True), *stages)
    assert [outcome.reason for outcome in outcomes] == [Reason("up to date"), Reason("forced")]
    assert len(before.reasons) == 1


def test_a_stage_may_belong_to_several_commands(job: Job) -> None:
    stage = Stage("reference", lambda job, before: {}, Worker(job.run.file("a")), commands=("validate", "calibrate"))
    may = {only: stage.may_run(replace(job, only=only)) for only in (None, "calibrate", "export", "validate")}
    assert may == {None: True, "calibrate": True, "export": False, "validate": True}


def test_upstream_are_those_that_must_be_finished_before(job: Job) -> None:
    work = Worker(job.run.file("a.txt"))
    stages = [
        work.stage("calibrate"),
        work.stage("profile", ("calibrate",)),
        work.stage("export", ("profile",)),
        work.stage("reference"),
        work.stage("validate", ("export", "reference")),
    ]
    names = {name: [stage.name for stage in upstream(stages, {name})] for name in ("profile", "reference", "validate")}
    assert names == {
        "profile": ["calibrate", "profile"],
        "reference": ["reference"],
        "validate": ["calibrate", "profile", "export", "reference", "validate"],
    }


def test_outputs_elsewhere_are_named_in_full(job: Job, tmp_path: Path) -> None:
    done(job, Worker(tmp_path / "elsewhere.txt").stage("export"))
    assert list(job.run.stages()["export"].outputs) == [str(tmp_path / "elsewhere.txt")]
