"""The golden search: where it goes, what it reuses, where it ends, and what it says."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from accullm_cli.config import Config
from accullm_cli.formats import open_artifact
from accullm_cli.formats.manifest import artifact_files
from accullm_cli.pipeline import convert, convert_all, dry_run, run_stage
from accullm_cli.progress import Event
from accullm_cli.search import RESOLUTION, next_average
from tests.pipeline.observe import refusal
from tests.streaming import short_config
from tests.tiny import make_checkpoint

# -- where it goes -----------------------------------------------------------------------------------------

LOWEST, HIGHEST = 3.3, 6.0
CURVE = tuple((3.3 + step / 10, 4.0 ** -(step / 10)) for step in range(48))


def path(loss_at: Callable[[float], float], limit: float, plans: int = 9) -> list[tuple[float, float]]:
    """The (average, room) of every plan that a search tries where plans really have these losses."""
    rooms: list[tuple[float, float]] = []
    for _ in range(plans):
        bits = next_average(rooms, CURVE, LOWEST, HIGHEST)
        if bits is None:
            return rooms
        rooms.append((bits, limit / loss_at(bits)))
    raise AssertionError(f"no end after {rooms}")


@settings(deadline=None)
@given(st.floats(3.5, 5.8), st.floats(0.01, 100))
def test_it_finds_the_smallest_good_average_if_losses_are_off_by_a_factor(goal: float, factor: float) -> None:
    """Two plans tell: the first one by how much the expected loss is off, the second one is there."""

    def loss_at(bits: float) -> float:
        return factor * 4.0**-bits

    rooms = path(loss_at, loss_at(goal))
    best = min(bits for bits, room in rooms if room >= 1)
    assert goal <= best <= goal + 2 * RESOLUTION
    assert len(rooms) <= 3


@settings(deadline=None)
@given(st.floats(3.5, 5.8), st.floats(1.5, 12))
def test_it_comes_near_even_if_losses_fall_otherwise_than_expected(goal: float, base: float) -> None:
    """Where they fall by a third of what was expected, what is promised to be 0.02 bits may be 0.1."""
    rooms = path(lambda bits: base**-bits, base**-goal)
    best = min(bits for bits, room in rooms if room >= 1)
    assert goal <= best <= goal + 6 * RESOLUTION


def test_it_ends_at_the_largest_plan_where_none_is_good() -> None:
    rooms = path(lambda bits: 4.0**-bits, 4.0**-7)
    assert max(bits for bits, _ in rooms) == HIGHEST
    assert all(room < 1 for _, room in rooms)


def test_it_ends_at_the_smallest_plan_where_all_are_good() -> None:
    rooms = path(lambda bits: 4.0**-bits, 4.0**-2)
    assert min(bits for bits, _ in rooms) == LOWEST


@pytest.mark.parametrize("room", [0.0, math.inf])
def test_a_limit_that_is_out_of_reach_or_no_limit_at_all_leads_to_an_end(room: float) -> None:
    assert next_average([(4.5, room)], CURVE, LOWEST, HIGHEST) == (HIGHEST if room == 0 else LOWEST)


def test_no_plan_is_tried_twice() -> None:
    """A loss that jumps has a good and a bad plan side by side, whatever the curve says."""
    rooms = path(lambda bits: 1.0 if bits < 4.7 else 1e-3, 0.01, plans=40)
    assert len({bits for bits, _ in rooms}) == len(rooms)
    assert min(bits for bits, room in rooms if room >= 1) - max(bits for bits, room in rooms if room < 1) < 0.1


# -- a conversion ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama") / "model")


def golden(model: Path, out: Path, require: str, **options: object) -> Config:
    options = {"search__golden": True, "calibration__gradient_samples": 4, "rounding__grid": "search"} | options
    return short_config(model, out, validation__require=f"[{require}]", **options)


@pytest.fixture(scope="module")
def first(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    """A search that ended well: the artifact's directory, and what was told on the way."""
    out = tmp_path_factory.mktemp("golden") / "out"
    events: list[Event] = []
    report = convert(golden(llama, out, "mean_kl<=0.02"), events.append)
    assert report.contract_met
    return out, events


