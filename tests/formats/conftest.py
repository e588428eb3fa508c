from __future__ import annotations

from pathlib import Path

import pytest

from accullm_cli.formats import FORMATS
from tests.artifacts import Made, empty, make_parts
from tests.tiny import tiny_llama


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """A tiny Llama at 4 bits with outliers, whose o_proj is left as it is."""
    return make_parts(tiny_llama(), tmp_path / "run", outliers=(3, 17), keep=("o_proj",))


@pytest.fixture
def artifact(made: Made, tmp_path: Path) -> Path:
    """The directory of an artifact of `made`."""
    directory = empty(tmp_path / "artifact")
    FORMATS["accullm"].write(directory, made.parts)
    return directory
