"""Near misses: texts that are almost right, and texts that a reader would take."""

from __future__ import annotations

import pytest

from accullm_cli.tasks import Item, is_right
from accullm_cli.tasks.item import fenced

SCHEMA = """CREATE TABLE invoice (
    invoice_id INTEGER PRIMARY KEY,
    customer_id INTEGER NOT NULL,
    branch_id INTEGER NOT NULL,
    amount DECIMAL(10, 2),
    FOREIGN KEY (customer_id) REFERENCES customer(customer_id) ON DELETE CASCADE,
    FOREIGN KEY (branch_id) REFERENCES branch(branch_id)
);"""
JOIN = "SELECT invoice.amount, customer.name FROM invoice JOIN customer ON invoice.customer_id = customer.customer_id;"
ON = "ON invoice.customer_id = customer.customer_id"


def sql(answer: str) -> Item:
    return Item("sql", "easy", "any", "?", fenced(answer, "sql"))


FIRST_KEY, SECOND_KEY = SCHEMA.splitlines()[5:7]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (SCHEMA, SCHEMA.lower()),
        (SCHEMA, " ".join(SCHEMA.split())),
        (SCHEMA, SCHEMA.replace("INTEGER", "INT")),
        (SCHEMA, SCHEMA.replace("REFERENCES branch(branch_id)", "REFERENCES branch (branch_id)")),
        (SCHEMA, SCHEMA.replace(f"{FIRST_KEY}\n{SECOND_KEY}", f"{SECOND_KEY},\n{FIRST_KEY.rstrip(',')}")),
        (JOIN, JOIN.rstrip(";")),
        (JOIN, JOIN.replace(" JOIN ", "\nINNER JOIN ")),
        (
            JOIN,
            JOIN.replace(
                "ON invoice.customer_id = customer.customer_id", "ON (customer.customer_id=invoice.customer_id)"
            ),
        ),
    ],
)
def test_sql_that_means_the_same_is_right(answer: str, text: str) -> None:
    assert is_right(sql(answer), fenced(text, "sql"))
    assert is_right(sql(answer), text)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (SCHEMA, SCHEMA.replace(f",\n{SECOND_KEY}", "")),  # a lost foreign key
        (SCHEMA, SCHEMA.replace("ON DELETE CASCADE", "ON DELETE RESTRICT")),
        (SCHEMA, SCHEMA.replace(" ON DELETE CASCADE", "")),
        (SCHEMA, SCHEMA.replace("REFERENCES branch(branch_id)", "REFERENCES branch(customer_id)")),
        (SCHEMA, SCHEMA.replace("(10, 2)", "(10, 3)")),
        (SCHEMA, SCHEMA.replace("branch_id INTEGER NOT NULL", "branch_id INTEGER")),
        (SCHEMA, SCHEMA.replace("PRIMARY KEY", "")),
        (SCHEMA, SCHEMA[:-2]),
        (SCHEMA, f"{SCHEMA}\n{SCHEMA}"),
        (SCHEMA, "the table as above"),
        (SCHEMA, ""),
        (JOIN, JOIN.replace(" JOIN ", " LEFT JOIN ")),
        (JOIN, JOIN.replace("invoice.amount, customer.name", "customer.name, invoice.amount")),
        (JOIN, JOIN.replace("invoice.customer_id =", "invoice.invoice_id =")),
        (JOIN, JOIN.replace(" = ", " <> ")),
        (JOIN, JOIN.replace("SELECT", "SELECT DISTINCT")),
    ],
)
def test_sql_that_means_something_else_is_wrong(answer: str, text: str) -> None:
    assert text != answer
    assert not is_right(sql(answer), fenced(text, "sql"))


def test_brackets_that_matter_are_kept() -> None:
    item = sql("SELECT a FROM t WHERE (a + b) * c = 1;")
    assert not is_right(item, "SELECT a FROM t WHERE a + b * c = 1;")
    assert is_right(item, "select A from T where 1 = (a + b) * c")


CODE = "def update(a, b):\n    a = b + 3\n    return a + b"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (fenced(CODE, "python"), True),
        (CODE, True),
        (fenced(CODE.replace("\n", "  \n"), "python"), True),
        (fenced(CODE, "") + "\nDone.", False),
        (CODE.replace("    ", "\t"), False),
        (CODE.replace("+ 3", "+ 4"), False),
        (CODE + "\n", True),
        (CODE + "\n    ", True),
        (CODE.replace("\n    return a + b", ""), False),
    ],
)
def test_code_line_by_line(text: str, right: bool) -> None:
    item = Item("code", "easy", "any", "?", fenced(CODE, "python"))
    assert is_right(item, text) is right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ('{"id": 1, "name": "Ada"}', True),
        ('{"id":1,"name":"Ada"}', True),
        ('{\n  "id": 1,\n  "name": "Ada"\n}', True),
        ('{"name": "Ada", "id": 1}', False),
        ('{"id": 1, "name": "Ada", "x": 0}', False),
        ('{"id": "1", "name": "Ada"}', False),
        ('{"id": 1, "name": "Ada"', False),
    ],
)
def test_json_by_its_content(text: str, right: bool) -> None:
    item = Item("identifiers", "easy", "JSON", "?", fenced('{"id": 1, "name": "Ada"}', "json"))
    assert is_right(item, text) is right
    assert is_right(item, fenced(text, "json")) is right


@pytest.mark.parametrize(
    ("text", "right"),
    [("4.1", True), (" 4.1\n", True), ("4.1.", False), ("4.12", False), ("14.1", False), ("4,1", False), ("", False)],
)
def test_a_users_answer_is_taken_verbatim(text: str, right: bool) -> None:
    assert is_right(Item("mine", "", "line 1", "?", "4.1"), text) is right
    assert is_right(Item("mine", "", "line 1", "?", "no", also=("4.1",)), text) is right
