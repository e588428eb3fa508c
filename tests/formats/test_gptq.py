"""GPTQ's format: held against an unpacker that follows its description bit by bit."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from accullm_cli.commands.inspect import inspect
from accullm_cli.errors import AccullmError
from accullm_cli.formats import FORMATS, open_artifact
from accullm_cli.formats.gptq import ReorderedLinear, decode, encode, quantization_config
from accullm_cli.quant.linear import QuantizedLinear
from accullm_cli.quant.plan import LinearPlan
from tests.artifacts import (
    Made,
    assert_reads_back,
    change_tensors,
    edit_config,
    make_parts,
    quantize_nearest,
    write,
    write_quantization,
)
from tests.tiny import tiny_llama

UP_PROJ = "model.layers.1.mlp.up_proj"
BLOCK = "model-00002-of-00003.safetensors"
ENCODING = "integer from 1"
WIDTHS = (2, 3, 4, 8)


def quantize_from_one(weight: torch.Tensor, bits: int, group_size: int, symmetric: bool = False) -> QuantizedLinear:
    """Codes of a grid whose zero points are 1 or more."""
    linear = quantize_nearest(weight, bits, group_size, symmetric)
    zeros = linear.zeros
    return linear if zeros is None else dataclasses.replace(linear, zeros=zeros.clamp(min=1))


def linear_of(rows: int, columns: int, bits: int, group_size: int, symmetric: bool = False, seed: int = 2):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return quantize_from_one(weight, bits, group_size, symmetric)


def row_of(rows: int, columns: int, bits: int, group_size: int, symmetric: bool = False) -> LinearPlan:
    return LinearPlan("p", rows, columns, bits, group_size, symmetric, encoding=ENCODING)


def column_codes(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes [C, N] of words [W, N]: one string of bits down each column, the lowest of the first word at its start."""
    string = np.stack([(words.astype(np.int64) >> bit) & 1 for bit in range(32)], 1).reshape(-1, words.shape[1])
    return (string.reshape(-1, bits, words.shape[1]) << np.arange(bits)[:, None]).sum(1)


def dequantized(tensors: dict[str, torch.Tensor], bits: int, added: int = 1) -> np.ndarray:
    """The weight [N, K], in float64, as the format is described."""
    stored = {suffix: tensor.numpy() for suffix, tensor in tensors.items()}
    codes = column_codes(stored["qweight"], bits)
    zeros = column_codes(stored["qzeros"].T, bits).T + added
    group = stored["g_idx"]
    return ((codes - zeros[group]) * stored["scales"].astype(np.float64)[group]).T


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from(WIDTHS),
    st.sampled_from([32, 64, -1]),
    st.booleans(),
    st.sampled_from([("gptq", 1), ("gptq_v2", 0)]),
    st.integers(0, 9),
)
def test_an_unpacker_by_the_description_finds_our_weights(
    rows: int, groups: int, bits: int, group_size: int, symmetric: bool, version: tuple[str, int], seed: int
) -> None:
    name, less = version
    shape = (32 * rows, 32 * groups if group_size == -1 else groups * group_size)
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    weight[0] = weight[0].abs()  # whose zero points are 0
    linear = (quantize_from_one if less else quantize_nearest)(weight, bits, group_size, symmetric)
    assert symmetric or less or 0 in linear.zeros
    tensors, row = encode(linear, less), row_of(*shape, bits, group_size, symmetric)
    expected = linear.dequantize(torch.float64).numpy()
    np.testing.assert_array_equal(dequantized(tensors, bits, less).astype(np.float32), expected)
    read = decode(tensors, row, less, "here")
    assert isinstance(read, QuantizedLinear)
    assert torch.equal(read.codes, linear.codes)
    assert (read.zeros is None) == symmetric
    assert torch.equal(read.dequantize(), linear.dequantize())
    assert sum(tensor.nbytes for tensor in tensors.values()) == FORMATS[name].linear_bytes(row, torch.bfloat16)


