"""The products of cuda/hybrid_gemv.cu and cuda/hybrid_gemm.cu, on the CPU, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from accullm_cli.errors import AccullmError
from accullm_cli.kernels.launch import Device, ProductPlan, dequantize_launch, plan_product, product_launch
from accullm_cli.kernels.layout import TiledLinear, tile
from accullm_cli.kernels.matmul import aligned_rows
from tests.cuda_emulation import BACKWARDS, FORWARDS, SHUFFLED, guarded, needs_compiler, poisoned, run
from tests.kernels.linears import ENCODED, Shape, chain, exact_weight, random_linear

LARGE = 227 * 1024  # shared memory of a block on compute capability 9.0
MEDIUM = 99 * 1024  # on 8.6, 8.9 and 12.0
SMALL = 64 * 1024  # on 7.5
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # half the distance of two numbers around 1

dtypes = st.sampled_from([torch.float16, torch.bfloat16])
orders = st.sampled_from([FORWARDS, BACKWARDS, SHUFFLED])
devices = st.builds(Device, multiprocessors=st.sampled_from([1, 4, 40]), shared_bytes=st.sampled_from([SMALL, LARGE]))


def shapes(rows: int, columns: int) -> st.SearchStrategy[Shape]:
    return st.builds(
        Shape,
        out_features=st.integers(1, rows),
        in_features=st.integers(40, columns),
        group_size=st.sampled_from([16, 32, 64, 128, -1]),
        symmetric=st.booleans(),
        outliers=st.sampled_from([0, 1, 5, 16, 17, 40]),
        bits=st.sampled_from([2, 4, 4]),
        encoding=st.sampled_from(ENCODED),
    )


def guarded_linear(tiled: TiledLinear) -> TiledLinear:
    return TiledLinear(**{k: guarded(v) if isinstance(v, torch.Tensor) else v for k, v in vars(tiled).items()})


def emulated(
    x: torch.Tensor, tiled: TiledLinear, bias: torch.Tensor | None, device: Device, order: int
) -> tuple[torch.Tensor, ProductPlan]:
    """x W^T + bias by a kernel, from buffers with guards into a poisoned result."""
    tiled = guarded_linear(tiled)
    rows = aligned_rows(x)
    whole = guarded(torch.as_strided(rows, (len(rows), rows.stride(0)), rows.stride()))
    own_bias = None if bias is None else guarded(bias)
    plan = plan_product(tiled, len(x), device)
    y = poisoned(len(x), tiled.out_features, dtype=x.dtype)
    partial = poisoned(*plan.partial_shape(len(x), len(tiled.tiles)), dtype=torch.float32)
    arrived = guarded(torch.zeros(len(tiled.tiles), dtype=torch.int32))
    launch = product_launch(plan, whole, tiled, own_bias, y, partial, arrived)
    parts = [value for value in vars(tiled).values() if isinstance(value, torch.Tensor)]
    run(launch, [*parts, whole, own_bias, y, partial, arrived], order)
    return y.clone(), plan


def check_exact(shape: Shape, tokens: int, dtype: torch.dtype, device: Device, order: int, seed: int) -> ProductPlan:
    """With sums that have no rounding, the only one left is that of y: results are equal bit for bit."""
    linear = random_linear(shape, dtype, seed, exact=True)
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (tokens, shape.in_features), generator=draw).to(dtype)
    bias = torch.randint(-9, 10, (shape.out_features,), generator=draw).to(dtype) if seed % 2 else None
    found, plan = emulated(x, tile(linear, dtype), bias, device, order)
    wanted = x.double() @ exact_weight(linear, dtype).T
    if bias is not None:
        wanted += bias.double()
    assert torch.equal(found, wanted.to(dtype)), (found.double() - wanted).abs().max()
    return plan


def check_rounded(shape: Shape, tokens: int, dtype: torch.dtype, device: Device, order: int, seed: int) -> None:
    """Each result is within one rounding to `dtype` of float64, and that of the float32 sums."""
    linear = random_linear(shape, dtype, seed)
    x = torch.randn(tokens, shape.in_features, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight = exact_weight(linear, dtype)
    found, _ = emulated(x, tile(linear, dtype), None, device, order)
    wanted = x.double() @ weight.T
    # One rounding of a float32 sum per step of 16 features, per warp and per part of K.
    additions = shape.in_features / 16 + 64
    allowed = UNIT[dtype] * wanted.abs() * 1.001 + additions * 2.0**-24 * (x.double().abs() @ weight.abs().T)
    smallest = 2.0**-25 if dtype == torch.float16 else 0.0  # half the distance of subnormal numbers
    beyond = (found.double() - wanted).abs() - allowed - smallest
    assert bool((beyond <= 0).all()), float(beyond.max())


few = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
fewer = settings(few, max_examples=20)


@needs_compiler
@few
@given(shapes(70, 700), st.integers(1, 16), dtypes, devices, orders, st.integers(0, 999))
@example(Shape(40, 520, 128, False, 16), 1, torch.float16, Device(4, LARGE), BACKWARDS, 0)
@example(Shape(40, 520, 128, False, 16), 9, torch.float16, Device(4, LARGE), FORWARDS, 1)
@example(Shape(300, 129, 64, outliers=3, encoding="trellis"), 1, torch.float16, Device(4, LARGE), SHUFFLED, 2)
@example(Shape(300, 129, 64, outliers=3, encoding="trellis"), 9, torch.bfloat16, Device(4, SMALL), BACKWARDS, 3)
@example(Shape(1, 40, 16, encoding="trellis"), 2, torch.float16, Device(4, LARGE), SHUFFLED, 4)
@example(Shape(2, 40, -1, encoding="trellis"), 2, torch.bfloat16, Device(4, LARGE), BACKWARDS, 5)
def test_few_tokens_exactly(
    shape: Shape, tokens: int, dtype: torch.dtype, device: Device, order: int, seed: int
) -> None:
    check_exact(shape, tokens, dtype, device, order, seed)


@needs_compiler
@few
@given(shapes(70, 700), st.integers(1, 16), dtypes, devices, orders, st.integers(0, 999))
def test_few_tokens_within_rounding(
    shape: Shape, tokens: int, dtype: torch.dtype, device: Device, order: int, seed: int
) -> None:
    check_rounded(shape, tokens, dtype, device, order, seed)


@needs_compiler
@fewer
@given(shapes(300, 400), st.integers(17, 150), dtypes, devices, orders, st.integers(0, 999))
@example(Shape(130, 400, 64, False, 100), 33, torch.bfloat16, Device(4, LARGE), BACKWARDS, 0)
@example(Shape(16, 330, 32, False, 170), 129, torch.float16, Device(4, LARGE), BACKWARDS, 1)
@example(Shape(300, 129, 64, outliers=3, encoding="trellis"), 33, torch.float16, Device(4, LARGE), SHUFFLED, 2)
@example(Shape(530, 70, 32, outliers=3, encoding="trellis"), 129, torch.bfloat16, Device(4, LARGE), BACKWARDS, 3)
@example(Shape(1, 40, 16, encoding="trellis"), 17, torch.float16, Device(4, LARGE), BACKWARDS, 4)
def test_many_tokens_exactly(
    shape: Shape, tokens: int, dtype: torch.dtype, device: Device, order: int, seed: int
) -> None:
    check_exact(shape, tokens, dtype, device, order, seed)


@needs_compiler
@fewer
@given(shapes(300, 400), st.integers(17, 150), dtypes, devices, orders, st.integers(0, 999))
def test_many_tokens_within_rounding(
    shape: Shape, tokens: int, dtype: torch.dtype, device: Device, order: int, seed: int
) -> None:
    check_rounded(shape, tokens, dtype, device, order, seed)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 16, 17, 64])
def test_parts_of_k_are_summed_in_their_order_whoever_comes_last(tokens: int, dtype: torch.dtype) -> None:
    shape = Shape(24, 6200, 128, False, 20)
    linear = random_linear(shape, dtype, seed=5)
    x = torch.randn(tokens, shape.in_features, generator=torch.Generator().manual_seed(5)).to(dtype)
    results = []
    for order in (FORWARDS, BACKWARDS, SHUFFLED, SHUFFLED + 1):
        found, plan = emulated(x, tile(linear, dtype), None, Device(40, LARGE), order)
        assert plan.grid[2] > 2
        results.append(found)
    assert all(torch.equal(results[0], other) for other in results[1:])


@needs_compiler
@pytest.mark.parametrize("encoding", ENCODED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_code_zero_point_and_scale_becomes_the_weight_of_the_format(dtype: torch.dtype, encoding: str) -> None:
    """16 codes under 16 zero points, or as levels, with scales of every kind of mantissa; one-hot activations."""
    scales = torch.tensor([1.0, 1.0 + 2.0**-10, 2.0 - 2.0**-10, 2.0**-24, 1023 * 2.0**-24, 6.1e-5, 0.0371, 4000.0])
    shape = Shape(128, 256, 16, encoding=encoding)
    linear = random_linear(shape, dtype, seed=0)
    codes = torch.arange(16, dtype=torch.uint8).repeat(128, 16)
    linear.codes.copy_(codes)
    if encoding == "trellis":  # after every pair of codes, in some column or other
        linear.codes.copy_(chain(codes + torch.arange(128, dtype=torch.uint8)[:, None] * torch.arange(256) // 16 & 15))
    linear.scales.copy_(scales.repeat_interleave(16)[:, None])
    if linear.zeros is None:
        linear.scales[::2] *= -1
        linear.scales[-16:] /= 8  # so that 127 times the largest is a float16 number
    else:
        linear.zeros.copy_(torch.arange(16))
    found = torch.cat(
        [
            emulated(part.contiguous(), tile(linear, dtype), None, Device(1, LARGE), FORWARDS)[0]
            for part in torch.eye(256, dtype=dtype).split(16)
        ]
    )
    assert torch.equal(found.double().T, exact_weight(linear, dtype))


# -- dequantizing ------------------------------------------------------------------------------------------


@needs_compiler
@settings(deadline=None, max_examples=60)
@given(
    shapes(70, 700),
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.sampled_from([1, 4, 40]),
    st.sampled_from([FORWARDS, SHUFFLED]),
    st.integers(0, 999),
)
@example(Shape(530, 129, 64, outliers=3, encoding="trellis"), torch.float16, 4, FORWARDS, 2)
def test_dequantizing_gives_the_weight_of_the_format(
    shape: Shape, dtype: torch.dtype, multiprocessors: int, order: int, seed: int
) -> None:
    linear = random_linear(shape, dtype, seed)
    tiled = guarded_linear(tile(linear, dtype))
    weight = poisoned(shape.out_features, shape.in_features, dtype=dtype)
    launch = dequantize_launch(tiled, weight, Device(multiprocessors, 0))
    run(launch, [*(part for part in vars(tiled).values() if isinstance(part, torch.Tensor)), weight], order)
    assert torch.equal(weight.double(), exact_weight(linear, dtype))


# -- plans -------------------------------------------------------------------------------------------------


def planned(rows: int, columns: int, tokens: int, device: Device, outliers: int = 0) -> ProductPlan:
    linear = random_linear(Shape(rows, columns, 128, False, outliers), torch.float16, seed=0)
    return plan_product(tile(linear, torch.float16), tokens, device)


@pytest.mark.parametrize(
    ("tokens", "kernel"),
    [(1, "hybrid_gemv_8"), (8, "hybrid_gemv_8"), (9, "hybrid_gemv_16"), (16, "hybrid_gemv_16"), (17, "hybrid_gemm_32"),
     (33, "hybrid_gemm_64"), (65, "hybrid_gemm_128"), (129, "hybrid_gemm_128")],
)  # fmt: skip
def test_the_kernel_follows_the_number_of_tokens(tokens: int, kernel: str) -> None:
    assert planned(64, 256, tokens, Device(4, LARGE)).kernel == kernel


@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 128, 500])
@pytest.mark.parametrize("shared", [SMALL, MEDIUM, LARGE])
def test_no_block_asks_for_more_shared_memory_than_there_is(tokens: int, shared: int) -> None:
    plan = planned(64, 4096, tokens, Device(100, shared), outliers=123)  # 3%
    assert 0 < plan.shared_bytes <= shared


def test_a_small_grid_is_filled_by_warps_and_parts_of_k() -> None:
    plan = planned(256, 4096, 1, Device(132, LARGE))
    assert (plan.threads, plan.grid) == (512, (16, 1, 2))
    assert planned(4096, 256, 1, Device(1, LARGE)).threads == 128


def test_no_tokens_and_no_shared_memory_are_refused_by_name() -> None:
    with pytest.raises(AccullmError, match="no CUDA kernel for 0 tokens"):
        planned(16, 64, 0, Device(1, LARGE))
    with pytest.raises(AccullmError, match="no CUDA kernel for 2 tokens and 0 outlier features in 4096 bytes"):
        planned(16, 64, 2, Device(1, 4096))
    with pytest.raises(AccullmError, match="no CUDA kernel for 20 tokens in 4096 bytes of shared memory"):
        planned(16, 64, 20, Device(1, 4096))
