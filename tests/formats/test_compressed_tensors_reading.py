"""Reading compressed-tensors artifacts, ours and those of other tools, and what is refused of damaged ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from accullm_cli.errors import AccullmError
from accullm_cli.formats import FORMATS, open_artifact
from accullm_cli.model.skeleton import build_skeleton
from accullm_cli.model.structure import read_structure
from tests.artifacts import change_tensors, edit_config, make_parts
from tests.formats.compressed import UP_PROJ, export, read_config
from tests.tiny import tiny_llama, tiny_mixtral


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
    as_written = open_artifact(directory).bits_per_weight
    (directory / "accullm.json").unlink()
    opened = open_artifact(directory)
    assert opened.plan.quantized == made.parts.plan.quantized
    assert opened.bits_per_weight == as_written
    assert torch.equal(opened.linear(UP_PROJ).dequantize(), made.linears[UP_PROJ].dequantize())


def test_other_compressions_of_the_package_are_refused(tmp_path: Path) -> None:
    directory = export(tmp_path, make_parts(tiny_llama(), tmp_path / "run"))
    (directory / "accullm.json").unlink()
    edit_config(directory, format="float-quantized")
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
    edit_config(directory, config_groups=groups)
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
    edit_config(directory, config_groups=groups)
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
    change_tensors(directory, BLOCK, UP_PROJ, {suffix: tensor})
    if not manifest:
        (directory / "accullm.json").unlink()
    with pytest.raises(AccullmError) as error:
        open_artifact(directory)
    assert error.value.line() == message.format(dir=directory, block=directory / BLOCK, p=UP_PROJ)


def test_experts_of_mixtral_as_llm_compressor_names_them(tmp_path: Path) -> None:
    """They are read, though no other reader finds them."""
    model = tiny_mixtral(hidden=64, intermediate=32)
    made = make_parts(model, tmp_path / "run", 4, 32, symmetric=True)
    directory = export(tmp_path, made)
    (directory / "accullm.json").unlink()
    (directory / "model.safetensors.index.json").unlink()
    tensors = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in directory.glob("*.safetensors"):
        file.unlink()
    for number, word in {".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}.items():
        tensors = {name.replace(number, word): tensor for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors")
    opened = open_artifact(directory)
    assert {found.obstacle for found in opened.readings} == {
        "its experts have other names than in checkpoints of the model, under which readers do not find them"
    }
    skeleton = build_skeleton(directory)
    placed = opened.placed(skeleton, read_structure(skeleton))
    experts = [name for name in made.linears if ".experts." in name]
    assert len(experts) == 16
    for name in experts:
        assert torch.equal(placed.linear(name).dequantize(), made.linears[name].dequantize())


def test_a_plan_counts_what_is_stored_of_experts(tmp_path: Path) -> None:
    made = make_parts(tiny_mixtral(hidden=64, intermediate=32), tmp_path / "run", 4, 32, symmetric=True)
    opened, format = open_artifact(export(tmp_path, made)), FORMATS["compressed-tensors"]
    for name, row in made.parts.plan.linears.items():
        assert format.linear_bytes(row, made.parts.shape.dtype) == opened.linear_bytes(name), name
