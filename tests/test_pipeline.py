"""Stages alone and together, dry runs, and validation of artifacts wherever they are."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from accullm_cli.commands.inspect import inspect
from accullm_cli.config import Config
from accullm_cli.errors import AccullmError
from accullm_cli.formats.manifest import read_manifest
from accullm_cli.pipeline import (
    STAGES,
    artifact_path,
    convert,
    convert_all,
    dry_run,
    run_path,
    run_stage,
    validate_artifact,
)
from accullm_cli.progress import Event
from accullm_cli.run import RunDirectory
from tests.streaming import short_config
from tests.tiny import make_checkpoint

FAST = {"rounding__method": "nearest", "rounding__grid": "minmax", "calibration__samples": 1}


def fast_config(model: Path, out: Path, **settings: object) -> Config:
    return short_config(model, out, **(FAST | settings))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def finished(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose run directory lies beside it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    convert(fast_config(llama, out))
    return out


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time of change."""
    paths = sorted(directory.rglob("*"))
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file()}


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(AccullmError) as caught:
        call()
    assert caught.value.exit_code == 2
    return caught.value.line()


# -- one stage alone ---------------------------------------------------------------------------------------


def test_stages_alone_end_where_a_conversion_ends(llama: Path, finished: Path, tmp_path: Path) -> None:
    config = fast_config(llama, tmp_path / "out")
    for number, stage in enumerate(STAGES):
        result = run_stage(stage, config)
        assert (result.stage, result.run) == (stage, str(tmp_path / "out.run"))
        assert result.outputs
        assert all(Path(output).exists() for output in result.outputs)
        done = [name.split()[0] for name in RunDirectory(tmp_path / "out.run").stages()]
        assert done == sorted(STAGES[: number + 1])  # the manifest's order is by name
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


@pytest.mark.parametrize(
    ("stage", "settings", "outdated", "why"),
    [
        ("profile", {"calibration__samples": 2}, "calibrate", "config changed (calibration.samples)"),
        ("quantize", {"plan__bits": 3}, "profile", "config changed (plan.bits)"),
        ("validate", {"machine__seed": 4}, "calibrate", "config changed (machine.seed)"),
        ("export", {"rounding__damping": 0.5}, "quantize", "config changed (rounding.damping)"),
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
    assert [stage for stage, kind in seen if kind == "skip"] == ["calibrate"]
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
    assert [stage.reason for stage in second.stages] == ["forced"] * 5
    assert second.artifact_sha256 == first.artifact_sha256


# -- the report --------------------------------------------------------------------------------------------


def test_a_contract_that_is_not_met_is_reported_not_raised(llama: Path, finished: Path) -> None:
    config = fast_config(llama, finished, validation__require="[mean_kl<=1e-9,bits_per_weight<=8]")
    report = convert(config)
    assert not report.contract_met
    assert [(clause.text, clause.met) for clause in report.contract] == [
        ("mean_kl<=1e-9", False),
        ("bits_per_weight<=8", True),
    ]
    assert report.contract[0].measured == report.fidelity.mean_kl.value
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
    assert [stage.ran for stage in second.stages] == [False] * 5
    assert second.artifact_sha256 == first.artifact_sha256
    assert torch.get_num_threads() == before


def test_another_thread_count_is_a_reason_to_run_again(llama: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished.with_name("out.run"), tmp_path / "run")
    config = fast_config(llama, tmp_path / "out", machine__run=tmp_path / "run", machine__threads=2)
    assert str(dry_run(config).stages[0].reason) == "machine changed (threads)"


# -- dry runs ----------------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing(llama: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    config = fast_config(llama, place / "out")
    before = snapshot(llama.parent)
    planned = dry_run(config)
    assert list(place.iterdir()) == []
    assert snapshot(llama.parent) == before
    assert (planned.run, planned.artifact) == (str(place / "out.run"), str(place / "out"))
    assert [(stage.name, stage.reason, stage.ran) for stage in planned.stages] == [
        (name, "new", True) for name in STAGES[:-1]
    ]
    assert planned.peak_bytes > 100_000_000


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("llama-tied", {"plan__group_size": 128, "plan__bits": 3, "plan__outliers": 0}),
        ("mixtral", {"plan__symmetric": True, "plan__group_size": -1}),
    ],
)
def test_a_dry_runs_bits_per_weight_are_the_artifacts(name: str, settings: dict[str, object], tmp_path: Path) -> None:
    source = make_checkpoint(name, tmp_path / "model")
    config = fast_config(source, tmp_path / "out", **settings)
    planned = dry_run(config)
    assert convert(config).bits_per_weight == planned.bits_per_weight


