"""validate: it measures what was written, holds its head against the original's, and needs none of its blocks."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import accullm_cli.hf  # noqa: F401  teaches transformers the format
from accullm_cli.errors import AccullmError
from accullm_cli.formats import open_artifact
from accullm_cli.formats.manifest import CARD_NAME
from accullm_cli.measure.result import Estimate, Fidelity
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.checkpoint import Checkpoint
from accullm_cli.progress import Event
from accullm_cli.run import Reason
from accullm_cli.stages import streams
from accullm_cli.stages.stage import StageOutcome
from accullm_cli.stages.texts import VALIDATION
from accullm_cli.stages.validate import artifact_sha256, fidelity_path, load_fidelity, validation
from tests.stages.gpu import NAME, a_gpu
from tests.stages.quantized import edit_plan
from tests.streaming import fast_config, opened, reference_model, run_alone, run_to
from tests.tiny import make_checkpoint


@pytest.fixture(scope="module", params=["llama", "llama-tied"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Source and artifact (whose run directory lies beside it)."""
    place = tmp_path_factory.mktemp(request.param)
    source = make_checkpoint(request.param, place / "model")
    with opened(fast_config(source, place / "out")) as job:
        run_to(job, "export", "reference")
    return source, place / "out"


def measure(source: Path, out: Path, artifact: Path | None = None) -> tuple[StageOutcome, Fidelity]:
    with opened(fast_config(source, out)) as job:
        outcome = run_alone(job, validation("accullm", artifact or out, VALIDATION))
        return outcome, load_fidelity(job, "accullm")


def damaged(out: Path, place: Path, name: str, factor: float) -> Path:
    """A copy of the artifact in which one tensor is larger."""
    shutil.copytree(out, place / "damaged")
    shard = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"][name]
    path = place / "damaged" / shard
    tensors = load_file(path)
    tensors[name] = tensors[name] * factor
    save_file(tensors, path, metadata={"format": "pt"})
    return place / "damaged"


# -- what is measured --------------------------------------------------------------------------------------


