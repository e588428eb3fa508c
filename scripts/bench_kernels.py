"""Time products by 4-bit weights beside torch's dense ones and beside the machine's own limits.

    python scripts/bench_kernels.py                                  the GPU if there is one, else the CPU
    python scripts/bench_kernels.py --device cpu --shape 576x576 --tokens 1 8 --json
    python scripts/bench_kernels.py --encoding levels                codes that are places in a table, or a trellis

Every figure is a median over repeated passes through so many copies of the weight that none is still in the cache when
it is read again. On a GPU a pass is one CUDA graph, so that launching costs nothing. The limits are measured in the
same run: copying memory, and a large dense product. On a GPU, `of limit` is the time that moving the weight's bytes, or
multiplying, would take at those speeds, over the time it took.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch.nn.functional import linear as dense_product

from accullm_cli.kernels.layout import tile
from accullm_cli.kernels.matmul import engine, hybrid_matmul, why_no_kernels
from accullm_cli.kernels.packed import PACKED_DTYPES, pack_linear
from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.linear import QuantizedLinear, is_trellis
from accullm_cli.quant.plan import LinearPlan
from accullm_cli.quant.trellis import places_of_codes

# Llama-7B: attention, gate and up, down; Llama-70B: gate and up.
GPU_SHAPES = ("4096x4096", "11008x4096", "4096x11008", "28672x8192")
GPU_TOKENS = (1, 4, 16, 32, 64, 128, 256, 512, 2048)
CPU_SHAPES = ("576x576", "1536x576", "4096x4096", "11008x4096")
CPU_TOKENS = (1, 4, 16, 64, 512)
GROUP_SIZE = 64
OUTLIERS = 0.005
# Weights that are read in turn exceed this: three times the 50 MB of a large GPU's L2, and most CPUs' last cache.
ROTATED_BYTES = 160_000_000
MOST_COPIES = 64
# A pass on the CPU ends after this long, though not all copies were read: what is so slow does not wait for memory.
SECONDS_OF_A_PASS = 0.1
# torch's 4-bit product for CPUs takes seconds for more tokens than these, and is far behind everything else by then.
INT4_TOKENS_ON_CPU = 16


@dataclass(frozen=True)
class Row:
    """One product on one engine."""

    engine: str
    out_features: int
    in_features: int
    tokens: int
    outliers: int
    microseconds: float
    of_limit: float  # 1 is the limit itself
    over_dense: float  # times as fast as torch's product in the same 16-bit format


@dataclass(frozen=True)
class Limits:
    """Measured in this run."""

    bytes_per_second: float  # read and written together, by a copy
    operations_per_second: float  # by a dense product, two per multiplication


def random_linear(
    rows: int, columns: int, outliers: int, dtype: torch.dtype, device: torch.device, encoding: str = "integer"
) -> QuantizedLinear:
    """A linear of random codes; what they are does not change the time."""
    groups = -(-columns // GROUP_SIZE)
    levels = ENCODINGS[encoding].levels(LinearPlan("", rows, columns, 4, GROUP_SIZE, True, encoding=encoding))
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device=device)
    return QuantizedLinear(
        codes=places_of_codes(codes) if is_trellis(levels, 4) else codes,
        scales=torch.full((rows, groups), 0.01, dtype=torch.float16, device=device),
        zeros=None if levels else torch.full((rows, groups), 8, dtype=torch.uint8, device=device),
        outlier_index=torch.arange(outliers, dtype=torch.int32, device=device) * (columns // max(outliers, 1)),
        outlier_weight=torch.randn(rows, outliers, device=device).to(dtype),
        bits=4,
        group_size=GROUP_SIZE,
        levels=levels,
    )


# -- time ------------------------------------------------------------------------------------------------------------


def cpu_clock() -> Callable[[], float]:
    """With one thread the process's own time, in which other programs' share of the core does not count."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def seconds_per_call(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int) -> float:
    """The median over `repeats` passes through `calls`, per call."""
    calls[0]()  # compiles and loads
    if device.type == "cpu":
        return statistics.median(seconds_of_a_pass(calls, cpu_clock()) for _ in range(repeats))
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    passes = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(device)
        passes.append(begin.elapsed_time(end) / 1000 / len(calls))
    return statistics.median(passes)


def seconds_of_a_pass(calls: Sequence[Callable[[], object]], clock: Callable[[], float]) -> float:
    """Seconds per call, on the CPU."""
    begin = clock()
    for done, call in enumerate(calls, 1):
        call()
        elapsed = clock() - begin
        if elapsed > SECONDS_OF_A_PASS or done == len(calls):
            return elapsed / done
    raise ValueError("no calls to time")


