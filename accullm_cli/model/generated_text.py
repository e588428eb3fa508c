"""Documents made up from a seed: contracts, tables, SQL schemas with foreign keys, arithmetic, records.

They exercise what prose and code do little of: clause numbers and cross references, rows that refer to other rows,
digits that must be copied or computed. A document depends on its seed alone; the seed is text, so that calibration
("calibration 0 17") and the tasks of a validation can never share one.
"""

from __future__ import annotations

import random
from collections.abc import Callable

_NAMES = (
    "Adler Brandt Castillo Dupont Eriksen Farouk Greco Haddad Ivanova Jansen Kowalski Lindqvist Moreau Nakamura Okafor "
    "Petrov Quispe Rossi Schneider Tanaka Ueda Vargas Weber Xiong Yilmaz Zhang"
).split()
_FIRST = "Amara Bruno Chiara Daniel Elena Farid Grace Hiro Ines Jonas Kira Luis Mina Noah Olga Pavel Rosa Sven".split()
_TOWNS = "Aarhus Bergen Coimbra Dresden Evora Ghent Haarlem Izmir Kaunas Leeds Lyon Malmo Nantes Porto Turin".split()
_TRADES = "Shipping Foods Instruments Textiles Energy Software Timber Chemicals Media Logistics Optics Seeds".split()
_GOODS = "bolts lamps pumps valves cables sensors filters hinges gauges motors panels relays switches rollers".split()
_UNITS = "kg pcs m litres boxes pallets".split()
_MONTHS = "January February March April May June July August September October November December".split()


def generated_document(seed: str) -> str:
    """One document; its kind, length and content follow from the seed."""
    rng = random.Random(seed)
    return rng.choice(_KINDS)(rng)


def _company(rng: random.Random) -> str:
    return f"{rng.choice(_NAMES)} {rng.choice(_TRADES)} {rng.choice(['Ltd', 'GmbH', 'Inc.', 'S.A.', 'AB', 'B.V.'])}"


def _person(rng: random.Random) -> str:
    return f"{rng.choice(_FIRST)} {rng.choice(_NAMES)}"


def _date(rng: random.Random) -> str:
    return f"{rng.randint(1, 28)} {rng.choice(_MONTHS)} {rng.randint(1994, 2031)}"


def _amount(rng: random.Random) -> str:
    return f"{rng.choice(['EUR', 'USD', 'GBP', 'CHF'])} {rng.randint(1, 999)},{rng.randint(0, 999):03d}.00"


