"""The bytes that rounding writes, pinned: changed bytes need a new VERSION in accullm_cli/stages/quantize.py.

A run directory counts a finished block as good as long as VERSION stands, so code that writes other bytes under the
same version would mix two algorithms in one artifact. When a test here fails and the change is meant: raise VERSION,
and write it and the new hash into PINNED.

All sums of the problem below are exact in float32: Hessians are U S U^T with few, dyadic entries, weights are small
multiples of a power of two, and so are the scales (but where a grid is searched). So the bytes hold on any CPU and for
any number of threads; the tests compute everything in float64, too, which must give the same.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from accullm_cli.formats.shards import write_shard
from accullm_cli.quant.plan import LinearPlan
from accullm_cli.quant.rounding import RoundingOptions, round_linears
from accullm_cli.stages.quantize import VERSION

ROWS, ROUNDED, GROUP_SIZE = 4, 16, 8
STEP = 2.0**-4  # the scale that the weights are made for
RIDGE = 0.25


def dyadic(*shape: int, seed: int, low: int, high: int, unit: float) -> torch.Tensor:
    """Multiples of `unit` from low to high, by a rule that no library's random numbers can change: float64."""
    count = int(torch.tensor(shape).prod())
    numbers, state = [], seed
    for _ in range(count):
        state = (state * 1103515245 + 12345) % 2**31
        numbers.append(low + (state >> 16) % (high - low + 1))
    return torch.tensor(numbers, dtype=torch.float64).view(shape) * unit


def exact_factors() -> torch.Tensor:
    """U S U^T [16, 16] with a falling diagonal, in the order of rounding; its Cholesky factor is dyadic, too."""
    upper = torch.eye(ROUNDED, dtype=torch.float64)
    for k in range(ROUNDED - 1):
        # Falling within each four, whose S is equal, so that the diagonal falls.
        size = 1.0 - 0.25 * (k % 4)
        upper[k, k + 1] = size if k % 4 < 3 else 0.25
        if k + 4 < ROUNDED:
            upper[k, k + 4] = size if k % 2 else -size
    sizes = torch.tensor([256.0] * 4 + [64.0] * 4 + [16.0] * 4 + [4.0] * 4, dtype=torch.float64)
    return upper @ sizes.diag() @ upper.T


class Problem:
    """Weight, Hessian and pull, with outliers left out of the factorization or last in it."""

    def __init__(self, untouched: bool, span: float = 15, corrected: bool = True) -> None:
        """`span`: the steps that the target's range covers in every group, such that the scale is STEP."""
        self.outliers = (3, 9, 17) if untouched else (2, 5, 11)
        self.columns = ROUNDED + 3 if untouched else ROUNDED
        damped = exact_factors()
        rest = [column for column in range(self.columns) if column not in self.outliers]
        # Which feature comes when: a fixed shuffle; compensating outliers at the end, in another order than by index.
        shuffled = [rest[(7 * k + 3) % len(rest)] for k in range(len(rest))]
        order = torch.tensor(shuffled if untouched else [*shuffled, 5, 11, 2])
        self.hessian = torch.zeros(self.columns, self.columns, dtype=torch.float64)
        if untouched:
            coupling = dyadic(self.columns, self.columns, seed=1, low=-8, high=8, unit=4.0)
            self.hessian += coupling + coupling.T + 4096 * torch.eye(self.columns)
        self.hessian[order[:, None], order] = damped - RIDGE * torch.eye(ROUNDED)
        self.damping = RIDGE / float(self.hessian[order, order].mean())

        target = dyadic(ROWS, self.columns, seed=2, low=-12, high=13, unit=STEP / 4) + STEP / 32
        for start in range(0, self.columns, GROUP_SIZE):
            low, high = [column for column in rest if start <= column < start + GROUP_SIZE][:2]
            target[:, low] = -4 * STEP
            target[:, high] = (span - 4) * STEP
        target[:, list(self.outliers)] += STEP / 8192  # so that none lies between two values of bfloat16
        # W* = W + W P with W P = C^T H^-1. P moves two sources into two other columns, so (I + P)^-1 = I - P.
        shift = torch.zeros(self.columns, self.columns, dtype=torch.float64)
        if corrected:
            shift[self.outliers[0], rest[4]] = 0.5
            shift[rest[2], rest[6]] = -0.25
        self.weight = target - target @ shift
        self.pull = torch.zeros(self.columns, ROWS, dtype=torch.float64)
        self.pull[order] = damped @ (self.weight @ shift)[:, order].T

    def rounded(self, method: str, mode: str, dtype: torch.dtype, **plan) -> dict[str, torch.Tensor]:
        layout = LinearPlan(
            "a", ROWS, self.columns, plan.get("bits", 4), GROUP_SIZE, plan.get("symmetric", False), self.outliers,
            scale_bits=plan.get("scale_bits", 16), encoding=plan.get("encoding", "integer"),
        )  # fmt: skip
        grid = plan.get("grid", "minmax")
        options = RoundingOptions(method, mode, damping=self.damping, grid=grid, seed=2**40 + 5)
        result = round_linears(
            {"a": self.weight.to(dtype)},
            {"a": layout},
            options,
            torch.bfloat16,
            self.hessian.to(dtype),
            {"a": self.pull.to(dtype)},
        )["a"]
        assert result.records == ()
        return result.linear.to_tensors()


