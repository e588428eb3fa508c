"""Identifiers copied without an error: invoice numbers, IBANs with their check digits, hashes, dates, JSON."""

from __future__ import annotations

import json
import random
import string
from typing import Any

from accullm_cli.tasks.item import Family, Item, fenced, is_verbatim, unfenced
from accullm_cli.tasks.wordlist import NAMES, PLACES, THINGS

NAME = "identifiers"
KINDS = ("invoice", "IBAN", "hash", "dates", "JSON")
# How many identifiers a question holds, and digits of a hash.
_COUNT = {"easy": 1, "medium": 3, "hard": 6}
_HASH = {"easy": 16, "medium": 40, "hard": 64}


def make(rng: random.Random, kind: str, level: str) -> Item:
    count = _COUNT[level]
    if kind == "JSON":
        return _json(rng, level, count)
    if kind == "hash":
        texts = ["".join(rng.choice("0123456789abcdef") for _ in range(_HASH[level]))]
    else:
        one = {"invoice": _invoice, "IBAN": iban, "dates": _date}[kind]
        texts = [one(rng) for _ in range(count)]
    text = ", ".join(texts)
    return Item(NAME, level, kind, f"Repeat exactly and say nothing else: {text}", text)


def _invoice(rng: random.Random) -> str:
    letters = "".join(rng.choice(string.ascii_uppercase) for _ in range(2))
    return f"INV-{rng.randint(2015, 2029)}-{rng.randint(0, 99999):05d}-{letters}"


def _date(rng: random.Random) -> str:
    return f"{rng.randint(1950, 2049)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def iban(rng: random.Random) -> str:
    """A German IBAN with right check digits (ISO 13616: 98 minus the number, moved and read in base 36, modulo 97)."""
    account = "".join(rng.choice(string.digits) for _ in range(18))
    check = 98 - int(f"{account}131400") % 97  # D is 13 and E is 14
    text = f"DE{check:02d}{account}"
    return " ".join(text[place : place + 4] for place in range(0, len(text), 4))


def _json(rng: random.Random, level: str, count: int) -> Item:
    """A record whose keys, and so the brackets that close it, come in another order each time.

    Were they in one order, most of its items would hang by the same few decisions, and be right or wrong together.
    """
    lines = [
        {"sku": f"{thing[:3].upper()}-{rng.randint(100, 999)}", "qty": rng.randint(1, 99)}
        for thing in rng.sample(THINGS, count)
    ]
    fields: dict[str, Any] = {
        "id": rng.randint(10000, 99999),
        "name": rng.choice(NAMES),
        "town": rng.choice(PLACES),
        "items": lines,
        "paid": rng.random() < 0.5,
        "due": _date(rng),
        "total": round(rng.uniform(10, 9999), 2),
        "terms": {"days": rng.choice((10, 14, 30, 60)), "discount": None},
        "tags": rng.sample(THINGS, 2),
    }
    chosen = rng.sample(list(fields), rng.randint(4, 6))
    text = json.dumps({key: fields[key] for key in chosen})
    question = f"Repeat this JSON exactly, in a code block:\n{text}"
    return Item(NAME, level, "JSON", question, fenced(text, "json"))


def is_right(item: Item, text: str) -> bool:
    """Verbatim; JSON by its content, keys in their order."""
    if is_verbatim(item, text) or item.kind != "JSON":
        return is_verbatim(item, text)
    try:
        found = json.loads(unfenced(text))
    except ValueError:
        return False
    return json.dumps(found) == json.dumps(json.loads(unfenced(item.answer)))


FAMILY = Family(NAME, KINDS, make, is_right)
