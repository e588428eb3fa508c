"""Speed in a conversion's and a validation's report, and devices that are not there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from accullm_cli.errors import MachineError
from accullm_cli.pipeline import convert, dry_run, run_stage, validate_artifact
from accullm_cli.report import from_json, to_json
from accullm_cli.stages.compute import Compute
from accullm_cli.units import size
from tests.pipeline.observe import refusal, snapshot
from tests.streaming import fast_config, short_config


def test_speed_is_measured_where_it_is_asked_for(llama: Path, tmp_path: Path) -> None:
    config = fast_config(llama, tmp_path / "out", validation__speed=True)
    planned = [stage.name for stage in dry_run(config).stages]
    report = convert(config)
    speed = report.measurement("speed")
    assert speed is not None
    assert speed.counts == (("prompt_tokens", 48), ("decoded_tokens", 32))
    assert [stage.name for stage in report.stages] == planned
    assert planned[-2:] == ["validate accullm", "validate speed"]
    assert from_json(to_json(report)) == report
    again = convert(config)
    assert again.measurements == report.measurements
    assert not any(stage.ran for stage in again.stages)
    without = convert(fast_config(llama, tmp_path / "out"))
    assert without.measurements == tuple(found for found in report.measurements if found.measure != "speed")
    assert replace(without, stages=(), measurements=()) == replace(again, stages=(), measurements=())


def test_validate_alone_measures_speed(llama: Path, finished: Path, tmp_path: Path) -> None:
    config = fast_config(llama, finished, validation__speed=True)
    (report,) = run_stage("validate", config).reports
    assert report.measurement("speed") is not None
    moved = fast_config(llama, finished, validation__speed=True, machine__run=tmp_path / "run")
    assert validate_artifact(finished, moved).measurement("speed") is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(llama: Path, finished: Path) -> None:
    line = "--device cuda:0: torch sees no GPU; give cpu; accullm doctor says what is missing"
    config = fast_config(llama, finished, machine__device="cuda:0")
    before = snapshot(finished.parent)
    assert refusal(lambda: validate_artifact(finished, config)) == line
    assert refusal(lambda: run_stage("validate", config)) == line
    assert refusal(lambda: dry_run(config, only="validate")) == line
    assert snapshot(finished.parent) == before


def test_a_model_that_does_not_fit_is_not_timed(
    llama: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Compute, "free_memory", lambda compute: 1000)
    weights = sum(tensor.numel() for tensor in load_file(llama / "model.safetensors").values())
    line = (
        f"--speed: loads the original whole, which takes {size(4 * weights)} of memory, of which 1 kB are free; leave "
        "it out, or free memory"
    )
    given = {"validation__speed": True, "machine__run": tmp_path / "run"}
    for call in (
        lambda: convert(fast_config(llama, tmp_path / "out", **given)),
        lambda: dry_run(fast_config(llama, tmp_path / "out", **given)),
        lambda: validate_artifact(finished, fast_config(llama, finished, **given)),
    ):
        with pytest.raises(MachineError) as refused:
            call()
        assert (refused.value.line(), refused.value.exit_code) == (line, 4)
    assert not any(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_times_the_whole_artifact_through_the_kernels(llama: Path, finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("cupy")
    on_cpu = validate_artifact(finished, fast_config(llama, finished, machine__run=tmp_path / "cpu"))
    on_gpu = validate_artifact(
        finished,
        fast_config(llama, finished, machine__run=tmp_path / "gpu", machine__device="cuda", validation__speed=True),
    )
    speed = on_gpu.measurement("speed")
    assert speed is not None
    facts = dict(speed.facts)
    assert facts["timed on"].startswith(torch.cuda.get_device_name(0))
    assert facts["engine of decode"] == "CUDA: hybrid_gemv (14 linears)"
    assert facts["engine of prefill"] == "CUDA: hybrid_gemm (14 linears)"
    for name in ("perplexity_original", "perplexity", "mean_kl"):
        assert on_gpu.figure(name).value == pytest.approx(on_cpu.figure(name).value, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_conversion_rounds_on_a_gpu(llama: Path, tmp_path: Path) -> None:
    """Its products differ in their last bits from the CPU's, and so do few of the codes."""
    pytest.importorskip("cupy")
    on_cpu = convert(short_config(llama, tmp_path / "cpu"))
    convert(short_config(llama, tmp_path / "gpu", machine__device="cuda"))
    # Both measured on the CPU.
    config = short_config(llama, tmp_path / "gpu", machine__run=tmp_path / "run")
    on_gpu = validate_artifact(tmp_path / "gpu", config)
    assert on_gpu.bits_per_weight == on_cpu.bits_per_weight
    assert on_gpu.figure("mean_kl").value == pytest.approx(on_cpu.figure("mean_kl").value, rel=0.05)


def test_the_speed_of_another_format_is_refused_before_it_is_measured(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = {"export__format": "[compressed-tensors]", "plan__outliers": 0, "plan__group_size": 32}
    convert(fast_config(llama, out, **settings))
    config = fast_config(llama, out, validation__speed=True)
    assert refusal(lambda: validate_artifact(out, config)) == (
        "--speed: the kernels multiply by the format accullm, not by compressed-tensors; leave it out"
    )
    assert not out.with_name("out.validation").exists()
