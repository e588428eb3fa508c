"""Dry runs: they write nothing, and say what the run will do and why."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

from accullm_cli.config import Config
from accullm_cli.config_file import load_config
from accullm_cli.model.integrity import ContentHashes
from accullm_cli.pipeline import (
    STAGES,
    PlannedStage,
    convert,
    convert_all,
    dry_run,
    run_stage,
)
from tests.pipeline.observe import refusal, snapshot
from tests.streaming import copy_run, fast_config, write_text
from tests.tiny import make_checkpoint

ALL = ["reading", "calibrate", "profile", "quantize", "export", "reference", "validate accullm"]


def test_a_dry_run_writes_nothing(llama: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    config = fast_config(llama, place / "out")
    before = snapshot(llama.parent)
    planned = dry_run(config)
    assert list(place.iterdir()) == []
    assert snapshot(llama.parent) == before
    assert (planned.run, planned.artifact) == (str(place / "out.run"), str(place / "out"))
    assert planned.stages == tuple(PlannedStage(name, "new", True) for name in ALL)
    assert planned.peak_bytes > 100_000_000
    assert planned.device.startswith("CPU with ")


def test_a_dry_run_reads_contents_only_where_something_was_made_from_them(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = fast_config(llama, tmp_path / "out")
    read: list[Path] = []
    hashed = ContentHashes.of

    def of(hashes: ContentHashes, paths: Sequence[Path]) -> dict[Path, str]:
        read.extend(paths)
        return hashed(hashes, paths)

    monkeypatch.setattr(ContentHashes, "of", of)
    dry_run(config)
    assert read == []
    run_stage("calibrate", config)
    read.clear()
    assert [stage.runs for stage in dry_run(config).stages[:3]] == [False, False, True]
    assert llama / "model.safetensors" in read


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("llama-tied", {"plan__group_size": 128, "plan__bits": 3, "plan__outliers": 0}),
        ("mixtral", {"plan__symmetric": True, "plan__group_size": -1}),
        ("llama", {"plan__embedding_bits": 4}),
    ],
)
def test_a_dry_runs_bits_per_weight_are_the_artifacts(name: str, settings: dict[str, object], tmp_path: Path) -> None:
    source = make_checkpoint(name, tmp_path / "model")
    config = fast_config(source, tmp_path / "out", **settings)
    planned = dry_run(config)
    assert planned.size_is_exact
    assert convert(config).bits_per_weight == planned.bits_per_weight


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"plan__bits": "4.4"}, 4.4),
        ({"plan__bits": "5.0"}, 5.0),
        ({"search__golden": True, "validation__require": "[mean_kl<=1]"}, 6.0),
    ],
)
def test_a_dry_run_of_an_average_says_what_is_not_exceeded(
    settings: dict[str, object], most: float, llama: Path, tmp_path: Path
) -> None:
    settings = {"calibration__samples": 6, "validation__windows": 4, "search__max_plans": 1, **settings}
    config = fast_config(llama, tmp_path / "out", **settings)
    planned = dry_run(config)
    assert (planned.bits_per_weight, planned.size_is_exact) == (most, False)
    report = convert(config)
    assert most - 0.6 < report.bits_per_weight <= most or "search__golden" in settings
    tensors = [tensor for path in (tmp_path / "out").glob("*.safetensors") for tensor in load_file(path).values()]
    companions = sum((tmp_path / "out" / path.name).stat().st_size for path in llama.glob("tokenizer*"))
    assert sum(tensor.nbytes for tensor in tensors) + companions <= planned.artifact_bytes


def test_an_average_of_five_is_not_a_width_of_five(llama: Path, tmp_path: Path) -> None:
    """Not in the plan, nor in what counts as up to date, nor in the artifact's name, nor in what a run remembers."""
    config = fast_config(llama, tmp_path / "out", plan__bits="5")
    convert(config)
    average = fast_config(llama, tmp_path / "out", plan__bits="5.0")
    assert dry_run(average).stages[2].reason == "config changed (plan.bits)"
    assert convert(average).bits_per_weight <= 5.0 < convert(config).bits_per_weight
    remembered = load_config(files=[tmp_path / "out.run" / "run.yaml"])
    assert (remembered.plan.bits, remembered.plan.is_average) == (5, False)
    assert dry_run(remembered).stages[2].reason == "up to date"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return copy_run(finished, tmp_path)


