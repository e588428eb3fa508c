"""Which devices a job may compute on, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from accullm_cli.config import Config
from accullm_cli.errors import AccullmError
from accullm_cli.formats.capabilities import CAPABILITIES
from accullm_cli.kernels.matmul import why_no_kernels
from accullm_cli.kernels.rounding_check import checked_loops
from accullm_cli.stages.compute import FIRST_GPU, compute_of


def check_device(config: Config, only_validates: bool) -> None:
    """Refuse a device that is not there, or that does not do what is wanted of it.

    Args:
        only_validates: nothing will be rounded.

    Raises:
        AccullmError: one line that says what is missing, or which kernel is wrong there.
    """
    device, where = compute_of(config).device, f"--device {config.machine.device}"
    if device.type == "cpu":
        return
    if not torch.cuda.is_available():
        raise AccullmError("torch sees no GPU", where, "give cpu; accullm doctor says what is missing")
    count = torch.cuda.device_count()
    if device.index >= count:
        raise AccullmError(f"there is no such GPU among {count}", where, f"give cuda:0 to cuda:{count - 1}")
    if only_validates and not config.validation.speed:
        return
    reason = why_no_kernels(device, torch.float16)
    if reason is not None:
        raise AccullmError(f"the CUDA kernels cannot run there: {reason}", where, "give cpu")
    if not only_validates:
        checked_loops(device)


def chosen_device(config: Config) -> str:
    """What is to be said of the device that `--device auto` found; "" where there is no GPU to speak of."""
    if config.machine.device != "auto" or not torch.cuda.is_available():
        return ""
    device = compute_of(config).device
    if device.type == "cuda":
        return f"computes on {describe_device(device)}; --device cpu leaves it alone"
    name, reason = describe_device(FIRST_GPU), why_no_kernels(FIRST_GPU, torch.float16)
    return f"computes on the CPU, as the CUDA kernels cannot run on {name}: {reason}"


def check_format(config: Config, name: str) -> None:
    """Refuse to time an artifact whose linears no kernel reads.

    Raises:
        AccullmError: speed is to be measured with a format that they do not multiply by.
    """
    if config.validation.speed and not CAPABILITIES[name].kernels:
        others = " and ".join(other for other, format in CAPABILITIES.items() if format.kernels)
        raise AccullmError(f"the kernels multiply by the format {others}, not by {name}", "--speed", "leave it out")


def compute_dtype(device: torch.device, source: Mapping[str, Any]) -> torch.dtype:
    """What a whole model computes in: float32 on a CPU; on a GPU bfloat16 where the source and the GPU have it."""
    if device.type == "cpu":
        return torch.float32
    stored = source.get("dtype", source.get("torch_dtype"))
    bfloat16 = stored == "bfloat16" and why_no_kernels(device, torch.bfloat16) is None
    return torch.bfloat16 if bfloat16 else torch.float16


def describe_device(device: torch.device) -> str:
    """For people: "NVIDIA H200", or "CPU with AVX512, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU with {torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' if threads > 1 else ''}"
