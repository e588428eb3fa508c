"""Native artifacts in transformers: logits, dtypes, text, and everything that must not load."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import accullm_cli.hf
from accullm_cli.errors import AccullmError
from accullm_cli.formats import FORMATS
from accullm_cli.kernels import packed
from accullm_cli.quant.linear import QuantizedLinear
from tests.artifacts import Made, empty, make_parts
from tests.tiny import tiny_gemma3, tiny_gpt2, tiny_llama, tiny_mixtral, tokens

Q_PROJ = "model.layers.0.self_attn.q_proj"
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": tiny_llama,
    "tied llama": lambda: tiny_llama(tied=True),
    "gpt2": tiny_gpt2,
    "mixtral": tiny_mixtral,
}

# One whose embedding multiplies what it looks up.
WITH_SCALED = {**MODELS, "gemma3": tiny_gemma3}


def export(tmp_path: Path, made: Made) -> Path:
    directory = empty(tmp_path / "artifact")
    FORMATS["accullm"].write(directory, made.parts)
    return directory


def plain(tmp_path: Path, made: Made, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The reference, loaded by the same road (a cast in memory would also cast the rotary frequencies)."""
    made.reference.save_pretrained(tmp_path / "plain")
    # transformers' other ways to run experts sum in another order.
    return AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=dtype, experts_implementation="eager")


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(tokens()).logits


def assert_same(model: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, but where a weight is laid out otherwise: Conv1D's is transposed, experts lie in one stack. There
    some CPUs sum in another order.
    """
    tolerance = 2e-5 if model in ("gpt2", "mixtral") else 0
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.fixture(autouse=True)
def _dequantized(monkeypatch: pytest.MonkeyPatch) -> None:
    """No products on the CPU but torch's own, so that results can be compared bit for bit."""
    monkeypatch.setattr(packed, "PACKED_TOKENS", 0)


# -- what is computed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "outliers"),
    [(4, 32, False, (3, 17)), (3, -1, True, ()), (8, 40, False, (0, 39))],
)
def test_logits_equal_those_of_the_dequantized_weights(
    model: str, bits: int, group_size: int, symmetric: bool, outliers: tuple[int, ...], tmp_path: Path
) -> None:
    made = make_parts(MODELS[model](), tmp_path / "run", bits, group_size, symmetric, outliers)
    loaded = AutoModelForCausalLM.from_pretrained(export(tmp_path, made))
    assert_same(model, logits(loaded), logits(made.reference))


@pytest.mark.parametrize("model", ["llama", "mixtral"])
def test_linears_left_in_16_bits_load_beside_quantized_ones(model: str, tmp_path: Path) -> None:
    made = make_parts(MODELS[model](), tmp_path / "run", keep=("0.self_attn.o_proj", "1.mlp.experts.down_proj.2"))
    loaded = AutoModelForCausalLM.from_pretrained(export(tmp_path, made))
    assert type(loaded.model.layers[0].self_attn.o_proj) is nn.Linear
    assert_same(model, logits(loaded), logits(made.reference))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model", ["tied llama", "mixtral"])
def test_weights_are_rounded_once_to_the_dtype_asked_for(model: str, dtype: torch.dtype, tmp_path: Path) -> None:
    made = make_parts(MODELS[model](), tmp_path / "run", outliers=(3, 17))
    loaded = AutoModelForCausalLM.from_pretrained(export(tmp_path, made), dtype=dtype)
    assert logits(loaded).dtype == dtype
    assert torch.equal(logits(loaded), logits(plain(tmp_path, made, dtype)))


