"""Trellis codes: against the recursion they are defined by, all chains there are, and plain arithmetic in float64."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accullm_cli.quant.descent import Draft
from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.encodings.trellis import ABOVE, RELATIVE_DAMAGE
from accullm_cli.quant.feedback import factor_hessian, round_with_feedback
from accullm_cli.quant.grid import Grid
from accullm_cli.quant.linear import QuantizedLinear
from accullm_cli.quant.plan import LinearPlan
from accullm_cli.quant.rounding import RoundingOptions, round_linears
from accullm_cli.quant.trellis import SEGMENT, codes_of_places, is_chain, places_of_codes
from accullm_cli.quant.viterbi import best_chain, fed_loss, good_fed_chain, middles_of
from tests.quant.references import correlated_problem

ENCODING = ENCODINGS["trellis"]
WIDTHS = sorted(ABOVE)


def row(
    rows: int, columns: int, bits: int = 4, group_size: int = 32, outliers: tuple[int, ...] = (), scale_bits: int = 6
) -> LinearPlan:
    return LinearPlan("a", rows, columns, bits, group_size, True, outliers, scale_bits=scale_bits, encoding="trellis")


def levels_of(bits: int) -> list[int]:
    levels = ENCODING.levels(row(1, 1, bits))
    assert levels is not None
    return list(levels)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def places_by_hand(codes: torch.Tensor) -> torch.Tensor:
    """As docs/format.md has it, a weight at a time."""
    places = torch.zeros_like(codes)
    for k in range(codes.shape[1]):
        for n in range(len(codes)):
            above = [int(codes[n - back, k]) % 2 if n % SEGMENT >= back else 0 for back in (1, 2)]
            places[n, k] = 2 * (int(codes[n, k]) ^ above[1]) + above[0]
    return places


@cache
def all_chains(bits: int, rows: int) -> torch.Tensor:
    """The places of every column of codes there is: [rows, count]."""
    codes = torch.tensor(list(itertools.product(range(2**bits), repeat=rows)), dtype=torch.uint8).T
    return places_by_hand(codes)


# -- codes and places --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(WIDTHS), st.sampled_from([1, 2, 3, SEGMENT - 1, SEGMENT, SEGMENT + 1, SEGMENT + 2, 600]))
def test_places_are_those_of_the_recursion_and_give_the_codes_back(bits: int, rows: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, 3), generator=torch.Generator().manual_seed(rows)).to(torch.uint8)
    places = places_of_codes(codes)
    assert torch.equal(places, places_by_hand(codes))
    assert torch.equal(codes_of_places(places), codes)
    assert is_chain(places)


def test_places_that_no_codes_have_are_no_chain() -> None:
    places = places_of_codes(torch.full((5, 2), 6, dtype=torch.uint8))
    places[3, 1] ^= 1
    assert not is_chain(places)


def test_parts_that_begin_with_a_segment_can_be_read_alone() -> None:
    codes = torch.randint(0, 16, (3 * SEGMENT + 7, 2), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    every = places_of_codes(codes)
    for start in range(0, len(codes), SEGMENT):
        assert torch.equal(places_of_codes(codes[start : start + SEGMENT]), every[start : start + SEGMENT])


# -- tables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_table_is_its_own_mirror_image_and_either_half_has_a_zero(bits: int) -> None:
    levels = levels_of(bits)
    assert len(levels) == 2 ** (bits + 1)
    assert levels == sorted(levels)
    assert levels == [-level for level in levels[::-1]]
    assert levels[-1] == 127
    for half in (levels[::2], levels[1::2]):
        assert half.count(0) == 1
        assert len({*half}) == 2**bits
    assert levels[::2] == [-level for level in levels[1::2][::-1]]


@cache
def normal_weights(bits: int, size: int) -> tuple[torch.Tensor, Grid, torch.Tensor]:
    """Normal weights with a grid for them, and its nearest places."""
    weight = draw(2 * SEGMENT, 4 * size, seed=bits)
    grid, _ = ENCODING.grid(weight, row(*weight.shape, bits, size, scale_bits=16), "float16", torch.ones(4 * size))
    return weight, grid, grid.round_to_nearest(weight)


@pytest.mark.parametrize(("bits", "slack"), [(2, 4.0), (3, 3.0), (4, 2.5), (5, 2.0)])
def test_each_level_is_about_the_mean_of_what_it_stands_for(bits: int, slack: float) -> None:
    """Lloyd's condition, but for the levels that have to be 0, and for the last, which is what scales are told by."""
    weight, grid, places = normal_weights(bits, 64)
    scale, _ = grid.per_column(weight.shape[1])
    levels, places = torch.tensor(levels_of(bits), dtype=torch.float64), places.long()
    along = torch.zeros(len(levels), dtype=torch.float64).index_add_(0, places.flatten(), (weight * scale).flatten())
    square = torch.zeros(len(levels), dtype=torch.float64).index_add_(0, places.flatten(), scale.square().flatten())
    away = (along / square - levels).abs()[(levels != 0) & (levels.abs() < 127)]
    assert float(away.max()) < slack


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("size", [32, 64, 128])
def test_the_error_over_that_of_integer_codes_is_as_the_planner_takes_it(bits: int, size: int) -> None:
    weight, grid, places = normal_weights(bits, size)
    integer, _ = ENCODINGS["integer"].grid(
        weight, LinearPlan("a", *weight.shape, 4, size, False), "float16", torch.ones(4 * size)
    )
    other = (integer.values(integer.round_to_nearest(weight)) - weight).square().sum()
    error = (grid.values(places) - weight).square().sum()
    assert float(error / other) == pytest.approx(RELATIVE_DAMAGE[bits][size], rel=0.04)
    assert ENCODING.relative_damage(row(1, 1000, bits, size)) == RELATIVE_DAMAGE[bits][size]


