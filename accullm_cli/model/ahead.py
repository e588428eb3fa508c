"""What is on its way while something else is computed: parts of a stream to a device, stored tensors from a disk."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from accullm_cli.model.integrity import TensorInfo, read_tensor


def sent_ahead(parts: Iterable[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
    """Each part on the device; to a GPU, the next one goes by a stream of its own before this one is given.

    From pinned memory, it goes while the device computes. A part must not be written to before it was given. Where the
    device is the CPU, the parts themselves are given.
    """
    if device.type == "cpu":
        yield from parts
        return
    copying = torch.cuda.Stream(device)
    coming: tuple[torch.Tensor, torch.cuda.Event] | None = None
    for part in parts:
        there = torch.empty_like(part, device=device)
        # This memory may be read yet by what the device was asked for before.
        copying.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(copying):
            there.copy_(part, non_blocking=True)
        if coming is not None:
            yield _arrived(*coming)
        coming = there, copying.record_event()
    if coming is not None:
        yield _arrived(*coming)


def _arrived(there: torch.Tensor, copied: torch.cuda.Event) -> torch.Tensor:
    torch.cuda.current_stream(there.device).wait_event(copied)
    return there


class ReadAhead:
    """Stored tensors that one thread reads into pinned memory, from where they go to a GPU at full speed.

    It holds those of one call of `begin`, until each is taken or others are begun.
    """

    def __init__(self) -> None:
        self._reader = ThreadPoolExecutor(1, "read ahead")
        self._coming: dict[TensorInfo, Future[torch.Tensor]] = {}

    def begin(self, infos: Iterable[TensorInfo]) -> None:
        """Read these, in order, and let go of what is there or waits."""
        for future in self._coming.values():
            future.cancel()
        self._coming.clear()
        for info in infos:
            # Memory is pinned by whoever calls, as a thread of its own may not know which GPU that is about.
            room = torch.empty(info.bytes, dtype=torch.uint8, pin_memory=True)
            self._coming[info] = self._reader.submit(read_tensor, info, room)

    def take(self, info: TensorInfo) -> torch.Tensor:
        """A stored tensor, in its dtype; read now, if it was not begun.

        Raises:
            AccullmError: as for `read_tensor`.
        """
        future = self._coming.pop(info, None)
        return read_tensor(info) if future is None else future.result()


def fetch(infos: Iterable[TensorInfo]) -> None:
    """Have the system read stored tensors into its page cache, while the caller goes on.

    This process holds none of it. Where the system knows no such request (macOS), nothing happens.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    by_file: dict[Path, list[TensorInfo]] = {}
    for info in infos:
        by_file.setdefault(info.file, []).append(info)
    for file, own in by_file.items():
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except OSError:
            return  # whoever reads it will say what is wrong with it
        try:
            for info in own:
                os.posix_fadvise(descriptor, info.begin, info.bytes, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
