"""compressed-tensors artifacts: read back bit for bit, and held against stock transformers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from accullm_cli.errors import AccullmError
from accullm_cli.formats import FORMATS, open_artifact
from accullm_cli.formats.base import ModelShape, Objection
from accullm_cli.formats.compressed_tensors import quantization_config
from accullm_cli.formats.objections import nearest_group_sizes
from accullm_cli.formats.objections import objections as objections_of
from accullm_cli.formats.shards import TensorFiles
from accullm_cli.quant.plan import LinearPlan, Plan
from tests.artifacts import Made, empty, make_parts, quantize_nearest
from tests.tiny import tiny_llama, tiny_mixtral, tokens

UP_PROJ = "model.layers.1.mlp.up_proj"
DOWN_PROJ = "model.layers.1.mlp.down_proj"


def export(tmp_path: Path, made: Made) -> Path:
    directory = empty(tmp_path / "artifact")
    FORMATS["compressed-tensors"].write(directory, made.parts)
    return directory


# -- whole artifacts, against transformers ------------------------------------------------------------------


pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")


def same_logits(directory: Path, made: Made, tmp_path: Path, dtype: torch.dtype = torch.float32) -> bool:
    """Whether stock transformers makes the same of the artifact as of a plain model with the weights it stands for."""
    loaded, info = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    made.reference.save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=dtype)
    with torch.no_grad():
        return torch.equal(loaded(tokens()).logits, plain(tokens()).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"), [(2, 32, True), (3, 32, False), (4, -1, True), (5, -1, False), (8, 32, False)]
)
def test_stock_transformers_loads_it_with_equal_logits(
    bits: int, group_size: int, symmetric: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_llama(dtype=dtype)
    made = make_parts(model, tmp_path / "run", bits, group_size, symmetric, keep=("o_proj",), scale_dtype="bfloat16")
    assert same_logits(export(tmp_path, made), made, tmp_path, dtype)
    with torch.no_grad():
        assert not torch.equal(made.reference(tokens()).logits, model(tokens()).logits)


def stored_otherwise(made: Made, schemes: Mapping[str, tuple[int, int]]) -> Made:
    """Some linears with other bits and group size, by the ends of their names, symmetric; in their blocks' shards."""
    plans = dict(made.parts.plan.linears)
    linears = dict(made.linears)
    for name in plans:
        bits, size = next((scheme for end, scheme in schemes.items() if name.endswith(end)), (0, 0))
        if not bits:
            continue
        shard = made.parts.blocks[int(name.split(".")[2])]
        linears[name] = quantize_nearest(made.linears[name].dequantize(), bits, size, True)
        tensors = {key: tensor for key, tensor in load_file(shard).items() if not key.startswith(f"{name}.q")}
        tensors = {key: tensor for key, tensor in tensors.items() if key != f"{name}.scales"}
        shard.unlink()
        save_file(tensors | {f"{name}.{end}": tensor for end, tensor in linears[name].to_tensors().items()}, shard)
        plans[name] = dataclasses.replace(plans[name], bits=bits, group_size=size)
        made.reference.get_parameter(f"{name}.weight").data.copy_(linears[name].dequantize())
    return dataclasses.replace(made, parts=dataclasses.replace(made.parts, plan=Plan(plans)), linears=linears)


MIXED = {
    "q_proj": (3, 32),
    "k_proj": (3, 32),
    "v_proj": (3, 32),
    "gate_proj": (6, 64),
    "up_proj": (6, 64),
    "down_proj": (8, -1),
}


@pytest.mark.parametrize("tied", [False, True])
def test_a_mixed_plan_with_fused_partners_loads_in_stock_transformers(tied: bool, tmp_path: Path) -> None:
    made = stored_otherwise(make_parts(tiny_llama(tied=tied), tmp_path / "run", symmetric=True), MIXED)
    directory = export(tmp_path, made)
    assert "dequantize" not in read_config(directory)
    assert same_logits(directory, made, tmp_path)
    opened = open_artifact(directory)
    for name, linear in made.linears.items():
        assert torch.equal(opened.linear(name).codes, linear.codes), name
        assert torch.equal(opened.weight(name), linear.dequantize()), name


def test_biases_are_stored_as_they_are(tmp_path: Path) -> None:
    made = make_parts(tiny_llama(), tmp_path / "run")
    name = "model.layers.1.self_attn.q_proj.bias"
    assert torch.equal(open_artifact(export(tmp_path, made)).tensor(name), made.reference.get_parameter(name))


