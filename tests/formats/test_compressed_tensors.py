"""compressed-tensors artifacts: read back bit for bit, and held against stock transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from accullm_cli.formats import open_artifact
from accullm_cli.formats.base import ModelShape
from accullm_cli.formats.compressed_tensors import quantization_config
from accullm_cli.formats.shards import TensorFiles
from accullm_cli.quant.plan import Plan
from tests.artifacts import Made, make_parts, quantize_nearest
from tests.formats.compressed import export, read_config, row_of
from tests.tiny import tiny_llama, tiny_mixtral, tokens

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


# -- what config.json says ------------------------------------------------------------------------------------


def config_of(plan: Plan, kinds: Mapping[str, str] | None = None, **shape: Any) -> dict[str, Any]:
    of_linears = dict.fromkeys(plan.linears, "linear")
    return quantization_config(plan, ModelShape("llama", torch.float16, of_linears | dict(kinds or {}), **shape))


def test_targets_of_two_schemes_are_disjoint_and_exact() -> None:
    plan = Plan({"a": row_of("a"), "b": row_of("b", bits=8), "c": row_of("c"), "d": row_of("d", bits=16)})
    config = config_of(plan, others=("lm_head", "mlp.gate", "vision.fc1"))
    assert [group["targets"] for group in config["config_groups"].values()] == [["a", "c"], ["b"]]
    assert config["ignore"] == ["lm_head", "mlp.gate", "vision.fc1", "d"]


def test_a_module_with_another_name_in_checkpoints_is_named_twice() -> None:
    named = {"a": ("x.a",), "d": ("x.d",), "lm_head": ("x.lm_head",)}
    plan = Plan({"a": row_of("a"), "d": row_of("d", bits=16)})
    config = config_of(plan, others=("lm_head",), stored_as=named)
    assert config["config_groups"]["group_0"]["targets"] == ["a", "x.a"]
    assert config["ignore"] == ["lm_head", "x.lm_head", "d", "x.d"]


def test_what_transformers_reads_in_one_way_alone_is_dequantized_while_loading() -> None:
    a, b = row_of("a"), row_of("b", bits=8)
    symmetric = dataclasses.replace(a, symmetric=True)
    expert = dataclasses.replace(b, name="e", symmetric=True)
    embedding = {"t": dataclasses.replace(symmetric, name="t")}
    assert config_of(Plan({"a": a}))["dequantize"] is True
    assert config_of(Plan({"a": a, "e": expert}), {"e": "expert"})["dequantize"] is True
    assert config_of(Plan({"a": symmetric}, embeddings=embedding), {"t": "tied"})["dequantize"] is True
    assert "dequantize" not in config_of(Plan({"a": symmetric}, embeddings=embedding), {"t": "head"})
    assert "dequantize" not in config_of(Plan({"a": symmetric}))
    assert "dequantize" not in config_of(Plan({"a": a, "b": b}))
