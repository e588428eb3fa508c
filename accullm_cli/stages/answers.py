"""answers: how the original and an artifact answer the items of exact tasks, by teacher forcing, block by block.

Rows of tokens of one length go through the blocks together, so that nothing is padded and the result is exact for
every architecture. Some thousands of tokens are on their way at a time: memory grows neither with the number of items
nor with the model, and an interrupted call goes on behind the last of these portions.

It leaves in the run directory
    tasks/original.json         how the original answers, and the same for each artifact: for every item the places of
    tasks/answers-FORMAT.json   its right answers, and what the model puts there
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.measure.answers import Answer, Score, accepted_at, answer_of, score_nodes
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.tokenizer import check_ids
from accullm_cli.progress import Event
from accullm_cli.run import UP_TO_DATE, Reason, write_text
from accullm_cli.stages.artifact_weights import open_artifact_decoder
from accullm_cli.stages.device import compute_dtype
from accullm_cli.stages.job import Job, machine_inputs, open_decoder
from accullm_cli.stages.meaning import right_by_meaning
from accullm_cli.stages.precision import products
from accullm_cli.stages.stage import Before, Decision, Stage, Work
from accullm_cli.stages.streams import advance
from accullm_cli.stages.validate import foreseen_sha256
from accullm_cli.stages.whole_model import load_artifact
from accullm_cli.tasks import draw, parse_tasks
from accullm_cli.tasks.prompt import Prompter, Question, with_spellings
from accullm_cli.tasks.wordlist import ordinal

VERSION = 1
# Tokens that go through the blocks together: as many as validation's windows have by default.
PORTION = 8192
# A model may spell a right answer by other tokens than expected. Those are then counted as right, too, and the item is
# run again: so often in all.
TURNS = 4
# Positions that go through the output head at once.
POSITIONS = 64


@dataclass(frozen=True)
class Purpose:
    """What items are for: their own seed, their own files, their own stages.

    place: what the names of files begin with. original, measuring: stages, the latter with {} for the format.
    """

    name: str
    place: str
    original: str
    measuring: str


JUDGED = Purpose("judged", "tasks/", "task answers", "validate {} on tasks")
SEARCHED = Purpose("search", "search/tasks/", "search task answers", "measure {} on tasks")


def wants_tasks(job: Job) -> bool:
    return bool(parse_tasks(job.config.validation.tasks))


def questions_of(job: Job, purpose: Purpose) -> tuple[Prompter, list[Question]]:
    """The items that the configuration asks for, as tokens; made once for a job.

    Raises:
        AccullmError: one does not fit the model.
    """
    prompter = job.kept(f"{purpose.name} prompter", lambda: Prompter(job.tokenizer, job.source.directory))
    return prompter, job.kept(f"{purpose.name} questions", lambda: _questions(job, purpose, prompter))


def _questions(job: Job, purpose: Purpose, prompter: Prompter) -> list[Question]:
    options = job.config.validation
    items = draw(
        parse_tasks(options.tasks), options.task_items, job.config.machine.seed, purpose.name, job.config.search.golden
    )
    questions = [prompter.question(item) for item in items]
    text = job.source.config.get("text_config", job.source.config)
    positions = text.get("max_position_embeddings", text.get("n_positions"))
    for question in questions:
        if positions is not None and question.tokens > positions:
            raise AccullmError(
                f"task {question.item.name} takes {question.tokens} tokens, and the model has {positions} positions",
                "--tasks",
                "give an easier level, or fewer tokens",
            )
    ids = torch.tensor(sorted({token for question in questions for row in question.rows for token in row}))
    check_ids(ids[None], job.tokenizer, job.source.directory)
    return questions


def check_items(job: Job) -> None:
    """Make the items that will be needed, long before they are.

    Raises:
        AccullmError: one does not fit the model.
    """
    if wants_tasks(job):
        for purpose in (JUDGED, SEARCHED)[: 1 + job.config.search.golden]:
            questions_of(job, purpose)


def task_inputs(job: Job, purpose: Purpose) -> dict[str, str]:
    """What a stage depends on that reads the items: their tokens, wherever they come from, and what they are called."""
    prompter, questions = questions_of(job, purpose)
    digest = hashlib.sha256(json.dumps(prompter.ends).encode())
    for question in questions:
        facts = (question.item.name, question.prompt, question.rows, [node.may_end for node in question.nodes])
        digest.update(json.dumps(facts).encode())
    return {f"input:{purpose.name} items": f"{len(questions)}, {digest.hexdigest()}"}


def original_answers(purpose: Purpose) -> Stage:
    """The stage that has the original answer."""

    def inputs(job: Job, before: Before) -> dict[str, str]:
        return {
            "source:sha256": job.source.sha256,
            "version:answers": str(VERSION),
            **task_inputs(job, purpose),
            **machine_inputs(),
        }

    def work(job: Job, decision: Decision) -> Work:
        path = _path(job, purpose, None)
        decoder = open_decoder(job)
        _, questions = questions_of(job, purpose)
        with products("float32"):
            records = _answer(job, decision, purpose, path, questions, _by_blocks(decoder), decoder)
        return Work((path,), (*job.source.records, *records))

    files = (f"{purpose.place}original*.json",)
    return Stage(purpose.original, inputs, work, commands=("validate",), files=files)


def artifact_answers(format_name: str, artifact: Path, purpose: Purpose) -> Stage:
    """The stage that has an artifact answer."""

    def inputs(job: Job, before: Before) -> dict[str, str]:
        return {
            "input:artifact": foreseen_sha256(job, before, format_name, artifact),
            f"input:{purpose.original}": before[purpose.original].key,
            "version:answers": str(VERSION),
            **machine_inputs(job.device),
        }

    def work(job: Job, decision: Decision) -> Work:
        path = _path(job, purpose, format_name)
        decoder = open_artifact_decoder(artifact)
        logits_of = _whole(job, artifact) if job.device.type == "cuda" else _by_blocks(decoder)
        questions = _as_the_original_spells_them(job, purpose)
        with products("float32"):
            records = _answer(job, decision, purpose, path, questions, logits_of, decoder)
        return Work((path,), records)

    files = (f"{purpose.place}answers-{format_name}*.json",)
    name = purpose.measuring.format(format_name)
    return Stage(name, inputs, work, ("export", purpose.original), ("validate",), files, format_name)


def load_answers(job: Job, purpose: Purpose, format_name: str | None) -> list[Answer]:
    """What one of these stages left, in the order of the items; of the original where no format is named."""
    content = json.loads(_path(job, purpose, format_name).read_text())
    _, questions = questions_of(job, purpose)
    return [
        answer_of(with_spellings(question, told["spellings"]), [Score(*score) for score in told["scores"]])
        for question, told in zip(questions, content["items"], strict=True)
    ]


def _path(job: Job, purpose: Purpose, format_name: str | None) -> Path:
    return job.run.file(f"{purpose.place}{'original' if format_name is None else f'answers-{format_name}'}.json")


# -- forward passes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One sequence to run: which row of which question, and its tokens with the prompt in front."""

    question: int
    row: int
    ids: tuple[int, ...]


