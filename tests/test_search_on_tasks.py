"""The golden search for a share of right answers: it goes where margins say, and is judged on other items."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accullm_cli.pipeline import convert
from accullm_cli.progress import Event
from tests.stages.copying import make_copier, write_items
from tests.streaming import short_config


@pytest.fixture(scope="module")
def copier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("copier")
    write_items(place / "copy.jsonl", 80)
    return make_copier(place / "model")


def test_it_finds_a_plan_that_keeps_the_answers_and_is_judged_on_items_it_never_saw(
    copier: Path, tmp_path: Path
) -> None:
    events: list[Event] = []
    config = short_config(
        copier,
        tmp_path / "out",
        search__golden=True,
        search__max_plans=3,
        calibration__gradient_samples=4,
        rounding__grid="search",
        validation__tasks=copier.with_name("copy.jsonl"),
        validation__require="[retention>=95%]",
    )
    report = convert(config, events.append)
    assert report.contract_met
    assert {clause.metric for trial in report.search for clause in trial.clauses} == {"retention"}
    best = next(trial for trial in report.search if trial.met)
    assert report.bits_per_weight == best.bits_per_weight
    measurement = report.measurement("tasks")
    assert measurement is not None
    assert dict(measurement.counts)["items"] == 40
    started = [event.stage for event in events if event.kind == "start"]
    assert started.count("task answers") == started.count("search task answers") == 1
    assert started.count("measure accullm on tasks") == len(report.search)
    # Half of the user's lines each, and none in both.
    judged, searched = (
        json.loads((tmp_path / "out.run" / name / "original.json").read_text())["items"]
        for name in ("tasks", "search/tasks")
    )
    assert len(judged) == len(searched) == 40
    rows = [{tuple(item["spellings"][0]) for item in items} for items in (judged, searched)]
    assert not rows[0] & rows[1]