def test_the_bytes_of_a_tiny_linear() -> None:
    """Codes 0 to 15 and again, 32 outputs alike; zero points 1 to 16, of which the last does not fit."""
    codes = (torch.arange(32, dtype=torch.uint8) % 16).repeat(32, 1)
    zeros = 1 + torch.arange(32, dtype=torch.uint8)[:, None] % 15
    scales = torch.full((32, 1), 0.5, dtype=torch.float16)
    empty_index, none = torch.zeros(0, dtype=torch.int32), torch.zeros(32, 0)
    tensors = encode(QuantizedLinear(codes, scales, zeros, empty_index, none, 4, -1))
    assert tensors["qweight"].shape == (4, 32)
    assert tensors["qweight"][:, 5].numpy().tobytes().hex() == "1032547698badcfe" * 2
    assert tensors["qzeros"].numpy().tobytes().hex() == "1032547698badc0e21436587a9cbed10"
    assert tensors["scales"].shape == (1, 32)
    assert tensors["g_idx"].tolist() == [0] * 32


def test_three_bits_go_across_words() -> None:
    """As AutoGPTQ packs them: number 10 has its lowest two bits in the first word, and its third in the second."""
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[:, 10] = 7
    linear = dataclasses.replace(linear_of(32, 32, 3, -1), codes=codes)
    words = encode(linear)["qweight"][:, 0].tolist()
    assert words == [-(2**30), 1, 0]


# -- whole artifacts -----------------------------------------------------------------------------------------


def made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixed: bool = False, symmetric: bool = False) -> Made:
    monkeypatch.setattr("tests.artifacts.quantize_nearest", lambda w, b, g, s, *_: quantize_from_one(w, b, g, s))
    model = tiny_llama(dtype=torch.bfloat16)
    others = {"o_proj": (8, 32), "down_proj": (3, -1)} if mixed else {}
    keep = ("gate_proj", "up_proj") if mixed else ()
    return make_parts(model, tmp_path / "run", 4, 32, symmetric, keep=keep, encoding=ENCODING, others=others)


def export(tmp_path: Path, made: Made) -> Path:
    return write("gptq", tmp_path / "artifact", made)


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize(("mixed", "symmetric"), [(False, False), (False, True), (True, False)])
def test_an_artifact_reads_back(
    mixed: bool, symmetric: bool, foreign: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made_of(tmp_path, monkeypatch, mixed, symmetric)
    assert_reads_back("gptq", export(tmp_path, made), made, foreign)


@pytest.mark.parametrize("foreign", [False, True])
def test_an_artifact_of_version_2_reads_back_with_zero_points_from_0(foreign: bool, tmp_path: Path) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data[0].abs_()
    made = make_parts(model, tmp_path / "run", 4, 32)
    assert all(0 in linear.zeros for linear in made.linears.values())
    directory = write("gptq_v2", tmp_path / "artifact", made)
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["checkpoint_format"]) == ("gptq", "gptq_v2")
    assert_reads_back("gptq_v2", directory, made, foreign)


def test_version_1_does_not_hold_a_zero_point_of_0(tmp_path: Path) -> None:
    made = make_parts(tiny_llama(), tmp_path / "run", 4, 32)
    with pytest.raises(AccullmError, match=r"gptq does not store the encoding integer, which .* is to have"):
        write("gptq", tmp_path / "artifact", made)


