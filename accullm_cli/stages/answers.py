"""answers: how the original and an artifact answer the items of exact tasks.

Both are held against two references: the right answers, and what the original says of itself. Where the original is
right, these are the same. Where it is wrong, it writes its answer, for a few items of each task; the artifact then
need not write, as one forward pass tells whether it would say that, too.

It leaves in the run directory
    tasks/original.json         for every item its right answers as tokens, what the model puts at each of their places,
    tasks/answers-FORMAT.json   and of the original what it says of itself, of an artifact whether it says the same
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.measure.answers import Answer, Score, answer_of
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.tokenizer import check_ids, embedding_rows
from accullm_cli.run import Reason, write_text
from accullm_cli.stages.artifact_weights import open_artifact_decoder
from accullm_cli.stages.asking import Asker
from accullm_cli.stages.job import Job, open_decoder
from accullm_cli.stages.stage import Before, Decision, Stage, Work
from accullm_cli.stages.validate import foreseen_sha256
from accullm_cli.tasks import draw, family_of, is_right, parse_tasks, repetitions
from accullm_cli.tasks.prompt import Prompter, Question, with_spellings
from accullm_cli.tasks.wordlist import ordinal

VERSION = 2
# A model may spell a right answer by other tokens than expected. Those are then counted as right, too, and the item is
# run again: so often in all.
TURNS = 4
# Of each task, the first items on which an artifact's whole answers are held against the original's. Where the original
# is wrong it has to write its answer, token after token.
COMPARED = 20


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
    directory = job.source.directory
    prompter = job.kept("prompter", lambda: Prompter(job.tokenizer, directory, embedding_rows(directory)))
    return prompter, job.kept(f"{purpose.name} questions", lambda: _questions(job, purpose, prompter))


def _questions(job: Job, purpose: Purpose, prompter: Prompter) -> list[Question]:
    options, positions = job.config.validation, job.positions
    tasks = parse_tasks(options.tasks)
    for task in tasks:  # before as many texts of that length are made as there are items
        if positions is not None and task.level.isdecimal() and int(task.level) > positions:
            raise AccullmError(
                f"task {task.name} takes some {task.level} tokens, and the model has {positions} positions",
                "--tasks",
                "give fewer tokens",
            )
    questions = []
    for item in draw(tasks, options.task_items, job.config.machine.seed, purpose.name, job.config.search.golden):
        question = prompter.question(item)
        if positions is not None and question.tokens > positions:
            raise AccullmError(
                f"task {item.name} takes {question.tokens} tokens, and the model has {positions} positions",
                "--tasks",
                "give shorter prompts" if family_of(item) is None else "give an easier level, or fewer tokens",
            )
        questions.append(question)
    tokens = {token for question in questions for row in (question.prompt, *question.rows) for token in row}
    ids = torch.tensor(sorted(tokens.union(prompter.ends)))
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


def most_written(job: Job, purpose: Purpose) -> int:
    """Tokens that the original writes of itself, if it is wrong on every item."""
    _, questions = questions_of(job, purpose)
    compared = _first_of_each_task(questions)
    wrong = {n: question for n, question in enumerate(questions) if n in compared or _may_be_in_other_words(question)}
    return sum(_limits(job, wrong).values())


def original_answers(purpose: Purpose) -> Stage:
    """The stage that has the original answer."""

    def inputs(job: Job, before: Before) -> dict[str, str]:
        return {
            "source:sha256": job.source.sha256,
            "version:answers": str(VERSION),
            **task_inputs(job, purpose),
            **job.compute.inputs(),
        }

    def work(job: Job, decision: Decision) -> Work:
        decoder = open_decoder(job)
        _, questions = questions_of(job, purpose)
        work = _answer(job, decision, purpose, None, questions, decoder)
        left_out = repetitions(parse_tasks(job.config.validation.tasks))
        return Work(work.outputs, (*job.source.records, *left_out, *work.records))

    files = (f"{purpose.place}original*.json",)
    return Stage(purpose.original, inputs, work, commands=("validate",), files=files)


def artifact_answers(format_name: str, artifact: Path, purpose: Purpose) -> Stage:
    """The stage that has an artifact answer."""

    def inputs(job: Job, before: Before) -> dict[str, str]:
        return {
            "input:artifact": foreseen_sha256(job, before, format_name, artifact),
            f"input:{purpose.original}": before[purpose.original].key,
            "version:answers": str(VERSION),
            **job.compute.inputs(),
        }

    def work(job: Job, decision: Decision) -> Work:
        decoder = open_artifact_decoder(artifact, job.compute)
        questions = _as_the_original_spells_them(job, purpose)
        return _answer(job, decision, purpose, format_name, questions, decoder)

    files = (f"{purpose.place}answers-{format_name}*.json",)
    name = purpose.measuring.format(format_name)
    return Stage(name, inputs, work, ("export", purpose.original), ("validate",), files, format_name)


def load_answers(job: Job, purpose: Purpose, format_name: str | None) -> list[Answer]:
    """What one of these stages left, in the order of the items; of the original where no format is named."""
    _, questions = questions_of(job, purpose)
    return [
        answer_of(with_spellings(question, told["spellings"]), [Score(*score) for score in told["scores"]])
        for question, told in zip(questions, _load(job, purpose, format_name), strict=True)
    ]


def load_agreement(job: Job, purpose: Purpose, format_name: str) -> list[bool | None]:
    """Whether an artifact's whole answer to each item is the original's; None where they were not compared."""
    return [told["agrees"] for told in _load(job, purpose, format_name)]


def _load(job: Job, purpose: Purpose, format_name: str | None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(_path(job, purpose, format_name).read_text())["items"]
    return found


def _path(job: Job, purpose: Purpose, format_name: str | None) -> Path:
    return job.run.file(f"{purpose.place}{'original' if format_name is None else f'answers-{format_name}'}.json")


# -- how one model answers ---------------------------------------------------------------------------------------


def answer_items(job: Job, stage: str, key: str, purpose: Purpose, name: str, decoder: Decoder) -> None:
    """Have any weights answer, for `load_answers` with this name in the place of a format's; `key` names them."""
    decision, questions = Decision(stage, {"key": key}, Reason("new")), _as_the_original_spells_them(job, purpose)
    _answer(job, decision, purpose, name, questions, decoder)


