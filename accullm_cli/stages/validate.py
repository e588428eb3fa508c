"""validate: run the exported artifact against the original on held-out text.

The artifact's weights are read back from its files: on the CPU a block at a time, dequantized to float32; on a GPU all
at once, multiplied by the CUDA kernels in 16 bits. The original's blocks are not run again: calibrate left its last
hidden states, which the output head turns into its exact logits. That is the artifact's own head, or, where this is
quantized, the one in the source.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from accullm_cli.errors import AccullmError
from accullm_cli.formats import open_artifact
from accullm_cli.formats.manifest import CARD_NAME, MANIFEST_NAME, read_manifest
from accullm_cli.formats.shards import dtype_name
from accullm_cli.measure.divergence import Divergence
from accullm_cli.measure.result import Estimate, Fidelity
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.checkpoint import Checkpoint, build_skeleton
from accullm_cli.model.embeddings import find_embeddings
from accullm_cli.progress import Event
from accullm_cli.run import UP_TO_DATE, Reason, file_sha256, key_of, write_text
from accullm_cli.stages.artifact_weights import ArtifactWeights
from accullm_cli.stages.calibrate import (
    OTHER_TEXT,
    SEARCH_TEXT,
    VALIDATION_TEXT,
    load_reference,
    load_tokens,
    open_decoder,
    validation_text,
)
from accullm_cli.stages.device import compute_dtype, describe_device, device_of
from accullm_cli.stages.job import Job, StageOutcome, Work, machine_inputs, run_stage
from accullm_cli.stages.precision import products
from accullm_cli.stages.streams import StreamStore, advance
from accullm_cli.stages.whole_model import load_artifact

VERSION = 1
# Float32 sums in another order change a token's negative log-likelihood by some 1e-5; another head changes it by more.
HEAD_TOLERANCE = 1e-3


def validate(
    job: Job,
    artifact: Path,
    format_name: str,
    reference_key: str,
    force: bool = False,
    place: str = VALIDATION_TEXT,
) -> StageOutcome:
    """Measure how far the artifact's next-token distributions are from the original's.

    Args:
        reference_key: of the stage that ran the original over the text that lies in `place`.
    """
    name = stage_name(format_name, place)
    inputs = validate_inputs(job, artifact_sha256(artifact), reference_key)

    def work(reason: Reason) -> Work:
        with products("float32"):
            fidelity = _measure(job, name, artifact, key_of(inputs), place)
        path = fidelity_path(job, format_name, place)
        write_text(path, json.dumps(asdict(fidelity), indent=1))
        return Work((path,))

    return run_stage(job, name, inputs, force, work)


def stage_name(format_name: str, place: str = VALIDATION_TEXT) -> str:
    """Each format's artifact is measured by a stage of its own on each text."""
    return {
        VALIDATION_TEXT: f"validate {format_name}",
        OTHER_TEXT: f"validate {format_name} on other text",
        SEARCH_TEXT: f"measure {format_name}",
    }[place]


def validate_inputs(job: Job, artifact_hash: str, calibrate_key: str) -> dict[str, str]:
    """What the figures depend on."""
    return {
        "input:artifact": artifact_hash,
        "input:calibrate": calibrate_key,
        "config:machine.seed": str(job.config.machine.seed),
        "version:validate": str(VERSION),
        **machine_inputs(device_of(job.config)),
    }


def fidelity_path(job: Job, format_name: str, place: str = VALIDATION_TEXT) -> Path:
    return job.run.file(f"{place}validate-{format_name}.json")


def load_fidelity(job: Job, format_name: str, place: str = VALIDATION_TEXT) -> Fidelity:
    """What `validate` measured."""
    return fidelity_from_json(json.loads(fidelity_path(job, format_name, place).read_text()))


def fidelity_from_json(content: dict[str, Any]) -> Fidelity:
    """What `asdict` made of a Fidelity, and JSON of that."""
    for name, value in content.items():
        if isinstance(value, dict):
            content[name] = Estimate(**value)
    content["kl_of_window"] = tuple(content["kl_of_window"])
    content["kl_histogram"] = tuple((edge, count) for edge, count in content["kl_histogram"])
    return Fidelity(**content)


def artifact_sha256(directory: Path) -> str:
    """One hash over every file of an artifact but its model card and manifest, which validation writes to."""
    return hash_of_files({name: file_sha256(directory / name) for name in read_manifest(directory).files})


def hash_of_files(files: Mapping[str, str]) -> str:
    """As `artifact_sha256`, where the SHA-256 of each file is known by its relative name."""
    return key_of({name: digest for name, digest in files.items() if name not in (CARD_NAME, MANIFEST_NAME)})


