"""What does not fit into GPTQ's format, and is said before any work."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from accullm_cli.errors import AccullmError
from accullm_cli.formats import FORMATS
from accullm_cli.formats.base import ModelShape, Objection
from accullm_cli.formats.objections import objections as objections_of
from accullm_cli.quant.plan import LinearPlan, Plan
from tests.artifacts import empty, make_parts
from tests.tiny import tiny_mixtral

ENCODING = "integer from 1"
WIDTHS = (2, 3, 4, 8)


def linear(name: str = "p", bits: int = 4, group_size: int = 64, **others: object) -> LinearPlan:
    return dataclasses.replace(LinearPlan(name, 96, 1536, bits, group_size, False, encoding=ENCODING), **others)


def objections(*linears: LinearPlan, kind: str = "linear") -> list[Objection]:
    plan = Plan({row.name: row for row in linears})
    return objections_of("gptq", plan, ModelShape("llama", torch.bfloat16, dict.fromkeys(plan.linears, kind)))


def test_what_fits_has_no_objection() -> None:
    kept = LinearPlan("kept", 95, 577, 16, 128, False)
    sizes = (32, 64, 128, -1)
    rows = [linear(f"{bits}.{size}", bits, size, symmetric=bits == 8) for bits in WIDTHS for size in sizes]
    assert objections(*rows, kept) == []


@pytest.mark.parametrize(
    ("row", "what", "hint"),
    [
        (
            linear(bits=5),
            "gptq holds 2, 3, 4 or 8 bits, and p has 5",
            "use --bits 2, 3, 4 or 8, or export to the format accullm",
        ),
        (
            linear(group_size=96),
            "gptq holds groups of 32, 64, 128 or -1 input features, and p has 96",
            "use --group-size 32, 64, 128 or -1, or export to the format accullm",
        ),
        (
            linear(out_features=100),
            "gptq holds linears whose input features are a multiple of 32 and whose output features one of 32, and p "
            "has 1536 and 100",
            "export to the format accullm",
        ),
        (
            linear(in_features=1528, group_size=-1),
            "gptq holds linears whose input features are a multiple of 32 and whose output features one of 32, and p "
            "has 1528 and 96",
            "export to the format accullm",
        ),
        (
            linear(outlier_index=(1, 2)),
            "gptq holds no outlier features, and p has 2",
            "use --outliers 0, or export to the format accullm",
        ),
        (
            linear(scale_bits=6),
            "gptq stores scales of 16 bits, and those of p have 6",
            "leave out --scale-bits, or export to the format accullm",
        ),
    ],
)
def test_what_does_not_fit(row: LinearPlan, what: str, hint: str) -> None:
    assert objections(row) == [Objection(what, hint)]


def test_shapes_that_do_not_fit_are_to_be_kept_with_their_partners() -> None:
    rows = [linear(f"layers.{layer}.{last}") for layer in range(2) for last in ("q_proj", "k_proj", "v_proj", "o_proj")]
    rows = [dataclasses.replace(row, out_features=100 if "k_proj" in row.name else 96) for row in rows]
    assert objections(*rows) == [
        Objection(
            "gptq holds linears whose input features are a multiple of 32 and whose output features one of 32, and "
            "layers.0.k_proj has 1536 and 100 (and 1 more)",
            "keep them in 16 bits (--keep '*.q_proj' --keep '*.k_proj' --keep '*.v_proj'), or export to the format "
            "accullm",
        )
    ]


def test_partners_that_vllm_fuses_need_one_scheme() -> None:
    rows = [linear("layers.0.mlp.gate_proj"), linear("layers.0.mlp.up_proj", bits=8)]
    assert objections(*rows) == [
        Objection(
            "vLLM, which reads gptq, multiplies by gate_proj, up_proj at once, and layers.0.mlp.gate_proj and its "
            "partners are stored in several ways",
            "give them one number of bits and one group size, or export to the format accullm",
        )
    ]


def test_quantized_embeddings_are_objected_to() -> None:
    plan = Plan({"p": linear()}, embeddings={"lm_head": dataclasses.replace(linear("lm_head"), bits=8)})
    assert objections_of("gptq", plan, ModelShape("llama", torch.float16, {"p": "linear"})) == [
        Objection(
            "gptq keeps embedding and output head as they are, and lm_head is to have 8 bits",
            "leave out --embedding-bits, or export to the format accullm",
        )
    ]


def test_writing_experts_is_refused(tmp_path: Path) -> None:
    made = make_parts(tiny_mixtral(), tmp_path / "run", group_size=8, encoding=ENCODING, keep=tuple("0123"))
    with pytest.raises(AccullmError, match=r"gptq holds torch\.nn\.Linear only, and .* is an expert in a stacked"):
        FORMATS["gptq"].write(empty(tmp_path / "artifact"), made.parts)
    assert list((tmp_path / "artifact").iterdir()) == []