def test_damage_of_other_groups_is_that_of_the_nearest_size() -> None:
    damage = [ENCODING.relative_damage(row(8, 100, 4, size)) for size in (8, 50, 96, -1)]
    assert damage == [RELATIVE_DAMAGE[4][size] for size in (32, 64, 128, 128)]


# -- the best chain ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "rows"), [(2, 1), (2, 2), (2, 5), (3, 4), (4, 3), (5, 2)])
def test_no_chain_is_nearer_than_the_nearest(bits: int, rows: int) -> None:
    weight, scale = draw(rows, 40, seed=rows) * 60, draw(rows, 40, seed=rows + 1).exp()
    scale[:, ::2] *= -1
    levels = tuple(map(float, levels_of(bits)))
    grid = Grid(scale, torch.zeros_like(scale), bits, 1, True, levels=levels)
    places = grid.round_to_nearest(weight)
    assert is_chain(places.to(torch.uint8))
    error = (grid.values(places) - weight).square().sum(0)
    points = torch.tensor(levels, dtype=torch.float64)[all_chains(bits, rows).long()]
    every = (points[:, None] * scale[:, :, None] - weight[:, :, None]).square().sum(0)
    torch.testing.assert_close(error, every.amin(1), rtol=1e-12, atol=1e-12)


def test_segments_of_a_long_column_are_chains_of_their_own() -> None:
    weight = draw(2 * SEGMENT + 9, 3, seed=4)
    plan = row(*weight.shape, group_size=-1, scale_bits=16)
    grid, _ = ENCODING.grid(weight, plan, "float16", torch.ones(3))
    places = grid.round_to_nearest(weight)
    for start in range(0, len(weight), SEGMENT):
        part = slice(start, start + SEGMENT)
        assert torch.equal(grid.rows(part).round_to_nearest(weight[part]), places[part])


@pytest.mark.parametrize(("size", "share"), [(32, 0.034), (SEGMENT, 0.004)])
def test_what_the_beginnings_of_chains_cost(size: int, share: float) -> None:
    levels = np.array(levels_of(4), float)
    columns = draw(32, 8192, seed=12).numpy() * 127 / 2.6

    def error(rows: int) -> float:
        near, back, places = np.empty((rows, 4), np.uint8), np.empty(rows, np.uint8), np.empty(rows, np.uint8)
        parts = (part for column in columns for part in column.reshape(-1, rows))
        return sum(best_chain(part, np.ones(rows), levels, middles_of(levels), near, back, places) for part in parts)

    assert error(size) / error(8192) - 1 == pytest.approx(share, rel=0.2)


