"""Text of other kinds than those of calibration and validation."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch

from accullm_cli.errors import AccullmError
from accullm_cli.model import packaged_text
from accullm_cli.model.other_text import KINDS, documents_of
from accullm_cli.model.packaged_text import line_runs
from accullm_cli.model.text import calibration_windows, other_sources, other_windows
from tests.model.texts import byte_tokenizer, text_of


def test_the_other_text_is_of_another_kind() -> None:
    """C++, of which calibration and validation have nothing."""
    tokenizer = byte_tokenizer()
    found = other_windows("default", tokenizer, 8, 512, 0)
    assert found.ids.shape == (8, 512)
    assert found.description == f"8 windows of 512 tokens from C++ headers of torch {torch.__version__}"
    texts = text_of(found, tokenizer)
    assert sum("#include" in text or "at::" in text or "//" in text or ";" in text for text in texts) >= 6
    assert torch.equal(other_windows("default", tokenizer, 8, 512, 0).ids, found.ids)
    assert not torch.equal(other_windows("default", tokenizer, 8, 512, 1).ids, found.ids)


def test_every_further_kind_is_seeded_and_no_part_of_calibrations_text() -> None:
    tokenizer = byte_tokenizer()
    calibration = set(
        itertools.chain(*map(line_runs, text_of(calibration_windows("default", tokenizer, 64, 512, 0), tokenizer)))
    )
    for kind in KINDS:
        found = other_windows(kind, tokenizer, 6, 512, 0)
        assert found.ids.shape == (6, 512)
        assert torch.equal(other_windows(kind, tokenizer, 6, 512, 0).ids, found.ids)
        assert not torch.equal(other_windows(kind, tokenizer, 6, 512, 1).ids, found.ids)
        assert calibration.isdisjoint(itertools.chain(*map(line_runs, text_of(found, tokenizer))))


def test_what_is_held_out_of_a_kind_is_in_no_calibration_text() -> None:
    """By runs of lines where texts are packaged, and by phrases, tools and sentences where they are made up."""
    tokenizer = byte_tokenizer()
    held_out = packaged_text.held_out_runs()
    chats = calibration_windows("chat", tokenizer, 40, 2048, 0)
    assert held_out.isdisjoint(itertools.chain(*map(line_runs, text_of(chats, tokenizer))))
    assert chats.description == "40 windows of 2048 tokens from generated text: chat, as plain turns"
    pairs = {kind: (documents(kind, 60, part="calibration"), documents(kind, 60)) for kind in KINDS}
    for seen, unseen in pairs.values():
        assert set(seen).isdisjoint(unseen)
    for kind, pattern in (("tools", r'"name": "(\w+)", "arguments"'), ("languages", r"[^\W\d_]{4,}")):
        seen, unseen = (set(re.findall(pattern, "\n".join(texts))) for texts in pairs[kind])
        if kind == "tools":
            assert (len(seen), len(unseen), seen & unseen) == (4, 6, set())
        else:  # a few words of a language are in any letter
            assert len(seen & unseen) < 0.1 * len(seen)
    questions = [set(re.findall(r"^User: (\w+ \w+)", "\n".join(texts), re.MULTILINE)) for texts in pairs["chat"]]
    assert questions[0].isdisjoint(questions[1])


def documents(kind: str, count: int, template: str | None = None, part: packaged_text.Part = "held out") -> list[str]:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return list(itertools.islice(documents_of(kind, tokenizer, 0, part), count))


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"


def test_chats_go_through_the_models_template_or_are_plain_turns() -> None:
    for through, plain in zip(documents("chat", 5, TEMPLATE), documents("chat", 5), strict=True):
        turns = re.findall(r"<(user|assistant)>(.*?)</\1>", through, re.DOTALL)
        assert [role for role, _ in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert len(turns) >= 4
        assert plain == "\n\n".join(f"{role.capitalize()}: {text}" for role, text in turns)
    assert other_windows("chat", byte_tokenizer(), 2, 64, 0).description.endswith(
        "generated text: chat, as plain turns"
    )


def test_calls_of_tools_fit_what_was_declared_and_asked_for() -> None:
    types = {"string": str, "integer": int, "number": float}
    for text in documents("tools", 20, TEMPLATE):
        turns = [content for _, content in re.findall(r"<(user|assistant)>(.*?)</\1>", text, re.DOTALL)]
        declared = {tool["name"]: tool for tool in json.loads(turns[0].split("\n", 1)[1].rpartition("\n\n")[0])}
        for asked, call, result, answer in zip(*(turns[place::4] for place in range(4)), strict=True):
            called = json.loads(call)
            parameters = declared[called["name"]]["parameters"]
            assert list(called["arguments"]) == parameters["required"]
            for name, value in called["arguments"].items():
                assert type(value) is types[parameters["properties"][name]["type"]]
                assert str(value) in asked
            assert json.loads(result)["tool"] == called["name"]
            assert all(f"{name} {value}" in answer for name, value in json.loads(result)["result"].items())


def test_letters_take_ten_languages_by_turns() -> None:
    letters = documents("languages", 20)
    begun = [re.match(r"\W*\w+", letter)[0] for letter in letters]
    assert begun[:7] == ["Sehr", "Madame", "Estimada", "Gentile", "Prezada", "Geachte", "Szanowna"]
    assert all("{" not in letter for letter in letters)
    assert all(first != second for first, second in zip(letters[:10], letters[10:], strict=True))


def test_annexes_of_a_long_document_refer_back() -> None:
    (document,) = documents("documents", 1)
    assert len(document) > 10_000
    parts = re.split(r"^Annex (\d+)$", document, flags=re.MULTILINE)
    assert list(map(int, parts[1::2])) == list(range(1, 17))
    for number, text in zip(map(int, parts[1::2]), parts[2::2], strict=True):
        referred = re.findall(r"read together with Annex (\d+)\.", text)
        assert len(referred) == (number > 1)
        assert all(1 <= int(other) < number for other in referred)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("chat,default,chat", "--other-text: chat is given twice; give it once"),
        (
            "default,letters.txt",
            "--other-text: default and letters.txt are two texts; give one, beside chat, tools, languages, documents",
        ),
    ],
)
def test_other_texts_that_make_no_sense_together(text: str, line: str) -> None:
    with pytest.raises(AccullmError) as caught:
        other_sources(text)
    assert caught.value.line() == line
    assert (other_sources("none"), other_sources("chat, a.txt")) == ((), ("chat", "a.txt"))


def test_the_other_text_may_be_a_file_of_two_windows_or_more(tmp_path: Path) -> None:
    file = tmp_path / "letters.txt"
    file.write_text("dear sir " * 8)
    assert other_windows(str(file), byte_tokenizer(), 8, 16, 0).ids.shape == (4, 16)
    file.write_text("dear sir dear sir ")
    with pytest.raises(AccullmError) as caught:
        other_windows(str(file), byte_tokenizer(), 8, 16, 0)
    assert caught.value.line() == (
        f"other text {file}: has 1 windows, and an interval needs 2; give more text, or --other-text none"
    )
