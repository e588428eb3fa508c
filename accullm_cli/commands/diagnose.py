"""Where an artifact's loss comes from: one block, or one linear, at a time back to full precision.

Nothing is estimated. The artifact's hidden states go through its blocks once; where they meet a block, a copy of them
goes through it as it was in the original, and from there on through the artifact's blocks like the rest. Both models
are so read once, whatever their number of blocks; what grows is the number of copies that are on their way.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from accullm_cli.errors import AccullmError
from accullm_cli.formats import adopted, open_artifact
from accullm_cli.formats.stored import StoredArtifact
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.checkpoint import Checkpoint
from accullm_cli.model.skeleton import build_skeleton
from accullm_cli.model.slots import LinearSlot
from accullm_cli.model.source import open_source
from accullm_cli.model.text import validation_windows
from accullm_cli.model.tokenizer import check_ids, load_tokenizer
from accullm_cli.pipeline import named_original
from accullm_cli.progress import Event, Progress, silent
from accullm_cli.stages.artifact_weights import ArtifactWeights, open_artifact_decoder
from accullm_cli.stages.compute import ON_CPU
from accullm_cli.stages.streams import POSITIONS, advance

STAGE = "diagnose"
By = Literal["block", "linear"]
# Copies of the hidden states that are on their way at once; for more parts both models are read again.
COPIES = 96
EMBEDDINGS = "embedding and output head"


@dataclass(frozen=True)
class Part:
    """One part of the model, in full precision for a moment.

    mean_kl: of the artifact with this part as in the original, nats per token; gain: by how much that is less.
    share: the gain over the artifact's mean KL. Gains do not sum to it: errors of parts add up and cancel.
    margin_gain: by how much the log-probability of the original's most likely token rises over the best other one.
    extra_bits_per_weight: what keeping the part in 16 bits adds to the average over all linears.
    keep: the flag that does so; empty where there is none.
    """

    name: str
    mean_kl: float
    gain: float
    share: float
    margin_gain: float
    extra_bits_per_weight: float
    gain_per_bit: float
    keep: str


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found. parts: by gain, the largest first. advice: the change that helps most per bit."""

    artifact: str
    original: str
    tokens: int
    text: str
    bits_per_weight: float
    mean_kl: float
    mean_margin: float
    mean_margin_original: float
    advice: str
    parts: tuple[Part, ...]


def diagnose(
    artifact: Path,
    original: str | None = None,
    by: By = "block",
    windows: int = 4,
    seq_len: int = 256,
    seed: int = 0,
    progress: Progress = silent,
) -> Diagnosis:
    """Rank the parts of an artifact by what they cost.

    Args:
        artifact: its directory, or the file of somebody else that is one.
        original: the model that it was made from, by default as its manifest names it. An artifact of another tool has
            none, and that it was made from this model is not known.
        windows, seq_len: of the held-out text that is measured on.

    Raises:
        AccullmError: it is not an artifact, or was made from another model; the text is longer than the model's
            positions.
    """
    with tempfile.TemporaryDirectory() as cache:
        place = adopted(artifact, Path(cache) / "adopted") if artifact.is_file() else artifact
        manifest = open_artifact(place).manifest
        provenance = {} if manifest is None else manifest.provenance
        source = open_source(original or named_original(artifact, provenance), Path(cache), progress)
        if provenance.get("source_sha256", source.sha256) != source.sha256:  # of a GGUF file nobody knows
            raise _other_model(artifact, source.origin)
        tokenizer = load_tokenizer(source.directory)
        text = validation_windows("default", tokenizer, windows, seq_len, seed)
        check_ids(text.ids, tokenizer, source.directory)
        model = build_skeleton(source.directory, source.untied)
        full, small = Decoder(model, Checkpoint(source, model)), open_artifact_decoder(place)
        if not _alike(full, small):
            raise _other_model(artifact, source.origin)
        assert isinstance(small.weights, ArtifactWeights)
        stored = small.weights.artifact
        assert isinstance(stored, StoredArtifact)
        with ON_CPU.products():
            measured = _measure(full, small, stored, text.ids, by, progress)
        origin = source.origin
    first, *parts = measured
    weights = sum(linear.weights for linear in stored.plan.linears.values())
    found = tuple(
        sorted((_part(part, first, stored, weights) for part in parts), key=lambda part: part.gain, reverse=True)
    )
    return Diagnosis(
        artifact=str(artifact),
        original=origin,
        tokens=text.ids.numel(),
        text=text.description,
        bits_per_weight=stored.plan.bits_per_weight,
        mean_kl=first.mean_kl,
        mean_margin=first.margin,
        mean_margin_original=first.margin_original,
        advice=_advice(found, stored.plan.bits_per_weight),
        parts=found,
    )