def _as_the_original_spells_them(job: Job, purpose: Purpose) -> list[Question]:
    """The items with every right answer that is known once the original has answered."""
    _, questions = questions_of(job, purpose)
    spellings = (told["spellings"] for told in _load(job, purpose, None))
    return [with_spellings(*entry) for entry in zip(questions, spellings, strict=True)]


def _answer(
    job: Job,
    decision: Decision,
    purpose: Purpose,
    format_name: str | None,
    asked: Sequence[Question],
    decoder: Decoder,
) -> Work:
    """Write down how a model answers: the original where no format is named."""
    prompter, _ = questions_of(job, purpose)
    path = _path(job, purpose, format_name)
    asker = Asker(job, decision, path, prompter.ends, decoder)
    with job.compute.products("float32"):
        answered = _by_known_texts(prompter, asker, asked)
        wrong = {n: entry.question for n, entry in answered.items() if not entry.answer.is_right}
        compared = _first_of_each_task(asked) if format_name is None else set()
        to_write = {n: question for n, question in wrong.items() if n in compared or _may_be_in_other_words(question)}
        records = _not_written(asker, len(to_write), is_original=format_name is None)
        said = {} if records else asker.written("writing", to_write, _limits(job, to_write))
        in_other_words = {
            n: with_spellings(wrong[n], (*wrong[n].spellings, tokens[:-1]))
            for n, tokens in said.items()
            if _means_the_same(prompter, wrong[n], tokens)
        }
        answered |= _asked(asker, "answers in other words", in_other_words)
        if format_name is None:
            said |= {n: list(answered[n].answer.path) for n in compared if answered[n].answer.is_right}
            # Of all or of none: an estimate from those that are right alone would be another one.
            are_all = said.keys() >= compared
            of_each: list[Any] = [said[n] if are_all and n in compared else None for n in range(len(asked))]
        else:
            of_each = _agree(job, purpose, asker, prompter.ends, answered)
    own_name = "said" if format_name is None else "agrees"
    items = [
        {"spellings": entry.question.spellings, "scores": list(map(astuple, entry.scores)), own_name: own}
        for entry, own in zip((answered[n] for n in range(len(asked))), of_each, strict=True)
    ]
    write_text(path, json.dumps({"score": [field.name for field in fields(Score)], "items": items}))
    asker.forget()
    return Work((path,), records)


