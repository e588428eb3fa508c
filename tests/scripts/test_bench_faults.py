"""The benchmark of faults: that it sees what is not survived, and what a disturbed call ends as."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scripts.loading import load_script

script = load_script("bench_faults")
NEAREST = {"rounding.method": "nearest", "rounding.grid": "minmax"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return script.make_model(tmp_path_factory.mktemp("faults") / "model")


def test_the_table_counts_what_was_not_survived() -> None:
    faults = [script.Fault("kill", 7, "other bytes in config.json")]
    assert script.render({"kill": 20, "full": 4}, faults, 61.2).splitlines() == [
        "| what | times | not survived |",
        "| --- | --- | --- |",
        "| kill | 20 | 1 |",
        "| full | 4 | 0 |",
        "",
        "In 61 s.",
        "kill, seed 7: other bytes in config.json",
    ]


def test_each_disturbance_is_one_and_is_survived(model: Path, tmp_path: Path) -> None:
    whole = script.undisturbed(model, tmp_path / "whole", NEAREST)
    expected, seconds, operations = whole
    assert "accullm.json" in expected
    assert operations > 40
    config = script.config_of(model, tmp_path / "out", NEAREST)
    assert script.call(config, fail_at=operations // 2).code == -9
    full = script.call(config, fail_at=operations // 2, is_full=True)
    assert (full.code, full.line.count("\n")) == (4, 0)
    assert "no space left on the disk" in full.line
    assert script.call(config, kill_after=0.0).code == -9
    for kind in ("operation", "full"):
        assert script.disturb(kind, 0, model, tmp_path / "out", NEAREST, whole) == ""
    changed = ({**expected, "config.json": "0"}, seconds, operations)
    assert script.disturb("operation", 0, model, tmp_path / "out", NEAREST, changed) == "other bytes in config.json"
