"""calibrate: the one full-precision pass, and everything that later stages need from the original.

It leaves in the run directory
    tokens.safetensors                  calibration ids [S, T] and validation ids [V, T], int64
    calibrate/block-00000.safetensors   per distinct input of a block: light statistics (see quant.stats.InputStats)
    reference.safetensors               the last block's output on the validation ids, float32 [V, T, hidden], the same
                                        with one bfloat16 rounding per block (the noise floor), and the original's
                                        negative log-likelihood of each next token
    calibrate/gradient-00000.safetensors  where gradients are asked for; see stages.gradients
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from accullm_cli.model.blocks import Decoder
from accullm_cli.model.checkpoint import Checkpoint, build_skeleton
from accullm_cli.model.slots import LinearSlot
from accullm_cli.model.text import Windows, calibration_windows, other_windows, search_windows, validation_windows
from accullm_cli.model.tokenizer import load_tokenizer
from accullm_cli.progress import Event
from accullm_cli.quant.grid import minmax_grid, row_chunks
from accullm_cli.quant.stats import FeatureMoments, InputStats
from accullm_cli.run import UP_TO_DATE, Reason, key_of, write_file
from accullm_cli.stages.gradients import keep_input, run_backward
from accullm_cli.stages.job import Job, StageOutcome, Work, machine_inputs, run_stage, section_inputs
from accullm_cli.stages.keyed import is_made_for, write_keyed
from accullm_cli.stages.precision import precision_of, products
from accullm_cli.stages.streams import StreamStore, advance

VERSION = 3
# Statistics choose outlier features and weigh the errors of grids: second moments of so many windows do, unless there
# are experts, each of which sees few of the tokens.
STATISTICS_WINDOWS = 32
# Group sizes for which the damage that rounding does to each column is measured; the plan uses the nearest.
DAMAGE_GROUP_SIZES = (32, 64, 128, -1)
DAMAGE_BITS = 4
# Tokens of the first window that are enough to see which linears share an input.
PROBE_TOKENS = 32
# Where in the run directory the tokens and the original's last hidden states lie: of the text that the contract is
# judged on, of the text that a search over plans is measured on, and of the text of another kind.
VALIDATION_TEXT = ""
SEARCH_TEXT = "search/"
OTHER_TEXT = "other/"
# Its reference is a part of validation: a run of `validate` alone makes it.
OTHER_REFERENCE = "validate other reference"


def calibrate(job: Job, force: bool = False) -> StageOutcome:
    """Tokenize, run the original once, keep statistics of every input and its last hidden states."""
    inputs = calibrate_inputs(job)

    def work(reason: Reason) -> Work:
        with products("float32"):
            return _run_original(job, "calibrate", key_of(inputs), *_tokenize(job))

    return run_stage(job, "calibrate", inputs, force, work)


def calibrate_inputs(job: Job) -> dict[str, str]:
    """What the statistics and the reference depend on."""
    config = job.config
    return {
        "source:sha256": job.source.sha256,
        "version:calibrate": str(VERSION),
        "config:machine.seed": str(config.machine.seed),
        **section_inputs("calibration", config.calibration),
        "config:calibration.gradient_samples": str(config.gradient_samples),
        **section_inputs("validation", config.validation, "text", "windows"),
        **_file_inputs(config.calibration.text, config.validation.text),
        **machine_inputs(),
        "machine:precision": precision_of(job),
    }


def make_reference(job: Job, force: bool = False) -> StageOutcome:
    """As `calibrate`, for the validation text alone: what `validate` needs of the original."""
    return _reference(
        job, "reference", VALIDATION_TEXT, cut_validation_windows, validation_reference_inputs(job), force
    )


def make_search_reference(job: Job, force: bool = False) -> StageOutcome:
    """As `make_reference`, for the other windows of that text that a search over plans is measured on."""
    return _reference(job, "search reference", SEARCH_TEXT, cut_search_windows, validation_reference_inputs(job), force)


def make_other_reference(job: Job, force: bool = False) -> StageOutcome:
    """As `make_reference`, for the text of another kind."""
    return _reference(job, OTHER_REFERENCE, OTHER_TEXT, cut_other_windows, other_reference_inputs(job), force)


def cut_validation_windows(job: Job) -> Windows:
    """The windows that the contract is judged on."""
    return _cut(job, validation_windows, job.config.validation.text, job.config.validation.windows)


def cut_search_windows(job: Job) -> Windows:
    """Those that a search is measured on."""
    return _cut(job, search_windows, job.config.validation.text, job.config.validation.windows)


def cut_other_windows(job: Job) -> Windows:
    """Those of the text of another kind."""
    return _cut(job, other_windows, job.config.validation.other_text, other_window_count(job))


def validation_reference_inputs(job: Job) -> dict[str, str]:
    """What the references for the contract's windows and for a search's depend on: they are cut from one text."""
    return _reference_inputs(job, job.config.validation.text, job.config.validation.windows)


def other_reference_inputs(job: Job) -> dict[str, str]:
    """What the reference for the text of another kind depends on."""
    return _reference_inputs(job, job.config.validation.other_text, other_window_count(job))


def other_window_count(job: Job) -> int:
    """Windows of the text of another kind; 0 where there is to be none."""
    validation = job.config.validation
    return 0 if validation.other_text == "none" else max(2, validation.windows // 2)


def _reference(
    job: Job, stage: str, place: str, cut: Callable[[Job], Windows], inputs: dict[str, str], force: bool
) -> StageOutcome:
    def work(reason: Reason) -> Work:
        found = cut(job)
        none = Windows(found.ids[:0], "none", "")
        with products("float32"):
            return _run_original(job, stage, key_of(inputs), none, found, place)

    return run_stage(job, stage, inputs, force, work)


def _reference_inputs(job: Job, text: str, windows: int) -> dict[str, str]:
    return {
        "source:sha256": job.source.sha256,
        "version:calibrate": str(VERSION),
        "config:machine.seed": str(job.config.machine.seed),
        "config:calibration.seq_len": str(job.config.calibration.seq_len),
        "config:validation.text": repr(text),
        "config:validation.windows": repr(windows),
        **_file_inputs(text),
        **machine_inputs(),
    }


def measured_windows(job: Job, decoder: Decoder) -> int:
    """Of the calibration windows, how many the original runs over, for statistics and gradients; quantize reads all."""
    samples = job.config.calibration.samples
    if any(slot.expert is not None for slots in decoder.slots for slot in slots):
        return samples
    return min(samples, max(STATISTICS_WINDOWS, job.config.gradient_samples))


def open_decoder(job: Job) -> Decoder:
    """The source's decoder, without weights yet; refuses a checkpoint that does not fit its configuration."""
    model = build_skeleton(job.source.directory)
    return Decoder(model, Checkpoint(job.source, model))


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