def planned_and_done(config: Config) -> tuple[list[PlannedStage], list[PlannedStage]]:
    """The stages as a dry run foresees them, and as the conversion after it finds them."""
    planned = list(dry_run(config).stages)
    done = {stage.name: stage for report in convert_all(config) for stage in report.stages}
    return planned, [PlannedStage(stage.name, stage.reason, stage.ran) for stage in done.values()]


@pytest.mark.parametrize(
    ("settings", "reasons"),
    [
        ({}, ["up to date"] * 7),
        ({"validation__require": "[mean_kl<=1]"}, ["up to date"] * 7),
        ({"rounding__damping": 0.5}, ["up to date"] * 7),  # nearest rounding knows none
        (
            {"plan__outliers": 0.1},
            [
                *["up to date"] * 2,
                "config changed (plan.outliers)",
                "input changed (profile)",
                "input changed (quantize)",
                "up to date",
                "input changed (artifact)",
            ],
        ),
        (
            {"rounding__grid": "search"},
            [
                *["up to date"] * 3,
                "config changed (rounding.grid)",
                "input changed (quantize)",
                "up to date",
                "input changed (artifact)",
            ],
        ),
        (
            {"validation__windows": 2},
            [*["up to date"] * 5, "input changed (validation tokens)", "input changed (reference)"],
        ),
        (
            {"validation__text": "{text}"},
            [*["up to date"] * 5, "input changed (validation tokens)", "input changed (reference)"],
        ),
        (
            {"machine__seed": 3},
            [
                "up to date",
                "input changed (calibration tokens)",
                "input changed (calibrate)",
                "input changed (calibrate, profile)",
                "input changed (quantize)",
                "input changed (validation tokens)",
                "config changed (machine.seed)",
            ],
        ),
    ],
)
def test_a_dry_run_gives_the_reasons_of_the_run(
    settings: dict[str, object], reasons: list[str], llama: Path, copied: Path
) -> None:
    write_text(copied.with_name("own.txt"), 9)
    chosen = {key: str(value).format(text=copied.with_name("own.txt")) for key, value in settings.items()}
    planned, done = planned_and_done(fast_config(llama, copied, **chosen))
    assert [stage.reason for stage in planned] == reasons
    assert planned == done


def test_a_dry_run_supposes_that_what_is_rounded_again_comes_out_different(llama: Path, copied: Path) -> None:
    """Here it does not: with one more window of calibration text, a grid from the least to the largest is the same."""
    settings = {"calibration__samples": 2, "plan__outliers": 0}
    convert(fast_config(llama, copied, plan__outliers=0))
    planned, done = planned_and_done(fast_config(llama, copied, **settings))
    assert planned[:6] == done[:6]
    assert planned[6].reason == "input changed (artifact)"
    assert done[6] == PlannedStage("validate accullm", "up to date", False)


def test_an_artifact_that_is_written_again_need_not_be_measured_again(llama: Path, copied: Path) -> None:
    shutil.rmtree(copied)
    planned, done = planned_and_done(fast_config(llama, copied))
    assert planned[4].reason == f"output missing ({copied}/README.md)"
    assert planned[6] == PlannedStage("validate accullm", "up to date", False)
    assert planned == done


def test_an_artifact_that_is_written_elsewhere_need_not_be_measured_again(llama: Path, copied: Path) -> None:
    run = copied.with_name("out.run")
    planned, done = planned_and_done(fast_config(llama, copied.with_name("other"), machine__run=run))
    assert [stage.reason for stage in planned[4:]] == ["config changed (export.out (accullm))", *["up to date"] * 2]
    assert planned == done


def test_an_artifact_that_was_changed_is_measured_again(llama: Path, copied: Path) -> None:
    tokenizer = copied / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert dry_run(fast_config(llama, copied)).stages[6] == PlannedStage(
        "validate accullm", "input changed (artifact)", True
    )


