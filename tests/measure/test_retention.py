"""Retention from answers that are written down here: counts, intervals, margins, what is shown and what is not said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from accullm_cli.measure.answers import Answer
from accullm_cli.measure.contract import judge, parse_requirement, room_for_loss, search_demands
from accullm_cli.measure.measurement import Figure, Measurement, judged_figures
from accullm_cli.measure.retention import Held, retention_found
from accullm_cli.tasks.item import Item
from accullm_cli.tasks.prompt import Question, with_spellings

WORDS = {0: "<s>", 1: "four", 2: " point", 3: " one", 4: " two", 5: "</s>", 6: "five"}


def text_of(tokens: list[int] | tuple[int, ...]) -> str:
    return "".join(WORDS[token] for token in tokens)


def held(task: str, number: int, original: float, artifact: float) -> Held:
    """An item with these margins, all at the third place, where " two" is the best other token."""
    item = Item(task, "easy", "clause", f"Which clause is number {number}?", "four point one")
    question = with_spellings(Question(item, (0, number), (), (), ()), [(1, 2, 3)])

    def answer(margin: float) -> Answer:
        return Answer(margin > 0, margin, 2, (1, 2, 3, 5), 4, (9.0, 8.0, margin, 7.0))

    return Held(question, answer(original), answer(artifact))


# Of 20 in sql the original gets 16 right, and the artifact loses 2 and wins 1; of 12 in code 2, and keeps both.
SQL = [held("sql", n, 1.0 + n / 10, 0.9 + n / 10) for n in range(14)]
SQL += [held("sql", 14, 0.05, -0.2), held("sql", 15, 3.0, -1.0), held("sql", 16, -1.0, 0.5)]
SQL += [held("sql", n, -2.0, -2.0) for n in range(17, 20)]
CODE = [held("code", 30, 2.0, 1.5), held("code", 31, 2.5, 2.0)]
CODE += [held("code", n, -1.0, -1.0) for n in range(32, 42)]


@pytest.fixture(scope="module")
def found() -> Measurement:
    return retention_found([*SQL, *CODE], text_of, seed=0)


def figure(found: Measurement, name: str) -> Figure:
    return next(figure for figure in found.figures if figure.name == name)


def test_retention_is_the_share_of_the_originals_right_answers(found: Measurement) -> None:
    sql = figure(found, "retention.sql").estimate
    assert sql is not None
    assert sql.value == 14 / 16
    # scipy 1.17.1: binomtest(14, 16).proportion_ci(method="wilson")
    assert (sql.low, sql.high) == (pytest.approx(0.639771727342413), pytest.approx(0.9650225122567595))
    whole = figure(found, "retention").estimate
    assert whole is not None
    assert whole.value == 16 / 18
    assert dict(found.counts) == {"items": 32, "right": 18, "lost": 2, "won": 1}
    assert found.facts == (("answers that changed", "2 lost, 1 won; McNemar's exact p = 1"),)


def test_many_losses_at_one_step_are_told_as_one() -> None:
    alike = [held("sql", n, 0.5, -0.5) for n in range(20, 23)]
    found = retention_found([*SQL, *alike], text_of, seed=0)
    step = "5 of 5, in sql, clause, where ' two' takes the place of ' one'"
    assert dict(found.facts)["lost at one step"] == step
    assert found.summary.endswith(f"right, too (73.68%). Lost at one step: {step}.")
    (elsewhere,) = (replace(entry.artifact, other=6) for entry in alike[:1])
    others = [replace(entry, artifact=elsewhere) for entry in alike]
    facts = dict(retention_found([*SQL, *others], text_of, seed=0).facts)
    assert facts["lost at one step"] == "3 of 5, in sql, clause, where 'five' takes the place of ' one'"


def test_where_the_original_is_right_too_seldom_that_is_said_instead(found: Measurement) -> None:
    code = figure(found, "retention.code")
    assert code.estimate is None
    assert code.note == "the original is right on 2 of 12 items, too few to say anything"
    (clause,) = judge([parse_requirement("retention.code>=50%")], judged_figures([found]))
    assert (clause.measured, clause.met, clause.told) == (None, False, "too little to say")
    (table,) = found.tables
    assert table.rows[1][:6] == ("code", "12", "2", "0", "0", "too few")
    nothing = retention_found([held("sql", n, -1.0, -1.0) for n in range(12)], text_of, seed=0)
    assert figure(nothing, "retention").estimate is None
    assert (nothing.histograms, nothing.pairs, nothing.cases) == ((), (), ())
    assert "too few to say how many the artifact keeps" in nothing.summary


def test_a_single_task_has_its_figure_by_name_too() -> None:
    alone = retention_found(SQL, text_of, seed=0)
    assert figure(alone, "retention.sql").estimate == figure(alone, "retention").estimate
    assert figure(alone, "retention.sql").label == ""


def test_agreement_counts_the_compared_items_whether_the_original_is_right_or_wrong() -> None:
    compared = [replace(entry, agrees=entry.question.prompt[1] not in (3, 16, 17)) for entry in SQL]
    found = retention_found([*compared, *CODE], text_of, seed=0)
    whole, sql, code = (figure(found, f"agreement{part}") for part in ("", ".sql", ".code"))
    assert whole.estimate == sql.estimate
    assert sql.estimate is not None
    assert sql.estimate.value == 17 / 20
    # scipy 1.17.1: binomtest(17, 20).proportion_ci(method="wilson")
    assert (sql.estimate.low, sql.estimate.high) == (
        pytest.approx(0.6395811352592430),
        pytest.approx(0.9476312541037834),
    )
    assert sql.note == "17 of 20 are the original's; of its 4 wrong ones 2"
    assert (code.estimate, code.note) == (None, "the original could not write its wrong answers")
    few = retention_found(compared[:9], text_of, seed=0)
    assert (figure(few, "agreement").estimate, figure(few, "agreement").note) == (
        None,
        "9 compared, too few to say anything",
    )
    assert next(samples.values for samples in found.samples if samples.figure == "agreement").count(0.0) == 3
    assert found.tables[0].rows[0][-1] == "17 of 20"
    assert found.tables[0].rows[1][-1] == "–"


def test_exact_matches_count_all_items(found: Measurement) -> None:
    def value(name: str) -> float:
        estimate = figure(found, name).estimate
        assert estimate is not None
        return estimate.value

    assert (value("exact_match"), value("exact_match.sql"), value("exact_match.code")) == (17 / 32, 15 / 20, 2 / 12)
    assert value("exact_match_original") == 18 / 32


def test_margins_are_paired(found: Measurement) -> None:
    change = figure(found, "margin_change").estimate
    assert change is not None
    assert change.value == pytest.approx((14 * -0.1 - 0.25 - 4.0 - 0.5 - 0.5) / 18)
    assert change.low < change.value < change.high < 0


def test_lost_answers_are_shown_with_damage_before_coin_tosses(found: Measurement) -> None:
    (cases,) = found.cases
    worst, toss = cases.cases
    assert "number 15" in worst.prompt
    assert worst.original.same == worst.artifact.same == "four point"
    assert (worst.original.differs, worst.original.rest) == (" one", "</s>")
    assert worst.artifact.differs == " two"
    assert worst.note == "token 3 of the answer; the original's margin there is 3.00 nats, the artifact's -1.00"
    assert toss.note == (
        "token 3 of the answer; the original's margin there is 0.05 nats, a coin toss, the artifact's -0.20"
    )


def test_long_prompts_are_shown_by_their_ends() -> None:
    item = Item("sql", "easy", "clause", "a" * 1000 + "b" * 1000, "x")
    entry = held("sql", 1, 2.0, -1.0)
    long = Held(with_spellings(Question(item, (0,), (), (), ()), [(1, 2, 3)]), entry.original, entry.artifact)
    (cases,) = retention_found([long], text_of, seed=0).cases
    assert cases.cases[0].prompt == "a" * 400 + "\n[…]\n" + "b" * 400


def test_a_task_fails_where_chance_does_not_explain_its_losses(found: Measurement) -> None:
    sql, code = found.groups
    assert (sql.failure, code.failure) == ("", "")
    assert code.skipped == "the original is right on 2 of 12 items"
    assert sql.output[0] == "14 of 16 right answers kept, 2 lost, 1 won; McNemar's exact p = 1"
    assert sql.output[1] == ("sql, clause, easy: 'four point two' instead of 'four point one</s>', margin 0.05 nats")
    (worse,) = retention_found(
        [*(held("sql", n, 1.0, -1.0) for n in range(6)), *(held("sql", n, 1.0, 1.0) for n in range(6, 20))], text_of, 0
    ).groups
    assert worse.failure == "14 of 20 right answers kept, 6 lost, 0 won; McNemar's exact p = 0.0312"


def test_samples_pair_on_the_same_items_alone(found: Measurement) -> None:
    other = retention_found([*SQL[:-1], *CODE], text_of, seed=0)
    of = {samples.figure: samples for samples in found.samples}
    assert len(of["exact_match"].values) == 32
    assert sum(of["retention"].values) == 16
    assert len(of["retention.sql"].values) == 16
    assert {samples.of for samples in found.samples}.isdisjoint(samples.of for samples in other.samples)
    assert found.samples == retention_found([*SQL, *CODE], text_of, seed=5).samples


def test_the_room_for_loss_is_where_the_margins_say_that_answers_flip() -> None:
    """Each answer has a margin of 1, and the artifact takes 0.1, 0.2, ..., 1.9 of it: flips at loss (1 / change)**2."""
    entries = [held("sql", n, 1.0, 1.0 - n / 10) for n in range(1, 20)]
    retention = figure(retention_found(entries, text_of, 0), "retention")
    (demand,) = search_demands(["retention>=47%"])
    assert demand.bound == ""
    # Nine of nineteen are kept as it is; the tenth, with a change of exactly 1, is lost at once.
    assert retention.estimate is not None
    assert retention.estimate.value == 9 / 19
    assert 1.0 <= room_for_loss(demand, retention) < (1 / 0.9) ** 2 + 0.2
    (harder,) = search_demands(["retention>=90%"])
    assert (1 / 1.9) ** 2 - 0.1 < room_for_loss(harder, retention) < (1 / 1.8) ** 2 + 0.1
    (impossible,) = search_demands(["retention>100%"])
    assert room_for_loss(impossible, retention) == pytest.approx(1 / 16)
