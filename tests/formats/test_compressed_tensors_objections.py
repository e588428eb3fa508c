"""What compressed-tensors cannot hold: every objection by its whole message, and the plans that have none."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from accullm_cli.errors import AccullmError
from accullm_cli.formats import FORMATS
from accullm_cli.formats.base import ModelShape, Objection
from accullm_cli.formats.objections import nearest_group_sizes
from accullm_cli.formats.objections import objections as objections_of
from accullm_cli.quant.plan import LinearPlan, Plan
from tests.artifacts import empty, expert_objections, make_parts
from tests.formats.compressed import row_of
from tests.tiny import tiny_llama


def objections(
    *linears: LinearPlan, dtype: torch.dtype = torch.float16, kind: str = "linear", scale_dtype: str = "float16"
) -> list[Objection]:
    plan = Plan({linear.name: linear for linear in linears}, scale_dtype)
    return objections_of("compressed-tensors", plan, ModelShape("llama", dtype, dict.fromkeys(plan.linears, kind)))


def test_what_fits_has_no_objection() -> None:
    kept = LinearPlan("kept", 96, 577, 16, 128, False)
    assert objections(row_of("a"), row_of("b", group_size=-1, columns=577), row_of("c", bits=8), kept) == []


def test_a_group_size_that_does_not_divide() -> None:
    assert objections(row_of("a", columns=576, group_size=128), row_of("b", columns=576, group_size=128), row_of()) == [
        Objection(
            "compressed-tensors needs a group size that divides the 576 input features of a, and 128 does not "
            "(and 1 more)",
            "use --group-size 64, 96, 192 or -1, or export to the format accullm",
        )
    ]


def test_outliers() -> None:
    assert objections(row_of("a", outliers=(1, 2)), row_of("b")) == [
        Objection(
            "compressed-tensors holds outlier features in an adapter, and those of a are to be in its own files",
            "add --outlier-adapter, or use --outliers 0, or export to the format accullm",
        )
    ]


def test_other_bits() -> None:
    assert objections(*(row_of(str(bits), bits=bits) for bits in range(2, 9))) == []
    assert objections(row_of("a", bits=1), row_of("b", bits=9)) == [
        Objection(
            "compressed-tensors holds 2 to 8 bits, and a has 1 (and 1 more)",
            "use --bits 2 to 8",
        )
    ]


def test_other_kinds_of_layers() -> None:
    assert objections(row_of("a"), kind="conv1d") == [
        Objection(
            "compressed-tensors holds torch.nn.Linear and stacked experts only, and a is a Conv1D layer",
            "export to the format accullm",
        )
    ]


def experts(**changes: object) -> tuple[LinearPlan, LinearPlan]:
    row = dataclasses.replace(row_of("layers.0.mlp.experts.gate_up_proj.0"), symmetric=True)
    return row, dataclasses.replace(row, name="layers.1.mlp.experts.down_proj.0", **changes)


def test_experts_without_names_of_their_own() -> None:
    assert expert_objections("compressed-tensors", *experts()) == []
    assert expert_objections("compressed-tensors", *experts(), named=False) == [
        Objection(
            "compressed-tensors stores experts one by one, and transformers has no names of that kind for "
            "layers.0.mlp.experts.gate_up_proj of a gpt_oss model",
            "keep them (--keep '*.gate_up_proj.*'), or export to the format accullm",
        )
    ]


def test_experts_with_zero_points() -> None:
    assert expert_objections(
        "compressed-tensors", *(dataclasses.replace(row, symmetric=False) for row in experts())
    ) == [
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
    assert expert_objections("compressed-tensors", *experts(**changes)) == [Objection(what, hint)]


def test_float16_scales_for_a_bfloat16_model() -> None:
    assert objections(row_of(), dtype=torch.bfloat16) == [
        Objection(
            "compressed-tensors stores scales in the model's dtype bfloat16, and the plan has float16 ones",
            "ask for the format before profile runs, which then plans scales that both hold: "
            "--format compressed-tensors",
        )
    ]
    assert objections(row_of(), dtype=torch.bfloat16, scale_dtype="bfloat16") == []
    assert objections(row_of(), dtype=torch.float32) == []


def test_a_dtype_that_holds_no_scales() -> None:
    assert objections(row_of(), dtype=torch.float64) == [
        Objection(
            "compressed-tensors stores scales in the model's dtype, and float64 holds none",
            "convert the model to bfloat16 first, or export to the format accullm",
        )
    ]


def test_partners_that_a_runtime_fuses_need_one_scheme() -> None:
    rows = [row_of(f"layers.0.mlp.{name}", bits=bits) for name, bits in (("gate_proj", 4), ("up_proj", 8))]
    assert objections(*rows, row_of("layers.0.mlp.down_proj", bits=8)) == [
        Objection(
            "vLLM, which reads compressed-tensors, multiplies by gate_proj, up_proj at once, and "
            "layers.0.mlp.gate_proj and its partners are stored in several ways",
            "give them one number of bits and one group size, or export to the format accullm",
        )
    ]
    assert objections(dataclasses.replace(rows[0], bits=8), rows[1], row_of("layers.1.mlp.up_proj")) == []


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


def embedding_objections(bits: int, symmetric: bool) -> list[Objection]:
    plan = Plan({"p": row_of()}, embeddings={"lm_head": LinearPlan("lm_head", 260, 64, bits, 32, symmetric)})
    return objections_of("compressed-tensors", plan, ModelShape("llama", torch.float16, {"p": "linear"}))


def test_embeddings_are_symmetric() -> None:
    assert not any(embedding_objections(bits, symmetric=True) for bits in range(2, 9))
    assert embedding_objections(8, symmetric=False) == [
        Objection(
            "compressed-tensors holds symmetric grids of embedding and head only, and that of lm_head is not",
            "use --symmetric",
        )
    ]
