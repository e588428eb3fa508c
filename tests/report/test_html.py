"""report.html: what it says, that it loads nothing, that nothing in it is markup that came from a name."""

import json
import re
import xml.etree.ElementTree
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from accullm_cli.errors import EXIT_MACHINE, MachineError
from accullm_cli.measure.fidelity import divergence_found, divergence_found_elsewhere, speed_found
from accullm_cli.measure.result import Clause, Trial
from accullm_cli.measure.retention import retention_found
from accullm_cli.report import to_json, write_report
from accullm_cli.report.figures import nats
from accullm_cli.report.html import render
from tests.samples import FIDELITY, MET, MISSED, SPEED, a_report, linear, measuring


class Page(HTMLParser):
    """The tags, ids and visible text of a page; `open` must be empty at the end."""

    EMPTY = ("meta", "br", "img", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for key, value in attributes if key == "id"]
        self.links += [value for key, value in attributes if key in ("href", "src", "xlink:href")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += " " + data


def words(report) -> str:
    return " ".join(Page(render(report)).text.split())


@pytest.mark.parametrize(
    ("contract", "heading"),
    [
        ((), "Measured; no contract was asked for"),
        ((MET,), "Contract met"),
        ((MET, MISSED), "Contract not met: 1 of 2 conditions missed"),
        ((MISSED,), "Contract not met: 1 of 1 condition missed"),
    ],
)
def test_verdict_comes_first(contract, heading):
    text = render(a_report(contract))
    assert re.findall(r"<h[1-6]>(.*?)</h", text)[0] == heading


def test_each_condition_stands_beside_what_was_measured():
    assert "met mean_kl<=0.1 0.0664 ≤ 0.1 not met top1_agreement.low >= 85% 81.267% ≥ 85%" in words(a_report())


def test_summary_says_what_a_shipper_needs():
    assert (
        "On 1,536 held-out tokens the artifact puts the original's most likely token first 84.6% of the time, and its "
        "perplexity is 16.40 instead of 15.61 (+5.1%). It takes 113 MB instead of 269 MB, at 4.40 bits per quantized "
        "weight."
    ) in words(a_report())


@pytest.mark.parametrize(
    "row",
    [
        "Mean KL divergence 0.0664 0.0500 to 0.0830 nats per token; 2,000 times the noise floor",
        "Its noise floor 3.32e-05 3.00e-05 to 4.00e-05",
        "KL, 99th percentile 0.610 0.500 to 0.720",
        "KL, 99.9th percentile 1.40 1.10 to 1.90",
        "KL, largest 2.25",
        "Top-1 agreement 84.59% 81.27% to 87.40%",
        "Perplexity of the original 15.61 14.00 to 17.00",
        "Perplexity of the artifact 16.40 14.90 to 18.10 1.0506 times the original's",
        "Artifact 113 MB 113,000,000 bytes; 2.38 times smaller",
        "Bits per weight 4.402",
        "calibrate skipped up to date 1 min 01 s 900 MB",
        "quantize ran config changed (plan.bits) 5 min 11 s 1.3 GB",
        "model.layers.0.mlp.up_proj 96 × 64 6 64 2 6.400 0.0800",
        "model.layers.1.mlp.up_proj 96 × 64 16 64 2 16.400 –",
        "Source, SHA-256 " + "3f" * 32,
        "torch 2.13.0",
    ],
)
def test_page_has_the_row(row):
    assert row in words(a_report())


def test_too_few_windows_are_said_to_give_too_narrow_intervals():
    warning = "windows they are too narrow: measure more."
    assert f"From 5 {warning}" in words(measuring(a_report(), divergence_found(replace(FIDELITY, windows=5))))
    assert warning not in words(measuring(a_report(), divergence_found(replace(FIDELITY, windows=6))))


def test_records_are_listed():
    assert "a dead feature in block 3" in words(a_report(records=("a dead feature in block 3",)))


def test_many_records_that_are_alike_are_shown_on_a_click():
    records = tuple(f"model.layers.{number}.experts.7: never reached" for number in range(5))
    text = render(a_report(records=("a dead feature", *records)))
    assert "<ul>\n<li>a dead feature</li>\n</ul>\n<details>" in text
    assert "<summary>5 records like: model.layers.0.experts.7: never reached</summary>" in text
    for record in records:
        assert f"<li>{record}</li>" in text


def test_no_record_is_said_in_words():
    assert "Nothing: every weight was stored as planned" in words(a_report(records=()))


def test_page_loads_nothing():
    page = Page(render(a_report()))
    outside = [link for link in page.links if not link.startswith(("#", "data:"))]
    assert outside == []
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)


def test_page_is_well_nested_and_its_ids_are_unique():
    page = Page(render(a_report()))
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids


def test_every_plot_is_well_formed_svg():
    plots = re.findall(r"<svg.*?</svg>", render(a_report()), re.DOTALL)
    assert len(plots) == 4
    for plot in plots:
        xml.etree.ElementTree.fromstring(plot)


