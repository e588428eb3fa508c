"""How many of the original's right answers an artifact keeps, and how many whole answers are the original's.

Beside the counts stands what moves long before an answer flips: the margin in log-probability between the right answer
and the best other one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from accullm_cli.measure.answers import Answer
from accullm_cli.measure.measurement import (
    Answer as ShownAnswer,
)
from accullm_cli.measure.measurement import (
    Case,
    Cases,
    Estimate,
    Figure,
    Group,
    Histogram,
    Mark,
    Measurement,
    Pairs,
    Samples,
    Table,
)
from accullm_cli.measure.statistics import bootstrap_mean, mcnemar, wilson
from accullm_cli.tasks.prompt import Question

TASKS = "tasks"
# Of fewer right answers of the original, or fewer compared ones, nothing is said.
ENOUGH = 10
# Regressions that the report shows side by side, and characters of a prompt at either end.
SHOWN, PROMPT = 40, 400
# The original's margin below which a lost answer was a coin toss: tokens as likely as 55 to 45.
COIN_TOSS = 0.2
# So many losses at one step are told as one.
REPEATED = 3
# A task fails where so few splits of its changed answers would be as uneven by chance.
SIGNIFICANT = 0.05
# How much larger or smaller the artifact's loss is imagined to be.
FACTORS = tuple(2 ** (step / 4) for step in range(-16, 17))


@dataclass(frozen=True)
class Held:
    """One item: how the original answers it, and how the artifact does.

    agrees: whether the artifact's whole answer is the original's, right or wrong; None where that was not looked at.
    """

    question: Question
    original: Answer
    artifact: Answer
    agrees: bool | None = None

    @property
    def is_lost(self) -> bool:
        return self.original.is_right and not self.artifact.is_right

    @property
    def is_won(self) -> bool:
        return self.artifact.is_right and not self.original.is_right

    @property
    def change(self) -> float:
        """Of the margin, in nats."""
        return self.artifact.margin - self.original.margin


def retention_found(held: Sequence[Held], text_of: Callable[[Sequence[int]], str], seed: int) -> Measurement:
    """What became of the original's right answers.

    Args:
        text_of: tokens as text. seed: of the resampling behind the interval of the margins.
    """
    tasks = _tasks(held)
    right = [entry for entry in held if entry.original.is_right]
    lost = [entry for entry in held if entry.is_lost]
    won = sum(entry.is_won for entry in held)
    figures = [_retention("retention", "retention", "Right answers kept", held)]
    for task, of_task in tasks.items():
        label = f"retention, {task}" if len(tasks) > 1 else ""
        figures += [_retention(f"retention.{task}", label, "", of_task), _exact(f"exact_match.{task}", "", of_task)]
        figures += [_agreement(f"agreement.{task}", "", "", of_task)]
    figures += [_agreement("agreement", "whole answers alike", "Whole answers alike", held)]
    figures += [_exact("exact_match", "Exactly right, artifact", held), _exact_original(held)]
    if len(right) > 1:
        figures += _margins(right, seed)
    split, step = f"{len(lost)} lost, {won} won", _one_step(lost, text_of)
    return Measurement(
        measure=TASKS,
        heading="Exact tasks",
        about=f"Measured on {len(held)} items of exact tasks: {', '.join(tasks)}.",
        figures=tuple(figures),
        counts=(("items", len(held)), ("right", len(right)), ("lost", len(lost)), ("won", won)),
        facts=(
            ("answers that changed", f"{split}; {_chance(len(lost), won)}"),
            *([("lost at one step", step)] if step else []),
        ),
        summary=_summary(held, right, lost) + (f" Lost at one step: {step}." if step else ""),
        note=_NOTE,
        samples=_samples(held, right),
        tables=(_table(tasks),),
        histograms=_histograms(right),
        pairs=_pairs(right),
        cases=(_cases(lost, text_of),) if lost else (),
        groups=tuple(_group(task, of_task, text_of) for task, of_task in tasks.items()),
    )


_NOTE = (
    "An item counts as right if greedy decoding gives exactly a right answer and ends there, told by one forward pass "
    "over the answer. Retention is the share of the original's right answers that the artifact gives, too; its "
    "interval is Wilson's, as if each answer were lost by itself: where many are lost at one step, it says too much. "
    "The margin of an answer is the smallest difference, over its tokens, between the log-probability of the right "
    "token and that of the best other one. Whole answers are alike if the artifact says, token by token, what the "
    "original does, right or wrong; they are compared on the first items of each task."
)


def _tasks(held: Sequence[Held]) -> dict[str, list[Held]]:
    tasks: dict[str, list[Held]] = {}
    for entry in held:
        tasks.setdefault(entry.question.item.task, []).append(entry)
    return tasks


# -- figures -----------------------------------------------------------------------------------------------------


def _retention(name: str, label: str, title: str, held: Sequence[Held]) -> Figure:
    right = [entry for entry in held if entry.original.is_right]
    kept = sum(entry.artifact.is_right for entry in right)
    counts = f"{kept} of {len(right)} right answers of the original's"
    if len(right) < ENOUGH:
        counts = f"the original is right on {len(right)} of {len(held)} items, too few to say anything"
    return Figure(
        name,
        wilson(kept, len(right)) if len(right) >= ENOUGH else None,
        label=label,
        title=title,
        digits=".2%",
        aside=counts,
        form=".2%",
        note=counts,
        best=1.0,
        curve=_curve(right) if len(right) >= ENOUGH else (),
    )


def _curve(right: Sequence[Held]) -> tuple[tuple[float, float], ...]:
    """Retention if the loss were larger by a factor: what moves margins grows as the root of the loss."""
    return tuple(
        (factor, sum(entry.original.margin + math.sqrt(factor) * entry.change > 0 for entry in right) / len(right))
        for factor in FACTORS
    )


def _agreement(name: str, label: str, title: str, held: Sequence[Held]) -> Figure:
    compared = [entry for entry in held if entry.agrees is not None]
    alike = sum(entry.agrees is True for entry in compared)
    wrong = [entry.agrees for entry in compared if not entry.original.is_right]
    counts = f"{alike} of {len(compared)} are the original's; of its {len(wrong)} wrong ones {sum(map(bool, wrong))}"
    if not compared:
        counts = "the original could not write its wrong answers"
    elif len(compared) < ENOUGH:
        counts = f"{len(compared)} compared, too few to say anything"
    return Figure(
        name,
        wilson(alike, len(compared)) if len(compared) >= ENOUGH else None,
        label=label,
        title=title,
        digits=".2%",
        aside=counts,
        form=".2%",
        note=counts,
        best=1.0,
    )


def _exact(name: str, title: str, held: Sequence[Held]) -> Figure:
    found = wilson(sum(entry.artifact.is_right for entry in held), len(held))
    best = sum(entry.original.is_right for entry in held) / len(held)
    return Figure(name, found, title=title, digits=".2%", form=".2%", best=best)


def _exact_original(held: Sequence[Held]) -> Figure:
    found = wilson(sum(entry.original.is_right for entry in held), len(held))
    return Figure("exact_match_original", found, title="Exactly right, original", form=".2%")


def _margins(right: Sequence[Held], seed: int) -> Iterator[Figure]:
    """The mean margin over the original's right answers, and its paired change."""

    def mean(values: Sequence[float]) -> Estimate:
        return bootstrap_mean([torch.tensor([value], dtype=torch.float64) for value in values], seed)

    of_original = sum(entry.original.margin for entry in right) / len(right)
    yield Figure(
        "margin",
        mean([entry.artifact.margin for entry in right]),
        title="Mean margin of right answers",
        form=".3f",
        note=f"nats; the original's is {of_original:.3f}",
    )
    yield Figure(
        "margin_change",
        mean([entry.change for entry in right]),
        label="change of the margin",
        title="Its change",
        digits=".3f",
        unit="nats",
        form=".3f",
        note="nats, answer by answer",
    )


