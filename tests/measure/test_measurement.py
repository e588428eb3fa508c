"""A measure that nobody has heard of appears everywhere, without a line for it anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema

from accullm_cli.commands.compare import compare
from accullm_cli.commands.inspect import Fact, inspect
from accullm_cli.console import report_text
from accullm_cli.formats.manifest import record_fidelity
from accullm_cli.measure.contract import judge, parse_requirement
from accullm_cli.measure.measurement import (
    Estimate,
    Figure,
    Measurement,
    Samples,
    Table,
    exactly,
    judged_figures,
)
from accullm_cli.report import from_json, to_json
from accullm_cli.report.html import render
from accullm_cli.report.schema import json_schema
from tests.commands.test_compare import export
from tests.samples import a_report, measuring
from tests.tiny import tiny_llama


def juggling(caught: tuple[float, ...], judged: bool = True) -> Measurement:
    share = sum(caught) / len(caught)
    return Measurement(
        measure="juggling",
        heading="Juggling",
        about=f"Measured on {len(caught)} balls.",
        figures=(
            Figure(
                "caught",
                Estimate(share, share / 2, 1.0),
                label="balls caught",
                title="Balls that were caught",
                digits=".1%",
                form=".1%",
                note="of those that the original catches",
            ),
            Figure("dropped", None, label="balls dropped", title="Balls that were dropped", note="nobody looked"),
        ),
        judged=judged,
        facts=(("juggled with", "both hands"),),
        summary="It juggles.",
        samples=(Samples("caught", "ball", "five balls", caught),),
        tables=(Table((("Ball", ""), ("Colour", "")), (("1", "red"),)),),
    )


def test_console_page_and_json_show_it() -> None:
    report = measuring(a_report(), juggling((1.0, 0.0, 1.0, 1.0, 1.0)))
    lines = report_text(report).splitlines()
    assert "balls caught                       80.0% [40.0% to 100.0%]" in lines
    assert "balls dropped                      nobody looked" in lines
    assert "juggled with                       both hands" in lines
    page = render(report)
    assert "<h2>Juggling</h2>" in page
    assert "Balls that were caught" in page
    assert "It juggles. It takes 113 MB" in page
    assert '<td class="">red</td>' in page
    content = json.loads(json.dumps(to_json(report)))
    jsonschema.validate(content, json_schema())
    assert from_json(content) == report


def test_card_inspect_and_compare_show_it(tmp_path: Path) -> None:
    for name, caught in (("a", (1.0, 1.0, 0.0, 1.0, 1.0)), ("b", (1.0, 0.0, 0.0, 1.0, 1.0))):
        export(tmp_path / name, tiny_llama())
        record_fidelity(tmp_path / name, measuring(a_report(), juggling(caught)))
    card = (tmp_path / "a/README.md").read_text()
    assert "Measured on 5 balls." in card
    assert "| Balls that were caught | 0.8 | 0.4 to 1 |" in card
    assert "dropped" not in card
    assert Fact("caught", "0.8 (0.4 to 1)") in inspect(tmp_path / "a").fidelity
    (figure,) = compare(tmp_path / "a", tmp_path / "b").figures
    assert figure.figure == "caught"
    assert figure.difference is not None
    assert abs(figure.difference.value - 0.2) < 1e-12


def test_figures_that_no_condition_may_name_bear_the_measures_name(tmp_path: Path) -> None:
    export(tmp_path / "a", tiny_llama())
    found = juggling((1.0, 0.0), judged=False)
    record_fidelity(tmp_path / "a", measuring(a_report(()), found))
    assert {"juggling.caught", "samples", "contract", "contract_met"} == set(
        json.loads((tmp_path / "a/accullm.json").read_text())["fidelity"]
    )
    assert judged_figures([found]) == {}


def test_what_was_not_measured_meets_no_condition() -> None:
    clauses = judge(
        [parse_requirement("mean_kl<=1"), parse_requirement("kl_max>=0")],
        {"mean_kl": Figure("mean_kl", None), "perplexity": Figure("perplexity", exactly(1))},
    )
    assert [(clause.measured, clause.met) for clause in clauses] == [(None, False), (None, False)]
