"""Time the rounding of one decoder block of Llama-7B's shape on a GPU, and hold it against the target.

    python scripts/time_rounding.py [--device cuda:0] [--shrink 1] [--rounding feedback] [--encoding integer] [--fisher]
        [--repeats 3]

Weights, Hessians and pulls are random, and lie on the CPU before and the result after, as in a conversion: what is
timed is all that quantize does to round a block, the way there and back included. --shrink N divides all widths by N.
With --fisher rows feed each other, as with gradients. The target is for the whole block without that.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.kernels.matmul import why_no_kernels
from accullm_cli.kernels.rounding_check import checked_loops
from accullm_cli.quant.loops import Loops
from accullm_cli.quant.plan import LinearPlan
from accullm_cli.quant.rounding import RoundingOptions, round_linears

TARGET = 2.0  # seconds
HIDDEN, INTERMEDIATE = 4096, 11008
# The linears that share an input, as (out features, in features).
GROUPS = {
    "q, k, v": ((HIDDEN, HIDDEN),) * 3,
    "o": ((HIDDEN, HIDDEN),),
    "gate, up": ((INTERMEDIATE, HIDDEN),) * 2,
    "down": ((HIDDEN, INTERMEDIATE),),
}
GROUP_SIZE, BITS, OUTLIERS = 64, 4, 0.005


def seconds_of(
    shapes: Sequence[tuple[int, int]], loops: Loops, options: RoundingOptions, encoding: str, fed: bool, repeats: int
) -> float:
    """How long rounding the linears of one input takes: the median, after one time that compiles and is not counted."""
    draw = torch.Generator().manual_seed(0)
    features = shapes[0][1]
    rows = torch.randn(2048, features, generator=draw).to(loops.device)
    hessian = (rows.T @ rows / len(rows)).cpu()
    del rows
    outliers = tuple(sorted(torch.randperm(features, generator=draw)[: round(OUTLIERS * features)].tolist()))
    weights, plans, pulls, fishers = {}, {}, {}, {}
    for number, (out_features, in_features) in enumerate(shapes):
        name = f"linear {number}"
        weights[name] = torch.randn(out_features, in_features, generator=draw) / in_features**0.5
        plans[name] = LinearPlan(
            name, out_features, in_features, BITS, GROUP_SIZE, encoding != "integer", outliers, scale_bits=6,
            encoding=encoding,
        )  # fmt: skip
        pulls[name] = torch.randn(in_features, out_features, generator=draw) * 1e-3
        if fed:
            gradients = torch.randn(1024, out_features, generator=draw).to(loops.device)
            fishers[name] = (gradients.T @ gradients / len(gradients)).cpu()
    found = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        round_linears(weights, plans, options, torch.bfloat16, hessian, pulls, fishers=fishers, loops=loops)
        found.append(time.perf_counter() - begin)
    return statistics.median(found[1:])


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--shrink", type=int, default=1)
    parser.add_argument("--rounding", choices=("nearest", "feedback", "stochastic"), default="feedback")
    parser.add_argument("--encoding", choices=("integer", "levels", "trellis"), default="integer")
    parser.add_argument("--fisher", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args(arguments)
    device = torch.device(chosen.device)
    try:
        if device.type != "cpu" and not torch.cuda.is_available():
            raise AccullmError("torch sees no GPU", chosen.device, "accullm doctor says why")
        if device.type != "cpu" and (reason := why_no_kernels(device, torch.float16)):
            raise AccullmError(reason, chosen.device)
        loops = checked_loops(device)
    except AccullmError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return error.exit_code
    options = RoundingOptions(chosen.rounding, damping=0.3)
    total = 0.0
    for name, shapes in GROUPS.items():
        shrunk = [(rows // chosen.shrink, columns // chosen.shrink) for rows, columns in shapes]
        seconds = seconds_of(shrunk, loops, options, chosen.encoding, chosen.fisher, chosen.repeats)
        total += seconds
        print(f"{name:10} {' + '.join(f'{rows}x{columns}' for rows, columns in shrunk):40} {seconds:8.3f} s")
    verdict = ""
    if not chosen.fisher:
        verdict = f", {'within' if total <= TARGET else 'over'} the target of {TARGET:g} s"
    what = f"{chosen.rounding}, {chosen.encoding}{', rows feed each other' * chosen.fisher}"
    print(f"{'block':10} {what:40} {total:8.3f} s{verdict}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