def _chance(lost: int, won: int) -> str:
    return f"McNemar's exact p = {mcnemar(lost, won):.3g}"


def _one_step(lost: Sequence[Held], text_of: Callable[[Sequence[int]], str]) -> str:
    """Where many losses are one, or "": answers of one form may all hang by the same decision."""
    items = ((entry.question.item, entry.artifact) for entry in lost)
    steps = Counter((item.task, item.kind, answer.path[answer.place], answer.other) for item, answer in items)
    for (task, kind, right, other), count in steps.most_common(1):
        if count >= REPEATED:
            what = f"{text_of([other])!r} takes the place of {text_of([right])!r}"
            return f"{count} of {len(lost)}, in {task}, {kind}, where {what}"
    return ""


def _summary(held: Sequence[Held], right: Sequence[Held], lost: Sequence[Held]) -> str:
    if len(right) < ENOUGH:
        return (
            f"Of {len(held)} exact tasks the original gets {len(right)} right, too few to say how many the artifact "
            "keeps."
        )
    return (
        f"Of {len(right):,} exact tasks that the original gets right, the artifact gets {len(right) - len(lost):,} "
        f"right, too ({(len(right) - len(lost)) / len(right):.2%})."
    )


def _samples(held: Sequence[Held], right: Sequence[Held]) -> tuple[Samples, ...]:
    """By what was asked, so that two artifacts are paired on the same items alone."""
    asked = [(entry.question.prompt, entry.question.rows, entry.original.is_right) for entry in held]
    of = f"{len(held)} items, {hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]}"
    agreement = tuple(float(entry.agrees) for entry in held if entry.agrees is not None)
    by_task = {f"retention.{task}": [e for e in right if e.question.item.task == task] for task in _tasks(held)}
    return (
        Samples("exact_match", "item", of, tuple(float(entry.artifact.is_right) for entry in held)),
        Samples("margin", "item", of, tuple(entry.artifact.margin for entry in right)),
        *([Samples("agreement", "item", of, agreement)] if agreement else []),
        *(
            Samples(name, "item", of, tuple(float(entry.artifact.is_right) for entry in entries))
            for name, entries in {"retention": right, **by_task}.items()
            if entries
        ),
    )


