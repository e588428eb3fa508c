"""What rounding cannot work with is named and saved, and what it treated differently is on record."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from accullm_cli.errors import AccullmError
from accullm_cli.quant.stats import GramMatrices
from accullm_cli.stages import block_rounding, embedding_rounding, precision
from accullm_cli.stages.quantize import load_record
from accullm_cli.stages.streams import Captures
from tests.streaming import opened, run_to, short_config
from tests.tiny import make_checkpoint


def hessians_become(monkeypatch: pytest.MonkeyPatch, matrix_of: dict[int, torch.Tensor], block: int) -> None:
    """From the n-th Hessian on that is taken, those of a size are others."""
    take, taken = GramMatrices.take_hessian, []

    def other(gram: GramMatrices) -> torch.Tensor | None:
        hessian = take(gram)
        taken.append(hessian)
        assert hessian is not None
        return matrix_of.get(len(hessian), hessian) if len(taken) > block else hessian

    monkeypatch.setattr(GramMatrices, "take_hessian", other)


def indefinite(size: int) -> torch.Tensor:
    matrix = torch.eye(size)
    matrix[0, 1] = matrix[1, 0] = 3
    return matrix


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_a_hessian_that_fails_is_named_and_saved(
    value: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    broken = indefinite(64)
    if value is not None:
        broken[2, 3] = value
    hessians_become(monkeypatch, {64: broken}, block=4)  # the first block has four inputs
    path = tmp_path / "out.run/quantize/evidence.safetensors"
    config = short_config(source, tmp_path / "out", machine__seed=7, plan__outliers=0.0)
    with opened(config) as job, pytest.raises(AccullmError) as caught:
        run_to(job, "quantize")
    names = ", ".join(f"model.layers.1.self_attn.{name}_proj" for name in "qkv")
    what, hint = "cannot be factored at any damping up to its mean", "use more samples"
    if value is not None:
        what, hint = "holds NaN or Inf in 1 of its 4096 entries", "check the calibration text and model"
    assert caught.value.line() == f"{names}: the Hessian {what} (seed 7; the matrix is in {path}); {hint}"
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"matrix": "Hessian", "linears": names, "seed": "7"}
        torch.testing.assert_close(file.get_tensor("matrix"), broken, rtol=0, atol=0, equal_nan=True)


def test_a_heads_hessian_that_fails_is_named_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    hessians_become(monkeypatch, {64: indefinite(64)}, block=8)
    path = tmp_path / "out.run/quantize/evidence.safetensors"
    config = short_config(source, tmp_path / "out", plan__embedding_bits=8)
    with opened(config) as job, pytest.raises(AccullmError) as caught:
        run_to(job, "quantize")
    start = "lm_head part 0: the Hessian cannot be factored at any damping up to its mean"
    assert caught.value.line() == f"{start} (seed 0; the matrix is in {path}); use more samples"


def test_clamped_scales_of_an_embeddings_part_name_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"][105:] *= 1e-12
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    rows = len(tensors["model.embed_tokens.weight"])
    monkeypatch.setattr(embedding_rounding, "ELEMENTS_TOGETHER", 100 * 64)
    with opened(short_config(source, tmp_path / "out", plan__embedding_bits=8)) as job:
        run_to(job, "quantize")
        record = load_record(job, "embedding")
    assert record is not None
    end = "lie outside of what can be stored, 5.96e-08 to 6.55e+04, and were clamped"
    assert record.records[0] == f"model.embed_tokens: rows 100 to 199: 190 of 200 scales {end}"
    assert len(record.records) == -(-rows // 100) - 1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_inputs_that_are_multiplied_in_bfloat16_are_kept_in_it_and_no_byte_changes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CPU with instructions for that; GPT-2's Conv1D are multiplied in float32 there."""
    monkeypatch.setattr(precision, "onednn_rounds", lambda: False)
    monkeypatch.setattr(precision, "_multiplies_bfloat16", lambda: True)
    kept: list[torch.dtype] = []
    write = Captures.write

    def note(
        captures: Captures, batch: int, name: str, value: torch.Tensor, dtype: torch.dtype = torch.float32
    ) -> None:
        if name.startswith("rounded input"):
            kept.append(dtype)
        write(captures, batch, name, value, dtype)

    def shards(out: Path) -> list[bytes]:
        kept.clear()
        with opened(short_config(source, out, machine__precision="auto")) as job:
            assert job.compute.precision == "bfloat16"
            run_to(job, "quantize")
        return [path.read_bytes() for path in sorted(out.with_name(f"{out.name}.run").glob("quantize/*.safetensors"))]

    monkeypatch.setattr(Captures, "write", note)
    source = make_checkpoint(kind, tmp_path / "model")
    found = shards(tmp_path / "out")
    assert set(kept) == {torch.float32 if kind == "gpt2" else torch.bfloat16}
    monkeypatch.setattr(block_rounding, "_only_multiplied_as", lambda job, slot: torch.float32)
    assert found == shards(tmp_path / "other")
    assert set(kept) == {torch.float32}
