"""QuantizedLinear against loops over single weights; what it stores, and what it refuses to read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accullm_cli.errors import EXIT_USAGE, AccullmError
from accullm_cli.quant import linear as linear_module
from accullm_cli.quant.linear import QuantizedLinear
from accullm_cli.quant.plan import LinearPlan


def random_linear(
    bits: int = 4,
    group_size: int = 4,
    symmetric: bool = False,
    outliers: tuple[int, ...] = (1, 9),
    dtype: torch.dtype = torch.bfloat16,
    rows: int = 3,
    columns: int = 10,
) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(bits)
    groups = 1 if group_size == -1 else -(-columns // group_size)

    def codes(width: int) -> torch.Tensor:
        return torch.randint(0, 2**bits, (rows, width), generator=generator, dtype=torch.uint8)

    return QuantizedLinear(
        codes=codes(columns),
        scales=torch.rand(rows, groups, generator=generator).half(),
        zeros=None if symmetric else codes(groups),
        outlier_index=torch.tensor(outliers, dtype=torch.int32),
        outlier_weight=torch.randn(rows, len(outliers), generator=generator).to(dtype),
        bits=bits,
        group_size=group_size,
    )


def weight_by_weight(linear: QuantizedLinear) -> torch.Tensor:
    """(code - zero) * scale in Python's floats, in which it is exact: float64 [N, K]."""
    rows, columns = linear.codes.shape
    size = columns if linear.group_size == -1 else linear.group_size
    weight = torch.zeros(rows, columns, dtype=torch.float64)
    outliers = linear.outlier_index.tolist()
    for row in range(rows):
        for column in range(columns):
            group = column // size
            zero = 2 ** (linear.bits - 1) if linear.zeros is None else int(linear.zeros[row, group])
            weight[row, column] = (int(linear.codes[row, column]) - zero) * float(linear.scales[row, group])
            if column in outliers:
                weight[row, column] = float(linear.outlier_weight[row, outliers.index(column)])
    return weight


LAYOUTS = [
    (bits, group_size, symmetric, outliers)
    for bits in range(2, 9)
    for group_size, symmetric, outliers in ((4, False, (1, 9)), (-1, True, ()), (3, True, (0,)), (-1, False, (2, 3, 4)))
]