def load_tokens(job: Job, place: str = VALIDATION_TEXT) -> dict[str, torch.Tensor]:
    """The "calibration" and "validation" ids; in the search's place, the "validation" ids are those to search on."""
    return load_file(job.run.file(f"{place}tokens.safetensors"))


def load_reference(job: Job, place: str = VALIDATION_TEXT) -> dict[str, torch.Tensor]:
    """What the original makes of the validation ids: "hidden", "floor" and "negative_log_likelihood"."""
    return load_file(job.run.file(f"{place}reference.safetensors"))


def validation_text(job: Job, place: str = VALIDATION_TEXT) -> str:
    """What the validation ids were cut from, in one line."""
    with safe_open(job.run.file(f"{place}tokens.safetensors"), framework="pt") as file:
        return str(json.loads(file.metadata()["texts"])["validation"])


# -- the stage, top to bottom ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Streams:
    """Hidden states between two blocks: of the calibration text, of the validation text, and of the noise floor."""

    calibration: torch.Tensor
    validation: torch.Tensor
    floor: torch.Tensor


def _run_original(
    job: Job, stage: str, key: str, calibration: Windows, validation: Windows, place: str = VALIDATION_TEXT
) -> Work:
    tokens_path = job.run.file(f"{place}tokens.safetensors")
    ids = {"calibration": calibration.ids, "validation": validation.ids}
    texts = json.dumps({"calibration": calibration.description, "validation": validation.description})
    # One entry, here and below: safetensors writes several in an order that differs from run to run.
    write_file(tokens_path, lambda path: save_file(ids, path, metadata={"texts": texts}))

    decoder = open_decoder(job)
    measured = calibration.ids[: measured_windows(job, decoder)]
    decoder.load_outside()
    store = StreamStore(job.run.file("calibrate/streams.safetensors"))
    keys = [key_of({"stage": key, "block": str(index)}) for index in range(len(decoder.block_names))]
    finished = 0
    while finished < len(keys) and is_made_for(stats_path(job, finished), keys[finished]):
        finished += 1
    decoder.learn_calls(validation.ids[:1, :PROBE_TOKENS])
    restored = store.restore(keys[:finished])
    if restored is None:
        start, streams = 0, _embed(decoder, measured, validation.ids)
    else:
        start, streams = restored[0], _Streams(**restored[1])
        for windows in (measured, validation.ids):
            decoder.learn_calls(windows)
    with_gradient = min(job.config.gradient_samples, len(measured))
    decoder.learn_calls(measured[:with_gradient])
    decoder.release_outside()
    total = len(keys)
    for index in range(start, total):
        if with_gradient:
            keep_input(job, index, streams.calibration[:with_gradient])
        block = decoder.load_block(index)
        with products(precision_of(job)):
            if index >= finished and len(measured):
                stats = _measure_and_advance(decoder, index, block, streams.calibration)
                _write_stats(stats_path(job, index), stats, keys[index])
            else:
                advance(decoder, index, block, streams.calibration)
        streams = _Streams(
            streams.calibration,
            advance(decoder, index, block, streams.validation),
            advance(decoder, index, block, streams.floor).to(torch.bfloat16).float(),
        )
        decoder.release_block(index)
        store.store_if_due(keys[index], vars(streams))
        reason = Reason("new") if index >= finished else UP_TO_DATE
        job.progress(Event(stage, "step", f"block {index + 1}/{total}", reason, index + 1, total))
    decoder.load_outside()
    reference = {
        "hidden": streams.validation,
        "floor": streams.floor,
        "negative_log_likelihood": _negative_log_likelihood(decoder, streams.validation, validation.ids),
    }
    reference_path = job.run.file(f"{place}reference.safetensors")
    write_file(reference_path, lambda path: save_file(reference, path))
    gradients: tuple[Path, ...] = ()
    if with_gradient:
        decoder.release_outside()
        with products(precision_of(job)):
            gradients = run_backward(job, decoder, stage, key, streams.calibration[:with_gradient])
    store.remove()
    if not len(measured):
        return Work((tokens_path, reference_path), job.source.records)
    outputs = (tokens_path, reference_path, *(stats_path(job, index) for index in range(total)), *gradients)
    return Work(outputs, (*job.source.records, *_unreached(job, total)))


