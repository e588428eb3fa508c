from __future__ import annotations

import pytest

from tests.scripts.loading import SCRIPTS, load_script

script = load_script("mutants")
MUTANTS = script.MUTANTS


def test_reasons_of_mutants_differ() -> None:
    assert len({mutant.why for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.why)
def test_every_mutant_finds_its_line_and_its_tests(mutant: script.Mutant) -> None:
    """`make mutants` takes too long for every change; that it can begin is known here."""
    root = SCRIPTS.parent
    assert (root / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.new != mutant.old
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert f"def {name}" in (root / file).read_text()


def test_quick_runs_the_quick_ones_whose_words_are_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    judged = []
    monkeypatch.setattr(script, "judge", lambda mutant: judged.append(mutant) or "red")
    monkeypatch.setattr(script, "run_tests", lambda mutant, tests: "survived")
    assert script.main(["--quick"]) == 0
    assert judged == [mutant for mutant in MUTANTS if mutant.quick]
    assert 0 < len(judged) < len(MUTANTS)
    judged.clear()
    assert script.main(["--quick", "packing", "nibbles"]) == 0
    assert [mutant.why for mutant in judged] == ["nibbles are swapped"]
    assert "1 of 1 mutants turned a test red" in capsys.readouterr().out