@pytest.mark.parametrize("model", MODELS)
def test_scales_are_looked_up_in_their_table(model: str, tmp_path: Path) -> None:
    made = make_parts(MODELS[model](), tmp_path / "run", outliers=(3,), scale_bits=6)
    loaded = AutoModelForCausalLM.from_pretrained(export(tmp_path, made), dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(plain(tmp_path, made, torch.float32)))
    half = loaded.to(torch.bfloat16)
    tables = {name: value.dtype for name, value in half.state_dict().items() if name.endswith("scale_table")}
    assert len(tables) == len(made.linears)
    assert set(tables.values()) == {torch.float16}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_scales_and_outlier_weights_keep_their_stored_dtype(
    stored: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    made = make_parts(tiny_llama(dtype=stored), tmp_path / "run", outliers=(3,))
    model = AutoModelForCausalLM.from_pretrained(export(tmp_path, made), dtype=dtype)
    for moved in (model, model.to(torch.bfloat16), model.to(torch.float64)):
        linear = moved.get_submodule(Q_PROJ)
        assert torch.equal(linear.scales, made.linears[Q_PROJ].scales)
        assert linear.scales.dtype == torch.float16
        assert torch.equal(linear.outlier_weight, made.linears[Q_PROJ].outlier_weight)
        assert linear.outlier_weight.dtype == stored


def test_experts_follow_the_model_to_another_dtype(tmp_path: Path) -> None:
    made = make_parts(tiny_mixtral(), tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(export(tmp_path, made)).to(torch.bfloat16)
    name = "model.layers.0.mlp.experts.down_proj"
    expert = model.get_submodule(name)[torch.tensor(2)]
    assert torch.equal(expert, made.linears[f"{name}.2"].dequantize(torch.bfloat16))


def test_a_model_that_keeps_modules_in_float32_does_not_cast_scales(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_parts(tiny_llama(), tmp_path / "run", outliers=(3,))
    directory = export(tmp_path, made)
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules", ["q_proj"])
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["q_proj"])
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    assert model.get_submodule(Q_PROJ).scales.dtype == torch.float16


@pytest.mark.parametrize("model", MODELS)
def test_text_is_generated_as_by_the_dequantized_model(model: str, tmp_path: Path) -> None:
    made = make_parts(MODELS[model](), tmp_path / "run", outliers=(5,))
    loaded = AutoModelForCausalLM.from_pretrained(export(tmp_path, made))
    prompt = tokens(batch=1, length=5)
    texts = [
        m.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, pad_token_id=0)
        for m in (loaded, made.reference)
    ]
    assert texts[0].shape == (1, 13)
    assert torch.equal(texts[0], texts[1])


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    made = make_parts(tiny_llama(tied=True), tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(export(tmp_path, made))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_no_dequantized_weight_is_kept(tmp_path: Path) -> None:
    made = make_parts(tiny_llama(), tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(export(tmp_path, made))
    logits(model)
    weights = {name for name, tensor in model.state_dict().items() if tensor.dim() == 2 and tensor.is_floating_point()}
    assert {name for name in weights if not name.endswith(".scales")} == {"model.embed_tokens.weight", "lm_head.weight"}


def test_experts_run_one_at_a_time_unless_another_way_is_insisted_on(tmp_path: Path) -> None:
    made = make_parts(tiny_mixtral(), tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(export(tmp_path, made), experts_implementation="grouped_mm")
    assert model.config._experts_implementation == "eager"
    assert_same("mixtral", logits(model), logits(made.reference))
    model.set_experts_implementation("batched_mm")  # multiplies by all of a stack at once, dequantized
    assert_same("mixtral", logits(model), logits(made.reference))


# -- quantized embeddings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [*MODELS, "gemma3"])
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(8, 32, False), (4, -1, True), (4, 25, False)])
def test_embeddings_and_heads_compute_as_the_dequantized_ones(
    model: str, bits: int, group_size: int, symmetric: bool, tmp_path: Path
) -> None:
    made = make_parts(WITH_SCALED[model](), tmp_path / "run", 4, group_size, symmetric, (3,), embedding_bits=bits)
    loaded = AutoModelForCausalLM.from_pretrained(export(tmp_path, made))
    assert isinstance(loaded.get_input_embeddings(), accullm_cli.hf.HybridEmbedding)
    ids = tokens()
    assert torch.equal(loaded.get_input_embeddings()(ids), made.reference.get_input_embeddings()(ids))
    assert_same(model, logits(loaded), logits(made.reference))


def test_a_tied_head_has_no_tensors_of_its_own(tmp_path: Path) -> None:
    made = make_parts(tiny_llama(tied=True), tmp_path / "run", embedding_bits=8)
    model = AutoModelForCausalLM.from_pretrained(export(tmp_path, made))
    assert isinstance(model.lm_head, accullm_cli.hf.TiedHead)
    assert list(model.lm_head.buffers()) == list(model.lm_head.parameters()) == []
    # One set of buffers: what is looked up and what is multiplied change together.
    before = logits(model)
    model.model.embed_tokens.scales.mul_(2)
    looked_up = model.model.embed_tokens(tokens())
    assert torch.equal(looked_up, 2 * made.reference.model.embed_tokens(tokens()))
    assert not torch.equal(logits(model), before)
    model.tie_weights()  # whoever asks for it again finds nothing to do
    copied = copy.deepcopy(model)
    after = logits(model)
    copied.model.embed_tokens.scales.mul_(2)
    assert torch.equal(logits(model), after)
    assert not torch.equal(logits(copied), after)


def test_no_dequantized_embedding_is_kept(tmp_path: Path) -> None:
    made = make_parts(tiny_llama(), tmp_path / "run", embedding_bits=8)
    model = AutoModelForCausalLM.from_pretrained(export(tmp_path, made))
    logits(model)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if tensor.dim() == 2}
    assert {name.rpartition(".")[2] for name in tensors} == {"qweight", "scales", "qzeros"}
    assert model.model.embed_tokens.lookup.weight.numel() == 0


def test_only_rows_that_are_looked_up_are_dequantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_parts(tiny_llama(), tmp_path / "run", embedding_bits=8)
    model = AutoModelForCausalLM.from_pretrained(export(tmp_path, made))
    seen: list[tuple[int, ...]] = []
    dequantize = QuantizedLinear.dequantize

    def counted(linear: QuantizedLinear, dtype: torch.dtype) -> torch.Tensor:
        seen.append(tuple(linear.codes.shape))
        return dequantize(linear, dtype)

    monkeypatch.setattr(QuantizedLinear, "dequantize", counted)
    model.model.embed_tokens(torch.tensor([[5, 9, 5]]))
    assert seen == [(3, 64)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_follow_the_dtype_asked_for_and_their_scales_do_not(
    tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    made = make_parts(tiny_llama(tied=tied), tmp_path / "run", embedding_bits=4)
    directory = export(tmp_path, made)
    wanted = logits(plain(tmp_path, made, dtype))
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    assert torch.equal(logits(loaded), wanted)
    moved = AutoModelForCausalLM.from_pretrained(directory).to(dtype)
    assert moved.model.embed_tokens(tokens()).dtype == dtype
    for model in (loaded, moved):
        assert torch.equal(model.model.embed_tokens.scales, made.embeddings["model.embed_tokens"].scales)


def test_text_is_generated_with_quantized_embeddings(tmp_path: Path) -> None:
    made = make_parts(tiny_llama(tied=True), tmp_path / "run", embedding_bits=8)
    loaded = AutoModelForCausalLM.from_pretrained(export(tmp_path, made))
    prompt = tokens(batch=2, length=5)
    texts = [
        m.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, pad_token_id=0)
        for m in (loaded, made.reference)
    ]
    assert torch.equal(texts[0], texts[1])


def test_a_missing_tensor_of_an_embedding_is_refused(tmp_path: Path) -> None:
    directory = export(tmp_path, make_parts(tiny_llama(tied=True), tmp_path / "run", embedding_bits=8))
    index_path = directory / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shard = index["weight_map"].pop("model.embed_tokens.qweight")
    tensors = load_file(directory / shard)
    del tensors["model.embed_tokens.qweight"]
    (directory / shard).unlink()
    save_file(tensors, directory / shard)
    index_path.write_text(json.dumps(index))
    with pytest.raises(AccullmError) as error:
        AutoModelForCausalLM.from_pretrained(directory)
    assert error.value.line() == f"{directory}: tensor model.embed_tokens.qweight is missing; copy the artifact again"


def test_an_embedding_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    made = make_parts(tiny_llama(), tmp_path / "run", embedding_bits=8)
    directory = export(tmp_path, made)
    config = json.loads((directory / "config.json").read_text())
    scheme = config["quantization_config"]["embeddings"].pop("lm_head")
    config["quantization_config"]["embeddings"]["head"] = scheme
    with pytest.raises(AccullmError) as error:
        accullm_cli.hf.replace_embeddings(
            tiny_llama(), accullm_cli.hf.AccullmConfig(**config["quantization_config"]), torch.float32
        )
    assert error.value.line() == (
        "config.json: LlamaForCausalLM has no embedding head; load the artifact with AutoModelForCausalLM"
    )


# -- what must not load -------------------------------------------------------------------------------------


def test_without_the_import_loading_fails_and_names_the_remedy(tmp_path: Path) -> None:
    directory = export(tmp_path, make_parts(tiny_llama(), tmp_path / "run"))
    code = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, directory], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith(
        f"No such file or directory: {directory}/import-accullm_cli.hf-before-loading.safetensors"
    )


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the first block's shard, and the index with it."""
    shard = directory / "model-00001-of-00003.safetensors"
    tensors = load_file(shard)
    change(tensors)
    shard.unlink()
    save_file(tensors, shard)
    index_path = directory / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    kept = {name: file for name, file in index["weight_map"].items() if file != shard.name}
    index["weight_map"] = kept | dict.fromkeys(tensors, shard.name)
    index_path.write_text(json.dumps(index))


NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q_PROJ}.qweight"), f"tensor {Q_PROJ}.qweight is missing; copy the artifact again"),
        (
            lambda t: t.pop(f"{Q_PROJ}.outlier_index"),
            f"tensor {Q_PROJ}.outlier_index is missing; copy the artifact again",
        ),
        (lambda t: t.pop(f"{Q_PROJ}.bias"), f"tensor {Q_PROJ}.bias is missing; copy the artifact again"),
        (lambda t: t.pop(NORM), f"tensor {NORM} is missing; copy the artifact again"),
        (lambda t: t.update({NORM: torch.ones(63)}), f"tensor {NORM} has shape [63], expected [64]"),
        (
            lambda t: t.update({f"{Q_PROJ}.scales": t[f"{Q_PROJ}.scales"].float()}),
            f"tensor {Q_PROJ}.scales is float32, expected float16",
        ),
        (
            lambda t: t.update({"model.layers.0.extra.qweight": torch.zeros(1, dtype=torch.uint8)}),
            "tensor model.layers.0.extra.qweight has no place in LlamaForCausalLM",
        ),
    ],
)
def test_damaged_tensors_are_refused(
    change: Callable[[dict[str, torch.Tensor]], object], message: str, tmp_path: Path
) -> None:
    directory = export(tmp_path, make_parts(tiny_llama(), tmp_path / "run", outliers=(3,)))
    edit_tensors(directory, change)
    with pytest.raises(AccullmError) as error:
        AutoModelForCausalLM.from_pretrained(directory)
    assert error.value.line() == f"{directory}: {message}"


