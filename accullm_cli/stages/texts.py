"""The texts of a conversion as windows of tokens.

They are cut before anything is decided: what is made of a text depends on its tokens, wherever they come from, and on
nothing else. Text that the model samples is the exception: it is made by calibrate, and named by what it depends on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from accullm_cli.model.other_text import KINDS
from accullm_cli.model.text import (
    Windows,
    calibration_windows,
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
SAMPLED = "self"
# Calibration's tokens in the run directory: quantize reads them there, and texts that cannot be cut again at will.
TOKENS = "tokens.safetensors"


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
        options, seed = job.config.calibration, job.config.machine.seed
        if (kept := _kept(job)) is not None:
            job.windows[CALIBRATION] = kept
        elif options.text == SAMPLED:
            from accullm_cli.model.self_text import sampled_windows

            job.windows[CALIBRATION] = sampled_windows(
                job.source, job.tokenizer, options.samples, options.seq_len, seed, job.progress
            )
        else:
            windows = calibration_windows(options.text, job.tokenizer, options.samples, options.seq_len, seed)
            check_ids(windows.ids, job.tokenizer, job.source.directory)
            job.windows[CALIBRATION] = windows
    return job.windows[CALIBRATION]


def calibration_inputs(job: Job) -> dict[str, str]:
    """What calibrate depends on of its text."""
    if job.config.calibration.text == SAMPLED:
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
    if calibrates and job.config.calibration.text != SAMPLED:
        calibration_of(job)


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
    seed = {"config:machine.seed": str(job.config.machine.seed)}
    return seed | section_inputs("calibration", job.config.calibration, "text", "samples", "seq_len")


def _kept(job: Job) -> Windows | None:
    """The calibration windows in the run directory, if they can be got from there alone and are what is asked for."""
    path, text = job.run.file(TOKENS), job.config.calibration.text
    is_forced = job.fresh and job.only in (None, "calibrate")
    if is_forced or not (text == SAMPLED or text.startswith("hub:")) or not is_made_for(path, _calibration_key(job)):
        return None
    facts = facts_of(path)
    return Windows(load_file(path)[CALIBRATION], facts["text"], facts["sha256"])


def _fingerprint(windows: Windows) -> str:
    """By its tokens and how they are cut: "128 x 512, 3f0c..."."""
    return f"{' x '.join(map(str, windows.ids.shape))}, {windows.sha256}"
