"""The loops of rounding as CUDA kernels, on the CPU: against exact numbers, and against the compiled ones."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accullm_cli.errors import AccullmError
from accullm_cli.kernels.rounding import (
    chain_descent_launch,
    chains_launch,
    cuda_loops,
    curvature_of,
    descent_launch,
    tile_launch,
    with_tensors,
)
from accullm_cli.quant.grid import Grid
from accullm_cli.quant.loops import COMPILED, ChainDescent, ChainTile, Chance, CodeDescent, CodeTile
from accullm_cli.quant.philox import uniform
from accullm_cli.quant.plan import LinearPlan
from accullm_cli.quant.rounding import RoundingOptions, round_linears
from accullm_cli.quant.trellis import is_chain, places_of_codes
from tests.cuda_emulation import BACKWARDS, FORWARDS, SHUFFLED, emulate, guarded, needs_compiler, poisoned, run
from tests.quant.references import correlated_problem
from tests.test_pinned import CASES, PINNED, Case, sha256_of

GROUP_SIZE = 16
DTYPES = st.sampled_from([torch.float32, torch.float64])
ORDERS = st.sampled_from([FORWARDS, BACKWARDS, SHUFFLED])
KINDS = st.sampled_from(["steps", "levels", "stochastic"])
AMPLE = 99 * 1024  # bytes of shared memory
EMULATED = cuda_loops(torch.device("cpu"), lambda what, device: emulate(what), AMPLE)

# -- a tile of feedback ------------------------------------------------------------------------------------


def random_tile(
    columns: int,
    rows: int,
    dtype: torch.dtype,
    seed: int,
    exact: bool = False,
    stochastic: bool = False,
    levels: bool = False,
) -> CodeTile:
    """With `exact`, numbers whose sums need few bits, many of them ties between two codes."""
    draw = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> torch.Tensor:
        if exact:
            return torch.randint(-12, 13, shape, generator=draw).to(dtype) / 2
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    features = columns + 9
    groups = -(-features // GROUP_SIZE)
    if exact:
        # Half the columns feed nothing: otherwise errors would grow until float32 cannot hold them.
        upper = torch.randint(-1, 2, (columns, columns), generator=draw).to(dtype) / 2
        upper[torch.arange(columns)[:, None] + 3 < torch.arange(columns)] = 0
        scale = 2.0 ** torch.randint(-1, 2, (rows, groups), generator=draw).to(dtype)
    else:
        upper = matrix(columns, columns) / 8
        scale = torch.rand(rows, groups, generator=draw, dtype=torch.float64).half().to(dtype) / 4 + 0.125
    if not stochastic:
        scale *= sign_of(draw, rows, groups)
    feature = torch.randperm(features, generator=draw)[:columns]
    share = torch.rand(rows, columns, generator=draw, dtype=torch.float64).to(dtype)
    return CodeTile(
        wanted=guarded(matrix(rows, columns)),
        fed=guarded(matrix(rows, columns) / 4),
        upper=guarded(torch.where(torch.ones_like(upper).triu(1).bool(), upper, torch.nan)),
        scale=guarded(scale),
        zero=guarded(torch.randint(0, 16, (rows, groups), generator=draw).to(dtype)),
        group=guarded(feature // GROUP_SIZE),
        largest_code=15,
        chance=Chance(guarded(share), 0x123456789ABCDEF, 0x89ABCDEF, guarded(feature)) if stochastic else None,
        levels=guarded(LEVELS.to(dtype)) if levels else None,
    )


LEVELS = torch.tensor([-9.0, -7.0, -5.5, -4.0, -3.0, -2.0, -1.5, -1.0, 0.5, 1.0, 1.5, 2.0, 4.0, 5.0, 6.0, 7.0])


def sign_of(draw: torch.Generator, rows: int, groups: int) -> torch.Tensor:
    """1 and -1: scales may be negative."""
    return torch.randint(0, 2, (rows, groups), generator=draw) * 2 - 1


def tensors_of(*values: object) -> list[torch.Tensor]:
    return [part for value in values for part in vars(value).values() if isinstance(part, torch.Tensor)]


def rounded_tile(tile: CodeTile, order: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and errors of the kernel; `tile.fed` as it leaves it."""
    codes, error = poisoned(*tile.fed.shape, dtype=torch.uint8), poisoned(*tile.fed.shape, dtype=tile.fed.dtype)
    buffers = [*tensors_of(tile), codes, error, *(tensors_of(tile.chance) if tile.chance else ())]
    run(tile_launch(tile, codes, error), buffers, order)
    return codes, error


