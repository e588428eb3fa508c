"""What generators ask: the answers derived again from the text of the question alone, by other code."""

from __future__ import annotations

import itertools
import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from datetime import date

import pytest

from accullm_cli.tasks import FAMILIES, Item, is_right
from accullm_cli.tasks.item import LEVELS

ITEMS = 30  # of each level


def items(family: str, levels: tuple[str, ...] = LEVELS) -> Iterator[Item]:
    for level in levels:
        for number in range(ITEMS):
            yield FAMILIES[family].draw("test 0", number, level)


@pytest.mark.parametrize("family", FAMILIES)
def test_items_are_the_same_for_the_same_seed_and_differ_otherwise(family: str) -> None:
    drawn = [FAMILIES[family].draw("a 0", number, "medium") for number in range(12)]
    assert drawn == [FAMILIES[family].draw("a 0", number, "medium") for number in range(12)]
    # An item does not depend on how many were drawn before it.
    assert FAMILIES[family].draw("a 0", 11, "medium") == drawn[11]
    for other in ("a 1", "b 0"):
        again = [FAMILIES[family].draw(other, number, "medium") for number in range(12)]
        assert all(item.question != drawn[number].question for number, item in enumerate(again))
    assert len({item.question for item in drawn}) == 12
    assert {item.kind for item in drawn} == set(FAMILIES[family].kinds)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_is_right_and_examples_are_other_items_of_the_same_form(family: str) -> None:
    for item in items(family):
        for answer in (item.answer, *item.also):
            assert is_right(item, answer)
        assert len(item.examples) == FAMILIES[family].examples
        for question, answer in item.examples:
            assert question != item.question
            assert ("```" in answer) == ("```" in item.answer)


@pytest.mark.parametrize("family", FAMILIES)
def test_levels_grow(family: str) -> None:
    sizes = [sum(len(item.question) + len(item.answer) for item in items(family, (level,))) for level in LEVELS]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def solve_arithmetic(item: Item) -> str:
    numbers = [int(text) for text in re.findall(r"\d+", item.question)]
    if item.kind == "sort":
        while any(a > b for a, b in itertools.pairwise(numbers)):  # by exchanging neighbours
            for place in range(len(numbers) - 1):
                if numbers[place] > numbers[place + 1]:
                    numbers[place : place + 2] = numbers[place + 1], numbers[place]
        return ", ".join(map(str, numbers))
    if item.kind == "compare":
        a, b = numbers
        return str(a if a - b > 0 else b)
    (result,) = sqlite3.connect(":memory:").execute(f"SELECT {item.question[8 : item.question.index('?')]}").fetchone()
    return str(result)


def solve_words(item: Item) -> str:
    text, _, question = item.question.rpartition("\n")
    if item.kind == "count":
        wanted = question.split("word ")[1].split(" ")[0]
        return str(len(text.split(f"{wanted}")) - 1)
    numbers = [int(found) for found in re.findall(r"\d+", question)]
    if item.kind == "quote":
        return text.splitlines()[numbers[0] - 1].partition(": ")[2]
    place, sentence = numbers
    return re.findall(r"\w+", text.split(". ")[sentence - 1])[place - 1]


def solve_retrieval(item: Item) -> str:
    text, question = item.question.split("\n\n")
    if item.kind == "clause":
        name = question.split("Clause ")[1].split(",")[0]
        return next(line.split(": ", 1)[1] for line in text.splitlines() if line.startswith(f"Clause {name}:"))
    if item.kind == "key":
        return dict(line.split(": ") for line in text.splitlines())[question.split("value of ")[1].split("?")[0]]
    person = question.split("passkey of ")[1].split("?")[0]
    return next(line for line in text.splitlines() if f"of {person} is" in line).split(" is ")[1].rstrip(".")


def solve_identifiers(item: Item) -> str:
    if item.kind == "JSON":
        return "```json\n" + item.question.split(":\n", 1)[1] + "\n```"
    return item.question.split(": ", 1)[1]


def solve_code(item: Item) -> str:
    code, what = item.question.removeprefix("```python\n").split("\n```\n")
    words = what.split()
    if item.kind == "rename":
        tokens = re.split(r"(\W+)", code)
        code = "".join(words[3] if token == words[1] else token for token in tokens)
    elif item.kind == "constant":
        assert len(re.findall(rf"\b{words[3]}\b", code)) == 1
        code = code.replace(f" {words[3]}\n", f" {words[5]}\n")
    elif item.kind == "delete":
        code = "\n".join(line for line in code.split("\n") if not line.endswith(f" {words[6]}"))
    return f"```python\n{code}\n```"


