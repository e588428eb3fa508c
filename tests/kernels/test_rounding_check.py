"""The check that stands before the first rounding on a device: it passes kernels that are right, and no others."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from accullm_cli.errors import AccullmError
from accullm_cli.kernels import device, rounding_check
from accullm_cli.kernels.launch import Device
from accullm_cli.kernels.rounding_check import checked_loops, rounding_disagreement
from accullm_cli.quant.loops import COMPILED, CodeDescent, CodeTile, Descent, Loops, Tile
from tests.cuda_emulation import emulate, needs_compiler

CPU = torch.device("cpu")


def forgetful_tile(tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """Nothing is fed from column to column."""
    return COMPILED.round_tile(replace(tile, upper=torch.zeros_like(tile.upper)))


def forgetful_chance(tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers of another linear are drawn."""
    if isinstance(tile, CodeTile) and tile.chance is not None:
        tile = replace(tile, chance=replace(tile.chance, stream=tile.chance.stream + 1))
    return COMPILED.round_tile(tile)


def forgetful_of_levels(tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """One level lies elsewhere."""
    if isinstance(tile, CodeTile) and tile.levels is not None:
        tile = replace(tile, levels=tile.levels + 0.5 * (tile.levels == -3))
    return COMPILED.round_tile(tile)


def forgetful_descent(rows: Descent) -> None:
    """One sweep too few."""
    COMPILED.descend(replace(rows, sweeps=rows.sweeps - 1))


def descent_without_levels(rows: Descent) -> None:
    COMPILED.descend(replace(rows, levels=None) if isinstance(rows, CodeDescent) else rows)


@pytest.mark.parametrize(
    ("loops", "found"),
    [
        (COMPILED, None),
        (replace(COMPILED, round_tile=forgetful_tile), r"feedback_round: \d{4} of 8960 codes"),
        (replace(COMPILED, round_tile=forgetful_chance), r"feedback_round at random: \d{3,4} of 8960 codes"),
        (replace(COMPILED, round_tile=forgetful_of_levels), r"feedback_round to levels: \d{3,4} of 8960 codes"),
        (replace(COMPILED, descend=forgetful_descent), r"descend: \d+ of 26880 codes"),
        (replace(COMPILED, descend=descent_without_levels), r"descend over levels: \d+ of 26880 codes"),
    ],
)
def test_what_rounds_otherwise_is_found(loops: Loops, found: str | None) -> None:
    said = rounding_disagreement(loops)
    assert said == found or (said and found and re.fullmatch(found, said))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[Loops], None]:
    """What a device of another kind would round by."""
    checked_loops.cache_clear()
    return lambda loops: monkeypatch.setattr(rounding_check, "loops_of", lambda where: loops)


def test_a_device_that_rounds_otherwise_rounds_nothing(as_on_a_gpu: Callable[[Loops], None]) -> None:
    assert checked_loops(CPU) is COMPILED
    meta = torch.device("meta")
    as_on_a_gpu(COMPILED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding_check, "rounding_disagreement", lambda loops: "descend: 3 of 26880 codes")
        with pytest.raises(AccullmError) as refusal:
            checked_loops(meta)
    assert refusal.value.line() == (
        "meta: the CUDA kernels round otherwise than the CPU: descend: 3 of 26880 codes; convert on the CPU, and "
        "please report this with the output of accullm doctor"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding_check, "rounding_disagreement", lambda loops: None)
        assert checked_loops(meta) is COMPILED
    checked_loops.cache_clear()


@needs_compiler
def test_the_kernels_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "launch", lambda what, where: emulate(what))
    monkeypatch.setattr(device, "describe", lambda index: Device(4, 99 * 1024))
    loops = rounding_check.loops_of(torch.device("cuda", 3))
    assert loops.device == torch.device("cuda", 3)
    assert rounding_disagreement(replace(loops, device=CPU)) is None