# -- evidence ----------------------------------------------------------------------------------------------------


def _table(tasks: dict[str, list[Held]]) -> Table:
    columns = (
        ("Task", ""),
        ("Items", "number"),
        ("Original right", "number"),
        ("Lost", "number"),
        ("Won", "number"),
        ("Retention", "number"),
        ("95% interval", "number"),
        ("Margin, 5% / median", "number"),
        ("Original's", "number"),
        ("Alike", "number"),
    )
    rows = []
    for task, held in tasks.items():
        right = [entry for entry in held if entry.original.is_right]
        lost, won = sum(entry.is_lost for entry in held), sum(entry.is_won for entry in held)
        found = wilson(len(right) - lost, len(right)) if len(right) >= ENOUGH else None
        rows.append(
            (
                task,
                str(len(held)),
                str(len(right)),
                str(lost),
                str(won),
                "too few" if found is None else f"{found.value:.2%}",
                "" if found is None else f"{found.low:.2%} to {found.high:.2%}",
                _spread([entry.artifact.margin for entry in right]),
                _spread([entry.original.margin for entry in right]),
                _of([entry.agrees for entry in held if entry.agrees is not None]),
            )
        )
    return Table(columns, tuple(rows))


def _of(alike: Sequence[bool]) -> str:
    return f"{sum(alike)} of {len(alike)}" if alike else "–"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    ordered = sorted(values)
    return f"{ordered[len(ordered) // 20]:.2f} / {ordered[len(ordered) // 2]:.2f}"


