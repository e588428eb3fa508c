from __future__ import annotations

from pathlib import Path

import pytest
import torch

from accullm_cli.quant.rounding import round_linears
from accullm_cli.stages import block_rounding
from tests.stages.quantized import Call
from tests.streaming import opened, run_to, short_config
from tests.tiny import make_checkpoint


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Every call of `round_linears`, in order; it does its work as before."""
    made: list[Call] = []

    def copy(matrix: torch.Tensor | None) -> torch.Tensor | None:
        return None if matrix is None else matrix.double().clone()

    def spy(weights, plans, options, dtype, hessian=None, pulls=None, importance=None, fishers=None, **rest):  # type: ignore[no-untyped-def]
        assert weights.keys() == plans.keys()
        own = {name: pull.double().clone() for name, pull in (pulls or {}).items()}
        fisher = {name: matrix.double().clone() for name, matrix in (fishers or {}).items()}
        made.append(Call(tuple(weights), copy(hessian), own, copy(importance), options.seed, dtype, fisher))
        return round_linears(weights, plans, options, dtype, hessian, pulls, importance, fishers, **rest)

    monkeypatch.setattr(block_rounding, "round_linears", spy)
    return made


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Source and run directory of a Mixtral with untouched outliers."""
    place = tmp_path_factory.mktemp("finished")
    source = make_checkpoint("mixtral", place / "model")
    with opened(short_config(source, place / "out")) as job:
        run_to(job, "quantize")
    return source, place / "out.run"
