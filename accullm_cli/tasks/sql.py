"""SQL: a schema repeated without losing a foreign key, and a join completed; scored by text and by meaning."""

from __future__ import annotations

import random

from accullm_cli.tasks.item import Family, Item, fenced, is_verbatim, unfenced

NAME = "sql"
KINDS = ("schema", "join")
_COLUMNS = {"easy": 2, "medium": 4, "hard": 8}
_PARENTS = {"easy": 1, "medium": 2, "hard": 4}
_TABLES = ("customer", "warehouse", "author", "project", "vehicle", "clinic", "course", "supplier", "branch", "tenant")
_CHILDREN = ("invoice", "shipment", "article", "ticket", "booking", "payment", "contract", "visit")
_FIELDS = (
    "amount DECIMAL(10, 2)", "created DATE", "status VARCHAR(20)", "weight INTEGER", "note TEXT", "rating INTEGER",
    "title VARCHAR(80)", "paid BOOLEAN", "due DATE", "discount DECIMAL(4, 2)",
)  # fmt: skip


def make(rng: random.Random, kind: str, level: str) -> Item:
    child = rng.choice(_CHILDREN)
    parents = rng.sample(_TABLES, _PARENTS[level])
    fields = rng.sample(_FIELDS, _COLUMNS[level])
    if kind == "schema":
        schema = _schema(rng, child, parents, fields)
        question = f"Repeat this statement exactly, in a code block:\n{schema}"
        return Item(NAME, level, kind, question, fenced(schema, "sql"))
    tables = [f"{parent}({parent}_id, name, town)" for parent in parents]
    columns = [f"{child}_id", *(f"{parent}_id" for parent in parents), *(field.split()[0] for field in fields)]
    tables.append(f"{child}({', '.join(columns)})")
    wanted = fields[0].split()[0]
    question = (
        f"Tables: {'; '.join(tables)}.\nWrite one SELECT that lists {child}.{wanted} and the name of "
        f"{_listed(parents)}, joining the tables in this order: {', '.join([child, *parents])}. Use full table names, "
        "no aliases, in one line, in a code block."
    )
    joins = " ".join(f"JOIN {parent} ON {child}.{parent}_id = {parent}.{parent}_id" for parent in parents)
    names = ", ".join([f"{child}.{wanted}", *(f"{parent}.name" for parent in parents)])
    return Item(NAME, level, kind, question, fenced(f"SELECT {names} FROM {child} {joins};", "sql"))


def _listed(parents: list[str]) -> str:
    return " and ".join(f"its {parent}" for parent in parents)


def _schema(rng: random.Random, child: str, parents: list[str], fields: list[str]) -> str:
    lines = [f"    {child}_id INTEGER PRIMARY KEY", *(f"    {parent}_id INTEGER NOT NULL" for parent in parents)]
    lines += [f"    {field}" for field in fields]
    for parent in parents:
        rule = rng.choice(["", " ON DELETE CASCADE", " ON DELETE RESTRICT", " ON DELETE SET NULL"])
        lines.append(f"    FOREIGN KEY ({parent}_id) REFERENCES {parent}({parent}_id){rule}")
    return "\n".join([f"CREATE TABLE {child} (", ",\n".join(lines), ");"])


def is_right(item: Item, text: str) -> bool:
    """By text, or by meaning: statements that sqlglot reads as the same.

    Case of keywords and unquoted names, spaces, needless brackets, the order in which constraints are listed and the
    sides of an equality do not count.
    """
    if is_verbatim(item, text):
        return True
    found, expected = _meaning(unfenced(text)), _meaning(unfenced(item.answer))
    return found is not None and found == expected


def _meaning(text: str) -> str | None:
    """One statement in a form that is the same for all that mean the same; None for what is no single statement."""
    import sqlglot
    from sqlglot import exp
    from sqlglot.errors import SqlglotError

    try:
        statements = [statement for statement in sqlglot.parse(text) if statement is not None]
    except SqlglotError:
        return None
    if len(statements) != 1 or isinstance(statements[0], exp.Command):  # a command is what sqlglot could not read
        return None
    (statement,) = statements
    for node in statement.find_all(exp.Identifier):
        if not node.args.get("quoted"):
            node.set("this", node.this.lower())
    for key in statement.find_all(exp.ForeignKey, exp.Reference):
        key.set("options", [rule.upper() if isinstance(rule, str) else rule for rule in key.args.get("options") or ()])
    for bracket in list(statement.find_all(exp.Paren)):
        # Only where they cannot matter: around a column, or around an equality that stands in a condition.
        if isinstance(bracket.this, exp.Column) or (
            isinstance(bracket.this, exp.EQ) and isinstance(bracket.parent, exp.Join | exp.And | exp.Or | exp.Where)
        ):
            bracket.replace(bracket.this)
    for join in statement.find_all(exp.Join):
        if join.args.get("kind") == "INNER":
            join.set("kind", None)
    for equality in statement.find_all(exp.EQ):
        sides = sorted((equality.this, equality.expression), key=lambda side: side.sql())
        equality.set("this", sides[0].copy())
        equality.set("expression", sides[1].copy())
    for schema in statement.find_all(exp.Schema):
        columns = [part for part in schema.expressions if isinstance(part, exp.ColumnDef)]
        rules = sorted((part for part in schema.expressions if part not in columns), key=lambda part: part.sql())
        schema.set("expressions", [*columns, *rules])
    return statement.sql(normalize_functions="upper")


FAMILY = Family(NAME, KINDS, make, is_right, by_meaning=True)
