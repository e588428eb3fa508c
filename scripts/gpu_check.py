"""Check and time everything that this machine's GPU does, in one call; nothing else is needed where one is at hand.

    python scripts/gpu_check.py [FOLDER]        default: work/gpu_check

Runs, one after the other, and within LIMIT: doctor; the tests with the marker `gpu` that convert whole models; a
conversion of random blocks of Llama-7B's shape, stage by stage; one of the demo's model, where it was prepared; the
tests of the kernels (among them that rounding gives the codes of the CPU); random blocks with gradients; the table of
machine code for this GPU; the time that rounding a block of Llama-7B takes, and one of a quarter of its widths with a
Fisher matrix; the benchmarks of products; and some of the tests under compute-sanitizer's memcheck and racecheck where
it is installed: they are slow, and last. Each one's output lies in FOLDER; a line for each says whether it passed, and
what there was no time for. Exits with 1 if one did not.
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
LIMIT = 7.5 * 60  # seconds in all: a machine may be lent for less than ten minutes
GPU_TESTS = ("-m", "pytest", "-m", "gpu", "-ra")
KERNELS, CONVERSIONS = ("tests/kernels",), ("tests/stages", "tests/pipeline/test_speed.py")
# Small shapes, every kernel.
SMALL = "odd_shapes or dequantizing or rounding_tile or rounding_descent or rounding_chains or graph"
SANITIZED = (*GPU_TESTS, *KERNELS, "-k", SMALL)
# Chains of rows that feed each other, at a quarter of all widths: descent takes one segment at a time.
FED = ("--encoding", "trellis", "--fisher", "--shrink", "4", "--repeats", "1")
DEMO = Path("work/smollm2-135m")


@dataclass(frozen=True)
class Step:
    """One command, whose output goes to the file `name`.txt; seconds: that it may take at most."""

    name: str
    command: tuple[str, ...]
    seconds: float = LIMIT


def steps(architecture: int, sanitizer: str | None, folder: Path) -> list[Step]:
    """What is run, in order: what nothing else can tell comes first."""
    python = sys.executable
    blocks = (python, "scripts/time_blocks.py", "--work", str(folder / "blocks"))
    found = [
        Step("doctor", (python, "-m", "accullm_cli", "doctor")),
        Step("conversions", (python, *GPU_TESTS, *CONVERSIONS), 120),
        Step("blocks", blocks, 90),
        Step("tests", (python, *GPU_TESTS, *KERNELS), 120),
        Step("blocks_with_gradients", (*blocks, "--layers", "1", "--samples", "64", "--gradients", "64"), 60),
        Step("machine_code", (python, "scripts/kernel_table.py", str(architecture))),
        Step("rounding", (python, "scripts/time_rounding.py")),
        Step("rounding_fed", (python, "scripts/time_rounding.py", *FED), 60),
        Step("bench", (python, "scripts/bench_kernels.py")),
        Step("bench_bfloat16", (python, "scripts/bench_kernels.py", "--dtype", "bfloat16")),
        Step("bench_levels", (python, "scripts/bench_kernels.py", "--encoding", "levels")),
        Step("bench_trellis", (python, "scripts/bench_kernels.py", "--encoding", "trellis")),
    ]
    if (ROOT / DEMO / "config.json").exists():
        out = ("--out", str(folder / "demo"), "--run", str(folder / "demo.run"))
        given = ("convert", str(DEMO), *out, "--device", "cuda", "--samples", "64", "--fresh")
        found.insert(3, Step("demo", (python, "-m", "accullm_cli", *given)))
    if sanitizer is not None:
        found += [
            Step(tool, (sanitizer, "--tool", tool, "--error-exitcode", "9", python, *SANITIZED))
            for tool in ("memcheck", "racecheck")
        ]
    return found


def run(step: Step, folder: Path, left: float) -> bool:
    """Run one step in no more than the seconds that are left; whether it passed."""
    if left <= 0:
        print(f"{step.name}: left out, as there is no time left", flush=True)
        return False
    begin = time.monotonic()
    with (folder / f"{step.name}.txt").open("w") as output:
        try:
            limit = min(left, step.seconds)
            process = subprocess.run(step.command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=limit)
            code = process.returncode
            passed = "passed" if code == 0 else f"FAILED with {code}"
        except subprocess.TimeoutExpired:
            code, passed = 1, "NOT FINISHED"
    print(f"{step.name}: {passed} in {time.monotonic() - begin:.0f} s", flush=True)
    return code == 0


def figures(folder: Path) -> list[str]:
    """What is asked for first, of what the steps left: times of all blocks, and the demo's divergence."""
    wanted = {"blocks": " blocks: ", "blocks_with_gradients": " blocks: ", "demo": "mean KL"}
    return [
        f"{name}: {line.strip()}" for name, words in wanted.items() for line in _lines(folder, name) if words in line
    ]


def _lines(folder: Path, name: str) -> list[str]:
    path = folder / f"{name}.txt"
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def main(arguments: Sequence[str]) -> int:
    import torch

    if not torch.cuda.is_available():
        print("error: torch sees no GPU; accullm doctor says why", file=sys.stderr)
        return 1
    end = time.monotonic() + LIMIT
    folder = Path(arguments[0]).resolve() if arguments else ROOT / "work" / "gpu_check"
    folder.mkdir(parents=True, exist_ok=True)
    major, minor = torch.cuda.get_device_capability(0)
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}; output in {folder}")
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer: not installed, left out")
    if not (ROOT / DEMO / "config.json").exists():
        print(f"demo: {DEMO} is missing (make demo prepares it), left out")
    results = [run(step, folder, end - time.monotonic()) for step in steps(10 * major + minor, sanitizer, folder)]
    print("\n".join(figures(folder)))
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