def _other_model(artifact: Path, origin: str) -> AccullmError:
    return AccullmError(f"was made from another model than {origin}", artifact, "name its original with --original")


def _alike(full: Decoder, small: Decoder) -> bool:
    """Whether both have the same linears, and parameters of the same shapes."""
    first, second = ({name: own.shape for name, own in each.model.named_parameters()} for each in (full, small))
    slots = [[slot.name for own in each.slots for slot in own] for each in (full, small)]
    return slots[0] == slots[1] and all(first[name] == second[name] for name in first.keys() & second.keys())


# -- forward passes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Restored:
    """A part to be restored. block: its number, None for the embeddings; slots: None for the whole block."""

    name: str
    block: int | None
    slots: tuple[LinearSlot, ...] | None = None


@dataclass(frozen=True)
class _Measured:
    """What the artifact gives with this part restored; the first of all has none."""

    part: _Restored | None
    mean_kl: float
    margin: float
    margin_original: float


def _restorable(full: Decoder, stored: StoredArtifact, by: By) -> list[_Restored]:
    """The parts, in the order of the blocks; what is in 16 bits anyway is none."""
    quantized = stored.plan.quantized
    found = [_Restored(EMBEDDINGS, None)] if stored.plan.embeddings else []
    for index, (name, slots) in enumerate(zip(full.block_names, full.slots, strict=True)):
        stacks: dict[str, list[LinearSlot]] = {}
        for slot in slots:
            if slot.name in quantized:
                stacks.setdefault(slot.parameter, []).append(slot)
        if by == "block" and stacks:
            found.append(_Restored(name, index))
        elif by == "linear":
            # Experts of one stack together: there may be thousands.
            named = (f"{name}.{parameter.removesuffix('.weight')}" for parameter in stacks)
            found += [_Restored(n, index, tuple(of)) for n, of in zip(named, stacks.values(), strict=True)]
    return found


def _measure(
    full: Decoder, small: Decoder, stored: StoredArtifact, ids: torch.Tensor, by: By, progress: Progress
) -> list[_Measured]:
    """The artifact as it is, and with each part restored."""
    parts = _restorable(full, stored, by)
    progress(Event(STAGE, "start"))
    measured: list[_Measured] = []
    for start in range(0, max(len(parts), 1), COPIES):
        some = parts[start : start + COPIES]
        label = f"parts {start + 1} to {start + len(some)} of {len(parts)}"
        found = _sweep(full, small, ids, some, label, progress)
        measured += found if not measured else found[1:]
    progress(Event(STAGE, "end"))
    return measured


def _sweep(
    full: Decoder, small: Decoder, ids: torch.Tensor, parts: Sequence[_Restored], label: str, progress: Progress
) -> list[_Measured]:
    """Read both models once."""
    full.load_outside()
    small.load_outside()
    original, plain = full.embed_all(ids), small.embed_all(ids)
    copies: dict[_Restored, torch.Tensor] = {part: original.clone() for part in parts if part.block is None}
    full.release_outside()
    small.release_outside()
    total = len(full.block_names)
    for index in range(total):
        exact, rounded = full.load_block(index), small.load_block(index)
        for stream in copies.values():
            advance(small, index, rounded, stream)
        for part in (part for part in parts if part.block == index):
            copies[part] = _through(full, small, index, exact, rounded, part, plain.clone())
        advance(small, index, rounded, plain)
        advance(full, index, exact, original)
        full.release_block(index)
        small.release_block(index)
        progress(Event(STAGE, "step", f"{label}: block {index + 1}/{total}", None, index + 1, total))
    full.load_outside()
    small.load_outside()
    ways = [(None, small, plain), *((part, full if part.block is None else small, copies[part]) for part in parts)]
    measured = _compared(full, original, ways)
    full.release_outside()
    small.release_outside()
    return measured


