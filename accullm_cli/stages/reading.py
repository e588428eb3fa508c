"""reading: is the model that is converted the one in the source? Once per source, before anything is measured.

Reference and artifact are made by the same reading of the source, so that a mistake in it shows in no figure. Here it
is held against plain transformers: the logits of a window by `from_pretrained` and the model's own forward, and by the
blocks that calibrate and quantize run one after another.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import torch

from accullm_cli.errors import AccullmError, is_out_of_memory
from accullm_cli.measure.agreement import largest_difference
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.names import destinations
from accullm_cli.model.plain import plain_model
from accullm_cli.run import available_memory
from accullm_cli.stages.job import Job, open_decoder, versions
from accullm_cli.stages.stage import Before, Decision, Stage, Work
from accullm_cli.stages.texts import VALIDATION, windows_of
from accullm_cli.units import size

VERSION = 1
# Enough for whatever depends on other tokens to show, and few enough to take seconds.
TOKENS = 64
# Of the memory that is free, what the whole model in float32 may take.
SHARE_OF_MEMORY = 0.5
_FLOAT = 4


def reading_inputs(job: Job, before: Before) -> dict[str, str]:
    """What the comparison depends on: any text would do."""
    made_by = {f"version:{name}": versions()[name] for name in ("torch", "transformers")}
    return {"source:sha256": job.source.sha256, "version:reading": str(VERSION), **made_by}


def check_reading(job: Job, decision: Decision) -> Work:
    """Refuse a source that plain transformers reads otherwise.

    Raises:
        AccullmError: the two give different logits.
    """
    ids = windows_of(job, VALIDATION).ids[:2, :TOKENS]
    return Work((), _compare(job, open_decoder(job), ids))


READING = Stage("reading", reading_inputs, check_reading, commands=("calibrate",))


def loads_whole(job: Job) -> bool:
    """Whether plain transformers has the whole model in memory, in float32: where that has room for it twice."""
    needed, free = _FLOAT * sum(math.prod(info.shape) for info in job.source.tensors.values()), available_memory()
    return free is None or needed <= SHARE_OF_MEMORY * free


def _compare(job: Job, decoder: Decoder, ids: torch.Tensor) -> tuple[str, ...]:
    origin = Path(job.source.origin)
    gguf = origin if origin.suffix == ".gguf" and origin.is_file() else None
    scratch, obstacle = _place(job, decoder, gguf is not None)
    if obstacle:
        return (f"the reading was not held against plain transformers: {obstacle}",)
    dtype = torch.float32
    if gguf is not None:  # the import rounds every tensor to the source's one dtype
        dtype = next(iter(job.source.tensors.values())).torch_dtype
    records: tuple[str, ...] = ()
    try:
        try:
            logits, misfits, class_name = _by_plain(job, scratch, gguf, dtype, ids)
        except Exception as error:
            if gguf is None or is_out_of_memory(error):
                raise
            # It reads the architecture from safetensors alone: what was imported is then all that it can be given.
            records = ("the import of the GGUF file was not held against plain transformers, which cannot read it",)
            logits, misfits, class_name = _by_plain(job, scratch, None, dtype, ids)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # Whatever a class of transformers cannot do; what is known is that it was not compared.
        return (f"the reading was not held against plain transformers, which cannot run it ({_reason(error)})",)
    # The first window, here in a batch with another, as all windows are run.
    difference = largest_difference(logits_by_blocks(decoder, ids)[0], logits)
    if difference.is_arithmetic:
        return records
    if largest_difference(logits_by_blocks(decoder, ids[:1])[0], logits).is_arithmetic:
        raise AccullmError(
            f"what {class_name} makes of a text depends on the other texts in its batch: log-probabilities differ by up"
            f" to {difference}",
            job.source.origin,
            "no figure could be measured of this model",
        )
    raise AccullmError(
        f"plain transformers ({class_name}) reads another model than accullm runs: log-probabilities differ by up to "
        f"{difference}{f'; {misfits}' if misfits else ''}",
        job.source.origin,
        "this model cannot be converted truly, so it is not",
    )


def _by_plain(
    job: Job, scratch: Path | None, gguf: Path | None, dtype: torch.dtype, ids: torch.Tensor
) -> tuple[torch.Tensor, str, str]:
    """Logits [T, vocabulary] of the first window by plain transformers, what it could not place, its class's name."""
    with plain_model(job.source.directory, scratch, gguf, dtype) as plain, torch.no_grad():
        logits: torch.Tensor = plain.model(input_ids=ids[:1], use_cache=False).logits[0].float()
        return logits, plain.misfits, type(plain.model).__name__


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _place(job: Job, decoder: Decoder, is_gguf: bool) -> tuple[Path | None, str]:
    """Where plain transformers' weights may lie (None: in memory), and why they cannot ("" where they can)."""
    elements = {name: math.prod(info.shape) for name, info in job.source.tensors.items()}
    if loads_whole(job):
        return None, ""
    if is_gguf:
        needed, free = _FLOAT * sum(elements.values()), available_memory() or 0
        return None, f"of a GGUF file it takes the whole model in memory, {size(needed)}, and {size(free)} are free"
    places = destinations(decoder.model, elements)
    written = _FLOAT * sum(elements[stored] for stored, place in places.items() if place.is_converted)
    space = shutil.disk_usage(job.run.path).free
    if written > SHARE_OF_MEMORY * space:
        return None, f"it takes {size(written)} on disk, where {size(space)} are free"
    return job.run.path, ""


@torch.no_grad()
def logits_by_blocks(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """Logits [windows, T, vocabulary], on the CPU, by the decoder's blocks, one of them in memory at a time."""
    decoder.load_outside()
    hidden = decoder.embed(ids)
    decoder.release_outside()
    for index in range(len(decoder.block_names)):
        hidden = decoder.run(index, decoder.load_block(index), hidden)
        decoder.release_block(index)
    decoder.load_outside()
    logits = decoder.logits(hidden).cpu()
    decoder.release_outside()
    return logits