def _cut(job: Job, cut: Callable[..., Windows], text: str, windows: int) -> Windows:
    tokenizer = load_tokenizer(job.source.directory)
    return cut(text, tokenizer, windows, job.config.calibration.seq_len, job.config.machine.seed)


def _tokenize(job: Job) -> tuple[Windows, Windows]:
    config, seed = job.config, job.config.machine.seed
    tokenizer = load_tokenizer(job.source.directory)
    seq_len = config.calibration.seq_len
    validation = cut_validation_windows(job)
    if config.calibration.text == "self":
        from accullm_cli.model.self_text import sampled_windows

        samples = config.calibration.samples
        return sampled_windows(job.source, tokenizer, samples, seq_len, seed, job.progress), validation
    calibration = calibration_windows(config.calibration.text, tokenizer, config.calibration.samples, seq_len, seed)
    return calibration, validation


def _embed(decoder: Decoder, calibration: torch.Tensor, validation: torch.Tensor) -> _Streams:
    hidden = decoder.embed_all(validation)
    return _Streams(decoder.embed_all(calibration), hidden, hidden.to(torch.bfloat16).float())


def _measure_and_advance(decoder: Decoder, index: int, block: nn.Module, hidden: torch.Tensor) -> list[InputStats]:
    """Run a block over the calibration stream, in place, and measure each of its distinct inputs."""
    groups = [group for step in decoder.trace(index, block, hidden[:1, :PROBE_TOKENS]).steps for group in step]
    slot_of = {slot.name: slot for slot in decoder.slots[index]}
    moments = {group[0]: FeatureMoments(slot_of[group[0]].in_features) for group in groups}

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
    damage = {size: torch.zeros(weight.shape[1]) for size in DAMAGE_GROUP_SIZES}
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


def _negative_log_likelihood(decoder: Decoder, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Of each next token, in nats: [V, T - 1]."""
    rows = []
    for window, tokens in zip(hidden, ids, strict=True):
        logits = decoder.logits(window[None])[0, :-1].float()
        rows.append(nn.functional.cross_entropy(logits, tokens[1:], reduction="none"))
    return torch.stack(rows)


def _unreached(job: Job, blocks: int) -> list[str]:
    """A sentence for every block with experts that no calibration token reached."""
    sentences = []
    for index in range(blocks):
        stats = load_block_stats(stats_path(job, index))
        names = [name for entry in stats if not entry.tokens for name in entry.linears]
        if names:
            sentences.append(f"calibration never reached {', '.join(names)}")
    return sentences


def _file_inputs(*texts: str) -> Mapping[str, str]:
    """The content hash of every text that is a file."""
    from accullm_cli.run import file_sha256

    return {f"input:text {text}": file_sha256(Path(text)) for text in texts if Path(text).is_file()}
