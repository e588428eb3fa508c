"""The report's figure is that of the model the user has: plain transformers measures source and artifact again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import accullm_cli.hf  # noqa: F401  teaches transformers the format
from accullm_cli.commands.inspect import inspect
from accullm_cli.commands.verify import verify
from accullm_cli.formats import open_artifact
from accullm_cli.measure.result import Report
from accullm_cli.pipeline import convert, dry_run
from tests.pipeline.observe import refusal
from tests.streaming import fast_config, reference_model
from tests.tiny import edit_checkpoint, edit_config, make_checkpoint

COMPRESSED = {"export__format": "[compressed-tensors]", "plan__outliers": 0}


def converted(source: Path, **settings: object) -> Report:
    return convert(fast_config(source, source.with_name("out"), **settings))


def true_kl(source: Path) -> float:
    """Mean KL in nats per token of the artifact beside `source` to it, on the validation text."""
    ids = load_file(source.with_name("out.run") / "tokens.safetensors")["validation"]
    artifact = AutoModelForCausalLM.from_pretrained(source.with_name("out"), dtype=torch.float32)
    with torch.no_grad():
        p, q = (model(ids).logits.double().log_softmax(-1) for model in (reference_model(source), artifact))
    return float((p.exp() * (p - q)).sum(-1).mean())


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)).bfloat16()


@pytest.mark.parametrize("settings", [{}, COMPRESSED], ids=["accullm", "compressed-tensors"])
def test_a_head_that_differs_from_the_embedding_it_is_said_to_be_tied_to(
    settings: dict[str, object], tmp_path: Path
) -> None:
    source = make_checkpoint("llama-tied", tmp_path / "model")
    head = random(260, 64)
    edit_checkpoint(source, {"lm_head.weight": head})
    report = converted(source, **settings)
    assert report.figure("mean_kl").value == pytest.approx(true_kl(source), rel=0.01)
    assert report.records[0].startswith("config.json ties lm_head.weight to model.embed_tokens.weight, but")
    assert torch.equal(open_artifact(tmp_path / "out").tensor("lm_head.weight"), head)


def test_a_head_that_differs_is_rounded_apart_from_the_embedding(tmp_path: Path) -> None:
    source = make_checkpoint("llama-tied", tmp_path / "model")
    edit_checkpoint(source, {"lm_head.weight": random(260, 64)})
    report = converted(source, plan__embedding_bits=4)
    assert [*open_artifact(tmp_path / "out").plan.embeddings] == ["model.embed_tokens", "lm_head"]
    assert report.figure("mean_kl").value == pytest.approx(true_kl(source), rel=0.01)


def test_tied_with_the_head_alone(tmp_path: Path) -> None:
    source = make_checkpoint("llama-tied", tmp_path / "model")
    embedding = edit_checkpoint(source, {}, drop=["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    edit_checkpoint(source, {"lm_head.weight": embedding})
    report = converted(source)
    assert report.figure("mean_kl").value == pytest.approx(true_kl(source), rel=0.01)
    artifact = open_artifact(tmp_path / "out")
    assert torch.equal(artifact.tensor("model.embed_tokens.weight"), embedding)
    assert "lm_head.weight" not in artifact.names()


@pytest.mark.parametrize("settings", [{}, COMPRESSED], ids=["accullm", "compressed-tensors"])
def test_what_hangs_beside_the_blocks_is_in_the_artifact_and_no_saving(
    settings: dict[str, object], tmp_path: Path
) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    beside = {
        "model.layers.2.eh_proj.weight": random(64, 128),
        "model.layers.2.mlp.up_proj.weight": random(96, 64),
        "mtp.fc.weight": random(64, 64),
        "v_head.summary.bias": random(1),
        "v_head.summary.weight": random(1, 64),
    }
    before = converted(source, **settings)
    edit_checkpoint(source, beside)
    edit_config(source, num_nextn_predict_layers=1)
    report = converted(source, **settings)
    out = tmp_path / "out"
    artifact = open_artifact(out)
    assert set(artifact.kept) == set(beside)
    assert all(torch.equal(artifact.tensor(name), value) for name, value in beside.items())
    bytes_beside = sum(value.nbytes for value in beside.values())
    assert report.artifact_bytes - before.artifact_bytes > bytes_beside
    assert report.bits_per_weight == before.bits_per_weight
    assert report.figure("mean_kl") == before.figure("mean_kl")
    assert report.figure("mean_kl").value == pytest.approx(true_kl(source), rel=0.01)
    assert verify(out).problems == ()
    assert inspect(out).parameters == sum(p.numel() for p in reference_model(source).parameters())
    assert report.records == (
        "LlamaForCausalLM does not run model.layers.2: 2 tensors kept in the artifact as stored, 28.7 kB",
        "LlamaForCausalLM does not run mtp: tensor mtp.fc.weight kept in the artifact as stored, 8.19 kB",
        "LlamaForCausalLM does not run v_head: 2 tensors kept in the artifact as stored, 130 bytes",
    )


def test_a_dry_run_counts_what_is_kept(tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    config = fast_config(source, tmp_path / "out")
    before = dry_run(config)
    edit_checkpoint(source, {"mtp.fc.weight": random(64, 64)})
    assert dry_run(config).artifact_bytes == before.artifact_bytes + 8192


@pytest.mark.parametrize("call", [convert, dry_run])
def test_what_changes_the_model_is_refused_before_any_work(call, tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    edit_checkpoint(source, {"model.layers.0.self_attn.q_proj.lora_A.weight": random(4, 64)})
    assert refusal(lambda: call(fast_config(source, tmp_path / "out"))) == (
        f"{source}: tensor model.layers.0.self_attn.q_proj.lora_A.weight is part of an adapter; merge the adapter into "
        "the weights first (peft: merge_and_unload)"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration.txt", "model", "validation.txt"]