def measure_limits(device: torch.device, dtype: torch.dtype, repeats: int) -> Limits:
    """The speed of a copy of 256 MB (CPU) or 1 GB, and of a dense product of 1024 or 8192 cubed."""
    on_cpu = device.type == "cpu"
    source = torch.empty(256_000_000 if on_cpu else 1_000_000_000, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = seconds_per_call([lambda: target.copy_(source)], device, repeats)
    size = 1024 if on_cpu else 8192
    matrix = torch.randn(size, size, device=device).to(dtype)
    product = seconds_per_call([lambda: matrix @ matrix], device, repeats)
    return Limits(2 * source.numel() / copy, 2 * size**3 / product)


# -- engines ---------------------------------------------------------------------------------------------------------


Engine = tuple[str, list[Callable[[], object]], int]  # name, calls, and bytes of a weight


def hybrid_calls(linears: Sequence[QuantizedLinear], x: torch.Tensor, kernels: bool) -> Iterator[Engine]:
    """What a model loaded in transformers may do with a linear here."""
    if kernels:
        tiled = [tile(linear, x.dtype) for linear in linears]
        yield engine(tiled[0], len(x)), [partial(hybrid_matmul, x, one) for one in tiled], tiled[0].stored_bytes
        return
    stored, levels = [linear.to_tensors() for linear in linears], linears[0].levels

    def unpack_and_multiply(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return hybrid_matmul(x, QuantizedLinear.from_tensors(tensors, x.shape[1], 4, GROUP_SIZE, levels))

    for dtype in PACKED_DTYPES if x.device.type == "cpu" else (x.dtype,):
        activations = x.to(dtype)
        if x.device.type == "cpu":
            packed = [pack_linear(tensors, x.shape[1], 4, GROUP_SIZE, dtype, levels) for tensors in stored]
            calls = [partial(hybrid_matmul, activations, one) for one in packed]
            yield f"{engine(packed[0], len(x))}, {name_of(dtype)}", calls, packed[0].stored_bytes
        calls = [partial(unpack_and_multiply, tensors, activations) for tensors in stored]
        yield f"{engine(linears[0], len(x))}, {name_of(dtype)}", calls, linears[0].stored_bytes


def torch_int4_calls(linears: Sequence[QuantizedLinear], x: torch.Tensor) -> list[Callable[[], object]]:
    """torch's own 4-bit product, which keeps its scales in the format of x.

    Raises:
        RuntimeError: this torch or device has none for the shape or format.
    """
    calls: list[Callable[[], object]] = []
    for linear in linears:
        # [K / group, N, 2]: scale, and what a code of 8 stands for, which is 0 here.
        scales = linear.scales.T.to(x.dtype)
        parameters = torch.stack((scales, torch.zeros_like(scales)), dim=-1).contiguous()
        if x.device.type == "cpu":
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(linear.codes.int(), 1)
            product = torch.ops.aten._weight_int4pack_mm_for_cpu
        else:
            packed = torch.ops.aten._convert_weight_to_int4pack(linear.codes[:, 1::2] | linear.codes[:, ::2] << 4, 8)
            product = torch.ops.aten._weight_int4pack_mm
        calls.append(partial(product, x, packed, GROUP_SIZE, parameters))
    return calls


def bench_shape(
    rows: int,
    columns: int,
    tokens: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    limits: Limits,
    repeats: int,
    encoding: str = "integer",
) -> list[Row]:
    """All engines for one weight."""
    kernels = why_no_kernels(device, dtype) is None
    outliers = round(OUTLIERS * columns)

    def copies(bytes_each: float) -> int:
        return max(1, min(MOST_COPIES, -(-ROTATED_BYTES // int(bytes_each))))

    found: list[Row] = []
    dense_weights = [torch.randn(rows, columns, device=device).to(dtype) for _ in range(copies(2 * rows * columns))]
    packed_copies = copies(rows * columns / 2)
    plain, with_outliers = (
        [random_linear(rows, columns, count, dtype, device, encoding) for _ in range(packed_copies)]
        for count in (0, outliers)
    )
    for count in tokens:
        x = torch.randn(count, columns, device=device).to(dtype)
        dense = seconds_per_call([partial(dense_product, x, weight) for weight in dense_weights], device, repeats)
        row = partial(make_row, limits, (rows, columns, count), dense)
        found.append(row(f"torch {name_of(dtype)}", dense, 2 * rows * columns))
        hybrids = ((plain, 0), (with_outliers, outliers))
        for linears, n in hybrids if kernels else hybrids[1:]:  # without kernels, outliers make no difference
            for name, calls, weight_bytes in hybrid_calls(linears, x, kernels):
                found.append(row(name, seconds_per_call(calls, device, repeats), weight_bytes, n))
        if device.type == "cpu":
            calls = [partial(dense_product, x.float(), weight.float()) for weight in dense_weights]
            found.append(row("torch float32", seconds_per_call(calls, device, repeats), 4 * rows * columns))
        if encoding != "integer" or (device.type == "cpu" and count > INT4_TOKENS_ON_CPU):
            continue  # torch has no such product
        for other in PACKED_DTYPES if device.type == "cpu" else (torch.bfloat16,):
            name = f"torch int4, {name_of(other)}"
            try:
                seconds = seconds_per_call(torch_int4_calls(plain, x.to(other)), device, repeats)
            except RuntimeError as error:
                print(f"{name}, {rows}x{columns}: {str(error).splitlines()[0]}", file=sys.stderr)
            else:
                found.append(row(name, seconds, plain[0].stored_bytes))
    return found


def make_row(
    limits: Limits,
    shape: tuple[int, int, int],
    dense: float,
    name: str,
    seconds: float,
    weight_bytes: int,
    outliers: int = 0,
) -> Row:
    """shape: N, K, tokens. dense: seconds of torch's product in 16 bits."""
    rows, columns, tokens = shape
    moved = weight_bytes + 2 * tokens * (rows + columns)
    limit = max(moved / limits.bytes_per_second, 2 * tokens * rows * columns / limits.operations_per_second)
    return Row(name, rows, columns, tokens, outliers, seconds * 1e6, limit / seconds, dense / seconds)


# -- what is printed -------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| N x K | tokens | engine | outliers | µs | of limit | times torch |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row.out_features} x {row.in_features} | {row.tokens} | {row.engine} | {row.outliers} "
            f"| {row.microseconds:.1f} | {row.of_limit:.0%} | {row.over_dense:.2f} |"
        )
    return "\n".join(lines)


def table_by_engine(rows: Sequence[Row]) -> str:
    """Microseconds, a line for each product and a column for each engine."""
    engines = list(dict.fromkeys(row.engine for row in rows))
    lines = [f"| N x K | tokens | {' | '.join(engines)} |", f"| --- | ---: |{' ---: |' * len(engines)}"]
    products: dict[tuple[int, int, int], dict[str, float]] = {}
    for row in rows:
        products.setdefault((row.out_features, row.in_features, row.tokens), {})[row.engine] = row.microseconds
    for (out_features, in_features, tokens), times in products.items():
        cells = [f"{times[engine]:.0f}" if engine in times else "" for engine in engines]
        lines.append(f"| {out_features} x {in_features} | {tokens} | {' | '.join(cells)} |")
    return "\n".join(lines)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    clock = "processor time" if cpu_clock() is time.process_time else "time on the clock"
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return f"{platform.machine()} with {capability}, {threads} thread{'s' if threads > 1 else ''}, {clock}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", action="append", help="NxK; repeatable")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], help="default: float16 on a GPU, bfloat16 on a CPU")
    parser.add_argument("--encoding", choices=["integer", "levels", "trellis"], default="integer")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    device = torch.device(chosen.device)
    on_gpu = device.type == "cuda"
    dtype = getattr(torch, chosen.dtype or ("float16" if on_gpu else "bfloat16"))
    repeats = chosen.repeats or (21 if on_gpu else 3)
    shapes = chosen.shape or (GPU_SHAPES if on_gpu else CPU_SHAPES)
    tokens = chosen.tokens or (GPU_TOKENS if on_gpu else CPU_TOKENS)
    limits = measure_limits(device, dtype, repeats)
    rows: list[Row] = []
    for shape in shapes:
        count, width = map(int, shape.split("x"))
        rows += bench_shape(count, width, tokens, device, dtype, limits, repeats, chosen.encoding)
    if chosen.json:
        print(json.dumps({"device": device_name(device), "torch": torch.__version__, "limits": asdict(limits),
                          "rows": [asdict(row) for row in rows]}))  # fmt: skip
        return 0
    print(f"{device_name(device)}, torch {torch.__version__}, {dtype}")
    print(f"copy {limits.bytes_per_second / 1e9:.1f} GB/s, dense product {limits.operations_per_second / 1e12:.2f} T/s")
    print()
    print(table(rows) if on_gpu else table_by_engine(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
