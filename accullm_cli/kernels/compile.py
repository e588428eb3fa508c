"""Compiles cuda/ with NVRTC, which CuPy brings along. No GPU is needed for that; CuPy is imported when first used."""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from accullm_cli.errors import AccullmError
from accullm_cli.resources import resource

# Tensor cores with float32 sums begin here.
OLDEST_ARCHITECTURE = 75
# Products and sums are rounded one by one, as torch does on the CPU; where a kernel wants them fused it says so.
OPTIONS = ("--std=c++17", "--fmad=false")
HOW_TO_INSTALL = "pip install 'accullm[cuda12]' or 'accullm[cuda13]', as the driver's version"


def compile_kernels(source: str, defines: tuple[str, ...], architecture: int) -> bytes:
    """The machine code (cubin) of one file of cuda/.

    Args:
        source: "hybrid_gemv.cu".
        defines: "NAME=VALUE" each.
        architecture: compute capability times ten: 90 for 9.0.

    Raises:
        AccullmError: CuPy or NVRTC is missing, the architecture is too old or unknown to NVRTC, or the source does not
            compile for it.
    """
    nvrtc = _nvrtc()
    options = option_list(defines, architecture)
    version = ".".join(map(str, nvrtc.getVersion()))
    names = tuple(path.name for path in sorted(resource("cuda").glob("*.cuh")))
    texts = tuple(resource("cuda", name).read_bytes() for name in (source, *names))
    key = hashlib.sha256()
    for part in (version.encode(), repr((source, options, names)).encode(), *texts):
        key.update(hashlib.sha256(part).digest())
    cached = cache_folder() / f"{Path(source).stem}-sm{architecture}-{key.hexdigest()[:24]}.cubin"
    if cached.is_file():
        return cached.read_bytes()
    check_architecture(architecture)
    program = nvrtc.createProgram(texts[0].decode(), source, list(texts[1:]), [name.encode() for name in names])
    try:
        nvrtc.compileProgram(program, list(options))
        # CuPy leaves out the last byte, which disassemblers miss.
        cubin: bytes = nvrtc.getCUBIN(program) + b"\0"
    except nvrtc.NVRTCError as error:
        lines = [line for line in nvrtc.getProgramLog(program).splitlines() if "error" in line] or [str(error)]
        raise AccullmError(f"does not compile for sm_{architecture}: {lines[0].strip()}", source) from error
    finally:
        nvrtc.destroyProgram(program)
    _store(cached, cubin)
    return cubin


def option_list(defines: tuple[str, ...], architecture: int) -> tuple[str, ...]:
    """What NVRTC is called with."""
    return (f"--gpu-architecture=sm_{architecture}", *OPTIONS, *(f"-D{define}" for define in defines))


def check_architecture(architecture: int) -> None:
    """Refuse an architecture that the kernels or NVRTC do not know.

    Raises:
        AccullmError: it is too old, or newer than NVRTC.
    """
    name = f"compute capability {architecture // 10}.{architecture % 10}"
    if architecture < OLDEST_ARCHITECTURE:
        raise AccullmError(f"no CUDA kernel for {name}: it needs 7.5 or newer")
    known = _nvrtc().getSupportedArchs()
    if architecture not in known:
        raise AccullmError(f"this NVRTC does not know {name}", hint="install a newer CUDA toolkit for CuPy")


def cache_folder() -> Path:
    """Where compiled kernels are kept between runs: $XDG_CACHE_HOME/accullm/kernels."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "accullm" / "kernels"


@cache
def _nvrtc() -> Any:
    """CuPy's binding of NVRTC, once it has shown that it finds the library.

    Raises:
        AccullmError: CuPy or NVRTC is missing.
    """
    try:
        from cupy.cuda import nvrtc
    except ImportError as error:
        raise AccullmError("CuPy is missing", hint=HOW_TO_INSTALL) from error
    try:
        nvrtc.getVersion()
    except (RuntimeError, OSError) as error:
        hint = "pip install 'cuda-toolkit[nvrtc]' in the version of CuPy's CUDA"
        raise AccullmError(f"CuPy finds no NVRTC ({error})", hint=hint) from error
    return nvrtc


def _store(path: Path, content: bytes) -> None:
    """Write by renaming, so that another process reads all or nothing; a cache that cannot be written is none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError:
        return
