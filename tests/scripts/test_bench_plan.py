"""What rounding one linear alone does, against a whole forward pass; and the table of both numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from accullm_cli.config_file import load_config
from accullm_cli.model.source import open_source
from accullm_cli.run import RunDirectory
from accullm_cli.stages.job import Job, open_decoder
from tests.scripts.loading import load_script
from tests.tiny import make_checkpoint, tokens

script = load_script("bench_plan")


def test_each_linear_alone_costs_what_a_forward_pass_of_the_whole_model_says(tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path / "model", torch.float32)
    job = Job(
        load_config(str(path)), RunDirectory(tmp_path / "run"), open_source(str(path), tmp_path), lambda event: None
    )
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    found = script.measured(open_decoder(job), tokens(), names)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    with torch.no_grad():
        first = model(tokens()).logits.log_softmax(-1)
        for name in names:
            weight = model.get_submodule(name).weight
            kept = weight.clone()
            weight.copy_(script.rounded(weight.float()))
            second = model(tokens()).logits.log_softmax(-1)
            weight.copy_(kept)
            expected = float((first.exp() * (first - second)).sum(-1).mean())
            assert found[name] == pytest.approx(expected, rel=1e-3)


def test_a_whole_run_ends_in_a_table_by_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_checkpoint("llama", tmp_path / "model")
    flags = ["--samples", "4", "--gradient-samples", "4", "--windows", "2", "--seq-len", "64"]
    arguments = ["--model", str(path), "--run", str(tmp_path / "run"), "--set", "calibration.seq_len=64", *flags]
    assert script.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| linears | number |")
    kinds = {cells[1]: cells for line in lines[4:] if (cells := [cell.strip() for cell in line.split("|")])}
    assert list(kinds) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "all"]
    assert kinds["all"][3:6] == ["100.0%", "100.0%", "1.00"]
    assert 0.5 < float(kinds["all"][6]) <= 1  # plans know more than nothing of it


def test_ranks_are_correlated_as_spearman_does() -> None:
    # scipy 1.17.1: spearmanr([1, 2, 3, 4, 5], [2, 1, 4, 3, 9]) = 0.8
    assert script.rank_correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 9]) == pytest.approx(0.8)