def sha256_of(tensors: dict[str, torch.Tensor]) -> str:
    """Over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(bytes(tensor.contiguous().flatten().view(torch.uint8).tolist()))
    return digest.hexdigest()


@dataclass(frozen=True)
class Case:
    method: str
    untouched: bool
    problem: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)

    def made(self) -> Problem:
        return Problem(self.untouched, **self.problem)

    def rounded(self, problem: Problem, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return problem.rounded(self.method, "untouched" if self.untouched else "compensating", dtype, **self.plan)


# Stochastic rounding chooses its scale such that a last bit of a corrected target could make it another one.
UNCORRECTED = {"span": 14, "corrected": False}
LEVELS = {"encoding": "levels", "symmetric": True, "bits": 3}
TRELLIS = LEVELS | {"encoding": "trellis"}
CASES = {
    "nearest": Case("nearest", True, {"corrected": False}),
    "nearest, searched": Case("nearest", True, {"corrected": False}, {"grid": "search", "bits": 3}),
    "feedback, untouched": Case("feedback", True),
    "feedback, compensating": Case("feedback", False),
    "feedback, searched": Case("feedback", True, {}, {"grid": "search", "bits": 3}),
    "feedback, fitted": Case("feedback", True, {}, {"grid": "fit", "bits": 3}),
    "feedback, symmetric": Case("feedback", True, {"span": 11.5}, {"symmetric": True}),
    "nearest, levels": Case("nearest", True, {"corrected": False}, LEVELS | {"grid": "search"}),
    "feedback, levels": Case("feedback", True, {}, LEVELS | {"grid": "fit", "scale_bits": 5}),
    "nearest, trellis": Case("nearest", True, {"corrected": False}, TRELLIS | {"grid": "search"}),
    "feedback, trellis": Case("feedback", True, {}, TRELLIS | {"grid": "fit", "scale_bits": 5}),
    "stochastic, untouched": Case("stochastic", True, UNCORRECTED),
    "stochastic, compensating": Case("stochastic", False, UNCORRECTED),
}
# The version of the quantize stage, and the SHA-256 of what it writes.
PINNED = {
    "nearest": (6, "364c8400808cbba90be42ec6fe7953f34fb9d39dc4fdf3473840eb4a25a03c21"),
    "nearest, searched": (6, "8c1f914032a887e54e3b3b29d845a6fb4bfaf2bd2aaae9182db0fa5349281b0f"),
    "feedback, untouched": (6, "20387806bab8812716fd404ef9f51347ac34ec776fadd90fdd876f35687aa55c"),
    "feedback, compensating": (6, "ead971d9e0a85ade959b458a3bae216558b63493674b12b414c1e54b510676da"),
    "feedback, searched": (6, "80658225229db0d75be86cb58a2be61ff1228d35f295208439165c0cd7fb0bb3"),
    "feedback, fitted": (6, "f564ed0b4bdda330db0ffd1e81452d67ee07db8a7369a158952d04196d4587d9"),
    "feedback, symmetric": (6, "2b908f71040eb92e4d5af24fb7bd28199d207b8aae61f438189a58eb98dfdaaa"),
    "nearest, levels": (6, "2cb359e096f7c640d84f44c8421f9103d458947fafad7970729c448de6321121"),
    "feedback, levels": (6, "26499060d25d4d605d536d52a4a15e06dea07762c15b91352c280a50d101d7c4"),
    "nearest, trellis": (6, "db1c26c45f04704d205e1cbdb2f344bf0adc43917676c18f96f1f644efa03014"),
    "feedback, trellis": (6, "7db1e6a937a16adca682cea3b790892eecd4a6355fc72238f86163bd603baba9"),
    "stochastic, untouched": (6, "53ea3e1b3512b5e1ac8f8051ae12b61879fed475bca8e50fc14ad50f1f0ae7a5"),
    "stochastic, compensating": (6, "97f4a32cbf6bacc8e51071bd9be31ac789dea8e9f3c43accb2650cf3adc0dfd4"),
}
PINNED_SHARD = (6, "82e5ea8cbc295b0553761772b9661f67b4c02d4fa34b2100addad0770164fa4d")


@pytest.mark.parametrize("name", CASES)
def test_rounding_writes_the_pinned_bytes(name):
    case = CASES[name]
    found = sha256_of(case.rounded(case.made(), torch.float32))
    assert found == sha256_of(case.rounded(case.made(), torch.float64))
    assert (VERSION, found) == PINNED[name], "raise VERSION in stages/quantize.py and pin both here"


@pytest.mark.parametrize("name", CASES)
def test_pinned_bytes_do_not_hang_on_a_last_bit(name):
    case = CASES[name]
    exact = sha256_of(case.rounded(case.made(), torch.float64))
    for seed in range(5):
        shaken = case.made()
        noise = 1 + dyadic(shaken.columns, shaken.columns, seed=seed, low=-64, high=64, unit=1e-8)
        shaken.hessian = shaken.hessian * (noise + noise.T) / 2
        shaken.pull = shaken.pull * (1 + dyadic(shaken.columns, ROWS, seed=seed, low=-64, high=64, unit=1e-8))
        assert sha256_of(case.rounded(shaken, torch.float64)) == exact


@pytest.mark.parametrize("mode", ["untouched", "compensating"])
def test_the_pinned_problem_is_exact(mode):
    problem = Problem(mode == "untouched")
    for matrix in (problem.weight, problem.hessian, problem.pull):
        assert torch.equal(matrix.float().double(), matrix)
    assert torch.equal(problem.hessian, problem.hessian.T)
    diagonal = exact_factors().diagonal()
    assert (diagonal[:-1] > diagonal[1:]).all()
    tensors = problem.rounded("feedback", mode, torch.float32)
    assert tensors["scales"].unique().tolist() == [STEP]
    # Feedback had a say.
    assert not torch.equal(tensors["qweight"], problem.rounded("nearest", mode, torch.float32)["qweight"])


def test_a_shard_has_the_pinned_bytes(tmp_path: Path):
    path = tmp_path / "block-00000.safetensors"
    tensors = Problem(True).rounded("feedback", "untouched", torch.float32)
    named = {f"model.layers.0.a.{suffix}": tensor for suffix, tensor in tensors.items()}
    write_shard(path, {"model.layers.0.norm.weight": torch.ones(3, dtype=torch.bfloat16), **named})
    found = (VERSION, hashlib.sha256(path.read_bytes()).hexdigest())
    assert found == PINNED_SHARD, "raise VERSION in stages/quantize.py and pin both here"