def solve_sql(item: Item) -> str:
    if item.kind == "schema":
        return "```sql\n" + item.question.split(":\n", 1)[1] + "\n```"
    order = item.question.split("in this order: ")[1].split(". Use")[0].split(", ")
    wanted = item.question.split("lists ")[1].split(" and")[0]
    joins = "".join(f" JOIN {other} ON {order[0]}.{other}_id = {other}.{other}_id" for other in order[1:])
    names = "".join(f", {other}.name" for other in order[1:])
    return f"```sql\nSELECT {wanted}{names} FROM {order[0]}{joins};\n```"


SOLVERS: dict[str, Callable[[Item], str]] = {
    "arithmetic": solve_arithmetic,
    "words": solve_words,
    "retrieval": solve_retrieval,
    "identifiers": solve_identifiers,
    "code": solve_code,
    "sql": solve_sql,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_follow_from_the_question(family: str) -> None:
    for item in items(family):
        assert SOLVERS[family](item) == item.answer, item.question


def test_code_is_right_without_fences_and_in_fences_that_name_no_language() -> None:
    for item in items("code"):
        code = item.answer.removeprefix("```python\n").removesuffix("\n```")
        assert item.also == (code, f"```\n{code}\n```")


def test_arithmetic_has_the_digits_that_it_promises() -> None:
    for level, digits in (("easy", 2), ("medium", 3), ("hard", 5)):
        for item in items("arithmetic", (level,)):
            if item.kind == "add":
                assert [len(text) for text in re.findall(r"\d+", item.question)] == [digits, digits]
    products = [item.question for item in items("arithmetic", ("hard",)) if item.kind == "multiply"]
    assert all(re.match(r"What is \d{3} \* \d{2}\?", question) for question in products)


def test_thousands_apart_are_right_and_other_commas_are_not() -> None:
    item = next(item for item in items("arithmetic", ("hard",)) if item.kind == "multiply" and len(item.answer) == 5)
    assert is_right(item, f"{item.answer[:2]},{item.answer[2:]}")
    assert not is_right(item, f"{item.answer[:1]},{item.answer[1:]}")
    assert not is_right(item, f"= {item.answer}")


def test_the_clause_that_is_asked_for_has_confusable_neighbours() -> None:
    for item in items("retrieval"):
        if item.kind != "clause":
            continue
        clauses = dict(re.findall(r"Clause ([\d.]+): (.*)", item.question))
        assert len(set(clauses.values())) == len(clauses)
        twins = [text for text in clauses.values() if text.split(" within ")[0] == item.answer.split(" within ")[0]]
        assert len(twins) == 2
        majors = {number.split(".")[0] for number in clauses}
        assert any(f"1{major}" in majors for major in majors)


def test_a_level_may_be_a_number_of_tokens_up_to_a_book() -> None:
    for tokens in (500, 4000, 32_000):
        for number in range(3):
            item = FAMILIES["retrieval"].draw("test 0", number, str(tokens))
            # As tokenizers do that know no such words, and take digits one by one.
            pieces = len(re.findall(r"[a-zA-Z]{1,4}|\d|[^\w\s]|\n", item.question))
            assert 0.6 * tokens < pieces < 1.8 * tokens, item.kind
            assert solve_retrieval(item) == item.answer
    book = FAMILIES["retrieval"].draw("test 0", 0, "250000")
    assert 600_000 < len(book.question) < 1_250_000
    assert solve_retrieval(book) == book.answer


def test_ibans_have_right_check_digits() -> None:
    for item in items("identifiers"):
        if item.kind == "IBAN":
            for text in item.answer.split(", "):
                letters = text.replace(" ", "")
                moved = letters[4:] + letters[:4]
                assert int("".join(str(int(digit, 36)) for digit in moved)) % 97 == 1


def test_dates_are_dates_and_json_is_json() -> None:
    ends = set()
    for item in items("identifiers"):
        if item.kind == "dates":
            for text in item.answer.split(", "):
                assert date.fromisoformat(text).isoformat() == text
        if item.kind == "JSON":
            record = json.loads(item.answer.removeprefix("```json\n").removesuffix("\n```"))
            assert 4 <= len(record) <= 6
            ends.add(item.answer.removesuffix("\n```")[-3:])
    assert len(ends) > 4  # not all hang by one decision


def test_schemas_have_as_many_foreign_keys_as_the_level_says_and_databases_take_them() -> None:
    for level, count in (("easy", 1), ("medium", 2), ("hard", 4)):
        for item in items("sql", (level,)):
            statement = item.answer.split("```sql\n")[1].removesuffix("\n```")
            if item.kind == "schema":
                base = sqlite3.connect(":memory:")
                base.execute(statement)
                (table,) = base.execute("SELECT name FROM sqlite_master").fetchone()
                assert len(base.execute(f"PRAGMA foreign_key_list({table})").fetchall()) == count
            else:
                assert statement.count("JOIN") == count
