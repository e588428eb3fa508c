"""Native artifacts in transformers on a GPU, whose part the CPU plays: kernels multiply, and weights are there once."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import accullm_cli.hf
from accullm_cli.errors import AccullmError
from accullm_cli.formats.accullm import SUFFIXES
from accullm_cli.kernels import check, device, matmul, packed, stored_weight
from accullm_cli.kernels.launch import Device
from accullm_cli.kernels.layout import TiledLinear, tile
from accullm_cli.quant.linear import QuantizedLinear
from tests.artifacts import make_parts
from tests.cuda_emulation import emulate, needs_compiler
from tests.test_hf import export, logits
from tests.tiny import tiny_llama, tokens


@pytest.fixture(autouse=True)
def _dequantized(monkeypatch: pytest.MonkeyPatch) -> None:
    """No products on the CPU but torch's own."""
    monkeypatch.setattr(packed, "PACKED_TOKENS", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CPU were a GPU with kernels."""
    for part in (stored_weight, matmul):
        monkeypatch.setattr(part, "why_no_kernels", lambda *_: None)
    monkeypatch.setattr(device, "launch", lambda launch, where: emulate(launch))
    monkeypatch.setattr(device, "describe", lambda index: Device(4, 99 * 1024))
    check.require_agreement.cache_clear()


@needs_compiler
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("encoding", "symmetric"),
    [("integer", False), ("integer", True), ("levels", True)],
    ids=["zeros", "symmetric", "levels"],
)
@pytest.mark.parametrize("scale_bits", [6, 16])
def test_what_is_tiled_is_in_memory_once(scale_bits: int, encoding: str, symmetric: bool, tmp_path: Path) -> None:
    scheme = 4, 32, symmetric, (3, 17)
    made = make_parts(
        tiny_llama(tied=True), tmp_path / "run", *scheme, scale_bits=scale_bits, embedding_bits=4, encoding=encoding
    )
    directory = export(tmp_path, made)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    untouched = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = tokens()
    looked_up = model.get_input_embeddings()(ids)
    first = logits(model)
    # The codes, and scales and zero points where they are no places in a table, are nowhere but in the tiles.
    left = {name.rpartition(".")[2] for name, _ in model.named_buffers() if "proj" in name or "embed" in name}
    of_table = {"qscales", "scale_table"} if scale_bits == 6 else set()
    assert left == {"outlier_index", "outlier_weight", "like"} | of_table
    # What looks at the weights finds them, and the next product is what it was.
    projection = model.model.layers[0].mlp.up_proj
    assert torch.equal(model.get_input_embeddings()(ids), looked_up)
    assert torch.equal(
        projection.dequantize(torch.float32), untouched.model.layers[0].mlp.up_proj.dequantize(torch.float32)
    )
    assert torch.equal(logits(copy.deepcopy(model)), first)
    found = model.state_dict()
    assert list(found) == list(wanted)
    assert all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in wanted.items()
    )
    assert torch.equal(logits(model), first)
    model.load_state_dict(wanted)
    assert torch.equal(logits(model), first)
    # In another dtype, too: outlier weights were rounded for the tiles alone.
    logits(model.to(torch.float16))
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items() if name.split(".")[-1] in SUFFIXES)


@needs_compiler
@pytest.mark.usefixtures("gpu")
def test_a_change_of_what_is_loaded_reaches_the_tiles(tmp_path: Path) -> None:
    made = make_parts(tiny_llama(), tmp_path / "run", 4, 32, False, (3, 17))
    model = AutoModelForCausalLM.from_pretrained(export(tmp_path, made), dtype=torch.bfloat16)
    first = logits(model)
    changed = {name: 2 * part if name.endswith("up_proj.scales") else part for name, part in model.state_dict().items()}
    model.load_state_dict(changed)
    assert not torch.equal(logits(model), first)


@needs_compiler
@pytest.mark.usefixtures("gpu")
def test_where_kernels_can_run_linears_are_tiled_once_and_anew_after_a_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels run on the CPU here; in whole forward passes they round as dequantized weights do."""
    made = make_parts(tiny_llama(), tmp_path / "run", 4, 32, False, (3, 17))
    model = AutoModelForCausalLM.from_pretrained(export(tmp_path, made), dtype=torch.bfloat16)
    wanted = logits(made.reference.to(torch.bfloat16)).float()
    tiled: list[torch.dtype] = []

    def counted(linear: QuantizedLinear, dtype: torch.dtype) -> TiledLinear:
        tiled.append(dtype)
        return tile(linear, dtype)

    monkeypatch.setattr(stored_weight, "tile", counted)
    found = logits(model).float()
    logits(model)
    linears = sum(isinstance(module, accullm_cli.hf.HybridLinear) for module in model.modules())
    assert linears == 14
    assert tiled == [torch.bfloat16] * linears
    # Sums in another order move some results to the next number of the format, in every layer.
    assert float((found - wanted).abs().max()) <= 0.03 * float(wanted.abs().max())
    logits(model.to(torch.float16))
    assert tiled == [torch.bfloat16] * linears + [torch.float16] * linears


def test_kernels_that_are_wrong_on_a_device_multiply_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_parts(tiny_llama(), tmp_path / "run", 4, 32, False, (3, 17))
    model = AutoModelForCausalLM.from_pretrained(export(tmp_path, made), dtype=torch.bfloat16)
    monkeypatch.setattr(stored_weight, "why_no_kernels", lambda *_: None)
    monkeypatch.setattr(check, "largest_disagreement", lambda where: "hybrid_gemv with 1 tokens is off by 2")
    check.require_agreement.cache_clear()
    with pytest.raises(AccullmError) as refusal:
        logits(model)
    assert refusal.value.line() == (
        "cpu: the CUDA kernels disagree with float64: hybrid_gemv with 1 tokens is off by 2; run the model on the CPU, "
        "and please report this with the output of accullm doctor"
    )