def test_config_has_one_scheme_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((export(tmp_path, made_of(tmp_path, monkeypatch)) / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": False,
        "desc_act": False,
        "static_groups": False,
        "true_sequential": True,
        "lm_head": False,
        "pack_dtype": "int32",
    }
    assert config["rope_theta"] == 10000.0


def test_config_names_what_differs_also_by_the_names_of_fused_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = made_of(tmp_path, monkeypatch, mixed=True).parts.plan
    config = quantization_config(plan, "gptq")
    assert (config["bits"], config["group_size"]) == (4, 32)

    def rule(name: str) -> tuple[str, dict[str, object]] | None:
        found = [(key, value) for key, value in config["dynamic"].items() if re.match(key[2:], name)]
        assert len({(key[:2], json.dumps(value)) for key, value in found}) <= 1
        return (found[0][0][:2], found[0][1]) if found else None

    assert rule("model.layers.1.self_attn.q_proj") is None
    assert rule("model.layers.1.self_attn.qkv_proj") is None
    assert rule("model.layers.1.self_attn.o_proj") == ("+:", {"bits": 8, "group_size": 32, "sym": False})
    assert rule("model.layers.0.mlp.down_proj") == ("+:", {"bits": 3, "group_size": -1, "sym": False})
    assert rule("model.layers.0.mlp.down_proj2") is None
    assert rule("model.layersX0.mlp.down_proj") is None
    for name in ("up_proj", "gate_proj", "gate_up_proj"):
        assert rule(f"model.layers.1.mlp.{name}") == ("-:", {})


# -- artifacts of other tools --------------------------------------------------------------------------------


def damaged(directory: Path, manifest: bool = False, **changes: torch.Tensor | None) -> None:
    """Change tensors of one linear, or drop them."""
    change_tensors(directory, BLOCK, UP_PROJ, changes)
    if not manifest:
        (directory / "accullm.json").unlink()


def test_zero_points_of_version_2_are_stored_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_of(tmp_path, monkeypatch)
    directory = export(tmp_path, made)
    (directory / "accullm.json").unlink()
    edit_config(directory, checkpoint_format="gptq_v2")
    opened = open_artifact(directory)
    assert opened.format == "gptq_v2"
    linear = made.linears[UP_PROJ]
    expected = dataclasses.replace(linear, zeros=linear.zeros - 1)
    assert torch.equal(opened.linear(UP_PROJ).dequantize(), expected.dequantize())
    assert opened.plan.linears[UP_PROJ].encoding == "integer"


def test_groups_of_features_that_are_no_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = export(tmp_path, made_of(tmp_path, monkeypatch))
    group = torch.tensor([0, 1] * 32, dtype=torch.int32)
    group[[0, 1]] = group[[1, 0]]
    damaged(directory, g_idx=group)
    found = open_artifact(directory).linear(UP_PROJ)
    assert isinstance(found, ReorderedLinear)
    tensors = load_file(directory / BLOCK)
    own = {suffix: tensors[f"{UP_PROJ}.{suffix}"] for suffix in ("qweight", "qzeros", "scales", "g_idx")}
    np.testing.assert_array_equal(found.dequantize().numpy(), dequantized(own, 4).astype(np.float32))


@pytest.mark.parametrize(
    ("packing", "format", "added"),
    [
        ("auto_round:auto_gptq", "gptq", 0),
        ("auto_round", "gptq_v2", -1),
        ("auto_round:gptqmodel", "gptq_v2", -1),
    ],
)
@pytest.mark.parametrize("method", ["auto-round", "intel/auto-round"])
def test_what_auto_round_calls_by_a_name_of_its_own(
    method: str, packing: str, format: str, added: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves out which group a feature is of, and the width of one linear is that of its zero points."""
    made = made_of(tmp_path, monkeypatch, mixed=True)
    directory = export(tmp_path, made)
    (directory / "accullm.json").unlink()
    (directory / "model.safetensors.index.json").unlink()
    tensors = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in directory.glob("*.safetensors"):
        file.unlink()
    own = {name: tensor for name, tensor in tensors.items() if not name.endswith(".g_idx")}
    save_file(own, directory / "model.safetensors")
    write_quantization(directory, quant_method=method, packing_format=packing, data_type="int", bits=4, group_size=32)
    opened = open_artifact(directory)
    assert opened.format == format
    for name, linear in made.linears.items():
        expected = dataclasses.replace(linear, zeros=linear.zeros + added)
        assert torch.equal(opened.linear(name).dequantize(), expected.dequantize())
    assert {name: row.bits for name, row in opened.plan.quantized.items()} == {
        name: linear.bits for name, linear in made.linears.items()
    }


def test_what_auto_round_stores_otherwise_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = export(tmp_path, made_of(tmp_path, monkeypatch))
    (directory / "accullm.json").unlink()
    write_quantization(directory, quant_method="auto-round", packing_format="auto_round:fp8", data_type="fp")
    for look in (open_artifact, inspect):
        with pytest.raises(AccullmError) as error:
            look(directory)
        assert error.value.line() == (
            f"{directory}: the weights are quantized (quant_method auto-round, auto_round:fp8) in none of the formats "
            f"that are read ({', '.join(FORMATS)}); give an artifact of one of these, or the original checkpoint"
        )


@pytest.mark.parametrize("indexed", [True, False])
def test_a_last_group_of_fewer_features(indexed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups of 40 and 24 features, which two of 32 would be taken for by their number alone."""
    directory = export(tmp_path, made_of(tmp_path, monkeypatch))
    group = (torch.arange(64) // 40).to(torch.int32)
    damaged(directory, g_idx=group if indexed else None)
    edit_config(directory, group_size=40)
    tensors = load_file(directory / BLOCK)
    own = {suffix: tensors[f"{UP_PROJ}.{suffix}"] for suffix in ("qweight", "qzeros", "scales")}
    found = open_artifact(directory).linear(UP_PROJ).dequantize()
    np.testing.assert_array_equal(found.numpy(), dequantized(own | {"g_idx": group}, 4).astype(np.float32))


def test_linears_that_another_tool_left_alone_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_of(tmp_path, monkeypatch, mixed=True)
    directory = export(tmp_path, made)
    expected = open_artifact(directory)
    (directory / "accullm.json").unlink()
    found = open_artifact(directory)
    assert found.bits_per_weight == expected.bits_per_weight
    assert {name: row.bits for name, row in found.plan.linears.items()} == {
        name: row.bits for name, row in expected.plan.linears.items()
    }


def test_a_zero_point_that_readers_disagree_about_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = export(tmp_path, made_of(tmp_path, monkeypatch))
    qzeros = load_file(directory / BLOCK)[f"{UP_PROJ}.qzeros"]
    qzeros[0, 0] |= 15
    damaged(directory, qzeros=qzeros)
    assert list(open_artifact(directory).problems()) == [
        f"{UP_PROJ}: qzeros holds 15, which some readers take for 0 and others for 16"
    ]


@pytest.mark.parametrize(
    ("changes", "manifest", "message"),
    [
        ({"scales": None}, True, "{dir}: tensor {p}.scales is missing; copy the artifact again"),
        ({"g_idx": None}, True, "{dir}: tensor {p}.g_idx is missing; copy the artifact again"),
        ({"scales": torch.zeros(2, 96)}, False, "{block}: tensor {p}.scales is float32, expected float16"),
        ({"scales": torch.zeros(2).half()}, False, "{block}: tensor {p}.scales has shape [2]"),
        ({"scales": torch.zeros(3, 96).half()}, False, "{dir}: tensor {p}.scales has 3 groups for 64 inputs"),
        ({"scales": torch.zeros(0, 96).half()}, False, "{dir}: tensor {p}.scales has 0 groups for 64 inputs"),
        (
            {"g_idx": torch.zeros(48, dtype=torch.int32)},
            False,
            "{dir}: tensor {p}.qweight has 8 words for 48 inputs",
        ),
        (
            {"qzeros": torch.zeros(2, 11, dtype=torch.int32)},
            False,
            "{block}: tensor {p}.qzeros has shape [2, 11], expected [2, 12]",
        ),
    ],
)
def test_damaged_tensors_are_refused(
    changes: dict[str, torch.Tensor | None],
    manifest: bool,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = export(tmp_path, made_of(tmp_path, monkeypatch))
    damaged(directory, manifest, **changes)
    with pytest.raises(AccullmError) as error:
        open_artifact(directory)
    assert error.value.line() == message.format(dir=directory, block=directory / BLOCK, p=UP_PROJ)


@pytest.mark.parametrize("group", [torch.zeros(64), torch.arange(64) // 16, torch.arange(64) // 32 + 5])
def test_groups_of_several_sizes_are_refused(
    group: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = export(tmp_path, made_of(tmp_path, monkeypatch))
    damaged(directory, g_idx=group.to(torch.int32))
    with pytest.raises(AccullmError) as error:
        open_artifact(directory).linear(UP_PROJ)
    assert error.value.line() == (
        f"{directory}: tensor {UP_PROJ}.g_idx does not put 32 input features into each of 2 groups; "
        "copy the artifact again"
    )


def test_other_formats_of_the_family_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = export(tmp_path, made_of(tmp_path, monkeypatch))
    edit_config(directory, checkpoint_format="marlin")
    with pytest.raises(AccullmError) as error:
        open_artifact(directory)
    assert error.value.line() == (
        f"{directory}/config.json: is GPTQ in format marlin, of which only gptq and gptq_v2 are supported"
    )
