"""The compiled inner loops: the same in parts as in one, and on any number of threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accullm_cli.quant import loops
from accullm_cli.quant.loops import CodeTile, level_code, round_tile, stochastic_code


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_share_the_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    wanted, fed = (torch.randn(70, 12, generator=draw).to(dtype) for _ in range(2))
    upper = torch.randn(12, 12, generator=draw).to(dtype).triu(1)
    scale, zero = torch.rand(70, 3, generator=draw).to(dtype) + 0.1, torch.randint(0, 16, (70, 3)).to(dtype)
    group = torch.arange(12) // 4
    monkeypatch.setattr(loops, "ROWS_PER_TASK", 9)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        own = fed.clone()
        tile = CodeTile(wanted=wanted, fed=own, upper=upper, scale=scale, group=group, zero=zero, largest_code=15)
        found.append((*round_tile(tile), own))
    for one, three in zip(*found, strict=True):
        assert torch.equal(one, three)
    codes, error, _ = found[0]
    values = (codes.to(dtype) - zero[:, group]) * scale[:, group]
    assert torch.equal(error, wanted - values)


@settings(deadline=None)
@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=17, unique=True).map(sorted),
    st.integers(-100, 100), st.sampled_from([np.float32, np.float64]),
)  # fmt: skip
def test_the_code_of_a_level_is_that_of_the_nearest_and_of_two_the_lower_one(levels, fourths, dtype) -> None:
    place = dtype(fourths / 4)
    distances = [abs(fourths / 4 - level) for level in levels]
    assert level_code(place, np.array(levels, dtype)) == distances.index(min(distances))


@pytest.mark.parametrize("place", [float("nan"), float("-inf")])
def test_what_is_no_number_has_the_first_code(place: float) -> None:
    assert level_code(place, np.array([-1.0, 2.0, 3.0])) == 0


@settings(deadline=None)
@given(
    st.floats(-3, 18, width=32), st.floats(-20, 20, width=32), st.floats(0, 1, width=32),
    st.integers(0, 2**24 - 1), st.sampled_from([3.0, 15.0]),
)  # fmt: skip
def test_a_random_code_is_the_floor_of_the_position_with_noise(position, fed, share, draw, largest) -> None:
    noise = draw * 2.0**-24
    code = stochastic_code(position, fed, share, noise, largest)
    room = max(min(position, largest - position), 0.0)
    expected = np.clip(np.floor(position + np.clip(fed * share, -room, room) + noise), 0, largest)
    assert code == expected


def test_float32_stays_float32() -> None:
    """0.1 is no float32: a sum in float64 would lie elsewhere."""
    code = stochastic_code(*(np.float32(value) for value in (0.1, 0.0, 1.0, 0.9, 15.0)))
    assert code == np.floor(np.float32(0.1) + np.float32(0.9))
    assert isinstance(code, float | np.float32)
