"""The packaged texts: no document, and no run of lines, is in both parts."""

from __future__ import annotations

import random

from accullm_cli.model import packaged_text
from accullm_cli.model.text import calibration_windows
from tests.model.texts import byte_tokenizer, text_of


def test_no_document_is_in_both_parts() -> None:
    code, unseen = packaged_text.code("calibration"), packaged_text.code("held out")
    seen = {document.name for document in [*code, *packaged_text.prose("calibration", code)]}
    held_out = {document.name for document in [*unseen, *packaged_text.prose("held out", unseen)]}
    assert len(seen) > 150
    assert len(held_out) > 50
    assert seen.isdisjoint(held_out)


def test_calibration_shares_no_run_of_lines_with_validation() -> None:
    """Every calibration window of a large sample against every held-out document, by a plain search."""
    unseen = packaged_text.code("held out")
    held_out = [*unseen, *packaged_text.prose("held out", unseen)]
    haystack = "\n\n".join("\n".join(_lines(document.text)) for document in held_out)
    tokenizer = byte_tokenizer(eos=False)
    sample = calibration_windows("default", tokenizer, 60, 2048, 1)
    runs = 0
    for text in text_of(sample, tokenizer):
        lines = _lines(text)[1:-1]  # the first and the last may be cut within
        for start in range(len(lines) - 2):
            run = "\n".join(lines[start : start + 3])
            if len(run) >= 60:
                runs += 1
                assert run not in haystack
    assert runs > 1_000


def test_without_the_cut_calibration_would_share_runs_with_validation() -> None:
    """The topic "compound" holds the topics "if", "for", ...: a split by document alone would leak."""
    seen = packaged_text.runs_of(packaged_text.prose("calibration", packaged_text.code("calibration")))
    assert len(seen & packaged_text.held_out_runs()) > 100


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def test_tables_of_numbers_are_no_text() -> None:
    table = "\n".join(f"{number:08x}: {number * 7:06d}" for number in range(500))
    prose = "Sentences about something, in many words and few figures.\n" * 50
    documents = [packaged_text.Document("table", table), packaged_text.Document("prose", prose)]
    assert "".join(packaged_text.pieces(documents, 500, random.Random(0))) == prose


def test_pieces_take_every_document_in_turn_and_nothing_twice() -> None:
    long = packaged_text.Document("long", "".join(f"long line {'abcdefghij'[n]}\n" for n in range(10)))
    short = packaged_text.Document("short", "short line one\nshort line two\n")
    found = list(packaged_text.pieces([long, short], 10, random.Random(1)))
    assert sorted(found) == sorted([*long.text.splitlines(True), *short.text.splitlines(True)])
    assert sum(piece.startswith("short") for piece in found[:4]) == 2


def test_runs_that_form_anew_when_lines_are_cut_are_cut_too() -> None:
    a, b, c, d, e = (f"line {letter} is long enough to count as text" for letter in "abcde")
    runs = {f"{b}\n{c}\n{d}", f"{a}\n{e}\nend"}
    assert packaged_text.without_runs("\n".join([a, b, "", c, d, e, "end", "kept"]), runs) == "\nkept"