def test_the_artifact_is_the_smallest_plan_that_met_the_contract(llama: Path, first: tuple[Path, list[Event]]) -> None:
    out, _ = first
    report = convert(golden(llama, out, "mean_kl<=0.02"))
    assert [trial.met for trial in report.search] == sorted(trial.met for trial in report.search)
    best = next(trial for trial in report.search if trial.met)
    assert report.bits_per_weight == best.bits_per_weight == open_artifact(out).plan.bits_per_weight
    assert [clause.metric for clause in best.clauses] == ["mean_kl.high"]
    assert report.directory == str(out.with_name("out.run") / "report/accullm")


def test_the_contract_is_judged_on_text_that_the_search_never_saw(first: tuple[Path, list[Event]]) -> None:
    out, _ = first
    run = out.with_name("out.run")
    judged = load_file(run / "reference.safetensors")["ids"]
    searched = load_file(run / "search/reference.safetensors")["ids"]
    assert searched.shape == judged.shape
    assert not {tuple(row.tolist()) for row in judged} & {tuple(row.tolist()) for row in searched}


def test_it_calibrates_once_and_tells_every_plan(first: tuple[Path, list[Event]]) -> None:
    _, events = first
    started = [event.stage for event in events if event.kind == "start"]
    assert started.count("calibrate") == started.count("search reference") == 1
    told = [event.label for event in events if event.stage == "search" and event.kind == "record"]
    plans = [label for label in told if label.startswith("plan ") and "mean_kl.high" in label]
    assert len(plans) == started.count("quantize") == started.count("measure accullm") > 1
    assert told[-1].startswith("the smallest that meets the contract on the search's text has ")


def test_asked_again_it_computes_nothing(llama: Path, first: tuple[Path, list[Event]]) -> None:
    out, _ = first
    before = {name: (out / name).read_bytes() for name in artifact_files(out)}
    events: list[Event] = []
    convert(golden(llama, out, "mean_kl<=0.02"), events.append)
    assert [event.stage for event in events if event.kind == "start"] == ["search"]
    assert {name: (out / name).read_bytes() for name in artifact_files(out)} == before


def test_a_dry_run_tells_the_plans_that_are_known(llama: Path, first: tuple[Path, list[Event]], tmp_path: Path) -> None:
    out, _ = first
    run = out.with_name("out.run")
    known = len(convert(golden(llama, out, "mean_kl<=0.02")).search)
    for limit in ("0.02", "0.3"):  # whatever is demanded of them
        *shared, search = dry_run(golden(llama, tmp_path / "out", f"mean_kl<={limit}", machine__run=run)).stages
        assert not any(stage.runs for stage in shared)
        assert f"up to 5 plans, and {known} known from an earlier search; " in search.reason
    begun_anew = dry_run(golden(llama, tmp_path / "out", "mean_kl<=0.02", machine__run=run), fresh=True).stages[-1]
    assert "known" not in begun_anew.reason
    reseeded = golden(llama, tmp_path / "out", "mean_kl<=0.02", machine__run=run, machine__seed=1)
    assert "known" not in dry_run(reseeded).stages[-1].reason


def test_another_contract_begins_with_what_is_known(
    llama: Path, first: tuple[Path, list[Event]], tmp_path: Path
) -> None:
    """All that was measured counts: no plan is measured again, and calibrate does not run."""
    out, _ = first
    known = convert(golden(llama, out, "mean_kl<=0.02")).search
    events: list[Event] = []
    run = out.with_name("out.run")
    report = convert(golden(llama, tmp_path / "other", "mean_kl<=0.01", machine__run=run), events.append)
    assert "calibrate" not in {event.stage for event in events if event.kind == "start"}
    measured = sum(event.kind == "start" and event.stage == "measure accullm" for event in events)
    sizes = {trial.bits_per_weight for trial in report.search}
    assert {trial.bits_per_weight for trial in known} < sizes
    assert measured == len(report.search) - len(known)


