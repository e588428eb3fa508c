"""`accullm doctor`: what this machine has and lacks for a conversion, and whether the 4-bit path computes rightly.

Everything heavy is imported inside the checks, so that a broken or missing package is a finding and not a traceback.
"""

from __future__ import annotations

import importlib
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from accullm_cli.errors import AccullmError
from accullm_cli.formats.capabilities import CAPABILITIES
from accullm_cli.processors import usable_cores
from accullm_cli.run import available_memory

if TYPE_CHECKING:
    import torch

# What a conversion of a small model needs: a 1B model's artifact and working files, the process and a few blocks.
ENOUGH_DISK = 2_000_000_000
ENOUGH_MEMORY = 2_000_000_000
# The self-test multiplies 96 float32 values of magnitude 1: their rounding stays below 1e-5, a wrong nibble is near 1.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    required: without it no conversion works; then the exit code is 3.
    hint: how to get what is missing; empty where nothing is.
    """

    name: str
    ok: bool
    required: bool
    detail: str
    hint: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was looked at."""

    checks: tuple[Check, ...]


def doctor() -> Diagnosis:
    """Look at Python, packages, GPU, disk and memory, and run the 4-bit path on a small matrix. Writes nothing."""
    checks: tuple[Callable[[], Check], ...] = (
        _python,
        _torch,
        lambda: _package("transformers", required=True),
        lambda: _package("safetensors", required=True),
        *(partial(_reader, name) for name, format in CAPABILITIES.items() if format.package),
        _gpu,
        _cupy,
        _matmul_engine,
        _self_test,
        _kernels,
        _disk,
        _memory,
    )
    return Diagnosis(tuple(check() for check in checks))


# -- packages ----------------------------------------------------------------------------------------------


def _python() -> Check:
    wanted = _declared_python()
    ok = not wanted or _allows(wanted, platform.python_version())
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Check("python", ok, True, detail, "" if ok else f"install Python {wanted}")


def _torch() -> Check:
    found = _package("torch", required=True)
    if not found.ok:
        return found
    torch = importlib.import_module("torch")
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU"
    detail = (
        f"{found.detail}, {build}, CPU instruction set {torch.backends.cpu.get_cpu_capability()}, "
        f"{_count(torch.get_num_threads(), 'thread')}"
    )
    return Check("torch", True, True, detail)


def _package(name: str, required: bool, purpose: str = "") -> Check:
    """Whether a package is installed, in the range that accullm declares, and importable."""
    wanted = _declared_range(name)
    install = f"pip install '{name}{wanted}'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, False, required, "not installed", f"for {purpose}: {install}" if purpose else install)
    if wanted and not _allows(wanted, version):
        return Check(name, False, required, f"{version}, but {wanted} is supported", install)
    module, reason = _import(name.replace("-", "_"))
    if module is None:
        return Check(name, False, required, f"{version}, but it cannot be imported ({reason})", install)
    return Check(name, True, required, version)


def _reader(format_name: str) -> Check:
    """Whether transformers has what it needs for a format."""
    package = CAPABILITIES[format_name].package
    return _package(package, required=False, purpose=f"--format {format_name} in transformers")


def _import(name: str) -> tuple[ModuleType | None, str]:
    """A module, or None and the first line of why it cannot be imported."""
    try:
        return importlib.import_module(name), ""
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        # A library of another CUDA or libc version shows as any of these.
        return None, _first_line(error)


def _declared_range(name: str) -> str:
    """The version range of a package in accullm's own metadata: ">=5.20,<6"; empty where accullm is not installed."""
    from packaging.requirements import Requirement

    try:
        declared = [Requirement(line) for line in metadata.requires("accullm") or ()]
    except metadata.PackageNotFoundError:
        return ""
    return next((str(entry.specifier) for entry in declared if entry.name == name), "")


def _declared_python() -> str:
    try:
        return metadata.metadata("accullm")["Requires-Python"] or ""
    except metadata.PackageNotFoundError:
        return ""


def _allows(wanted: str, version: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)


# -- the GPU -----------------------------------------------------------------------------------------------