@pytest.mark.parametrize(("bits", "group_size", "symmetric", "outliers"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dequantized_weights_are_rounded_once(bits, group_size, symmetric, outliers, dtype):
    linear = random_linear(bits, group_size, symmetric, outliers)
    found = linear.dequantize(dtype)
    assert found.dtype == dtype
    assert torch.equal(found, weight_by_weight(linear).to(dtype))


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize(("bits", "group_size", "symmetric", "outliers"), LAYOUTS[:4])
def test_rows_dequantized_in_parts_are_those_of_the_whole(
    rows, bits, group_size, symmetric, outliers, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(linear_module, "ELEMENTS_TOGETHER", 10 * rows)
    linear = random_linear(bits, group_size, symmetric, outliers, rows=7)
    assert torch.equal(linear.dequantize(torch.bfloat16), weight_by_weight(linear).to(torch.bfloat16))


def test_dequantizing_leaves_the_stored_tensors_alone():
    linear = random_linear(dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in linear.to_tensors().items()}
    linear.dequantize().zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in linear.to_tensors().items())


@pytest.mark.parametrize(("bits", "group_size", "symmetric", "outliers"), LAYOUTS)
def test_reading_gives_back_what_was_written(bits, group_size, symmetric, outliers):
    linear = random_linear(bits, group_size, symmetric, outliers)
    read = QuantizedLinear.from_tensors(linear.to_tensors(), 10, bits, group_size)
    assert torch.equal(read.codes, linear.codes)
    assert torch.equal(read.scales, linear.scales)
    assert (read.zeros is None) == symmetric
    if linear.zeros is not None and read.zeros is not None:
        assert torch.equal(read.zeros, linear.zeros)
    assert torch.equal(read.outlier_index, linear.outlier_index)
    assert torch.equal(read.outlier_weight, linear.outlier_weight.to(read.outlier_weight.dtype))
    assert (read.bits, read.group_size) == (bits, group_size)
    assert torch.equal(read.dequantize(), linear.dequantize())


@settings(deadline=None)
@given(st.integers(4, 8), st.integers(0, 2**31))
def test_scales_of_a_table_read_back_exactly(scale_bits: int, seed: int) -> None:
    """Tables with a value twice, too: either place is as good."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand(2**scale_bits, generator=generator).half().sort().values
    table[1] = table[0]
    linear = random_linear()
    scales = table[torch.randint(0, len(table), linear.scales.shape, generator=generator)]
    linear = replace(linear, scales=scales, scale_table=table)
    tensors = linear.to_tensors()
    assert tensors["qscales"].shape == (3, -(-3 * scale_bits // 8))
    assert "scales" not in tensors
    read = QuantizedLinear.from_tensors(tensors, 10, linear.bits, linear.group_size)
    assert (read.scale_bits, linear.scale_bits) == (scale_bits, scale_bits)
    assert torch.equal(read.scales, scales)
    assert torch.equal(read.dequantize(), linear.dequantize())


def test_tensors_have_the_formats_names_dtypes_and_shapes():
    def layout(linear: QuantizedLinear) -> dict[str, tuple[torch.dtype, list[int]]]:
        return {name: (tensor.dtype, list(tensor.shape)) for name, tensor in linear.to_tensors().items()}

    assert layout(random_linear(bits=3, dtype=torch.float16)) == {
        "qweight": (torch.uint8, [3, 4]),
        "scales": (torch.float16, [3, 3]),
        "qzeros": (torch.uint8, [3, 2]),
        "outlier_index": (torch.int32, [2]),
        "outlier_weight": (torch.float16, [3, 2]),
    }
    assert layout(random_linear(symmetric=True, outliers=())) == {
        "qweight": (torch.uint8, [3, 5]),
        "scales": (torch.float16, [3, 3]),
    }


@pytest.mark.parametrize(("bits", "group_size", "symmetric", "outliers"), LAYOUTS)
def test_the_plan_foretells_what_is_stored(bits, group_size, symmetric, outliers):
    linear = random_linear(bits, group_size, symmetric, outliers, rows=7, columns=13)
    plan = LinearPlan("a", 7, 13, bits, group_size, symmetric, outliers)
    stored = sum(len(tensor.contiguous().view(torch.uint8).flatten()) for tensor in linear.to_tensors().values())
    assert linear.stored_bytes == plan.stored_bytes == stored
    assert linear.bits_per_weight == 8 * stored / (7 * 13)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"qweight": None}, "tensor qweight is missing"),
        ({"scales": None}, "tensor scales is missing"),
        ({"qweight": (3, 6)}, "tensor qweight has shape [3, 6], expected [3, 5]"),
        ({"scales": (3, 2)}, "tensor scales has shape [3, 2], expected [3, 3]"),
        ({"scales": (2, 3)}, "tensor scales has shape [2, 3], expected [3, 3]"),
        ({"qzeros": (3, 1)}, "tensor qzeros has shape [3, 1], expected [3, 2]"),
        ({"outlier_weight": (3, 1)}, "tensor outlier_weight has shape [3, 1], expected [3, 2]"),
        ({"outlier_weight": None}, "tensor outlier_weight is missing"),
        ({"outlier_index": None}, "tensor outlier_weight has shape [3, 2], expected [3, 0]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, expected):
    tensors = random_linear().to_tensors()
    for name, shape in change.items():
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = torch.zeros(shape, dtype=tensors[name].dtype)
    with pytest.raises(AccullmError) as caught:
        QuantizedLinear.from_tensors(tensors, 10, 4, 4)
    assert caught.value.line() == expected
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize(
    ("outliers", "expected"),
    [
        ((3, 10), "tensor outlier_index names feature 10 of 10"),
        ((-1, 3), "tensor outlier_index names feature -1 of 10"),
        ((9, 1), "tensor outlier_index is not ascending"),
        ((3, 3), "tensor outlier_index is not ascending"),
    ],
)
def test_outlier_features_that_do_not_exist_or_ascend_are_refused(outliers: tuple[int, ...], expected: str) -> None:
    tensors = random_linear().to_tensors() | {"outlier_index": torch.tensor(outliers, dtype=torch.int32)}
    with pytest.raises(AccullmError) as caught:
        QuantizedLinear.from_tensors(tensors, 10, 4, 4)
    assert caught.value.line() == expected