@pytest.mark.parametrize(
    ("index", "line"),
    [([3, 64], "names feature 64 of 64"), ([-1, 3], "names feature -1 of 64"), ([5, 5], "is not ascending")],
)
def test_outliers_that_do_not_exist_are_refused_at_load(index: list[int], line: str, tmp_path: Path) -> None:
    made = make_parts(tiny_llama(), tmp_path / "run", 4, 32, False, (3, 17))
    directory = export(tmp_path, made)
    edit_tensors(directory, lambda tensors: tensors[f"{Q_PROJ}.outlier_index"].copy_(torch.tensor(index)))
    with pytest.raises(AccullmError) as error:
        AutoModelForCausalLM.from_pretrained(directory)
    assert error.value.line() == f"{directory}: tensor {Q_PROJ}.outlier_index {line}"


def test_a_model_class_without_the_linears_is_refused(tmp_path: Path) -> None:
    directory = export(tmp_path, make_parts(tiny_llama(), tmp_path / "run"))
    with pytest.raises(AccullmError) as error:
        AutoModel.from_pretrained(directory)
    assert error.value.line() == (
        f"config.json: LlamaModel has no linear layer {Q_PROJ}; load the artifact with AutoModelForCausalLM"
    )


def test_a_newer_format_version_is_refused(tmp_path: Path) -> None:
    directory = export(tmp_path, make_parts(tiny_llama(), tmp_path / "run"))
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["format_version"] = 5
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(AccullmError) as error:
        AutoModelForCausalLM.from_pretrained(directory)
    assert error.value.line() == (
        "config.json: format version 5 is newer than 4, the newest that this accullm reads; "
        "upgrade with: pip install -U accullm"
    )


def test_quantizing_while_loading_is_refused(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "plain")
    config = accullm_cli.hf.AccullmConfig(format_version=1)
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)


def test_saving_is_refused_with_the_way_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = AutoModelForCausalLM.from_pretrained(export(tmp_path, make_parts(tiny_llama(), tmp_path / "run")))
    with pytest.raises(ValueError, match="quantized with accullm and is not serializable"):
        model.save_pretrained(tmp_path / "again")
    assert "An AccuLLM artifact is not saved by save_pretrained: copy its directory instead." in caplog.text
    assert not (tmp_path / "again").exists()