@dataclass(frozen=True)
class _Answered:
    """A question with the right answers that are known by now, and the score of each of its nodes."""

    question: Question
    scores: list[Score]

    @property
    def answer(self) -> Answer:
        return answer_of(self.question, self.scores)


def _asked(asker: Asker, what: str, questions: Mapping[int, Question]) -> dict[int, _Answered]:
    scores = asker.scores(what, questions)
    return {number: _Answered(question, scores[number]) for number, question in questions.items()}


def _by_known_texts(prompter: Prompter, asker: Asker, asked: Sequence[Question]) -> dict[int, _Answered]:
    """Every item by its right texts, cut into tokens as the model cuts them."""
    answered = _asked(asker, "answers", dict(enumerate(asked)))
    again = answered
    for turn in range(1, TURNS):
        respelled = dict(_respelled(prompter, again))
        if not respelled:
            break
        again = _asked(asker, f"answers, {ordinal(turn + 1)} spelling", respelled)
        answered |= again
    return answered


def _respelled(prompter: Prompter, answered: Mapping[int, _Answered]) -> Iterator[tuple[int, Question]]:
    """The questions of which the model began a right answer with other tokens than those that were known."""
    for number, entry in answered.items():
        answer = entry.answer
        if not answer.is_right:
            other = prompter.respelled(entry.question, answer.path[: answer.place], answer.other)
            if other is not None:
                yield number, other


# -- what a model says of itself ---------------------------------------------------------------------------------


def _first_of_each_task(questions: Sequence[Question]) -> set[int]:
    """The items on which whole answers are compared."""
    seen: Counter[str] = Counter()
    found = set()
    for number, question in enumerate(questions):
        seen[question.item.task] += 1
        if seen[question.item.task] <= COMPARED:
            found.add(number)
    return found


def _may_be_in_other_words(question: Question) -> bool:
    family = family_of(question.item)
    return family is not None and family.by_meaning


def _means_the_same(prompter: Prompter, question: Question, said: Sequence[int]) -> bool:
    """Whether what a model says to its end is right, in words that were not known."""
    if not _may_be_in_other_words(question) or len(said) < 2 or said[-1] not in prompter.ends:
        return False
    return is_right(question.item, prompter.text_of(said[:-1]))


def _limits(job: Job, questions: Mapping[int, Question]) -> dict[int, int]:
    """How many tokens a model may say: one more than a right answer takes, in other words twice as many."""
    positions = job.positions
    limits = {}
    for number, question in questions.items():
        limit = (2 if _may_be_in_other_words(question) else 1) * max(map(len, question.rows)) + 1
        limits[number] = limit if positions is None else min(limit, positions - len(question.prompt))
    return limits


def _not_written(asker: Asker, count: int, is_original: bool) -> tuple[str, ...]:
    """A sentence where the model cannot write what it is wanted to."""
    if not count or not (lacks := asker.lacks()):
        return ()
    unknown = "whether other words mean the same"
    if is_original:
        unknown += ", and whether artifacts give the same wrong answers,"
    answers = "1 wrong answer was" if count == 1 else f"{count} wrong answers were"
    return (f"{answers} not written out by the model, as {lacks}; {unknown} is not known",)


def _agree(
    job: Job, purpose: Purpose, asker: Asker, ends: Sequence[int], answered: Mapping[int, _Answered]
) -> list[bool | None]:
    """Whether this artifact says, token by token and to the end, what the original does; by which end does not matter.

    Of an answer that the original did not bring to an end within its limit, the tokens up to there count.
    """
    found: list[bool | None] = [None] * len(answered)
    others: dict[int, Question] = {}
    ended = set()
    for number, (original, told) in enumerate(
        zip(load_answers(job, purpose, None), _load(job, purpose, None), strict=True)
    ):
        said = told["said"]
        if said is None:
            continue
        answer = answered[number].answer
        if original.is_right:
            found[number] = answer.is_right and list(answer.path[:-1]) == said[:-1]
            continue
        if said[-1] in ends:
            ended.add(number)
        others[number] = with_spellings(answered[number].question, [said[:-1] if number in ended else said])
    for number, entry in _asked(asker, "the original's answers", others).items():
        nodes = zip(entry.question.nodes, entry.scores, strict=True)
        found[number] = all(score.is_first for node, score in nodes if node.tokens or number in ended)
    return found
