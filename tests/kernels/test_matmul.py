"""Multiplication by a quantized linear, against weights worked out code by code."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad

from accullm_cli.errors import AccullmError
from accullm_cli.kernels import device, matmul
from accullm_cli.kernels.check import largest_disagreement
from accullm_cli.kernels.launch import Device, Launch
from accullm_cli.kernels.layout import tile
from accullm_cli.kernels.matmul import Operand, aligned_rows, engine, hybrid_matmul, why_no_kernels
from accullm_cli.kernels.packed import pack_linear
from accullm_cli.quant.linear import QuantizedLinear
from tests.cuda_emulation import emulate, needs_compiler
from tests.kernels.linears import ENCODED, Shape, exact_weight, random_linear


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


# -- tiled linears: the kernels, launched on the CPU -------------------------------------------------------


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As if the CPU were a GPU with kernels; the names of those that were launched."""
    names: list[str] = []

    def launch(what: Launch, where: torch.device) -> None:
        names.append(what.kernel)
        emulate(what)

    monkeypatch.setattr(matmul, "why_no_kernels", lambda *_: None)
    monkeypatch.setattr(device, "launch", launch)
    monkeypatch.setattr(device, "describe", lambda index: Device(multiprocessors=4, shared_bytes=99 * 1024))
    return names