def test_perplexities_are_those_of_transformers(exported: tuple[Path, Path]) -> None:
    source, out = exported
    _, fidelity = measure(source, out)
    ids = load_file(out.with_name("out.run") / "reference.safetensors")["ids"]

    def perplexity(logits: torch.Tensor) -> float:
        likelihood = logits.double()[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
        return math.exp(-float(likelihood.mean()))

    assert fidelity.perplexity_original.value == pytest.approx(
        perplexity(reference_model(source)(ids).logits), rel=1e-5
    )
    assert fidelity.perplexity.value == pytest.approx(perplexity(reference_model(out)(ids).logits), rel=1e-5)
    assert (fidelity.windows, fidelity.tokens) == (3, 3 * 48)


def with_all_linears_kept(directory: Path, **settings: object) -> Fidelity:
    """What is measured of a Llama whose linears in the blocks all stay as they are."""
    source, out = make_checkpoint("llama", directory / "model"), directory / "out"
    with opened(fast_config(source, out, **settings)) as job:
        run_to(job, "profile")
        edit_plan(job.run.path, _proj=16)
        run_to(job, "validate")
        return load_fidelity(job, "accullm")


def test_an_artifact_of_16_bits_is_its_original(tmp_path: Path) -> None:
    fidelity = with_all_linears_kept(tmp_path)
    assert (fidelity.mean_kl.value, fidelity.kl_max) == (0.0, 0.0)
    assert fidelity.top1_agreement.value == 1.0
    assert fidelity.perplexity == fidelity.perplexity_original
    assert fidelity.mean_kl_floor.value > 1e-6


def test_the_originals_weights_are_not_read(exported: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = exported

    def refuse(*args: object) -> None:
        raise AssertionError("the original was read")

    monkeypatch.setattr(Checkpoint, "__init__", refuse)
    with opened(fast_config(source, out), fresh=True) as job:
        run_alone(job, validation("accullm", out, VALIDATION))


def test_what_was_measured_reads_back(exported: tuple[Path, Path]) -> None:
    source, out = exported
    measure(source, out)
    with opened(fast_config(source, out)) as job:
        fidelity = load_fidelity(job, "accullm")
        content = json.loads(fidelity_path(job, "accullm").read_text())
    assert json.loads(json.dumps(asdict(fidelity))) == content
    for name in ("mean_kl", "perplexity", "kl_p99", "kl_p999", "top1_agreement", "mean_kl_floor"):
        assert isinstance(getattr(fidelity, name), Estimate)
    assert len(fidelity.kl_of_window) == 3
    assert sum(count for _, count in fidelity.kl_histogram) == fidelity.tokens
    hash(fidelity)  # all parts are as immutable as the dataclass says


def test_on_a_gpu_the_blocks_run_there(
    exported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = exported
    _, on_cpu = measure(source, out)
    shutil.copytree(out, tmp_path / "out")
    shutil.copytree(out.with_name("out.run"), tmp_path / "out.run")
    stage = validation("accullm", tmp_path / "out", VALIDATION)
    with a_gpu(monkeypatch), opened(fast_config(source, tmp_path / "out", machine__device="cuda")) as job:
        outcome = run_alone(job, stage)
        on_gpu = load_fidelity(job, "accullm")
    assert str(outcome.reason) == "machine changed (device)"
    assert on_gpu.arithmetic == f"float32 on {NAME}"
    assert replace(on_gpu, arithmetic="float32") == on_cpu


# -- quantized embeddings ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "llama-tied", "gemma2"])
def with_embeddings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """As `exported`, embedding and head in 8 bits."""
    place = tmp_path_factory.mktemp(request.param)
    source = make_checkpoint(request.param, place / "model")
    with opened(fast_config(source, place / "out", plan__embedding_bits=8)) as job:
        run_to(job, "export", "reference")
    return source, place / "out"


def test_the_originals_logits_are_those_of_its_own_head(with_embeddings: tuple[Path, Path]) -> None:
    """And the artifact's are those of the quantized one, as transformers computes them."""
    source, out = with_embeddings
    _, fidelity = measure(source, out)
    ids = load_file(out.with_name("out.run") / "reference.safetensors")["ids"]
    original = reference_model(source)(ids).logits.double().log_softmax(-1)
    artifact = reference_model(out)(ids).logits.double().log_softmax(-1)

    def perplexity(logarithms: torch.Tensor) -> float:
        return math.exp(-float(logarithms[:, :-1].gather(-1, ids[:, 1:, None]).mean()))

    assert fidelity.perplexity_original.value == pytest.approx(perplexity(original), rel=1e-5)
    assert fidelity.perplexity.value == pytest.approx(perplexity(artifact), rel=1e-5)
    kl = (original.exp() * (original - artifact)).sum(-1)
    assert fidelity.mean_kl.value == pytest.approx(float(kl.mean()), rel=1e-3)


def test_with_all_linears_kept_a_quantized_head_alone_is_measured(tmp_path: Path) -> None:
    fidelity = with_all_linears_kept(tmp_path, plan__embedding_bits=4)
    assert fidelity.mean_kl.value > 10 * fidelity.mean_kl_floor.value
    assert fidelity.perplexity.value != fidelity.perplexity_original.value


def test_another_norm_is_found_out_beside_a_quantized_head(with_embeddings: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = with_embeddings
    bad = damaged(out, tmp_path, "model.norm.weight", 1.5)
    with pytest.raises(AccullmError) as refusal:
        measure(source, out, bad)
    assert refusal.value.line() == f"{bad}: final norm or output head differ from the original's; export again"


def test_another_quantized_head_shows_in_the_divergence(with_embeddings: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = with_embeddings
    _, whole = measure(source, out)
    name = list(open_artifact(out).plan.embeddings)[-1]
    bad = damaged(out, tmp_path, f"{name}.scales", 1.2)
    _, fidelity = measure(source, out, bad)
    assert fidelity.mean_kl.value > 1.05 * whole.mean_kl.value
    assert fidelity.perplexity_original == whole.perplexity_original


# -- damage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight"])
def test_another_head_or_norm_is_found_out(name: str, exported: tuple[Path, Path], tmp_path: Path) -> None:
    """The original's logits come from the artifact's head: with another one, every figure would be wrong."""
    source, out = exported
    if name == "lm_head.weight" and "llama-tied" in str(source):
        name = "model.embed_tokens.weight"
    bad = damaged(out, tmp_path, name, 1.05)
    with pytest.raises(AccullmError) as refusal:
        measure(source, out, bad)
    assert refusal.value.line() == f"{bad}: final norm or output head differ from the original's; export again"
    assert refusal.value.exit_code == 2


def test_a_damaged_block_shows_in_the_divergence(exported: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = exported
    _, whole = measure(source, out)
    bad = damaged(out, tmp_path, "model.layers.1.mlp.up_proj.scale_table", 1.2)
    outcome, fidelity = measure(source, out, bad)
    assert outcome.reason == Reason("input changed", "artifact")
    assert fidelity.mean_kl.value > 1.05 * whole.mean_kl.value
    assert fidelity.perplexity_original == whole.perplexity_original
    assert fidelity.mean_kl_floor == whole.mean_kl_floor


# -- running again -----------------------------------------------------------------------------------------


class InterruptedRunError(Exception):
    pass


def test_it_goes_on_behind_the_last_stored_block(exported: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = exported
    _, expected = measure(source, out)
    monkeypatch.setattr(streams, "SECONDS_BETWEEN_STORES", 0.0)

    def stop(event: Event) -> None:
        if event.label == "block 1/2":
            raise InterruptedRunError

    with opened(fast_config(source, out), stop, fresh=True) as job, pytest.raises(InterruptedRunError):
        run_alone(job, validation("accullm", out, VALIDATION))
    stored = out.with_name("out.run") / "validate-accullm-stream.safetensors"
    assert stored.exists()
    calls: list[int] = []
    run = Decoder.run
    monkeypatch.setattr(Decoder, "run", lambda self, index, *rest: calls.append(index) or run(self, index, *rest))
    labels: list[str] = []
    with opened(fast_config(source, out), lambda event: labels.append(event.label)) as job:
        run_alone(job, validation("accullm", out, VALIDATION))
        assert load_fidelity(job, "accullm") == expected
    assert calls == [1]
    assert "blocks 1 to 1/2" in labels
    assert not stored.exists()


def test_the_card_is_no_part_of_the_hash_and_every_other_file_is(exported: tuple[Path, Path], tmp_path: Path) -> None:
    """Validation writes what it measured into card and manifest; that must not look like another artifact."""
    _, out = exported
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    before = artifact_sha256(copy)
    assert before == artifact_sha256(out)
    (copy / CARD_NAME).write_text("measured")
    assert artifact_sha256(copy) == before
    (copy / "tokenizer.json").write_text("{}")
    assert artifact_sha256(copy) != before
