from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _figures_are_drawn(drawn_figures: None) -> None:
    """In all tests of this folder."""
