"""validate: run the exported artifact against the original on held-out text.

The artifact's weights are read back from its files a block at a time, dequantized to float32. Modules that multiply by
packed weights, on a GPU the kernels, are held against that (`stages.shipped`). The original's blocks are not run again:
calibrate left its last hidden states, which the output head turns into its exact logits. That is the artifact's own
head, or, where this is quantized, the one in the source.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from accullm_cli.errors import AccullmError
from accullm_cli.formats import open_artifact
from accullm_cli.formats.capabilities import CAPABILITIES
from accullm_cli.formats.manifest import CARD_NAME, MANIFEST_NAME, own_files
from accullm_cli.measure.divergence import Divergence
from accullm_cli.measure.result import Estimate, Fidelity
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.checkpoint import Checkpoint
from accullm_cli.model.embeddings import find_embeddings
from accullm_cli.model.skeleton import build_skeleton
from accullm_cli.model.structure import read_structure
from accullm_cli.progress import Event
from accullm_cli.run import file_sha256, key_of, write_text
from accullm_cli.stages.artifact_weights import ArtifactWeights
from accullm_cli.stages.device import compute_dtype, describe_device
from accullm_cli.stages.export import known_files
from accullm_cli.stages.job import Job
from accullm_cli.stages.passes import Passenger, run_blocks
from accullm_cli.stages.reference import described, load_reference, negative_log_likelihood
from accullm_cli.stages.shipped import TOKENS, check_kernels, check_shipped
from accullm_cli.stages.stage import Before, Decision, Stage, Work
from accullm_cli.stages.streams import POSITIONS
from accullm_cli.stages.texts import VALIDATION, Text, windows_of

VERSION = 4
# Logits [t, vocabulary] of some positions: by the original, by the artifact, and of the noise floor.
_Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# What the name of the stage ends with that leaves out an artifact's adapter.
ALONE = " without adapter"
# Float32 sums in another order change a token's negative log-likelihood by some 1e-5; another head changes it by more.
HEAD_TOLERANCE = 1e-3


def validation(format_name: str, artifact: Path, text: Text, alone: bool = False) -> Stage:
    """The stage that measures how far an artifact's next-token distributions are from the original's on a text.

    Args:
        alone: leave out the adapter that holds its outlier features.
    """
    name = text.measuring.format(format_name) + (ALONE if alone else "")

    def inputs(job: Job, before: Before) -> dict[str, str]:
        return {
            "input:artifact": foreseen_sha256(job, before, format_name, artifact),
            "input:reference": before[text.reference].key,
            "config:machine.seed": str(job.config.machine.seed),
            "version:validate": str(VERSION),
            **job.compute.inputs(),
        }

    def work(job: Job, decision: Decision) -> Work:
        with job.compute.products("float32"):
            fidelity, records = _measure(job, decision, artifact, text, alone)
        path = fidelity_path(job, format_name, text, alone)
        write_text(path, json.dumps(asdict(fidelity), indent=1))
        return Work((path,), records)

    files = (_fidelity_name(format_name, text, alone), _streams_name(name))
    return Stage(name, inputs, work, ("export", text.reference), ("validate",), files, format_name)


def fidelity_path(job: Job, format_name: str, text: Text = VALIDATION, alone: bool = False) -> Path:
    return job.run.file(_fidelity_name(format_name, text, alone))


def _fidelity_name(format_name: str, text: Text, alone: bool) -> str:
    return f"{text.place}validate-{format_name}{ALONE.replace(' ', '-') if alone else ''}.json"


def load_fidelity(job: Job, format_name: str, text: Text = VALIDATION, alone: bool = False) -> Fidelity:
    """What `validate` measured."""
    return fidelity_from_json(json.loads(fidelity_path(job, format_name, text, alone).read_text()))


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
    return hash_of_files({name: file_sha256(directory / name) for name in own_files(directory)})


def foreseen_sha256(job: Job, before: Before, format_name: str, directory: Path) -> str:
    """As `artifact_sha256`, also where the artifact has yet to be written, as far as that is known."""
    exporting = before.get("export")
    if exporting is None or not exporting.reason.runs:
        return artifact_sha256(directory)
    files = known_files(job, exporting.inputs, format_name)
    return hash_of_files(files) if files else "not known before it is written"


def hash_of_files(files: Mapping[str, str]) -> str:
    """As `artifact_sha256`, where the SHA-256 of each file is known by its relative name."""
    return key_of({name: digest for name, digest in files.items() if name not in (CARD_NAME, MANIFEST_NAME)})


def _measure(
    job: Job, decision: Decision, directory: Path, text: Text, alone: bool
) -> tuple[Fidelity, tuple[str, ...]]:
    """The figures, and sentences about what could not be checked."""
    model = build_skeleton(directory)
    structure = read_structure(model)
    artifact = open_artifact(directory).placed(model, structure)
    if alone:
        artifact = artifact.without_adapter()
    compute = job.compute
    decoder = Decoder(model, ArtifactWeights(artifact, model, structure), structure, compute.device, compute.tokens)
    reference = load_reference(job, text)
    ids = reference["ids"]
    hidden = _last_hidden(job, decision, decoder, ids)

    decoder.load_outside()
    records: tuple[str, ...] = ()
    if text is VALIDATION and not alone:
        measured = decoder.logits(hidden[:1, :TOKENS])[0].cpu()
        records = check_shipped(artifact, ids[0, :TOKENS], measured)
        if compute.device.type == "cuda" and CAPABILITIES[artifact.format].kernels:
            dtype = compute_dtype(compute.device, job.source.config)
            records += check_kernels(artifact, compute, dtype, ids[0, :TOKENS], measured)
    originals_head = _head_weight(job) if artifact.plan.embeddings else None
    divergence = Divergence()
    for window in range(len(ids)):
        streams = [stream[window] for stream in (reference["hidden"], hidden, reference["floor"])]
        parts = _parts(decoder, originals_head, *streams)
        likelihood = reference["negative_log_likelihood"][window]
        divergence.add_parts(_with_checked_head(parts, ids[window], likelihood, directory), ids[window])
        job.progress(Event(decision.stage, "step", f"window {window + 1}/{len(ids)}", None, window + 1, len(ids)))
    found = divergence.finish(described(job, text), job.config.machine.seed)
    arithmetic = found.arithmetic if compute.device.type == "cpu" else f"float32 on {describe_device(compute.device)}"
    return replace(found, arithmetic=arithmetic, text_sha256=windows_of(job, text).sha256), records


def _last_hidden(job: Job, decision: Decision, decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """The last block's output on all windows, [V, T, hidden]."""
    decoder.load_outside()
    passenger = Passenger(decoder, ids, decision.key, job.run.file(_streams_name(decision.stage)))
    decoder.release_outside()
    run_blocks(job, decision.stage, decoder, [passenger])
    passenger.arrived()
    return passenger.streams["hidden"]


