"""Parts of a tensor in the host's memory, each on its way to a device while the one before is computed with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch


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