def test_a_dry_run_has_the_size_of_each_format(llama: Path, tmp_path: Path) -> None:
    formats = {"export__format": "[accullm,compressed-tensors]", "plan__outliers": 0}
    config = fast_config(llama, tmp_path / "out", **formats)
    planned = dry_run(config)
    assert [(its.format, its.path) for its in planned.artifacts] == [
        (name, str(tmp_path / "out" / name)) for name in ("accullm", "compressed-tensors")
    ]
    assert planned.size_is_exact
    assert [its.bits_per_weight for its in planned.artifacts] == [its.bits_per_weight for its in convert_all(config)]
    copied = [path for path in llama.iterdir() if path.name not in ("config.json", "model.safetensors")]
    companions = sum(path.stat().st_size for path in copied)
    for its in planned.artifacts:
        tensors = [tensor for path in Path(its.path).glob("*.safetensors") for tensor in load_file(path).values()]
        assert sum(tensor.nbytes for tensor in tensors) + companions == its.artifact_bytes
    first, second = planned.artifacts
    assert (planned.bits_per_weight, planned.artifact_bytes) == (first.bits_per_weight, first.artifact_bytes)
    assert first.bits_per_weight != second.bits_per_weight


def test_a_dry_run_has_a_line_for_the_validation_of_each_format(llama: Path, tmp_path: Path) -> None:
    config = fast_config(llama, tmp_path / "out", plan__outliers=0)
    convert(config)
    formats = ["accullm", "compressed-tensors"]
    config = config.model_copy(update={"export": config.export.model_copy(update={"format": formats})})
    planned, done = planned_and_done(config)
    assert [(stage.name, stage.reason) for stage in planned[2:]] == [
        ("profile", "up to date"),
        ("quantize", "up to date"),
        ("profile compressed-tensors", "new"),
        ("quantize compressed-tensors", "new"),
        ("export", "config changed (export.out (accullm))"),
        ("reference", "up to date"),
        ("validate accullm", "up to date"),
        ("validate compressed-tensors", "new"),
    ]
    assert planned == done


def test_a_fresh_dry_run_forces_what_a_fresh_run_would(llama: Path, finished: Path) -> None:
    config = fast_config(llama, finished)
    assert [stage.reason for stage in dry_run(config, fresh=True).stages] == ["forced"] * 7
    alone = dry_run(config, fresh=True, only="quantize").stages
    assert [stage.reason for stage in alone] == [*["up to date"] * 3, "forced"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_dry_run_of_one_stage_ends_with_it_or_refuses_as_it_would(stage: str, llama: Path, finished: Path) -> None:
    named = [planned.name for planned in dry_run(fast_config(llama, finished), only=stage).stages]
    expected = {"calibrate": ["reading", "calibrate", "reference"], "validate": ALL}
    assert named == expected.get(stage, ALL[: ALL.index(stage) + 1] if stage in ALL else [])
    config = fast_config(llama, finished, machine__seed=3)
    if stage == "calibrate":
        assert dry_run(config, only=stage).stages == (
            PlannedStage("reading", "up to date", False),
            PlannedStage("calibrate", "input changed (calibration tokens)", True),
            PlannedStage("reference", "input changed (validation tokens)", True),
        )
        return
    assert refusal(lambda: dry_run(config, only=stage)) == refusal(lambda: run_stage(stage, config))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"export__format": "[awq]", "plan__outliers": 0, "plan__bits": 5},
            "--format awq: awq holds 4 bits, and model.layers.0.self_attn.q_proj has 5 (and 13 more); use --bits 4, or "
            "export to the format accullm",
        ),
        (
            {"export__format": "[awq]", "plan__outliers": 0, "plan__embedding_bits": 8},
            "--format awq: awq keeps embedding and output head as they are, and "
            "model.embed_tokens is to have 8 bits; leave out --embedding-bits, or export to the format accullm",
        ),
        (
            {"calibration__text": "{tmp}/corpus.txt"},
            "{tmp}/corpus.txt: no such file; check its spelling",
        ),
        (
            {"validation__text": "{tmp}/mine"},
            "{tmp}/mine: cannot be read (Is a directory)",
        ),
        (
            {"calibration__seq_len": 257},
            "--seq-len: 257 is more than the model's 256 positions; give 256 or less",
        ),
        (
            {"machine__device": "cuda:0"},
            "--device cuda:0: torch sees no GPU; give cpu; accullm doctor says what is missing",
        ),
        (
            {"export__format": "[compressed-tensors]", "plan__outliers": 0, "validation__speed": True},
            "--speed: the kernels multiply by the format accullm, not by compressed-tensors; leave it out",
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
