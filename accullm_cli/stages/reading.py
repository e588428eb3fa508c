"""reading: is the model that is converted the one in the source? Once per source, before anything is measured.

Reference and artifact are made by the same reading of the source, so that a mistake in it shows in no figure. Here it
is held against plain transformers: the logits of a window by `from_pretrained` and the model's own forward, and by the
blocks that calibrate and quantize run one after another.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch

from accullm_cli.errors import AccullmError, is_out_of_memory
from accullm_cli.measure.agreement import largest_difference
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.names import destinations
from accullm_cli.model.plain import plain_model
from accullm_cli.progress import Event
from accullm_cli.run import available_memory, key_of, write_text
from accullm_cli.stages.job import Job, versions
from accullm_cli.units import size

VERSION = 1
# Enough for whatever depends on other tokens to show, and few enough to take seconds.
TOKENS = 64
# Of the memory that is free, what the whole model in float32 may take.
SHARE_OF_MEMORY = 0.5
_FLOAT = 4


def check_reading(job: Job, stage: str, decoder: Decoder, ids: torch.Tensor) -> tuple[str, ...]:
    """Refuse a source that plain transformers reads otherwise; remembered in `reading.json`.

    Args:
        stage: that asks for it, and tells of progress.
        decoder: the source's, without weights.
        ids: int64 [windows, T], of which the beginning of the first window is run.

    Returns: a sentence where it could not be held against plain transformers.

    Raises:
        AccullmError: the two give different logits.
    """
    path = job.run.file("reading.json")
    key = key_of({"source": job.source.sha256, "version": str(VERSION), **versions()})
    if (records := _remembered(path, key)) is not None:
        return records
    job.progress(Event(stage, "step", "held against plain transformers"))
    records = _compare(job, decoder, ids[:1, :TOKENS])
    write_text(path, json.dumps({"key": key, "records": records}, indent=1))
    return records


def _remembered(path: Path, key: str) -> tuple[str, ...] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return tuple(content["records"]) if content["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent or damaged: it is done again


def _compare(job: Job, decoder: Decoder, ids: torch.Tensor) -> tuple[str, ...]:
    origin = Path(job.source.origin)
    gguf = origin if origin.suffix == ".gguf" and origin.is_file() else None
    scratch, obstacle = _place(job, decoder, gguf is not None)
    if obstacle:
        return (f"the reading was not held against plain transformers: {obstacle}",)
    dtype = torch.float32
    if gguf is not None:  # the import rounds every tensor to the source's one dtype
        dtype = next(iter(job.source.tensors.values())).torch_dtype
    try:
        with plain_model(job.source.directory, scratch, gguf, dtype) as plain, torch.no_grad():
            logits, misfits = plain.model(input_ids=ids, use_cache=False).logits[0].float(), plain.misfits
            class_name = type(plain.model).__name__
            del plain
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # Whatever a class of transformers cannot do; what is known is that it was not compared.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return (f"the reading was not held against plain transformers, which cannot run it ({reason})",)
    difference = largest_difference(run_blocks(decoder, ids)[0], logits)
    if difference.is_arithmetic:
        return ()
    raise AccullmError(
        f"plain transformers ({class_name}) reads another model than accullm runs: log-probabilities differ by up to "
        f"{difference}{f'; {misfits}' if misfits else ''}",
        job.source.origin,
        "this model cannot be converted truly, so it is not",
    )


def _place(job: Job, decoder: Decoder, is_gguf: bool) -> tuple[Path | None, str]:
    """Where plain transformers' weights may lie (None: in memory), and why they cannot ("" where they can)."""
    elements = {name: math.prod(info.shape) for name, info in job.source.tensors.items()}
    needed, free = _FLOAT * sum(elements.values()), available_memory()
    if free is None or needed <= SHARE_OF_MEMORY * free:
        return None, ""
    if is_gguf:
        return None, f"of a GGUF file it takes the whole model in memory, {size(needed)}, and {size(free)} are free"
    places = destinations(decoder.model, elements)
    written = _FLOAT * sum(elements[stored] for stored, place in places.items() if place.is_converted)
    space = shutil.disk_usage(job.run.path).free
    if written > SHARE_OF_MEMORY * space:
        return None, f"it takes {size(written)} on disk, where {size(space)} are free"
    return job.run.path, ""


@torch.no_grad()
def run_blocks(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """Logits [windows, T, vocabulary] by the decoder's blocks, one of them in memory at a time."""
    decoder.load_outside()
    hidden = decoder.embed(ids)
    decoder.release_outside()
    for index in range(len(decoder.block_names)):
        hidden = decoder.run(index, decoder.load_block(index), hidden)
        decoder.release_block(index)
    decoder.load_outside()
    logits = decoder.logits(hidden)
    decoder.release_outside()
    return logits
