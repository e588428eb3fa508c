"""The kernels on a GPU: what the other tests check on the CPU, real layers, repeated runs, CUDA graphs."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import partial

import pytest
import torch

from accullm_cli.kernels.check import largest_disagreement
from accullm_cli.kernels.device import describe, launch
from accullm_cli.kernels.launch import dequantize_launch
from accullm_cli.kernels.layout import TiledLinear, tile
from accullm_cli.kernels.matmul import hybrid_matmul
from accullm_cli.kernels.rounding import cuda_loops, with_tensors
from accullm_cli.kernels.rounding_check import checked_loops, loops_of, rounding_disagreement
from accullm_cli.quant.loops import COMPILED, ChainDescent
from accullm_cli.quant.plan import LinearPlan
from accullm_cli.quant.rounding import RoundingOptions, round_linears
from accullm_cli.quant.trellis import SEGMENT
from tests.kernels.linears import ENCODED, Shape, exact_weight, random_linear
from tests.kernels.test_fed_chains import feedback
from tests.kernels.test_launch import UNIT
from tests.kernels.test_rounding import random_descent, random_tile, trellis_descent, trellis_tile
from tests.quant.references import correlated_problem
from tests.test_pinned import CASES, PINNED, sha256_of


def why_not() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None if importlib.util.find_spec("cupy") else "CuPy is missing"


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
DTYPES = [torch.float16, torch.bfloat16]

# (out, in) features of the linears of Llama-7B, 13B and 70B, Qwen2.5-7B and Mixtral-8x7B, once each.
LAYERS = [
    (4096, 4096), (11008, 4096), (4096, 11008),
    (5120, 5120), (13824, 5120), (5120, 13824),
    (8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672),
    (3584, 3584), (512, 3584), (18944, 3584), (3584, 18944),
    (1024, 4096), (14336, 4096), (4096, 14336),
]  # fmt: skip


def on_gpu(tiled: TiledLinear) -> TiledLinear:
    parts = vars(tiled).items()
    return TiledLinear(**{name: v.to(GPU) if isinstance(v, torch.Tensor) else v for name, v in parts})


def check(x: torch.Tensor, weight: torch.Tensor, found: torch.Tensor) -> None:
    """Each result is within one rounding to its dtype of float64, and that of the float32 sums."""
    wanted = x.double() @ weight.T
    additions = x.shape[1] / 16 + 64
    # Tensor cores cut off, where float32 rounds: twice the unit.
    allowed = UNIT[x.dtype] * wanted.abs() * 1.001 + additions * 2.0**-23 * (x.double().abs() @ weight.abs().T)
    beyond = (found.double() - wanted).abs() - allowed - 2.0**-25
    assert bool((beyond <= 0).all()), float(beyond.max())


def test_the_check_of_doctor_passes() -> None:
    assert largest_disagreement(GPU) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 7, 16, 17, 32, 64, 128, 129])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(40, 333, 32, False, 3),
        Shape(300, 520, 64, True, 17),
        Shape(130, 576, 128, False, 6),
        Shape(70, 700, -1, False, 20),
        Shape(17, 64, 16, True, 0, bits=2),
        Shape(130, 576, 64, outliers=6, encoding="levels"),
        Shape(40, 333, 32, bits=3, encoding="levels"),
        Shape(530, 576, 64, outliers=6, encoding="trellis"),
        Shape(300, 333, 32, bits=3, encoding="trellis"),
        Shape(1, 40, 16, bits=2, encoding="trellis"),
    ],
)
def test_odd_shapes_exactly(shape: Shape, tokens: int, dtype: torch.dtype) -> None:
    linear = random_linear(shape, dtype, seed=tokens, exact=True)
    x = torch.randint(-3, 4, (tokens, shape.in_features)).to(dtype)
    bias = torch.randint(-9, 10, (shape.out_features,)).to(dtype)
    found = hybrid_matmul(x.to(GPU), on_gpu(tile(linear, dtype)), bias.to(GPU)).cpu()
    assert torch.equal(found, (x.double() @ exact_weight(linear, dtype).T + bias.double()).to(dtype))


@pytest.mark.parametrize("encoding", ENCODED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), LAYERS)
def test_every_layer_of_known_models(rows: int, columns: int, dtype: torch.dtype, encoding: str) -> None:
    shape = Shape(rows, columns, 128, False, columns // 200, encoding=encoding)
    linear = random_linear(shape, dtype, seed=rows)
    weight = exact_weight(linear, dtype).to(GPU)
    tiled = on_gpu(tile(linear, dtype))
    for tokens in (1, 5, 16, 32, 100, 300):
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(GPU, dtype)
        found = hybrid_matmul(x, tiled)
        check(x, weight, found)
        # Twenty runs in a row, each while the one before may still be under way.
        again = [hybrid_matmul(x, tiled) for _ in range(20)]
        assert all(torch.equal(found, other) for other in again), f"{tokens} tokens: runs differ"


@pytest.mark.parametrize("encoding", ENCODED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantizing_exactly(dtype: torch.dtype, encoding: str) -> None:
    linear = random_linear(Shape(1000, 2100, 64, False, 30, encoding=encoding), dtype, seed=1)
    tiled = on_gpu(tile(linear, dtype))
    weight = torch.full((1000, 2100), torch.nan, dtype=dtype, device=GPU)
    launch(dequantize_launch(tiled, weight, describe(0)), GPU)
    assert torch.equal(weight.double().cpu(), exact_weight(linear, dtype))


# -- rounding ----------------------------------------------------------------------------------------------


def test_the_check_before_rounding_passes() -> None:
    assert rounding_disagreement(loops_of(GPU)) is None


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rounding_tile_is_that_of_the_cpu_bit_for_bit(dtype: torch.dtype, stochastic: bool) -> None:
    tile = random_tile(100, 50, dtype, seed=2, stochastic=stochastic)
    there = with_tensors(tile, lambda part: part.to(GPU, copy=True))
    codes, error = COMPILED.round_tile(tile)
    found_codes, found_error = checked_loops(GPU).round_tile(there)
    for found, wanted in ((found_codes, codes), (found_error, error), (there.fed, tile.fed)):
        assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("shared_bytes", [99 * 1024, 64])  # where a row's slope fits in, and where not
@pytest.mark.parametrize("columns", [40, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rounding_descent_is_that_of_the_cpu_bit_for_bit(dtype: torch.dtype, columns: int, shared_bytes: int) -> None:
    rows = random_descent(20, columns, dtype, seed=3)
    there = with_tensors(rows, lambda part: part.to(GPU, copy=True))
    COMPILED.descend(rows)
    cuda_loops(GPU, launch, min(shared_bytes, describe(0).shared_bytes)).descend(there)
    assert torch.equal(there.codes.cpu(), rows.codes)
    assert torch.equal(there.error.cpu(), rows.error)


@pytest.mark.parametrize("rows", [33, SEGMENT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_chains_of_rows_that_feed_each_other_is_that_of_the_cpu(dtype: torch.dtype, rows: int) -> None:
    chains = feedback(rows, 90, dtype, seed=1)
    tile, descent = trellis_tile(90, rows, dtype, seed=2), trellis_descent(rows, 90, dtype, seed=3)
    for task in (replace(tile, rows=chains), replace(descent, rows=chains)):
        there = with_tensors(task, lambda part: part.to(GPU, copy=True))
        loops = checked_loops(GPU)
        if isinstance(task, ChainDescent):
            COMPILED.descend(task)
            loops.descend(there)
            pairs = (there.codes, task.codes), (there.error, task.error), (there.product, task.product)
        else:
            found, wanted = loops.round_tile(there), COMPILED.round_tile(task)
            pairs = (found[0], wanted[0]), (found[1], wanted[1]), (there.fed, task.fed)
        for found_part, wanted_part in pairs:
            assert torch.equal(found_part.cpu(), wanted_part)


@pytest.mark.parametrize("name", CASES)
def test_rounding_writes_the_pinned_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sum of these problems is exact, so that the products around the kernels are those of the CPU, too."""
    from tests import test_pinned

    monkeypatch.setattr(test_pinned, "round_linears", partial(round_linears, loops=checked_loops(GPU)))
    assert sha256_of(CASES[name].rounded(CASES[name].made(), torch.float32)) == PINNED[name][1]