# -- embedding and head --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_quantized_embeddings_load_in_stock_transformers_where_all_is_stored_alike(tied: bool, tmp_path: Path) -> None:
    made = make_parts(tiny_llama(tied=tied), tmp_path / "run", symmetric=True, embedding_bits=4)
    directory = export(tmp_path, made)
    assert read_config(directory)["dequantize"] is True
    assert same_logits(directory, made, tmp_path)


@pytest.mark.parametrize(
    ("tied", "targets", "ignored"),
    [(False, ["model.embed_tokens", "lm_head"], []), (True, ["model.embed_tokens"], [])],
)
def test_quantized_embeddings_have_a_group_of_their_own(
    tied: bool, targets: list[str], ignored: list[str], tmp_path: Path
) -> None:
    made = make_parts(tiny_llama(tied=tied), tmp_path / "run", symmetric=True, embedding_bits=6)
    directory = export(tmp_path, made)
    config = read_config(directory)
    assert config["config_groups"]["group_1"]["targets"] == targets
    assert config["config_groups"]["group_1"]["weights"]["num_bits"] == 6
    assert config["ignore"] == ignored
    opened = open_artifact(directory)
    assert list(opened.plan.embeddings) == targets
    for name, embedding in made.embeddings.items():
        assert torch.equal(opened.weight(name), embedding.dequantize()), name
    # One matrix where they are tied.
    stored = {name.partition(".weight")[0] for name in opened.files.infos if name.endswith("weight_packed")}
    assert stored - set(opened.plan.linears) == set(targets)
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & set(opened.files.infos)


def test_a_quantized_head_alone_loads_in_stock_transformers(tmp_path: Path) -> None:
    made = make_parts(tiny_llama(), tmp_path / "run", symmetric=True, embedding_bits=6)
    shards = [shard for shard in made.parts.embeddings if shard.stem == "lm_head"]
    embedding = tiny_llama().get_parameter("model.embed_tokens.weight")
    made.reference.get_parameter("model.embed_tokens.weight").data.copy_(embedding)
    plan = dataclasses.replace(made.parts.plan, embeddings={"lm_head": made.parts.plan.embeddings["lm_head"]})
    outside = iter([*made.parts.outside, ("model.embed_tokens.weight", embedding.detach().clone())])
    parts = dataclasses.replace(made.parts, plan=plan, embeddings=tuple(shards), outside=outside)
    directory = export(tmp_path, dataclasses.replace(made, parts=parts))
    assert "dequantize" not in read_config(directory)
    assert same_logits(directory, made, tmp_path)


# -- a mixture of experts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("dense_symmetric", [True, False])
def test_experts_are_stored_one_by_one_and_load_in_stock_transformers(
    bits: int, dense_symmetric: bool, tmp_path: Path
) -> None:
    made = experts_of(make_parts(tiny_mixtral(), tmp_path / "run", bits, 8, dense_symmetric), bits)
    directory = export(tmp_path, made)
    names = TensorFiles.open(directory).infos
    of_expert = "model.layers.1.block_sparse_moe.experts.3"
    assert {name.removeprefix(f"{of_expert}.") for name in names if name.startswith(f"{of_expert}.")} == {
        f"{part}.weight_{kind}" for part in ("w1", "w2", "w3") for kind in ("packed", "scale", "shape")
    }
    assert "model.layers.1.block_sparse_moe.gate.weight" in names
    assert not any(".mlp." in name for name in names)
    assert same_logits(directory, made, tmp_path)
    opened = open_artifact(directory)
    assert dict(opened.plan.linears) == dict(made.parts.plan.linears)
    for name, linear in made.linears.items():
        assert torch.equal(opened.linear(name).codes, linear.codes), name
        assert torch.equal(opened.linear(name).dequantize(), linear.dequantize()), name
    gate = "model.layers.1.mlp.gate.weight"
    assert gate in opened.names()
    assert torch.equal(opened.tensor(gate), made.reference.get_parameter(gate))