def check_against_exact_numbers(tile: CodeTile, codes: torch.Tensor, error: torch.Tensor, slack: float) -> None:
    """Every code and error follows, within `slack` codes, from the errors that the kernel reports.

    Args:
        tile: as it was before.
    """
    rows, columns = tile.wanted.shape
    errors = [[Fraction(value) for value in row] for row in error.tolist()]
    upper = [[Fraction(tile.upper[i, k].item()) for k in range(columns) if i < k] for i in range(columns)]
    noise = None
    if tile.chance is not None:
        noise = uniform(tile.chance.seed, tile.chance.stream, tile.chance.features.cpu(), rows).double().tolist()
    for n in range(rows):
        for k in range(columns):
            wanted = Fraction(tile.wanted[n, k].item())
            fed = Fraction(tile.fed[n, k].item()) + sum(errors[n][i] * upper[i][k - i - 1] for i in range(k))
            group = int(tile.group[k])
            scale, zero = Fraction(tile.scale[n, group].item()), Fraction(tile.zero[n, group].item())
            code = int(codes[n, k])
            point = code - zero if tile.levels is None else Fraction(tile.levels[code].item())
            assert abs(float(wanted - point * scale - errors[n][k])) <= slack
            if tile.levels is not None:
                distances = [abs(float((wanted + fed) / scale) - level) for level in LEVELS.tolist()]
                assert distances[code] <= min(distances) + slack / abs(float(scale))
                continue
            if noise is None:
                position = float((wanted + fed) / scale + zero)
                nearest = round(min(max(position, -0.4), 15.4))  # Python rounds halves to even, as torch does
                assert code == nearest or (slack and abs(position - (code + nearest) / 2) < slack)
                continue
            assert tile.chance is not None
            place = wanted / scale + zero
            room = max(min(place, 15 - place), Fraction(0))
            received = fed / scale * Fraction(tile.chance.share[n, k].item())
            drawn = float(place + min(max(received, -room), room)) + noise[k][n]
            lower, upper_code = (min(max(int(bound // 1), 0), 15) for bound in (drawn - slack, drawn + slack))
            assert lower <= code <= upper_code


@needs_compiler
@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(1, 19), DTYPES, ORDERS, KINDS, st.integers(0, 999))
def test_every_column_follows_from_the_errors_before_it(
    columns: int, rows: int, dtype: torch.dtype, order: int, kind: str, seed: int
) -> None:
    tile = random_tile(columns, rows, dtype, seed, stochastic=kind == "stochastic", levels=kind == "levels")
    before = replace(tile, fed=tile.fed.clone())
    codes, error = rounded_tile(tile, order)
    check_against_exact_numbers(before, codes, error, slack=1e-3 if dtype == torch.float32 else 1e-9)


@needs_compiler
@settings(deadline=None, max_examples=40)
@given(st.integers(1, 128), st.integers(1, 19), DTYPES, ORDERS, KINDS, st.integers(0, 999))
def test_a_tile_is_that_of_the_compiled_loop_bit_for_bit(
    columns: int, rows: int, dtype: torch.dtype, order: int, kind: str, seed: int
) -> None:
    tile = random_tile(columns, rows, dtype, seed, stochastic=kind == "stochastic", levels=kind == "levels")
    compiled = replace(tile, fed=tile.fed.clone())
    wanted_codes, wanted_error = COMPILED.round_tile(compiled)
    codes, error = rounded_tile(tile, order)
    assert torch.equal(codes, wanted_codes)
    assert torch.equal(error, wanted_error)
    assert torch.equal(tile.fed, compiled.fed)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_go_to_the_even_code(dtype: torch.dtype) -> None:
    tile = random_tile(96, 30, dtype, seed=3, exact=True)
    before = replace(tile, fed=tile.fed.clone())
    check_against_exact_numbers(before, *rounded_tile(tile, FORWARDS), slack=0)
    group = int(tile.group[0])
    place = (tile.wanted[:, 0] + before.fed[:, 0]) / tile.scale[:, group] + tile.zero[:, group]
    assert bool(((place - place.floor()) == 0.5).any()), "no tie was tried"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"wanted": torch.zeros(2, 129)}, "no CUDA kernel rounds 129 columns at once: 128 at most"),
        ({"wanted": torch.zeros(2, 2).half()}, "no CUDA kernel rounds in torch.float16: float32 or float64"),
    ],
)
def test_what_the_kernel_does_not_know_is_refused_by_name(change: dict[str, Any], line: str) -> None:
    tile = replace(random_tile(2, 2, torch.float32, seed=0), **change)
    with pytest.raises(AccullmError) as caught:
        tile_launch(tile, torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(2, 2))
    assert caught.value.line() == line


