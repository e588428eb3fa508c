"""Packing, unpacking and dequantizing by cuda/repack.cu, on the CPU: exact."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accullm_cli.kernels.launch import Device
from accullm_cli.kernels.layout import tile
from accullm_cli.kernels.repack import dequantize_launch, pack_launch, unpack_launch
from tests.cuda_emulation import FORWARDS, SHUFFLED, guarded, needs_compiler, poisoned, run
from tests.kernels.linears import Shape, exact_weight, random_linear
from tests.kernels.test_launch import guarded_linear, shapes


@needs_compiler
@settings(deadline=None, max_examples=40)
@given(st.integers(1, 70), st.integers(1, 300), st.integers(0, 999))
def test_packing_and_its_inverse_equal_the_python_reference(rows: int, columns: int, seed: int) -> None:
    linear = random_linear(Shape(rows, columns, -1), torch.float16, seed)
    wanted = tile(linear, torch.float16).tiles
    codes, tiles = guarded(linear.codes), poisoned(*wanted.shape, dtype=torch.uint8)
    run(pack_launch(codes, tiles), [codes, tiles], SHUFFLED)
    assert torch.equal(tiles, wanted)
    back = poisoned(rows, columns, dtype=torch.uint8)
    run(unpack_launch(tiles, back), [tiles, back], SHUFFLED)
    assert torch.equal(back, linear.codes)


@needs_compiler
@settings(deadline=None, max_examples=60)
@given(
    shapes(70, 700),
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.sampled_from([1, 4, 40]),
    st.sampled_from([FORWARDS, SHUFFLED]),
    st.integers(0, 999),
)
def test_dequantizing_gives_the_weight_of_the_format(
    shape: Shape, dtype: torch.dtype, multiprocessors: int, order: int, seed: int
) -> None:
    linear = random_linear(shape, dtype, seed)
    tiled = guarded_linear(tile(linear, dtype))
    weight = poisoned(shape.out_features, shape.in_features, dtype=dtype)
    launch = dequantize_launch(tiled, weight, Device(multiprocessors, 0))
    run(launch, [*(part for part in vars(tiled).values() if isinstance(part, torch.Tensor)), weight], order)
    assert torch.equal(weight.double(), exact_weight(linear, dtype))
