from __future__ import annotations

import sys
import types

import pytest

from accullm_cli import cli
from tests.cli.fakes import (
    Pipeline,
)


@pytest.fixture
def pipeline(monkeypatch):
    import accullm_cli

    fake = Pipeline()
    monkeypatch.setitem(sys.modules, "accullm_cli.pipeline", fake)
    monkeypatch.setattr(accullm_cli, "pipeline", fake, raising=False)
    return fake


@pytest.fixture
def accullm(capsys):
    """Run one command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(arguments)
        return (left.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def answer(monkeypatch):
    """Put a fake accullm_cli.commands.NAME in place, whose function answers with `value`."""

    def put(name: str, value: object) -> list:
        calls: list = []
        module = types.ModuleType(f"accullm_cli.commands.{name}")
        setattr(module, name, lambda *args, **kwargs: (calls.append((args, kwargs)), value)[1])
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return calls

    return put
