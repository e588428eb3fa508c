"""Rounding the linears of one block, each for the input that it will really get.

The original's block runs once over the calibration text, forth and, for windows with a gradient, back, and what
rounding wants of it is kept. Then the rounded block runs once for each distinct input, up to that input, with
everything before it rounded already, and a last time when all of it is. What these runs have in common is not computed
again: attention and MLP are left out once it is known what the linear behind them reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from safetensors.torch import save_file
from torch import nn

from accullm_cli.errors import AccullmError
from accullm_cli.model.blocks import Decoder, Trace
from accullm_cli.model.slots import LinearSlot
from accullm_cli.quant.feedback import NumericalError
from accullm_cli.quant.plan import Plan
from accullm_cli.quant.rounding import RoundedLinear, RoundingOptions, round_linears
from accullm_cli.quant.stats import GramMatrices
from accullm_cli.quant.token_weights import TokenWeights, shared_weights
from accullm_cli.run import give_back_memory, write_file
from accullm_cli.stages.calibrate import PROBE_TOKENS, load_block_stats, stats_path
from accullm_cli.stages.gradients import load_gradient, load_token_weights
from accullm_cli.stages.job import Job
from accullm_cli.stages.streams import Captures

# Gram matrices that are accumulated in one pass; the experts of a step come in parts of this size.
GRAM_BYTES = 1 << 30
# Tokens whose inputs are kept to choose damping by.
HELD_OUT_TOKENS = 4096


@dataclass(frozen=True)
class BlockPair:
    """A block of the original and the same block as far as it is rounded; see `share_weights` for experts.

    So the original must not run any more once the first expert is rounded.
    """

    decoder: Decoder
    index: int
    original: nn.Module
    rounded: nn.Module

    @property
    def slot_of(self) -> dict[str, LinearSlot]:
        """The block's linears by name."""
        return {slot.name: slot for slot in self.decoder.slots[self.index]}


def round_with_streams(
    job: Job, plan: Plan, pair: BlockPair, original: torch.Tensor | None, rounded: torch.Tensor
) -> dict[str, RoundedLinear]:
    """Round the block's linears in the order it computes them; `pair.rounded` gets the rounded weights.

    Args:
        original: the original's hidden states before the block [S, T, hidden]; at the end, in place, those behind it.
            None where no target is corrected for the past, and there are no gradients.
        rounded: those of the model quantized so far; the same.
    """
    decoder, index, slot_of = pair.decoder, pair.index, pair.slot_of
    probe = rounded[:1, :PROBE_TOKENS]
    trace = decoder.trace(index, pair.original, probe)
    shortcuts = decoder.shortcuts(index, pair.original, probe, trace)
    parts: list[list[tuple[str, ...]]] = []
    for step in trace.steps:
        quantized = [names for group in step if (names := _quantized_names(group, plan))]
        parts += _parts_in_memory(quantized, slot_of)
    groups = [group for part in parts for group in part]
    weights_of = {
        name: TokenWeights(own.edges.to(decoder.device), own.weights.to(decoder.device))
        for name, own in shared_weights(load_token_weights(job, index), groups).items()
    }
    results: dict[str, RoundedLinear] = {}
    corrected = job.config.rounding.target == "corrected"
    held_out = held_out_windows(*rounded.shape[:2]) if job.config.rounding.damping is None else frozenset()
    fishers: dict[str, torch.Tensor] = {}
    with Captures(job.run.path, decoder.device, job.compute.room()) as captures:
        if original is not None:
            dense = [group for group in groups if slot_of[group[0]].expert is None]
            wanted = _Wanted.of(trace, dense) if corrected else _Wanted()
            gradient = load_gradient(job, index) if job.config.rounding.method == "feedback" else None
            with job.compute.products():
                fishers = _run_original(pair, original, dense, wanted, captures, gradient)
        known: tuple[str, ...] = ()
        for part in parts:
            follows = shortcuts[len(known) : len(known) + 1]
            kept = {group[0]: _only_multiplied_as(job, slot_of[group[0]]) for group in part if group[0] in follows}
            with job.compute.products():
                grams = _accumulate(pair, trace, part, rounded, captures, corrected, weights_of, known, kept, held_out)
            # Only as a whole are the first of the shortcuts one.
            known += tuple(kept)
            for group in part:
                gram = grams.pop(group[0])
                weights = {name: slot_of[name].read(pair.original) for name in group}
                with evidence_saved(job):
                    found = round_linears(
                        weights,
                        {name: plan.linears[name] for name in group},
                        rounding_options(job, plan),
                        stored_dtype(decoder, index, slot_of[group[0]]),
                        gram.take_hessian(),
                        gram.take_pulls(weights),
                        fishers={name: fishers.pop(name) for name in group if name in fishers},
                        held_out=gram.take_held_out(),
                        loops=job.compute.loops,
                    )
                for name, result in found.items():
                    slot_of[name].write(pair.rounded, result.linear.dequantize(torch.float32))
                    if slot_of[name].expert is None:
                        # Nobody reads the original's weight any more.
                        slot_of[name].write(pair.original, slot_of[name].read(pair.rounded))
                results |= found
            give_back_memory()
        with job.compute.products():
            for batch, (rows, states) in enumerate(decoder.sent(rounded)):
                rounded[rows] = decoder.run(index, pair.rounded, states, _known_inputs(captures, batch, known))
    return results


