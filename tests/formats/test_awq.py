"""AWQ's format: held against an unpacker that follows its description nibble by nibble."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from accullm_cli.errors import AccullmError
from accullm_cli.formats import FORMATS, open_artifact
from accullm_cli.formats.awq import decode, encode
from accullm_cli.formats.base import ModelShape, Objection
from accullm_cli.formats.objections import objections as objections_of
from accullm_cli.quant.linear import QuantizedLinear
from accullm_cli.quant.plan import LinearPlan, Plan
from tests.artifacts import (
    Made,
    assert_reads_back,
    change_tensors,
    edit_config,
    empty,
    make_parts,
    quantize_nearest,
    write,
)
from tests.tiny import tiny_llama, tiny_mixtral

UP_PROJ = "model.layers.1.mlp.up_proj"
BLOCK = "model-00002-of-00003.safetensors"


def by_outputs(words: np.ndarray) -> np.ndarray:
    """Codes [R, N] of words [R, N/8]: nibble i of word c is of output 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i]."""
    codes = np.zeros((len(words), 8 * words.shape[1]), dtype=np.int64)
    for nibble, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        codes[:, output::8] = (words.astype(np.int64) >> (4 * nibble)) & 15
    return codes


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from([32, 64, 128]), st.integers(0, 9))
def test_an_unpacker_by_the_description_finds_our_weights(rows: int, groups: int, group_size: int, seed: int) -> None:
    shape = (8 * rows, groups * group_size)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    linear = quantize_nearest(weight, 4, group_size, False)
    tensors, row = encode(linear), LinearPlan("p", *shape, 4, group_size, False)
    stored = {suffix: tensor.numpy() for suffix, tensor in tensors.items()}
    group = np.arange(shape[1]) // group_size
    zeros, scales = by_outputs(stored["qzeros"])[group], stored["scales"].astype(np.float64)[group]
    expected = (by_outputs(stored["qweight"]) - zeros) * scales
    np.testing.assert_array_equal(linear.dequantize().numpy(), expected.T.astype(np.float32))
    read = decode(tensors, row)
    assert torch.equal(read.codes, linear.codes)
    assert torch.equal(read.dequantize(), linear.dequantize())
    assert sum(tensor.nbytes for tensor in tensors.values()) == FORMATS["awq"].linear_bytes(row, torch.bfloat16)


def test_the_bytes_of_a_tiny_linear() -> None:
    codes = torch.arange(8, dtype=torch.uint8)[:, None].repeat(1, 32)
    zeros, scales = 8 + torch.arange(8, dtype=torch.uint8)[:, None], torch.ones(8, 1, dtype=torch.float16)
    empty_index, none = torch.zeros(0, dtype=torch.int32), torch.zeros(8, 0)
    tensors = encode(QuantizedLinear(codes, scales, zeros, empty_index, none, 4, 32))
    assert tensors["qweight"].numpy().tobytes().hex() == "20643175" * 32
    assert tensors["qweight"].shape == (32, 1)
    assert tensors["qzeros"].numpy().tobytes().hex() == "a8ecb9fd"


# -- whole artifacts -----------------------------------------------------------------------------------------


def made_of(tmp_path: Path, keep: tuple[str, ...] = ()) -> Made:
    return make_parts(tiny_llama(dtype=torch.bfloat16), tmp_path / "run", 4, 32, keep=keep)


def export(tmp_path: Path, made: Made) -> Path:
    return write("awq", tmp_path / "artifact", made)


@pytest.mark.parametrize("foreign", [False, True])
def test_an_artifact_reads_back(foreign: bool, tmp_path: Path) -> None:
    made = made_of(tmp_path, keep=("o_proj",))
    assert_reads_back("awq", export(tmp_path, made), made, foreign)


@pytest.mark.parametrize("kept", [False, True])
def test_config_has_one_scheme_and_what_is_kept(kept: bool, tmp_path: Path) -> None:
    made = made_of(tmp_path, keep=("1.self_attn.o_proj",) if kept else ())
    config = json.loads((export(tmp_path, made) / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "modules_to_not_convert": ["lm_head", "model.layers.1.self_attn.o_proj"] if kept else None,
    }
    assert config["rope_theta"] == 10000.0


def test_one_group_for_each_row_reads_as_such(tmp_path: Path) -> None:
    linear = quantize_nearest(torch.randn(16, 64, generator=torch.Generator().manual_seed(1)), 4, -1, False)
    directory = empty(tmp_path / "a")
    save_file(
        {f"layers.0.p.{suffix}": tensor for suffix, tensor in encode(linear).items()}, directory / "model.safetensors"
    )
    (directory / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    opened = open_artifact(directory)
    assert opened.plan.linears["layers.0.p"].group_size == -1
    assert torch.equal(opened.linear("layers.0.p").dequantize(), linear.dequantize())


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "manifest", "message"),
    [
        ({"scales": None}, True, "{dir}: tensor {p}.scales is missing; copy the artifact again"),
        ({"scales": None}, False, "{dir}: tensor {p}.scales is missing; copy the artifact again"),
        ({"qzeros": None}, False, "{dir}: tensor {p}.qzeros is missing; copy the artifact again"),
        ({"scales": torch.zeros(2, 96)}, False, "{block}: tensor {p}.scales is float32, expected float16"),
        ({"scales": torch.zeros(2).half()}, False, "{block}: tensor {p}.scales has shape [2]"),
        ({"scales": torch.zeros(3, 96).half()}, False, "{dir}: tensor {p}.scales has 3 groups for 64 inputs"),
        (
            {"qzeros": torch.zeros(2, 11, dtype=torch.int32)},
            False,
            "{block}: tensor {p}.qzeros has shape [2, 11], expected [2, 12]",
        ),
    ],
)
def test_damaged_tensors_are_refused(
    changes: dict[str, torch.Tensor | None], manifest: bool, message: str, tmp_path: Path
) -> None:
    directory = export(tmp_path, made_of(tmp_path))
    change_tensors(directory, BLOCK, UP_PROJ, changes)
    if not manifest:
        (directory / "accullm.json").unlink()
    with pytest.raises(AccullmError) as error:
        open_artifact(directory)
    assert error.value.line() == message.format(dir=directory, block=directory / BLOCK, p=UP_PROJ)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "gemv"}, "is AWQ in version gemv, of which only gemm is supported"),
        ({"version": None, "format": ["x"]}, "is AWQ in version ['x'], of which only gemm is supported"),
        ({"bits": 3}, "is AWQ with 3 bits, of which only 4 are supported"),
    ],
)
def test_other_schemes_of_the_family_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    directory = export(tmp_path, made_of(tmp_path))
    edit_config(directory, **changes)
    with pytest.raises(AccullmError) as error:
        open_artifact(directory)
    assert error.value.line() == f"{directory}/config.json: {message}"


# -- objections ----------------------------------------------------------------------------------------------


def linear(name: str = "p", bits: int = 4, group_size: int = 64, **others: object) -> LinearPlan:
    return dataclasses.replace(LinearPlan(name, 96, 1536, bits, group_size, False), **others)


def objections(*linears: LinearPlan) -> list[Objection]:
    plan = Plan({row.name: row for row in linears})
    return objections_of("awq", plan, ModelShape("llama", torch.bfloat16, dict.fromkeys(plan.linears, "linear")))


def test_what_fits_has_no_objection() -> None:
    kept = LinearPlan("kept", 95, 577, 16, 128, False)
    for size in (32, 64, 128):
        assert objections(linear("a", group_size=size), linear("b", group_size=size, out_features=8), kept) == []


@pytest.mark.parametrize(
    ("row", "what", "hint"),
    [
        (linear(bits=8), "awq holds 4 bits, and p has 8", "use --bits 4, or export to the format accullm"),
        (
            linear(group_size=-1),
            "awq holds groups of 32, 64 or 128 input features, and p has -1",
            "use --group-size 32, 64 or 128, or export to the format accullm",
        ),
        (
            linear(out_features=100),
            "awq holds linears whose input features are a multiple of 32 and whose output features one of 8, and p "
            "has 1536 and 100",
            "export to the format accullm",
        ),
        (linear(symmetric=True), "awq holds asymmetric grids only, and that of p is not", "use --no-symmetric"),
    ],
)
def test_what_does_not_fit(row: LinearPlan, what: str, hint: str) -> None:
    assert objections(row) == [Objection(what, hint)]


def test_shapes_that_do_not_fit_are_to_be_kept_with_their_partners() -> None:
    rows = [linear(f"layers.{layer}.{last}") for layer in range(2) for last in ("q_proj", "k_proj", "v_proj", "o_proj")]
    rows = [dataclasses.replace(row, out_features=100 if "k_proj" in row.name else 96) for row in rows]
    assert objections(*rows) == [
        Objection(
            "awq holds linears whose input features are a multiple of 32 and whose output features one of 8, and "
            "layers.0.k_proj has 1536 and 100 (and 1 more)",
            "keep them in 16 bits (--keep '*.q_proj' --keep '*.k_proj' --keep '*.v_proj'), or export to the format "
            "accullm",
        )
    ]


def test_two_schemes() -> None:
    assert objections(linear("a"), linear("b", group_size=32), linear("c", group_size=32)) == [
        Objection(
            "awq has one scheme for all linears, and a has 4 bits in groups of 64, b 4 in groups of 32",
            "give a width for --bits, and --group-size, or export to the format accullm",
        )
    ]


def test_writing_experts_is_refused(tmp_path: Path) -> None:
    made = make_parts(tiny_mixtral(), tmp_path / "run", group_size=8, keep=tuple("0123"))
    with pytest.raises(AccullmError, match=r"awq holds torch\.nn\.Linear only, and .* is an expert in a stacked"):
        FORMATS["awq"].write(empty(tmp_path / "artifact"), made.parts)
    assert list((tmp_path / "artifact").iterdir()) == []
