"""Where and how a job computes, as one value."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import transformers

from accullm_cli.config import Config
from accullm_cli.kernels.matmul import why_no_kernels
from accullm_cli.kernels.rounding_check import checked_loops
from accullm_cli.model.blocks import TOKENS_PER_BATCH
from accullm_cli.quant.loops import Loops
from accullm_cli.run import available_memory
from accullm_cli.stages.precision import Precision, products, usual_precision

CPU, FIRST_GPU = torch.device("cpu"), torch.device("cuda", 0)
# Tokens that go through a block at once on a GPU: enough to keep it busy. Of a block of Llama-7B their largest
# activations take 360 MB.
TOKENS_OF_A_GPU = 8192
# Of what is free of a GPU's memory, what may be kept there of a block while it is rounded; the rest is for rounding.
SHARE_OF_MEMORY = 0.5


@dataclass(frozen=True)
class Compute:
    """Where and how a job computes; by default on the CPU, in float32.

    device: of all that is computed.
    precision: of the products of calibrate and quantize; what measures computes in float32.
    tokens: that go through a block at once.
    """

    device: torch.device = CPU
    precision: Precision = "float32"
    tokens: int = TOKENS_PER_BATCH

    @property
    def loops(self) -> Loops:
        """What rounds weights on the device.

        Raises:
            AccullmError: its kernels round otherwise than the CPU.
        """
        return checked_loops(self.device)

    def products(self, precision: Precision | None = None) -> AbstractContextManager[None]:
        """Inside, products of float32 matrices have at least this precision (by default `self.precision`)."""
        return products(precision or self.precision, self.device)

    def room(self) -> int:
        """Bytes of a GPU's memory that may hold what a block's rounding will read again; a CPU leaves that on disk."""
        free = self.free_memory() if self.device.type == "cuda" else 0
        return int(SHARE_OF_MEMORY * (free or 0))

    def free_memory(self) -> int | None:
        """Bytes that are free where it computes; None where the system does not say."""
        if self.device.type == "cpu":
            return available_memory()
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def inputs(self) -> dict[str, str]:
        """What the bytes of a result depend on beside inputs and algorithm, as inputs of a stage.

        Sums differ between kinds of CPU and GPU. The precision is for each stage to add.
        """
        return {
            "machine:device": "cpu" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device),
            "machine:instruction set": torch.backends.cpu.get_cpu_capability(),
            "machine:threads": str(torch.get_num_threads()),
            "version:torch": torch.__version__,
            "version:transformers": transformers.__version__,
            **({} if self.tokens == TOKENS_PER_BATCH else {"machine:tokens a batch": str(self.tokens)}),
        }


ON_CPU = Compute()


def compute_of(config: Config) -> Compute:
    """What `--device` and `--precision` name; 'auto' is a GPU where there is one that can be used."""
    name = config.machine.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and why_no_kernels(FIRST_GPU, torch.float16) is None else "cpu"
    device = FIRST_GPU if name == "cuda" else torch.device(name)
    precision = usual_precision(device) if config.machine.precision == "auto" else "float32"
    return Compute(device, precision, TOKENS_PER_BATCH if device.type == "cpu" else TOKENS_OF_A_GPU)