# -- descent ------------------------------------------------------------------------------------


def random_descent(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    seed: int,
    exact: bool = False,
    levels: bool = False,
    rows_feed: bool = False,
) -> CodeDescent:
    """With `exact`, whole numbers and powers of two whose sums need few bits, many of them ties between two codes."""
    draw = torch.Generator().manual_seed(seed)
    groups = -(-columns // GROUP_SIZE)
    codes = torch.randint(0, 8, (rows, columns), generator=draw, dtype=torch.uint8)
    if exact:
        hessian = torch.randint(-1, 2, (columns, columns), generator=draw).to(dtype)
        hessian = hessian.triu(1) + hessian.triu(1).T
        hessian[(torch.arange(columns)[:, None] - torch.arange(columns)).abs() > 2] = 0
        hessian += torch.diag(2.0 ** torch.randint(1, 3, (columns,), generator=draw)).to(dtype) - 0.5 * torch.eye(
            columns
        )
        scale = 2.0 ** torch.randint(-1, 2, (rows, groups), generator=draw).to(dtype)
        error, ridge = torch.randint(-8, 9, (rows, columns), generator=draw).to(dtype) / 4, 0.5
    else:
        inputs = torch.randn(2 * columns, columns, generator=draw, dtype=torch.float64)
        inputs += torch.randn(2 * columns, 1, generator=draw, dtype=torch.float64)
        hessian = (inputs.T @ inputs / len(inputs)).to(dtype)
        scale = torch.rand(rows, groups, generator=draw, dtype=torch.float64).half().to(dtype) / 4 + 0.125
        error, ridge = torch.randn(rows, columns, generator=draw, dtype=torch.float64).to(dtype) / 8, 0.03
    scale *= sign_of(draw, rows, groups)
    dead = torch.rand(columns, generator=draw) < 0.1  # nothing reads these, so that nothing is gained there
    hessian[dead] = 0
    hessian[:, dead] = 0
    product, coupled = error @ hessian + ridge * error, None
    if rows_feed:
        gradients = torch.randn(2 * rows, rows, generator=draw, dtype=torch.float64)
        gradients += torch.randn(2 * rows, 1, generator=draw, dtype=torch.float64)
        fisher = (gradients.T @ gradients / len(gradients)).to(dtype)
        coupled = (guarded(fisher @ product), guarded(fisher))
    return CodeDescent(
        codes=guarded(codes),
        error=guarded(error),
        product=guarded(product),
        hessian=guarded(hessian),
        ridge=ridge if exact or seed % 2 else 0.0,
        grid=Grid(guarded(scale), torch.zeros_like(scale), 3, GROUP_SIZE, False),
        movable=torch.rand(columns, generator=draw) < 0.9,
        sweeps=3,
        rows=coupled,
        levels=guarded(LEVELS[4:12].to(dtype)) if levels else None,
    )


def swept(rows: CodeDescent, order: int, shared_bytes: int = AMPLE) -> None:
    curvature = guarded(curvature_of(rows))
    buffers = [part for part in tensors_of(rows) if part is not rows.movable] + list(rows.rows or ())
    run(descent_launch(rows, curvature, shared_bytes), [*buffers, curvature, rows.grid.scale], order)


def copied(task: Any) -> Any:
    return with_tensors(task, torch.Tensor.clone)


@needs_compiler
@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 5), st.integers(1, 60), DTYPES, ORDERS, st.sampled_from([AMPLE, 64]), st.booleans(), st.booleans(),
    st.integers(0, 999),
)  # fmt: skip
def test_a_descent_is_that_of_the_compiled_loop_bit_for_bit(
    rows: int, columns: int, dtype: torch.dtype, order: int, shared_bytes: int, levels: bool, rows_feed: bool, seed: int
) -> None:
    there = random_descent(rows, columns, dtype, seed, levels=levels, rows_feed=rows_feed)
    here, before = copied(there), there.codes.clone()
    COMPILED.descend(here)
    swept(there, order, shared_bytes)
    assert torch.equal(there.codes, here.codes)
    assert torch.equal(there.error, here.error)
    assert torch.equal(there.codes[:, ~there.movable], before[:, ~there.movable])
    if there.rows is not None and here.rows is not None:
        assert torch.equal(there.product, here.product)


