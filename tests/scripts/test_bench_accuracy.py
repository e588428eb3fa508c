"""The accuracy benchmark: what it runs for each row, and the table that it makes of the reports."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from accullm_cli.console import plain
from accullm_cli.measure.result import StageSummary
from tests.samples import report_of
from tests.scripts.test_prepare_demo_model import SCRIPT as SIBLING

SCRIPT = SIBLING.with_name("bench_accuracy.py")


def load_script() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("bench_accuracy", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_accuracy"] = module  # where dataclasses look for the types of their fields
    spec.loader.exec_module(module)
    return module


script = load_script()
NEAREST, FEEDBACK, UNTOUCHED, COMPENSATING, ROWS, AVERAGE = script.ROWS


def report(mean_kl: float = 0.05) -> dict[str, Any]:
    """What `accullm convert --json` prints about one artifact."""
    stages = (
        StageSummary("calibrate", "up to date", False, 61.0, 1_000_000_000),
        StageSummary("quantize", "new", True, 9.0, 500_000_000),
        StageSummary("validate accullm", "new", True, 3.0, 700_000_000),
    )
    return plain(dataclasses.replace(report_of(mean_kl), stages=stages))


def options(tmp_path: Path, *arguments: str) -> Any:
    return script.parse(["--out", str(tmp_path / "accuracy"), *arguments])


def test_every_row_is_measured_unless_some_are_asked_for(tmp_path: Path) -> None:
    assert options(tmp_path).rows == ["nearest", "feedback", "untouched", "compensating", "rows", "average"]
    assert options(tmp_path).group_sizes == [64, 128]
    assert options(tmp_path, "--rows", "nearest", "untouched").rows == ["nearest", "untouched"]


def test_an_unknown_row_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        options(tmp_path, "--rows", "neerest")
    assert caught.value.code == 2
    assert "invalid choice: 'neerest'" in capsys.readouterr().err


def test_rows_share_the_run_and_each_has_an_artifact_of_its_own(tmp_path: Path) -> None:
    given = options(tmp_path, "--samples", "4", "--validation-windows", "2", "--threads", "1")
    assert NEAREST.command(given, 128) == (
        "accullm", "convert", "work/smollm2-135m",
        "--out", str(tmp_path / "accuracy-artifacts" / "nearest-128"), "--group-size", "128",
        "--rounding", "nearest", "--outliers", "0", "--run", str(tmp_path / "accuracy.run"),
        "--samples", "4", "--validation-windows", "2", "--threads", "1", "--json",
    )  # fmt: skip
    commands = [row.command(given, size) for row in script.ROWS for size in (64, 128)]
    assert len({command[command.index("--out") + 1] for command in commands}) == 12
    assert len({command[command.index("--run") + 1] for command in commands}) == 1


def test_gradients_are_those_of_all_windows(tmp_path: Path) -> None:
    for arguments, expected in (((), "128"), (("--samples", "4"), "4")):
        for row in (ROWS, AVERAGE):
            command = row.command(options(tmp_path, *arguments), 64)
            assert command[command.index("--gradient-samples") + 1] == expected
    assert "--gradient-samples" not in COMPENSATING.command(options(tmp_path), 64)


def test_every_flag_of_every_row_is_one_of_converts() -> None:
    from accullm_cli.config import options as declared

    known = {option.flag: option for option in declared()}
    for row in script.ROWS:
        for flag, value in zip(row.flags[::2], row.flags[1::2], strict=True):
            assert not known[flag].choices or value in known[flag].choices


def test_a_report_becomes_a_line_of_the_table(tmp_path: Path) -> None:
    result = script.result_of(UNTOUCHED, 64, report(), ("accullm", "convert"))
    assert script.fidelity_table([result]).splitlines() == [
        "| rounding | group | bits/weight | perplexity | mean KL (nats) | p99 KL | top-1 agreement | size |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| error feedback, 0.5% outliers untouched | 64 | 4.402 | 16.40 [14.90, 18.10] | 0.0500 [0.0450, 0.0550] "
        "| 0.610 [0.500, 0.720] | 84.59% [81.27%, 87.40%] | 113 MB |",
    ]


def test_the_cost_of_every_stage_is_shown_and_a_missing_one_as_a_dash() -> None:
    result = script.result_of(NEAREST, 128, report(), ())
    assert script.cost_table([result]).splitlines()[2] == (
        "| nearest | 128 | 1 min 01 s, 1 GB | - | 9.0 s, 500 MB | - | 3.0 s, 700 MB |"
    )


def test_the_text_above_says_on_what_it_was_measured() -> None:
    lines = script.render([script.result_of(NEAREST, 128, report(), ("accullm", "convert", "a b"))]).splitlines()
    assert lines[0] == "Measured on 1,536 tokens in 3 windows of held-out text, 95% confidence intervals in brackets."
    assert lines[1] == (
        "The original's perplexity is 15.61 [14.00, 17.00]; the noise floor of the KL (one bfloat16 rounding per "
        "block) is 3.3e-05 nats."
    )
    assert lines[-1] == "    accullm convert 'a b'"


def test_conversions_run_in_order_and_results_are_kept_after_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(command: list[str], **others: object) -> subprocess.CompletedProcess[str]:
        if ran:
            assert len(json.loads((tmp_path / "accuracy.json").read_text())["results"]) == len(ran)
        ran.append(Path(command[command.index("--out") + 1]).name)
        return subprocess.CompletedProcess(command, 0, json.dumps({"reports": [report(0.01 * len(ran))]}))

    monkeypatch.setattr(subprocess, "run", run)
    assert script.main(["--out", str(tmp_path / "accuracy"), "--rows", "compensating", "nearest"]) == 0
    assert ran == ["nearest-64", "compensating-64", "nearest-128", "compensating-128"]
    content = json.loads((tmp_path / "accuracy.json").read_text())
    assert content["schema_version"] == 1
    assert [round(result["mean_kl"]["value"], 6) for result in content["results"]] == [0.01, 0.02, 0.03, 0.04]
    assert (tmp_path / "accuracy.md").read_text() == capsys.readouterr().out


def test_a_conversion_that_fails_ends_the_benchmark_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **others: subprocess.CompletedProcess(command, 4, ""))
    assert script.main(["--out", str(tmp_path / "accuracy"), "--rows", "feedback"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == ("error: row feedback: accullm convert ended with exit code 4")
    assert not (tmp_path / "accuracy.md").exists()


def test_another_tool_can_be_a_row() -> None:
    class Peer:
        name, label = "peer", "another tool"

        def measure(self, options: object, group_size: int) -> Any:
            return script.result_of(self, group_size, report(), ("peer", "--quantize"))

    assert "| another tool | 64 |" in script.render([Peer().measure(None, 64)])
