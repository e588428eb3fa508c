"""Whole conversions of tiny models, judged by a measurement that shares no code with ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import accullm_cli.hf  # noqa: F401  teaches transformers the format
from accullm_cli.pipeline import convert
from tests.kinds import KINDS
from tests.tiny import CONFIGS, make_checkpoint, tiny_config


def logits_of(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    """By the class that config.json names, as its users load it."""
    named = json.loads((directory / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, named).from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=ids).logits.double()


def mean_kl(original: torch.Tensor, other: torch.Tensor) -> float:
    p, q = original.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.usefixtures("filled_figures")
@pytest.mark.parametrize("name", [*CONFIGS, *KINDS])
def test_report_says_what_transformers_measures(name: str, tmp_path: Path) -> None:
    source = tmp_path / "model"
    KINDS[name].save(source) if name in KINDS else make_checkpoint(name, source)
    config = tiny_config(source, tmp_path / "out")
    report = convert(config)

    ids = load_file(tmp_path / "out.run" / "reference.safetensors")["ids"]
    original, artifact = logits_of(source, ids), logits_of(tmp_path / "out", ids)
    assert report.figure("mean_kl").value == pytest.approx(mean_kl(original, artifact), rel=1e-3, abs=1e-6)
    agreement = (original.argmax(-1) == artifact.argmax(-1)).double().mean()
    assert report.figure("top1_agreement").value == pytest.approx(float(agreement), abs=0.02)
    assert 4.0 < report.bits_per_weight < 6.5
    assert 0 < report.figure("mean_kl_floor").value < report.figure("mean_kl").value


def test_the_language_part_of_an_artifact_can_be_loaded_alone(tmp_path: Path) -> None:
    """By the class that transformers has for it, whose modules have other names."""
    source = KINDS["language part with a class of its own"].save(tmp_path / "model")
    convert(tiny_config(source, tmp_path / "out", rounding__method="nearest"))
    ids = torch.arange(60).view(2, 30)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert type(alone).__name__ == "Qwen3_5ForCausalLM"
    with torch.no_grad():
        assert torch.equal(alone(input_ids=ids).logits.double(), logits_of(tmp_path / "out", ids))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_feedback_loses_less_than_nearest(name: str, tmp_path: Path) -> None:
    source = make_checkpoint(name, tmp_path / "model")
    run = tmp_path / "run"
    kl = {}
    for method in ("nearest", "feedback"):
        config = tiny_config(
            source, tmp_path / method, rounding__method=method, machine__run=run, calibration__samples=64
        )
        kl[method] = convert(config).figure("mean_kl").value
    assert kl["feedback"] < 0.9 * kl["nearest"]


def test_eight_bits_lose_hardly_anything(tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    four = convert(tiny_config(source, tmp_path / "four", plan__bits=4)).figure("mean_kl").value
    eight = convert(tiny_config(source, tmp_path / "eight", plan__bits=8)).figure("mean_kl").value
    assert eight < four / 50


def test_compressed_tensors_as_the_stock_loader_reads_it_is_what_was_measured(tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    config = tiny_config(source, tmp_path / "out", export__format="[accullm,compressed-tensors]", plan__outliers=0)
    from accullm_cli.pipeline import convert_all

    reports = convert_all(config)
    assert [report.format for report in reports] == ["accullm", "compressed-tensors"]
    ids = load_file(tmp_path / "out.run" / "reference.safetensors")["ids"]
    original = logits_of(source, ids)
    for report in reports:
        found = mean_kl(original, logits_of(tmp_path / "out" / report.format, ids))
        # The stock loader rounds each dequantized weight to the model's bfloat16 once.
        assert found == pytest.approx(report.figure("mean_kl").value, rel=0.03)


@pytest.mark.usefixtures("drawn_figures")
def test_generates_text(tmp_path: Path) -> None:
    source = make_checkpoint("llama-tied", tmp_path / "model")
    convert(tiny_config(source, tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    written = model.generate(torch.tensor([[256, 72, 101]]), max_new_tokens=5, do_sample=False)
    assert written.shape == (1, 8)


def test_experts_that_calibration_never_reaches_are_rounded_without_data_and_named(tmp_path: Path) -> None:
    source = make_checkpoint("mixtral", tmp_path / "model")
    text = tmp_path / "short.txt"
    # One repeated byte: the router sends every token of a block to the same two of four experts.
    text.write_text("a" * 200)
    config = tiny_config(source, tmp_path / "out", calibration__text=text, calibration__samples=1)
    report = convert(config)
    unreached = [record for record in report.records if "calibration never reached" in record]
    data_free = [record for record in report.records if "rounded to nearest without data" in record]
    assert unreached
    assert data_free
    assert all("experts" in record for record in data_free)
    assert report.figure("mean_kl").value < 5
