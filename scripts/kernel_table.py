"""Print what NVRTC makes of every kernel, for every architecture, as the table of docs/kernels.md. Needs no GPU.

python scripts/kernel_table.py              all architectures
python scripts/kernel_table.py 90 120       some
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from accullm_cli.errors import AccullmError
from accullm_cli.kernels.compile import compile_kernels

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.kernels.machine_code import KernelCode, read_machine_code

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
# Tensor cores of compute capability 7.5 know float16 alone.
OLDEST_WITH_BFLOAT = 80
BUILDS = (
    *(
        (
            source,
            (f"COMPUTE_BF16={bfloat}", f"LEVELS={levels}"),
            ("fp16", "bf16")[bfloat] + ("", ", levels", ", trellis")[levels],
        )
        for source in ("hybrid_gemv.cu", "hybrid_gemm.cu", "dequantize.cu")
        for bfloat in (0, 1)
        for levels in (0, 1, 2)
    ),
    ("feedback_round.cu", ("REAL=float",), "fp32"),
    ("feedback_round.cu", ("REAL=double",), "fp64"),
    ("descend.cu", ("REAL=float",), "fp32"),
    ("descend.cu", ("REAL=double",), "fp64"),
    ("trellis.cu", ("REAL=float",), "fp32"),
    ("trellis.cu", ("REAL=double",), "fp64"),
)
# What one pass over the main loop's work takes, by kernel: weights of a lane, and multiplications on the tensor cores.
# A compiler that unrolls the loop shows more of both.
WORK = {
    "hybrid_gemv_8": (32, 4),
    "hybrid_gemv_16": (32, 8),
    "hybrid_gemm_32": (64, 32),
    "hybrid_gemm_64": (64, 64),
    "hybrid_gemm_128": (64, 128),
}


def builds(architecture: int) -> tuple[tuple[str, tuple[str, ...], str], ...]:
    """(source, defines, format) of everything that this architecture can run."""
    return tuple(build for build in BUILDS if architecture >= OLDEST_WITH_BFLOAT or not build[2].startswith("bf16"))


def instructions_per_weight(name: str, code: KernelCode, architecture: int) -> float | None:
    """Instructions of the main loop per weight and lane, multiplications included; None without such a loop."""
    if name not in WORK:
        return None
    weights, multiplications = WORK[name]
    if architecture < OLDEST_WITH_BFLOAT:
        multiplications *= 2  # each takes half the columns there
    passes = code.count("HMMA", code.loop) / multiplications
    return len(code.loop) / (weights * passes)


def main(arguments: Sequence[str]) -> int:
    print("| architecture | kernel | format | registers | spilled bytes | instructions | in the loop, per weight |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for architecture in map(int, arguments or ARCHITECTURES):
        for source, defines, label in builds(architecture):
            try:
                kernels = read_machine_code(compile_kernels(source, defines, architecture))
            except AccullmError as error:
                print(f"error: {error.line()}", file=sys.stderr)
                return error.exit_code
            for name, code in sorted(kernels.items()):
                per_weight = instructions_per_weight(name, code, architecture)
                shown = "" if per_weight is None else f"{per_weight:.2f}"
                print(
                    f"| sm_{architecture} | {name} | {label} | {code.registers} | {code.stack} "
                    f"| {len(code.instructions)} | {shown} |"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
