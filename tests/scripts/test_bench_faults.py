"""The benchmark of faults: that it sees what is not survived, and what a disturbed call ends as."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.scripts.loading import load_script

script = load_script("bench_faults")
NEAREST = {"rounding.method": "nearest", "rounding.grid": "minmax"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return script.make_model(tmp_path_factory.mktemp("faults") / "model")


def test_the_table_counts_what_was_hit_and_what_was_not_survived() -> None:
    faults = [script.Fault("kill", 7, "other bytes in config.json")]
    hits = {"kill": Counter({"quantize": 29, script.OPENING: 3}), "full": Counter(export=4)}
    assert script.render({"kill": 20, "full": 4}, hits, faults, 61.2).splitlines() == [
        "| what | conversions | hit | not survived |",
        "| --- | --- | --- | --- |",
        "| kill | 20 | 32 | 1 |",
        "| full | 4 | 4 | 0 |",
        "",
        "| hit in | kill | full |",
        "| --- | --- | --- |",
        "| before the first stage | 3 | 0 |",
        "| source | 0 | 0 |",
        "| reading | 0 | 0 |",
        "| calibrate | 0 | 0 |",
        "| profile | 0 | 0 |",
        "| quantize | 29 | 0 |",
        "| export | 0 | 4 |",
        "| reference | 0 | 0 |",
        "| validate | 0 | 0 |",
        "",
        "In 61 s.",
        "kill, seed 7: other bytes in config.json",
    ]


def test_each_disturbance_is_one_and_is_survived(model: Path, tmp_path: Path) -> None:
    whole = script.undisturbed(model, tmp_path / "whole", NEAREST)
    operations = whole.operations
    assert "accullm.json" in whole.hashes
    assert operations > 40
    config = script.config_of(model, tmp_path / "out", NEAREST)
    killed = script.call(config, fail_at=operations // 2)
    assert killed.code == -9
    assert killed.stage in ("quantize", "export")
    full = script.call(config, fail_at=operations // 2, is_full=True)
    assert (full.code, full.line.count("\n")) == (4, 0)
    assert "no space left on the disk" in full.line
    at_once = script.call(config, kill_after=0.0)
    assert (at_once.code, at_once.stage) == (-9, script.OPENING)
    for kind in ("operation", "full"):
        why, stages = script.disturb(kind, 0, model, tmp_path / "out", NEAREST, whole)
        assert why == ""
        assert stages
        assert set(stages) <= set(script.STAGES)
    changed = replace(whole, hashes={**whole.hashes, "config.json": "0"})
    why, _ = script.disturb("operation", 0, model, tmp_path / "out", NEAREST, changed)
    assert why == "other bytes in config.json"
