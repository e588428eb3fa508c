"""Multiplication by a quantized linear, against weights worked out code by code."""

from __future__ import annotations

import pytest
import torch

from accullm_cli.kernels.matmul import hybrid_matmul
from accullm_cli.quant.linear import QuantizedLinear


def small_linear() -> QuantizedLinear:
    """[2, 5] at 3 bits in groups of 2 (the last of 1), feature 3 an outlier; all values exact in every dtype."""
    return QuantizedLinear(
        codes=torch.tensor([[7, 0, 3, 2, 1], [4, 5, 0, 6, 7]], dtype=torch.uint8),
        scales=torch.tensor([[0.5, 0.25, 2.0], [1.0, 0.5, 0.125]], dtype=torch.float16),
        zeros=torch.tensor([[4, 2, 3], [1, 6, 7]], dtype=torch.uint8),
        outlier_index=torch.tensor([3], dtype=torch.int32),
        outlier_weight=torch.tensor([[10.0], [-20.0]]),
        bits=3,
        group_size=2,
    )


WEIGHT = [[1.5, -2.0, 0.25, 10.0, -4.0], [3.0, 4.0, -3.0, -20.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_feature_meets_its_own_weight(dtype: torch.dtype) -> None:
    rows = hybrid_matmul(torch.eye(5, dtype=dtype), small_linear())
    assert rows.dtype == dtype
    assert rows.T.tolist() == WEIGHT


def test_leading_dimensions_and_bias() -> None:
    x = torch.tensor([[[1.0, 2.0, 4.0, -1.0, 0.5]]])
    found = hybrid_matmul(x, small_linear(), torch.tensor([100.0, 200.0]))
    assert found.tolist() == [[[100 + 1.5 - 4 + 1 - 10 - 2, 200 + 3 + 8 - 12 + 20]]]