# For rows and places in each, their logits, row by row, some at a time: [some places, vocabulary].
_Logits = Callable[[Sequence[_Row], Sequence[Sequence[int]]], Iterator[torch.Tensor]]


def answer_items(job: Job, stage: str, key: str, purpose: Purpose, name: str, decoder: Decoder) -> None:
    """Have any weights answer, for `load_answers` with this name in the place of a format's; `key` names them."""
    decision, questions = Decision(stage, {"key": key}, Reason("new")), _as_the_original_spells_them(job, purpose)
    with products("float32"):
        _answer(job, decision, purpose, _path(job, purpose, name), questions, _by_blocks(decoder), decoder)


def _as_the_original_spells_them(job: Job, purpose: Purpose) -> list[Question]:
    """The items with every right answer that is known once the original has answered."""
    content = json.loads(_path(job, purpose, None).read_text())
    _, questions = questions_of(job, purpose)
    return [with_spellings(*entry) for entry in zip(questions, (i["spellings"] for i in content["items"]), strict=True)]


def _answer(
    job: Job,
    decision: Decision,
    purpose: Purpose,
    path: Path,
    asked: Sequence[Question],
    logits_of: _Logits,
    decoder: Decoder,
) -> tuple[str, ...]:
    """Write how a model answers; sentences about what could not be looked for."""
    prompter, _ = questions_of(job, purpose)
    questions = [*asked]
    scores: list[list[Score]] = [[] for _ in questions]
    store = _Portions(path.with_name(f"{path.stem}-portions.json"), decision.key)

    def ask(some: Mapping[int, Question], what: str) -> None:
        found = _pass(job, decision.stage, what, some, prompter.ends, store, logits_of)
        for number, question in some.items():
            questions[number] = question
            scores[number] = [found[number, node] for node in range(len(question.nodes))]

    asked_now = dict(enumerate(questions))
    ask(asked_now, "answers")
    for turn in range(1, TURNS):
        asked_now = dict(_respelled(prompter, {number: scores[number] for number in asked_now}, questions))
        if not asked_now:
            break
        ask(asked_now, f"answers, {ordinal(turn + 1)} spelling")
    wrong = {n: question for n, question in enumerate(questions) if not answer_of(question, scores[n]).is_right}
    by_meaning, records = right_by_meaning(decoder, prompter, wrong)
    if by_meaning:
        ask(by_meaning, "answers by meaning")
    content = [
        {"spellings": question.spellings, "scores": [astuple(score) for score in of_question]}
        for question, of_question in zip(questions, scores, strict=True)
    ]
    write_text(path, json.dumps({"score": [field.name for field in fields(Score)], "items": content}))
    store.remove()
    return records


