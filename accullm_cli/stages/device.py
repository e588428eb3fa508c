"""Where weights are rounded and artifacts run: on the CPU, or on a GPU through the CUDA kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from accullm_cli.config import Config
from accullm_cli.errors import AccullmError
from accullm_cli.formats.capabilities import CAPABILITIES
from accullm_cli.kernels.matmul import why_no_kernels
from accullm_cli.kernels.rounding_check import checked_loops
from accullm_cli.stages.compute import compute_of


def wants_speed(config: Config) -> bool:
    """Whether tokens per second are measured: where it is asked for, and always on a GPU."""
    return config.validation.speed or compute_of(config).device.type == "cuda"


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
    reason = why_no_kernels(device, torch.float16)
    if reason is not None:
        raise AccullmError(f"the CUDA kernels cannot run there: {reason}", where, "give cpu")
    if not only_validates:
        checked_loops(device)


def check_format(config: Config, name: str) -> None:
    """Refuse to run an artifact whose linears no kernel reads.

    Raises:
        AccullmError: speed is to be measured, or a GPU used, with a format that they do not multiply by.
    """
    if wants_speed(config) and not CAPABILITIES[name].kernels:
        others = " and ".join(other for other, format in CAPABILITIES.items() if format.kernels)
        where = "--speed" if config.validation.speed else f"--device {config.machine.device}"
        raise AccullmError(f"the kernels multiply by the format {others}, not by {name}", where, "leave it out")


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