@needs_compiler
@pytest.mark.parametrize(
    ("tokens", "kernel", "name"),
    [
        (1, "hybrid_gemv_8", "CUDA: hybrid_gemv"),
        (16, "hybrid_gemv_16", "CUDA: hybrid_gemv"),
        (17, "hybrid_gemm_32", "CUDA: hybrid_gemm"),
        (128, "hybrid_gemm_128", "CUDA: hybrid_gemm"),
        (129, "dequantize_tiles", "CUDA: dequantize_tiles, then torch"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_number_of_tokens_chooses_the_kernel(
    tokens: int, kernel: str, name: str, dtype: torch.dtype, launches: list[str]
) -> None:
    linear = random_linear(Shape(24, 203, 64, False, outliers=3), dtype, seed=1, exact=True)
    tiled = tile(linear, dtype)
    x = torch.randint(-2, 3, (tokens, 203), generator=torch.Generator().manual_seed(2)).to(dtype)
    bias = torch.arange(24).to(dtype)
    found = hybrid_matmul(x.view(tokens, 1, 203), tiled, bias)
    wanted = x.double() @ exact_weight(linear, dtype).T + bias.double()
    assert torch.equal(found, wanted.to(dtype).view(tokens, 1, 24))
    assert launches == [kernel]
    assert engine(tiled, tokens) == name


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 17, 200])
def test_an_aborted_launch_spoils_no_product_after_it(
    tokens: int, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = random_linear(Shape(24, 6200, 128, False, outliers=3), torch.float16, seed=1, exact=True)
    x = torch.randint(-2, 3, (tokens, 6200), generator=torch.Generator().manual_seed(2)).half()
    tiled = tile(linear, torch.float16)
    launch = device.launch

    def abort(what: Launch, where: torch.device) -> None:
        """As if one block of each strip had come as far as to be counted."""
        if (address := getattr(what.arguments[1], "arrived", None)) is not None:
            assert what.grid[2] > 1
            ctypes.memset(address, 1, 4 * len(tiled.tiles))
        raise RuntimeError("aborted")

    monkeypatch.setattr(device, "launch", abort)
    with pytest.raises(RuntimeError, match="aborted"):
        hybrid_matmul(x, tiled)
    monkeypatch.setattr(device, "launch", launch)
    wanted = x.double() @ exact_weight(linear, torch.float16).T
    assert torch.equal(hybrid_matmul(x, tiled), wanted.half())


@needs_compiler
@pytest.mark.parametrize("of_bias", [False, True])
@pytest.mark.parametrize("of_x", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 17, 128, 129])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_are_those_of_the_dequantized_weight(
    tokens: int, dtype: torch.dtype, of_x: bool, of_bias: bool, launches: list[str]
) -> None:
    linear = random_linear(Shape(24, 203, 64, False, outliers=3), dtype, seed=1)
    check_gradients(linear, tile(linear, dtype), tokens, dtype, of_x, of_bias)


@pytest.mark.parametrize("of_bias", [False, True])
@pytest.mark.parametrize("of_x", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("encoding", ENCODED)
def test_gradients_are_those_of_the_dequantized_weight_on_a_cpu(
    encoding: str, tokens: int, dtype: torch.dtype, of_x: bool, of_bias: bool
) -> None:
    linear = random_linear(Shape(24, 203, 64, True, outliers=3, encoding=encoding), dtype, seed=1)
    packed = pack_linear(linear.to_tensors(), 203, 4, 64, dtype, linear.levels)
    check_gradients(linear, packed, tokens, dtype, of_x, of_bias)


def check_gradients(
    linear: QuantizedLinear, ready: Operand, tokens: int, dtype: torch.dtype, of_x: bool, of_bias: bool
) -> None:
    """Backwards, and a tangent of x forwards."""
    draw = torch.Generator().manual_seed(2)
    x, bias = torch.randn(tokens, 203, generator=draw).to(dtype), torch.randn(24, generator=draw).to(dtype)
    upstream, tangent = torch.randn(tokens, 24, generator=draw).to(dtype), torch.randn_like(x)
    results = []
    for operand in (ready, linear):
        own_x, own_bias = x.clone().requires_grad_(of_x), bias.clone().requires_grad_(of_bias)
        y = hybrid_matmul(own_x, operand, own_bias)
        assert y.requires_grad == (of_x or of_bias)
        if y.requires_grad:
            y.backward(upstream)
        results.append((own_x.grad, own_bias.grad))
    for found, wanted in zip(*results, strict=True):
        assert (found is None) == (wanted is None)
        assert wanted is None or torch.equal(found, wanted)
    with torch.no_grad(), forward_ad.dual_level():
        tangents = [
            forward_ad.unpack_dual(hybrid_matmul(forward_ad.make_dual(x, tangent), operand)).tangent
            for operand in (ready, linear)
        ]
    assert torch.equal(*tangents)


@needs_compiler
def test_the_check_of_doctor_finds_no_disagreement_a_wrong_scale_and_a_wrong_level(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert largest_disagreement(torch.device("cpu")) is None
    assert set(launches) == {
        "hybrid_gemv_8", "hybrid_gemv_16", "hybrid_gemm_32", "hybrid_gemm_64", "hybrid_gemm_128", "dequantize_tiles",
    }  # fmt: skip
    from accullm_cli.kernels import check

    def wrong(linear: QuantizedLinear, dtype: torch.dtype) -> object:
        linear.scales[7] = 2
        return tile(linear, dtype)

    monkeypatch.setattr(check, "tile", wrong)
    found = largest_disagreement(torch.device("cpu"))
    assert found is not None
    assert re.fullmatch(r"CUDA: hybrid_gemv with 1 tokens is off by \d+ in whole numbers", found)

    def other_level(linear: QuantizedLinear, dtype: torch.dtype) -> object:
        if linear.levels is not None:
            linear = replace(linear, levels=(*linear.levels[:-1], linear.levels[-1] - 1))
        return tile(linear, dtype)

    monkeypatch.setattr(check, "tile", other_level)
    found = largest_disagreement(torch.device("cpu"))
    assert found is not None
    assert re.fullmatch(r"CUDA: hybrid_gemv with 1 tokens is off by \d+ in whole numbers of levels", found)

    def other_magnitude(linear: QuantizedLinear, dtype: torch.dtype) -> object:
        if linear.levels is not None and linear.is_trellis:
            most = linear.levels[-1] - 1
            linear = replace(linear, levels=(-most, *linear.levels[1:-1], most))
        return tile(linear, dtype)

    monkeypatch.setattr(check, "tile", other_magnitude)
    monkeypatch.setattr(check, "TOKENS", (1,))
    found = largest_disagreement(torch.device("cpu"))
    assert found is not None
    assert re.fullmatch(r"CUDA: hybrid_gemv with 1 tokens is off by \d+ in whole numbers of a trellis", found)


def test_no_tokens_make_no_launch(launches: list[str]) -> None:
    tiled = tile(random_linear(Shape(24, 64), torch.float16, seed=0), torch.float16)
    assert hybrid_matmul(torch.zeros(2, 0, 64, dtype=torch.float16), tiled).shape == (2, 0, 24)
    assert launches == []


def test_other_activations_than_those_tiled_for_are_refused(launches: list[str]) -> None:
    tiled = tile(random_linear(Shape(24, 64), torch.float16, seed=0), torch.float16)
    with pytest.raises(AccullmError) as caught:
        hybrid_matmul(torch.zeros(1, 64, dtype=torch.bfloat16), tiled)
    assert caught.value.line() == "activations are torch.bfloat16, but the linear was tiled for torch.float16"


def test_a_tiled_linear_on_the_cpu_is_refused() -> None:
    tiled = tile(random_linear(Shape(24, 64), torch.float16, seed=0), torch.float16)
    with pytest.raises(AccullmError) as caught:
        hybrid_matmul(torch.zeros(1, 64, dtype=torch.float16), tiled)
    assert caught.value.line() == "no CUDA kernel for device cpu: the kernels need a GPU of NVIDIA"


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((9, 0), torch.bfloat16, None),
        ((7, 5), torch.float16, None),
        ((7, 0), torch.float16, "compute capability 7.0: the kernels need 7.5 or newer"),
        ((7, 5), torch.bfloat16, "compute capability 7.5 multiplies no bfloat16: load the model in float16"),
    ],
)
def test_which_gpus_have_kernels(
    capability: tuple[int, int], dtype: torch.dtype, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(matmul.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(device, "describe", lambda index: Device(multiprocessors=4, shared_bytes=99 * 1024))
    assert why_no_kernels(torch.device("cuda", 0), dtype) == reason


def test_a_cupy_that_does_not_fit_the_driver_is_named() -> None:
    pytest.importorskip("cupy")
    if torch.cuda.is_available():
        pytest.skip("CuPy may work here")
    reason = why_no_kernels(torch.device("cuda", 0), torch.float16)
    assert reason is not None
    assert re.fullmatch(
        r"CuPy cannot use it \(.*cudaError.*\): pip install 'accullm\[cuda12\]' .*, as the driver's version", reason
    )


def test_a_cupy_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(index: int) -> None:
        raise ImportError("libcuda.so.1: cannot open shared object file\nmore lines")

    monkeypatch.setattr(matmul.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(device, "describe", refuse)
    reason = why_no_kernels(torch.device("cuda", 0), torch.float16)
    assert reason is not None
    assert reason.startswith("CuPy cannot use it (libcuda.so.1: cannot open shared object file): pip install")


def test_without_cupy_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul.importlib.util, "find_spec", lambda name: None)
    reason = why_no_kernels(torch.device("cuda", 0), torch.float16)
    wanted = "CuPy is missing: pip install 'accullm[cuda12]' or 'accullm[cuda13]', as the driver's version"
    assert reason == wanted


def test_rows_are_copied_only_where_loads_of_16_bytes_need_it() -> None:
    x = torch.arange(48, dtype=torch.float16).view(3, 16)
    assert aligned_rows(x).data_ptr() == x.data_ptr()
    assert aligned_rows(x[:, :8]).stride(0) == 16
    for odd in (x[:, 1:9], x[:, :13], x.T):
        rows = aligned_rows(odd)
        assert torch.equal(rows, odd)
        assert rows.stride(0) % 8 == 0
        assert rows.data_ptr() % 16 == 0
    padded = aligned_rows(x[:, :13])
    assert torch.as_strided(padded, (3, 16), (16, 1))[:, 13:].tolist() == [[0.0] * 3] * 3
