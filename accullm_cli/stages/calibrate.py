"""calibrate: the one full-precision pass, and everything that later stages need from the original.

It leaves in the run directory
    tokens.safetensors                  calibration ids [S, T] and validation ids [V, T], int64
    calibrate/block-00000.safetensors   per distinct input of a block: light statistics (see quant.stats.InputStats)
    calibrate/gradient-00000.safetensors  where gradients are asked for; see stages.gradients
and, along the way, the references on the texts that artifacts will be measured on (stages.reference).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from accullm_cli.formats.capabilities import CAPABILITIES
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.slots import LinearSlot
from accullm_cli.model.tokenizer import tokenizer_records
from accullm_cli.quant.grid import minmax_grid, row_chunks
from accullm_cli.quant.stats import FeatureMoments, InputStats
from accullm_cli.stages.embedding_loss import measure_embedding_losses
from accullm_cli.stages.gradients import keep_input, run_backward
from accullm_cli.stages.job import Job, open_decoder
from accullm_cli.stages.keyed import is_made_for, write_keyed
from accullm_cli.stages.passes import Passenger, block_keys, run_blocks
from accullm_cli.stages.reference import missing_references
from accullm_cli.stages.stage import Before, Decision, Stage, Work
from accullm_cli.stages.streams import advance
from accullm_cli.stages.texts import calibration_inputs, calibration_of, write_calibration

VERSION = 7
# Statistics choose outlier features and weigh the errors of grids: second moments of so many windows do, unless there
# are experts, each of which sees few of the tokens.
STATISTICS_WINDOWS = 32
# Group sizes for which the damage that rounding does to each column is measured; the plan uses the nearest.
DAMAGE_GROUP_SIZES = (32, 64, 128, -1)
DAMAGE_BITS = 4
# Tokens of the first window that are enough to see which linears share an input.
PROBE_TOKENS = 32


def calibrate(job: Job, decision: Decision) -> Work:
    """Cut or sample the text, run the original over it once, and keep statistics of every input."""
    windows = calibration_of(job)
    tokens = write_calibration(job, windows)
    decoder = open_decoder(job)
    with job.compute.products("float32"):
        decoder.load_outside()
        statistics = Statistics(job, decoder, windows.ids, decision.key)
        references = missing_references(job, decoder)
        decoder.release_outside()
        run_blocks(job, decision.stage, decoder, [statistics, *references])
        for reference in references:
            reference.write()
        outputs = statistics.finish()
    records = (*job.source.records, *tokenizer_records(job.source.directory))
    return Work((tokens, *outputs), (*records, *_unreached(job, len(decoder.block_names))))


def calibrate_inputs(job: Job, before: Before) -> dict[str, str]:
    """What statistics and gradients depend on."""
    gradient_samples = job.config.gradient_samples
    # Gradients are those of tokens that are drawn.
    seed = {"config:machine.seed": str(job.config.machine.seed)} if gradient_samples else {}
    return {
        "source:sha256": job.source.sha256,
        "version:calibrate": str(VERSION),
        "config:calibration.gradient_samples": str(gradient_samples),
        **seed,
        **calibration_inputs(job),
        **({"config:embeddings": "measured"} if _counts_embeddings(job) else {}),
        **job.compute.inputs(),
        "machine:precision": job.compute.precision,
    }


def _counts_embeddings(job: Job) -> bool:
    """Whether a plan may choose how embedding and head are stored."""
    formats = (CAPABILITIES[name] for name in job.config.export.format)
    return bool(job.config.gradient_samples) and any(format.counts_embeddings for format in formats)


CALIBRATE = Stage(
    "calibrate",
    calibrate_inputs,
    calibrate,
    after=("reading",),
    commands=("calibrate",),
    files=("tokens.safetensors", "calibrate/*"),
)


def measured_windows(job: Job, decoder: Decoder) -> int:
    """Of the calibration windows, how many the original runs over, for statistics and gradients; quantize reads all."""
    samples = job.config.calibration.samples
    if any(slot.expert is not None for slots in decoder.slots for slot in slots):
        return samples
    return min(samples, max(STATISTICS_WINDOWS, job.config.gradient_samples))


def load_block_stats(path: Path) -> list[InputStats]:
    """The statistics of one block's inputs, in the order the block computes them."""
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["made"])["inputs"]
        return [
            InputStats(
                linears=tuple(entry["linears"]),
                tokens=entry["tokens"],
                second_moment=file.get_tensor(f"{number}.second_moment"),
                absolute_maximum=file.get_tensor(f"{number}.absolute_maximum"),
                share_beyond_threshold=file.get_tensor(f"{number}.share_beyond_threshold"),
                damage={
                    name: {size: file.get_tensor(f"{number}.damage.{name}.{size}") for size in DAMAGE_GROUP_SIZES}
                    for name in entry["linears"]
                },
            )
            for number, entry in enumerate(described)
        ]


