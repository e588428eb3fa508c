"""What would take most of the suite's time without being what a test is about."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING

import pytest
from matplotlib.figure import Figure

from accullm_cli.model import packaged_text
from accullm_cli.report import plots

if TYPE_CHECKING:
    import torch

RENDERED = plots._rendered


def pytest_collection_finish() -> None:
    """A conversion collects garbage behind two models, which need not go through all modules and tests each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _packaged_texts_are_read_once() -> Iterator[None]:
    """Looking through Python's files takes longer than all the rest of a tiny conversion."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("licences", "headers"):
            patch.setattr(packaged_text, name, cache(getattr(packaged_text, name)))
        yield


@pytest.fixture(autouse=True, scope="session")
def _nothing_waits_for_the_disk() -> Iterator[None]:
    """Some seventy times for a tiny conversion, and no test cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _weights_without_memory_get_no_numbers() -> Iterator[None]:
    """On the meta device torch runs its normal distribution in Python: an eighth of a tiny conversion."""
    from transformers import initialization  # which the process that only hands out tests need not load

    normal = initialization.TORCH_INIT_FUNCTIONS["normal_"]

    def fill(tensor: torch.Tensor, **options: object) -> torch.Tensor:
        return tensor if tensor.is_meta else normal(tensor, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(initialization.TORCH_INIT_FUNCTIONS, "normal_", fill)
        yield


@pytest.fixture(autouse=True, scope="session")
def _figures_are_not_drawn() -> Iterator[None]:
    """Drawing its figures takes four fifths of a tiny conversion, and few tests look at them: see `drawn_figures`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_rendered", lambda height, draw: "<svg></svg>")
        yield


@pytest.fixture
def filled_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that see whether figures can be drawn: all but writing them as SVG, which is matplotlib's affair."""

    def fill(height: float, draw: Callable[[Figure], None]) -> str:
        draw(Figure(figsize=(plots.WIDTH, height)))
        return "<svg></svg>"

    monkeypatch.setattr(plots, "_rendered", fill)


@pytest.fixture
def drawn_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at figures."""
    monkeypatch.setattr(plots, "_rendered", RENDERED)