def _measure(job: Job, stage: str, directory: Path, key: str, place: str) -> Fidelity:
    artifact = open_artifact(directory)
    model = build_skeleton(directory)
    decoder = Decoder(model, ArtifactWeights(artifact, model))
    ids = load_tokens(job, place)["validation"]
    device = device_of(job.config)
    logits_of = _on_gpu(job, directory, device) if device.type == "cuda" else _by_blocks(job, stage, decoder, ids, key)

    decoder.load_outside()
    originals_head = _head_weight(job) if artifact.plan.embeddings else None
    reference = load_reference(job, place)
    divergence = Divergence()
    for window in range(len(ids)):
        with _other_head(decoder, originals_head):
            original = decoder.logits(reference["hidden"][window : window + 1])[0]
            floor = decoder.logits(reference["floor"][window : window + 1])[0]
        _check_head(original, ids[window], reference["negative_log_likelihood"][window], directory)
        divergence.add(original, logits_of(window, ids[window]), ids[window], floor)
    found = divergence.finish(validation_text(job, place), job.config.machine.seed)
    if device.type == "cpu":
        return found
    dtype = compute_dtype(device, job.source.config)
    return replace(found, arithmetic=f"{dtype_name(dtype)} on {describe_device(device)}")


# The artifact's, [T, vocabulary], for a window's number and ids [T].
Logits = Callable[[int, torch.Tensor], torch.Tensor]


def _on_gpu(job: Job, directory: Path, device: torch.device) -> Logits:
    """By the whole model, in the precision in which it will be used there."""
    model = load_artifact(directory, device, compute_dtype(device, job.source.config))

    @torch.no_grad()
    def logits_of(window: int, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(ids[None].to(model.device), use_cache=False).logits[0]
        return found.float().cpu()

    return logits_of


def _by_blocks(job: Job, stage: str, decoder: Decoder, ids: torch.Tensor, key: str) -> Logits:
    """By all windows' last hidden states, and the output head that the decoder has by then."""
    hidden = _run_blocks(job, stage, decoder, ids, key)
    return lambda window, ids: decoder.logits(hidden[window : window + 1])[0]


def _run_blocks(job: Job, stage: str, decoder: Decoder, ids: torch.Tensor, key: str) -> torch.Tensor:
    """The artifact's last hidden states on the validation ids [V, T, hidden]; resumes from the stored stream."""
    total = len(decoder.block_names)
    store = StreamStore(job.run.file(f"{stage.replace(' ', '-')}-stream.safetensors"))
    keys = [key_of({"stage": key, "block": str(index)}) for index in range(total)]
    decoder.load_outside()
    hidden = decoder.embed_all(ids)
    decoder.release_outside()
    start = 0
    if (restored := store.restore(keys)) is not None:
        start, hidden = restored[0], restored[1]["hidden"]
        job.progress(Event(stage, "step", f"blocks 1 to {start}/{total}", UP_TO_DATE, start, total))
    for index in range(start, total):
        block = decoder.load_block(index)
        advance(decoder, index, block, hidden)
        decoder.release_block(index)
        store.store_if_due(keys[index], {"hidden": hidden})
        job.progress(Event(stage, "step", f"block {index + 1}/{total}", None, index + 1, total))
    store.remove()
    return hidden


def _head_weight(job: Job) -> nn.Parameter:
    """The weight of the original's output head, in float32."""
    source = open_decoder(job)
    assert isinstance(source.weights, Checkpoint)
    (slot,) = (slot for slot in find_embeddings(source.model) if slot.is_head)
    return nn.Parameter(source.weights.read(slot.parameter).float(), requires_grad=False)


@contextmanager
def _other_head(decoder: Decoder, weight: nn.Parameter | None) -> Iterator[None]:
    """Inside, the output head has this weight, or with None its own; the final norm stays the artifact's."""
    if weight is None:
        yield
        return
    head = decoder.model.get_output_embeddings()
    own = head.weight
    head.weight = weight
    try:
        yield
    finally:
        head.weight = own


def _check_head(logits: torch.Tensor, ids: torch.Tensor, expected: torch.Tensor, directory: Path) -> None:
    """The original's logits come from the artifact's final norm and, unless it is quantized, its output head; make sure
    that these are the original's.

    Raises:
        AccullmError: the original's likelihoods come out different from what its own head gave.
    """
    found = nn.functional.cross_entropy(logits[:-1].float(), ids[1:], reduction="none")
    if not bool(((found - expected).abs() <= HEAD_TOLERANCE).all()):
        raise AccullmError("final norm or output head differ from the original's", directory, "export again")
