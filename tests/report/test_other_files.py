"""JUnit XML and Markdown: what dashboards and pull requests are told."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

from accullm_cli.measure.measurement import Answer, Case, Cases, Group, Measurement
from accullm_cli.report.junit import junit, write_junit
from accullm_cli.report.markdown import summary
from tests.samples import MET, MISSED, a_report, measuring

EVIL = '<b>|`*\x00\x1b"&'


def with_tasks() -> Measurement:
    case = Case("sql, join", "prompt", Answer("SELECT ", "a", ";\nb"), Answer("SELECT ", "<b>", "…"), "margin 3")
    return Measurement(
        measure="tasks",
        heading="Exact tasks",
        about="Measured on 3 items.",
        figures=(),
        summary="Of 3 exact tasks the artifact gets 2.",
        cases=(Cases("Right answers that were lost", (case,) * 12, left_out=3),),
        groups=(
            Group("sql", failure="2 lost", output=("2 lost", f"said {EVIL}")),
            Group("code", skipped="too few"),
            Group("words", output=("all kept",)),
        ),
    )


def test_each_condition_and_each_task_is_a_test(tmp_path) -> None:
    report = measuring(a_report((MET, MISSED)), with_tasks())
    write_junit([report, report], tmp_path / "deep" / "tests.xml")
    root = ElementTree.parse(tmp_path / "deep" / "tests.xml").getroot()
    contract, tasks, *_ = root
    assert len(root) == 4
    assert contract.attrib == {
        "name": "out/name-int4: contract", "tests": "2", "failures": "1", "skipped": "0",
    }  # fmt: skip
    assert [case.attrib["name"] for case in contract] == [MET.text, MISSED.text]
    (missed,) = contract.iter("failure")
    assert missed.attrib["message"] == "measured 0.81267"
    assert (tasks.attrib["failures"], tasks.attrib["skipped"]) == ("1", "1")
    assert [case.attrib for case in tasks] == [
        {"classname": "accullm.tasks", "name": name} for name in ("sql", "code", "words")
    ]
    sql, code, words = tasks
    assert sql.find("failure").attrib["message"] == "2 lost"
    assert sql.find("system-out").text == '2 lost\nsaid <b>|`*��"&'
    assert code.find("skipped").attrib["message"] == "too few"
    assert words.find("failure") is None


def test_without_a_contract_and_tasks_there_is_no_test() -> None:
    assert list(ElementTree.fromstring(junit([a_report(())]))) == []


def test_the_summary_begins_with_the_verdict() -> None:
    text = summary([measuring(a_report((MET, MISSED)), with_tasks())])
    assert text.startswith("## ❌ Contract not met: 1 of 2 conditions missed\n")
    assert "| **not met** | `top1_agreement.low >= 85%` | 81.267% | ≥ 85% |" in text
    assert "Of 3 exact tasks the artifact gets 2. It takes 113 MB instead of 269 MB" in text
    assert "<details><summary>Right answers that were lost (15)</summary>" in text
    assert "original: <code>SELECT <b>a</b>;⏎b</code>" in text
    assert "artifact: <code>SELECT <b>&lt;b&gt;</b>…</code>" in text
    assert "5 more, in the report." in text
    assert summary([a_report((MET,))]).startswith("## ✅ Contract met\n")
    assert summary([a_report(())]).startswith("## Measured; no contract was asked for\n")


def test_the_figures_are_tables_of_markdown() -> None:
    text = summary([a_report()])
    assert "| Mean KL divergence | 0.0664 | 0.0500 to 0.0830 | nats per token; 2,000 times the noise floor |" in text
    assert "| Figure | Value | 95% interval |  |\n| --- | --- | --- | --- |" in text


def test_nothing_in_a_report_becomes_markup() -> None:
    text = summary([replace(a_report(()), model=EVIL, artifact="a_b*c")])
    assert "<b>" not in text
    assert "a\\_b\\*c" in text
