"""GGUF's encodings in rounding as a whole; what they refuse."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accullm_cli.errors import AccullmError
from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.encodings.base import MEASURED_BITS
from accullm_cli.quant.encodings.ggml import RELATIVE_DAMAGE, BlockLinear
from accullm_cli.quant.encodings.ggml_layout import BLOCK_TYPES, pack_blocks, unpack_blocks
from accullm_cli.quant.grid import minmax_grid
from accullm_cli.quant.plan import LinearPlan
from accullm_cli.quant.rounding import RoundingOptions, round_linears
from tests.quant.blocks import NAMES, draw, encoding, read_by_its_authors, row
from tests.quant.references import correlated_problem


def loss_of(weight: torch.Tensor, linear: BlockLinear, hessian: torch.Tensor) -> float:
    left = weight - linear.dequantize(torch.float64)
    return float(((left @ hessian) * left).sum())


@pytest.mark.parametrize("name", NAMES)
def test_feedback_and_fit_lose_less_than_the_nearest_values(name: str) -> None:
    problem = correlated_problem(8, 256, 700, seed=2)
    losses = {}
    for method, grid in (("nearest", "search"), ("feedback", "search"), ("feedback", "fit")):
        options = RoundingOptions(method=method, grid=grid, target="original")  # type: ignore[arg-type]
        found = round_linears({"a": problem.weight}, {"a": row(name, 8, 256)}, options, torch.float64, problem.hessian)
        linear = found["a"].linear
        assert isinstance(linear, BlockLinear)
        assert found["a"].records == ()
        assert np.array_equal(linear.dequantize().numpy(), read_by_its_authors(linear.blocks, name))
        losses[method, grid] = loss_of(problem.weight, linear, problem.hessian)
    assert losses["feedback", "search"] < 0.7 * losses["nearest", "search"]
    assert losses["feedback", "fit"] < losses["feedback", "search"]


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=6)
@given(st.integers(1, 9), st.integers(1, 2), st.sampled_from([(), (3, 40 % 32), (0, 1, 2)]), st.integers(0, 99))
def test_tensors_read_back_and_take_the_bytes_that_were_planned(
    name: str, rows: int, blocks: int, outliers: tuple[int, ...], seed: int
) -> None:
    columns = blocks * BLOCK_TYPES[name].block
    plan = row(name, rows, columns, tuple(sorted(outliers)))
    weight = draw(rows, columns, seed=seed).float()
    found = round_linears({"a": weight}, {"a": plan}, RoundingOptions(method="nearest"), torch.bfloat16)["a"].linear
    tensors = found.to_tensors()
    assert set(tensors) <= set(encoding(name).suffixes)
    assert sum(tensor.nbytes for tensor in tensors.values()) == plan.stored_bytes
    read = encoding(name).from_tensors(tensors, plan)
    assert torch.equal(read.dequantize(), found.dequantize())
    assert torch.equal(read.blocks, found.blocks)


@pytest.mark.parametrize("name", NAMES)
def test_outliers_keep_their_weights_and_their_codes_are_the_nearest(name: str) -> None:
    problem = correlated_problem(8, 256, 700, seed=4)
    plan = row(name, 8, 256, (3, 40))
    found = round_linears({"a": problem.weight}, {"a": plan}, RoundingOptions(), torch.float32, problem.hessian)
    linear = found["a"].linear
    assert isinstance(linear, BlockLinear)
    wanted = problem.weight[:, [3, 40]]
    assert torch.equal(linear.dequantize()[:, [3, 40]], wanted.float())
    plain = linear.without_outliers(torch.float64)
    assert np.array_equal(plain.numpy(), read_by_its_authors(linear.blocks, name))
    kind, parts = BLOCK_TYPES[name], unpack_blocks(linear.blocks, BLOCK_TYPES[name])
    for code in range(2**kind.bits):
        parts["codes"][:, [3, 40]] = code
        other = encoding(name).unpack_blocks(pack_blocks(parts, kind), plan).without_outliers(torch.float64)
        assert ((plain - problem.weight)[:, [3, 40]].abs() <= (other - problem.weight)[:, [3, 40]].abs() + 1e-6).all()


def test_rows_in_parts_are_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = draw(9, 256, seed=5).float()
    found = []
    for elements in (1 << 18, 700):
        monkeypatch.setattr("accullm_cli.quant.grid.CHUNK_ELEMENTS", elements)
        monkeypatch.setattr("accullm_cli.quant.encodings.ggml.ELEMENTS_TOGETHER", elements)
        options = RoundingOptions(method="nearest")
        linear = round_linears({"a": weight}, {"a": row("Q5_1", 9, 256)}, options, torch.float32)["a"].linear
        found.append((linear.blocks, linear.dequantize()))
    for whole, parts in zip(*found, strict=True):
        assert torch.equal(whole, parts)


# Of the blocks that rounding in float64 writes. Other bytes need another VERSION of quantize.
PINNED = {
    "Q4_0": "650a287a501aa3cd",
    "Q4_1": "1e4d4f8a01b5002d",
    "Q5_0": "b0c1c00448645cd3",
    "Q5_1": "177057c9c0708d70",
    "Q8_0": "31fc797b6b80ac3a",
    "Q3_K": "d8c4bbb538c6efeb",
    "Q4_K": "89e58a4c7d7f9197",
    "Q5_K": "617067fdf181eabe",
    "Q6_K": "7c9ed1bbe4e71266",
    "IQ4_NL": "b9766cfe3cfc5080",
    "IQ4_XS": "56844fe2eecedcc4",
}


@pytest.mark.parametrize("name", NAMES)
def test_rounding_writes_the_pinned_bytes(name: str) -> None:
    """No decision is near to a tie, so that a last bit, which another CPU may have otherwise, changes nothing."""
    state, numbers = 7, []
    for _ in range(2 * 256):
        state = (state * 1103515245 + 12345) % 2**31
        numbers.append(((state >> 8) % 65537 - 32768) / 65536)
    weight = torch.tensor(numbers, dtype=torch.float64).view(2, 256)
    neighbours = torch.full((255,), 0.3, dtype=torch.float64)
    hessian = (1.1 ** (torch.arange(256) % 7)).double().diag() + neighbours.diag(1) + neighbours.diag(-1)
    found = []
    for noise in (0.0, 1e-13):
        shaken = weight * (1 + noise * draw(2, 256))
        options = RoundingOptions(target="original")
        rounded = round_linears({"a": shaken}, {"a": row(name, 2, 256)}, options, torch.float32, hessian)["a"].linear
        assert isinstance(rounded, BlockLinear)
        found.append(hashlib.sha256(bytes(rounded.blocks.flatten().tolist())).hexdigest()[:16])
    assert found == [PINNED[name]] * 2


@pytest.mark.parametrize(
    ("tensors", "line"),
    [
        ({}, "tensor blocks is missing"),
        ({"blocks": torch.zeros(2, 35, dtype=torch.uint8)}, "tensor blocks has shape [2, 35], expected [2, 36]"),
        ({"blocks": torch.zeros(2, 36)}, "tensor blocks is of float32, expected uint8"),
        (
            {"blocks": torch.zeros(2, 36, dtype=torch.uint8), "outlier_index": torch.tensor([3])},
            "tensor outlier_weight is missing",
        ),
        (
            {
                "blocks": torch.zeros(2, 36, dtype=torch.uint8),
                "outlier_index": torch.tensor([64]),
                "outlier_weight": torch.zeros(2, 1),
            },
            "tensor outlier_index names feature 64 of 64",
        ),
    ],
)
def test_damaged_tensors_are_refused(tensors: dict[str, torch.Tensor], line: str) -> None:
    with pytest.raises(AccullmError) as error:
        encoding("Q4_0").from_tensors(tensors, row("Q4_0", 2, 64))
    assert error.value.line() == line


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("Q4_0", {}, ""),
        ("Q4_0", {"bits": 5}, "is to have 5 bits, and Q4_0 has 4"),
        ("Q4_0", {"group_size": 64}, "is to have group size 64, and Q4_0 has 32"),
        ("Q4_0", {"symmetric": False}, "is to have other scales or offsets than Q4_0 has"),
        ("Q4_1", {"symmetric": True}, "is to have other scales or offsets than Q4_1 has"),
        ("Q8_0", {"scale_bits": 6}, "is to have other scales or offsets than Q8_0 has"),
        ("Q4_K", {"in_features": 576}, "has 576 input features, which are no multiple of Q4_K's blocks of 256"),
        ("Q5_1", {"in_features": 80}, "has 80 input features, which are no multiple of Q5_1's blocks of 32"),
    ],
)
def test_what_cannot_be_stored_like_this(name: str, changes: dict[str, object], problem: str) -> None:
    assert encoding(name).problem(replace(row(name, 2, 256), **changes)) == problem  # type: ignore[arg-type]


def test_stochastic_rounding_is_refused() -> None:
    problem = correlated_problem(2, 64, 100, seed=1)
    options = RoundingOptions(method="stochastic")
    with pytest.raises(AccullmError) as error:
        round_linears({"a": problem.weight}, {"a": row("Q4_1", 2, 64)}, options, torch.float32, problem.hessian)
    assert error.value.line() == (
        "a: Q4_1 cannot be rounded at random: its grid need not hold the range of the weights; use another --rounding"
    )


@pytest.mark.parametrize("name", RELATIVE_DAMAGE)
def test_damage_relative_to_integer_codes_is_as_it_is_measured(name: str) -> None:
    kind = BLOCK_TYPES[name]
    weight = torch.randn(32, 512, generator=torch.Generator().manual_seed(3))
    row = LinearPlan("a", 32, 512, kind.bits, kind.group, not kind.has_offset, encoding=name)
    integers = minmax_grid(weight, MEASURED_BITS, 32, symmetric=False)
    expected = (weight - integers.values(integers.round_to_nearest(weight))).square().mean()
    grid, _ = ENCODINGS[name].grid(weight, row, "float16", torch.ones(512))
    change = weight - grid.values(grid.round_to_nearest(weight))
    assert float(change.square().mean() / expected) == pytest.approx(ENCODINGS[name].relative_damage(row), rel=0.05)