@pytest.mark.parametrize(
    ("settings", "reasons"),
    [
        ({}, ["up to date"] * 4),
        ({"validation__require": "[mean_kl<=1]"}, ["up to date"] * 4),
        (
            {"plan__outliers": 0.1},
            ["up to date", "config changed (plan.outliers)", "input changed (profile)", "input changed (quantize)"],
        ),
        (
            {"rounding__damping": 0.5},
            ["up to date", "up to date", "config changed (rounding.damping)", "input changed (quantize)"],
        ),
        (
            {"machine__seed": 3},
            [
                "config changed (machine.seed)",
                "input changed (calibrate)",
                "config changed (machine.seed)",
                "input changed (quantize)",
            ],
        ),
    ],
)
def test_a_dry_run_gives_the_reasons_of_the_run(
    settings: dict[str, object], reasons: list[str], llama: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.with_name("out.run"), run)
    # The artifact stays where it is, and is replaced below: by one of its own.
    shutil.copytree(finished, tmp_path / "out")
    manifest = (run / "manifest.json").read_text().replace(str(finished), str(tmp_path / "out"))
    (run / "manifest.json").write_text(manifest)
    config = fast_config(llama, tmp_path / "out", machine__run=run, **settings)
    planned = dry_run(config)
    assert [stage.reason for stage in planned.stages] == reasons
    done = convert(config)
    assert [(stage.reason, stage.ran) for stage in done.stages[:4]] == [(s.reason, s.ran) for s in planned.stages]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"export__format": "[compressed-tensors]", "plan__outliers": 0, "plan__bits": 5},
            "--format compressed-tensors: compressed-tensors holds 4 or 8 bits, and "
            "model.layers.0.self_attn.q_proj has 5 (and 13 more); use --bits 4 or --bits 8, or export to the format "
            "accullm",
        ),
        (
            {"machine__device": "cuda:0"},
            "--device: cuda:0 is not supported: this version computes on the CPU; give cpu",
        ),
        (
            {"machine__run": "{tmp}/mine"},
            "{tmp}/mine: holds something else than a run; give another directory with --run",
        ),
        (
            {"export__out": "{tmp}/mine"},
            "{tmp}/mine: holds something else than an artifact; give an empty or new directory with --out",
        ),
    ],
)
@pytest.mark.parametrize("call", [dry_run, convert])
def test_a_dry_run_refuses_what_the_run_would(
    call: Callable[[Config], object], settings: dict[str, object], line: str, llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    settings = {key: str(value).replace("{tmp}", str(tmp_path)) for key, value in settings.items()}
    config = fast_config(llama, tmp_path / "out", **settings)
    assert refusal(lambda: call(config)) == line.replace("{tmp}", str(tmp_path))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "thesis.txt"]


# -- paths -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "bits", "name"),
    [
        ("work/smollm2-135m", 4, "smollm2-135m-int4"),
        ("work/smollm2-135m/", 3, "smollm2-135m-int3"),
        ("owner/Name-7B@main", 4, "Name-7B-int4"),
        ("models/tiny.gguf", 4, "tiny-int4"),
        ("llama-7b", 8, "llama-7b-int8"),
    ],
)
def test_the_artifact_is_named_after_the_model(model: str, bits: int, name: str) -> None:
    config = Config(model=model)
    config = config.model_copy(update={"plan": config.plan.model_copy(update={"bits": bits})})
    assert artifact_path(config) == Path(name)
    assert run_path(config) == Path(f"{name}.run")


def placed(out: Path, run: Path | None = None) -> Config:
    config = Config(model="m")
    return config.model_copy(
        update={
            "export": config.export.model_copy(update={"out": out}),
            "machine": config.machine.model_copy(update={"run": run}),
        }
    )


def test_the_run_directory_lies_beside_the_artifact_or_where_it_is_asked_for(tmp_path: Path) -> None:
    assert run_path(placed(tmp_path / "a")) == tmp_path / "a.run"
    assert run_path(placed(tmp_path / "a", tmp_path / "b")) == tmp_path / "b"