def _histograms(right: Sequence[Held]) -> tuple[Histogram, ...]:
    """How margins changed."""
    if len(right) < ENOUGH:
        return ()
    changes = sorted(entry.change for entry in right)
    low, high = math.floor(changes[0] * 2) / 2, math.ceil(changes[-1] * 2) / 2
    bins = max(1, min(60, round((high - low) / 0.25)))
    edges = [low + (high - low) * (number + 1) / bins for number in range(bins)]
    counts = [0] * bins
    for change in changes:
        counts[min(bins - 1, max(0, math.ceil((change - low) / (high - low or 1) * bins) - 1))] += 1
    return (
        Histogram(
            name="margin-changes",
            caption="How the margins of the original's right answers changed; an answer falls where the loss of margin "
            "exceeds the margin.",
            description="Histogram of the change of margins",
            values="change of the margin (nats)",
            counted="answers",
            logarithmic=False,
            bins=tuple(zip(edges, counts, strict=True)),
            marks=(Mark("mean", sum(changes) / len(changes), "mean"), Mark("5%", changes[len(changes) // 20], "tail")),
        ),
    )


def _pairs(right: Sequence[Held]) -> tuple[Pairs, ...]:
    if len(right) < ENOUGH:
        return ()
    return (
        Pairs(
            name="margins",
            caption="Margin of each of the original's right answers. Below the line at 0 the artifact answers wrongly.",
            description="Margins of the artifact against those of the original",
            values="margin (nats)",
            points=tuple((entry.original.margin, entry.artifact.margin) for entry in right),
        ),
    )


def _damage(entry: Held) -> float:
    """The original's margin where the artifact goes wrong, in nats; the larger, the less it was a coin toss."""
    place, original = entry.artifact.place, entry.original
    if original.path[:place] != entry.artifact.path[:place] or place >= len(original.margins):
        return original.margin
    return original.margins[place]


def _cases(lost: Sequence[Held], text_of: Callable[[Sequence[int]], str]) -> Cases:
    worst = sorted(lost, key=_damage, reverse=True)
    return Cases(
        caption="Right answers that were lost, those with the largest margin of the original's first.",
        cases=tuple(_case(entry, text_of) for entry in worst[:SHOWN]),
        left_out=max(0, len(worst) - SHOWN),
    )


def _case(entry: Held, text_of: Callable[[Sequence[int]], str]) -> Case:
    path, place = entry.artifact.path, entry.artifact.place
    damage = _damage(entry)
    toss = ", a coin toss" if damage < COIN_TOSS else ""
    same = text_of(path[:place])
    return Case(
        title=entry.question.item.name,
        prompt=_shortened(entry.question.item.question),
        original=ShownAnswer(same, text_of(path[place : place + 1]), text_of(path[place + 1 :])),
        artifact=ShownAnswer(same, text_of([entry.artifact.other]), "…"),
        note=(
            f"token {place + 1} of the answer; the original's margin there is {damage:.2f} nats{toss}, the artifact's "
            f"{entry.artifact.margins[place]:.2f}"
        ),
    )


def _shortened(text: str) -> str:
    """The beginning and the end of a long prompt."""
    return text if len(text) <= 2 * PROMPT + 20 else f"{text[:PROMPT]}\n[…]\n{text[-PROMPT:]}"


def _group(task: str, held: Sequence[Held], text_of: Callable[[Sequence[int]], str]) -> Group:
    """One test: it fails where more answers were lost than chance explains."""
    lost = [entry for entry in held if entry.is_lost]
    right, won = sum(entry.original.is_right for entry in held), sum(entry.is_won for entry in held)
    kept = f"{right - len(lost)} of {right} right answers kept, {len(lost)} lost, {won} won; {_chance(len(lost), won)}"
    uneven = len(lost) > won and mcnemar(len(lost), won) < SIGNIFICANT
    return Group(
        name=task,
        failure=kept if right >= ENOUGH and uneven else "",
        skipped="" if right >= ENOUGH else f"the original is right on {right} of {len(held)} items",
        output=(kept, *(_line(entry, text_of) for entry in lost)),
    )


def _line(entry: Held, text_of: Callable[[Sequence[int]], str]) -> str:
    path, place = entry.artifact.path, entry.artifact.place
    said = text_of([*path[:place], entry.artifact.other])
    return f"{entry.question.item.name}: {said!r} instead of {text_of(path)!r}, margin {_damage(entry):.2f} nats"
