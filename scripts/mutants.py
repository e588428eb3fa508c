"""Break the code on purpose, one line at a time, and see that a test turns red.

    python scripts/mutants.py [--quick] [WORD ...]      all mutants, or those whose file or reason contains each WORD

The mutants are edits of the kind that a test passes by unless it was written for them: a block's edge, a barrier, a
sign, a step too few. With --quick only those run whose tests take seconds. Each is applied to a copy of the checkout,
in which its tests run. First the same tests run without any mutant: one that is red already proves nothing. Exits
with 1 if a mutant survives, if its tests do not run, or if the line it changes is no longer there exactly once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = (".*", "work", "build", "dist", "__pycache__")
PARALLEL = 2
TIME_LIMIT = 180  # seconds for one mutant; the slowest takes a quarter of it

TESTS_FAILED = 1  # pytest's exit code; others mean that the tests did not run


@dataclass(frozen=True)
class Mutant:
    """One edit: `old`, which occurs once in `file`, becomes `new`; one of `tests` must fail."""

    why: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    quick: bool = False


FEEDBACK = "accullm_cli/quant/feedback.py"
LOOPS = "accullm_cli/quant/loops.py"
TRELLIS_TESTS = "tests/quant/test_trellis.py"
BLOCK_GRID = "accullm_cli/quant/encodings/ggml_grid.py"
BLOCK_SEARCH = "accullm_cli/quant/encodings/ggml_search.py"
PACKED = "accullm_cli/kernels/packed.py"
QUANTIZE = "accullm_cli/stages/quantize.py"
GEMV = "cuda/hybrid_gemv.cu"
PIECES = "cuda/pieces.cuh"
TRELLIS_KERNELS = "cuda/trellis.cu"

ROUNDING_TESTS = ("tests/quant/test_rounding.py",)
PACKED_TESTS = ("tests/kernels/test_packed.py",)
PRODUCT_TESTS = ("tests/kernels/test_launch.py",)
FED_CHAIN_TESTS = ("tests/kernels/test_fed_chains.py",)
KERNEL_ROUNDING_TESTS = ("tests/kernels/test_rounding.py",)

MUTANTS = (
    # -- rounding ------------------------------------------------------------------------------------------
    Mutant(
        "errors of earlier blocks of columns are not fed on",
        FEEDBACK,
        "fed = error[part, : columns.start] @ feedback[: columns.start]",
        "fed = 0 * (error[part, : columns.start] @ feedback[: columns.start])",
        ROUNDING_TESTS,
        quick=True,
    ),
    Mutant(
        "the error of the column just before is not fed on",
        LOOPS,
        "for j in range(k + 1, columns):\n                fed[n, j]",
        "for j in range(k + 2, columns):\n                fed[n, j]",
        ROUNDING_TESTS,
        quick=True,
    ),
    Mutant(
        "compensating columns do not see the errors of earlier blocks",
        FEEDBACK,
        "fed = torch.addmm(wanted[:, start:end], error[:, :start], feedback[:start])",
        "fed = wanted[:, start:end].clone()",
        ROUNDING_TESTS,
    ),
    Mutant(
        "compensating outliers are stored in the order of rounding",
        FEEDBACK,
        "kept[row_order] = compensating[:, torch.argsort(order[rounded_features:])]",
        "kept[row_order] = compensating",
        ROUNDING_TESTS,
    ),
    Mutant(
        "the target moves the wrong way",
        FEEDBACK,
        "rows[:, reverse] += torch.linalg",
        "rows[:, reverse] -= torch.linalg",
        ROUNDING_TESTS,
    ),
    Mutant(
        "of two levels that are as near the upper one is taken",
        LOOPS,
        "code += place + place > levels[above - 1] + levels[above]",
        "code += place + place >= levels[above - 1] + levels[above]",
        ("tests/quant/test_loops.py",),
    ),
    Mutant(
        "a trellis asks the wrong one of two rows above which half to choose from",
        "accullm_cli/quant/trellis.py",
        "return (codes ^ _above(bits, 2)) << 1 | _above(bits, 1)",
        "return (codes ^ _above(bits, 1)) << 1 | _above(bits, 2)",
        (TRELLIS_TESTS,),
        quick=True,
    ),
    Mutant(
        "one path into a state of a trellis is not looked at",
        "accullm_cli/quant/viterbi.py",
        "cost_0, cost_1 = min(into_0, from_2), min(into_1, via_2)",
        "cost_0, cost_1 = into_0, min(into_1, via_2)",
        (TRELLIS_TESTS,),
    ),
    Mutant(
        "all states of a trellis are fed what one of them missed",
        "accullm_cli/quant/viterbi.py",
        "fed[now, back[n, into], n + 1 : count]",
        "fed[now, 0, n + 1 : count]",
        (TRELLIS_TESTS,),
    ),
    Mutant(
        "segments of a trellis do not know what others missed",
        "accullm_cli/quant/descent.py",
        "from_others = fisher[part] @ product - fisher[part, part] @ product[part]",
        "from_others = 0 * (fisher[part] @ product - fisher[part, part] @ product[part])",
        (TRELLIS_TESTS,),
    ),
    Mutant(
        "sub-blocks are not told what those before them gained",
        BLOCK_GRID,
        "pull -= change @ inner[own]",
        "pull[:, own] -= change @ inner[own, own]",
        ("tests/quant/test_ggml_grid.py::test_scales_and_offsets_are_those_of_least_squares",),
    ),
    Mutant(
        "scales of blocks are tried with one sign alone",
        BLOCK_SEARCH,
        "for sign, one, other in ((1, first, last), (-1, -last, -first)):",
        "for sign, one, other in ((1, first, last), (1, first, last)):",
        ("tests/quant/test_ggml_grid.py::test_scales_of_either_sign_are_tried",),
    ),
    Mutant(
        "rows of earlier blocks pass nothing on",
        FEEDBACK,
        "passed_on = down[: part.start].T @ carried[: part.start, columns]",
        "passed_on = 0 * (down[: part.start].T @ carried[: part.start, columns])",
        ("tests/quant/test_row_feedback.py",),
    ),
    Mutant(
        "descent forgets what a changed code does to the slopes of other rows",
        LOOPS,
        "weight = fisher[m, n] * moved",
        "weight = fisher[m, n] * moved if m == n else 0 * moved",
        ("tests/quant/test_descent.py",),
    ),
    Mutant(
        "the drift has the wrong sign",
        "accullm_cli/quant/stats.py",
        "original_rows.to(rows.dtype) - rows",
        "rows - original_rows.to(rows.dtype)",
        ("tests/quant/test_stats.py",),
        quick=True,
    ),
    Mutant(
        "Philox stops a round early",
        "accullm_cli/quant/philox.py",
        "_ROUNDS = 10",
        "_ROUNDS = 9",
        ("tests/quant/test_stochastic.py",),
    ),
    # -- grids, codes and what is stored -------------------------------------------------------------------
    Mutant(
        "an asymmetric range need not include 0",
        "accullm_cli/quant/grid.py",
        "return padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0), size",
        "return padded.amin(-1), padded.amax(-1).clamp(min=0), size",
        ("tests/quant/test_grid.py",),
    ),
    Mutant(
        "the largest scale overflows in bfloat16",
        "accullm_cli/quant/scales.py",
        "LARGEST_BFLOAT16_SCALE = 65280.0",
        "LARGEST_BFLOAT16_SCALE = 65536.0",
        ("tests/quant/test_grid.py",),
    ),
    Mutant(
        "the zero point of symmetric codes is one too low",
        "accullm_cli/quant/linear.py",
        "return 2 ** (self.bits - 1)\n",
        "return 2 ** (self.bits - 1) - 1\n",
        ("tests/quant/test_linear.py",),
        quick=True,
    ),
    Mutant(
        "of two scales in a table the one that loses more is taken",
        "accullm_cli/quant/encodings/levels.py",
        "torch.where(self._error(lower) <= self._error(upper), lower, upper)",
        "torch.where(self._error(lower) >= self._error(upper), lower, upper)",
        ("tests/quant/test_levels.py",),
    ),
    Mutant(
        "a table of scales does not know where the energy is",
        "accullm_cli/quant/scales.py",
        "density = energy.new_zeros(DENSITY_BINS).index_add_(0, bins, energy)",
        "density = energy.new_zeros(DENSITY_BINS).index_add_(0, bins, energy.new_ones(energy.shape))",
        ("tests/quant/test_levels.py",),
    ),
    Mutant(
        "nibbles are swapped",
        "accullm_cli/quant/packing.py",
        "torch.stack((packed & 15, packed >> 4), dim=-1)",
        "torch.stack((packed >> 4, packed & 15), dim=-1)",
        ("tests/quant/test_packing.py",),
        quick=True,
    ),
    Mutant(
        "the last, partly filled byte is cut off",
        "accullm_cli/quant/packing.py",
        "return (count * bits + 7) // 8",
        "return max(1, count * bits // 8)",
        ("tests/quant/test_packing.py",),
        quick=True,
    ),
    Mutant(
        "zero points are packed along the groups",
        "accullm_cli/formats/pack_quantized.py",
        "to_words(pack(linear.zeros.T, linear.bits)).T.contiguous()",
        "to_words(pack(linear.zeros, linear.bits))",
        ("tests/formats/test_pack_quantized.py",),
    ),
    # -- run directory and measure -------------------------------------------------------------------------
    Mutant(
        "a file appears before its content is on the disk",
        "accullm_cli/run.py",
        "os.fsync(file.fileno())",
        "file.flush()",
        ("tests/test_run.py",),
    ),
    Mutant(
        "a block's key forgets the block before",
        QUANTIZE,
        '"input:block before": previous,',
        '"input:block before": "",',
        ("tests/end_to_end/test_block_chain.py",),
    ),
    Mutant(
        "the divergence is weighted by the artifact",
        "accullm_cli/measure/divergence.py",
        "kl.append(_kl(original, artifact, scratch))",
        "kl.append(_kl(artifact, original, scratch))",
        ("tests/measure/test_divergence.py",),
    ),
    Mutant(
        "damping is chosen on rows that feedback knows",
        FEEDBACK,
        "factor_hessian(rest, damping, outliers, compensating).expected_loss",
        "factor_hessian(hessian, damping, outliers, compensating).expected_loss",
        ("tests/quant/test_feedback_damping.py",),
    ),
    Mutant(
        "a few tokens with most of the squared gradient decide alone",
        "accullm_cli/quant/token_weights.py",
        ".clamp_max(1).float()",
        ".float()",
        ("tests/quant/test_token_weights.py",),
        quick=True,
    ),
    Mutant(
        "each part of a window draws from the same numbers",
        "accullm_cli/stages/gradients.py",
        "positions = first + torch.arange",
        "positions = torch.arange",
        ("tests/stages/test_gradients.py",),
    ),
    Mutant(
        "what is kept of a block on the device changes with what it was taken from",
        "accullm_cli/stages/streams.py",
        "self._kept[batch, name] = value.clone()",
        "self._kept[batch, name] = value",
        ("tests/stages/test_streams.py",),
        quick=True,
    ),
    Mutant(
        "results of another number of tokens at a time are taken for the same",
        "accullm_cli/stages/compute.py",
        "if self.tokens == TOKENS_PER_BATCH else",
        "if self.tokens else",
        ("tests/stages/test_device.py",),
        quick=True,
    ),
    # -- products on a CPU ---------------------------------------------------------------------------------
    Mutant(
        "weights in the middle between two of bfloat16 are rounded up",
        PACKED,
        "np.uint32(0x7FFF)",
        "np.uint32(0x8000)",
        PACKED_TESTS,
    ),
    Mutant(
        "the last group of a row is left out where it is short",
        PACKED,
        "range(min(half, octets - begin))",
        "range(half if half <= octets - begin else 0)",
        PACKED_TESTS,
    ),
    # -- CUDA kernels, run on the CPU ----------------------------------------------------------------------
    Mutant(
        "a tile is read before it has landed",
        GEMV,
        "        wait_for_copies<STAGES - 2>();\n        if (TRELLIS)",
        "        wait_for_copies<STAGES>();\n        if (TRELLIS)",
        PRODUCT_TESTS,
    ),
    Mutant(
        "warps do not wait for each other's sums",
        GEMV,
        "    }\n    __syncthreads();\n    u32* const flag",
        "    }\n    u32* const flag",
        PRODUCT_TESTS,
    ),
    Mutant(
        "a stage is filled while other warps still read it",
        "cuda/hybrid_gemm.cu",
        "        __syncthreads();\n        fetch(shared + before);\n        const u8* const stage",
        "        fetch(shared + before);\n        __syncthreads();\n        const u8* const stage",
        PRODUCT_TESTS,
    ),
    Mutant(
        "the last of several parts of K is not added",
        PIECES,
        "for (int split = 0; split < splits; split++) value +=",
        "for (int split = 0; split < splits - 1; split++) value +=",
        PRODUCT_TESTS,
    ),
    Mutant(
        "a path of a trellis goes on from what another one was fed",
        TRELLIS_KERNELS,
        "const real before = is_high ? value[low + 2] : value[low];",
        "const real before = value[low];",
        FED_CHAIN_TESTS,
    ),
    Mutant(
        "a chain goes on, behind 32 rows, as it would have from another state",
        TRELLIS_KERNELS,
        "turn > own; turn--) state =",
        "turn > own + 1; turn--) state =",
        FED_CHAIN_TESTS,
    ),
    Mutant(
        "rows behind add up what is not written yet",
        TRELLIS_KERNELS,
        "if (own == turn) walk(column, value, upper, rows, levels_count);\n        __syncthreads();",
        "if (own == turn) walk(column, value, upper, rows, levels_count);\n        __syncwarp();",
        FED_CHAIN_TESTS,
    ),
    Mutant(
        "the next column of a block is not told the error",
        "cuda/feedback_round.cu",
        "if (column > k && column < tile.columns)",
        "if (column > k + 1 && column < tile.columns)",
        (f"{KERNEL_ROUNDING_TESTS[0]}::test_a_tile_is_that_of_the_compiled_loop_bit_for_bit",),
    ),
)


def main(words: list[str]) -> int:
    quick, words = "--quick" in words, [word for word in words if word != "--quick"]
    mutants = [
        mutant
        for mutant in MUTANTS
        if (mutant.quick or not quick) and all(word in mutant.file + mutant.why for word in words)
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
