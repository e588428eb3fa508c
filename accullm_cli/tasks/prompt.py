"""An item as tokens: what the model reads, and every token sequence that is the right answer.

Under greedy decoding an answer is right if and only if each of its tokens, and the end behind it, is the most likely
one given those before. Several sequences may be right: tokenizers cut an answer that follows a prompt in one way and
the same answer alone in another, and a reader takes more than one spelling. Together they are a tree, and the model is
right where the most likely token leads from its root to an end.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accullm_cli.errors import AccullmError
from accullm_cli.tasks.item import Item

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How a token begins that begins with a line's end, in vocabularies of GPT-2's bytes, plain ones, and SentencePiece's.
_LINE_ENDS = ("Ċ", "\n", "<0x0A>")


@dataclass(frozen=True)
class Node:
    """A place in the tree of right answers.

    row, depth: the row that leads there, and how many of its tokens.
    tokens: those that go on to a right answer; children: the node behind each.
    may_end: whether the answer may end here.
    """

    row: int
    depth: int
    tokens: tuple[int, ...]
    children: tuple[int, ...]
    may_end: bool


@dataclass(frozen=True)
class Question:
    """An item for one tokenizer.

    prompt: the tokens that are given. spellings: the token sequences behind it that are right.
    rows: those of them that hold all others.
    nodes: the tree; the first is its root.
    """

    item: Item
    prompt: tuple[int, ...]
    spellings: tuple[tuple[int, ...], ...]
    rows: tuple[tuple[int, ...], ...]
    nodes: tuple[Node, ...]

    @property
    def tokens(self) -> int:
        """Of the longest row."""
        return len(self.prompt) + max(map(len, self.rows))


class Prompter:
    """Turns items into tokens for one model.

    directory: of the model, for the tokens that end its answers.
    rows: of its embedding; a token beyond them, whatever names it, is none that it could say.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, directory: Path, rows: int | None = None) -> None:
        self.tokenizer = tokenizer
        self._directory, self._rows = directory, rows
        self.chats = bool(tokenizer.chat_template)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The tokens of which any ends an answer: the model's end of text or turn; where it has no chat template, also
        whatever begins with a line's end.

        Raises:
            AccullmError: there is none, so that no answer would ever be at its end.
        """
        ends = set(self._stops)
        if not self.chats:
            count = len(self.tokenizer) if self._rows is None else min(len(self.tokenizer), self._rows)
            tokens = self.tokenizer.convert_ids_to_tokens(list(range(count)))
            ends.update(number for number, token in enumerate(tokens) if token and token.startswith(_LINE_ENDS))
        if not ends:
            raise AccullmError(
                "neither the model nor its tokenizer names a token that ends an answer",
                self._directory,
                "give eos_token_id in generation_config.json",
            )
        return tuple(sorted(ends))

    @cached_property
    def _stops(self) -> frozenset[int]:
        """The model's end of text or turn: whoever generates stops there, wherever it comes."""
        stops = {*self._named_ends(), *([] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id])}
        if self.chats:
            tail = self._render([("user", "?"), ("assistant", "\u241f")], generates=False).rpartition("\u241f")[2]
            added = self.tokenizer.added_tokens_decoder
            stops.update(token for token in self._ids(tail)[:1] if token in added and str(added[token]).strip())
        return frozenset(token for token in stops if 0 <= token and (self._rows is None or token < self._rows))

    def question(self, item: Item) -> Question:
        """The item as tokens.

        Raises:
            AccullmError: messages without a chat template, or ones that do not fit it; a prompt of no tokens; an answer
                that no tokens spell.
        """
        if self.chats:
            text, leads = self._render(_turns(item)), [""]
        elif item.messages:
            raise AccullmError(
                "has messages, but the model's tokenizer has no chat template",
                f"task {item.task}, {item.kind}",
                "give prompt in their place",
            )
        else:
            text = _continued(item)
            leads = [""] if text[-1:].isspace() else [" "]
            if item.completion and not _is_one_word(text, item.answer):
                leads = list(dict.fromkeys([*leads, ""]))
        prompt = self._ids(text, starts=not self.chats)
        where = f"task {item.task}, {item.kind}"
        if not prompt:
            raise AccullmError("its prompt has no tokens", where, "give another prompt")
        spellings = tuple(dict.fromkeys(self._spellings(item, text, prompt, leads)))
        if not spellings:
            raise AccullmError(f"no tokens spell its answer {item.answer!r}", where, "give another answer")
        return Question(item, tuple(prompt), spellings, *_tree(spellings))

    def respelled(self, question: Question, path: Sequence[int], other: int) -> Question | None:
        """The question with one more spelling, if a token that the model would rather say spells its answer, too.

        Args:
            path: the tokens of a right answer before the place where the model leaves it, for `other`.
        """
        last = question.prompt[-1:]  # decoders strip spaces where a text begins
        before = self.text_of(last)
        said = self.text_of([*last, *path, other]).removeprefix(before)
        own = self.text_of([*last, *path]).removeprefix(before)
        whole = (self.text_of([*last, *row]).removeprefix(before) for row in question.spellings)
        for text in dict.fromkeys(whole):
            if len(said) > len(own) and text.startswith(said):
                spelling = (*path, other, *self._ids(text[len(said) :]))
                if spelling not in question.spellings:
                    spellings = (*question.spellings, spelling)
                    return Question(question.item, question.prompt, spellings, *_tree(spellings))
        return None

    def text_of(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False))

    # -- tokens ------------------------------------------------------------------------------------------------

    def _spellings(self, item: Item, text: str, prompt: list[int], leads: Sequence[str]) -> Iterator[tuple[int, ...]]:
        """The cuts of each right answer, with and without the spaces in front that it was given with; spaces behind it
        stand beyond its end. One that cannot be said is none: letters that the tokenizer does not have, or an end of
        the model's in the middle."""
        for answer in (item.answer, *item.also):
            whole = answer.rstrip()
            bare = whole.lstrip()
            for told in dict.fromkeys([*(lead + bare for lead in leads), *([whole] if whole != bare else [])]):
                together = self._ids(text + told, starts=not self.chats)
                behind = [together[len(prompt) :]] if together[: len(prompt)] == prompt else []
                for ids in (*behind, self._ids(told)):
                    said = self.text_of([*prompt[-1:], *ids]).removeprefix(self.text_of(prompt[-1:]))
                    if _letters(said) == _letters(bare) and self._stops.isdisjoint(ids):
                        yield tuple(ids)

    def _ids(self, text: str, starts: bool = False) -> list[int]:
        """Tokens of a text; `starts` puts in front what the tokenizer puts in front of every text."""
        return list(self.tokenizer(text, add_special_tokens=starts, verbose=False)["input_ids"]) if text else []

    def _render(self, turns: Sequence[tuple[str, str]], generates: bool = True) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generates))
        except Exception as error:  # a template is a program: it may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise AccullmError(
                f"a task does not fit the model's chat template ({reason})", self._directory, "mend chat_template.jinja"
            ) from None

    def _named_ends(self) -> Iterator[int]:
        """What config.json and generation_config.json name as the end, of which there may be several."""
        for name in ("config.json", "generation_config.json"):
            path = self._directory / name
            content: Any = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            value = content.get("eos_token_id")
            yield from (token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int))


