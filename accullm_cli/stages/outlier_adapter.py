"""Planning outlier features that go into an adapter: how many of which linears, and whether it pays at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from accullm_cli.formats.adapters import largest_rank
from accullm_cli.formats.capabilities import ADAPTERS, CAPABILITIES, AdapterKind
from accullm_cli.model.blocks import Decoder
from accullm_cli.quant.budget import Choices
from accullm_cli.quant.plan import LinearPlan, Plan
from accullm_cli.stages.job import Job

# A runtime gives all linears the room of the largest rank, and the time that it takes: with N = K = 4096, rank 64 is an
# eighth of what 4 bits read of memory, and rank 8 a sixty-fourth. More room is to save more of the loss than this.
WORTH_A_RANK = 0.05


def adapter_kind(job: Job) -> AdapterKind | None:
    """The kind of adapter that outlier features go into; None where they do not."""
    return ADAPTERS[CAPABILITIES[job.format].adapter] if job.config.plan.outlier_adapter else None


def largest_ranks(job: Job, decoder: Decoder) -> dict[str, int]:
    """How many features an adapter may hold of each linear: none of experts and of Conv1D; empty without an adapter."""
    kind = adapter_kind(job)
    if kind is None:
        return {}
    slots = (slot for block in decoder.slots for slot in block)
    return {slot.name: kind.ranks[-1] if slot.kind == "linear" else 0 for slot in slots}


def feature_counts(job: Job, decoder: Decoder, linears: Mapping[str, LinearPlan], fraction: float) -> dict[str, int]:
    """How many outlier features each linear gets where all get the same fraction of theirs.

    In an adapter of one rank, all get the same number.
    """
    counts = {name: round(fraction * plan.in_features) for name, plan in linears.items()}
    kind = adapter_kind(job)
    if kind is None:
        return counts
    if kind.one_rank:
        fewest = min(plan.in_features for plan in linears.values())
        counts = dict.fromkeys(counts, min(max(1, round(sum(counts.values()) / len(counts))), fewest))
    most = largest_ranks(job, decoder)
    return {name: min(count, most[name]) for name, count in counts.items()}


def plan_average(job: Job, choices: Choices) -> Plan:
    """The plan of least expected loss for the average of bits that was asked for.

    With an adapter there is one for each rank that runtimes make room for, and one without any features. Of these it is
    the first whose loss is no more than WORTH_A_RANK above the least.
    """
    bits, kind = float(job.config.plan.bits), adapter_kind(job)
    if kind is None:
        return choices.within(bits)
    largest = max(int(choices.largest_fraction * plan.in_features) for plan in choices.plans.values())
    room = kind.room(min(largest, kind.ranks[-1]))
    plans = [_up_to(choices, rank, kind).within(bits) for rank in (0, *kind.ranks) if rank <= room]
    losses = [_loss(choices, plan) for plan in plans]
    return next(plan for plan, loss in zip(plans, losses, strict=True) if loss <= (1 + WORTH_A_RANK) * min(losses))


def adapter_sentences(job: Job, choices: Choices | None, plan: Plan) -> Iterator[str]:
    """What the report says of an adapter: what it takes, and what it is expected to bring.

    Args:
        choices: where bits are an average; the plan is held against the best of the same bits without an adapter.
    """
    kind = adapter_kind(job)
    if kind is None:
        return
    features = sum(len(row.outlier_index) for row in plan.linears.values())
    if not features:
        yield "the outlier adapter was left out: no feature saves as much loss in it as its bits save elsewhere"
        return
    weights = sum(row.weights for row in plan.linears.values())
    stored = sum(row.outlier_bytes * len(row.outlier_index) for row in plan.linears.values())
    room = kind.room(largest_rank(plan))
    sentence = (
        f"the outlier adapter holds {features} features and takes {8 * stored / weights:.3f} bits per weight; runtimes "
        f"need room for rank {room}"
    )
    if choices is not None:
        without = _loss(choices, _up_to(choices, 0, kind).within(float(job.config.plan.bits)))
        saved = 1 - _loss(choices, plan) / without if without else 0.0
        sentence += f"; the loss to be expected is {saved:.0%} below that of the best plan of the same bits without it"
    yield sentence


def _up_to(choices: Choices, rank: int, kind: AdapterKind) -> Choices:
    """The same choices with no more features than this in any linear."""
    limits = {name: min(rank, most) for name, most in choices.most_outliers.items()}
    return replace(choices, most_outliers=limits, all_or_none=kind.one_rank)


def _loss(choices: Choices, plan: Plan) -> float:
    return sum(choices.loss_of(plan).values())
