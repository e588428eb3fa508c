"""The benchmark of two conversions: what it starts, what it counts, and when it says no."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scripts.loading import load_script
from tests.tiny import make_checkpoint

script = load_script("bench_side_by_side")
FIGURES = script.Figures((10.0, 20.0, 12.0), {2: (30.0, 24.0, 25.0), 4: (60.0, 50.0, 40.0)})


def test_the_table_has_medians_and_the_verdict() -> None:
    assert script.render(FIGURES).splitlines() == [
        "| conversions | median | each |",
        "| --- | --- | --- |",
        "| one alone | 12 s | 10 s, 20 s, 12 s |",
        "| 2 side by side | 25 s | 30 s, 24 s, 25 s |",
        "| 4 side by side | 50 s | 1 min 00 s, 50 s, 40 s |",
        "",
        "2 take 2.08 times as long as one; target at most 2.3: met.",
        "4 take 4.17 times as long as one; target at most 4.6: met.",
    ]
    assert script.render(script.Figures((10.0,), {2: (24.0,)})).endswith("target at most 2.3: NOT MET.")
    assert FIGURES.met
    assert not script.Figures((10.0,), {2: (20.0,), 4: (46.1,)}).met


@pytest.mark.parametrize(("together", "code"), [(22.9, 0), (23.1, 3)])
def test_a_missed_target_is_the_exit_code(
    together: float, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(script, "seconds_of", lambda count, options: 10.0 if count == 1 else together)
    assert script.main(["--work", str(tmp_path / "work"), "--repeats", "2"]) == code


def test_conversions_run_with_the_commands_own_choice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the caller's environment says about waiting, and side by side in directories of their own."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    seen: list[tuple[list[str], dict[str, str]]] = []

    class Process:
        def __init__(self, command: list[str], env: dict[str, str], stdout: int) -> None:
            seen.append((command, env))

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(script.subprocess, "Popen", Process)
    script.seconds_of(2, script.parse(["--work", str(tmp_path / "work"), "--rounding", "nearest"]))
    assert capsys.readouterr().err == "2 at a time: 0.0 s\n"
    for number, (command, environment) in enumerate(seen):
        assert "OMP_WAIT_POLICY" not in environment
        assert command[1:] == [
            *("-m", "accullm_cli", "convert", "work/smollm2-135m"),
            *("--out", str(tmp_path / "work" / f"artifact-{number}"), "--quiet"),
            *("--samples", "8", "--seq-len", "256", "--rounding", "nearest"),
        ]
    assert len(seen) == 2


def test_a_conversion_that_fails_is_no_figure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = make_checkpoint("llama", tmp_path / "model")
    (model / "config.json").unlink()
    assert script.main(["--model", str(model), "--work", str(tmp_path / "work"), "--repeats", "1"]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == f"error: {model}: accullm convert ended with exit code 2"
    assert not (tmp_path / "work").exists()