def _turns(item: Item) -> list[tuple[str, str]]:
    shown = item.examples[: item.chat_examples]
    turns = [turn for question, answer in shown for turn in (("user", question), ("assistant", answer))]
    return [*turns, *(item.messages or [("user", item.question)])]


def _continued(item: Item) -> str:
    """A text that an answer continues."""
    if item.completion:
        return item.question
    shown = [f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in item.examples]
    return "".join([*shown, f"Question: {item.question}\nAnswer:"])


def _is_one_word(text: str, answer: str) -> bool:
    """Whether a text and what follows it at once would be read as one word or number."""
    return all(character.isascii() and character.isalnum() for character in (text[-1:], answer.lstrip()[:1]))


def _letters(text: str) -> str:
    """What is left of a text that tokenizers change: they may fold case, accents, and spaces."""
    folded = unicodedata.normalize("NFKD", text.casefold())
    return "".join(letter for letter in folded if not letter.isspace() and not unicodedata.combining(letter))


def with_spellings(question: Question, spellings: Sequence[Sequence[int]]) -> Question:
    """The question with these token sequences as its right answers."""
    right = tuple(map(tuple, spellings))
    return Question(question.item, question.prompt, right, *_tree(right))


def _tree(spellings: Sequence[tuple[int, ...]]) -> tuple[tuple[tuple[int, ...], ...], tuple[Node, ...]]:
    """The rows that hold all spellings, and the tree over them."""
    whole = set(spellings)
    rows = tuple(
        spelling
        for spelling in dict.fromkeys(spellings)
        if not any(len(other) > len(spelling) and other[: len(spelling)] == spelling for other in whole)
    )
    prefixes = list(dict.fromkeys(row[:depth] for row in rows for depth in range(len(row) + 1)))
    numbers = {prefix: number for number, prefix in enumerate(prefixes)}
    nodes = []
    for prefix in prefixes:
        following = dict.fromkeys(
            row[len(prefix)] for row in rows if row[: len(prefix)] == prefix and len(row) > len(prefix)
        )
        row = next(number for number, row in enumerate(rows) if row[: len(prefix)] == prefix)
        children = tuple(numbers[longer] for longer in ((*prefix, token) for token in following))
        nodes.append(Node(row, len(prefix), tuple(following), children, prefix in whole))
    return rows, tuple(nodes)
