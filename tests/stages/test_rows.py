"""Which encoding each linear of a plan has, by what was asked for and what the format holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accullm_cli.errors import AccullmError
from accullm_cli.stages.checks import check_config, preflight
from accullm_cli.stages.job import Job, open_decoder
from accullm_cli.stages.profile import load_plan, make_plan
from tests.streaming import opened, run_to, short_config
from tests.tiny import make_checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama") / "model")


def test_a_plan_chooses_from_the_encodings_asked_for(llama: Path, tmp_path: Path) -> None:
    """The first of its width that a linear can have; one that the format has not is refused by name."""
    settings = {"export__format": '["gguf"]', "plan__group_size": "null", "plan__outliers": "null"}
    for asked, found in (([], {"IQ4_NL"}), (["Q4_1"], {"Q4_1"}), (["Q4_1", "Q4_0"], {"Q4_0"})):
        sets = {**settings, "plan__encodings": json.dumps(asked)}
        with opened(short_config(llama, tmp_path / "out", **sets)) as job:
            plan = make_plan(job, open_decoder(job))
        assert {row.encoding for row in plan.linears.values()} == found
    sets = {**settings, "export__format": '["awq"]', "plan__encodings": '["Q4_0"]'}
    with opened(short_config(llama, tmp_path / "out", **sets)) as job, pytest.raises(AccullmError) as refusal:
        make_plan(job, open_decoder(job))
    assert refusal.value.line() == "--encodings: awq has no encoding 'Q4_0'; give integer"


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({}, {("trellis", 4, True, 6)}),
        ({"plan__bits": 8}, {("integer", 8, False, 6)}),
        ({"plan__symmetric": True}, {("trellis", 4, True, 6)}),
        ({"plan__symmetric": False}, {("integer", 4, False, 6)}),
        ({"plan__encodings": '["integer"]'}, {("integer", 4, False, 6)}),
        ({"rounding__method": "stochastic"}, {("integer", 4, False, 6)}),
        ({"plan__scale_bits": 16}, {("trellis", 4, True, 16)}),
        ({"plan__encodings": '["levels"]'}, {("levels", 4, True, 7)}),
        ({"plan__encodings": '["levels", "integer"]'}, {("levels", 4, True, 7)}),
    ],
)
def test_native_linears_are_a_trellis_unless_they_cannot(
    settings: dict[str, object], found: set[tuple[str, int, bool, int]], llama: Path, tmp_path: Path
) -> None:
    with opened(short_config(llama, tmp_path / "out", **settings)) as job:
        plan = make_plan(job, open_decoder(job))
    assert {(row.encoding, row.bits, row.symmetric, row.scale_bits) for row in plan.linears.values()} == found


def test_an_average_of_bits_has_a_trellis_and_integer_codes_above_five(llama: Path, tmp_path: Path) -> None:
    settings = {"plan__bits": 5.6, "plan__outliers": "null", "plan__group_size": "null"}
    with opened(short_config(llama, tmp_path / "out", calibration__gradient_samples=2, **settings)) as job:
        run_to(job, "profile")
        plan = load_plan(job.run.file("plan.json"))
    rows = plan.linears.values()
    wide = [row for row in rows if row.bits > 5]
    assert wide
    assert {row.encoding for row in wide} == {"integer"}
    # The table of a few hundred bytes weighs more than zero points in a linear as small as these: some have integers.
    assert "trellis" in {row.encoding for row in rows if row not in wide}


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"plan__encodings": '["levels"]', "plan__symmetric": False},
            "--format accullm: accullm holds symmetric grids only, and that of model.layers.0.self_attn.q_proj is not "
            "(and 13 more); use --symmetric",
        ),
        (
            {"plan__encodings": '["levels"]', "plan__bits": 8},
            "--format accullm: levels of accullm has 2 to 5 bits, and model.layers.0.self_attn.q_proj has 8 (and 13 "
            "more); leave out --encodings, or export to the format compressed-tensors",
        ),
        (
            {"plan__encodings": '["levels"]', "rounding__method": "stochastic"},
            "--rounding stochastic: --encodings levels has grids that need not hold the range of the weights, so that "
            "they cannot be rounded at random; use another --rounding, or leave out --encodings",
        ),
    ],
)
def test_what_levels_cannot_have_is_refused_before_any_work(
    settings: dict[str, object], line: str, llama: Path, tmp_path: Path
) -> None:
    def check(job: Job) -> None:
        check_config(job.config, job.run, converts=True, only_validates=False)
        preflight(job)

    with opened(short_config(llama, tmp_path / "out", **settings)) as job, pytest.raises(AccullmError) as refusal:
        check(job)
    assert refusal.value.line() == line
