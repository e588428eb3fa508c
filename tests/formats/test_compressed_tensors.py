"""compressed-tensors: held against the package's own packing, and against stock transformers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from accullm_cli.errors import AccullmError
from accullm_cli.formats import FORMATS, open_artifact
from accullm_cli.formats.base import ModelShape, Objection
from accullm_cli.formats.compressed_tensors import (
    decode,
    encode,
    quantization_config,
)
from accullm_cli.formats.objections import nearest_group_sizes
from accullm_cli.formats.objections import objections as objections_of
from accullm_cli.quant.plan import LinearPlan, Plan
from tests.artifacts import Made, empty, make_parts, quantize_nearest
from tests.tiny import tiny_llama, tokens

UP_PROJ = "model.layers.1.mlp.up_proj"
DOWN_PROJ = "model.layers.1.mlp.down_proj"
Variant = tuple[int, int, bool]
VARIANTS = [(bits, group, symmetric) for bits in (4, 8) for group in (32, -1) for symmetric in (True, False)]


def export(tmp_path: Path, made: Made) -> Path:
    directory = empty(tmp_path / "artifact")
    FORMATS["compressed-tensors"].write(directory, made.parts)
    return directory


# -- packing, against the package ---------------------------------------------------------------------------

# 70 input features and 21 rows fill neither bytes nor words.
SHAPES = [(48, 96), (21, 70)]


def linear_of(shape: tuple[int, int], bits: int, group_size: int, symmetric: bool):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    return quantize_nearest(weight, bits, group_size, symmetric)


def scheme_of(bits: int, group_size: int, symmetric: bool) -> QuantizationScheme:
    args = QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=symmetric,
        strategy="channel" if group_size == -1 else "group",
        group_size=None if group_size == -1 else group_size,
    )
    return QuantizationScheme(targets=["Linear"], weights=args)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_zero_points_pack_as_the_package_does(shape: tuple[int, int], variant: Variant) -> None:
    bits, group_size, symmetric = variant
    if shape[1] % 32:
        group_size = -1
    linear = linear_of(shape, bits, group_size, symmetric)
    tensors = encode(linear, torch.float16, "here")
    middle = 2 ** (bits - 1)
    signed = (linear.codes.int() - middle).to(torch.int8)
    assert torch.equal(tensors["weight_packed"], pack_to_int32(signed, bits))
    assert tensors["weight_shape"].tolist() == list(shape)
    if symmetric:
        assert "weight_zero_point" not in tensors
    else:
        assert linear.zeros is not None
        zeros = (linear.zeros.int() - middle).to(torch.int8)
        assert torch.equal(tensors["weight_zero_point"], pack_to_int32(zeros, bits, packed_dim=0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_package_decompresses_to_our_weights(variant: Variant, dtype: torch.dtype) -> None:
    linear = linear_of((48, 96), *variant)
    found = PackedQuantizationCompressor.decompress(encode(linear, dtype, "here"), scheme_of(*variant))
    assert found["weight"].dtype == dtype
    assert torch.equal(found["weight"], linear.dequantize(dtype))


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_inverts_encoding(variant: Variant) -> None:
    bits, group_size, symmetric = variant
    linear = linear_of((21, 96), *variant)
    plan = LinearPlan("p", 21, 96, bits, group_size, symmetric)
    found = decode(encode(linear, torch.bfloat16, "here"), plan)
    assert torch.equal(found.codes, linear.codes)
    assert found.scales.dtype == torch.float16
    assert torch.equal(found.scales, linear.scales)
    assert (found.zeros is None) == symmetric
    if not symmetric:
        assert torch.equal(found.zeros, linear.zeros)


def test_a_scale_that_bfloat16_does_not_hold_is_refused() -> None:
    linear = linear_of((48, 96), 4, 32, True)
    linear = dataclasses.replace(linear, scales=linear.scales * (1 + 2**-10))
    with pytest.raises(AccullmError) as error:
        encode(linear, torch.bfloat16, "model.layers.0")
    assert error.value.line() == (
        "model.layers.0: a scale is not exactly representable in bfloat16; "
        "run profile again with --format compressed-tensors"
    )


# -- whole artifacts, against transformers ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), VARIANTS[:4] + VARIANTS[5:6])
def test_stock_transformers_loads_it_with_equal_logits(
    bits: int, group_size: int, symmetric: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_llama(dtype=dtype)
    made = make_parts(model, tmp_path / "run", bits, group_size, symmetric, keep=("o_proj",), scale_dtype="bfloat16")
    loaded = AutoModelForCausalLM.from_pretrained(export(tmp_path, made), dtype=dtype)
    made.reference.save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=dtype)
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, plain(tokens()).logits)
        assert not torch.equal(plain(tokens()).logits, model(tokens()).logits)


def test_two_schemes_load_in_stock_transformers(tmp_path: Path) -> None:
    made = make_parts(tiny_llama(tied=True), tmp_path / "run", symmetric=True)
    # Codes of another scheme for one linear, in its block's shard.
    linear = quantize_nearest(tiny_llama(tied=True).get_parameter(f"{DOWN_PROJ}.weight"), 8, -1, True)
    shard = made.parts.blocks[1]
    tensors = {name: tensor for name, tensor in load_file(shard).items() if not name.startswith(f"{DOWN_PROJ}.")}
    shard.unlink()
    save_file(tensors | {f"{DOWN_PROJ}.{suffix}": tensor for suffix, tensor in linear.to_tensors().items()}, shard)
    plans = dict(made.parts.plan.linears)
    plans[DOWN_PROJ] = dataclasses.replace(plans[DOWN_PROJ], bits=8, group_size=-1)
    parts = dataclasses.replace(made.parts, plan=Plan(plans))
    made.reference.get_parameter(f"{DOWN_PROJ}.weight").data.copy_(linear.dequantize())
    loaded = AutoModelForCausalLM.from_pretrained(export(tmp_path, dataclasses.replace(made, parts=parts)))
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, made.reference(tokens()).logits)


def test_no_weight_is_stored_beside_its_codes(tmp_path: Path) -> None:
    opened = open_artifact(export(tmp_path, make_parts(tiny_llama(), tmp_path / "run")))
    assert not {f"{name}.weight" for name in opened.plan.linears} & set(opened.names())


# -- reading -------------------------------------------------------------------------------------------------


def test_an_exported_artifact_reads_back(tmp_path: Path) -> None:
    made = make_parts(tiny_llama(), tmp_path / "run", keep=("o_proj",))
    opened = open_artifact(export(tmp_path, made))
    assert opened.format == "compressed-tensors"
    assert list(opened.plan.linears.items()) == list(made.parts.plan.linears.items())
    for name, linear in made.linears.items():
        assert torch.equal(opened.linear(name).dequantize(), linear.dequantize()), name
    assert torch.equal(opened.tensor("model.norm.weight"), made.reference.get_parameter("model.norm.weight"))
    assert "model.layers.0.self_attn.q_proj.bias" in opened.names()


def test_an_artifact_of_another_tool_reads_back_without_a_manifest(tmp_path: Path) -> None:
    made = make_parts(tiny_llama(), tmp_path / "run", keep=("o_proj",))
    directory = export(tmp_path, made)
    (directory / "accullm.json").unlink()
    opened = open_artifact(directory)
    assert dict(opened.plan.linears) == {name: made.parts.plan.linears[name] for name in made.linears}
    assert torch.equal(opened.linear(UP_PROJ).dequantize(), made.linears[UP_PROJ].dequantize())


def edit_config(directory: Path, key: str, value: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"][key] = value
    (directory / "config.json").write_text(json.dumps(config))


def test_other_compressions_of_the_package_are_refused(tmp_path: Path) -> None:
    directory = export(tmp_path, make_parts(tiny_llama(), tmp_path / "run"))
    (directory / "accullm.json").unlink()
    edit_config(directory, "format", "float-quantized")
    with pytest.raises(AccullmError) as error:
        open_artifact(directory)
    assert error.value.line() == (
        f"{directory}/config.json: is compressed-tensors in format float-quantized, "
        "of which only pack-quantized is supported"
    )


BLOCK = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize(
    ("suffix", "tensor", "manifest", "message"),
    [
        ("weight_scale", None, True, "{dir}: tensor {p}.weight_scale is missing; copy the artifact again"),
        ("weight_scale", torch.zeros(2, dtype=torch.int32), True, "{block}: tensor {p}.weight_scale is int32"),
        (
            "weight_zero_point",
            torch.zeros(11, 2, dtype=torch.int32),
            True,
            "{block}: tensor {p}.weight_zero_point has shape [11, 2], expected [12, 2]",
        ),
        ("weight_shape", None, False, "{dir}: tensor {p}.weight_shape is missing; copy the artifact again"),
        (
            "weight_shape",
            torch.tensor([96, 80]),
            False,
            "{dir}: tensor {p}.weight_packed has 8 words for 80 inputs",
        ),
        (
            "weight_g_idx",
            torch.zeros(64, dtype=torch.int32),
            False,
            "{block}: tensor {p}.weight_g_idx: reordered inputs (actorder group) are not supported",
        ),
    ],
)
def test_damaged_tensors_are_refused(
    suffix: str, tensor: torch.Tensor | None, manifest: bool, message: str, tmp_path: Path
) -> None:
    directory = export(tmp_path, make_parts(tiny_llama(), tmp_path / "run"))
    tensors = load_file(directory / BLOCK)
    tensors.pop(f"{UP_PROJ}.{suffix}", None)
    if tensor is not None:
        tensors[f"{UP_PROJ}.{suffix}"] = tensor
    save_file(tensors, directory / BLOCK)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    files = {name: file for name, file in index["weight_map"].items() if file != BLOCK}
    index["weight_map"] = files | dict.fromkeys(tensors, BLOCK)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    if not manifest:
        (directory / "accullm.json").unlink()
    with pytest.raises(AccullmError) as error:
        open_artifact(directory)
    assert error.value.line() == message.format(dir=directory, block=directory / BLOCK, p=UP_PROJ)


# -- objections ----------------------------------------------------------------------------------------------


def objections(
    *linears: LinearPlan, dtype: torch.dtype = torch.float16, kind: str = "linear", scale_dtype: str = "float16"
) -> list[Objection]:
    plan = Plan({linear.name: linear for linear in linears}, scale_dtype)
    return objections_of("compressed-tensors", plan, ModelShape("llama", dtype, dict.fromkeys(plan.linears, kind)))


def linear(name: str = "p", bits: int = 4, columns: int = 1536, group_size: int = 64, outliers: tuple[int, ...] = ()):
    return LinearPlan(name, 96, columns, bits, group_size, False, outliers)


def test_what_fits_has_no_objection() -> None:
    kept = LinearPlan("kept", 96, 577, 16, 128, False)
    assert objections(linear("a"), linear("b", group_size=-1, columns=577), linear("c", bits=8), kept) == []


def test_a_group_size_that_does_not_divide() -> None:
    assert objections(linear("a", columns=576, group_size=128), linear("b", columns=576, group_size=128), linear()) == [
        Objection(
            "compressed-tensors needs a group size that divides the 576 input features of a, and 128 does not "
            "(and 1 more)",
            "use --group-size 64, 96, 192 or -1, or export to the format accullm",
        )
    ]


def test_outliers() -> None:
    assert objections(linear("a", outliers=(1, 2)), linear("b")) == [
        Objection(
            "compressed-tensors holds outlier features in an adapter, and those of a are to be in its own files",
            "add --outlier-adapter, or use --outliers 0, or export to the format accullm",
        )
    ]


def test_other_bits() -> None:
    assert objections(linear("a", bits=3), linear("b", bits=5)) == [
        Objection(
            "compressed-tensors holds 4 or 8 bits, and a has 3 (and 1 more)",
            "use --bits 4 or --bits 8, or export to the format accullm",
        )
    ]


@pytest.mark.parametrize(
    ("kind", "words"), [("conv1d", "a Conv1D layer"), ("expert", "an expert in a stacked parameter")]
)
def test_other_kinds_of_layers(kind: str, words: str) -> None:
    assert objections(linear("a"), kind=kind) == [
        Objection(f"compressed-tensors holds torch.nn.Linear only, and a is {words}", "export to the format accullm")
    ]


def test_float16_scales_for_a_bfloat16_model() -> None:
    assert objections(linear(), dtype=torch.bfloat16) == [
        Objection(
            "compressed-tensors stores scales in the model's dtype bfloat16, and the plan has float16 ones",
            "ask for the format before profile runs, which then plans scales that both hold: "
            "--format compressed-tensors",
        )
    ]
    assert objections(linear(), dtype=torch.bfloat16, scale_dtype="bfloat16") == []
    assert objections(linear(), dtype=torch.float32) == []


def test_a_dtype_that_holds_no_scales() -> None:
    assert objections(linear(), dtype=torch.float64) == [
        Objection(
            "compressed-tensors stores scales in the model's dtype, and float64 holds none",
            "convert the model to bfloat16 first, or export to the format accullm",
        )
    ]


def test_partners_that_a_runtime_fuses_need_one_scheme() -> None:
    rows = [linear(f"layers.0.mlp.{name}", bits=bits) for name, bits in (("gate_proj", 4), ("up_proj", 8))]
    assert objections(*rows, linear("layers.0.mlp.down_proj", bits=8)) == [
        Objection(
            "vLLM, which reads compressed-tensors, multiplies by gate_proj, up_proj at once, and "
            "layers.0.mlp.gate_proj and its partners are stored in several ways",
            "give them one number of bits and one group size, or export to the format accullm",
        )
    ]
    assert objections(dataclasses.replace(rows[0], bits=8), rows[1], linear("layers.1.mlp.up_proj")) == []


def test_writing_an_impossible_plan_is_refused(tmp_path: Path) -> None:
    made = make_parts(tiny_llama(), tmp_path / "run", outliers=(3,))
    with pytest.raises(AccullmError, match="compressed-tensors holds outlier features in an adapter"):
        FORMATS["compressed-tensors"].write(empty(tmp_path / "artifact"), made.parts)
    assert list((tmp_path / "artifact").iterdir()) == []


@pytest.mark.parametrize(
    ("wanted", "divisor", "sizes"), [(128, 192, [64, 96, 192]), (128, 4096, [32, 64, 128]), (128, 40, [10, 20, 40])]
)
def test_nearest_group_sizes(wanted: int, divisor: int, sizes: list[int]) -> None:
    assert nearest_group_sizes(wanted, divisor) == sizes


def test_targets_of_two_schemes_are_disjoint_and_exact() -> None:
    config = quantization_config(
        Plan({"a": linear("a"), "b": linear("b", bits=8), "c": linear("c"), "d": linear("d", bits=16)})
    )
    assert [group["targets"] for group in config["config_groups"].values()] == [["a", "c"], ["b"]]
    assert config["ignore"] == ["lm_head", "d"]


def test_only_a_single_asymmetric_scheme_is_dequantized_while_loading() -> None:
    a, b = linear("a"), linear("b", bits=8)
    assert quantization_config(Plan({"a": a}))["dequantize"] is True
    assert "dequantize" not in quantization_config(Plan({"a": dataclasses.replace(a, symmetric=True)}))
    assert "dequantize" not in quantization_config(Plan({"a": a, "b": b}))


def test_quantized_embeddings_are_objected_to() -> None:
    plan = Plan({"p": linear()}, embeddings={"lm_head": LinearPlan("lm_head", 260, 64, 8, 32, False)})
    found = objections_of("compressed-tensors", plan, ModelShape("llama", torch.float16, {"p": "linear"}))
    assert found == [
        Objection(
            "compressed-tensors keeps embedding and output head as they are, and lm_head is to have 8 bits",
            "leave out --embedding-bits, or export to the format accullm",
        )
    ]
