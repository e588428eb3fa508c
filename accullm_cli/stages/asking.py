"""asking: questions put to a model, by teacher forcing block by block, or for the model to write its own answer.

Rows of tokens of one length go through the blocks together, so that nothing is padded and the result is exact for
every architecture. Some thousands of tokens are on their way at a time: memory grows neither with the number of items
nor with the model. Only to write does a model have to be in memory as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.measure.answers import Score, accepted_at, score_nodes
from accullm_cli.model.blocks import Decoder
from accullm_cli.progress import Event
from accullm_cli.run import UP_TO_DATE, write_text
from accullm_cli.stages.job import Job
from accullm_cli.stages.stage import Decision
from accullm_cli.stages.streams import POSITIONS, advance
from accullm_cli.tasks.prompt import Question
from accullm_cli.units import size

# Tokens that go through the blocks together: as many as validation's windows have by default.
PORTION = 8192
# Of the memory that is free, what a whole model in float32 may take.
SHARE_OF_MEMORY = 0.5


@dataclass(frozen=True)
class Row:
    """One sequence to run: which row of which question, and its tokens with the prompt in front."""

    question: int
    row: int
    ids: tuple[int, ...]


# For rows and places in each, their logits, row by row, some at a time: [some places, vocabulary].
Logits = Callable[[Sequence[Row], Sequence[Sequence[int]]], Iterator[torch.Tensor]]


class Asker:
    """One model, and the questions that it has answered so far.

    Args:
        path: of what will be made of the answers. Beside it is kept what is finished, so that an interrupted call
            goes on from there.
        ends: the tokens of which any ends an answer.
        decoder: of the model.
    """

    def __init__(self, job: Job, decision: Decision, path: Path, ends: Sequence[int], decoder: Decoder) -> None:
        self._job, self._stage, self._ends = job, decision.stage, ends
        self._decoder, self._logits_of = decoder, by_blocks(decoder)
        self._finished = _Finished(path, decision.key)

    def scores(self, what: str, questions: Mapping[int, Question]) -> dict[int, list[Score]]:
        """The score of every node of each question.

        Args:
            what: names this round of questions: another name for each.

        Raises:
            AccullmError: logits are not finite.
        """
        rows = [
            Row(number, place, (*question.prompt, *row))
            for number, question in questions.items()
            for place, row in enumerate(question.rows)
        ]
        rows.sort(key=lambda row: len(row.ids))
        done, found = 0, {}
        for portion in _portions(rows):
            told, is_known = self._finished.step(
                f"{what} {done}", _score, portion, questions, self._ends, self._logits_of
            )
            found.update({(question, node): Score(*score) for question, node, score in told})
            done += len(portion)
            self._step(f"{what} {done}/{len(rows)}", is_known, done, len(rows))
        return {n: [found[n, node] for node in range(len(question.nodes))] for n, question in questions.items()}

    def lacks(self) -> str:
        """Why the model cannot write: "it takes 28 GB of memory, of which ..."; "" where it can."""
        needed, free = bytes_of(self._decoder), self._job.compute.free_memory()
        if free is None or fits(needed, free):
            return ""
        return f"it takes {size(needed)} of memory, of which {size(free)} are free"

    def written(self, what: str, questions: Mapping[int, Question], limits: Mapping[int, int]) -> dict[int, list[int]]:
        """What the model says of itself, greedily, the end included if it comes to one within `limits` tokens."""
        if not questions:
            return {}
        for index in range(len(self._decoder.block_names)):
            self._decoder.load_block(index)
        self._decoder.load_outside()
        found = {}
        for done, (number, question) in enumerate(questions.items(), start=1):
            found[number], is_known = self._finished.step(
                f"{what} {number}", _written, self._decoder, question, self._ends, limits[number]
            )
            self._step(f"{what} {done}/{len(questions)}", is_known, done, len(questions))
        for index in range(len(self._decoder.block_names)):
            self._decoder.release_block(index)
        self._decoder.release_outside()
        return found

    def forget(self) -> None:
        """Nothing of what is finished will be asked for again."""
        self._finished.remove()

    def _step(self, label: str, is_known: bool, done: int, total: int) -> None:
        self._job.progress(Event(self._stage, "step", label, UP_TO_DATE if is_known else None, done, total))


class _Finished:
    """What was computed step by step, a file each, valid for one key."""

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key, self._count = path, key, 0

    def step(self, what: str, make: Callable[..., Any], *arguments: Any) -> tuple[Any, bool]:
        """What `make` gives, which must have a place in JSON, and whether an earlier call found it."""
        path, valid_for = self._path.with_name(f"{self._path.stem}-step-{self._count}.json"), [self._key, what]
        self._count += 1
        content = json.loads(path.read_text()) if path.exists() else {}
        if content.get("valid for") == valid_for:
            return content["made"], True
        made = make(*arguments)
        write_text(path, json.dumps({"valid for": valid_for, "made": made}))
        return made, False

    def remove(self) -> None:
        for path in self._path.parent.glob(f"{self._path.stem}-step-*.json"):
            path.unlink()


# -- forward passes ----------------------------------------------------------------------------------------------


def _portions(rows: Sequence[Row]) -> Iterator[list[Row]]:
    portion: list[Row] = []
    tokens = 0
    for row in rows:
        if portion and tokens + len(row.ids) > PORTION:
            yield portion
            portion, tokens = [], 0
        portion.append(row)
        tokens += len(row.ids)
    if portion:
        yield portion


def _score(
    portion: Sequence[Row], questions: Mapping[int, Question], ends: Sequence[int], logits_of: Logits
) -> list[tuple[int, int, tuple[Any, ...]]]:
    """(question, node, score) of the nodes that these rows lead to.

    Raises:
        AccullmError: logits are not finite.
    """
    keys: list[tuple[int, int]] = []
    accepted: list[tuple[int, ...]] = []
    places: list[list[int]] = []
    for row in portion:
        question, of_row = questions[row.question], []
        for number, node in enumerate(question.nodes):
            if node.row == row.row:
                keys.append((row.question, number))
                accepted.append(accepted_at(node, ends))
                of_row.append(len(question.prompt) - 1 + node.depth)
        places.append(of_row)
    scores: list[Score] = []
    for logits in logits_of(portion, places):
        if not bool(torch.isfinite(logits).all()):
            raise AccullmError("logits hold NaN or Inf", "tasks", "look for damaged weights, or run accullm verify")
        scores += score_nodes(logits, accepted[len(scores) : len(scores) + len(logits)])
    return [(*key, astuple(score)) for key, score in zip(keys, scores, strict=True)]


def by_blocks(decoder: Decoder) -> Logits:
    """Block by block, all rows of a portion through one block before the next is read."""

    def logits_of(portion: Sequence[Row], places: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
        decoder.forget_calls()  # of another portion's lengths
        groups: dict[int, list[int]] = {}
        for number, row in enumerate(portion):
            groups.setdefault(len(row.ids), []).append(number)
        decoder.load_outside()
        streams = [
            decoder.embed_all(torch.tensor([portion[number].ids for number in numbers])) for numbers in groups.values()
        ]
        decoder.release_outside()
        for index in range(len(decoder.block_names)):
            block = decoder.load_block(index)
            for stream in streams:
                advance(decoder, index, block, stream)
            decoder.release_block(index)
        hidden: dict[int, torch.Tensor] = {}
        for numbers, stream in zip(groups.values(), streams, strict=True):
            for place, number in enumerate(numbers):
                hidden[number] = stream[place, places[number]]
        decoder.load_outside()
        # The final norm and the output head see each position alone.
        for part in torch.cat([hidden[number] for number in range(len(portion))]).split(POSITIONS):
            yield decoder.logits(part[None])[0].cpu()
        decoder.release_outside()

    return logits_of


# -- writing -----------------------------------------------------------------------------------------------------


def bytes_of(decoder: Decoder) -> int:
    """What the whole model takes in float32."""
    return 4 * sum(parameter.numel() for parameter in decoder.model.parameters())


def fits(needed: int, free: int) -> bool:
    """Whether a model of so many bytes may be in memory as a whole."""
    return needed <= SHARE_OF_MEMORY * free


@torch.no_grad()
def _written(decoder: Decoder, question: Question, ends: Sequence[int], limit: int) -> list[int]:
    prompt = torch.tensor([question.prompt], device=decoder.device)
    ids: torch.Tensor = decoder.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=list(ends),
        pad_token_id=ends[0],
    )
    return list(map(int, ids[0, len(question.prompt) :]))