def _through(
    full: Decoder,
    small: Decoder,
    index: int,
    exact: nn.Module,
    rounded: nn.Module,
    part: _Restored,
    stream: torch.Tensor,
) -> torch.Tensor:
    """A stream behind a block of the artifact's in which a part is the original's."""
    if part.slots is None:
        return advance(full, index, exact, stream)
    kept = [slot.read(rounded).clone() for slot in part.slots]
    for slot in part.slots:
        slot.write(rounded, slot.read(exact))
    advance(small, index, rounded, stream)
    for slot, weight in zip(part.slots, kept, strict=True):
        slot.write(rounded, weight)
    return stream


def _compared(
    full: Decoder, original: torch.Tensor, ways: Sequence[tuple[_Restored | None, Decoder, torch.Tensor]]
) -> list[_Measured]:
    """KL(original || artifact) and the margin of the original's most likely token, means over all positions.

    Args:
        ways: what is restored, the decoder with the output head, and the hidden states that it reads.
    """
    positions = original.shape[0] * original.shape[1]
    sums = torch.zeros(len(ways), 2, dtype=torch.float64)
    margin_original = 0.0
    for rows in torch.arange(positions).split(POSITIONS):
        first = _log_probabilities(full, original, rows)
        best = first.argmax(-1, keepdim=True)
        margin_original += float(_margins(first, best).sum())
        for of_way, (_, head, stream) in zip(sums, ways, strict=True):
            second = _log_probabilities(head, stream, rows)
            of_way[0] += (first.exp() * (first - second)).sum()
            of_way[1] += _margins(second, best).sum()
    means = (sums / positions).tolist()
    return [
        _Measured(part, kl, margin, margin_original / positions)
        for (part, _, _), (kl, margin) in zip(ways, means, strict=True)
    ]


def _log_probabilities(decoder: Decoder, stream: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Float64 [P, vocabulary] of some positions of all windows together."""
    return decoder.logits(stream.flatten(0, 1)[rows][None])[0].double().log_softmax(-1)


def _margins(log_probabilities: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """By how much a token [P, 1] is more likely than the best other one, in nats."""
    others = log_probabilities.scatter(-1, token, -torch.inf).amax(-1)
    return log_probabilities.gather(-1, token).squeeze(-1) - others


# -- what it means -----------------------------------------------------------------------------------------------


def _part(measured: _Measured, plain: _Measured, stored: StoredArtifact, weights: int) -> Part:
    part = measured.part
    assert part is not None
    gain = plain.mean_kl - measured.mean_kl
    linears = stored.plan.linears
    prefix = f"{part.name}."
    names = [name for name in linears if name.startswith(prefix) or name == part.name]
    saved = sum(16 * linears[name].weights - 8 * stored.linear_bytes(name) for name in names)
    extra = saved / weights
    keep = "" if part.block is None else f"--keep '{part.name}{'.*' if part.slots is None else _end(part, names)}'"
    found = Part(
        name=part.name,
        mean_kl=measured.mean_kl,
        gain=gain,
        share=gain / plain.mean_kl if plain.mean_kl else 0.0,
        margin_gain=measured.margin - plain.margin,
        extra_bits_per_weight=extra,
        gain_per_bit=gain / extra if extra > 0 else 0.0,
        keep=keep,
    )
    return found if part.block is not None else replace(found, keep="--embedding-bits 16")


def _end(part: _Restored, names: Sequence[str]) -> str:
    """Behind a stack of experts stand their numbers."""
    return "" if names == [part.name] else ".*"


def _advice(parts: Sequence[Part], bits_per_weight: float) -> str:
    """The change that helps most per bit."""
    helpful = [part for part in parts if part.gain > 0 and part.extra_bits_per_weight > 0]
    if not helpful:
        return "no single part would help"
    best = max(helpful, key=lambda part: part.gain_per_bit)
    return (
        f"{best.keep} takes {best.gain:.3g} nats ({best.share:.1%}) off the mean KL, at "
        f"{best.extra_bits_per_weight:.3f} bits per weight more than the {bits_per_weight:.3f} of now"
    )
