"""Check and time the CUDA kernels on this machine's GPU, all in one call; nothing else is needed where one is at hand.

    python scripts/gpu_check.py [FOLDER]        default: work/gpu_check

Runs, one after the other: doctor, the tests with the marker `gpu` (rounding has to give the codes of the CPU among
them), the table of machine code for this GPU, the time that rounding a block of Llama-7B takes, the benchmark of
products, and some of the tests under compute-sanitizer's memcheck and racecheck where it is installed: it is slow.
Each one's output lies in FOLDER; a line for each says whether it passed. Exits with 1 if one did not.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GPU_TESTS = ("-m", "pytest", "-m", "gpu", "-ra", "tests/kernels", "tests/pipeline/test_speed.py")
# Small shapes, every kernel.
SANITIZED = (*GPU_TESTS, "-k", "odd_shapes or dequantizing or rounding_tile or rounding_descent or graph")


@dataclass(frozen=True)
class Step:
    """One command, whose output goes to the file `name`.txt."""

    name: str
    command: tuple[str, ...]


def steps(architecture: int, sanitizer: str | None) -> list[Step]:
    """What is run, in order."""
    python = sys.executable
    found = [
        Step("doctor", (python, "-m", "accullm_cli", "doctor")),
        Step("tests", (python, *GPU_TESTS)),
        Step("machine_code", (python, "scripts/kernel_table.py", str(architecture))),
        Step("rounding", (python, "scripts/time_rounding.py")),
        Step("bench", (python, "scripts/bench_kernels.py")),
        Step("bench_bfloat16", (python, "scripts/bench_kernels.py", "--dtype", "bfloat16")),
    ]
    if sanitizer is not None:
        found += [
            Step(tool, (sanitizer, "--tool", tool, "--error-exitcode", "9", python, *SANITIZED))
            for tool in ("memcheck", "racecheck")
        ]
    return found


def run(step: Step, folder: Path) -> bool:
    begin = time.monotonic()
    with (folder / f"{step.name}.txt").open("w") as output:
        code = subprocess.run(step.command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT).returncode
    passed = "passed" if code == 0 else f"FAILED with {code}"
    print(f"{step.name}: {passed} in {time.monotonic() - begin:.0f} s", flush=True)
    return code == 0


def main(arguments: Sequence[str]) -> int:
    import torch

    if not torch.cuda.is_available():
        print("error: torch sees no GPU; accullm doctor says why", file=sys.stderr)
        return 1
    folder = Path(arguments[0]) if arguments else ROOT / "work" / "gpu_check"
    folder.mkdir(parents=True, exist_ok=True)
    major, minor = torch.cuda.get_device_capability(0)
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}; output in {folder}")
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer: not installed, left out")
    results = [run(step, folder) for step in steps(10 * major + minor, sanitizer)]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
