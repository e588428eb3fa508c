"""Break the code on purpose, one line at a time, and see that a test turns red.

    python scripts/mutants.py [WORD]      all mutants, or those whose file or reason contains WORD

Each mutant is applied to a copy of the checkout, in which its tests run. First the same tests run without any mutant:
one that is red already proves nothing. Exits with 1 if a mutant survives, if its tests do not run, or if the line it
changes is no longer there exactly once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutations import OF_THE_MATHEMATICS, Mutant
from mutations_rest import OF_THE_REST

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = (".*", "work", "build", "dist", "__pycache__")
PARALLEL = 2
TIME_LIMIT = 180  # seconds for one mutant; the slowest takes a quarter of it

TESTS_FAILED = 1  # pytest's exit code; others mean that the tests did not run


def main(words: list[str]) -> int:
    mutants = [
        mutant
        for mutant in (*OF_THE_MATHEMATICS, *OF_THE_REST)
        if all(word in mutant.file + mutant.why for word in words)
    ]
    misplaced = [mutant for mutant in mutants if (ROOT / mutant.file).read_text().count(mutant.old) != 1]
    for mutant in misplaced:
        print(f"{mutant.file}: does not hold this exactly once: {mutant.old.strip()}")
    if misplaced:
        return 1
    started = time.monotonic()
    verdict = run_tests(None, tuple(dict.fromkeys(test for mutant in mutants for test in mutant.tests)))
    if verdict != "survived":
        print(f"without any mutant, the tests must pass, but: {verdict}")
        return 1
    alive = 0
    with ThreadPoolExecutor(PARALLEL) as pool:
        for mutant, verdict in zip(mutants, pool.map(judge, mutants), strict=True):
            alive += verdict != "red"
            print(f"{verdict:10} {mutant.file.removeprefix('accullm_cli/'):30} {mutant.why}", flush=True)
    print(f"{len(mutants) - alive} of {len(mutants)} mutants turned a test red, in {time.monotonic() - started:.0f} s")
    return 1 if alive else 0


def judge(mutant: Mutant) -> str:
    return run_tests(mutant, mutant.tests)


def run_tests(mutant: Mutant | None, tests: tuple[str, ...]) -> str:
    """Run tests in a copy of the checkout: "red", "survived", or why they did not run."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as temporary:
        copy = Path(temporary) / "checkout"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_COPIED))
        if mutant is not None:
            path = copy / mutant.file
            path.write_text(path.read_text().replace(mutant.old, mutant.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        if mutant is None:
            command += ["-n", str(PARALLEL)]
        # One thread: as in `make test`. The copy comes first on the path, before an installed package.
        environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        try:
            ended = subprocess.run(
                command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT, check=False
            )
        except subprocess.TimeoutExpired:
            return "timed out"
        if ended.returncode in (0, TESTS_FAILED):
            if mutant is None and ended.returncode:
                print(ended.stdout[-3000:])
            return "red" if ended.returncode else "survived"
        print(ended.stdout[-2000:] + ended.stderr[-2000:])
        return f"pytest {ended.returncode}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
