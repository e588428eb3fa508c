"""Dry runs: they write nothing, and say what the run will do and why."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from accullm_cli.config import Config
from accullm_cli.pipeline import (
    STAGES,
    convert,
    dry_run,
)
from tests.pipeline.observe import refusal, snapshot
from tests.streaming import fast_config
from tests.tiny import make_checkpoint


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