def experts_of(made: Made, bits: int) -> Made:
    """Experts have no zero points: the same linears, those of experts symmetric."""
    plans, linears = dict(made.parts.plan.linears), dict(made.linears)
    for name, kind in made.parts.shape.kinds.items():
        if kind != "expert" or plans[name].symmetric:
            continue
        shard = made.parts.blocks[int(name.split(".")[2])]
        linears[name] = quantize_nearest(made.linears[name].dequantize(), bits, 8, True)
        tensors = {key: tensor for key, tensor in load_file(shard).items() if not key.startswith(f"{name}.")}
        shard.unlink()
        save_file(tensors | {f"{name}.{end}": tensor for end, tensor in linears[name].to_tensors().items()}, shard)
        plans[name] = dataclasses.replace(plans[name], symmetric=True)
        parameter, _, number = name.rpartition(".")
        made.reference.get_parameter(parameter).data[int(number)].copy_(linears[name].dequantize())
    return dataclasses.replace(made, parts=dataclasses.replace(made.parts, plan=Plan(plans)), linears=linears)


def test_one_expression_stands_for_all_experts(tmp_path: Path) -> None:
    made = experts_of(make_parts(tiny_mixtral(), tmp_path / "run", 4, 8, False), 4)
    config = read_config(export(tmp_path, made))
    assert [group["targets"] for group in config["config_groups"].values()] == [
        [f"model.layers.{block}.self_attn.{name}_proj" for block in range(2) for name in "qkvo"],
        [r"re:.*\.experts\.\d+\..*"],
    ]
    assert config["ignore"] == [
        "model.layers.0.mlp.gate",
        "model.layers.0.block_sparse_moe.gate",
        "model.layers.1.mlp.gate",
        "model.layers.1.block_sparse_moe.gate",
        "lm_head",
    ]


# -- what is in the files ------------------------------------------------------------------------------------


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


def read_config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]
    return config


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
        f"{directory}/config.json: is in format float-quantized, of which only pack-quantized is supported"
    )


def test_zero_points_of_a_symmetric_scheme_are_refused(tmp_path: Path) -> None:
    directory = export(tmp_path, make_parts(tiny_llama(), tmp_path / "run"))
    (directory / "accullm.json").unlink()
    groups = read_config(directory)["config_groups"]
    groups["group_0"]["weights"]["symmetric"] = True
    edit_config(directory, "config_groups", groups)
    with pytest.raises(AccullmError) as error:
        open_artifact(directory)
    first = "model.layers.0.mlp.down_proj"
    assert error.value.line() == (
        f"{directory}/model-00001-of-00003.safetensors: tensor {first}.weight_zero_point is stored, and the scheme is "
        "symmetric"
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_bits", 5, "describes {first} otherwise than accullm.json; copy the artifact again"),
        ("group_size", 64, "describes {first} otherwise than accullm.json; copy the artifact again"),
    ],
)
def test_a_config_that_disagrees_with_the_manifest_is_refused(
    key: str, value: int, message: str, tmp_path: Path
) -> None:
    directory = export(tmp_path, make_parts(tiny_llama(), tmp_path / "run"))
    groups = read_config(directory)["config_groups"]
    groups["group_0"]["weights"][key] = value
    edit_config(directory, "config_groups", groups)
    with pytest.raises(AccullmError) as error:
        open_artifact(directory)
    first = "model.layers.0.self_attn.q_proj"
    assert error.value.line() == f"{directory}/config.json: {message.format(first=first)}"


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
            "{block}: tensor {p}.weight_packed has 80 inputs, which groups of 32 do not divide",
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
    assert objections(*(linear(str(bits), bits=bits) for bits in range(2, 9))) == []
    assert objections(linear("a", bits=1), linear("b", bits=9)) == [
        Objection(
            "compressed-tensors holds 2 to 8 bits, and a has 1 (and 1 more)",
            "use --bits 2 to 8",
        )
    ]


def test_other_kinds_of_layers() -> None:
    assert objections(linear("a"), kind="conv1d") == [
        Objection(
            "compressed-tensors holds torch.nn.Linear and stacked experts only, and a is a Conv1D layer",
            "export to the format accullm",
        )
    ]


def expert_objections(*rows: LinearPlan, named: bool = True) -> list[Objection]:
    plan = Plan({row.name: row for row in rows})
    stored_as = {row.name: (f"{row.name}.part",) for row in rows} if named else {}
    shape = ModelShape("gpt_oss", torch.float16, dict.fromkeys(plan.linears, "expert"), stored_as=stored_as)
    return objections_of("compressed-tensors", plan, shape)


def experts(**changes: object) -> tuple[LinearPlan, LinearPlan]:
    row = dataclasses.replace(linear("layers.0.mlp.experts.gate_up_proj.0"), symmetric=True)
    return row, dataclasses.replace(row, name="layers.1.mlp.experts.down_proj.0", **changes)


