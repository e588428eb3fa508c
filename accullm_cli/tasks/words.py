"""The n-th word of the m-th sentence, a quoted line, and counting."""

from __future__ import annotations

import random

from accullm_cli.tasks.item import Family, Item, is_verbatim
from accullm_cli.tasks.wordlist import NAMES, PLACES, QUALITIES, THINGS, VERBS, ordinal

NAME = "words"
KINDS = ("n-th word", "quote", "count")
_SENTENCES = {"easy": 3, "medium": 5, "hard": 10}
_LINES = {"easy": 4, "medium": 8, "hard": 16}


def make(rng: random.Random, kind: str, level: str) -> Item:
    if kind == "n-th word":
        sentences = [_sentence(rng) for _ in range(_SENTENCES[level])]
        number = rng.randrange(len(sentences))
        words = sentences[number].rstrip(".").split()
        place = rng.randrange(len(words))
        question = (
            f"{' '.join(sentences)}\nWhat is the {ordinal(place + 1)} word of the {ordinal(number + 1)} sentence? "
            "Answer with the word only."
        )
        return Item(NAME, level, kind, question, words[place], (f"{words[place]}.",))
    if kind == "quote":
        lines = [_sentence(rng) for _ in range(_LINES[level])]
        number = rng.randrange(len(lines))
        listed = "\n".join(f"{place}: {line}" for place, line in enumerate(lines, start=1))
        return Item(NAME, level, kind, f"{listed}\nQuote line {number + 1}, without its number.", lines[number])
    # One thing among others, so many times.
    total = _LINES[level] * 2
    wanted, *others = rng.sample(THINGS, 4)
    count = rng.randint(1, min(total - 1, 9))
    listed_things = [wanted] * count + [rng.choice(others) for _ in range(total - count)]
    rng.shuffle(listed_things)
    question = f"{', '.join(listed_things)}\nHow often does the word {wanted} occur? Answer with the number only."
    return Item(NAME, level, kind, question, str(count), (f"{count}.",))


def _sentence(rng: random.Random) -> str:
    return (
        f"{rng.choice(NAMES)} {rng.choice(VERBS)} the {rng.choice(QUALITIES)} {rng.choice(THINGS)} in "
        f"{rng.choice(PLACES)}."
    )


FAMILY = Family(NAME, KINDS, make, is_verbatim)