class Stop(Exception):  # noqa: N818
    """As if the process were killed here."""


def test_what_was_measured_beyond_a_smaller_limit_is_not_chosen(
    llama: Path, first: tuple[Path, list[Event]], tmp_path: Path
) -> None:
    """Nor forgotten: without the limit nothing is measured again."""
    out, _ = first
    run = out.with_name("out.run")
    before = convert(golden(llama, out, "mean_kl<=0.02")).search
    limit = min(trial.bits_per_weight for trial in before if trial.met) - 0.3
    options = {"machine__run": run, "search__max_bits_per_weight": limit, "search__max_plans": 1}
    limited = convert(golden(llama, tmp_path / "limited", "mean_kl<=0.02", **options))
    assert limited.bits_per_weight <= limit
    events: list[Event] = []
    again = convert(golden(llama, out, "mean_kl<=0.02"), events.append)
    assert set(before) <= set(again.search)
    assert "measure accullm" not in {event.stage for event in events if event.kind == "start"}


def test_a_limit_of_many_digits_ends_the_search(llama: Path, tmp_path: Path) -> None:
    config = golden(llama, tmp_path / "out", "mean_kl<=1e-7", search__max_bits_per_weight=4.61239)
    report = convert(config)
    assert len({trial.bits_per_weight for trial in report.search}) == len(report.search) < 5
    assert report.bits_per_weight <= 4.61239


def test_it_ends_in_the_same_bytes_wherever_it_was_interrupted(llama: Path, tmp_path: Path) -> None:
    require = "mean_kl<=0.02"
    whole = convert(golden(llama, tmp_path / "whole", require))

    def stop_at(stage: str, count: int) -> Callable[[Event], None]:
        seen = 0

        def watch(event: Event) -> None:
            nonlocal seen
            seen += event.stage == stage and event.kind == "step"
            if seen == count:
                raise Stop

        return watch

    for stage, count in (("calibrate", 1), ("quantize", 1), ("quantize", 3), ("measure accullm", 2)):
        with pytest.raises(Stop):
            convert(golden(llama, tmp_path / "parts", require), stop_at(stage, count))
    again = convert(golden(llama, tmp_path / "parts", require))
    assert again.artifact_sha256 == whole.artifact_sha256
    assert again.search == whole.search