def _gpu() -> Check:
    torch, _ = _import("torch")
    if torch is not None and torch.cuda.is_available():
        names = [
            f"{properties.name} ({_gigabytes(properties.total_memory)}, compute capability "
            f"{properties.major}.{properties.minor})"
            for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ]
        return Check("gpu", True, False, ", ".join(names))
    if Path("/proc/driver/nvidia/version").exists():
        hint = "install a torch that is built for CUDA (https://pytorch.org/get-started/locally)"
        return Check("gpu", False, False, "an NVIDIA driver, but torch sees no device", hint)
    return Check("gpu", False, False, "none; everything runs on the CPU")


def _cupy() -> Check:
    cupy, reason = _import("cupy")
    if cupy is not None:
        return Check("cupy", True, False, str(cupy.__version__))
    hint = "only CUDA kernels need it: pip install 'accullm[cuda12]' or 'accullm[cuda13]', as the driver's version"
    installed = any(_is_installed(name) for name in ("cupy", "cupy-cuda12x", "cupy-cuda13x"))
    return Check("cupy", False, False, f"cannot be imported ({reason})" if installed else "not installed", hint)


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


# -- does it compute ---------------------------------------------------------------------------------------


def _matmul_engine() -> Check:
    if _import("torch")[0] is None:
        return Check("matmul engine", False, True, "none: torch is missing", "install torch")
    import torch

    from accullm_cli.kernels.matmul import ENGINE, PACKED_ENGINE, why_no_kernels
    from accullm_cli.kernels.packed import PACKED_TOKENS

    on_cpu = f"{PACKED_ENGINE} up to {PACKED_TOKENS} tokens, beyond that {ENGINE}"
    if torch.cuda.is_available():
        reason = why_no_kernels(torch.device("cuda", 0), torch.float16)
        on_gpu = "hybrid CUDA kernels" if reason is None else f"{ENGINE} ({reason})"
        return Check("matmul engine", True, True, f"{on_cpu}; GPU: {on_gpu}")
    return Check("matmul engine", True, True, on_cpu)


def _kernels() -> Check:
    """Do the CUDA kernels compile, and (on a GPU) agree with float64 and the CPU? Only a disagreement fails doctor."""
    name = "cuda kernels"
    if _import("torch")[0] is None:
        return Check(name, False, False, "not compiled: torch is missing", "install torch")
    import torch

    from accullm_cli.kernels.check import compile_all, largest_disagreement
    from accullm_cli.kernels.rounding_check import loops_of, rounding_disagreement

    gpu = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability(0) if gpu else (9, 0)
    architecture = 10 * capability[0] + capability[1]
    try:
        count = compile_all(architecture)
        if not gpu:
            return Check(name, True, False, f"{count} compile for sm_{architecture}; no GPU to run them on")
        device = torch.device("cuda", 0)
        error = largest_disagreement(device)
        rounding_error = rounding_disagreement(loops_of(device))
    except AccullmError as refused:
        return Check(name, False, False, f"not run: {refused.what}", refused.hint or "see docs/kernels.md")
    if error is not None:
        return Check(name, False, True, f"disagree with float64: {error}", "please report it with this output")
    if rounding_error is not None:
        return Check(
            name, False, True, f"round otherwise than the CPU: {rounding_error}", "please report it with this output"
        )
    return Check(
        name, True, False, f"{count} compile for sm_{architecture}, agree with float64 and round as the CPU does"
    )


def _self_test() -> Check:
    """Round, pack, unpack, dequantize and multiply; every part is held against float64."""
    name, hint = "self-test", "reinstall torch; if it stays, please report it with this output"
    if _import("torch")[0] is None:
        return Check(name, False, True, "not run: torch is missing", "install torch")
    try:
        product_error, gain = int4_self_test()
    except (RuntimeError, AccullmError) as error:
        return Check(name, False, True, f"failed ({_first_line(error)})", hint)
    if not product_error <= TOLERANCE:
        return Check(name, False, True, f"int4 path disagrees: max error {product_error:.1e}", hint)
    if not gain < 1:
        detail = f"error feedback leaves {gain:.2f} times the output error of nearest rounding"
        return Check(name, False, True, detail, hint)
    detail = f"int4 path agrees: max error {product_error:.1e}; error feedback leaves {gain:.0%} of nearest's error"
    return Check(name, True, True, detail)


