"""The two streams of quantize: hidden states of the original, and of the model as far as it is rounded."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import nn

from accullm_cli.model.blocks import Decoder
from accullm_cli.model.slots import share_weights
from accullm_cli.quant.encodings.base import StoredLinear
from accullm_cli.quant.plan import Plan
from accullm_cli.run import key_of
from accullm_cli.stages.calibrate import PROBE_TOKENS
from accullm_cli.stages.job import Job
from accullm_cli.stages.streams import StreamStore, advance, copy_of
from accullm_cli.stages.texts import load_calibration
from accullm_cli.stages.units import Unit, block_unit, linear_of, shard_path

# How many blocks are behind stored streams, and the streams by name.
_Restored = tuple[int, dict[str, torch.Tensor]]


class TwoStreams:
    """The hidden states [S, T, hidden] of the original and of the model quantized so far, behind `position` blocks.

    `original` is None where nobody reads it: no target is corrected for the past, and there are no gradients.
    """

    def __init__(self, job: Job, decoder: Decoder, embedding: StoredLinear | None, restored: _Restored | None) -> None:
        """`embedding`: what the rounded model's stream begins with, where that is not the original's."""
        self._decoder = decoder
        self._compute = job.compute
        self._store = _stream_store(job)
        ids = load_calibration(job)
        reads_original = job.config.rounding.target == "corrected" or job.config.gradient_samples > 0
        decoder.load_outside()
        decoder.learn_calls(ids[:1, :PROBE_TOKENS])
        self.original: torch.Tensor | None = None
        if restored is None:
            self.position, self.rounded = 0, decoder.embed_all(ids)
            if reads_original:
                self.original = self.rounded
            if embedding is not None:
                module = decoder.model.get_input_embeddings()
                module.weight = nn.Parameter(torch.empty(0), False)  # the original's makes room
                module.weight = nn.Parameter(embedding.to(decoder.device).dequantize(torch.float32), False)
                self.rounded = decoder.embed_all(ids)
        else:
            self.position, self.rounded = restored[0], restored[1]["rounded"]
            self.original = restored[1].get("original")
            decoder.learn_calls(ids)
        decoder.release_outside()
        if self.original is self.rounded:
            self.original = copy_of(self.rounded)

    @classmethod
    def needed(
        cls, job: Job, decoder: Decoder, units: list[Unit], finished: int, inputs: list[dict[str, str]]
    ) -> TwoStreams | None:
        """The streams, as far as they were stored; None where no unit is left or rounding does not read them.

        Args:
            finished: the number of units that are.
        """
        if finished == len(units) or job.config.rounding.method == "nearest":
            return None
        keys = [key_of(entry) for unit, entry in zip(units[:finished], inputs, strict=False) if unit.block is not None]
        embedding = None
        if units[0].embedding is not None:
            tensors = load_file(shard_path(job, units[0].name))
            embedding = linear_of(tensors, next(iter(units[0].linears.values())))
        return cls(job, decoder, embedding, _stream_store(job).restore(keys))

    def follow(self, job: Job, index: int, plan: Plan) -> None:
        """Run both streams through a finished block, from its shard."""
        block = self._decoder.load_block(index)
        rounded_block = share_weights(block)
        if self.original is not None:  # before any expert is overwritten, which both blocks hold
            with self._compute.products():
                advance(self._decoder, index, block, self.original)
        tensors = load_file(shard_path(job, block_unit(index)))
        for slot in self._decoder.slots[index]:
            linear_plan = plan.linears[slot.name]
            if linear_plan.bits < 16:
                linear = linear_of(tensors, linear_plan).to(self._decoder.device)
                slot.write(rounded_block, linear.dequantize(torch.float32))
        with self._compute.products():
            advance(self._decoder, index, rounded_block, self.rounded)
        self.position = index + 1
        self._decoder.release_block(index)

    def store(self, key: str) -> None:
        streams = {"rounded": self.rounded}
        if self.original is not None:
            streams["original"] = self.original
        self._store.store_if_due(key, streams)

    def remove(self) -> None:
        self._store.remove()


def _stream_store(job: Job) -> StreamStore:
    return StreamStore(job.own("quantize/streams.safetensors"))
