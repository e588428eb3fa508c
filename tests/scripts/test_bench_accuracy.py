"""The accuracy benchmark: what it runs for each row, and the table that it makes of the reports."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from accullm_cli.console import plain
from accullm_cli.measure.result import StageSummary
from tests.samples import report_of
from tests.scripts.loading import load_script

script = load_script("bench_accuracy")
ROW = {row.name: row for row in script.ROWS}


def report(mean_kl: float = 0.05) -> dict[str, Any]:
    """What `accullm convert --json` prints about one artifact."""
    stages = (
        StageSummary("calibrate", "up to date", False, 61.0, 1_000_000_000),
        StageSummary("quantize", "new", True, 9.0, 500_000_000),
        StageSummary("validate accullm", "new", True, 3.0, 700_000_000),
    )
    return plain(dataclasses.replace(report_of(mean_kl), stages=stages))


def options(tmp_path: Path, *arguments: str) -> Any:
    """As main has them."""
    given = script.parse(["--model", "somewhere/tiny", "--out", str(tmp_path / "accuracy"), *arguments])
    given.model = script.model_directory(given.model)
    return given


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Where a model could be: no test here reads one."""
    directory = tmp_path / "tiny"
    directory.mkdir()
    return directory


def test_every_row_is_measured_unless_some_are_asked_for(tmp_path: Path) -> None:
    assert options(tmp_path).rows == list(ROW)
    assert options(tmp_path, "--rows", "nearest-64", "average-4.4").rows == ["nearest-64", "average-4.4"]
    assert options(tmp_path, "--rows", "--append").rows == []


def test_an_unknown_row_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        options(tmp_path, "--rows", "neerest")
    assert caught.value.code == 2
    assert "invalid choice: 'neerest'" in capsys.readouterr().err


def test_rows_share_the_run_and_each_has_an_artifact_of_its_own(tmp_path: Path) -> None:
    given = options(tmp_path, "--samples", "4", "--validation-windows", "2", "--threads", "1")
    assert ROW["nearest-64"].command(given) == (
        "accullm", "convert", "somewhere/tiny", "--out", str(tmp_path / "accuracy-artifacts" / "nearest-64"),
        "--rounding", "nearest", "--outliers", "0", "--group-size", "64", "--encodings", "integer",
        "--run", str(tmp_path / "accuracy.run"), "--samples", "4", "--validation-windows", "2", "--threads", "1",
        "--json",
    )  # fmt: skip
    commands = [row.command(given) for row in script.ROWS]
    assert len({command[command.index("--out") + 1] for command in commands}) == len(commands)
    runs = {row.name: command[command.index("--run") + 1] for row, command in zip(script.ROWS, commands, strict=True)}
    # Other windows would take the place of those that the other tools calibrate on.
    for name in ("effort-fast", "effort-balanced", "effort-best"):
        assert runs.pop(name) == str(tmp_path / "accuracy-artifacts" / f"{name}.run")
    assert set(runs.values()) == {str(tmp_path / "accuracy.run")}


def test_gradients_are_those_of_all_windows(tmp_path: Path) -> None:
    for arguments, expected in (((), "128"), (("--samples", "4"), "4")):
        for row in (ROW["rows-64"], ROW["average-4.4"]):
            command = row.command(options(tmp_path, *arguments))
            assert command[command.index("--gradient-samples") + 1] == expected
    assert "--gradient-samples" not in ROW["compensating-64"].command(options(tmp_path))


def test_every_row_is_a_configuration_of_its_own() -> None:
    from accullm_cli.config_file import load_config, presets_of
    from accullm_cli.config_options import options as declared

    key_of = {option.flag: option.key for option in declared()}
    seen = set()
    for row in script.ROWS:
        given = dict(zip(row.flags[::2], row.flags[1::2], strict=True))
        presets = presets_of(given.pop("--effort", None))
        flags = {key_of[flag]: [value] if flag == "--encodings" else value for flag, value in given.items()}
        config = load_config("m", presets, flags=flags)
        assert row.with_gradients or row.has_own_run or not config.plan.is_average
        seen.add((row.with_gradients, config.to_yaml()))
    assert len(seen) == len(script.ROWS)


