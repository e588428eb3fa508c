"""How many outlier features go into an adapter, of which linears, and what the report says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from accullm_cli.formats.capabilities import CAPABILITIES
from accullm_cli.model.blocks import Decoder
from accullm_cli.quant.budget import Choices
from accullm_cli.quant.plan import LinearPlan, Plan
from accullm_cli.stages.job import Job, open_decoder
from accullm_cli.stages.outlier_adapter import (
    WORTH_A_RANK,
    adapter_sentences,
    feature_counts,
    largest_ranks,
    plan_average,
)
from accullm_cli.stages.profile import make_plan
from tests.streaming import fast_config, opened
from tests.tiny import make_checkpoint

FORMAT = "compressed-tensors"
# Of vLLM's ranks those that 3% of 2,048 features fill.
ROOMS = (0, 1, 8, 16, 32, 64)


@contextmanager
def job_of(model: str, directory: Path, **settings: object) -> Iterator[tuple[Job, Decoder]]:
    source = make_checkpoint(model, directory / "model")
    config = fast_config(source, directory / "out", export__format=f"[{FORMAT}]", **settings)
    with opened(config) as job:
        yield job, open_decoder(job)


def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = dataclasses.replace(CAPABILITIES[FORMAT], adapter="mlx_lm")
    monkeypatch.setitem(CAPABILITIES, FORMAT, changed)  # type: ignore[arg-type]


def test_experts_and_conv1d_layers_have_none(tmp_path: Path) -> None:
    for model in ("mixtral", "gpt2"):
        with job_of(model, tmp_path / model, plan__outlier_adapter=True) as (job, decoder):
            ranks = largest_ranks(job, decoder)
            linears = {slot.name: slot.kind for slots in decoder.slots for slot in slots}
            assert {linears[name] for name, rank in ranks.items() if rank} <= {"linear"}
            assert {linears[name] for name, rank in ranks.items() if not rank} == set(linears.values()) - {"linear"}
            assert set(ranks.values()) <= {0, 512}
            plan = make_plan(job, decoder)
            assert all(not row.outlier_index for name, row in plan.linears.items() if linears[name] != "linear")


def test_without_an_adapter_nothing_is_limited(tmp_path: Path) -> None:
    with job_of("llama", tmp_path, plan__outlier_adapter=False) as (job, decoder):
        assert largest_ranks(job, decoder) == {}
        assert {row.adapter for row in make_plan(job, decoder).linears.values()} == {""}
        assert list(adapter_sentences(job, None, make_plan(job, decoder))) == []


def test_a_fraction_is_that_of_each_linear_or_one_number_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with job_of("llama", tmp_path, plan__outlier_adapter=True) as (job, decoder):
        linears = make_plan(job, decoder).linears
        counts = feature_counts(job, decoder, linears, 0.05)
        assert counts == {name: round(0.05 * row.in_features) for name, row in linears.items()}
        assert set(feature_counts(job, decoder, linears, 0.0).values()) == {0}
        one_rank(monkeypatch)
        # 3 features of 64 in six of seven linears, 5 of 96 in the last one.
        assert set(feature_counts(job, decoder, linears, 0.05).values()) == {round((6 * 3 + 5) / 7)}
        assert set(feature_counts(job, decoder, linears, 0.0001).values()) == {1}


def rows_of(count: int, columns: int = 2048, rows: int = 512) -> dict[str, LinearPlan]:
    return {f"p{n}": LinearPlan(f"p{n}", rows, columns, 4, 32, True, adapter="peft") for n in range(count)}


def choices_of(losses: torch.Tensor) -> Choices:
    """Three linears whose features have these losses, at 4 bits alone: bits can go into nothing but features."""
    plans = rows_of(3)
    return Choices(plans, {name: {32: losses} for name in plans}, (4,), 0.03, most_outliers=dict.fromkeys(plans, 512))


@pytest.mark.parametrize(
    ("strong", "rest", "rank"),
    [
        (0, 1.0, 0),  # all alike: none is worth a rank
        (1, 1.0, 1),
        (6, 1.0, 8),
        (20, 1.0, 32),
        (60, 1.0, 64),
    ],
)
def test_the_rank_is_the_first_that_is_about_as_good_as_any(
    strong: int, rest: float, rank: int, tmp_path: Path
) -> None:
    """`strong` features have half of the loss between them; with room for them all, there is nothing more to gain."""
    losses = torch.full((2048,), rest / 2048)
    losses[:strong] = 3.0 / max(strong, 1)
    choices = choices_of(losses)
    with job_of("llama", tmp_path, plan__outlier_adapter=True, plan__bits=7.9) as (job, _):
        plan = plan_average(job, choices)
        found = max(len(row.outlier_index) for row in plan.linears.values())
        assert strong <= found <= rank
        limited = (dataclasses.replace(choices, most_outliers=dict.fromkeys(choices.plans, most)) for most in ROOMS)
        best = min(sum(choices.loss_of(choices_at.within(7.9)).values()) for choices_at in limited)
        assert sum(choices.loss_of(plan).values()) <= (1 + WORTH_A_RANK) * best


def test_the_sentence_holds_the_plan_against_the_best_without_an_adapter(tmp_path: Path) -> None:
    losses = torch.full((2048,), 1.0 / 2048)
    losses[:6] = 0.5
    choices = choices_of(losses)
    with job_of("llama", tmp_path, plan__outlier_adapter=True, plan__bits=7.9) as (job, _):
        plan = plan_average(job, choices)
        features = sum(len(row.outlier_index) for row in plan.linears.values())
        lost = {
            name: sum(losses[[n for n in range(2048) if n not in row.outlier_index]])
            for name, row in plan.linears.items()
        }
        saved = 1 - float(sum(lost.values())) / (3 * float(losses.sum()))
        bits = 8 * features * (2048 + 2 * 512) / (3 * 512 * 2048)
        assert list(adapter_sentences(job, choices, plan)) == [
            f"the outlier adapter holds {features} features and takes {bits:.3f} bits per weight; runtimes need room "
            f"for rank 8; the loss to be expected is {saved:.0%} below that of the best plan of the same bits without "
            "it"
        ]
        nothing = Plan({name: dataclasses.replace(row, outlier_index=()) for name, row in plan.linears.items()})
        assert list(adapter_sentences(job, choices, nothing)) == [
            "the outlier adapter was left out: no feature saves as much loss in it as its bits save elsewhere"
        ]
