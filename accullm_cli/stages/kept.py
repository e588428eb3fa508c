"""Which linears `--keep` leaves in 16 bits, by patterns on their full names."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import chain, zip_longest

from accullm_cli.errors import AccullmError

FLAG = "--keep"
# Names or patterns that a hint offers.
OFFERED = 3


def kept_names(patterns: Sequence[str], names: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
    """The names that each pattern matches, as shells match: * and ? stand for dots, too.

    Raises:
        AccullmError: a pattern matches none.
    """
    matched = {pattern: tuple(name for name in names if fnmatchcase(name, pattern)) for pattern in patterns}
    for pattern, of_pattern in matched.items():
        if not of_pattern:
            offers = _patterns_that_match(names)
            near = difflib.get_close_matches(pattern, offers, OFFERED, cutoff=0.8)
            near = near or difflib.get_close_matches(pattern, offers, 1, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"names look like {names[0]}"
            raise AccullmError(f"no linear is called {pattern!r}", FLAG, hint)
    return matched


def kept_sentence(pattern: str, names: Sequence[str]) -> str:
    """What the report says of one pattern."""
    count = f"{len(names)} linears stay" if len(names) > 1 else "1 linear stays"
    return f"{count} in 16 bits ({FLAG} {pattern!r}): {', '.join(_ranges(names))}"


def _patterns_that_match(names: Sequence[str]) -> list[str]:
    """Patterns as a user may have meant them, from the shortest: a kind of linear, a block, one linear."""
    ends = (f"*.{name.rpartition('.')[2]}" for name in names)
    blocks = (f"{match[0]}.*" for name in names if (match := re.match(r"\D*\d+", name)))
    return list(dict.fromkeys([*ends, *blocks, *names]))


def _ranges(names: Iterable[str]) -> list[str]:
    """Names that differ in their numbers alone as one, where all combinations are there: "layers.0-3,7.experts.0-7"."""
    alike: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in names:
        words = re.split(r"(\d+)", name)
        alike.setdefault(tuple(words[::2]), []).append(tuple(map(int, words[1::2])))
    return [text for words, numbers in alike.items() for text in _as_one(words, numbers)]


def _as_one(words: tuple[str, ...], numbers: Sequence[tuple[int, ...]]) -> list[str]:
    """The names of the same words around these numbers; one by one, where they are not all of some ranges."""
    values = [sorted(set(place)) for place in zip(*numbers, strict=True)]
    together = [[_as_ranges(place) for place in values]]
    if len(numbers) != math.prod(map(len, values)):
        together = [list(map(str, of_name)) for of_name in numbers]
    return ["".join(chain.from_iterable(zip_longest(words, of_name, fillvalue=""))) for of_name in together]


def _as_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as "0-3,7"."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return ",".join("-".join(map(str, ends)) for ends in ranges)
