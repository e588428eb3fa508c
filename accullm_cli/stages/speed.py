"""Tokens per second of the artifact beside its original: a prompt at once, and then one token after the other.

Both models are loaded whole, one at a time, in float32 on a CPU and in 16 bits on a GPU, and read the same tokens.
"""

from __future__ import annotations

import inspect
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from accullm_cli.formats.shards import dtype_name
from accullm_cli.measure.result import Speed, Throughput
from accullm_cli.progress import Event
from accullm_cli.run import write_text
from accullm_cli.stages.device import compute_dtype, describe_device
from accullm_cli.stages.job import Job
from accullm_cli.stages.reference import load_reference
from accullm_cli.stages.stage import Before, Decision, Stage, Work
from accullm_cli.stages.texts import VALIDATION
from accullm_cli.stages.validate import foreseen_sha256
from accullm_cli.stages.whole_model import engines, load_artifact, load_original

VERSION = 1
STAGE = "validate speed"
_FILE = "speed.json"
DECODED_TOKENS = 32
# Timed runs of either kind, after one that is not.
RUNS = 3


def speed(format_name: str, artifact: Path) -> Stage:
    """The stage that times prefill and decoding of an artifact and of its original, on the validation text."""

    def inputs(job: Job, before: Before) -> dict[str, str]:
        return {
            "input:artifact": foreseen_sha256(job, before, format_name, artifact),
            "input:reference": before[VALIDATION.reference].key,
            "version:speed": str(VERSION),
            **job.compute.inputs(),
        }

    def work(job: Job, decision: Decision) -> Work:
        path = job.run.file(_FILE)
        write_text(path, json.dumps(asdict(_measure(job, artifact)), indent=1))
        return Work((path,))

    return Stage(STAGE, inputs, work, ("export", VALIDATION.reference), ("validate",), (_FILE,))


def load_speed(job: Job) -> Speed:
    """What was measured."""
    content = json.loads(job.run.file(_FILE).read_text())
    for name in ("original", "artifact"):
        content[name] = Throughput(**content[name])
    return Speed(**content)


def _measure(job: Job, artifact: Path) -> Speed:
    device = job.compute.device
    dtype = compute_dtype(device, job.source.config)
    prompt, following = (ids.to(device) for ids in _prompt_and_next(job))
    job.progress(Event(STAGE, "step", "the artifact", None, 0, 2))
    model = load_artifact(artifact, device, dtype)
    of_artifact = time_model(model, prompt, following)
    prefill, decode = engines(model, prompt.numel()), engines(model, 1)
    del model
    job.progress(Event(STAGE, "step", "the original", None, 1, 2))
    of_original = time_model(load_original(job, device, dtype), prompt, following)
    return Speed(
        device=describe_device(device),
        dtype=dtype_name(dtype),
        prompt_tokens=prompt.numel(),
        decoded_tokens=following.numel(),
        original=of_original,
        artifact=of_artifact,
        prefill_engine=prefill,
        decode_engine=decode,
    )


def _prompt_and_next(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [1, T] to read at once, and [1, D] to read after them; together no more than the model's positions."""
    first, second = load_reference(job, VALIDATION)["ids"][:2]
    following = second[:DECODED_TOKENS]
    text = job.source.config.get("text_config", job.source.config)
    positions = text.get("max_position_embeddings", text.get("n_positions"))
    if positions is not None:
        first = first[: positions - len(following)]
    return first[None], following[None]


@torch.no_grad()
def time_model(model: PreTrainedModel, prompt: torch.Tensor, following: torch.Tensor) -> Throughput:
    """Tokens per second, medians of RUNS runs.

    Args:
        prompt: int64 [1, T], read at once; logits of its last token alone, as for generating.
        following: int64 [1, D], read one after the other with the keys and values of all before.
    """
    known = inspect.signature(model.forward).parameters
    last: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    name = "cache" if "cache" in known else "past_key_values"  # the name that newer versions of transformers give it
    prefills, decodes = [], []
    for _ in range(1 + RUNS):
        begin = _now(prompt.device)
        cache = {name: getattr(model(prompt, use_cache=True, **last), name)}
        between = _now(prompt.device)
        for position in range(following.shape[1]):
            model(following[:, position : position + 1], use_cache=True, **cache)
        prefills.append(between - begin)
        decodes.append(_now(prompt.device) - between)
    # The first run compiles, and makes what later ones find.
    return Throughput(
        prefill=prompt.numel() / statistics.median(prefills[1:]),
        decode=following.numel() / statistics.median(decodes[1:]),
    )


def _now(device: torch.device) -> float:
    """Seconds, once everything that was launched is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