def test_experts_without_names_of_their_own() -> None:
    assert expert_objections(*experts()) == []
    assert expert_objections(*experts(), named=False) == [
        Objection(
            "compressed-tensors stores experts one by one, and transformers has no names of that kind for "
            "layers.0.mlp.experts.gate_up_proj of a gpt_oss model",
            "keep them (--keep '*.gate_up_proj.*'), or export to the format accullm",
        )
    ]


def test_experts_with_zero_points() -> None:
    assert expert_objections(*(dataclasses.replace(row, symmetric=False) for row in experts())) == [
        Objection(
            "compressed-tensors holds symmetric grids of experts only, and that of layers.0.mlp.experts.gate_up_proj.0 "
            "is not (and 1 more)",
            "use --symmetric",
        )
    ]


@pytest.mark.parametrize(
    ("changes", "what", "hint"),
    [
        (
            {"bits": 8},
            "readers of compressed-tensors take all experts of the model to be stored alike, and "
            "layers.0.mlp.experts.gate_up_proj.0 and its partners are stored in several ways",
            "give them one number of bits and one group size, or export to the format accullm",
        ),
        (
            {"bits": 16},
            "readers of compressed-tensors take all experts of the model to be stored alike, and of these "
            "layers.1.mlp.experts.down_proj.0 stays in 16 bits and another does not",
            "keep all of them (--keep '*.experts.*') or none, or export to the format accullm",
        ),
    ],
)
def test_experts_of_several_layers_need_one_scheme(changes: dict[str, object], what: str, hint: str) -> None:
    assert expert_objections(*experts(**changes)) == [Objection(what, hint)]


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


def config_of(plan: Plan, kinds: Mapping[str, str] | None = None, **shape: Any) -> dict[str, Any]:
    of_linears = dict.fromkeys(plan.linears, "linear")
    return quantization_config(plan, ModelShape("llama", torch.float16, of_linears | dict(kinds or {}), **shape))


def test_targets_of_two_schemes_are_disjoint_and_exact() -> None:
    plan = Plan({"a": linear("a"), "b": linear("b", bits=8), "c": linear("c"), "d": linear("d", bits=16)})
    config = config_of(plan, others=("lm_head", "mlp.gate", "vision.fc1"))
    assert [group["targets"] for group in config["config_groups"].values()] == [["a", "c"], ["b"]]
    assert config["ignore"] == ["lm_head", "mlp.gate", "vision.fc1", "d"]


def test_a_module_with_another_name_in_checkpoints_is_named_twice() -> None:
    named = {"a": ("x.a",), "d": ("x.d",), "lm_head": ("x.lm_head",)}
    plan = Plan({"a": linear("a"), "d": linear("d", bits=16)})
    config = config_of(plan, others=("lm_head",), stored_as=named)
    assert config["config_groups"]["group_0"]["targets"] == ["a", "x.a"]
    assert config["ignore"] == ["lm_head", "x.lm_head", "d", "x.d"]


def test_what_transformers_reads_in_one_way_alone_is_dequantized_while_loading() -> None:
    a, b = linear("a"), linear("b", bits=8)
    symmetric = dataclasses.replace(a, symmetric=True)
    expert = dataclasses.replace(b, name="e", symmetric=True)
    embedding = {"t": dataclasses.replace(symmetric, name="t")}
    assert config_of(Plan({"a": a}))["dequantize"] is True
    assert config_of(Plan({"a": a, "e": expert}), {"e": "expert"})["dequantize"] is True
    assert config_of(Plan({"a": symmetric}, embeddings=embedding), {"t": "tied"})["dequantize"] is True
    assert "dequantize" not in config_of(Plan({"a": symmetric}, embeddings=embedding), {"t": "head"})
    assert "dequantize" not in config_of(Plan({"a": symmetric}))
    assert "dequantize" not in config_of(Plan({"a": a, "b": b}))


def embedding_objections(bits: int, symmetric: bool) -> list[Objection]:
    plan = Plan({"p": linear()}, embeddings={"lm_head": LinearPlan("lm_head", 260, 64, bits, 32, symmetric)})
    return objections_of("compressed-tensors", plan, ModelShape("llama", torch.float16, {"p": "linear"}))


def test_embeddings_are_symmetric() -> None:
    assert not any(embedding_objections(bits, symmetric=True) for bits in range(2, 9))
    assert embedding_objections(8, symmetric=False) == [
        Objection(
            "compressed-tensors holds symmetric grids of embedding and head only, and that of lm_head is not",
            "use --symmetric",
        )
    ]