@needs_compiler
@pytest.mark.parametrize("shared_bytes", [AMPLE, 64])
@pytest.mark.parametrize("order", [FORWARDS, BACKWARDS, SHUFFLED])
@pytest.mark.parametrize("rows_feed", [False, True])
def test_a_row_longer_than_a_block_of_threads(rows_feed: bool, order: int, shared_bytes: int) -> None:
    there = random_descent(2, 600, torch.float32, seed=1, rows_feed=rows_feed)
    here, before = copied(there), there.codes.clone()
    COMPILED.descend(here)
    swept(there, order, shared_bytes)
    assert torch.equal(there.codes, here.codes)
    assert torch.equal(there.error, here.error)
    assert bool((there.codes != before)[:, 512:].any()), "the last columns were to move, too"


@needs_compiler
@pytest.mark.parametrize("mover", [0, 255, 256, 511, 512, 599])
def test_one_column_alone_moves(mover: int) -> None:
    error = torch.zeros(1, 600)
    error[0, mover] = -2.0
    grid = Grid(guarded(torch.ones(1, 38)), torch.zeros(1, 38), 3, GROUP_SIZE, False)
    codes, movable = torch.full((1, 600), 3, dtype=torch.uint8), torch.ones(600, dtype=torch.bool)
    identity = guarded(torch.eye(600))
    rows = CodeDescent(
        codes=guarded(codes), error=guarded(error), product=guarded(error), hessian=identity, ridge=0.0, grid=grid,
        movable=movable, sweeps=1,
    )  # fmt: skip
    swept(rows, FORWARDS)
    wanted = codes.clone()
    wanted[0, mover] = 1
    assert torch.equal(rows.codes, wanted)
    assert not bool(rows.error.any())


def swept_one_by_one(rows: CodeDescent) -> list[list[int]]:
    """The codes after the same sweeps in exact numbers, the slope of a column taken anew from all errors each time."""
    count, columns = rows.codes.shape
    hessian = [[Fraction(value) for value in row] for row in rows.hessian.tolist()]
    for k in range(columns):
        hessian[k][k] += Fraction(rows.ridge)
    codes, errors = rows.codes.tolist(), [[Fraction(value) for value in row] for row in rows.error.tolist()]
    for n in range(count):
        for _ in range(rows.sweeps):
            for k in range(columns):
                scale = Fraction(rows.grid.scale[n, k // GROUP_SIZE].item())
                if not rows.movable[k] or hessian[k][k] <= 0:
                    continue
                slope = sum(errors[n][j] * hessian[j][k] for j in range(columns))
                if rows.levels is None:
                    code = min(max(codes[n][k] + round(slope / (hessian[k][k] * scale)), 0), rows.grid.largest_code)
                    errors[n][k] -= (code - codes[n][k]) * scale
                else:
                    levels = [Fraction(level) for level in rows.levels.tolist()]
                    place = levels[codes[n][k]] + slope / (hessian[k][k] * scale)
                    code = min(range(len(levels)), key=lambda own: (abs(place - levels[own]), own))
                    errors[n][k] -= (levels[code] - levels[codes[n][k]]) * scale
                codes[n][k] = code
    return codes


@needs_compiler
@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 24), DTYPES, ORDERS, st.booleans(), st.integers(0, 999))
def test_codes_move_as_one_after_the_other_in_exact_numbers(
    rows: int, columns: int, dtype: torch.dtype, order: int, levels: bool, seed: int
) -> None:
    there = random_descent(rows, columns, dtype, seed, exact=True, levels=levels)
    wanted = swept_one_by_one(there)
    swept(there, order)
    assert there.codes.tolist() == wanted


# -- a trellis -------------------------------------------------------------------------------------------------

ABOVE_ZERO = torch.tensor([0.0, 2.0, 3.0, 5.0, 7.0, 11.0, 16.0, 31.0])
TRELLIS_LEVELS = torch.cat([-ABOVE_ZERO.flip(0), ABOVE_ZERO])


def trellis_tile(columns: int, rows: int, dtype: torch.dtype, seed: int) -> ChainTile:
    tile = random_tile(columns, rows, dtype, seed)
    return ChainTile(
        wanted=guarded(tile.wanted * 4), fed=tile.fed, upper=tile.upper, scale=tile.scale, group=tile.group,
        levels=guarded(TRELLIS_LEVELS.to(dtype)),
    )  # fmt: skip


def trellis_descent(rows: int, columns: int, dtype: torch.dtype, seed: int) -> ChainDescent:
    parts = vars(random_descent(rows, columns, dtype, seed))
    codes = torch.randint(0, 8, (rows, columns), generator=torch.Generator().manual_seed(seed))
    parts["codes"] = guarded(places_of_codes(codes.to(torch.uint8)))
    return ChainDescent(**{**parts, "levels": guarded(TRELLIS_LEVELS.to(dtype) / 4), "rows": None})