def test_a_report_becomes_a_line_of_the_table() -> None:
    result = script.result_of(ROW["untouched-64"], report(), ("accullm", "convert"))
    assert script.fidelity_table([result]).splitlines() == [
        "| method | bits/weight | perplexity | mean KL (nats) | p99 KL | top-1 agreement | time | peak |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| error feedback, 0.5% outliers untouched, groups of 64 | 4.402 | 16.40 [14.90, 18.10] "
        "| 0.0500 [0.0450, 0.0550] | 0.610 [0.500, 0.720] | 84.59% [81.27%, 87.40%] | 1 min 10 s | 1 GB |",
    ]


def test_the_cost_of_every_stage_is_shown_and_a_missing_one_as_a_dash() -> None:
    result = script.result_of(ROW["nearest-64"], report(), ())
    assert script.cost_table([result, peer()]).splitlines()[2:] == [
        "| nearest, groups of 64 | 1 min 01 s, 1 GB | - | 9.0 s, 500 MB | - | 3.0 s, 700 MB |"
    ]


def test_the_text_above_says_on_what_it_was_measured() -> None:
    results = [script.result_of(ROW["nearest-64"], report(), ("accullm", "convert", "a b")), peer()]
    lines = script.render("tiny", results).splitlines()
    assert lines[0] == (
        "tiny, measured on 1,536 tokens in 3 windows of held-out text, 95% confidence intervals in brackets."
    )
    assert lines[1] == (
        "The original's perplexity is 15.61 [14.00, 17.00]; the noise floor of the KL (one bfloat16 rounding per "
        "block) is 3.3e-05 nats."
    )
    assert lines[-2:] == ["    accullm convert 'a b'", "    python run_peer.py  # tool 1.2"]


