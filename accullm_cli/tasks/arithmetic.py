"""Sums, differences, products, comparisons and sorting, of 1 to 5 digits."""

from __future__ import annotations

import random

from accullm_cli.tasks.item import Family, Item, is_verbatim

NAME = "arithmetic"
KINDS = ("add", "subtract", "multiply", "sum", "compare", "sort")
# Digits of the operands, of the factors, and how many numbers are summed and sorted.
_DIGITS = {"easy": 2, "medium": 3, "hard": 5}
_FACTORS = {"easy": (1, 1), "medium": (2, 1), "hard": (3, 2)}
_COUNT = {"easy": 3, "medium": 4, "hard": 6}


def _number(rng: random.Random, digits: int) -> int:
    """Of exactly so many digits, 0 and 1 excluded."""
    return rng.randint(max(2, 10 ** (digits - 1)), 10**digits - 1)


def make(rng: random.Random, kind: str, level: str) -> Item:
    digits, count = _DIGITS[level], _COUNT[level]
    a, b = _number(rng, digits), _number(rng, digits)
    if kind == "add":
        return _sum(kind, level, f"{a} + {b}", a + b)
    if kind == "subtract":
        a, b = max(a, b), min(a, b)
        return _sum(kind, level, f"{a} - {b}", a - b)
    if kind == "multiply":
        first, second = (_number(rng, size) for size in _FACTORS[level])
        return _sum(kind, level, f"{first} * {second}", first * second)
    if kind == "sum":
        terms = [_number(rng, digits - 1) for _ in range(count)]
        return _sum(kind, level, " + ".join(map(str, terms)), sum(terms))
    if kind == "compare":
        while a == b:
            b = _number(rng, digits)
        return _item(kind, level, f"Which number is larger, {a} or {b}? Answer with the number only.", str(max(a, b)))
    numbers = rng.sample(range(10 ** (digits - 1), 10**digits), count)
    listed, answer = (", ".join(map(str, values)) for values in (numbers, sorted(numbers)))
    return _item(kind, level, f"Sort in ascending order: {listed}. Answer with the sorted list only.", answer)


def _sum(kind: str, level: str, expression: str, value: int) -> Item:
    item = _item(kind, level, f"What is {expression}? Answer with the number only.", str(value))
    # As people write numbers, too: with thousands apart.
    apart = f"{value:,}"
    also = (*item.also, apart, f"{apart}.") if apart != str(value) else item.also
    return Item(item.task, level, kind, item.question, item.answer, also)


def _item(kind: str, level: str, question: str, answer: str) -> Item:
    return Item(NAME, level, kind, question, answer, (f"{answer}.",))


FAMILY = Family(NAME, KINDS, make, is_verbatim, examples=2)
