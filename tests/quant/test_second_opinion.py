"""Nearest rounding against another library's: compressed-tensors, given the same scales and zero points."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

from accullm_cli.quant.rounding import RoundingOptions, round_linears
from tests.quant.references import correlated_problem, plan_of


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("grid", ["search", "minmax"])
def test_codes_and_weights_equal_those_of_compressed_tensors(bits, symmetric, group_size, grid):
    problem = correlated_problem(32, 128, 200, seed=bits)
    weight = problem.weight.float()
    linear = round_linears(
        {"a": weight},
        {"a": plan_of(problem, bits, group_size, symmetric)},
        RoundingOptions("nearest", grid=grid),
        torch.bfloat16,
        problem.hessian.float(),
    )["a"].linear
    strategy = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    layout = QuantizationArgs(num_bits=bits, symmetric=symmetric, type="int", **strategy)
    middle = 2 ** (bits - 1)  # their codes are signed
    zeros = torch.zeros_like(linear.scales) if linear.zeros is None else linear.zeros.float() - middle
    scales = linear.scales.float()
    codes = quantize(weight, scales, zeros.to(torch.int8), layout, dtype=torch.int8)
    assert (codes.int() + middle).tolist() == linear.codes.int().tolist()
    theirs = dequantize(codes, scales, zeros.to(torch.int8), layout, dtype=torch.float32)
    assert theirs.tolist() == linear.dequantize().tolist()
