"""Activation streams: hidden states between two blocks, stored now and then so that a resume need not begin again."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from safetensors.torch import load_file
from torch import nn

from accullm_cli.errors import MachineError
from accullm_cli.model.blocks import Decoder
from accullm_cli.run import machine_errors
from accullm_cli.stages.keyed import facts_of, write_keyed

# A resume repeats at most about this much forward work.
SECONDS_BETWEEN_STORES = 60.0
# Positions that go through an output head at once: each has as many logits as the vocabulary has tokens.
POSITIONS = 64


def advance(
    decoder: Decoder,
    index: int,
    block: nn.Module,
    hidden: torch.Tensor,
    on_input: Callable[[str, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Run a block over a stream [windows, tokens, hidden], in place; `on_input` as for `Decoder.run_capturing`."""
    for rows, states in decoder.sent(hidden):
        if on_input is None:
            hidden[rows] = decoder.run(index, block, states)
        else:
            output = decoder.run_capturing(index, block, states, on_input)
            assert output is not None  # nothing was asked for at which it would stop
            hidden[rows] = output
    return hidden


def copy_of(stream: torch.Tensor) -> torch.Tensor:
    """A second stream of the same values, in the same kind of memory."""
    return torch.empty_like(stream, pin_memory=stream.is_pinned()).copy_(stream)


class StreamStore:
    """One file with the streams after some number of blocks, valid for one chain of block keys."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last = time.monotonic()

    def store_if_due(self, key: str, streams: dict[str, torch.Tensor]) -> None:
        """Store the streams behind the block with this key, if the last store is long enough ago."""
        if time.monotonic() - self._last >= SECONDS_BETWEEN_STORES:
            write_keyed(self.path, key, streams)
            self._last = time.monotonic()

    def restore(self, keys: list[str]) -> tuple[int, dict[str, torch.Tensor]] | None:
        """The number of blocks behind the stored streams and the streams; None where none fits.

        Args:
            keys: keys of the finished blocks, in order.
        """
        key = facts_of(self.path).get("key")
        return (keys.index(key) + 1, load_file(self.path)) if key in keys else None

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


class Captures:
    """What one block made of each batch until it is rounded; what is read is float32.

    It stays on its device as long as there is room, and else lies on disk: for every input of every token that is more
    than memory should hold. As a file it stays in the system's cache as long as there is room there, and it has no
    name, so that nothing is left of it whatever happens.
    """

    def __init__(self, directory: Path, device: torch.device, room: int = 0) -> None:
        """`room`: bytes that may be kept on the device."""
        self._directory, self._device, self._room = directory, device, room
        self._kept: dict[tuple[int, str], torch.Tensor] = {}
        with machine_errors(directory):
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)
        self._places: dict[tuple[int, str], tuple[int, torch.Size, torch.dtype]] = {}
        self._end = 0

    def __enter__(self) -> Captures:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        self._kept.clear()

    def write(self, batch: int, name: str, value: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
        """Keep a tensor, rounded to a dtype: what is only multiplied in bfloat16 is the same in half of the room.

        Raises:
            MachineError: the disk is full.
        """
        value = value.to(dtype)
        if value.nbytes <= self._room:
            self._room -= value.nbytes
            self._kept[batch, name] = value.clone()
            return
        content = value.cpu().contiguous().view(torch.uint8).numpy().data.cast("B")
        with machine_errors(self._directory):
            self._file.seek(self._end)
            done = 0
            while done < len(content):
                done += self._file.write(content[done:])
        self._places[batch, name] = self._end, value.shape, dtype
        self._end += len(content)

    def read(self, batch: int, name: str) -> torch.Tensor:
        """The tensor that was kept under this batch and name, on the device.

        Raises:
            MachineError: the disk does not give it back.
        """
        if (batch, name) in self._kept:
            return self._kept[batch, name].float()
        start, shape, dtype = self._places[batch, name]
        content = bytearray(dtype.itemsize * math.prod(shape))
        view, done = memoryview(content), 0
        with machine_errors(self._directory):
            self._file.seek(start)
            while done < len(content):
                count = self._file.readinto(view[done:])
                if not count:
                    raise MachineError("a working file ends too early", self._directory, "run the same command again")
                done += count
        return torch.frombuffer(content, dtype=dtype).view(shape).to(self._device).float()
