"""What `--tasks` may say, a user's own file, and every refusal word for word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accullm_cli.errors import AccullmError
from accullm_cli.tasks import FAMILIES, Task, draw, family_of, is_right, parse_tasks, repetitions
from accullm_cli.tasks.own import own_items


def refusal(text: str) -> str:
    with pytest.raises(AccullmError) as error:
        parse_tasks(text)
    return error.value.line()


def test_names_levels_and_sizes() -> None:
    assert parse_tasks("none") == ()
    assert [task.name for task in parse_tasks("default")] == list(FAMILIES)
    assert parse_tasks("sql, retrieval:8000,arithmetic:hard") == (
        Task("sql", "sql"),
        Task("retrieval:8000", "retrieval", "8000"),
        Task("arithmetic:hard", "arithmetic", "hard"),
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "names no task; give default, or some of arithmetic, words, retrieval, sql, identifiers, code"),
        (
            "slq",
            "'slq' is no task; give default, some of arithmetic, words, retrieval, sql, identifiers, code, or a file "
            "ending in .jsonl",
        ),
        ("sql:extreme", "'extreme' is no level of sql; give easy, medium, hard"),
        ("sql:8000", "'8000' is no level of sql; give easy, medium, hard"),
        ("retrieval:far", "'far' is no level of retrieval; give easy, medium, hard or a number of tokens"),
        ("retrieval:5", "5 tokens are too few for retrieval; give 100 or more"),
        ("retrieval:1000001", "1000001 tokens are too many for retrieval; give 1,000,000 at most"),
        (
            f"retrieval:{'9' * 5000}",
            f"'{'9' * 5000}' is no level of retrieval; give easy, medium, hard or a number of tokens",
        ),
        ("sql,code,sql", "sql is given twice; give it once, or rename a file"),
        ("default,sql", "sql is given twice; give it once, or rename a file"),
    ],
)
def test_what_is_no_task(text: str, line: str) -> None:
    assert refusal(text) == f"--tasks: {line}"


def test_a_file_that_is_not_there() -> None:
    assert refusal("nowhere.jsonl") == "--tasks nowhere.jsonl: no such file; give a file of JSON Lines"


def own(tmp_path: Path, *rows: object) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_a_users_file_may_begin_with_a_byte_order_mark_and_hold_other_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes('\ufeff{"prompt": "a\u2028b\x85c", "answer": "d"}\r\n{"prompt": "e", "answer": "f"}\r\n'.encode())
    assert [item.question for item in own_items("mine", path)] == ["a\u2028b\x85c", "e"]


def test_a_users_own_items(tmp_path: Path) -> None:
    path = own(
        tmp_path,
        {"prompt": "Capital of France?", "answer": "Paris"},
        "",
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "answer": ["a", "b"]},
    )
    (task,) = parse_tasks(str(path))
    assert (task.name, task.path) == ("mine", path)
    first, second = draw([task], 1, 0, "judged")
    assert (first.question, first.answer, first.completion, first.kind) == (
        "Capital of France?",
        "Paris",
        True,
        "line 1",
    )
    assert (second.messages, second.answer, second.also) == ((("system", "s"), ("user", "u")), "a", ("b",))
    # Where a search needs some, too, neither sees the other's.
    assert draw([task], 1, 0, "judged", shared=True) == [first]
    assert draw([task], 1, 0, "search", shared=True) == [second]


HINT = "give one object a line with prompt (or messages) and answer"


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ("{", "not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
        ("[1]", "is no object"),
        ({"answer": "x"}, "has neither prompt nor messages"),
        ({"prompt": "a", "messages": [], "answer": "x"}, "has both prompt and messages"),
        ('{"prompt": "a\\ud83d", "answer": "x"}', "not JSON (\\ud83d is half of a character)"),
        ('{"prompt": "a", "answer": ["x", "\\uDC00"]}', "not JSON (\\udc00 is half of a character)"),
        ({"prompt": "a"}, "its answer is no text, and no list of texts"),
        ({"prompt": "a", "answer": []}, "its answer is no text, and no list of texts"),
        ({"prompt": "a", "answer": ["x", 1]}, "its answer is no text, and no list of texts"),
        ({"prompt": "a", "answer": " "}, "its answer is no text, and no list of texts"),
        ({"prompt": 3, "answer": "x"}, "its prompt is no text"),
        ({"messages": [], "answer": "x"}, "its messages are not a list of objects with role and content, both texts"),
        (
            {"messages": [{"role": "user"}], "answer": "x"},
            "its messages are not a list of objects with role and content, both texts",
        ),
    ],
)
def test_a_line_that_is_no_item(row: object, line: str, tmp_path: Path) -> None:
    path = own(tmp_path, {"prompt": "a", "answer": "b"}, row)
    with pytest.raises(AccullmError) as error:
        own_items("mine", path)
    assert error.value.line() == f"{path}:2: {line}; {HINT}"


def test_messages_that_hold_the_answer_already(tmp_path: Path) -> None:
    path = own(tmp_path, {"messages": [{"role": "assistant", "content": "x"}], "answer": "x"})
    with pytest.raises(AccullmError) as error:
        own_items("mine", path)
    assert error.value.line() == (
        f"{path}:1: its messages end with the assistant's; leave out the answer there, and give it as answer"
    )


def test_a_file_without_items_and_one_that_is_no_text(tmp_path: Path) -> None:
    path = own(tmp_path, "")
    with pytest.raises(AccullmError) as error:
        own_items("mine", path)
    assert error.value.line() == f"{path}: holds no item; {HINT}"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(AccullmError) as error:
        own_items("mine", path)
    assert error.value.line().startswith(f"{path}: cannot be read ('utf-8' codec can't decode byte 0xff")


def test_a_line_that_repeats_another_is_left_out_and_told(tmp_path: Path) -> None:
    """It would count twice in every interval, and be in a search and in what judges it."""
    rows = [{"prompt": "a", "answer": ["b", "c"]}, {"prompt": "a", "answer": "d"}, {"prompt": "e", "answer": "f"}]
    path = own(tmp_path, *rows, {"prompt": "a", "answer": ["c", "b"]})
    assert [item.kind for item in own_items("mine", path)] == ["line 1", "line 2", "line 3"]
    told = "1 of the lines of mine.jsonl asks what an earlier one does, and is left out"
    assert repetitions(parse_tasks(f"sql,{path}")) == (told,)
    path = own(tmp_path, *rows, *rows)
    told = "3 of the lines of mine.jsonl ask what an earlier one does, and are left out"
    assert repetitions(parse_tasks(str(path))) == (told,)
    assert repetitions(parse_tasks(str(own(tmp_path, *rows)))) == ()


def test_a_file_that_cannot_serve_a_search_and_what_judges_it(tmp_path: Path) -> None:
    path = own(tmp_path, *[{"prompt": "a", "answer": "b"}] * 2)
    with pytest.raises(AccullmError) as error:
        draw(parse_tasks(str(path)), 1, 0, "judged", shared=True)
    assert error.value.line() == (
        f"{path}: holds one item, and a search needs others than those that its choice is judged on; give two or more, "
        "or leave out --golden"
    )


def test_a_users_file_is_its_own_task_whatever_it_is_called(tmp_path: Path) -> None:
    """Not one whose statements may be right in other words."""
    path = own(tmp_path, {"prompt": "a", "answer": "SELECT a"}).rename(tmp_path / "sql.jsonl")
    (item,) = draw(parse_tasks(str(path)), 1, 0, "judged")
    assert family_of(item) is None
    assert is_right(item, " SELECT a\n")
    assert not is_right(item, "select a")


def test_items_of_a_search_are_never_those_that_are_judged() -> None:
    tasks = parse_tasks("default")
    judged, searched = (draw(tasks, 24, 0, purpose) for purpose in ("judged", "search"))
    assert len(judged) == len(searched) == 24 * len(FAMILIES)
    assert not {item.question for item in judged} & {item.question for item in searched}
    # More items are the same ones and others.
    assert set(judged) < set(draw(tasks, 30, 0, "judged"))