def int4_self_test() -> tuple[float, float]:
    """Convert one small linear as a conversion would, in each encoding of the native format, and multiply by it.

    The matrix has a last short group and two outlier features, and its inputs are correlated, so that error feedback
    has something to gain.

    Returns:
        The largest |float32 product - float64 product with the weight read from the packed bytes by hand|, relative
        to the largest product, of both engines of the CPU and all encodings; and the squared output error with error
        feedback over that of nearest rounding, where that is larger.
    """
    import torch

    from accullm_cli.kernels.matmul import hybrid_matmul
    from accullm_cli.kernels.packed import pack_linear
    from accullm_cli.quant.linear import QuantizedLinear
    from accullm_cli.quant.plan import LinearPlan
    from accullm_cli.quant.rounding import RoundingOptions, round_linears

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 96, generator=generator)
    rows = torch.randn(256, 96, generator=generator) @ torch.randn(96, 96, generator=generator) / 96**0.5
    errors, gains = [], []
    for encoding in ("trellis", "levels", "integer"):
        plan = LinearPlan("self-test", 24, 96, 4, 64, encoding != "integer", outlier_index=(5, 70), encoding=encoding)

        def made(method: Literal["nearest", "feedback"], plan: LinearPlan = plan) -> tuple[QuantizedLinear, float]:
            hessian = rows.T @ rows / len(rows)
            options = RoundingOptions(method)
            linear = round_linears({plan.name: weight}, {plan.name: plan}, options, torch.bfloat16, hessian)[plan.name]
            assert isinstance(linear.linear, QuantizedLinear)
            lost = weight.double() - decode_by_hand(linear.linear.to_tensors(), 96, 64, linear.linear.levels)
            return linear.linear, float((rows.double() @ lost.T).square().sum())

        linear, error = made("feedback")
        stored, levels = linear.to_tensors(), linear.levels
        packed = pack_linear(stored, 96, 4, 64, rows.dtype, levels)
        engines = QuantizedLinear.from_tensors(stored, 96, 4, 64, levels), packed
        products = torch.stack([hybrid_matmul(rows, own) for own in engines]).double()
        expected = rows.double() @ decode_by_hand(stored, 96, 64, levels).T
        errors.append(float((products - expected).abs().max() / expected.abs().max()))
        gains.append(error / made("nearest")[1])
    return max(errors), max(gains)


def decode_by_hand(
    stored: dict[str, torch.Tensor], in_features: int, group_size: int, levels: tuple[int, ...] | None = None
) -> torch.Tensor:
    """The weight [N, K] in float64 that 4-bit tensors of the native format stand for, nibble by nibble in Python."""
    import torch

    scales, outliers = stored["scales"].double().tolist(), stored["outlier_index"].tolist()
    weight = []
    above = before = [0] * in_features  # the lowest bits of the codes above, where these are a trellis
    for row, packed in enumerate(stored["qweight"].tolist()):
        lowest = []
        values = []
        for k in range(in_features):
            group = k // group_size
            code = packed[k // 2] >> 4 * (k % 2) & 15
            if levels is None:
                point = code - (int(stored["qzeros"][row, group // 2]) >> 4 * (group % 2) & 15)
            elif len(levels) == 16:
                point = levels[code]
            else:
                point = levels[2 * (code ^ before[k]) + above[k]]
            lowest.append(code & 1)
            values.append(point * scales[row][group])
        for column, value in zip(outliers, stored["outlier_weight"][row].tolist(), strict=True):
            values[column] += value  # an outlier's own code stands for 0
        above, before = lowest, above
        weight.append(values)
    return torch.tensor(weight, dtype=torch.float64)


# -- room --------------------------------------------------------------------------------------------------


def _disk() -> Check:
    usage = shutil.disk_usage(Path.cwd())
    ok = usage.free >= ENOUGH_DISK
    detail = f"{_gigabytes(usage.free)} free of {_gigabytes(usage.total)} in {Path.cwd()}"
    return Check("disk", ok, False, detail, "" if ok else "free some, or write elsewhere with --out")


def _memory() -> Check:
    free = available_memory()
    cores = _count(usable_cores(), "core")
    if free is None:
        return Check("memory", True, False, f"unknown on this system, {cores}")
    ok = free >= ENOUGH_MEMORY
    return Check("memory", ok, False, f"{_gigabytes(free)} available, {cores}", "" if ok else "end other programs")


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
