"""The columns that cuda/feedback_round.cu rounds, on the CPU, against the textbook loop in exact numbers."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accullm_cli.errors import AccullmError
from accullm_cli.kernels.feedback import ColumnBlock, feedback_launch
from accullm_cli.quant.feedback import Factor, round_with_feedback
from accullm_cli.quant.grid import Grid
from accullm_cli.quant.philox import uniform
from tests.cuda_emulation import BACKWARDS, FORWARDS, SHUFFLED, guarded, needs_compiler, poisoned, run

GROUP_SIZE = 16


def random_block(
    columns: int, rows: int, rounded: int, dtype: torch.dtype, seed: int, exact: bool = False, stochastic: bool = False
) -> ColumnBlock:
    """A block of `columns` out of columns + 9 features; with `exact`, numbers whose sums need few bits, many of them
    ties between two codes."""
    draw = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> torch.Tensor:
        if exact:
            return torch.randint(-12, 13, shape, generator=draw).to(dtype) / 2
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    features = columns + 9
    groups = -(-features // GROUP_SIZE)
    if exact:
        # Half the columns feed nothing: otherwise errors would grow until float32 cannot hold them.
        feedback = torch.randint(-1, 2, (columns, columns), generator=draw).to(dtype) / 2
        feedback[torch.arange(columns)[:, None] + 3 < torch.arange(columns)] = 0
        scale = 2.0 ** torch.randint(-1, 2, (groups, rows), generator=draw).to(dtype)
    else:
        feedback = matrix(columns, columns) / 8
        scale = torch.rand(groups, rows, generator=draw, dtype=torch.float64).half().to(dtype) / 4 + 0.125
    feedback = torch.where(torch.ones_like(feedback).triu(1).bool(), feedback, torch.nan)
    feature = torch.randperm(features, generator=draw)[:columns].to(torch.int32)
    wanted = matrix(columns, rows)
    return ColumnBlock(
        fed=guarded(wanted + matrix(columns, rows) / 4),
        wanted=guarded(wanted),
        feedback=guarded(feedback),
        scale=guarded(scale),
        zero=guarded(torch.randint(0, 16, (groups, rows), generator=draw).to(dtype)),
        group=guarded(feature // GROUP_SIZE),
        feature=guarded(feature),
        share=guarded(torch.rand(columns, rows, generator=draw, dtype=torch.float64).to(dtype)) if stochastic else None,
        codes=poisoned(features, rows, dtype=torch.uint8),
        error=poisoned(columns, rows, dtype=dtype),
        kept=poisoned(columns - rounded, rows, dtype=dtype),
        rounded=rounded,
        largest_code=15,
        source_dtype=torch.bfloat16,
        generator=(0x123456789ABCDEF, 0x89ABCDEF),
    )


def launched(block: ColumnBlock, order: int) -> None:
    run(feedback_launch(block), [part for part in vars(block).values() if isinstance(part, torch.Tensor)], order)


def check_against_exact_numbers(block: ColumnBlock, slack: float) -> None:
    """Every code, error and kept value follows, within `slack` codes, from the errors that the kernel reports."""
    columns, rows = block.wanted.shape
    error = [[Fraction(value) for value in row] for row in block.error.tolist()]
    feedback = [
        [Fraction(block.feedback[i, k].item()) if i < k else Fraction(0) for k in range(columns)]
        for i in range(columns)
    ]
    feature = block.feature.tolist()
    noise = None
    if block.share is not None:
        noise = uniform(*block.generator, block.feature.long(), rows).double().tolist()
    for k in range(columns):
        for n in range(rows):
            wanted = Fraction(block.wanted[k, n].item())
            value = Fraction(block.fed[k, n].item()) + sum(error[i][n] * feedback[i][k] for i in range(k))
            if k >= block.rounded:
                kept = block.kept[k - block.rounded, n].item()
                unit = abs(float(value)) * 2.0**-8 + 2.0**-100
                assert abs(kept - float(value)) <= unit * (1 + 1e-4) + slack
                assert kept == torch.tensor(kept).to(block.source_dtype).item()
                assert abs(float(wanted - Fraction(kept) - error[k][n])) <= slack
                continue
            group = int(block.group[k])
            scale, zero = Fraction(block.scale[group, n].item()), Fraction(block.zero[group, n].item())
            code = int(block.codes[feature[k], n])
            assert abs(float(wanted - (code - zero) * scale - error[k][n])) <= slack
            if noise is None:
                position = float(value / scale + zero)
                nearest = round(min(max(position, -0.4), 15.4))  # Python rounds halves to even, as torch does
                assert code == nearest or (slack and abs(position - (code + nearest) / 2) < slack)
                continue
            assert block.share is not None
            place = wanted / scale + zero
            room = max(min(place, 15 - place), Fraction(0))
            fed = (value - wanted) / scale * Fraction(block.share[k, n].item())
            drawn = float(place + min(max(fed, -room), room)) + noise[k][n]
            lower, upper = (min(max(int(bound // 1), 0), 15) for bound in (drawn - slack, drawn + slack))
            assert lower <= code <= upper


@needs_compiler
@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 40),
    st.integers(1, 19),
    st.floats(0, 1),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([FORWARDS, BACKWARDS, SHUFFLED]),
    st.booleans(),
    st.integers(0, 999),
)
def test_every_column_follows_from_the_errors_before_it(
    columns: int, rows: int, part: float, dtype: torch.dtype, order: int, stochastic: bool, seed: int
) -> None:
    block = random_block(columns, rows, round(part * columns), dtype, seed, stochastic=stochastic)
    launched(block, order)
    check_against_exact_numbers(block, slack=1e-3 if dtype == torch.float32 else 1e-9)
    untouched = sorted(set(range(columns + 9)) - set(block.feature[: block.rounded].tolist()))
    assert bool((block.codes[untouched] == 255).all())


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_go_to_the_even_code(dtype: torch.dtype) -> None:
    block = random_block(96, 30, 96, dtype, seed=3, exact=True)
    launched(block, FORWARDS)
    check_against_exact_numbers(block, slack=0)
    value = block.fed[0] / block.scale[int(block.group[0])] + block.zero[int(block.group[0])]
    assert bool(((value - value.floor()) == 0.5).any()), "no tie was tried"


@needs_compiler
def test_whole_blocks_and_no_kept_column() -> None:
    block = random_block(128, 9, 128, torch.float32, seed=4)
    launched(block, SHUFFLED)
    check_against_exact_numbers(block, slack=1e-3)


@needs_compiler
@pytest.mark.parametrize("generator", [None, (2**63 + 5, 2**31 + 7)])
def test_the_codes_are_those_of_the_cpu(generator: tuple[int, int] | None) -> None:
    """The whole of `round_with_feedback`, its inner loop by the kernel: the same codes, in float64."""
    draw = torch.Generator().manual_seed(8)
    rows, features, block_size = 21, 200, 128
    target = torch.randn(rows, features, generator=draw, dtype=torch.float64)
    inputs = torch.randn(400, features, generator=draw, dtype=torch.float64)
    hessian = inputs.T @ inputs / 400
    order = torch.randperm(features, generator=draw)
    reverse = order.flip(0)
    factor = Factor(order, torch.linalg.cholesky(hessian[reverse[:, None], reverse]), 0.0, 0.0)
    groups = -(-features // GROUP_SIZE)
    grid = Grid(
        torch.rand(rows, groups, generator=draw).half().double() / 8 + 0.25,
        torch.randint(6, 10, (rows, groups), generator=draw).double(),
        4, GROUP_SIZE, False,
    )  # fmt: skip
    rounded = features - 5
    codes, kept, _ = round_with_feedback(target, grid, factor, rounded, torch.bfloat16, generator)

    wanted = target.T[order].contiguous()
    share = None
    if generator is not None:
        from accullm_cli.quant.stochastic import feedback_share

        column_scale = grid.scale.T[order // GROUP_SIZE][:rounded]
        position = wanted[:rounded] / column_scale + grid.zero.T[order // GROUP_SIZE][:rounded]
        share = torch.ones_like(wanted)
        share[:rounded] = feedback_share(position, column_scale, factor.feedback(0, rounded), 15)
    error = torch.empty_like(wanted)
    found_codes = guarded(torch.zeros(features, rows, dtype=torch.uint8))
    found_kept = []
    for start in range(0, features, block_size):
        end = min(start + block_size, features)
        feedback = factor.feedback(start, end)
        rounded_here = min(max(rounded - start, 0), end - start)
        block = ColumnBlock(
            fed=guarded(wanted[start:end] + feedback[:start].T @ error[:start]),
            wanted=guarded(wanted[start:end]),
            feedback=guarded(feedback[start:end].contiguous()),
            scale=guarded(grid.scale.T.contiguous()),
            zero=guarded(grid.zero.T.contiguous()),
            group=guarded((order[start:end] // GROUP_SIZE).int()),
            feature=guarded(order[start:end].int()),
            share=None if share is None else guarded(share[start:end]),
            codes=found_codes,
            error=poisoned(end - start, rows, dtype=torch.float64),
            kept=poisoned(end - start - rounded_here, rows, dtype=torch.float64),
            rounded=rounded_here,
            largest_code=15,
            source_dtype=torch.bfloat16,
            generator=generator or (0, 0),
        )
        launched(block, BACKWARDS)
        error[start:end] = block.error
        found_kept.append(block.kept)
    assert torch.equal(found_codes.T, codes)
    assert torch.equal(torch.cat(found_kept).T, kept)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"source_dtype": torch.int8}, "no CUDA kernel rounds to torch.int8: float32, float16 or bfloat16"),
        ({"fed": torch.zeros(129, 2)}, "no CUDA kernel rounds 129 columns at once: 128 at most"),
        ({"fed": torch.zeros(2, 2).half()}, "no CUDA kernel rounds in torch.float16: float32 or float64"),
    ],
)
def test_what_the_kernel_does_not_know_is_refused_by_name(change: dict[str, object], line: str) -> None:
    block = replace(random_block(2, 2, 2, torch.float32, seed=0), **change)  # type: ignore[arg-type]
    with pytest.raises(AccullmError) as caught:
        feedback_launch(block)
    assert caught.value.line() == line
