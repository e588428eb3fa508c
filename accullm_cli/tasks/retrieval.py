"""One place in a long text among others like it: a clause of a contract, the value of a key, a passkey.

A level may be a number of tokens: a text is then about so long (a 500-page document has some 250,000).
"""

from __future__ import annotations

import random
import string

from accullm_cli.tasks.item import Family, Item, is_verbatim
from accullm_cli.tasks.wordlist import NAMES, PLACES, QUALITIES, THINGS

NAME = "retrieval"
KINDS = ("clause", "key", "passkey")
# Tokens of the whole question, about.
_TOKENS = {"easy": 150, "medium": 500, "hard": 2000}
# Tokens of one clause, pair or passkey, as tokenizers of 50,000 to 150,000 tokens cut them.
_CLAUSE, _PAIR, _PASSKEY = 29, 12, 18


def make(rng: random.Random, kind: str, level: str) -> Item:
    tokens = _TOKENS.get(level) or int(level)
    if kind == "clause":
        return _clause(rng, level, max(4, tokens // _CLAUSE))
    if kind == "key":
        return _key(rng, level, max(4, tokens // _PAIR))
    return _passkey(rng, level, max(3, tokens // _PASSKEY))


def _clause(rng: random.Random, level: str, count: int) -> Item:
    """Clauses in order; the one asked for has neighbours of confusable numbers and of nearly its own words."""
    numbers = _confusable(rng, count)
    taken: set[str] = set()
    texts: dict[tuple[int, int], str] = {}
    for number in numbers:
        while (text := _obligation(rng)) in taken:
            pass
        taken.add(text)
        texts[number] = text
    wanted, twin = rng.sample(numbers, 2)
    texts[twin] = _nearly(rng, texts[wanted], taken)
    listed = "\n".join(f"Clause {major}.{minor}: {texts[major, minor]}" for major, minor in numbers)
    name = f"{wanted[0]}.{wanted[1]}"
    return Item(NAME, level, "clause", f"{listed}\n\nQuote Clause {name}, without its number.", texts[wanted])


def _confusable(rng: random.Random, count: int) -> list[tuple[int, int]]:
    """Numbers such as 4.1, 4.2, 4.12 and 14.2, in order."""
    major = rng.randint(2, 9)
    near = [(major, 1), (major, 2), (major, 12), (major + 10, 2), (major, 21), (major + 10, 1), (major + 1, 2)]
    chosen = set(near[:count])
    sections = max(20, count // 12)
    while len(chosen) < count:
        chosen.add((rng.randint(1, sections), rng.randint(1, 24)))
    return sorted(chosen)


def _obligation(rng: random.Random) -> str:
    party, other = rng.sample(("Buyer", "Seller", "Carrier", "Insurer", "Agent", "Owner"), 2)
    return (
        f"The {party} shall deliver {rng.randint(2, 99)} {rng.choice(QUALITIES)} {rng.choice(THINGS)}s to the {other} "
        f"in {rng.choice(PLACES)} within {rng.randint(2, 90)} days."
    )


def _nearly(rng: random.Random, text: str, taken: set[str]) -> str:
    """The same clause with another number of days."""
    head, _, _ = text.rpartition(" within ")
    while (found := f"{head} within {rng.randint(2, 90)} days.") in taken:
        pass
    return found


def _key(rng: random.Random, level: str, count: int) -> Item:
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        pairs[_code(rng, string.ascii_lowercase, 3) + str(rng.randint(10, 99))] = _code(rng, string.digits, 5)
    listed = "\n".join(f"{key}: {value}" for key, value in pairs.items())
    key = rng.choice(list(pairs))
    question = f"{listed}\n\nWhat is the value of {key}? Answer with the value only."
    return Item(NAME, level, "key", question, pairs[key], (f"{pairs[key]}.",))


def _passkey(rng: random.Random, level: str, count: int) -> Item:
    """Passkeys of people in places; several share a name, and many a place."""
    names = list(NAMES)
    for enough in (200, 5000):  # initials where there are more people than names and places tell apart
        if count > enough:
            names = [f"{name} {initial}." for initial in string.ascii_uppercase for name in names]
    names = rng.sample(names, min(len(names), max(2, count // 2)))
    people: dict[tuple[str, str], str] = {}
    while len(people) < min(count, len(names) * len(PLACES)):
        people[rng.choice(names), rng.choice(PLACES)] = _code(rng, string.digits, 6)
    listed = "\n".join(f"The passkey of {name} from {place} is {code}." for (name, place), code in people.items())
    name, place = rng.choice(list(people))
    question = f"{listed}\n\nWhat is the passkey of {name} from {place}? Answer with the passkey only."
    return Item(NAME, level, "passkey", question, people[name, place], (f"{people[name, place]}.",))


def _code(rng: random.Random, alphabet: str, length: int) -> str:
    return "".join(rng.choice(alphabet) for _ in range(length))


FAMILY = Family(NAME, KINDS, make, is_verbatim, takes_tokens=True)
