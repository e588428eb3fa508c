"""Answers from one forward pass: against greedy decoding of a model that is a table, and against float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from accullm_cli.measure.answers import Score, accepted_at, answer_of, score_nodes
from accullm_cli.tasks.item import Item
from accullm_cli.tasks.prompt import Question, with_spellings

END = 5
ITEM = Item("any", "", "any", "?", "!")


def question(*spellings: tuple[int, ...]) -> Question:
    return with_spellings(Question(ITEM, (0,), (), (), ()), spellings)


class Table:
    """A model of which the logits behind every sequence are drawn from a seed."""

    def __init__(self, seed: int, vocabulary: int = 6) -> None:
        self.seed, self.vocabulary = seed, vocabulary

    def logits(self, sequence: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, sequence)) % 2**31)
        return torch.randn(self.vocabulary, generator=generator)

    def greedy(self, prompt: tuple[int, ...], limit: int = 6) -> tuple[int, ...]:
        said: tuple[int, ...] = ()
        while len(said) < limit and (not said or said[-1] != END):
            said = (*said, int(self.logits((*prompt, *said)).argmax()))
        return said


def scores_of(asked: Question, model: Table) -> list[Score]:
    """As a forward pass over the rows gives them."""
    found = []
    for node in asked.nodes:
        row = asked.rows[node.row][: node.depth]
        found += score_nodes(model.logits((*asked.prompt, *row))[None], [accepted_at(node, (END,))])
    return found


@pytest.mark.parametrize("spellings", [((3,),), ((3, 4),), ((3,), (3, 4), (1,)), ((1, 2), (1, 3), (2, 2), (4,))])
def test_an_answer_is_right_if_and_only_if_greedy_decoding_gives_it(spellings: tuple[tuple[int, ...], ...]) -> None:
    asked = question(*spellings)
    outcomes = []
    for seed in range(2000):
        model = Table(seed)
        said = model.greedy(asked.prompt)
        is_right = said in {(*spelling, END) for spelling in spellings}
        answer = answer_of(asked, scores_of(asked, model))
        assert answer.is_right is is_right
        assert (answer.margin > 0) is is_right
        if is_right:
            assert answer.path == said
        else:
            # Up to there all is as in some right answer, and there greedy decoding leaves them.
            assert (*answer.path[: answer.place], answer.other) == said[: answer.place + 1] or answer.path[
                : answer.place
            ] != said[: answer.place]
        outcomes.append(is_right)
    assert 0 < sum(outcomes) < 2000


def test_where_an_answer_goes_wrong_is_the_first_place_where_greedy_decoding_leaves_the_right_ones() -> None:
    asked = question((3, 4, 1))
    for seed in range(200):
        model = Table(seed)
        said = model.greedy(asked.prompt)
        answer = answer_of(asked, scores_of(asked, model))
        same = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(said, (3, 4, 1, END), strict=False))))
        if same < 4:
            assert answer.place == same
            assert answer.other == said[same]


def test_margins_and_log_probabilities_in_float64() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)) * 4
    accepted = [(7,), (7, 12, 290), (0,), (299, 1), (150,)]
    for row, right, score in zip(logits.double().numpy(), accepted, score_nodes(logits, accepted), strict=True):
        log_probabilities = row - math.log(np.exp(row).sum())
        best = max(right, key=lambda token: log_probabilities[token])
        others = [token for token in range(300) if token not in right]
        other = max(others, key=lambda token: log_probabilities[token])
        assert (score.best, score.other) == (best, other)
        assert score.log_probability == pytest.approx(log_probabilities[best], abs=1e-5)
        assert score.margin == pytest.approx(log_probabilities[best] - log_probabilities[other], abs=1e-5)
        assert score.is_first is (row.argmax() in right)


def test_of_equal_logits_greedy_decoding_takes_the_lowest_token() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    assert [score.is_first for right in ((1,), (2,)) for score in score_nodes(logits, [right])] == [True, False]


def test_many_places_of_a_large_vocabulary_are_scored_piece_by_piece() -> None:
    logits = torch.randn(40, 300_000, generator=torch.Generator().manual_seed(1))
    accepted = [(place,) for place in range(40)]
    together = score_nodes(logits, accepted)
    assert together == [score for place in range(40) for score in score_nodes(logits[place : place + 1], [(place,)])]


def test_rows_hold_every_spelling_once_and_what_another_begins_with_costs_nothing() -> None:
    asked = question((3,), (3, 4), (5, 6), (3, 4))
    assert asked.rows == ((3, 4), (5, 6))
    root, *_ = asked.nodes
    assert (root.tokens, root.may_end) == ((3, 5), False)
    behind = asked.nodes[root.children[0]]
    assert (behind.depth, behind.tokens, behind.may_end) == (1, (4,), True)
    assert asked.tokens == 3