def test_where_no_plan_is_good_the_best_is_left_and_the_obstacles_are_named(llama: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    config = golden(llama, tmp_path / "out", "mean_kl<=1e-7", search__max_bits_per_weight=4.8, search__max_plans=2)
    report = convert(config, events.append)
    assert not report.contract_met
    assert len(report.search) == 2
    assert report.bits_per_weight == max(trial.bits_per_weight for trial in report.search) <= 4.8
    told = [event.label for event in events if event.stage == "search" and event.kind == "record"][-1]
    assert told.startswith("no plan of up to 4.8 bits per weight meets the contract on the search's text; most of the ")
    assert "model.layers." in told


def test_a_search_over_outliers_alone_goes_from_none_to_the_most(llama: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    config = golden(llama, tmp_path / "out", "mean_kl<=1e-7", plan__spend="outliers")
    report = convert(config, events.append)
    spent = [trial.bits_per_weight for trial in report.search]
    assert len(spent) > 1
    assert spent == sorted(set(spent))
    linears = open_artifact(tmp_path / "out").plan.linears.values()
    best = min(report.search, key=lambda trial: trial.clauses[0].measured)
    # The most is 3% of 64 and of 96 input features; which is best on a tiny random model is a matter of chance.
    expected = {spent[0]: {0}, spent[-1]: {1, 2}}.get(best.bits_per_weight, {0, 1, 2})
    assert {len(linear.outlier_index) for linear in linears} <= expected
    told = [event.label for event in events if event.stage == "search" and event.kind == "record"][-1]
    most = math.ceil(1000 * spent[-1]) / 1000
    assert told.startswith(f"no plan of up to {most:g} bits per weight, the most that --spend outliers can take, ")


def test_a_search_over_outliers_alone_ends_at_the_smallest_good_plan(llama: Path, tmp_path: Path) -> None:
    tried = convert(golden(llama, tmp_path / "out", "mean_kl<=1e-7", plan__spend="outliers")).search
    (low, *_, high) = sorted(trial.clauses[0].measured for trial in tried)
    limit = (low + high) / 2
    report = convert(golden(llama, tmp_path / "out", f"mean_kl<={limit}", plan__spend="outliers"))
    good = [trial.bits_per_weight for trial in report.search if trial.met]
    assert report.bits_per_weight == min(good) < max(trial.bits_per_weight for trial in report.search)


def test_only_the_best_plan_keeps_its_blocks(first: tuple[Path, list[Event]]) -> None:
    out, _ = first
    assert len(list((out.with_name("out.run") / "search").glob("plan-*"))) == 1


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("require", "options", "line"),
    [
        (
            "bits_per_weight<=5",
            {},
            "--golden: needs a contract on how faithful the artifact is; give, for example, --require 'mean_kl<=0.03'",
        ),
        (
            "mean_kl<=1",
            {"calibration__gradient_samples": 0},
            "--golden: a plan needs gradients, which tell how much each linear matters; "
            "leave out --gradient-samples, or give more than 0",
        ),
        (
            "mean_kl<=1",
            {"search__max_bits_per_weight": 3},
            "--max-bits-per-weight: 3 is less than the smallest plan takes, 3.484, scales included; "
            "give more, or larger groups",
        ),
    ],
)
def test_what_no_search_can_do_is_refused(
    require: str, options: dict[str, object], line: str, llama: Path, tmp_path: Path
) -> None:
    assert refusal(lambda: convert(golden(llama, tmp_path / "out", require, **options))) == line


def test_a_search_for_several_formats_at_once_is_refused(llama: Path, tmp_path: Path) -> None:
    options = {"export__format": "[accullm, compressed-tensors]", "plan__outliers": 0}
    config = golden(llama, tmp_path / "out", "mean_kl<=1", **options)
    assert refusal(lambda: convert_all(config)) == (
        "--golden: searches for one artifact; give one --format, and another call to each"
    )


def test_a_search_may_be_for_another_format(llama: Path, tmp_path: Path) -> None:
    options = {"export__format": "[compressed-tensors]", "plan__outliers": "null", "search__max_plans": 1}
    report = convert(golden(llama, tmp_path / "out", "mean_kl<=9", **options))
    assert (report.format, len(report.search)) == ("compressed-tensors", 1)
    (trial,) = report.search
    assert trial.bits_per_weight == report.bits_per_weight
    assert {linear.bits for linear in report.linears} <= {3, 4, 5, 6, 8}


def test_a_text_too_short_to_search_on_is_refused_before_any_work(llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("a word and another " * 10)  # 190 tokens: three windows of 48, and one is left
    config = golden(llama, tmp_path / "out", "mean_kl<=1", validation__text=text)
    assert refusal(lambda: convert(config)) == (
        f"validation text {text}: has 0 windows left to search on, beside the 3 that the contract is judged on; "
        "give more text, or fewer --validation-windows"
    )
    assert not (tmp_path / "out.run").exists()


def test_a_search_is_no_stage(llama: Path, tmp_path: Path) -> None:
    config = golden(llama, tmp_path / "out", "mean_kl<=1")
    assert refusal(lambda: run_stage("quantize", config)) == ("--golden: is no part of quantize; run accullm convert")


def test_a_dry_run_says_that_it_will_search(llama: Path, tmp_path: Path) -> None:
    planned = dry_run(golden(llama, tmp_path / "out", "mean_kl<=1"))
    names = ["reading", "calibrate", "reference", "search reference", "search"]
    assert [(stage.name, stage.runs) for stage in planned.stages] == [(name, True) for name in names]
    assert planned.stages[-1].reason == "new (up to 5 plans; time is estimated for one)"
    assert not (tmp_path / "out.run").exists()
