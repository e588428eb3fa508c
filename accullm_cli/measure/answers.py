"""How a model answers an item, from one forward pass over its right answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from accullm_cli.tasks.prompt import Node, Question

# Logits in one float32 temporary: 32 MB.
_CHUNK_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class Score:
    """What the model puts at one place of a right answer.

    best: the most likely token of those that go on rightly; other: the most likely of all others.
    log_probability: of `best`, in nats. margin: how much more likely it is than `other`, in nats (negative: less).
    is_first: whether `best` is what greedy decoding takes (among equal logits that is the lowest token id).
    """

    best: int
    other: int
    log_probability: float
    margin: float
    is_first: bool


@dataclass(frozen=True)
class Answer:
    """How a model answers one item.

    is_right: whether greedy decoding gives a right answer, its end included.
    margin: the smallest on the way to the right answer that the model likes best, in nats; positive where it is right.
    place: tokens of the answer before that place; where the answer is wrong, before the first wrong token.
    path: the tokens of that right answer, the end included. other: what the model would rather say at `place`.
    margins: at every place of the path.
    """

    is_right: bool
    margin: float
    place: int
    path: tuple[int, ...]
    other: int
    margins: tuple[float, ...]


def score_nodes(logits: torch.Tensor, accepted: Sequence[Sequence[int]]) -> list[Score]:
    """The places of right answers.

    Args:
        logits: [P, vocabulary], any float dtype, of P places.
        accepted: for each, the tokens that go on rightly.
    """
    scores: list[Score] = []
    step = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    for start in range(0, len(accepted), step):
        rows = logits[start : start + step].float()
        first = rows.argmax(-1).tolist()
        normalizer = rows.double().logsumexp(-1)
        for row, right in enumerate(accepted[start : start + step]):
            index = torch.tensor(right, device=rows.device)
            of_right = rows[row, index]
            place = int(of_right.argmax())
            value = float(of_right[place])
            rest = rows[row].index_fill(0, index, -torch.inf)
            other = int(rest.argmax())
            best = first[row] if first[row] in right else right[place]
            scores.append(
                Score(best, other, value - float(normalizer[row]), value - float(rest[other]), first[row] in right)
            )
    return scores


def answer_of(question: Question, scores: Sequence[Score]) -> Answer:
    """Walk from the root of the tree of right answers, at each place to the token that the model likes best.

    Args:
        scores: one for each of the question's nodes.
    """
    number, path, walked = 0, [], []
    while True:
        node, score = question.nodes[number], scores[number]
        path.append(score.best)
        walked.append(score)
        if score.best not in node.tokens:
            break
        number = node.children[node.tokens.index(score.best)]
    wrong = next((place for place, score in enumerate(walked) if not score.is_first), None)
    weakest = min(range(len(walked)), key=lambda place: walked[place].margin)
    place = weakest if wrong is None else wrong
    return Answer(
        is_right=wrong is None,
        margin=walked[weakest].margin,
        place=place,
        path=tuple(path),
        other=walked[place].other,
        margins=tuple(score.margin for score in walked),
    )


def accepted_at(node: Node, ends: Sequence[int]) -> tuple[int, ...]:
    """The tokens that go on rightly from a place."""
    return tuple(dict.fromkeys((*node.tokens, *(ends if node.may_end else ()))))
