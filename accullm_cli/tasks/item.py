"""An item of a task: a question with one right answer, and the texts that a reader would take for it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count, islice

LEVELS = ("easy", "medium", "hard")


@dataclass(frozen=True)
class Item:
    """One question.

    task: the family's name, or that of a user's file.
    level: of difficulty, one of LEVELS, or a size in tokens.
    kind: what is asked for within the family ("multiply").
    question, answer: as texts; messages: in the place of the question, where a user gave a whole conversation.
    also: other texts that are as right.
    examples: questions and answers that come before it, to show the form of an answer; of a chat turn the first
        `chat_examples`.
    completion: whether the question is a text to be continued as it stands, without template and examples.
    """

    task: str
    level: str
    kind: str
    question: str
    answer: str
    also: tuple[str, ...] = ()
    examples: tuple[tuple[str, str], ...] = ()
    chat_examples: int = 0
    messages: tuple[tuple[str, str], ...] = ()
    completion: bool = False

    @property
    def name(self) -> str:
        return f"{self.task}, {self.kind}" + (f", {self.level}" if self.level else "")


@dataclass(frozen=True)
class Family:
    """A kind of task.

    name: as --tasks knows it.
    make: an item from random numbers, for a level; its examples are added by `draw`.
    kinds: what `make` can be asked for.
    is_right: whether a text answers an item, exactly or by meaning.
    by_meaning: whether a model may well give other texts that are right, so that its own answer is looked at.
    examples: how many questions with answers stand before one that is no chat turn.
    chat_examples: how many before a chat turn, where the instruction says most of what they do.
    takes_tokens: whether a number of tokens is a level, too.
    """

    name: str
    kinds: tuple[str, ...]
    make: Callable[[random.Random, str, str], Item]
    is_right: Callable[[Item, str], bool]
    by_meaning: bool = False
    examples: int = 1
    chat_examples: int = 1
    takes_tokens: bool = False

    def draw(self, seed: str, number: int, level: str) -> Item:
        """Item `number` of a level: the same for the same seed, however many are drawn. Kinds take turns."""
        kind = self.kinds[number % len(self.kinds)]
        item = self.make(random.Random(f"{seed} {self.name} {level} {number}"), kind, level)
        shown = LEVELS[0] if level not in LEVELS or self.takes_tokens else level
        rng = random.Random(f"example {self.name} {shown} {kind}")
        drawn = (self.make(rng, kind, shown) for _ in count())
        others = list(islice((other for other in drawn if other.question != item.question), self.examples))
        examples = tuple((other.question, other.answer) for other in others)
        return replace(item, examples=examples, chat_examples=self.chat_examples)


def is_verbatim(item: Item, text: str) -> bool:
    """Whether a text is the answer, or one of those that are as right; spaces around it do not count."""
    return text.strip() in {answer.strip() for answer in (item.answer, *item.also)}


def fenced(code: str, language: str) -> str:
    """Code as chat models write it."""
    return f"```{language}\n{code}\n```"


def unfenced(text: str) -> str:
    """What stands between fences; the text itself where there are none."""
    lines = text.strip().splitlines()
    if len(lines) >= 2 and lines[0].startswith("```") and lines[-1].strip() == "```":
        return "\n".join(lines[1:-1])
    return text.strip()