def _contract(rng: random.Random) -> str:
    """Numbered clauses that define terms and refer to one another."""
    buyer, seller, goods = _company(rng), _company(rng), rng.choice(_GOODS)
    days = [rng.choice([7, 10, 14, 21, 30, 45, 60, 90]) for _ in range(6)]
    clauses = [
        ("Definitions", [
            f'"Goods" means the {goods} described in Schedule {rng.randint(1, 4)}.',
            f'"Effective Date" means {_date(rng)}.',
            f'"Price" means {_amount(rng)} per delivery, exclusive of value added tax.',
        ]),
        ("Delivery", [
            f"The Seller shall deliver the Goods to the Buyer's warehouse in {rng.choice(_TOWNS)} within {days[0]} "
            "days of each order.",
            "Risk in the Goods passes to the Buyer when they have been unloaded and counted.",
            f"If a delivery is late by more than {days[1]} days, the Buyer may cancel the order in writing.",
        ]),
        ("Payment", [
            f"The Buyer shall pay the Price within {days[2]} days of receiving a correct invoice.",
            f"Overdue sums bear interest at {rng.randint(2, 12)}.{rng.randint(0, 9)}% a year from the due date.",
            "The Buyer may not withhold payment except where this agreement allows it.",
        ]),
        ("Warranty", [
            f"The Seller warrants that the Goods are free from defects for {rng.randint(6, 60)} months.",
            f"The Buyer shall report a defect within {days[3]} days of finding it; otherwise its rights under this "
            "clause lapse for that defect.",
            "The Seller shall, at its choice, repair or replace defective Goods at its own cost.",
        ]),
        ("Liability", [
            f"Neither party is liable for more than {_amount(rng)} in any calendar year.",
            "Nothing in this agreement limits liability for fraud or for injury to persons.",
        ]),
        ("Confidentiality", [
            f"Each party shall keep the other's information secret for {rng.randint(2, 10)} years after the end of "
            "this agreement.",
            "This does not apply to information that is public, or that the law requires to be disclosed.",
        ]),
        ("Termination", [
            f"Either party may end this agreement on {days[4]} days' notice in writing.",
            f"A party may end it at once if the other does not remedy a breach within {days[5]} days of a reminder.",
        ]),
        ("Governing law", [
            f"The courts of {rng.choice(_TOWNS)} have sole jurisdiction over disputes under this agreement.",
        ]),
    ]  # fmt: skip
    middle = clauses[1:-1]
    rng.shuffle(middle)
    chosen = [clauses[0], *middle[: rng.randint(3, 6)], clauses[-1]]
    lines = [
        f"SUPPLY AGREEMENT No. {rng.randint(100, 9999)}/{rng.randint(10, 31)}",
        "",
        f"between {buyer}, {rng.choice(_TOWNS)} (the Buyer), represented by {_person(rng)}, and {seller}, "
        f"{rng.choice(_TOWNS)} (the Seller), represented by {_person(rng)}.",
    ]
    sizes: list[int] = []  # sentences of each clause so far, so that references lead somewhere
    for number, (title, sentences) in enumerate(chosen, start=1):
        lines += ["", f"{number}. {title}"]
        kept = rng.sample(sentences, rng.randint(max(1, len(sentences) - 1), len(sentences)))
        if number > 2 and rng.random() < 0.6:
            other = rng.randint(1, number - 1)
            kept.append(
                f"Clause {other}.{rng.randint(1, sizes[other - 1])} applies to this clause "
                f"{rng.choice(['accordingly', 'as well', 'unless the parties agree otherwise in writing'])}."
            )
        sizes.append(len(kept))
        lines += [f"{number}.{item} {sentence}" for item, sentence in enumerate(kept, start=1)]
    lines += ["", f"Signed in {rng.choice(_TOWNS)} on {_date(rng)}.", f"For the Buyer: {_person(rng)}"]
    return "\n".join([*lines, f"For the Seller: {_person(rng)}", ""])


def _table(rng: random.Random) -> str:
    """An order list with line sums and a total, as Markdown or CSV."""
    rows, total = [], 0
    for number in range(1, rng.randint(6, 18)):
        quantity, price = rng.randint(1, 60), rng.randint(2, 400)
        total += quantity * price
        rows.append([
            str(number), rng.choice(_GOODS), f"{quantity} {rng.choice(_UNITS)}", f"{price}.00", f"{quantity * price}.00"
        ])  # fmt: skip
    head = ["No", "Item", "Quantity", "Unit price", "Amount"]
    if rng.random() < 0.5:
        lines = [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]
    else:
        lines = [",".join(row) for row in [head, *rows]]
    title = f"Order {rng.randint(1000, 9999)}, {_company(rng)}, {_date(rng)}"
    return "\n".join([title, "", *lines, "", f"Total of {len(rows)} items: {total}.00", ""])


