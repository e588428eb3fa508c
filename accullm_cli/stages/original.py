"""One pass over the original's blocks, for everything that is to be learned of it at once: its weights are large."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import nn

from accullm_cli.model.blocks import Decoder
from accullm_cli.model.checkpoint import Checkpoint, build_skeleton
from accullm_cli.progress import Event
from accullm_cli.run import UP_TO_DATE, Reason
from accullm_cli.stages.job import Job


class Passenger(Protocol):
    """A stream on its way through the blocks.

    start: the first block that it still has to go through. known: blocks of which nothing new will be learned.
    """

    start: int
    known: int

    def go_through(self, index: int, block: nn.Module) -> None:
        """Run over block `index` with the original's weights."""
        ...


def open_decoder(job: Job) -> Decoder:
    """The source's decoder, without weights yet; refuses a checkpoint that does not fit its configuration."""
    model = build_skeleton(job.source.directory)
    return Decoder(model, Checkpoint(job.source, model))


def run_original(job: Job, stage: str, decoder: Decoder, passengers: Sequence[Passenger]) -> None:
    """Take all passengers through the blocks; the first of them is what `stage` is for."""
    total = len(decoder.block_names)
    for index in range(min((passenger.start for passenger in passengers), default=total), total):
        block = decoder.load_block(index)
        for passenger in passengers:
            if index >= passenger.start:
                passenger.go_through(index, block)
        decoder.release_block(index)
        reason = Reason("new") if index >= passengers[0].known else UP_TO_DATE
        job.progress(Event(stage, "step", f"block {index + 1}/{total}", reason, index + 1, total))
