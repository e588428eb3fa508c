"""The benchmark of calibration text: what it runs, what it reads of a report, and its tables."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from accullm_cli.model.mixture import window_counts
from tests.scripts.loading import load_script
from tests.streaming import write_text
from tests.tiny import make_checkpoint

script = load_script("bench_calibration")


def options(tmp_path: Path, *arguments: str) -> Any:
    return script.parse(["--out", str(tmp_path / "calibration"), *arguments])


def test_mixtures_share_a_run_and_have_an_artifact_each(tmp_path: Path) -> None:
    given = options(tmp_path, "--model", "m", "--effort", "fast", "--samples", "32")
    assert script.command_of("default,self-chat=25%", given) == (
        "accullm", "convert", "m", "--calibration", "default,self-chat=25%", "--out",
        str(tmp_path / "calibration-artifacts" / "default-self-chat-25"), "--run", str(tmp_path / "calibration.run"),
        "--other-text", "default,chat,tools,languages,documents", "--effort", "fast", "--samples", "32", "--json",
    )  # fmt: skip
    commands = [script.command_of(mixture, given) for mixture in script.MIXTURES]
    assert len({command[command.index("--out") + 1] for command in commands}) == len(script.MIXTURES)


@pytest.mark.parametrize("mixture", script.MIXTURES)
def test_every_row_is_a_mixture_of_32_windows(mixture: str) -> None:
    assert sum(window_counts(mixture, 32).values()) == 32


def test_differences_are_paired_by_window_and_bold_beyond_chance() -> None:
    hard = [0.1, 0.5, 0.2, 0.9, 0.4, 0.3]
    first = script.Result("default", {"chat": tuple(hard), "C++": tuple(hard)}, ("accullm",))
    better = tuple(value - 0.04 for value in hard)  # by a tenth of the mean, on each window
    other = script.Result("self", {"chat": better, "C++": (0.5, 0.1, 0.9, 0.2, 0.3, 0.4)}, ("accullm",))
    rows = list(script.table([first, other]))
    assert rows[0] == "| calibration | chat | C++ | mean | worst |"
    assert rows[2:] == [
        "| `default` | 0.4000 | 0.4000 | 0.4000 | 0.4000 |",
        "| `self` | 0.3600 | 0.4000 | 0.3800 | 0.4000 |",
    ]
    paired = list(script.differences([first, other]))
    assert paired[0] == "| beside `default`, in percent | chat | C++ |"
    cells = paired[2].split(" | ")
    assert cells[1] == "**-10 [-10, -10]**"
    assert re.fullmatch(r"[+-]0 \[-\d+, \+\d+\] \|", cells[2])
    assert list(script.differences([first])) == []


def test_real_conversions_become_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_checkpoint("llama", tmp_path / "model")
    text = write_text(tmp_path / "text.txt", 1)
    arguments = [
        "--model", str(model), "--samples", "4", "--seq-len", "48", "--validation-windows", "4", "--threads", "1",
        "--validation-text", str(text), "--rounding", "nearest", "--grid", "minmax", "--group-size", "32",
    ]  # fmt: skip
    assert script.main(["--out", str(tmp_path / "out"), "--mixtures", str(text), *arguments]) == 0
    mixed = f"{text},languages=50%"
    assert script.main(["--out", str(tmp_path / "out"), "--mixtures", mixed, "--append", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "| calibration | prose and code | C++ | chat | tools | languages | documents | mean | worst |" in printed
    found = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [result["mixture"] for result in found] == [str(text), mixed]
    assert len(found[0]["kl"]["prose and code"]) == 4
    assert len(found[0]["kl"]["tools"]) == 2
    assert script.main(["--out", str(tmp_path / "out"), "--mixtures", "absent.txt", "--append", *arguments]) == 2
    assert "error: mixture absent.txt: accullm convert ended with exit code 2" in capsys.readouterr().err