def _sql(rng: random.Random) -> str:
    """Tables with foreign keys, rows that respect them, and queries that join them."""
    parent, child = rng.sample(["customer", "warehouse", "author", "project", "vehicle", "clinic", "course"], 2)
    amount = rng.choice(["amount", "weight", "score", "distance"])
    parents = [(number, _person(rng), rng.choice(_TOWNS)) for number in range(1, rng.randint(4, 8))]
    lines = [
        f"CREATE TABLE {parent} (",
        f"    {parent}_id INTEGER PRIMARY KEY,",
        "    name VARCHAR(80) NOT NULL,",
        "    town VARCHAR(40)",
        ");",
        "",
        f"CREATE TABLE {child} (",
        f"    {child}_id INTEGER PRIMARY KEY,",
        f"    {parent}_id INTEGER NOT NULL,",
        f"    {amount} DECIMAL(10, 2) CHECK ({amount} >= 0),",
        "    created DATE,",
        f"    FOREIGN KEY ({parent}_id) REFERENCES {parent} ({parent}_id)"
        + rng.choice(["", " ON DELETE CASCADE", " ON DELETE RESTRICT"]),
        ");",
        "",
    ]
    lines += [f"INSERT INTO {parent} VALUES ({number}, '{name}', '{town}');" for number, name, town in parents]
    lines.append("")
    for number in range(1, rng.randint(5, 14)):
        day = f"{rng.randint(1998, 2030)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
        value = f"{rng.randint(1, 9999)}.{rng.randint(0, 99):02d}"
        lines.append(
            f"INSERT INTO {child} VALUES ({rng.randint(1, 9)}{number:03d}, {rng.choice(parents)[0]}, {value}, '{day}');"
        )
    lines += [
        "",
        f"SELECT p.name, {rng.choice(['SUM', 'AVG', 'MAX', 'MIN'])}(c.{amount}) AS result",
        f"FROM {parent} AS p JOIN {child} AS c ON c.{parent}_id = p.{parent}_id",
        f"WHERE p.town {rng.choice(['=', '<>'])} '{rng.choice(_TOWNS)}' AND c.{amount} > {rng.randint(10, 500)}",
        f"GROUP BY p.name ORDER BY result {rng.choice(['ASC', 'DESC'])};",
        "",
    ]
    return "\n".join(lines)


def _arithmetic(rng: random.Random) -> str:
    """Sums that are right, from single digits to short word problems."""
    lines = []
    for _ in range(rng.randint(8, 24)):
        a, b, c = rng.randint(2, 10 ** rng.randint(1, 4)), rng.randint(2, 10 ** rng.randint(1, 3)), rng.randint(2, 20)
        lines.append(
            rng.choice(
                [
                    f"{a} + {b} = {a + b}",
                    f"{a + b} - {b} = {a}",
                    f"{b} * {c} = {b * c}",
                    f"{b * c} / {c} = {b}",
                    f"({a} + {b}) * {c} = {a + b} * {c} = {(a + b) * c}",
                    f"Question: {_person(rng)} has {a} {rng.choice(_GOODS)} and buys {b} more. How many is that?\n"
                    f"Answer: {a} + {b} = {a + b}, so it is {a + b}.",
                    f"Question: {c} boxes hold {b} {rng.choice(_GOODS)} each. How many is that in all?\n"
                    f"Answer: {c} * {b} = {b * c}, so there are {b * c}.",
                ]
            )
        )
    return "\n".join([*lines, ""])


def _records(rng: random.Random) -> str:
    """Records as JSON or as settings, and a sentence about each."""
    lines = []
    for _ in range(rng.randint(3, 7)):
        person, town, number = _person(rng), rng.choice(_TOWNS), rng.randint(10000, 99999)
        when, active = _date(rng), rng.choice(["true", "false"])
        if rng.random() < 0.5:
            lines += [
                "{",
                f'  "id": {number},',
                f'  "name": "{person}",',
                f'  "address": {{"town": "{town}", "since": "{when}"}},',
                f'  "active": {active}',
                "}",
            ]
        else:
            lines += [f"[account.{number}]", f"name = {person}", f"town = {town}", f"since = {when}"]
        lines += ["", f"Account {number} belongs to {person}, who has lived in {town} since {when}.", ""]
    return "\n".join(lines)


_KINDS: tuple[Callable[[random.Random], str], ...] = (_contract, _contract, _table, _sql, _arithmetic, _records)
