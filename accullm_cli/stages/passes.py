"""A pass over a decoder's blocks, each read once, for everything that is to go through them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from accullm_cli.model.blocks import Decoder
from accullm_cli.progress import Event
from accullm_cli.run import UP_TO_DATE, Reason, key_of
from accullm_cli.stages.job import Job
from accullm_cli.stages.streams import StreamStore, advance


class Passenger:
    """Hidden states [windows, tokens, hidden] on their way through the blocks.

    Where an earlier call was interrupted, they begin where it stored them last.
    """

    def __init__(self, decoder: Decoder, ids: torch.Tensor, key: str, store: Path, finished: int | None = None) -> None:
        """The decoder's outside must be loaded.

        Args:
            ids: the windows [windows, tokens].
            key: of what the states depend on.
            store: where they are stored.
            finished: where something is made of every block, the number of those that are done; the states must go
                through all others. None where only the end counts.
        """
        self.decoder = decoder
        self.keys = block_keys(decoder, key)
        self._store = StreamStore(store)
        self.finished = finished or 0
        restored = self._store.restore(self.keys[:finished])
        if restored is None:
            self.start, self.streams = 0, self.begin(decoder.embed_all(ids))
        else:
            self.start, self.streams = restored
            decoder.learn_calls(ids)

    def begin(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """All streams, of which "hidden" is one, in front of the first block."""
        return {"hidden": hidden}

    def go_through(self, index: int, block: nn.Module) -> None:
        """Run the streams over a block."""
        advance(self.decoder, index, block, self.streams["hidden"])

    def pass_block(self, index: int, block: nn.Module) -> None:
        """`go_through`, and store the streams now and then."""
        self.go_through(index, block)
        self._store.store_if_due(self.keys[index], self.streams)

    def arrived(self) -> None:
        """Nothing of what was stored is needed any more."""
        self._store.remove()


def block_keys(decoder: Decoder, key: str) -> list[str]:
    """For each block the key of what is behind it, where `key` is that of the whole."""
    return [key_of({"stage": key, "block": str(index)}) for index in range(len(decoder.block_names))]


def run_blocks(job: Job, stage: str, decoder: Decoder, passengers: Sequence[Passenger]) -> None:
    """Take all passengers through the blocks; the first of them is the one that `stage` is for."""
    total, first = len(decoder.block_names), passengers[0]
    start = min(passenger.start for passenger in passengers)
    if start:
        job.progress(Event(stage, "step", f"blocks 1 to {start}/{total}", UP_TO_DATE, start, total))
    for index in range(start, total):
        block = decoder.load_block(index)
        for passenger in passengers:
            if index >= passenger.start:
                passenger.pass_block(index, block)
        decoder.release_block(index)
        reason = Reason("new") if index >= first.finished else UP_TO_DATE
        job.progress(Event(stage, "step", f"block {index + 1}/{total}", reason, index + 1, total))
