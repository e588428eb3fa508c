"""What the format mlx cannot hold, in words."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from accullm_cli.formats.base import ModelShape, Objection
from accullm_cli.formats.objections import objections as objections_of
from accullm_cli.quant.plan import LinearPlan, Plan
from tests.artifacts import expert_objections


def linear(name: str = "p", bits: int = 4, group_size: int = 64, **others: object) -> LinearPlan:
    row = LinearPlan(name, 96, 1536, bits, group_size, False, encoding="affine")
    return dataclasses.replace(row, **others)


def objections(*linears: LinearPlan, kind: str = "linear", dtype: torch.dtype = torch.float16) -> list[Objection]:
    plan = Plan({row.name: row for row in linears})
    return objections_of("mlx", plan, ModelShape("llama", dtype, dict.fromkeys(plan.linears, kind)))


def test_what_fits_has_no_objection() -> None:
    kept = LinearPlan("kept", 96, 577, 16, 128, False)
    rows = [linear(f"{bits}.{size}", bits, size) for bits in (2, 3, 4, 5, 6, 8) for size in (32, 64, 128)]
    assert objections(*rows, kept) == []


@pytest.mark.parametrize(
    ("row", "what", "hint"),
    [
        (
            linear(bits=7),
            "mlx holds 2, 3, 4, 5, 6 or 8 bits, and p has 7",
            "use --bits 2, 3, 4, 5, 6 or 8, or export to the format accullm",
        ),
        (
            linear(group_size=96),
            "mlx holds groups of 32, 64 or 128 input features, and p has 96",
            "use --group-size 32, 64 or 128, or export to the format accullm",
        ),
        (
            linear(group_size=-1),
            "mlx holds groups of 32, 64 or 128 input features, and p has -1",
            "use --group-size 32, 64 or 128, or export to the format accullm",
        ),
        (
            linear(group_size=128, in_features=576),
            "mlx needs a group size that divides the 576 input features of p, and 128 does not",
            "use --group-size 32 or 64, or export to the format accullm",
        ),
        (
            linear(outlier_index=(1, 2)),
            "mlx holds outlier features in an adapter, and those of p are to be in its own files",
            "add --outlier-adapter, or use --outliers 0, or export to the format accullm",
        ),
        (
            linear(encoding="integer"),
            "mlx does not store the encoding integer, which p is to have",
            "run profile again for this format",
        ),
        (
            linear(symmetric=True),
            "mlx holds asymmetric grids only, and that of p is not",
            "use --no-symmetric",
        ),
        (
            linear(scale_bits=6),
            "mlx stores scales of 16 bits, and those of p have 6",
            "leave out --scale-bits, or export to the format accullm",
        ),
    ],
)
def test_what_does_not_fit(row: LinearPlan, what: str, hint: str) -> None:
    assert objections(row) == [Objection(what, hint)]


@pytest.mark.parametrize("bits", [4, 16])
def test_other_kinds_of_layers_also_where_they_are_kept(bits: int) -> None:
    """mlx_lm would look for them under other names."""
    assert objections(linear(bits=bits), kind="conv1d") == [
        Objection(
            "mlx holds torch.nn.Linear and stacked experts only, and p is a Conv1D layer",
            "export to the format accullm",
        )
    ]


@pytest.mark.parametrize(
    ("other", "named", "what", "hint"),
    [
        (
            {"bits": 8},
            True,
            "readers of mlx take all experts of a parameter to be stored alike, and layers.0.mlp.experts.up.0 and its "
            "partners are stored in several ways",
            "give them one number of bits and one group size, or export to the format accullm",
        ),
        (
            {},
            False,
            "mlx stores experts one by one, and transformers has no names of that kind for layers.0.mlp.experts.up of "
            "a gpt_oss model",
            "export to the format accullm",
        ),
    ],
)
def test_experts_that_do_not_fit(other: dict[str, int], named: bool, what: str, hint: str) -> None:
    rows = linear("layers.0.mlp.experts.up.0"), linear("layers.0.mlp.experts.up.1", **other)
    assert expert_objections("mlx", rows[0], linear("layers.0.mlp.experts.up.1")) == []
    assert expert_objections("mlx", *rows, named=named) == [Objection(what, hint)]


def test_experts_that_are_to_be_kept() -> None:
    assert expert_objections("mlx", linear("layers.0.mlp.experts.up.0", bits=16)) == [
        Objection(
            "mlx stores experts as codes only, and layers.0.mlp.experts.up.0 is to stay in 16 bits",
            "keep none of them, or export to the format accullm",
        )
    ]


def test_float16_scales_for_a_bfloat16_model() -> None:
    assert objections(linear(), dtype=torch.bfloat16) == [
        Objection(
            "mlx stores scales in the model's dtype bfloat16, and the plan has float16 ones",
            "ask for the format before profile runs, which then plans scales that both hold: --format mlx",
        )
    ]