def test_nothing_in_a_report_becomes_markup():
    evil = '<script>alert("1")</script>&amp;'
    clean = a_report(records=("",))
    report = replace(
        clean,
        model=evil,
        artifact=evil,
        format=evil,
        source_sha256=evil,
        artifact_sha256=evil,
        measurements=(divergence_found(replace(FIDELITY, text=evil)),),
        contract=(replace(MISSED, text=evil, metric=evil, comparison=evil),),
        records=(evil,),
        stages=(replace(clean.stages[0], name=evil, reason=evil),),
        linears=(*clean.linears, linear(f"model.layers.0.{evil}")),
        versions={evil: evil},
    )
    text = render(report)
    assert "<script" not in text
    page = Page(text)
    assert "script" not in page.tags
    assert page.text.count(evil) >= 13


def test_same_report_gives_the_same_bytes():
    assert render(a_report()) == render(a_report())
    assert not re.search(r"\b20\d\d-\d\d-\d\d", render(a_report()))


def test_report_without_linears_still_has_a_page():
    text = render(replace(a_report(), linears=()))
    assert text.count("<svg") == 2
    assert "All 0 linears" in text


def test_identical_artifact_still_has_a_page():
    """No KL at all: nothing to place on a logarithmic axis."""
    zero = replace(FIDELITY.mean_kl, value=0.0, low=0.0, high=0.0)
    same = replace(
        FIDELITY, mean_kl=zero, kl_p99=zero, kl_p999=zero, mean_kl_floor=zero, kl_max=0.0, kl_of_window=(0.0, 0.0, 0.0)
    )
    assert "Mean KL divergence 0 0 to 0 nats per token Its" in words(measuring(a_report(), divergence_found(same)))


def test_both_files_are_written(tmp_path):
    report = a_report()
    json_path, html_path = write_report(report, tmp_path / "new" / "directory")
    assert json_path == tmp_path / "new" / "directory" / "report.json"
    assert json.loads(json_path.read_text()) == to_json(report)
    assert html_path.read_text(encoding="utf-8") == render(report)


def test_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "report").write_text("a file where the directory should be")
    with pytest.raises(MachineError) as error:
        write_report(a_report(), tmp_path / "report")
    assert error.value.line() == (
        f"{tmp_path}/report/report.json: cannot be written (File exists); give another path with --out or --run"
    )
    assert error.value.exit_code == EXIT_MACHINE


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.0664, "0.0664"), (3.4e-5, "3.40e-05"), (2.25, "2.25"), (123.4, "123")]
)
def test_nats(value, text):
    assert nats(value) == text


def test_speed_stands_beside_the_originals_with_its_engines():
    text = words(measuring(a_report(), speed_found(SPEED)))
    assert (
        "Speed Tokens per second Artifact Original "
        "Prefill 220 400 0.55 times 512 tokens at once; the artifact by torch: dequantize, then multiply (210 linears) "
        "Decode 25 20 1.25 times 32 tokens, one after the other; the artifact by CPU: packed 4-bit (210 linears) "
        "On CPU with AVX512, 2 threads, both in float32"
    ) in text
    assert "Tokens per second" not in words(a_report())


def test_the_figures_on_other_text_stand_below_the_contracts():
    other = replace(FIDELITY, text="C++ headers", windows=2)
    text = words(measuring(a_report(), divergence_found(FIDELITY), divergence_found_elsewhere("other text", other)))
    assert text.index("Fidelity Figure") < text.index("Fidelity on text of another kind")
    assert "Text: C++ headers" in text
    assert "another kind" not in words(a_report())


def test_the_plans_of_a_search_are_listed():
    def trial(bits, kl, met):
        return Trial(bits, 1_000_000, (Clause("mean_kl<=0.03", "mean_kl.high", "<=", 0.03, kl, met),), met)

    text = words(replace(a_report(), search=(trial(4.25, 0.04, False), trial(4.5, 0.0275, True))))
    assert "not met 4.250 1 MB mean_kl.high 0.04" in text
    assert "met 4.500 1 MB mean_kl.high 0.0275" in text
    assert "Plans that were tried" not in words(a_report())


def test_lost_answers_stand_side_by_side_with_the_token_that_differs_marked():
    from tests.measure.test_retention import CODE, SQL, text_of

    text = render(measuring(a_report(), retention_found([*SQL, *CODE], text_of, seed=0)))
    assert '<pre>four point<mark class="good"> one</mark>&lt;/s&gt;</pre>' in text
    assert '<pre>four point<mark class="bad"> two</mark>…</pre>' in text
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    said = " ".join(page.text.split())
    assert "Of 18 exact tasks that the original gets right, the artifact gets 16 right, too (88.89%)." in said
    assert "sql 20 16 2 1 87.50% 63.98% to 96.50%" in said
    assert "code 12 2 0 0 too few" in said
    assert "a coin toss" in said
    # Margins against each other and their changes, beside those of the linears.
    assert text.count("<svg") == 4
