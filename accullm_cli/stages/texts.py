"""The texts of a conversion as windows of tokens.

They are cut before anything is decided: what is made of a text depends on its tokens, wherever they come from, and on
nothing else. Text that the model samples is the exception: it is made by calibrate, and named by what it depends on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from accullm_cli.model.mixture import SAMPLED, SAMPLED_VERSION, window_counts
from accullm_cli.model.other_text import KINDS
from accullm_cli.model.text import (
    Windows,
    calibration_windows,
    mixed,
    other_sources,
    other_windows,
    search_windows,
    validation_windows,
)
from accullm_cli.model.tokenizer import check_ids
from accullm_cli.run import key_of
from accullm_cli.stages.compute import ON_CPU
from accullm_cli.stages.job import Job, section_inputs
from accullm_cli.stages.keyed import facts_of, is_made_for, write_keyed

CALIBRATION = "calibration"
# Calibration's tokens in the run directory: quantize reads them there, and texts that cannot be cut again at will.
TOKENS = "tokens.safetensors"
# What text that a model writes depends on of this program.
WRITTEN = {"input:sampled text": str(SAMPLED_VERSION)}


@dataclass(frozen=True)
class Text:
    """A text that artifacts are held against their original on.

    place: what the names of its files in the run directory begin with.
    reference: the stage that runs the original over it.
    measuring: the stage that runs an artifact over it, with {} for the artifact's format.
    kind: of text of another kind, one of those that have names.
    """

    name: str
    place: str
    reference: str
    measuring: str
    cut: Callable[..., Windows]
    kind: str = ""


# What the contract is judged on, what a search over plans is measured on, and C++ or a file as text of another kind.
VALIDATION = Text("validation", "", "reference", "validate {}", validation_windows)
SEARCH = Text("search", "search/", "search reference", "measure {}", search_windows)
OTHER = Text("other", "other/", "other reference", "validate {} on other text", other_windows)
# Text of further kinds.
FURTHER = tuple(
    Text(f"other {kind}", f"other/{kind}/", f"{kind} reference", f"validate {{}} on {kind}", other_windows, kind)
    for kind in KINDS
)
# A long document fills windows this many times as long as others, of which there are fewer for that.
LONG = 4


def texts_of(job: Job) -> tuple[Text, ...]:
    """The texts that the configuration asks to be measured on."""
    return (VALIDATION, *((SEARCH,) if job.config.search.golden else ()), *_others(job))


def _others(job: Job) -> dict[Text, str]:
    """The texts of other kinds, and where each comes from."""
    of_kind = {text.kind: text for text in FURTHER}
    return {of_kind.get(source, OTHER): source for source in other_sources(job.config.validation.other_text)}


def shape_of(job: Job, text: Text) -> tuple[int, int]:
    """How many windows a text is to have, and of how many tokens: of other kinds half as many as of the contract's."""
    windows, seq_len = job.config.validation.windows, job.config.calibration.seq_len
    if text in (VALIDATION, SEARCH):
        return windows, seq_len
    if text.kind != "documents":
        return max(2, windows // 2), seq_len
    return max(2, windows // 2 // LONG), min(LONG * seq_len, job.positions or LONG * seq_len)


def windows_of(job: Job, text: Text) -> Windows:
    """A text's windows, cut once for a job.

    Raises:
        AccullmError: the text cannot be had, or is too short.
    """
    if text.name not in job.windows:
        source = _others(job).get(text, job.config.validation.text)
        windows = text.cut(source, job.tokenizer, *shape_of(job, text), job.config.machine.seed)
        check_ids(windows.ids, job.tokenizer, job.source.directory)
        job.windows[text.name] = windows
    return job.windows[text.name]


def text_inputs(job: Job, text: Text) -> dict[str, str]:
    """What a stage depends on that reads a text."""
    return {f"input:{text.name} tokens": _fingerprint(windows_of(job, text))}


def calibration_of(job: Job) -> Windows:
    """As `windows_of`, for calibration.

    A data set on the hub may change, and a model takes long to write: both are kept for as long as the same is asked.
    """
    if CALIBRATION not in job.windows:
        if (kept := _kept(job)) is not None:
            job.windows[CALIBRATION] = kept
        else:
            parts = [_part(job, source, count) for source, count in _counts(job).items()]
            job.windows[CALIBRATION] = mixed(parts, job.config.machine.seed)
    return job.windows[CALIBRATION]


def _counts(job: Job) -> dict[str, int]:
    """How many calibration windows are of which source."""
    return window_counts(job.config.calibration.text, job.config.calibration.samples)


def _part(job: Job, source: str, count: int) -> Windows:
    """Calibration's windows of one source, made once for a job."""

    def make() -> Windows:
        seq_len, seed = job.config.calibration.seq_len, job.config.machine.seed
        if source not in SAMPLED:
            windows = calibration_windows(source, job.tokenizer, count, seq_len, seed)
            check_ids(windows.ids, job.tokenizer, job.source.directory)
            return windows
        from accullm_cli.model.self_text import sampled_windows

        keep = partial(_kept_batch, job, source)
        return sampled_windows(job.source, job.tokenizer, source, count, seq_len, seed, keep, job.progress)

    return job.kept(f"{CALIBRATION} {source}", make)


def _kept_batch(job: Job, source: str, number: int, count: int, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Windows that the model writes, batch by batch in the run directory, so that what is written is not lost."""
    path = job.run.file(f"calibrate/{source}-{number:05d}.safetensors")
    options = job.config.calibration
    shape = {"windows": f"{count} x {options.seq_len}", "seed": str(job.config.machine.seed)}
    key = key_of({**shape, **WRITTEN, **ON_CPU.inputs(), "source:sha256": job.source.sha256})
    if _is_forced(job) or not is_made_for(path, key):
        write_keyed(path, key, {"ids": make()})
    return load_file(path)["ids"]


def calibration_inputs(job: Job) -> dict[str, str]:
    """What calibrate depends on of its text."""
    if any(source in SAMPLED for source in _counts(job)):
        return _asked_for(job)
    return {"input:calibration tokens": _fingerprint(calibration_of(job))}


def _calibration_key(job: Job) -> str:
    """What calibration's tokens are kept for."""
    return key_of({**_asked_for(job), **ON_CPU.inputs(), "source:sha256": job.source.sha256})


def check_texts(job: Job, calibrates: bool) -> None:
    """Cut what will be needed, long before it is.

    Raises:
        AccullmError: a text cannot be had, or is too short.
    """
    for text in texts_of(job):
        windows_of(job, text)
    counts = _counts(job)
    if calibrates and not any(source in SAMPLED for source in counts):
        calibration_of(job)
    elif calibrates and _kept(job) is None:
        for source, count in counts.items():
            if source not in SAMPLED:
                _part(job, source, count)
            elif source == "self-chat":
                from accullm_cli.model.self_text import chat_turns

                chat_turns(job.tokenizer)


def write_calibration(job: Job, windows: Windows) -> Path:
    """Keep calibration's windows in the run directory, and those of validation beside them, for whoever looks there."""
    path, facts = job.run.file(TOKENS), {"text": windows.description, "sha256": windows.sha256}
    ids = {CALIBRATION: windows.ids, VALIDATION.name: windows_of(job, VALIDATION).ids}
    write_keyed(path, _calibration_key(job), ids, **facts)
    return path


def load_calibration(job: Job) -> torch.Tensor:
    """Calibration's token ids [S, T], as calibrate left them."""
    return load_file(job.run.file(TOKENS))[CALIBRATION]


def _asked_for(job: Job) -> dict[str, str]:
    """What is asked for; of what is cut here, its tokens."""
    counts = _counts(job)
    seed = {"config:machine.seed": str(job.config.machine.seed)}
    written = WRITTEN if any(source in SAMPLED for source in counts) else {}
    cut = {
        f"input:{source} tokens": _fingerprint(_part(job, source, count))
        for source, count in counts.items()
        if not _is_kept(source)
    }
    return {
        **seed,
        **written,
        **cut,
        **section_inputs("calibration", job.config.calibration, "text", "samples", "seq_len"),
    }


def _is_kept(source: str) -> bool:
    """Whether it is got anew only where something else is asked for."""
    return source in SAMPLED or source.startswith("hub:")


def _is_forced(job: Job) -> bool:
    return job.fresh and job.only in (None, "calibrate")


def _kept(job: Job) -> Windows | None:
    """The calibration windows in the run directory, if they can be got from there alone and are what is asked for."""
    path = job.run.file(TOKENS)
    if _is_forced(job) or not any(map(_is_kept, _counts(job))) or not is_made_for(path, _calibration_key(job)):
        return None
    facts = facts_of(path)
    return Windows(load_file(path)[CALIBRATION], facts["text"], facts["sha256"])


def _fingerprint(windows: Windows) -> str:
    """By its tokens and how they are cut: "128 x 512, 3f0c..."."""
    return f"{' x '.join(map(str, windows.ids.shape))}, {windows.sha256}"