def round_without_streams(job: Job, plan: Plan, pair: BlockPair) -> dict[str, RoundedLinear]:
    """Nearest rounding needs no activations but each feature's second moment, which calibrate measured."""
    rounded: dict[str, RoundedLinear] = {}
    for entry in load_block_stats(stats_path(job, pair.index)):
        for name in _quantized_names(entry.linears, plan):
            slot = pair.slot_of[name]
            with evidence_saved(job):
                rounded |= round_linears(
                    {name: slot.read(pair.original)},
                    {name: plan.linears[name]},
                    rounding_options(job, plan),
                    stored_dtype(pair.decoder, pair.index, slot),
                    importance=entry.second_moment if entry.tokens else None,
                    loops=job.compute.loops,
                )
    return rounded


def stored_dtype(decoder: Decoder, index: int, slot: LinearSlot) -> torch.dtype:
    """The dtype that a linear's weight is stored in."""
    return decoder.weights.dtype(f"{decoder.block_names[index]}.{slot.parameter}")


def rounding_options(job: Job, plan: Plan) -> RoundingOptions:
    """The configuration's way of rounding."""
    rounding = job.config.rounding
    return RoundingOptions(**rounding.model_dump(), seed=job.config.machine.seed, scale_dtype=plan.scale_dtype)


@contextmanager
def evidence_saved(job: Job) -> Iterator[None]:
    """Save the matrix that nothing could be rounded with, for whoever looks into it, before that is an error.

    Raises:
        AccullmError: names the matrix, its linears, the seed, and the file.
    """
    try:
        yield
    except NumericalError as error:
        seed, path = job.config.machine.seed, job.own("quantize/evidence.safetensors")
        about = {"matrix": error.kind, "linears": error.where or "", "seed": str(seed)}
        tensors = {"matrix": error.matrix.contiguous()}
        write_file(path, lambda temporary: save_file(tensors, temporary, about))
        raise AccullmError(f"{error.what} (seed {seed}; the matrix is in {path})", error.where, error.hint) from error


# -- the two passes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wanted:
    """What pulls need of the original's block: inputs and sums, by the name of a linear.

    That is the input of each group with a linear whose output enters no sum, and the sums that other outputs enter.
    """

    inputs: frozenset[str] = frozenset()
    sums: frozenset[str] = frozenset()

    @staticmethod
    def of(trace: Trace, groups: list[tuple[str, ...]]) -> _Wanted:
        inputs = frozenset(group[0] for group in groups if not trace.summed.issuperset(group))
        return _Wanted(inputs, trace.summed.intersection(name for group in groups for name in group))