@pytest.mark.parametrize("with_fisher", [False, True])
@pytest.mark.parametrize("mode", ["untouched", "compensating"])
@pytest.mark.parametrize("method", ["nearest", "feedback", "stochastic"])
def test_rounding_random_numbers_differs_in_few_codes(method: str, mode: str, with_fisher: bool) -> None:
    """Torch adds up in another order on a GPU: a value within a rounding error of the middle may go the other way."""
    problem = correlated_problem(700, 1000, 3000, seed=4)
    plan = LinearPlan("a", 700, 1000, 4, 64, False, (3, 70, 150), scale_bits=6)
    options = RoundingOptions(method, mode, damping=0.3)  # type: ignore[arg-type]
    gradients = torch.randn(2000, 700, generator=torch.Generator().manual_seed(1))
    fisher = gradients.T @ gradients / 2000
    fishers = {"a": fisher} if with_fisher else {}
    here, there, again = (
        round_linears(
            {"a": problem.weight.float()}, {"a": plan}, options, torch.bfloat16, problem.hessian.float(),
            {"a": problem.pull.float()}, fishers=fishers, loops=checked_loops(device),
        )["a"]
        for device in (CPU, GPU, GPU)
    )  # fmt: skip
    assert here.relative_error is not None
    assert there.relative_error == pytest.approx(here.relative_error, rel=0.01)
    assert float((here.linear.codes != there.linear.codes).double().mean()) < 0.02
    for suffix, tensor in there.linear.to_tensors().items():
        assert torch.equal(again.linear.to_tensors()[suffix], tensor), f"{suffix}: runs differ"


# -- streams and graphs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_cuda_graph_captures_a_product(tokens: int) -> None:
    linear = random_linear(Shape(256, 4096, 128, False, 20), torch.float16, seed=3)  # few strips: K is split
    tiled = on_gpu(tile(linear, torch.float16))
    x = torch.randn(tokens, 4096, device=GPU, dtype=torch.float16)
    hybrid_matmul(x, tiled)  # compiles and loads
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = hybrid_matmul(x, tiled)
    for seed in range(5):
        x.copy_(torch.randn(tokens, 4096, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, hybrid_matmul(x, tiled))


def test_a_product_runs_in_the_current_stream() -> None:
    linear = random_linear(Shape(512, 2048), torch.float16, seed=4)
    tiled = on_gpu(tile(linear, torch.float16))
    x = torch.randn(4, 2048, device=GPU, dtype=torch.float16)
    wanted = hybrid_matmul(x, tiled)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    late = torch.zeros_like(x)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles, some 50 ms: a product in another stream would read zeros
        late.copy_(x)
        found = hybrid_matmul(late, tiled)
    stream.synchronize()
    assert torch.equal(found, wanted)
