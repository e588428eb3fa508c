"""What a linear loses by how feedback is damped, against a float64 reference of its inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from accullm_cli.config_file import load_config
from accullm_cli.model.source import open_source
from accullm_cli.quant.feedback import DAMPINGS
from accullm_cli.quant.plan import LinearPlan
from accullm_cli.quant.rounding import RoundingOptions, round_linears
from accullm_cli.run import RunDirectory
from accullm_cli.stages.job import Job, open_decoder
from tests.scripts.loading import load_script
from tests.tiny import make_checkpoint

script = load_script("bench_damping")


def test_the_loss_is_that_on_windows_which_nothing_was_rounded_for(tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path / "model", torch.float32)
    job = Job(
        load_config(str(path)), RunDirectory(tmp_path / "run"), open_source(str(path), tmp_path), lambda event: None
    )
    ids = torch.randint(0, 250, (16, 32), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        rows = {row.name: row for row in script.measured(open_decoder(job), ids, [1])}
    name = "model.layers.1.self_attn.o_proj"
    assert [row.rpartition(".")[2] for row in rows] == ["q_proj", "o_proj", "gate_proj", "down_proj"]
    model, read = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), []
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad():
        model(ids)
    drawn = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
    other = sorted(drawn[2:4])  # behind the two that a conversion would choose by
    known = read[0][[window for window in range(16) if window not in other]].flatten(0, 1)
    beside = read[0][other].flatten(0, 1)
    weight = model.get_submodule(name).weight.detach()
    hessian = known.T @ known / len(known)
    score = hessian.diagonal() * weight.square().sum(0)
    outliers = tuple(sorted(score.topk(round(0.005 * len(score))).indices.tolist()))
    plan = LinearPlan(name, *weight.shape, 4, 64, False, outliers, scale_bits=6)
    for damping in DAMPINGS:
        options = RoundingOptions(target="original", damping=damping)
        found = round_linears({name: weight}, {name: plan}, options, torch.bfloat16, hessian)[name]
        error = (weight - found.linear.dequantize(torch.float32)).double()
        expected = float((beside.double() @ error.T).square().sum() / len(beside))
        assert rows[name].losses[damping] == pytest.approx(expected, rel=0.05)


def test_a_whole_run_ends_in_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_checkpoint("llama", tmp_path / "model")
    shape = ["--set", "calibration.seq_len=64", "--set", "calibration.samples=16"]
    assert script.main(["--model", str(path), "--run", str(tmp_path / "run"), "--blocks", "0", "1", *shape]) == 0
    lines = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines[0][2:-1] == ["0.03", "0.1", "0.3", "1", "chosen", "its loss"]
    for cells in lines[2:-1]:
        losses = dict(zip(lines[0][2:6], cells[2:6], strict=True))
        assert losses["0.3"] == "1.000"
        assert losses[cells[6]] == cells[7]
    assert len(lines) == 2 + 8 + 1
    assert lines[-1][1] == "mean"
