"""Launches kernels on a GPU: on torch's tensors, in torch's current stream, without waiting for anything.

A launch after the first of its kernel allocates nothing and loads nothing, so a CUDA graph can capture it.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from accullm_cli.kernels.compile import compile_kernels
from accullm_cli.kernels.launch import Device, Launch

# Beyond 48 KB a kernel has to ask for dynamic shared memory.
SHARED_WITHOUT_ASKING = 48 * 1024


def launch(what: Launch, device: torch.device) -> None:
    """Launch on `device`, in torch's current stream of it.

    Raises:
        AccullmError: the kernel cannot be compiled for the device.
    """
    from cupy.cuda import driver

    index = device.index if device.index is not None else torch.cuda.current_device()
    with torch.cuda.device(index):
        function = _function(what.source, what.kernel, what.defines, index)
        if what.shared_bytes > SHARED_WITHOUT_ASKING:
            _admit_shared(function, index)
        pointers = (ctypes.c_void_p * len(what.arguments))(*(ctypes.addressof(value) for value in what.arguments))
        stream = torch.cuda.current_stream(index).cuda_stream
        # The driver copies the arguments before it returns.
        driver.launchKernel(
            function, *what.grid, what.threads, 1, 1, what.shared_bytes, stream, ctypes.addressof(pointers), 0
        )


@cache
def describe(index: int) -> Device:
    """What launches on this device depend on."""
    from cupy.cuda import runtime

    multiprocessors = runtime.deviceGetAttribute(runtime.cudaDevAttrMultiProcessorCount, index)
    shared = runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, index)
    return Device(multiprocessors, shared)


@cache
def _module(source: str, defines: tuple[str, ...], index: int) -> int:
    from cupy.cuda import driver

    torch.cuda.init()
    major, minor = torch.cuda.get_device_capability(index)
    torch.zeros(1, device=f"cuda:{index}")  # makes torch's context of the device the current one
    return int(driver.moduleLoadData(compile_kernels(source, defines, 10 * major + minor)))


@cache
def _function(source: str, kernel: str, defines: tuple[str, ...], index: int) -> int:
    from cupy.cuda import driver

    return int(driver.moduleGetFunction(_module(source, defines, index), kernel))


@cache
def _admit_shared(function: int, index: int) -> None:
    from cupy.cuda import driver

    attribute = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    driver.funcSetAttribute(function, attribute, describe(index).shared_bytes)
