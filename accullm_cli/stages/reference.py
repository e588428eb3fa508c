"""reference: what the original makes of a text, so that measuring an artifact on it runs none of the original's blocks.

It leaves in the run directory, for each text (stages.texts),
    reference.safetensors   "ids", the windows [V, T], int64; "hidden", the last block's output on them, float32
                            [V, T, hidden]; "floor", the same with one bfloat16 rounding per block (the noise floor);
                            "negative_log_likelihood" of each next token, in nats [V, T - 1]
A conversion that calibrates makes it in the same pass over the blocks.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from accullm_cli.model.blocks import Decoder
from accullm_cli.stages.job import Job, open_decoder
from accullm_cli.stages.keyed import facts_of, is_made_for, write_keyed
from accullm_cli.stages.passes import Passenger, run_blocks
from accullm_cli.stages.stage import Before, Decision, Stage, Work, decide
from accullm_cli.stages.streams import POSITIONS, advance, copy_of
from accullm_cli.stages.texts import Text, text_inputs, texts_of, windows_of

VERSION = 1


def reference(text: Text) -> Stage:
    """The stage that runs the original over a text."""

    def inputs(job: Job, before: Before) -> dict[str, str]:
        return {
            "source:sha256": job.source.sha256,
            "version:reference": str(VERSION),
            **text_inputs(job, text),
            **job.compute.inputs(),
        }

    def work(job: Job, decision: Decision) -> Work:
        path = _path(job, text)
        if not is_made_for(path, decision.key):  # calibrate makes it along with its own
            decoder = open_decoder(job)
            with job.compute.products("float32"):
                decoder.load_outside()
                streams = ReferenceStreams(job, decoder, text, decision.key)
                decoder.release_outside()
                run_blocks(job, text.reference, decoder, [streams])
                streams.write()
        return Work((path,), job.source.records)

    files = (f"{text.place}reference.safetensors", f"{text.place}reference-streams.safetensors")
    return Stage(text.reference, inputs, work, commands=("validate", "calibrate"), files=files)


def missing_references(job: Job, decoder: Decoder) -> list[ReferenceStreams]:
    """The streams of all references that the command will need and that are not there, for a pass that is due anyway.

    The decoder's outside must be loaded.
    """
    decisions = {text: decide(job, reference(text), {}) for text in texts_of(job)}
    return [
        ReferenceStreams(job, decoder, text, decision.key)
        for text, decision in decisions.items()
        if decision.reason.runs and not is_made_for(_path(job, text), decision.key)
    ]


def load_reference(job: Job, text: Text) -> dict[str, torch.Tensor]:
    """What the original makes of a text: "ids", "hidden", "floor" and "negative_log_likelihood"."""
    return load_file(_path(job, text))


def described(job: Job, text: Text) -> str:
    """What the windows of a reference were cut from, in one line."""
    return str(facts_of(_path(job, text))["text"])


class ReferenceStreams(Passenger):
    """The original's hidden states on a text, and those of its noise floor."""

    def __init__(self, job: Job, decoder: Decoder, text: Text, key: str) -> None:
        self._key, self._path, self._windows = key, _path(job, text), windows_of(job, text)
        super().__init__(decoder, self._windows.ids, key, self._path.with_name("reference-streams.safetensors"))

    def begin(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"hidden": hidden, "floor": self._rounded(copy_of(hidden))}

    def go_through(self, index: int, block: nn.Module) -> None:
        super().go_through(index, block)
        self._rounded(advance(self.decoder, index, block, self.streams["floor"]))

    def _rounded(self, stream: torch.Tensor) -> torch.Tensor:
        """A stream with its hidden states rounded to bfloat16, in place."""
        states = self.decoder.states(stream)
        states.copy_(states.to(torch.bfloat16))
        return stream

    def write(self) -> None:
        """Write the reference; all blocks must be behind."""
        ids = self._windows.ids
        self.decoder.load_outside()
        likelihood = _likelihoods(self.decoder, self.streams["hidden"], ids)
        self.decoder.release_outside()
        tensors = {"ids": ids, "negative_log_likelihood": likelihood, **self.streams}
        write_keyed(self._path, self._key, tensors, text=self._windows.description)
        self.arrived()


def _path(job: Job, text: Text) -> Path:
    return job.run.file(f"{text.place}reference.safetensors")


def _likelihoods(decoder: Decoder, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Of each next token, in nats: [V, T - 1]."""
    rows = []
    for window, tokens in zip(hidden, ids, strict=True):
        parts = zip(window[:-1].split(POSITIONS), tokens[1:].split(POSITIONS), strict=True)
        rows.append(torch.cat([negative_log_likelihood(decoder.logits(part[None])[0], own) for part, own in parts]))
    return torch.stack(rows)


def negative_log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """In nats, float32 on the CPU, of `targets`, one for each of the leading rows of logits [t, vocabulary]."""
    logits = logits[: len(targets)].float()
    return nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="none").cpu()
