"""The plot of GGUF files beside llama.cpp's, from what was measured."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.scripts.loading import load_script


def row(script: Any, name: str, size: int, kl: float) -> Any:
    return script.Row(name=name, bytes=size, bits=5.0, mean_kl=kl, p99_kl=4 * kl, top1=90.0, tokens_per_second=100.0)


@pytest.mark.usefixtures("drawn_figures")
def test_the_plot_is_drawn_from_what_was_measured(tmp_path: Path) -> None:
    script = load_script("bench_gguf")
    rows = [row(script, "llama.cpp-Q4_0", 92_000_000, 0.17), row(script, "model", 91_000_000, 0.023)]
    for name in ("small", "large"):
        (tmp_path / f"{name}.json").write_text(json.dumps([asdict(entry) for entry in rows]))
    files = [str(tmp_path / f"{name}.json") for name in ("small", "large")]
    script.main(["--plot", *files, "--out", str(tmp_path / "plot.svg")])
    drawn = (tmp_path / "plot.svg").read_text()
    assert drawn.startswith("<svg role=")
    assert drawn.endswith("</svg>\n")
    assert drawn.count("Q4_0") == 2
    for text in ("small", "large", "llama.cpp", "AccuLLM", "size of the file (MB)"):
        assert f">{text}</text>" in drawn
    assert drawn == script.draw(dict.fromkeys(("small", "large"), rows)) + "\n"
