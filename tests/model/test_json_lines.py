"""JSON Lines are read as what they are, and other JSON is refused with the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from accullm_cli.errors import AccullmError
from accullm_cli.model.text import calibration_windows, check_text, validation_windows
from tests.model.test_text import byte_tokenizer, text_of

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'owl' %}{{ raise_exception('no owls') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if tools %}{{ tools[0].name }}{% endif %}{{ eos_token }}"
)
QUOTES = " enclosed in double quotes"
NEITHER = "has neither messages nor text nor prompt and completion"
MESSAGES = "messages is not a list of objects with role and content"
HINT = "give one object a line with messages, text, or prompt and completion"


def write(path: Path, *rows: Any) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    )
    return path


def windows(path: Path, seq_len: int, template: str | None = TEMPLATE, bos: bool = False) -> tuple[list[str], str]:
    tokenizer = byte_tokenizer(bos)
    tokenizer.chat_template = template
    cut = calibration_windows(str(path), tokenizer, 9, seq_len, 0)
    return text_of(cut, tokenizer), cut.description


def refusal(path: Path) -> str:
    with pytest.raises(AccullmError) as caught:
        check_text(str(path))
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.line()
    return caught.value.line()


TURNS = [{"role": "user", "content": "hi"}, {"role": "bot", "content": "yo"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.NDJSON", "a.json", "a.txt"])
@pytest.mark.parametrize(
    ("row", "said", "kind"),
    [
        ({"text": "plain é\u2028 text", "meta": {"id": 1}}, "plain é\u2028 text</s>", "text"),
        ({"prompt": "1+1=", "completion": "2"}, "1+1=2</s>", "prompt and completion"),
        ({"messages": TURNS, "prompt": "hi"}, "<s>[user]hi[bot]yo</s>", "messages"),
        ({"messages": TURNS, "tools": [{"name": "search"}]}, "<s>[user]hi[bot]yosearch</s>", "messages"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "<s>[user]hi[bot]yo</s>", "prompt and completion"),
    ],
)
def test_a_row_is_what_its_keys_say(tmp_path: Path, name: str, row: Any, said: str, kind: str) -> None:
    path = write(tmp_path / name, row, "", row)
    tokens = len(byte_tokenizer()(said, add_special_tokens=False)["input_ids"])
    texts, description = windows(path, tokens)
    assert texts == [said, said]
    assert description == f"2 windows of {tokens} tokens (of 9 asked for: there is no more text) from {path} ({kind})"


def test_a_template_s_bos_does_not_come_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": TURNS})
    # Of the text's last token nothing is left where a window begins with BOS.
    assert windows(path, 16, bos=True)[0] == ["<s>[user]hi[bot]yo"]


def test_of_a_long_file_rows_from_all_over_it_are_taken(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *({"text": f"{number:07d}"} for number in range(20_000)))
    tokenizer = byte_tokenizer()
    rows = [text.removesuffix("</s>") for text in text_of(validation_windows(str(path), tokenizer, 8, 8, 0), tokenizer)]
    assert len(set(rows)) == 8
    assert len({int(row) // 4_000 for row in rows}) >= 4


def test_plain_text_that_looks_like_json_stays_plain(tmp_path: Path) -> None:
    for content in ("[1] A footnote, " * 2, "{braces} and more", "{\n  not: json,\n}"):
        (tmp_path / "a.txt").write_text(content)
        assert windows(tmp_path / "a.txt", 16)[0][0] == content[:16]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"text": "a"}]', f": is a JSON array, not JSON Lines; {HINT}"),
        ("a.txt", '[\n{"text": "a"}\n]', f": is a JSON array, not JSON Lines; {HINT}"),
        ("a.json", '{\n "text": "a"\n}', f": is a JSON object, not JSON Lines; {HINT}"),
        ("a.json", '"text"', f": is a JSON value, not JSON Lines; {HINT}"),
        (
            "a.json",
            "{text",
            f": not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); {HINT}",
        ),
        ("a.jsonl", '[{"text": "a"}]', f":1: a JSON array, not an object; {HINT}"),
        (
            "a.jsonl",
            '{"text": "a"}\n\n{"text',
            f":3: not JSON (Unterminated string starting at: line 1 column 2 (char 1)); {HINT}",
        ),
        ("a.txt", '{"text": "a"}\nmore', f":2: not JSON (Expecting value: line 1 column 1 (char 0)); {HINT}"),
        (
            "a.txt",
            '{"body": "a", "id": 1}',
            f":1: {NEITHER} (its keys: body, id); {HINT}",
        ),
        (
            "a.jsonl",
            '{"prompt": "a"}',
            f":1: {NEITHER} (its keys: prompt); {HINT}",
        ),
        ("a.jsonl", '{"text": "a", "messages": []}', ":1: has both messages and text; keep one of them"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"prompt": "a", "completion": "b"}',
            ":2: has prompt and completion, but the lines before it have text; give one file of each",
        ),
        ("a.jsonl", '{"text": null}', ":1: text is not a string; correct it"),
        ("a.jsonl", '{"messages": "hi"}', f":1: {MESSAGES}; correct it"),
        (
            "a.jsonl",
            '{"messages": [{"from": "x", "value": "y"}]}',
            f":1: {MESSAGES}; correct it",
        ),
        (
            "a.jsonl",
            '{"prompt": "a", "completion": 3}',
            ":1: prompt and completion are not strings, nor lists of objects with role and content; correct it",
        ),
    ],
)
def test_other_json_is_refused_with_the_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert refusal(path) == f"{path}{message}"


def test_messages_without_a_chat_template_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": TURNS})
    with pytest.raises(AccullmError) as caught:
        windows(path, 8, template=None)
    assert caught.value.line() == (
        f"{path}: holds messages, but the model's tokenizer has no chat template; put its chat_template.jinja beside "
        "the model, or give text"
    )


def test_messages_that_the_template_refuses_are_refused_with_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": TURNS}, {"messages": [{"role": "owl", "content": "hu"}]})
    with pytest.raises(AccullmError) as caught:
        windows(path, 8)
    assert caught.value.line() == (
        f"{path}:2: its messages do not fit the model's chat template (no owls); correct them"
    )
