"""Native artifacts in transformers on a CPU: products of few tokens read the codes as they are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import accullm_cli.hf
from accullm_cli.kernels import matmul, packed, stored_weight
from tests.artifacts import make_parts
from tests.test_hf import MODELS, export, logits
from tests.tiny import tiny_llama, tokens


@pytest.fixture(autouse=True)
def _tokens_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "PACKED_TOKENS", tokens().numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model", "encoding"), [("llama", "integer"), ("llama", "levels"), ("gpt2", "levels"), ("mixtral", "integer")]
)
def test_few_tokens_are_multiplied_as_packed_on_a_cpu_and_many_are_not(
    model: str, encoding: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = 4, 32, encoding == "levels", (3, 17)
    made = make_parts(MODELS[model](), tmp_path / "run", *scheme, embedding_bits=4, encoding=encoding)
    loaded = AutoModelForCausalLM.from_pretrained(export(tmp_path, made), dtype=dtype)
    monkeypatch.setattr(packed, "PACKED_TOKENS", 0)
    wanted = logits(loaded).float()
    packed_for: list[torch.dtype] = []

    def counted(*arguments: Any) -> packed.PackedLinear:
        packed_for.append(arguments[4])
        return packed.pack_linear(*arguments)

    monkeypatch.setattr(stored_weight, "pack_linear", counted)
    monkeypatch.setattr(packed, "PACKED_TOKENS", 22)
    found = logits(loaded).float()
    logits(loaded)
    weights = [m for m in loaded.modules() if isinstance(m, accullm_cli.hf.HybridLinear | accullm_cli.hf.TiedHead)]
    assert packed_for == [dtype] * len(weights)
    # Sums in another order; in bfloat16 they move some results to the next number of the format, in every layer.
    allowed = {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    assert float((found - wanted).abs().max()) <= allowed * float(wanted.abs().max())
    monkeypatch.setattr(packed, "PACKED_TOKENS", 21)
    monkeypatch.setattr(matmul, "packed_product", None)
    assert torch.equal(logits(loaded).float(), wanted)


def test_what_was_packed_follows_the_model_to_another_dtype(tmp_path: Path) -> None:
    made = make_parts(tiny_llama(), tmp_path / "run", 4, 32, False, (3, 17))
    model = AutoModelForCausalLM.from_pretrained(export(tmp_path, made), dtype=torch.float32)
    logits(model)
    assert logits(model.to(torch.bfloat16)).dtype == torch.bfloat16
    assert logits(model.to(torch.float16)).dtype == torch.float16  # dequantized


def test_gradients_go_through_a_loaded_model_to_its_embedding(tmp_path: Path) -> None:
    made = make_parts(tiny_llama(), tmp_path / "run", 4, 32, False, (3, 17))
    model = AutoModelForCausalLM.from_pretrained(export(tmp_path, made))
    for one in (model, made.reference):
        one(tokens()).logits.square().mean().backward()
    found, wanted = (one.get_input_embeddings().weight.grad for one in (model, made.reference))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
