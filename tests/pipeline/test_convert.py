"""Stages alone and together, what the report says, and the thread count of a run."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from accullm_cli.commands.inspect import inspect
from accullm_cli.config import Config
from accullm_cli.formats import open_artifact
from accullm_cli.pipeline import (
    STAGES,
    convert,
    convert_all,
    dry_run,
    run_stage,
    validate_artifact,
)
from accullm_cli.progress import Event
from accullm_cli.run import RunDirectory, locked_output
from tests.pipeline.observe import refusal, snapshot
from tests.streaming import fast_config, reference_model, write_text
from tests.tiny import make_checkpoint

# -- one stage alone ---------------------------------------------------------------------------------------


def test_stages_alone_end_where_a_conversion_ends(llama: Path, finished: Path, tmp_path: Path) -> None:
    config = fast_config(llama, tmp_path / "out")
    for number, stage in enumerate(STAGES):
        with locked_output(tmp_path / "out"):  # only what writes there needs it
            if stage in ("export", "validate"):
                assert "out: is in use by process" in refusal(partial(run_stage, stage, config))
            else:
                run_stage(stage, config)
        result = run_stage(stage, config)
        assert (result.stage, result.run) == (stage, str(tmp_path / "out.run"))
        assert result.outputs
        assert all(Path(output).exists() for output in result.outputs)
        done = RunDirectory(tmp_path / "out.run").stages().keys()
        # Calibrate reads the source first, and makes the reference along the way.
        assert {name.split()[0] for name in done} == {"reading", *STAGES[: number + 1], "reference"}
        assert [report.format for report in result.reports] == (["accullm"] if stage == "validate" else [])
    assert (tmp_path / "out/accullm.json").read_bytes() == (finished / "accullm.json").read_bytes()


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_stage_alone_needs_the_one_before_it(stage: str, llama: Path, tmp_path: Path) -> None:
    config = fast_config(llama, tmp_path / "out")
    before = STAGES[: STAGES.index(stage) - 1]
    for earlier in before:
        run_stage(earlier, config)
    missing = STAGES[STAGES.index(stage) - 1]
    assert refusal(lambda: run_stage(stage, config)) == (
        f"{tmp_path}/out.run: {missing} has not run; run accullm {missing} with the same options first"
    )
    assert (tmp_path / "out.run").exists() == bool(before)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_stage_alone_does_nothing_where_nothing_has_run(stage: str, llama: Path, tmp_path: Path) -> None:
    assert refusal(lambda: run_stage(stage, fast_config(llama, tmp_path / "out"))) == (
        f"{tmp_path}/out.run: calibrate has not run; run accullm calibrate with the same options first"
    )
    assert not (tmp_path / "out.run").exists()


@pytest.mark.parametrize(
    ("stage", "settings", "outdated", "why"),
    [
        ("profile", {"calibration__samples": 2}, "calibrate", "input changed (calibration tokens)"),
        ("quantize", {"plan__bits": 3}, "profile", "config changed (plan.bits)"),
        ("validate", {"machine__seed": 4}, "calibrate", "input changed (calibration tokens)"),
        ("export", {"rounding__grid": "search"}, "quantize", "config changed (rounding.grid)"),
    ],
)
def test_a_stage_alone_refuses_what_is_out_of_date(
    stage: str, settings: dict[str, object], outdated: str, why: str, llama: Path, finished: Path
) -> None:
    run = finished.with_name("out.run")
    before = snapshot(finished)
    assert refusal(lambda: run_stage(stage, fast_config(llama, finished, **settings))) == (
        f"{run}: {outdated} is not up to date: {why}; run accullm {outdated} with the same options first"
    )
    assert snapshot(finished) == before


def test_a_stage_alone_runs_and_none_after_it(llama: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished.with_name("out.run"), tmp_path / "run")
    seen: list[tuple[str, str]] = []
    config = fast_config(llama, tmp_path / "out", machine__run=tmp_path / "run", plan__outliers=0.1)
    run_stage("profile", config, lambda event: seen.append((event.stage, event.kind)))
    assert [stage for stage, kind in seen if kind == "skip"] == ["reading", "calibrate"]
    assert {stage for stage, kind in seen if kind == "start"} == {"profile"}


def test_fresh_runs_the_stage_that_is_asked_for_again(llama: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished.with_name("out.run"), tmp_path / "run")
    events: list[Event] = []
    config = fast_config(llama, tmp_path / "out", machine__run=tmp_path / "run")
    run_stage("quantize", config, events.append, fresh=True)
    started = [(event.stage, str(event.reason)) for event in events if event.kind == "start"]
    assert started == [("quantize", "forced")]
    blocks = [str(event.reason) for event in events if event.stage == "quantize" and event.kind == "step"]
    assert blocks == ["forced", "forced"]


def test_fresh_converts_everything_again(llama: Path, tmp_path: Path) -> None:
    config = fast_config(llama, tmp_path / "out")
    first = convert(config)
    second = convert(config, fresh=True)
    assert [stage.reason for stage in second.stages] == ["forced"] * 7
    assert second.artifact_sha256 == first.artifact_sha256


def test_stopped_behind_its_reading_a_conversion_goes_on(llama: Path, finished: Path, tmp_path: Path) -> None:
    """As would the validation of a finished artifact, which begins with one, too."""

    def stop(event: Event) -> None:
        if (event.stage, event.kind) == ("calibrate", "start"):
            raise KeyboardInterrupt

    config = fast_config(llama, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        convert(config, stop)
    shutil.copytree(tmp_path / "out.run", tmp_path / "run")
    expected = ["up to date", *["new"] * 6]
    assert [stage.reason for stage in convert(config).stages] == expected
    report = validate_artifact(finished, fast_config(llama, finished, machine__run=tmp_path / "run"))
    assert [stage.reason for stage in report.stages] == expected[:3]


# -- the report --------------------------------------------------------------------------------------------


def test_a_contract_that_is_not_met_is_reported_not_raised(llama: Path, finished: Path) -> None:
    config = fast_config(llama, finished, validation__require="[mean_kl<=1e-9,bits_per_weight<=8]")
    report = convert(config)
    assert not report.contract_met
    assert [(clause.text, clause.met) for clause in report.contract] == [
        ("mean_kl<=1e-9", False),
        ("bits_per_weight<=8", True),
    ]
    assert report.contract[0].measured == report.figure("mean_kl").value
    assert report.contract[1].measured == report.bits_per_weight


def test_a_contract_that_cannot_be_read_is_refused_before_any_work(llama: Path, tmp_path: Path) -> None:
    config = fast_config(llama, tmp_path / "out")
    config = config.model_copy(update={"validation": config.validation.model_copy(update={"require": ["mean_k<=1"]})})
    line = "--require: unknown metric 'mean_k' in 'mean_k<=1'; did you mean mean_kl?"
    assert refusal(lambda: convert(config)) == refusal(lambda: dry_run(config)) == line
    assert list(tmp_path.iterdir()) == []


def test_the_report_says_what_is_stored(llama: Path, finished: Path) -> None:
    report = convert(fast_config(llama, finished))
    found = inspect(finished)
    assert report.bits_per_weight == found.bits_per_weight
    assert [linear.bits_per_weight for linear in report.linears] == [row.bits_per_weight for row in found.linears]
    files = [path for path in finished.rglob("*") if path.is_file() and path.name != "accullm.json"]
    # The card grew by what was measured after the report was made.
    card = (finished / "README.md").stat().st_size
    assert abs(report.artifact_bytes - sum(path.stat().st_size for path in files)) < card
    assert report.source_bytes == (llama / "model.safetensors").stat().st_size
    assert [linear.name for linear in report.linears][:2] == [f"model.layers.0.self_attn.{n}_proj" for n in "qk"]
    assert (Path(report.directory) / "report.html").exists()


@pytest.mark.parametrize(
    ("dtype", "formats", "settings"),
    [
        (torch.float32, "[accullm]", {}),
        (torch.bfloat16, "[compressed-tensors]", {"plan__outliers": 0}),
    ],
)
def test_bits_per_weight_count_what_lies_on_disk(
    dtype: torch.dtype, formats: str, settings: dict[str, object], tmp_path: Path
) -> None:
    source = make_checkpoint("llama", tmp_path / "model", dtype)
    report = convert(fast_config(source, tmp_path / "out", export__format=formats, **settings))
    assert report.bits_per_weight == inspect(tmp_path / "out").bits_per_weight


def test_convert_makes_one_artifact(llama: Path, tmp_path: Path) -> None:
    config = fast_config(llama, tmp_path / "out", export__format="[accullm,compressed-tensors]", plan__outliers=0)
    assert refusal(lambda: convert(config)) == (
        "export.format: convert makes one artifact; use convert_all for several formats"
    )
    reports = convert_all(config)
    assert [Path(report.artifact) for report in reports] == [tmp_path / f"out/{r.format}" for r in reports]
    assert [Path(report.directory).name for report in reports] == ["accullm", "compressed-tensors"]


def test_a_report_has_no_record_of_another_formats_validation(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "compressed_tensors" else find(name, *rest)
    )
    formats = {"export__format": "[accullm,compressed-tensors]", "validation__require": "[fallbacks<=0]"}
    native, other = convert_all(fast_config(llama, tmp_path / "out", plan__outliers=0, **formats))
    sentence = "the compressed-tensors artifact was not run as users load it: it needs the package compressed-tensors"
    assert sentence in other.records
    assert sentence not in native.records
    assert [report.contract[0].measured for report in (native, other)] == [0, 1]


# -- threads -----------------------------------------------------------------------------------------------


def threads_of(run: Path) -> int:
    count: int = yaml.safe_load((run / "run.yaml").read_text())["machine"]["threads"]
    return count


def without_threads(config: Config) -> Config:
    return config.model_copy(update={"machine": config.machine.model_copy(update={"threads": None})})


def test_a_resume_keeps_the_thread_count_it_began_with(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many the machine has by then: sums differ with the number of threads."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1}, raising=False)
    before = torch.get_num_threads()
    config = without_threads(fast_config(llama, tmp_path / "out"))
    first = convert(config)
    assert threads_of(tmp_path / "out.run") == 2
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 2})
    seen: list[int] = []
    second = convert(config, lambda event: seen.append(torch.get_num_threads()))
    assert set(seen) == {2}
    assert threads_of(tmp_path / "out.run") == 2
    assert [stage.ran for stage in second.stages] == [False] * 7
    assert second.artifact_sha256 == first.artifact_sha256
    assert torch.get_num_threads() == before


def test_another_thread_count_is_a_reason_to_run_again(llama: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished.with_name("out.run"), tmp_path / "run")
    config = fast_config(llama, tmp_path / "out", machine__run=tmp_path / "run", machine__threads=2)
    reasons = {stage.name: stage.reason for stage in dry_run(config).stages}
    assert (reasons["reading"], reasons["calibrate"]) == ("up to date", "machine changed (threads)")


# -- from Python -------------------------------------------------------------------------------------------


def test_the_public_names_convert_a_model(llama: Path, tmp_path: Path) -> None:
    """As README shows it, in a process of its own; and importing the package alone loads no torch."""
    program = (
        "import sys\n"
        "from accullm_cli import Config\n"
        "assert 'torch' not in sys.modules\n"
        "from accullm_cli import AccullmError, Event, Report, convert, load_config\n"
        "config = Config(model=sys.argv[1], export={'out': sys.argv[2]}, machine={'threads': 1},\n"
        "                calibration={'text': sys.argv[3], 'samples': 1, 'seq_len': 48},\n"
        "                validation={'text': sys.argv[3], 'windows': 2}, rounding={'method': 'nearest'})\n"
        "report = convert(config)\n"
        "assert isinstance(report, Report)\n"
        "print(report.artifact, report.contract_met)\n"
    )
    text = tmp_path / "text.txt"
    text.write_text("one two three " * 40)
    arguments = [sys.executable, "-c", program, str(llama), str(tmp_path / "out"), str(text)]
    ended = subprocess.run(arguments, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2])
    assert (ended.returncode, ended.stdout) == (0, f"{tmp_path / 'out'} True\n"), ended.stderr


def test_reports_are_values(llama: Path, finished: Path) -> None:
    """Nothing in a report of a finished conversion depends on when it is asked for, but whether stages ran."""
    config = fast_config(llama, finished)
    first, second = convert(config), convert(config)
    assert replace(first, stages=(), artifact_bytes=0) == replace(second, stages=(), artifact_bytes=0)


# -- text of another kind ----------------------------------------------------------------------------------


def test_the_figures_on_other_text_are_reported_and_not_judged(llama: Path, tmp_path: Path) -> None:
    letters = write_text(tmp_path / "letters.txt", 7)
    config = fast_config(llama, tmp_path / "out", validation__other_text=letters, validation__require="[kl_max<=9]")
    report = convert(config)
    other, judged = report.measurement("other text"), report.measurement("kl")
    assert other is not None
    assert judged is not None
    assert str(letters) in other.note
    assert (dict(other.counts)["windows"], dict(judged.counts)["windows"]) == (2, 3)
    assert report.figure("mean_kl", "other text").value != report.figure("mean_kl").value
    assert report.contract[0].measured == report.figure("kl_max").value
    names = [stage.name for stage in report.stages]
    assert names[-3:] == ["validate accullm", "other reference", "validate accullm on other text"]
    again = convert(config)
    assert again.measurements == report.measurements
    assert not any(stage.ran for stage in again.stages)


def test_other_figures_are_those_of_that_text_alone(llama: Path, tmp_path: Path) -> None:
    """The same text as text of its own, the same windows: the same figures."""
    letters = write_text(tmp_path / "letters.txt", 7)
    one = convert(fast_config(llama, tmp_path / "one", validation__other_text=letters, validation__windows=4))
    stored = load_file(tmp_path / "one.run/other/reference.safetensors")["ids"]
    model, artifact = reference_model(llama), open_artifact(tmp_path / "one")
    damaged = reference_model(llama)
    with torch.no_grad():
        for name in artifact.plan.linears:
            damaged.get_submodule(name).weight.copy_(artifact.linear(name).dequantize(torch.float32))
    first, second = (found(stored).logits.double().log_softmax(-1) for found in (model, damaged))
    kl = (first.exp() * (first - second)).sum(-1).mean()
    assert one.figure("mean_kl", "other text").value == pytest.approx(float(kl), rel=1e-3)


def test_each_further_kind_of_text_has_its_figures_and_a_stage_of_its_own(llama: Path, tmp_path: Path) -> None:
    config = fast_config(llama, tmp_path / "out", validation__other_text="languages,documents", validation__windows=4)
    report = convert(config)
    counts = {found.measure: dict(found.counts) for found in report.measurements}
    seq_len = config.calibration.seq_len
    assert counts["other text, languages"] == {"windows": 2, "tokens": 2 * seq_len}
    assert counts["other text, documents"] == {"windows": 2, "tokens": 2 * 4 * seq_len}
    more = convert(
        fast_config(llama, tmp_path / "out", validation__other_text="tools,languages", validation__windows=4)
    )
    assert [stage.name for stage in more.stages if stage.ran] == ["tools reference", "validate accullm on tools"]
    assert [found.measure for found in more.measurements] == ["kl", "other text, tools", "other text, languages"]


def test_a_dry_run_knows_of_the_other_text(llama: Path, tmp_path: Path) -> None:
    letters = write_text(tmp_path / "letters.txt", 7)
    config = fast_config(llama, tmp_path / "out", validation__other_text=letters)
    before = [(stage.name, stage.runs) for stage in dry_run(config).stages]
    assert before[-2:] == [("other reference", True), ("validate accullm on other text", True)]
    report = convert(config)
    assert [name for name, _ in before] == [stage.name for stage in report.stages]
    assert not any(stage.runs for stage in dry_run(config).stages)


def test_other_text_that_is_too_short_is_refused_before_any_work(llama: Path, tmp_path: Path) -> None:
    letters = tmp_path / "letters.txt"
    letters.write_text("dear sir " * 6)
    config = fast_config(llama, tmp_path / "out", validation__other_text=letters)
    for call in (convert, dry_run):
        assert refusal(lambda call=call: call(config)) == (
            f"other text {letters}: has 1 windows, and an interval needs 2; give more text, or --other-text none"
        )
    assert not (tmp_path / "out.run").exists()