def _streams_name(stage: str) -> str:
    return f"{stage.replace(' ', '-')}-stream.safetensors"


def _head_weight(job: Job) -> nn.Parameter:
    """The weight of the original's output head, in float32, where the job computes."""
    model = build_skeleton(job.source.directory, job.source.untied)
    (slot,) = (slot for slot in find_embeddings(model) if slot.is_head)
    weight = Checkpoint(job.source, model).read(slot.parameter).to(job.compute.device)
    return nn.Parameter(weight.float(), requires_grad=False)


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


def _parts(
    decoder: Decoder,
    originals_head: nn.Parameter | None,
    original: torch.Tensor,
    artifact: torch.Tensor,
    floor: torch.Tensor,
) -> Iterator[_Part]:
    """Of a window's hidden states [T, hidden] the logits, some positions at a time."""
    rows = zip(original.split(POSITIONS), artifact.split(POSITIONS), floor.split(POSITIONS), strict=True)
    for of_original, of_artifact, of_floor in rows:
        with _other_head(decoder, originals_head):
            first, third = (decoder.logits(states[None])[0] for states in (of_original, of_floor))
        yield first, decoder.logits(of_artifact[None])[0], third


def _with_checked_head(
    parts: Iterable[_Part], ids: torch.Tensor, expected: torch.Tensor, directory: Path
) -> Iterator[_Part]:
    """The original's logits come from the artifact's final norm and, unless it is quantized, its output head; make sure
    that these are the original's.

    Args:
        expected: the negative log-likelihoods [T - 1] by its own head.

    Raises:
        AccullmError: they come out different.
    """
    behind = 0
    for part in parts:
        logits, targets = part[0], ids[behind + 1 : behind + 1 + len(part[0])]
        found = negative_log_likelihood(logits, targets)
        if not bool(((found - expected[behind : behind + len(found)]).abs() <= HEAD_TOLERANCE).all()):
            raise AccullmError("final norm or output head differ from the original's", directory, "export again")
        behind += len(logits)
        yield part