def _respelled(
    prompter: Prompter, scores: Mapping[int, Sequence[Score]], questions: Sequence[Question]
) -> Iterator[tuple[int, Question]]:
    """The questions of which the model began a right answer with other tokens than those that were known."""
    for number, of_question in scores.items():
        answer = answer_of(questions[number], of_question)
        if not answer.is_right:
            other = prompter.respelled(questions[number], answer.path[: answer.place], answer.other)
            if other is not None:
                yield number, other


def _pass(
    job: Job,
    stage: str,
    what: str,
    questions: Mapping[int, Question],
    ends: Sequence[int],
    store: _Portions,
    logits_of: _Logits,
) -> dict[tuple[int, int], Score]:
    """The score of every node, by question and node."""
    rows = [
        _Row(number, place, (*question.prompt, *row))
        for number, question in questions.items()
        for place, row in enumerate(question.rows)
    ]
    rows.sort(key=lambda row: len(row.ids))
    done, found = 0, {}
    for portion in _portions(rows):
        scores = store.next()
        reason = UP_TO_DATE if scores is not None else None
        if scores is None:
            scores = _score(portion, questions, ends, logits_of)
            store.add(scores)
        found.update({(question, node): Score(*score) for question, node, score in scores})
        done += len(portion)
        job.progress(Event(stage, "step", f"{what} {done}/{len(rows)}", reason, done, len(rows)))
    return found


def _portions(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    portion: list[_Row] = []
    for row in rows:
        if portion and sum(len(other.ids) for other in portion) + len(row.ids) > PORTION:
            yield portion
            portion = []
        portion.append(row)
    if portion:
        yield portion


def _score(
    portion: Sequence[_Row], questions: Mapping[int, Question], ends: Sequence[int], logits_of: _Logits
) -> list[tuple[int, int, tuple[Any, ...]]]:
    """(question, node, score) of the nodes that these rows lead to.

    Raises:
        AccullmError: logits are not finite.
    """
    nodes = [
        [number for number, node in enumerate(questions[row.question].nodes) if node.row == row.row] for row in portion
    ]
    places = [
        [len(questions[row.question].prompt) - 1 + questions[row.question].nodes[number].depth for number in numbers]
        for row, numbers in zip(portion, nodes, strict=True)
    ]
    accepted = [
        accepted_at(questions[row.question].nodes[number], ends)
        for row, numbers in zip(portion, nodes, strict=True)
        for number in numbers
    ]
    keys = [(row.question, number) for row, numbers in zip(portion, nodes, strict=True) for number in numbers]
    scores: list[Score] = []
    for logits in logits_of(portion, places):
        if not bool(torch.isfinite(logits).all()):
            raise AccullmError("logits hold NaN or Inf", "tasks", "look for damaged weights, or run accullm verify")
        scores += score_nodes(logits, accepted[len(scores) : len(scores) + len(logits)])
    return [(*key, astuple(score)) for key, score in zip(keys, scores, strict=True)]


def _by_length(portion: Sequence[_Row]) -> Mapping[int, list[int]]:
    """The numbers of rows by their length."""
    lengths: dict[int, list[int]] = {}
    for number, row in enumerate(portion):
        lengths.setdefault(len(row.ids), []).append(number)
    return lengths


def _by_blocks(decoder: Decoder) -> _Logits:
    """Block by block, all rows of a portion through one block before the next is read."""

    def logits_of(portion: Sequence[_Row], places: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
        groups = _by_length(portion)
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
        behind = torch.cat([hidden[number] for number in range(len(portion))])[None]
        for part in behind.split(POSITIONS, dim=1):
            yield decoder.logits(part)[0]
        decoder.release_outside()

    return logits_of


def _whole(job: Job, artifact: Path) -> _Logits:
    """By the whole model on a GPU, in the precision in which it will be used there."""
    model = load_artifact(artifact, job.device, compute_dtype(job.device, job.source.config))

    def logits_of(portion: Sequence[_Row], places: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
        for row, wanted in zip(portion, places, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([row.ids], device=model.device), use_cache=False).logits[0]
            yield logits[list(wanted)].float()

    return logits_of


class _Portions:
    """The portions that are done, on disk, valid for one key."""

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key, self._told = path, key, 0
        content = json.loads(path.read_text()) if path.exists() else {}
        self.scores: list[list[tuple[int, int, tuple[Any, ...]]]] = []
        if content.get("key") == key:
            self.scores = [[(a, b, tuple(score)) for a, b, score in scores] for scores in content["portions"]]

    def next(self) -> list[tuple[int, int, tuple[Any, ...]]] | None:
        """The scores of the next portion, if it is done."""
        if self._told == len(self.scores):
            return None
        self._told += 1
        return self.scores[self._told - 1]

    def add(self, scores: list[tuple[int, int, tuple[Any, ...]]]) -> None:
        self._told += 1
        self.scores.append(scores)
        write_text(self._path, json.dumps({"key": self._key, "portions": self.scores}))

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