@needs_compiler
@settings(deadline=None, max_examples=12)
@given(st.integers(1, 12), st.sampled_from([1, 2, 19, 255, 256, 257, 300]), DTYPES, ORDERS, st.integers(0, 999))
def test_chains_of_a_tile_are_those_of_the_compiled_loop_bit_for_bit(
    columns: int, rows: int, dtype: torch.dtype, order: int, seed: int
) -> None:
    tile = trellis_tile(columns, rows, dtype, seed)
    compiled = replace(tile, fed=tile.fed.clone())
    wanted_codes, wanted_error = COMPILED.round_tile(compiled)
    codes, error = poisoned(rows, columns, dtype=torch.uint8), poisoned(rows, columns, dtype=dtype)
    run(chains_launch(tile, codes, error), [*tensors_of(tile), codes, error], order)
    assert is_chain(codes)
    assert torch.equal(codes, wanted_codes)
    assert torch.equal(error, wanted_error)
    assert torch.equal(tile.fed, compiled.fed)


@needs_compiler
@settings(deadline=None, max_examples=12)
@given(st.sampled_from([1, 5, 256, 270]), st.integers(1, 40), DTYPES, ORDERS, st.integers(0, 999))
def test_a_descent_of_chains_is_that_of_the_compiled_loop_bit_for_bit(
    rows: int, columns: int, dtype: torch.dtype, order: int, seed: int
) -> None:
    there = trellis_descent(rows, columns, dtype, seed)
    here, before = copied(there), there.codes.clone()
    COMPILED.descend(here)
    curvature = guarded(curvature_of(there))
    buffers = [part for part in tensors_of(there) if part is not there.movable]
    run(chain_descent_launch(there, curvature), [*buffers, curvature, there.grid.scale], order)
    assert torch.equal(there.codes, here.codes)
    assert torch.equal(there.error, here.error)
    assert torch.equal(there.product, here.product)
    assert torch.equal(there.codes[:, ~there.movable], before[:, ~there.movable])
    assert is_chain(there.codes)


# -- all of rounding ---------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_rounding_through_the_kernels_writes_the_pinned_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case: Case = CASES[name]
    launched = spied(monkeypatch)
    assert sha256_of(case.rounded(case.made(), torch.float32)) == PINNED[name][1]
    rounds, descends = "feedback_round", "descend"
    if case.plan.get("encoding") == "trellis":
        rounds, descends = "trellis_round", "trellis_descend"
    wanted = set() if case.method == "nearest" else {rounds}
    assert set(launched) == wanted | ({descends} if case.plan.get("grid") == "fit" else set())


def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`round_linears` as test_pinned calls it, through the kernels; the names of those that are launched."""
    from tests import test_pinned

    names: list[str] = []

    def launch(what: Any, device: torch.device) -> None:
        names.append(what.kernel)
        emulate(what)

    loops = cuda_loops(torch.device("cpu"), launch, AMPLE)
    monkeypatch.setattr(test_pinned, "round_linears", lambda *args: round_linears(*args, loops=loops))
    return names


@needs_compiler
@pytest.mark.parametrize(
    ("method", "encoding"), [("feedback", "integer"), ("feedback", "trellis"), ("stochastic", "integer")]
)
@pytest.mark.parametrize("mode", ["untouched", "compensating"])
@pytest.mark.parametrize("with_fisher", [False, True])
def test_the_codes_are_those_of_the_cpu(method: str, encoding: str, mode: str, with_fisher: bool) -> None:
    """The products around the kernels being the same, so are the bytes: in float32, with numbers that round."""
    problem = correlated_problem(21, 200, 600, seed=4)
    plan = LinearPlan("a", 21, 200, 4, 64, encoding == "trellis", (3, 70, 150), scale_bits=6, encoding=encoding)
    options = RoundingOptions(method, mode, seed=2**63 + 5)  # type: ignore[arg-type]
    gradients = torch.randn(60, 21, generator=torch.Generator().manual_seed(1))
    fishers = {"a": gradients.T @ gradients / 60} if with_fisher else {}

    def tensors(**loops: Any) -> dict[str, torch.Tensor]:
        arguments = {"a": problem.weight.float()}, {"a": plan}, options, torch.bfloat16, problem.hessian.float()
        found = round_linears(*arguments, {"a": problem.pull.float()}, fishers=fishers, **loops)
        return found["a"].linear.to_tensors()

    assert sha256_of(tensors(loops=EMULATED)) == sha256_of(tensors())
