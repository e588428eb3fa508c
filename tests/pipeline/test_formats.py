"""Formats that other programs read, from the source to the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from accullm_cli.commands.compare import compare
from accullm_cli.commands.inspect import inspect
from accullm_cli.commands.verify import verify
from accullm_cli.formats import open_artifact
from accullm_cli.pipeline import convert_all
from tests.streaming import fast_config

NOT_RUN = {
    "mlx": "the mlx artifact was not run as users load it: transformers does not read this format",
    "gptq_v2": "the gptq_v2 artifact was not run as users load it: gptqmodel compiles its kernels before it loads one",
    "gptq": "the gptq artifact was not run as users load it: gptqmodel compiles its kernels before it loads one",
    "awq": "the awq artifact was not run as users load it: gptqmodel compiles its kernels before it loads one",
}


def test_each_format_is_planned_rounded_written_and_measured(llama: Path, tmp_path: Path) -> None:
    settings = {"export__format": "[mlx,gptq_v2,gptq,awq]", "plan__outliers": "null", "plan__group_size": "null"}
    reports = convert_all(fast_config(llama, tmp_path / "out", **settings))
    original = load_file(llama / "model.safetensors")
    for report, name in zip(reports, NOT_RUN, strict=True):
        assert report.format == name
        assert report.records == (NOT_RUN[name],)
        assert 0 < report.figure("mean_kl").value < 0.5
        assert verify(tmp_path / "out" / name).intact
        artifact = open_artifact(tmp_path / "out" / name)
        # 96 input features are no multiple of 64; one scheme for all is then in groups of 32.
        sizes = {row.group_size for row in artifact.plan.linears.values()}
        assert sizes == ({32} if name == "awq" else {32, 64})
        for linear in artifact.plan.linears:
            weight = original[f"{linear}.weight"].float()
            lost = artifact.linear(linear).dequantize() - weight
            assert float(lost.norm() / weight.norm()) < 0.2, linear


def test_an_average_is_spent_among_the_widths_of_mlx(llama: Path, tmp_path: Path) -> None:
    settings = {"export__format": "[mlx]", "plan__outliers": "null", "plan__group_size": "null", "plan__bits": 5.5}
    settings |= {"calibration__gradient_samples": 2, "plan__embedding_bits": 8}
    (report,) = convert_all(fast_config(llama, tmp_path / "out", **settings))
    assert report.bits_per_weight <= 5.5
    artifact = open_artifact(tmp_path / "out")
    assert len({row.bits for row in artifact.plan.linears.values()}) > 1
    assert {row.bits for row in artifact.plan.embeddings.values()} == {8}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for name, row in artifact.plan.quantized.items():
        described = config["quantization"].get(name, config["quantization"])
        assert (described["bits"], described["group_size"]) == (row.bits, row.group_size)


@pytest.mark.parametrize("name", list(NOT_RUN))
def test_what_another_tool_wrote_is_looked_into_and_compared(name: str, llama: Path, tmp_path: Path) -> None:
    """Without a manifest nothing is known but what config.json and the tensors say."""
    settings = {"export__format": f"[{name}]", "plan__outliers": "null", "plan__group_size": "32"}
    convert_all(fast_config(llama, tmp_path / "out", **settings))
    (tmp_path / "out" / "accullm.json").unlink()
    found = inspect(tmp_path / "out")
    assert (found.format, len(found.linears)) == (name, 14)
    assert {(row.bits, row.group_size) for row in found.linears} == {(4, 32)}
    checked = verify(tmp_path / "out")
    assert checked.intact
    assert checked.tensors_checked > 14
    compared = compare(tmp_path / "out", llama)
    assert len(compared.linears) == 14
    assert all(0 < row.relative_difference < 0.2 for row in compared.linears)
