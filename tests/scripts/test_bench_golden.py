"""The benchmark of golden accuracy: what it runs, what it reads of a report, and its tables."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from accullm_cli.config_file import load_config
from tests.scripts.loading import load_script
from tests.scripts.test_bench_peers import FAKE_RUNNER
from tests.stages.copying import make_copier, write_items
from tests.streaming import reference_model

script = load_script("bench_golden")


def options(tmp_path: Path, *arguments: str) -> Any:
    return script.parse(["--out", str(tmp_path / "golden"), *arguments])


def result(name: str, bits: float, **settings: Any) -> Any:
    told = {
        "label": f"way {name}", "right": 20, "lost": 2, "won": 1, "retention": (0.9, 0.8, 0.95),
        "agreement": (0.8, 0.7, 0.9), "margin_change": (-0.5, -0.6, -0.4), "mean_kl": 0.03,
        "tasks": {"sql": (12, 2, 0), "code": (8, 0, 1)},
        "kept": (1.0,), "command": ("accullm", "convert"),
    }  # fmt: skip
    return script.Result(name=name, bits_per_weight=bits, **{**told, **settings})


def test_rows_share_a_run_and_ask_the_same_items(tmp_path: Path) -> None:
    given = options(tmp_path, "--model", "m", "--tasks", "sql", "--task-items", "7", "--threads", "1")
    assert script.command_of(script.ROWS[2], given) == (
        "accullm", "convert", "m", "--out", str(tmp_path / "golden-artifacts/default"), "--run",
        str(tmp_path / "golden.run"), "--other-text", "none", "--tasks", "sql", "--task-items", "7", "--threads", "1",
        "--json",
    )  # fmt: skip
    assert options(tmp_path).out == tmp_path / "golden"
    assert script.parse(["--model", "work/x"]).out == Path("work/bench/golden-x")


@pytest.mark.parametrize("row", script.ROWS, ids=lambda row: row.name)
def test_every_row_is_a_configuration(row: Any) -> None:
    from accullm_cli.config_options import options as declared

    keys = {option.flag: option.key for option in declared()}
    flags = dict(zip(row.flags[::2], row.flags[1::2], strict=True))
    given = {flag: f"[{value}]" if flag == "--encodings" else value for flag, value in flags.items()}
    load_config("m", sets=[f"{keys[flag]}={value}" for flag, value in given.items()])


def test_tables_are_ordered_by_bits_and_a_row_is_replaced_by_its_name(tmp_path: Path) -> None:
    results = script.merged([result("b", 4.4), result("a", 5.0)], result("a", 4.0, lost=3))
    assert [entry.name for entry in results] == ["a", "b"]
    given = options(tmp_path, "--model", "some/model")
    script.write(given, results)
    text = (tmp_path / "golden.md").read_text()
    assert "| way a | 4.000 | 0.0300 | 90.00% [80.00%, 95.00%] | 3 of 20 | 1 | -0.500 [-0.600, -0.400] | 80.0%" in text
    assert "| lost + won | sql (12 right) | code (8 right) |" in text
    assert "| way b | 2 + 0 | 0 + 1 |" in text
    assert script.read(given) == results
    assert (tmp_path / "golden.svg").read_text().startswith("<svg")


def test_where_too_few_are_right_no_share_is_given() -> None:
    assert "| too few (20 right) | 2 of 20 |" in list(script.whole_table([result("a", 4.0, retention=None)]))[2]


def test_other_tools_are_held_against_our_row_of_nearly_the_same_bits() -> None:
    kept = {"default": (1, 1, 0, 1, 1, 1), "average-5.0": (1, 1, 1, 1, 1, 1), "tool": (1, 0, 1, 0, 0, 0)}
    bits = {"default": 4.25, "average-5.0": 5.0, "tool": 4.3}
    results = [result(name, bits[name], kept=kept[name]) for name in kept]
    # Four are lost there alone and one by ours alone: p is 2 * (1 + 5) / 2**5.
    assert list(script.paired_table(results))[2:] == ["| way tool | 4.300 | way default | 4.250 | 4 | 1 | 0.38 |"]
    assert not list(script.paired_table(results[:2]))


def test_rows_and_other_tools_on_a_real_conversion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_copier(tmp_path / "model")
    items = write_items(tmp_path / "copy.jsonl", 30)
    arguments = [
        "--model", str(model), "--tasks", str(items), "--rows", "eight", "--samples", "4", "--seq-len", "48",
        "--validation-windows", "2", "--threads", "1",
    ]  # fmt: skip
    assert script.main(["--out", str(tmp_path / "golden"), *arguments]) == 0
    table = capsys.readouterr().out
    assert "| 8 bits | 8." in table
    assert "copy (30 right)" in table
    # Another tool's weights: once the original's own, and once without two whole linears.
    given = options(tmp_path, *arguments, "--peer", f"tool={sys.executable}", "--peer-rows", "tool")
    (tmp_path / "run_peer.py").write_text(FAKE_RUNNER)
    monkeypatch.setattr(script.bench_peers, "RUNNER", tmp_path / "run_peer.py")
    monkeypatch.setattr(script.bench_peers, "interpreter", lambda text: tuple(text.split("=")))
    weights = {
        name: module.weight.detach().float()
        for name, module in reference_model(model).named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    for factor, lost in ((1.0, 0), (0.0, 30)):
        peer = script.bench_peers.Peer("tool", "a tool", "tool", "json", (f"--factor={factor}",), group_size=8)
        monkeypatch.setattr(script.bench_peers, "PEERS", (peer,))
        values = [f"model.layers.{block}.self_attn.v_proj" for block in (0, 1)]
        save_file({**weights, **{name: weights[name] * factor for name in values}}, tmp_path / "weights.safetensors")
        (told,) = script.of_peers(given)
        assert (told.name, told.label, told.bits_per_weight) == ("tool", "a tool, groups of 8", 4.5)
        assert (told.right, told.lost) == (30, lost)
        assert (told.mean_kl < 1e-6) == (lost == 0)