@pytest.mark.usefixtures("drawn_figures")
def test_conversions_run_in_order_and_results_are_kept_after_each(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(command: list[str], **others: object) -> subprocess.CompletedProcess[str]:
        if ran:
            assert len(json.loads((tmp_path / "accuracy.json").read_text())["results"]) == len(ran)
        ran.append(Path(command[command.index("--out") + 1]).name)
        return subprocess.CompletedProcess(command, 0, json.dumps({"reports": [report(0.01 * len(ran))]}))

    monkeypatch.setattr(subprocess, "run", run)
    arguments = ["--model", str(model), "--out", str(tmp_path / "accuracy")]
    assert script.main([*arguments, "--rows", "rows-64", "compensating-64", "nearest-64"]) == 0
    assert ran == ["nearest-64", "compensating-64", "rows-64"]
    content = json.loads((tmp_path / "accuracy.json").read_text())
    assert (content["schema_version"], content["model"]) == (3, "tiny")
    assert [round(result["mean_kl"]["value"], 6) for result in content["results"]] == [0.01, 0.02, 0.03]
    assert (tmp_path / "accuracy.md").read_text() == capsys.readouterr().out
    assert (tmp_path / "accuracy.svg").read_text().startswith("<svg")


def test_rows_of_an_earlier_call_are_kept_if_that_is_asked_for(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = iter((0.01, 0.02, 0.03, 0.04))

    def run(command: list[str], **others: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, json.dumps({"reports": [report(next(figures))]}))

    monkeypatch.setattr(subprocess, "run", run)
    out = ["--model", str(model), "--out", str(tmp_path / "accuracy")]
    names = []
    for rows in (["average-4.4"], ["nearest-64", "--append"], ["average-4.4", "--append"]):
        assert script.main([*out, "--rows", *rows]) == 0
        results = script.read_results(tmp_path / "accuracy", "tiny")
        names.append([(result.name, round(result.mean_kl.value, 6)) for result in results])
    assert names == [
        [("average-4.4", 0.01)],
        [("nearest-64", 0.02), ("average-4.4", 0.01)],
        [("nearest-64", 0.02), ("average-4.4", 0.03)],
    ]
    assert script.main([*out, "--rows", "feedback-64"]) == 0
    assert [result.name for result in script.read_results(tmp_path / "accuracy", "tiny")] == ["feedback-64"]

    # Those of another model are not: they would stand in one table.
    other = tmp_path / "other"
    other.mkdir()
    assert script.main(["--model", str(other), *out[2:], "--append"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {tmp_path / 'accuracy.json'}: has results of tiny, not of other; give another --out"
    )


def test_a_model_is_named_or_lies_in_a_directory_and_each_has_results_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert script.main(["--model", "gemma3-270m"]) == 2
    assert capsys.readouterr().err == (
        "error: work/gemma3-270m: is not prepared; "
        "run scripts/prepare_demo_model.py --model gemma3-270m --out work/gemma3-270m\n"
    )
    (tmp_path / "work" / "gemma3-270m").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    for given, directory in (("gemma3-270m", "work/gemma3-270m"), ("mine", "mine"), (str(tmp_path / "mine"), None)):
        assert script.model_directory(given) == Path(directory or given)
    outs = [script.parse(["--model", given]).out for given in ("gemma3-270m", "work/gemma3-270m", "a/mine")]
    assert outs == [Path("work/bench/gemma3-270m/accuracy")] * 2 + [Path("work/bench/mine/accuracy")]
    assert script.parse([]).out == Path("work/bench/smollm2-135m/accuracy")


def test_a_conversion_that_fails_ends_the_benchmark_with_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **others: subprocess.CompletedProcess(command, 4, ""))
    arguments = ["--model", str(model), "--out", str(tmp_path / "accuracy"), "--rows", "feedback-64"]
    assert script.main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: row feedback-64: accullm convert ended with exit code 4"
    assert not (tmp_path / "accuracy.md").exists()


# -- other tools -------------------------------------------------------------------------------------------


def peer_entry() -> dict[str, Any]:
    """A line of what bench_peers.py writes."""
    (divergence,) = report()["measurements"]
    fidelity = {figure["name"]: figure["estimate"] for figure in divergence["figures"]}
    figures = ("perplexity_original", "perplexity", "mean_kl", "mean_kl_floor", "kl_p99", "top1_agreement")
    return {
        "name": "tool",
        "label": "another tool",
        "group_size": 64,
        "bits_per_weight": 4.25,
        **{name: fidelity[name] for name in figures},
        "windows": 3,
        "tokens": 1536,
        "seconds": 100.0,
        "peak_bytes": 2_000_000_000,
        "versions": {"tool": "1.2"},
        "settings": {"bits": 4},
        "command": ["python", "run_peer.py"],
    }


def peer() -> Any:
    return script.peer_result(peer_entry())


def test_another_tool_is_a_line_of_the_same_table() -> None:
    line = script.fidelity_table([peer()]).splitlines()[2]
    assert line.startswith("| another tool | 4.250 | 16.40 [14.90, 18.10] | 0.0500 [0.0450, 0.0550] |")
    assert line.endswith("| 1 min 40 s | 2 GB |")


def test_other_tools_are_measured_on_the_same_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **others: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        (tmp_path / "peers.json").write_text(json.dumps({"results": [peer_entry()]}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    arguments = [
        "--model", str(model), "--out", str(tmp_path / "accuracy"), "--rows",
        "--peer", "hqq=a/python", "--peer", "gptqmodel=b/python",
    ]  # fmt: skip
    assert script.main(arguments) == 0
    assert script.main([*arguments, "--peer-rows", "hqq", "gptqmodel"]) == 0
    expected = [
        str(script.PEERS), "--model", str(model), "--run", str(tmp_path / "accuracy.run"),
        "--out", str(tmp_path / "peers"), "--peer", "hqq=a/python", "--peer", "gptqmodel=b/python",
    ]  # fmt: skip
    assert [command[1:] for command in commands] == [expected, [*expected, "--rows", "hqq", "gptqmodel"]]
    assert [result.name for result in script.read_results(tmp_path / "accuracy", "tiny")] == ["peer tool"]


@pytest.mark.usefixtures("drawn_figures")
def test_the_plot_shows_every_line(tmp_path: Path) -> None:
    results = [script.result_of(ROW[name], report(), ()) for name in ("nearest-64", "average-4.1", "average-4.4")]
    picture = script.draw("tiny", [*results, peer()])
    for text in ("another tool", "nearest, groups of 64", "AccuLLM, an average of bits", "bits per weight", "tiny"):
        assert text in picture
    assert script.draw("tiny", [*results, peer()]) == picture
