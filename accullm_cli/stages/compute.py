"""Where and how a job computes, as one value."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import transformers

from accullm_cli.config import Config
from accullm_cli.kernels.rounding_check import checked_loops
from accullm_cli.model.blocks import TOKENS_PER_BATCH
from accullm_cli.quant.loops import Loops
from accullm_cli.stages.precision import Precision, products, usual_precision

CPU = torch.device("cpu")


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
        return products(precision or self.precision)

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
        }


def compute_of(config: Config) -> Compute:
    """What `--device` and `--precision` name; 'auto' is the CPU for as long as the kernels have not run on a GPU."""
    name = config.machine.device
    device = CPU if name == "auto" else torch.device("cuda", 0) if name == "cuda" else torch.device(name)
    return Compute(device, usual_precision() if config.machine.precision == "auto" else "float32")
