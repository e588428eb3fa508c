"""Builds the kernels of cuda/ for the CPU and launches them there; emulation.h says how."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch

from accullm_cli.kernels.launch import Launch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMPILER = shutil.which("g++")
FORWARDS, BACKWARDS, SHUFFLED = 0, 1, 20  # thread orders; from 2 on a seed

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="g++ is missing: it builds the kernels for the CPU")


GUARD_BYTES = 256  # a multiple of every alignment that a kernel asks for
NOT_A_NUMBER = 0xFF  # as every byte of a number, in every format


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy between two strips of NaN, which `run` looks after."""
    room = torch.full((tensor.nbytes + 2 * GUARD_BYTES,), NOT_A_NUMBER, dtype=torch.uint8)
    inside = room[GUARD_BYTES : GUARD_BYTES + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return inside.copy_(tensor)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A guarded tensor of NaN (255 where whole numbers)."""
    empty = torch.empty(shape, dtype=dtype)
    return guarded(torch.full((empty.nbytes,), NOT_A_NUMBER, dtype=torch.uint8).view(dtype).view(shape))


def run(launch: Launch, buffers: Iterable[torch.Tensor | None], order: int = FORWARDS) -> None:
    """Launch a kernel on the CPU.

    Args:
        buffers: every tensor that it may touch, each from `guarded` or `poisoned`.

    Raises:
        AssertionError: what the emulation found wrong, or a strip around a buffer was written to.
    """
    inside = [tensor for tensor in buffers if tensor is not None]
    emulate(launch, [(start := tensor.data_ptr(), start + tensor.nbytes) for tensor in inside], order)
    for number, tensor in enumerate(inside):
        room = torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())
        for strip in (room[:GUARD_BYTES], room[GUARD_BYTES + tensor.nbytes :]):
            assert bool((strip == NOT_A_NUMBER).all()), f"{launch.kernel}: wrote beside buffer {number}"


def emulate(launch: Launch, bounds: Sequence[tuple[int, int]] = ((0, 2**64 - 1),), order: int = FORWARDS) -> None:
    """Launch a kernel on the CPU, which may touch only addresses within `bounds`.

    Raises:
        AssertionError: what the emulation found wrong.
    """
    built, complaint = _build(launch.source, launch.defines)
    assert built.exists(), complaint
    function = getattr(ctypes.CDLL(str(built)), f"emulate_{launch.kernel}")
    function.restype = ctypes.c_char_p
    flat = (ctypes.c_uint64 * (2 * len(bounds)))(*(edge for pair in bounds for edge in pair))
    pointers = (ctypes.c_void_p * len(launch.arguments))(*(ctypes.addressof(value) for value in launch.arguments))
    grid = (ctypes.c_int * 3)(*launch.grid)
    found = function(pointers, grid, launch.threads, launch.shared_bytes, order, flat, len(bounds)).decode()
    assert not found, f"{launch.kernel}: {found}"


@cache
def _build(source: str, defines: tuple[str, ...]) -> tuple[Path, str]:
    """The library of a file of cuda/, or of any file given by its whole path; and what the compiler complained of."""
    assert COMPILER is not None
    file = ROOT / "cuda" / source
    text = file.read_text(encoding="utf-8")
    kernels = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)+\s*)?(\w+)\(", text)
    program = f'#include "{file}"\n' + "".join(f"EMULATED({name})\n" for name in kernels)
    command = [
        COMPILER, "-O2", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Werror",
        "-ffp-contract=off", *(f"-D{define}" for define in defines),
        "-I", str(HERE), "-I", str(ROOT / "cuda"), "-include", str(HERE / "emulation.h"), "-x", "c++", "-",
    ]  # fmt: skip
    key = hashlib.sha256(repr((command, program)).encode())
    for read in (file, *sorted((ROOT / "cuda").glob("*.cuh")), *sorted(HERE.glob("*.*h"))):
        key.update(read.read_bytes())
    # Kept between runs: building takes longer than all launches together.
    folder = ROOT / ".pytest_cache" / "cuda_emulation"
    folder.mkdir(parents=True, exist_ok=True)
    built = folder / f"{key.hexdigest()[:24]}{sysconfig.get_config_var('SHLIB_SUFFIX')}"
    if built.exists():
        return built, ""
    unfinished = built.with_suffix(f".{os.getpid()}")
    result = subprocess.run([*command, "-o", str(unfinished)], input=program, capture_output=True, text=True)
    if result.returncode == 0:
        unfinished.replace(built)
    return built, result.stderr
