"""The order of the kernels: undone exactly, and as cuda/layout.cuh draws it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from accullm_cli.errors import AccullmError
from accullm_cli.kernels.layout import tile, untile, why_not_tiled
from tests.kernels.linears import ENCODED, Shape, random_linear, table_of

shapes = st.builds(
    Shape,
    out_features=st.integers(1, 70),
    in_features=st.integers(20, 300),
    group_size=st.sampled_from([16, 32, 64, 128, 256, -1]),
    symmetric=st.booleans(),
    outliers=st.integers(0, 20),
    bits=st.integers(2, 4),
    encoding=st.sampled_from(ENCODED),
)


@settings(deadline=None, max_examples=60)
@given(shapes, st.sampled_from([torch.float16, torch.bfloat16]), st.integers(0, 1000))
@example(Shape(530, 70, outliers=2, encoding="trellis"), torch.float16, 1)  # chains begin after every 256 rows
def test_the_order_is_undone_exactly(shape: Shape, dtype: torch.dtype, seed: int) -> None:
    linear = random_linear(shape, dtype, seed)
    back = untile(tile(linear, dtype))
    assert (back.bits, back.group_size, back.levels) == (linear.bits, linear.group_size, linear.levels)
    for name in ("codes", "scales", "zeros", "outlier_index", "outlier_weight"):
        wanted, found = getattr(linear, name), getattr(back, name)
        if wanted is None:
            assert found is None
        else:
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted), name


@settings(deadline=None, max_examples=40)
@given(shapes, st.lists(st.integers(0, 10**6), max_size=9), st.integers(0, 1000))
@example(Shape(300, 70, outliers=2, encoding="trellis"), [258, 0, 257, 256, 255, 1], 1)
def test_some_rows_are_those_of_the_whole(shape: Shape, places: list[int], seed: int) -> None:
    """In any order, one of them twice."""
    tiled = tile(random_linear(shape, torch.float16, seed), torch.float16)
    rows = torch.tensor([place % shape.out_features for place in [*places, *places[:1]]], dtype=torch.int64)
    whole, some = untile(tiled), untile(tiled, rows)
    assert torch.equal(some.outlier_index, whole.outlier_index)
    for name in ("codes", "scales", "zeros", "outlier_weight"):
        found, wanted = getattr(some, name), getattr(whole, name)
        assert (found is None) == (wanted is None)
        assert wanted is None or torch.equal(found, wanted[rows]), name


@pytest.mark.parametrize(
    ("index", "line"),
    [
        ([3, 64], "tensor outlier_index names feature 64 of 64"),
        ([-1, 3], "tensor outlier_index names feature -1 of 64"),
        ([5, 5], "tensor outlier_index is not ascending"),
        ([5, 4], "tensor outlier_index is not ascending"),
    ],
)
def test_outliers_beyond_the_activations_are_refused(index: list[int], line: str) -> None:
    """The kernels would read there."""
    linear = replace(
        random_linear(Shape(4, 64, outliers=2), torch.float16, seed=0), outlier_index=torch.tensor(index).int()
    )
    with pytest.raises(AccullmError) as caught:
        tile(linear, torch.float16)
    assert caught.value.line() == line


PLACES = [(0, 0), (3, 1), (8, 2), (15, 3), (16, 4), (25, 63), (31, 127), (7, 80)]  # output and input features


def test_a_code_lies_where_the_drawing_says() -> None:
    linear = random_linear(Shape(32, 128, 64, False, outliers=20), torch.float16, seed=1)
    tiled = tile(linear, torch.float16)
    words = tiled.tiles.view(torch.int32).long() & 0xFFFFFFFF  # [strip, tile, lane, step]
    for row, column in PLACES:
        strip, tile_k, lane = row // 16, column // 64, row % 16 // 2 * 4 + column % 64 // 16
        j = column % 4
        bit = 4 * (row % 2) + {0: 0, 1: 16, 2: 8, 3: 24}[j]
        word = int(words[strip, tile_k, lane, column % 16 // 4])
        assert word >> bit & 15 == int(linear.codes[row, column])
    assert linear.zeros is not None
    assert tiled.zeros is not None
    assert tiled.scales[1, 1, 2].tolist() == [linear.scales[20, 1], linear.scales[21, 1]]
    assert int(tiled.zeros[1, 1, 2]) == int(linear.zeros[20, 1]) + 16 * int(linear.zeros[21, 1])
    # Slot 19 is slot 3 of step 1: lane 4 row, the upper half of a register pair's second.
    assert tiled.outlier_tiles[0, 1, 20].tolist()[5::2] == [
        linear.outlier_weight[10, 19],
        linear.outlier_weight[11, 19],
    ]
    assert tiled.outlier_index.tolist() == [*linear.outlier_index.tolist(), *[-1] * 12]


def test_codes_of_levels_lie_in_the_order_of_features_and_count_from_the_level_0() -> None:
    linear = random_linear(Shape(32, 128, 64, encoding="levels"), torch.float16, seed=1)
    words = tile(linear, torch.float16).tiles.view(torch.int32).long() & 0xFFFFFFFF
    for row, column in PLACES:
        strip, tile_k, lane = row // 16, column // 64, row % 16 // 2 * 4 + column % 64 // 16
        bit = 8 * (column % 4) + 4 * (row % 2)
        code = int(linear.codes[row, column])
        wanted = 7 - code if code <= 7 else code  # the level 0 has code 7
        assert int(words[strip, tile_k, lane, column % 16 // 4]) >> bit & 15 == wanted


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_nibbles_of_a_trellis_say_with_the_two_above_them_which_magnitude_it_is(bits: int) -> None:
    """From 257 rows on a second chain begins."""
    linear = random_linear(Shape(272, 128, 64, bits=bits, encoding="trellis"), torch.float16, seed=1)
    words = tile(linear, torch.float16).tiles.view(torch.int32).long() & 0xFFFFFFFF
    levels = table_of("trellis", bits)
    assert levels is not None
    magnitudes = levels[2**bits :]

    def nibble(row: int, column: int) -> int:
        lane = row % 16 // 2 * 4 + column % 64 // 16
        word = int(words[row // 16, column // 64, lane, column % 16 // 8 * 2 + row % 2])
        return word >> 4 * (column % 8) & 15

    for row, column in [*PLACES, (16, 0), (17, 9), (255, 3), (256, 3), (257, 70), (258, 127), (1, 1), (2, 2)]:
        above = [nibble(row - count, column) if row % 256 >= count else 0 for count in (1, 2)]
        looked_up = nibble(row, column) ^ above[0] ^ above[1]
        lowest = looked_up >> 2 & 1
        number = 4 * (looked_up & 3) + 2 * (looked_up >> 3 ^ lowest) + lowest
        sign = 1 - 2 * (lowest ^ above[0] >> 3)
        assert sign * magnitudes[number] == levels[int(linear.codes[row, column])]


def test_padding_is_zero() -> None:
    linear = random_linear(Shape(17, 70, 32, False, outliers=1), torch.float16, seed=2)
    tiled = tile(linear, torch.float16)
    assert tiled.tiles.shape == (2, 2, 32, 16)
    assert tiled.scales.shape == (2, 4, 8, 2)
    # Output 17 on is padding: all of the second strip but its first one, in the low nibbles of lanes 0 to 3.
    assert not tiled.tiles[1, :, 4:].any()
    assert not (tiled.tiles[1] >> 4).any()
    assert not tiled.scales[1, :, 1:].any()
    assert not tiled.scales[1, :, 0, 1].any()
    assert not tiled.scales[:, 3].any()
    assert not tiled.outlier_tiles[1, :, 4:].any()


@pytest.mark.parametrize(
    ("shape", "dtype", "line"),
    [
        (Shape(4, 64, bits=5), torch.float16, "no CUDA kernel for 5 bits: the kernels read codes of at most 4 bits"),
        (
            Shape(4, 64, 48),
            torch.float16,
            "no CUDA kernel for group size 48: the kernels know powers of two from 16 on, and -1",
        ),
        (
            Shape(4, 64, 8),
            torch.float16,
            "no CUDA kernel for group size 8: the kernels know powers of two from 16 on, and -1",
        ),
        (
            Shape(4, 64),
            torch.float32,
            "no CUDA kernel for torch.float32 activations: the kernels compute in float16 or bfloat16",
        ),
    ],
)
def test_what_the_kernels_do_not_know_is_refused_by_name(shape: Shape, dtype: torch.dtype, line: str) -> None:
    with pytest.raises(AccullmError) as caught:
        tile(random_linear(shape, torch.float16, seed=0), dtype)
    assert caught.value.line() == line


@pytest.mark.parametrize(("zero", "known"), [(6, False), (7, True), (8, False)])
def test_levels_that_lie_on_one_side_of_0_are_refused_by_name(zero: int, known: bool) -> None:
    levels = tuple(range(-zero, 16 - zero))
    reason = f"levels whose 0 is number {zero}: the kernels know at most 7 below it and 8 above"
    assert why_not_tiled(4, 64, torch.float16, levels) == (None if known else reason)


def test_a_trellis_whose_levels_are_no_mirror_image_is_refused_by_name() -> None:
    levels = table_of("trellis", 4)
    assert levels is not None
    assert why_not_tiled(4, 64, torch.float16, levels) is None
    reason = "a trellis whose levels are no mirror image: the kernels know signs and magnitudes"
    assert why_not_tiled(4, 64, torch.float16, (*levels[:-1], 126)) == reason