def stats_path(job: Job, index: int) -> Path:
    return job.run.file(f"calibrate/block-{index:05d}.safetensors")


# -- the stage, top to bottom ------------------------------------------------------------------------------


class Statistics(Passenger):
    """The original's hidden states on the calibration text, measured in every block."""

    def __init__(self, job: Job, decoder: Decoder, ids: torch.Tensor, key: str) -> None:
        self._job, self._key = job, key
        self._ids = ids = ids[: measured_windows(job, decoder)]
        self._with_gradient = min(job.config.gradient_samples, len(ids))
        decoder.learn_calls(ids[:1, :PROBE_TOKENS])
        decoder.learn_calls(ids[: self._with_gradient])
        measured = [is_made_for(stats_path(job, i), block_key) for i, block_key in enumerate(block_keys(decoder, key))]
        store = job.run.file("calibrate/streams.safetensors")
        super().__init__(decoder, ids, key, store, [*measured, False].index(False))

    def go_through(self, index: int, block: nn.Module) -> None:
        hidden = self.streams["hidden"]
        if self._with_gradient:
            keep_input(self._job, self.decoder, index, hidden[: self._with_gradient])
        with self._job.compute.products():
            if index < self.finished:
                advance(self.decoder, index, block, hidden)
            else:
                stats = _measure_and_advance(self.decoder, index, block, hidden)
                _write_stats(stats_path(self._job, index), stats, self.keys[index])

    def finish(self) -> tuple[Path, ...]:
        """Take gradients back, where they are asked for; all blocks must be behind. What there is then."""
        gradients: tuple[Path, ...] = ()
        if self._with_gradient:
            last = self.streams["hidden"][: self._with_gradient]
            with self._job.compute.products():
                gradients = run_backward(self._job, self.decoder, "calibrate", self._key, last)
            if _counts_embeddings(self._job):
                ids = self._ids[: self._with_gradient]
                sizes = DAMAGE_GROUP_SIZES
                measured = measure_embedding_losses(self._job, self.decoder, self._key, ids, sizes)
                gradients = (*gradients, measured)
        self.arrived()
        return (*(stats_path(self._job, index) for index in range(len(self.keys))), *gradients)


def _measure_and_advance(decoder: Decoder, index: int, block: nn.Module, hidden: torch.Tensor) -> list[InputStats]:
    """Run a block over the calibration stream, in place, and measure each of its distinct inputs."""
    groups = [group for step in decoder.trace(index, block, hidden[:1, :PROBE_TOKENS]).steps for group in step]
    slot_of = {slot.name: slot for slot in decoder.slots[index]}
    moments = {group[0]: FeatureMoments(slot_of[group[0]].in_features, decoder.device) for group in groups}

    def add(name: str, value: torch.Tensor) -> None:
        if name in moments:
            moments[name].add(value.reshape(-1, value.shape[-1]))

    advance(decoder, index, block, hidden, add)
    return [
        moments[group[0]].finish(group, {name: _damage(block, slot_of[name]) for name in group}) for group in groups
    ]


def _damage(block: nn.Module, slot: LinearSlot) -> dict[int, torch.Tensor]:
    """||w - nearest(w)||^2 of each column for each candidate group size."""
    weight = slot.read(block)
    damage = {size: weight.new_zeros(weight.shape[1]) for size in DAMAGE_GROUP_SIZES}
    for rows in row_chunks(weight):
        for size, total in damage.items():
            grid = minmax_grid(rows, DAMAGE_BITS, size, symmetric=False)
            total += (rows - grid.values(grid.round_to_nearest(rows))).square_().sum(0)
    return damage


def _write_stats(path: Path, stats: list[InputStats], key: str) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for number, entry in enumerate(stats):
        tensors[f"{number}.second_moment"] = entry.second_moment
        tensors[f"{number}.absolute_maximum"] = entry.absolute_maximum
        tensors[f"{number}.share_beyond_threshold"] = entry.share_beyond_threshold
        for name, by_size in entry.damage.items():
            tensors |= {f"{number}.damage.{name}.{size}": value for size, value in by_size.items()}
    described = [{"linears": entry.linears, "tokens": entry.tokens} for entry in stats]
    write_keyed(path, key, tensors, inputs=described)


def _unreached(job: Job, blocks: int) -> list[str]:
    """A sentence for every block with experts that no calibration token reached."""
    sentences = []
    for index in range(blocks):
        stats = load_block_stats(stats_path(job, index))
        names = [name for entry in stats if not entry.tokens for name in entry.linears]
        if names:
            sentences.append(f"calibration never reached {', '.join(names)}")
    return sentences
