"""Products by 4-bit weights on a CPU, against float64 and weights worked out by the formula of the format."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from accullm_cli.errors import AccullmError
from accullm_cli.kernels import packed
from accullm_cli.kernels.matmul import engine, hybrid_matmul
from accullm_cli.kernels.packed import PACKED_TOKENS, PackedLinear, is_worth_packing, pack_linear, why_not_packed
from accullm_cli.quant.encodings.levels import LEVELS
from accullm_cli.quant.linear import QuantizedLinear
from tests.kernels.linears import ENCODED, Shape, exact_weight, random_linear

DTYPES = [torch.float32, torch.bfloat16]
# Half a step of the result's format is at most this share of it.
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def pack(linear: QuantizedLinear, dtype: torch.dtype) -> PackedLinear:
    scheme = linear.bits, linear.group_size, dtype, linear.levels
    return pack_linear(linear.to_tensors(), linear.codes.shape[1], *scheme)


shapes = st.builds(
    Shape,
    out_features=st.integers(1, 40),
    in_features=st.integers(8, 200),
    group_size=st.sampled_from([-1, 2, 16, 32, 40, 64, 128, 256]),
    symmetric=st.booleans(),
    outliers=st.integers(0, 8),
    encoding=st.sampled_from(ENCODED),
)


@settings(deadline=None, max_examples=150)
@given(shapes, st.integers(1, 9), st.sampled_from(DTYPES), st.booleans(), st.integers(0, 2**31))
@example(Shape(530, 203, 64, outliers=3, encoding="trellis"), 1, torch.float32, True, 1)
@example(Shape(300, 97, 16, outliers=3, encoding="trellis"), 5, torch.bfloat16, False, 2)
def test_every_result_is_within_the_rounding_of_its_sum(
    shape: Shape, tokens: int, dtype: torch.dtype, biased: bool, seed: int
) -> None:
    linear = random_linear(shape, dtype, seed)
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, shape.in_features, generator=draw).to(dtype)
    bias = torch.randn(shape.out_features, generator=draw).to(dtype) if biased else None
    found = hybrid_matmul(x, pack(linear, dtype), bias)
    weight = exact_weight(linear, dtype)
    wanted = x.double() @ weight.T + (0 if bias is None else bias.double())
    additions = shape.in_features + 2
    summed = x.double().abs() @ weight.abs().T + (0 if bias is None else bias.double().abs())
    allowed = UNIT[dtype] * wanted.abs() * 1.001 + additions * 2.0**-24 * summed
    assert found.dtype == dtype
    beyond = (found.double() - wanted).abs() - allowed
    assert bool((beyond <= 0).all()), float(beyond.max())


@settings(deadline=None, max_examples=60)
@given(shapes, st.integers(1, 9), st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_sums_of_whole_numbers_are_exact(shape: Shape, tokens: int, dtype: torch.dtype, seed: int) -> None:
    linear = random_linear(shape, dtype, seed, exact=True)
    x = torch.randint(-3, 4, (tokens, shape.in_features), generator=torch.Generator().manual_seed(seed)).to(dtype)
    wanted = x.double() @ exact_weight(linear, dtype).T
    assert torch.equal(hybrid_matmul(x, pack(linear, dtype)), wanted.to(dtype))


@pytest.mark.parametrize("kind", ["zero points", "symmetric", "levels"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_weight_is_rounded_once_whatever_its_scale(dtype: torch.dtype, kind: str) -> None:
    """One feature at a time gives the weights themselves: of every float16 scale, all codes, zero points and levels."""
    scales = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16)[:, None]
    levels = None
    if kind == "levels":
        levels = LEVELS[4]
        scales = torch.cat([scales, -scales])
    # Levels are looked up 16 bytes at a time: some are, and some are left over.
    codes = torch.arange(16, dtype=torch.uint8).repeat(len(scales), 3 if levels else 1)
    zeros = (torch.arange(len(scales)) % 16).to(torch.uint8)[:, None] if kind == "zero points" else None
    none = torch.zeros(0, dtype=torch.int32)
    kept = torch.zeros(len(scales), 0)
    linear = QuantizedLinear(codes, scales, zeros, none, kept, bits=4, group_size=-1, levels=levels)
    found = hybrid_matmul(torch.eye(codes.shape[1], dtype=dtype), pack(linear, dtype)).T
    assert torch.equal(found.double(), exact_weight(linear, dtype))


def test_leading_dimensions_bias_and_rows_that_lie_apart() -> None:
    linear = random_linear(Shape(24, 64, 32, False, 3), torch.float32, seed=1, exact=True)
    x = torch.randint(-3, 4, (2, 6, 130)).float()[:, ::2, 1:65]
    bias = torch.arange(24.0)
    found = hybrid_matmul(x, pack(linear, torch.float32), bias)
    assert torch.equal(found.double(), x.double() @ exact_weight(linear, torch.float32).T + bias)


def test_no_tokens_give_no_results() -> None:
    linear = random_linear(Shape(24, 64, 32, False, 3), torch.float32, seed=1)
    assert hybrid_matmul(torch.zeros(2, 0, 64), pack(linear, torch.float32)).shape == (2, 0, 24)


@pytest.mark.parametrize("encoding", ["integer", "trellis"])
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_share_the_rows(threads: int, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a trellis, where they begin inside of a chain and where another one begins: 259 / 7 = 37."""
    rows = 259 if encoding == "trellis" else 37
    linear = random_linear(Shape(rows, 96, 32, False, 3, encoding=encoding), torch.float32, seed=2)
    x = torch.randn(5, 96)
    alone = hybrid_matmul(x, pack(linear, torch.float32))
    monkeypatch.setattr(packed, "WORTH_A_THREAD", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(hybrid_matmul(x, pack(linear, torch.float32)), alone)


def test_the_codes_are_shared_and_not_copied() -> None:
    tensors = random_linear(Shape(24, 64, 32, False, 3), torch.bfloat16, seed=1).to_tensors()
    assert pack_linear(tensors, 64, 4, 32, torch.bfloat16).codes.data_ptr() == tensors["qweight"].data_ptr()


def test_scales_come_from_their_table() -> None:
    table = torch.tensor([0.25, 0.5, 1.0, 2.0], dtype=torch.float16)
    plain = random_linear(Shape(24, 64, 32, False, 3), torch.float32, seed=1, exact=True)
    tabled = replace(plain, scales=table[torch.randint(0, 4, (24, 2))], scale_table=table)
    x = torch.randint(-3, 4, (5, 64)).float()
    found = hybrid_matmul(x, pack(tabled, torch.float32))
    assert torch.equal(found.double(), x.double() @ exact_weight(tabled, torch.float32).T)


@pytest.mark.parametrize(
    ("bits", "group_size", "dtype", "reason"),
    [
        (4, 64, torch.float32, None),
        (4, -1, torch.bfloat16, None),
        (3, 64, torch.float32, "3 bits: products on a CPU read codes of 4 bits"),
        (8, 64, torch.float32, "8 bits: products on a CPU read codes of 4 bits"),
        (4, 25, torch.float32, "group size 25: products on a CPU read two codes at once, so it must be even or -1"),
        (4, 64, torch.float16, "torch.float16 activations: products on a CPU compute in float32 or bfloat16"),
    ],
)
def test_what_is_not_packed_is_named(bits: int, group_size: int, dtype: torch.dtype, reason: str | None) -> None:
    assert why_not_packed(bits, group_size, dtype) == reason
    linear = random_linear(Shape(24, 64, group_size, bits=bits), torch.float32, seed=1)
    if reason is None:
        assert engine(pack(linear, dtype), 1) == "CPU: packed 4-bit"
        return
    with pytest.raises(AccullmError) as refusal:
        pack(linear, dtype)
    assert refusal.value.line() == f"no product on a CPU for {reason}"


def test_other_activations_than_those_packed_for_are_refused() -> None:
    linear = pack(random_linear(Shape(24, 64), torch.float32, seed=0), torch.bfloat16)
    for x, what in ((torch.zeros(1, 64), "torch.float32 on cpu"),
                    (torch.zeros(1, 64, dtype=torch.bfloat16, device="meta"), "torch.bfloat16 on meta")):  # fmt: skip
        with pytest.raises(AccullmError) as refusal:
            hybrid_matmul(x, linear)
        assert refusal.value.line() == f"activations are {what}, but the linear was packed for torch.bfloat16"


def test_few_tokens_on_the_cpu_are_worth_it() -> None:
    few = torch.zeros(2, PACKED_TOKENS // 2, 64)
    assert is_worth_packing(few)
    assert not is_worth_packing(torch.zeros(PACKED_TOKENS + 1, 64))
    assert not is_worth_packing(few.to("meta"))


def test_a_compiled_model_dequantizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile sees through its own operations alone, and takes the branch where it is said to compile."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not is_worth_packing(torch.zeros(1, 64))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_token(value: float) -> None:
    linear = random_linear(Shape(24, 64, 32, False, 3), torch.float32, seed=1)
    x = torch.randn(6, 64)
    clean = hybrid_matmul(x, pack(linear, torch.float32))
    x[2, 40] = value
    found = hybrid_matmul(x, pack(linear, torch.float32))
    others = torch.arange(6) != 2
    assert torch.equal(found.isfinite(), others[:, None].expand(6, 24))
    assert torch.equal(found[others], clean[others])