def test_the_current_directory_may_become_the_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no name of its own to make other names from."""
    (tmp_path / "int4").mkdir()
    monkeypatch.chdir(tmp_path / "int4")
    assert artifact_path(placed(Path("."))) == tmp_path / "int4"
    assert artifact_path(placed(Path(".."))) == tmp_path
    assert run_path(placed(Path("."))) == tmp_path / "int4.run"


def test_the_root_is_no_place_for_an_artifact() -> None:
    line = "/: is no place for an artifact; give another directory with --out"
    assert refusal(lambda: artifact_path(placed(Path("/")))) == line


# -- artifacts of somebody else ----------------------------------------------------------------------------


@pytest.fixture
def artifact(finished: Path, tmp_path: Path) -> Path:
    """Moved away from where it was made, without its run directory."""
    shutil.copytree(finished, tmp_path / "moved")
    return tmp_path / "moved"


def test_a_moved_artifact_is_measured_against_a_moved_original(llama: Path, artifact: Path, tmp_path: Path) -> None:
    expected = convert(fast_config(llama, artifact.with_name("again")))
    shutil.copytree(llama, tmp_path / "original")
    config = fast_config(llama, artifact).model_copy(update={"model": str(tmp_path / "original")})
    report = validate_artifact(artifact, config)
    assert report.fidelity == expected.fidelity
    assert report.artifact == str(artifact)
    assert report.model == str(tmp_path / "original")
    assert [stage.name for stage in report.stages] == ["reference", "validate accullm"]
    assert report.bits_per_weight == expected.bits_per_weight
    assert (artifact.with_name("moved.validation") / "run.yaml").exists()
    assert read_manifest(artifact).fidelity is not None


def test_measuring_again_finds_everything_done(llama: Path, artifact: Path) -> None:
    config = fast_config(llama, artifact)
    validate_artifact(artifact, config)
    again = validate_artifact(artifact, config)
    assert [stage.reason for stage in again.stages] == ["up to date", "up to date"]
    forced = validate_artifact(artifact, config, fresh=True)
    assert [stage.reason for stage in forced.stages] == ["forced", "forced"]


def test_another_model_is_not_its_original(artifact: Path, tmp_path: Path) -> None:
    other = make_checkpoint("qwen2", tmp_path / "other")
    before = snapshot(artifact)
    assert refusal(lambda: validate_artifact(artifact, fast_config(other, artifact))) == (
        f"{artifact}: was made from another model than {other}; name its original with --original"
    )
    assert snapshot(artifact) == before
    assert not artifact.with_name("moved.validation").exists()


def test_an_artifact_whose_original_has_no_name_to_find_it_by(artifact: Path) -> None:
    """It was made from a directory, of which it keeps the last part alone."""
    config = fast_config(artifact, artifact)
    assert refusal(lambda: validate_artifact(artifact, config)) == (
        f"{artifact}: was made from model; name its place with --original"
    )


def test_what_is_no_artifact_is_refused(llama: Path, tmp_path: Path) -> None:
    config = fast_config(llama, tmp_path / "out")
    assert refusal(lambda: validate_artifact(llama, config)) == (
        f"{llama}/accullm.json: file is missing; copy or download it again"
    )


def test_a_validation_leaves_a_conversions_files_alone(llama: Path, finished: Path, tmp_path: Path) -> None:
    """Both keep tokens and a reference, but a validation has no calibration text."""
    run = tmp_path / "run"
    shutil.copytree(finished.with_name("out.run"), run)
    before = snapshot(run)
    config = fast_config(llama, finished, machine__run=run)
    assert refusal(lambda: validate_artifact(finished, config)) == (
        f"{run}: holds a conversion; give another directory with --run"
    )
    assert snapshot(run) == before


def test_a_conversion_does_not_go_on_in_a_validations_directory(llama: Path, artifact: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = fast_config(llama, artifact, machine__run=run)
    validate_artifact(artifact, config)
    line = f"{run}: holds the validation of a finished artifact; give another directory with --run"
    config = config.model_copy(update={"export": config.export.model_copy(update={"out": tmp_path / "out"})})
    assert refusal(lambda: convert(config)) == refusal(lambda: dry_run(config)) == line


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
    ended = subprocess.run(arguments, capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent)
    assert (ended.returncode, ended.stdout) == (0, f"{tmp_path / 'out'} True\n"), ended.stderr


def test_reports_are_values(llama: Path, finished: Path) -> None:
    """Nothing in a report of a finished conversion depends on when it is asked for, but whether stages ran."""
    config = fast_config(llama, finished)
    first, second = convert(config), convert(config)
    assert replace(first, stages=(), artifact_bytes=0) == replace(second, stages=(), artifact_bytes=0)
