"""A machine with a GPU, as far as stages can tell: the kernels are emulated, and its tensors are stand-ins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from accullm_cli.kernels.launch import Launch
from accullm_cli.kernels.rounding import cuda_loops
from accullm_cli.kernels.rounding_check import checked_loops
from accullm_cli.quant.loops import COMPILED, Loops
from accullm_cli.stages import compute, device
from accullm_cli.stages.precision import products
from tests.cuda_emulation import COMPILER, emulate
from tests.quant.elsewhere import THERE, as_if_there_were_a_gpu, pretend_streams

NAME = "Some GPU"
# Of its memory, what is free: enough for a tiny model, but in the share that captures get not for all of them.
FREE, SHARE = 1 << 21, 1 / 16


@contextmanager
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Inside, torch sees a GPU. Gives the kernels that are launched on it; without a compiler the CPU's loops round.

    What products round to there, and how many tokens they take at once, is as on the CPU.
    """
    launched: list[str] = []

    def launch(what: Launch, device: torch.device) -> None:
        assert device == THERE
        launched.append(what.kernel)
        emulate(what)

    def loops(device: torch.device) -> Loops:
        if device != THERE:
            return checked_loops(device)
        return cuda_loops(THERE, launch, 99 * 1024) if COMPILER else replace(COMPILED, device=THERE)

    with monkeypatch.context() as patched:
        for module in (compute, device):
            patched.setattr(module, "why_no_kernels", lambda device, dtype: None)
            patched.setattr(module, "checked_loops", loops)
        patched.setattr(compute, "TOKENS_OF_A_GPU", compute.TOKENS_PER_BATCH)
        patched.setattr(compute, "products", lambda precision, device: products(precision))
        patched.setattr(compute, "SHARE_OF_MEMORY", SHARE)
        patched.setattr(torch.cuda, "is_available", lambda: True)
        patched.setattr(torch.cuda, "device_count", lambda: 1)
        patched.setattr(torch.cuda, "get_device_name", lambda device: NAME)
        patched.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patched.setattr(torch.cuda, "mem_get_info", lambda device: (FREE, 2 * FREE))
        for name in ("memory_reserved", "memory_allocated"):
            patched.setattr(torch.cuda, name, lambda device: 0)
        patched.setattr(torch.cuda, "synchronize", lambda device=None: None)
        pretend_streams(patched, [])
        with as_if_there_were_a_gpu(patched):
            yield launched