def _run_original(
    pair: BlockPair,
    original: torch.Tensor,
    groups: list[tuple[str, ...]],
    wanted: _Wanted,
    captures: Captures,
    gradient: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Run the original's stream through its block, in place, and keep what rounding needs of it.

    Args:
        groups: the linears to be rounded, but for experts: routing differs between the streams, so the rows of their
            two inputs do not correspond.
        wanted: goes to `captures`.
        gradient: of the loss with respect to the block's output, for the first windows; or None.

    Returns:
        For each linear of the groups the Fisher matrix of its outputs, [N, N]; empty without a gradient.
    """
    names = [name for group in groups for name in group] if gradient is not None else []
    device = pair.decoder.device
    grams = {name: GramMatrices(pair.slot_of[name].out_features, device=device) for name in names}
    for batch, (rows, states) in enumerate(pair.decoder.sent(original)):

        def keep_input(name: str, value: torch.Tensor, batch: int = batch) -> None:
            if name in wanted.inputs:
                captures.write(batch, f"input {name}", _as_rows(value.detach()))

        def keep_sum(name: str, value: torch.Tensor, batch: int = batch) -> None:
            if name in wanted.sums:
                captures.write(batch, f"sum {name}", _as_rows(value.detach()))

        def add_gradient(name: str, of_output: torch.Tensor, value: torch.Tensor) -> None:
            if name in grams:
                grams[name].add(_as_rows(of_output))

        # The last batch with a gradient may have it for some of its windows only.
        own = None if gradient is None else gradient[rows]
        hidden = states.clone().requires_grad_(own is not None and len(own) > 0)
        output = pair.decoder.run_capturing(
            pair.index, pair.original, hidden, keep_input, keep_sum, on_gradient=add_gradient
        )
        assert output is not None
        if own is not None and len(own):
            output[: len(own)].backward(own.to(device).float())
        original[rows] = output.detach()
    found = {name: gram.take_hessian() for name, gram in grams.items()}
    return {name: fisher for name, fisher in found.items() if fisher is not None}


def _accumulate(
    pair: BlockPair,
    trace: Trace,
    groups: list[tuple[str, ...]],
    rounded: torch.Tensor,
    captures: Captures,
    target_is_corrected: bool,
    weights_of: Mapping[str, TokenWeights],
    known: tuple[str, ...],
    kept: Mapping[str, torch.dtype],
    held_out: frozenset[int],
) -> dict[str, GramMatrices]:
    """The Gram matrices of some inputs of a block over the calibration text, by the first linear of each.

    Args:
        rounded: hidden states before the block of the model quantized so far.
        captures: what `_run_original` kept, for a corrected target, and what the rounded block's linears read.
        weights_of: how much each token counts, by the first linear of each input; where there is none, all alike.
        known: the linears whose inputs are there, see `Decoder.shortcuts`.
        kept: those whose inputs will be, and in which dtype.
        held_out: windows of which the Gram matrices keep the rows, too.
    """
    slot_of = pair.slot_of
    is_dense = slot_of[groups[0][0]].expert is None
    corrected = target_is_corrected and is_dense
    first_of = {name: group[0] for group in groups for name in group}
    summed = {name for name in first_of if corrected and name in trace.summed}
    with_drift = {group[0] for group in groups if corrected and not summed.issuperset(group)}
    grams = {
        group[0]: GramMatrices(
            slot_of[group[0]].in_features,
            group[0] in with_drift,
            {name: slot_of[name].out_features for name in group if name in summed},
            device=pair.decoder.device,
        )
        for group in groups
    }
    # Which experts a batch reaches is not known before its end.
    awaited = {("input", first) for first in grams} | {("sum", name) for name in summed} if is_dense else set()

    def add_batch(batch: int, own: torch.Tensor, states: torch.Tensor) -> None:
        read: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}  # inputs, and what their tokens count

        def add(name: str, value: torch.Tensor) -> None:
            if name in grams:
                inputs = _as_rows(value)
                read[name] = inputs, weights_of[name].of(inputs) if name in weights_of else None
                if name in kept:
                    captures.write(batch, f"rounded input {name}", inputs, kept[name])
                original = captures.read(batch, f"input {name}") if name in with_drift else None
                grams[name].add(inputs, original, read[name][1], own)

        def add_sum(name: str, value: torch.Tensor) -> None:
            if name in summed:
                first = first_of[name]
                inputs, weights = read[first]
                difference = captures.read(batch, f"sum {name}") - _as_rows(value)
                grams[first].add_output(name, inputs, difference, weights)

        there = _known_inputs(captures, batch, known)
        pair.decoder.run_capturing(pair.index, pair.rounded, states, add, add_sum, frozenset(awaited), known=there)

    tokens = torch.arange(rounded.shape[1])
    for batch, (rows, states) in enumerate(pair.decoder.sent(rounded)):
        # Routing leaves other rows to experts: what is held out of dense linears' inputs says nothing of theirs.
        places = [place for place, window in enumerate(range(rows.start, rows.stop)) if window in held_out and is_dense]
        own = (torch.tensor(places, dtype=torch.int64)[:, None] * len(tokens) + tokens).flatten()
        add_batch(batch, own.to(states.device), states)
    return grams


def _only_multiplied_as(job: Job, slot: LinearSlot) -> torch.dtype:
    """What a linear's input is rounded to before it is multiplied; `stages.precision` leaves Conv1D alone."""
    rounds = job.compute.precision == "bfloat16" and slot.kind == "linear"
    return torch.bfloat16 if rounds else torch.float32


def held_out_windows(windows: int, tokens: int) -> frozenset[int]:
    """Windows of the calibration text that damping is chosen on: an eighth of them, or HELD_OUT_TOKENS tokens.

    They are drawn, as texts and windows without BOS come in turns. The same ones for all linears.
    """
    count = min(windows // 8, max(1, HELD_OUT_TOKENS // tokens))
    return frozenset(torch.randperm(windows, generator=torch.Generator().manual_seed(0))[:count].tolist())


def _known_inputs(captures: Captures, batch: int, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """What these linears of the rounded block read in a batch, each [T, K]."""
    return {name: captures.read(batch, f"rounded input {name}") for name in names}


def _as_rows(value: torch.Tensor) -> torch.Tensor:
    """[..., K] as [T, K]."""
    return value.reshape(-1, value.shape[-1])


def _quantized_names(group: tuple[str, ...], plan: Plan) -> tuple[str, ...]:
    return tuple(name for name in group if plan.linears[name].bits < 16)


def _parts_in_memory(groups: list[tuple[str, ...]], slot_of: dict[str, LinearSlot]) -> list[list[tuple[str, ...]]]:
    """Cut a step's groups so that the Gram matrices of each part fit into GRAM_BYTES (one group always does)."""
    parts: list[list[tuple[str, ...]]] = []
    used = GRAM_BYTES
    for group in groups:
        size = 2 * 4 * slot_of[group[0]].in_features ** 2
        if used + size > GRAM_BYTES:
            parts.append([])
            used = 0
        parts[-1].append(group)
        used += size
    return parts