# -- rounding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_feedback_is_that_of_a_column_after_the_other(threads: int) -> None:
    """Against the definition in quant.rounding, whole columns at once, in float64."""
    problem = correlated_problem(SEGMENT + 20, 150, 400, seed=0)
    weight, hessian = problem.weight, problem.hessian
    plan = row(*weight.shape, 3, 16, scale_bits=16)
    grid, _ = ENCODING.grid(weight, plan, "float16", hessian.diagonal())
    factor = factor_hessian(hessian, 0.1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        codes, _, _ = round_with_feedback(weight, grid, weight[:, :0], factor)
    finally:
        torch.set_num_threads(before)
    order, scale = factor.order.tolist(), grid.per_column(150)[0]
    upper = factor.feedback(0, 150)
    wanted, error = weight[:, order], torch.zeros_like(weight)
    levels = tuple(map(float, levels_of(3)))
    for k in range(150):
        own = Grid(scale[:, [order[k]]], torch.zeros_like(scale[:, :1]), 3, 1, True, levels=levels)
        fed = error[:, :k] @ upper[:k, k]
        places = own.round_to_nearest((wanted[:, k] + fed)[:, None])
        error[:, k] = wanted[:, k] - own.values(places)[:, 0]
        assert torch.equal(codes[:, order[k]], places[:, 0].to(torch.uint8))


def loss_of(draft: Draft) -> float:
    error = draft.target - draft.grid.values(draft.codes.double())
    return float(((error @ draft.hessian) * error).sum() + draft.ridge * error.square().sum())


def test_descent_ends_where_no_column_can_be_improved_by_any_chain() -> None:
    problem = correlated_problem(3, 24, 80, seed=2)
    plan = row(3, 24, 2, 8, scale_bits=16)
    grid, _ = ENCODING.grid(problem.weight, plan, "float16", problem.hessian.diagonal())
    codes = grid.round_to_nearest(problem.weight).to(torch.uint8)
    none = torch.zeros(0, dtype=torch.int64)
    draft = Draft(problem.weight, grid, codes, none, problem.weight[:, :0], problem.hessian, 0.02)
    first = loss_of(draft)
    for _ in range(8):
        draft.descend()
    least = loss_of(draft)
    assert least < 0.9 * first
    assert is_chain(draft.codes)
    for k in range(24):
        for chain in all_chains(2, 3).T:
            other = draft.codes.clone()
            other[:, k] = chain
            changed = Draft(problem.weight, grid, other, none, draft.kept, problem.hessian, 0.02)
            assert loss_of(changed) >= least * (1 - 1e-9)


# -- rows that feed each other ------------------------------------------------------------------------------


def coupled(rows: int, seed: int) -> torch.Tensor:
    """G, damped, with rows of different size that share causes."""
    factor = draw(rows, max(2, rows // 2), seed=seed) * draw(rows, 1, seed=seed + 1).mul(0.5).exp()
    fisher = factor @ factor.T
    return fisher + fisher.diagonal().mean() * torch.eye(rows, dtype=torch.float64)


def chains_and_losses(rows: int, fisher: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of 40 columns, the loss r G r^T of the chain that is found, and of the best there is (2 bits)."""
    factor = factor_hessian(fisher, 0.0, sorts=False)
    levels = torch.tensor(levels_of(2), dtype=torch.float64)
    upper, weight = factor.feedback(0, rows).numpy(), factor.variances.numpy()
    wanted, step = draw(rows, 40, seed=seed) * 50, draw(rows, 1, seed=seed + 2).mul(0.2).exp()
    near, back = (np.empty((rows, 4), np.uint8) for _ in range(2))
    places, fed = np.empty(rows, np.uint8), np.empty((2, 4, rows))
    found, least = [], []
    for column in wanted.T:
        own = column.numpy().copy()
        loss = good_fed_chain(
            own, step[:, 0].numpy(), levels.numpy(), middles_of(levels.numpy()), upper, weight, fed, near, back, places
        )
        missed = column - levels[torch.from_numpy(places).long()] * step[:, 0]
        assert loss == pytest.approx(float(missed @ fisher @ missed), rel=1e-9)
        assert loss == pytest.approx(fed_loss(missed.numpy(), upper, weight, fed[0, 0]), rel=1e-9)
        assert is_chain(torch.from_numpy(places)[:, None])
        every = column[:, None] - levels[all_chains(2, rows).long()] * step
        found.append(loss)
        least.append(float(((fisher @ every) * every).sum(0).min()))
    return torch.tensor(found), torch.tensor(least)


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_chains_of_rows_that_feed_each_other_are_near_to_the_best(rows: int) -> None:
    found, least = chains_and_losses(rows, coupled(rows, seed=rows), seed=11)
    assert (found >= least * (1 - 1e-9)).all()
    assert float(found.sum() / least.sum()) < 1.1
    alone, best = chains_and_losses(rows, torch.diag(coupled(rows, seed=rows).diagonal()), seed=11)
    torch.testing.assert_close(alone, best, rtol=1e-9, atol=0)


def test_descent_lowers_the_loss_of_rows_that_feed_each_other_across_segments() -> None:
    rows = SEGMENT + 30
    problem, fisher = correlated_problem(rows, 20, 80, seed=5), coupled(SEGMENT + 30, seed=6)
    grid, _ = ENCODING.grid(problem.weight, row(rows, 20, 3, 8, scale_bits=16), "float16", problem.hessian.diagonal())
    codes = grid.round_to_nearest(problem.weight).to(torch.uint8)
    none = torch.zeros(0, dtype=torch.int64)
    draft = Draft(problem.weight, grid, codes, none, problem.weight[:, :0], problem.hessian, 0.02)

    def loss() -> float:
        error = draft.target - grid.values(draft.codes.double())
        return float(((fisher @ error @ (problem.hessian + 0.02 * torch.eye(20))) * error).sum())

    losses = [loss()]
    for _ in range(4):
        draft.descend(fisher)
        assert is_chain(draft.codes)
        losses.append(loss())
    assert losses[1] < 0.7 * losses[0]
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(losses))
    assert losses[-1] > 0.9 * losses[-2]


def test_a_segment_makes_up_for_what_others_missed() -> None:
    """Rows of two segments in pairs, where what both miss in the same direction counts most."""
    problem = correlated_problem(2 * SEGMENT, 12, 60, seed=9)
    pairs = torch.eye(SEGMENT, dtype=torch.float64)
    fisher = torch.cat([torch.cat([pairs, 0.9 * pairs], 1), torch.cat([0.9 * pairs, pairs], 1)])
    plan = row(2 * SEGMENT, 12, 3, 4, scale_bits=16)
    grid, _ = ENCODING.grid(problem.weight, plan, "float16", problem.hessian.diagonal())
    none, losses = torch.zeros(0, dtype=torch.int64), []
    for known in (fisher, torch.eye(2 * SEGMENT, dtype=torch.float64)):
        codes = grid.round_to_nearest(problem.weight).to(torch.uint8)
        draft = Draft(problem.weight, grid, codes, none, problem.weight[:, :0], problem.hessian, 0.0)
        draft.descend(known)
        error = draft.target - grid.values(draft.codes.double())
        losses.append(float(((fisher @ error @ problem.hessian) * error).sum()))
    assert losses[0] < 0.93 * losses[1]


def test_rows_that_feed_each_other_lose_less_where_it_counts() -> None:
    problem, fisher = correlated_problem(SEGMENT + 30, 64, 200, seed=7), coupled(SEGMENT + 30, seed=8)
    plan = row(SEGMENT + 30, 64, 4, 32, outliers=(5,))
    losses = []
    for fishers in ({}, {"a": fisher}):
        rounded = round_linears(
            {"a": problem.weight}, {"a": plan}, RoundingOptions(damping=0.01), torch.float64, problem.hessian,
            fishers=fishers,
        )["a"].linear  # fmt: skip
        assert isinstance(rounded, QuantizedLinear)
        assert is_chain(rounded.codes)
        error = problem.weight - rounded.dequantize(torch.float64)
        losses.append(float(((fisher @ error @ problem.hessian) * error).sum()))
    assert losses[1] < 0.92 * losses[0]


@settings(deadline=None, max_examples=12)
@given(st.sampled_from(WIDTHS), st.sampled_from([3, 8, -1]), st.integers(2, 20), st.sampled_from([4, 6, 16]))
def test_a_linear_reads_back_and_takes_the_bytes_that_were_planned(
    bits: int, group_size: int, columns: int, scale_bits: int
) -> None:
    problem = correlated_problem(5, columns, 60, seed=columns)
    outliers = (columns // 2,)
    plan = row(5, columns, bits, group_size, outliers, scale_bits)
    rounded = round_linears(
        {"a": problem.weight}, {"a": plan}, RoundingOptions(damping=0.1), torch.bfloat16, problem.hessian
    )["a"].linear
    assert isinstance(rounded, QuantizedLinear)
    tensors = rounded.to_tensors()
    assert set(tensors) <= {*ENCODING.suffixes} - {"qzeros"}
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) == plan.stored_bytes
    back = ENCODING.from_tensors(tensors, plan)
    assert isinstance(back, QuantizedLinear)
    assert torch.equal(back.codes, rounded.codes)
    assert torch.equal(back.dequantize(), rounded.dequantize())
    size = columns if group_size == -1 else group_size
    levels, places = levels_of(bits), places_by_hand(codes_of_places(back.codes))
    weight = back.dequantize(torch.float64)
    for n, k in itertools.product(range(5), range(columns)):
        level = 0 if k in outliers else levels[int(places[n, k])]
        assert levels[int(back.codes[n, k])] == level  # 0 in an outlier's column, for who multiplies it by itself
        if k not in outliers:
            assert float(weight[n, k]) == level * float(back.scales[n, k // size])


def test_zeros_stay_zeros_and_dead_inputs_do_no_harm() -> None:
    weight = draw(3, 64, seed=5)
    weight[1, :32] = 0
    importance = torch.ones(64)
    importance[32:] = 0
    grid, sentences = ENCODING.grid(weight, row(3, 64), "float16", importance)
    values = grid.values(grid.round_to_nearest(weight))
    assert sentences == []
    assert float((values - weight).abs().max()) < 1
    zeros, _ = ENCODING.grid(torch.zeros(2, 64), row(2, 64), "float16", torch.ones(64))
    assert not zeros.values(zeros.round_to_nearest(torch.zeros(2, 64))).any()


def test_what_a_trellis_is_not_is_said() -> None:
    assert ENCODING.problem(row(2, 8, bits=6)) == "is to have 6 bits, and trellis has 2 to 5"
    shifted = LinearPlan("a", 2, 8, 4, 8, False, encoding="trellis")
    assert ENCODING.problem(shifted) == "is to have zero points, and trellis has none"
    assert ENCODING.problem(row(2, 8)) == ""


def test_a_trellis_loses_less_than_levels_in_fewer_bits() -> None:
    problem = correlated_problem(SEGMENT, 128, 512, seed=1)
    losses, sizes = {}, {}
    for name, scale_bits in (("trellis", 6), ("levels", 7)):
        plan = LinearPlan("a", SEGMENT, 128, 4, 64, True, scale_bits=scale_bits, encoding=name)
        rounded = round_linears({"a": problem.weight}, {"a": plan}, RoundingOptions(), torch.float32, problem.hessian)
        losses[name] = rounded["a"].relative_error or 0.0
        sizes[name] = plan.stored_bytes
    assert 0 < losses["trellis"] ** 2 < 0.87 * losses["levels"] ** 2
    assert sizes["trellis"] < sizes["levels"]
