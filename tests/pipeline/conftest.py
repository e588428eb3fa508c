from __future__ import annotations

from pathlib import Path

import pytest

from accullm_cli.pipeline import convert
from tests.streaming import fast_config
from tests.tiny import make_checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def finished(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose run directory lies beside it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    convert(fast_config(llama, out))
    return out
