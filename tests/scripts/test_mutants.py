from __future__ import annotations

import sys

import pytest

from tests.scripts.loading import SCRIPTS


def test_every_mutant_finds_its_line_and_its_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make mutants` takes too long for every change; that it can begin is known here."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from mutations import OF_THE_MATHEMATICS
    from mutations_rest import OF_THE_REST

    root = SCRIPTS.parent
    mutants = (*OF_THE_MATHEMATICS, *OF_THE_REST)
    assert len({mutant.why for mutant in mutants}) == len(mutants) > 50
    for mutant in mutants:
        assert (root / mutant.file).read_text().count(mutant.old) == 1, mutant.why
        assert mutant.new != mutant.old, mutant.why
        assert mutant.tests, mutant.why
        for test in mutant.tests:
            assert (root / test.partition("::")[0]).exists(), mutant.why
    for name in ("mutations", "mutations_rest"):
        sys.modules.pop(name)
