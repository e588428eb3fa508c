"""Sizes of planned linears, added up by hand."""

from __future__ import annotations

import pytest

from accullm_cli.quant.plan import LinearPlan, Plan


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "outliers", "groups", "stored_bytes"),
    [
        # 10 rows, 576 columns; per row: codes + scales + zero points; then outlier weights and indices.
        (4, 128, False, (), 5, 10 * (288 + 10 + 3)),
        (4, 128, True, (), 5, 10 * (288 + 10)),
        (3, 64, False, (), 9, 10 * (216 + 18 + 4)),
        (8, -1, False, (), 1, 10 * (576 + 2 + 1)),
        (4, 128, True, (1, 2, 3), 5, 10 * (288 + 10) + 10 * 3 * 2 + 3 * 4),
        (16, 128, False, (), 5, 10 * 576 * 2),
    ],
)
def test_stored_bytes(bits, group_size, symmetric, outliers, groups, stored_bytes):
    plan = LinearPlan("a", 10, 576, bits, group_size, symmetric, outliers)
    assert plan.groups == groups
    assert plan.weights == 5760
    assert plan.stored_bytes == stored_bytes


def test_outliers_and_kept_linears_of_a_float32_source_take_four_bytes():
    quantized = LinearPlan("a", 10, 576, 4, 128, True, (1, 2, 3), source_itemsize=4)
    assert quantized.stored_bytes == 10 * (288 + 10) + 10 * 3 * 4 + 3 * 4
    # 9 scales of 6 bits take 7 bytes, and the table 64 float16.
    table = LinearPlan("a", 10, 576, 4, 64, False, scale_bits=6)
    assert table.stored_bytes == 10 * (288 + 7 + 5) + 2 * 64
    assert LinearPlan("a", 10, 576, 16, 128, True, source_itemsize=4).stored_bytes == 10 * 576 * 4


def test_bits_per_weight_are_averaged_over_weights_not_linears():
    small = LinearPlan("small", 1, 64, 8, -1, True)  # 64 + 2 bytes
    large = LinearPlan("large", 100, 128, 4, 128, True)  # 100 * (64 + 2) bytes
    assert Plan({"small": small, "large": large}).bits_per_weight == 8 * (66 + 6600) / (64 + 12800)


def test_quantized_embeddings_are_codes_but_no_part_of_the_bits_per_weight():
    quantized = LinearPlan("block.a", 10, 64, 4, -1, True)
    kept = LinearPlan("block.b", 10, 64, 16, -1, True)
    embedding = LinearPlan("embed", 1000, 64, 8, 32, False)
    plan = Plan({"block.a": quantized, "block.b": kept}, embeddings={"embed": embedding})
    assert plan.quantized == {"block.a": quantized, "embed": embedding}
    assert plan.bits_per_weight == Plan(plan.linears).bits_per_weight == 8 * (10 * 34 + 10 * 128) / 1280
