"""`accullm doctor`: what it finds, what it says where something is missing, and that its self-test can fail."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch

from accullm_cli.commands import doctor as module
from accullm_cli.commands.doctor import Check, decode_by_hand, doctor
from accullm_cli.errors import AccullmError
from accullm_cli.kernels import check, matmul, rounding_check
from accullm_cli.kernels.packed import PackedLinear
from accullm_cli.quant import linear
from accullm_cli.quant.descent import Draft
from accullm_cli.quant.loops import COMPILED, Loops

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels compile to is tested elsewhere, and takes seconds."""
    monkeypatch.setattr(check, "compile_all", lambda architecture: 7)


def found(name: str) -> Check:
    return next(check for check in doctor().checks if check.name == name)


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """As if these distributions were not installed."""
    version = metadata.version

    def answer(name: str) -> str:
        if name in missing:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", answer)


def broken(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    """As if importing this module raised."""
    load = importlib.import_module

    def answer(asked: str) -> object:
        if asked == name:
            raise error
        return load(asked)

    monkeypatch.setattr(importlib, "import_module", answer)


def declaring(monkeypatch: pytest.MonkeyPatch, *requirements: str) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: list(requirements))


def test_finds_nothing_wrong_here() -> None:
    checks = doctor().checks
    assert [check.name for check in checks] == [
        "python", "torch", "transformers", "safetensors", "compressed-tensors", "gpu", "cupy", "matmul engine",
        "self-test", "cuda kernels", "disk", "memory",
    ]  # fmt: skip
    assert [check.name for check in checks if check.required and not check.ok] == []


def test_every_failed_check_but_a_missing_gpu_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "torch", "transformers", "safetensors", "compressed-tensors")
    broken(monkeypatch, "torch", ModuleNotFoundError("No module named 'torch'"))
    failed = [check for check in doctor().checks if not check.ok]
    assert {check.name for check in failed} >= {"torch", "transformers", "safetensors", "matmul engine", "self-test"}
    assert [check.name for check in failed if not check.hint] == ["gpu"]


def test_torch_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    detail = f"{metadata.version('torch')}, built for the CPU, CPU instruction set AVX2, 1 thread"
    assert found("torch") == Check("torch", True, True, detail)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert ", built for CUDA 12.6, " in found("torch").detail


def test_a_version_outside_the_declared_range_is_not_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    declaring(monkeypatch, "transformers<5.1,>=5.0", "torch")
    monkeypatch.setattr(metadata, "version", lambda name: "4.57.6" if name == "transformers" else "2.0")
    check = found("transformers")
    assert (check.ok, check.required) == (False, True)
    assert check.detail == "4.57.6, but <5.1,>=5.0 is supported"
    assert check.hint == "pip install 'transformers<5.1,>=5.0'"


def test_a_version_inside_the_declared_range_is_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    declaring(monkeypatch, f"transformers=={metadata.version('transformers')}")
    assert found("transformers") == Check("transformers", True, True, metadata.version("transformers"))


def test_a_missing_optional_package_names_the_format_that_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    declaring(monkeypatch, 'compressed-tensors>=0.15; extra == "compressed-tensors"')
    without(monkeypatch, "compressed-tensors")
    assert found("compressed-tensors") == Check(
        "compressed-tensors",
        False,
        False,
        "not installed",
        "for --format compressed-tensors in transformers: pip install 'compressed-tensors>=0.15'",
    )


def test_a_package_that_cannot_be_imported_is_told_by_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, "safetensors", OSError("libc.so.6: version `GLIBC_2.99' not found.\nmore"))
    check = found("safetensors")
    version = metadata.version("safetensors")
    assert not check.ok
    assert check.detail == f"{version}, but it cannot be imported (libc.so.6: version `GLIBC_2.99' not found)"


def test_an_unsupported_python_is_not_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_declared_python", lambda: ">=9.1")
    check = found("python")
    assert (check.ok, check.required, check.hint) == (False, True, "install Python >=9.1")


def test_cupy_says_which_extra_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, "cupy", ModuleNotFoundError("No module named 'cupy'"))
    without(monkeypatch, "cupy", "cupy-cuda12x", "cupy-cuda13x")
    check = found("cupy")
    assert (check.ok, check.required, check.detail) == (False, False, "not installed")
    assert "pip install 'accullm[cuda12]' or 'accullm[cuda13]'" in check.hint


def test_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, total_memory, major, minor = "Some GPU", 24_000_000_000, 8, 9

    answering(monkeypatch, gpu=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    one = "Some GPU (24.0 GB, compute capability 8.9)"
    assert found("gpu") == Check("gpu", True, False, f"{one}, {one}")


# -- the self-test -----------------------------------------------------------------------------------------


def test_decoding_by_hand_reads_low_nibbles_first() -> None:
    stored = {
        # Codes 1, 2, 3 | 4 of zero points 9, 8; feature 1 is an outlier whose code is its zero point.
        "qweight": torch.tensor([[0x91, 0x43]], dtype=torch.uint8),
        "scales": torch.tensor([[0.5, 2.0]], dtype=torch.float16),
        "qzeros": torch.tensor([[0x89]], dtype=torch.uint8),
        "outlier_index": torch.tensor([1], dtype=torch.int32),
        "outlier_weight": torch.tensor([[7.25]], dtype=torch.bfloat16),
    }
    assert decode_by_hand(stored, 4, 3).tolist() == [[(1 - 9) * 0.5, 7.25, (3 - 9) * 0.5, (4 - 8) * 2.0]]


def test_a_trellis_decoded_by_hand_follows_the_codes_above() -> None:
    stored = {
        "qweight": torch.tensor([[0x31], [0x0F], [0x40]], dtype=torch.uint8),
        "scales": torch.tensor([[0.5], [1.0], [2.0]], dtype=torch.float16),
        "outlier_index": torch.tensor([], dtype=torch.int32),
        "outlier_weight": torch.zeros(3, 0, dtype=torch.bfloat16),
    }
    levels = tuple(range(100, 132))
    # Codes 1, 15, 0 have places 2, 31, 2 (0 ^ 1) + 1; codes 3, 0, 4 have places 6, 1, 2 (4 ^ 1) + 0.
    wanted = [[102 * 0.5, 106 * 0.5], [131.0, 101.0], [103 * 2.0, 110 * 2.0]]
    assert decode_by_hand(stored, 2, 2, levels).tolist() == wanted


def test_the_self_test_agrees_and_says_how_well() -> None:
    check = found("self-test")
    assert (check.ok, check.required) == (True, True)
    assert check.detail.startswith("int4 path agrees: max error ")


def test_swapped_nibbles_fail_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    unpack = linear.unpack
    monkeypatch.setattr(linear, "unpack", lambda packed, bits, count: unpack(packed >> 4 | packed << 4, bits, count))
    check = found("self-test")
    assert (check.ok, check.required) == (False, True)
    assert check.detail.startswith("int4 path disagrees: max error ")
    assert check.hint == "reinstall torch; if it stays, please report it with this output"


def test_nibbles_that_the_products_of_a_cpu_swap_fail_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    product = matmul.packed_product

    def swapped(x: torch.Tensor, linear: PackedLinear, bias: torch.Tensor | None) -> torch.Tensor:
        return product(x, replace(linear, codes=linear.codes >> 4 | linear.codes << 4), bias)

    monkeypatch.setattr(matmul, "packed_product", swapped)
    assert found("self-test").detail.startswith("int4 path disagrees: max error ")


def test_levels_that_a_cpu_looks_up_wrongly_fail_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    product = matmul.packed_product

    def wrong(x: torch.Tensor, linear: PackedLinear, bias: torch.Tensor | None) -> torch.Tensor:
        other = linear.levels and (*linear.levels[:-1], linear.levels[-1] - 1)
        return product(x, replace(linear, levels=other), bias)

    monkeypatch.setattr(matmul, "packed_product", wrong)
    assert found("self-test").detail.startswith("int4 path disagrees: max error ")


def test_feedback_that_loses_to_nearest_fails_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    descend = Draft.descend

    def shifted(draft: Draft, fisher: torch.Tensor | None = None, loops: Loops = COMPILED) -> None:
        descend(draft, fisher, loops)  # the last step: none after it puts codes right
        draft.codes.add_(1).clamp_(max=15)

    monkeypatch.setattr(Draft, "descend", shifted)
    check = found("self-test")
    assert not check.ok
    assert check.detail.startswith("error feedback leaves ")


def test_a_factorization_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise RuntimeError("LAPACK is missing.\nStack trace")

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fail)
    assert found("self-test").detail == "failed (LAPACK is missing)"


# -- the CUDA kernels --------------------------------------------------------------------------------------


def answering(
    monkeypatch: pytest.MonkeyPatch,
    gpu: bool,
    disagreement: str | None = None,
    error: AccullmError | None = None,
    rounding_disagreement: str | None = None,
) -> list[int]:
    """As if the kernels compiled (or raised) and gave this answer; the architectures they were compiled for."""
    asked: list[int] = []

    def compile_all(architecture: int) -> int:
        asked.append(architecture)
        if error is not None:
            raise error
        return 7

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(check, "compile_all", compile_all)
    monkeypatch.setattr(check, "largest_disagreement", lambda device: disagreement)
    monkeypatch.setattr(rounding_check, "loops_of", lambda device: COMPILED)
    monkeypatch.setattr(rounding_check, "rounding_disagreement", lambda loops: rounding_disagreement)
    return asked


def test_kernels_are_compiled_where_no_gpu_can_run_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answering(monkeypatch, gpu=False) == []
    assert found("cuda kernels") == Check("cuda kernels", True, False, "7 compile for sm_90; no GPU to run them on")


def test_kernels_are_compared_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, gpu=True)
    assert module._kernels() == Check(
        "cuda kernels", True, False, "7 compile for sm_89, agree with float64 and round as the CPU does"
    )
    assert asked == [89]


def test_a_kernel_that_disagrees_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, gpu=True, disagreement="CUDA: hybrid_gemv with 1 tokens is off by 3 in whole numbers")
    assert module._kernels() == Check(
        "cuda kernels",
        False,
        True,
        "disagree with float64: CUDA: hybrid_gemv with 1 tokens is off by 3 in whole numbers",
        "please report it with this output",
    )


def test_a_kernel_that_rounds_otherwise_than_the_cpu_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, gpu=True, rounding_disagreement="descend: 3 of 26880 codes")
    assert module._kernels() == Check(
        "cuda kernels",
        False,
        True,
        "round otherwise than the CPU: descend: 3 of 26880 codes",
        "please report it with this output",
    )


def test_kernels_that_cannot_be_compiled_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, gpu=False, error=AccullmError("CuPy is missing", hint="pip install it"))
    assert found("cuda kernels") == Check("cuda kernels", False, False, "not run: CuPy is missing", "pip install it")


def test_the_engine_of_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(matmul, "why_no_kernels", lambda device, dtype: None)
    on_cpu = "CPU: packed 4-bit up to 16 tokens, beyond that torch: dequantize, then multiply"
    assert module._matmul_engine().detail == f"{on_cpu}; GPU: hybrid CUDA kernels"
    monkeypatch.setattr(matmul, "why_no_kernels", lambda device, dtype: "CuPy is missing")
    assert module._matmul_engine().detail.endswith("; GPU: torch: dequantize, then multiply (CuPy is missing)")


# -- room --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "ok", "hint"), [(2_000_000_000, True, ""), (1_999_999_999, False, "end other programs")]
)
def test_little_memory_is_told(monkeypatch: pytest.MonkeyPatch, free: int, ok: bool, hint: str) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: free)
    check = found("memory")
    assert (check.ok, check.required, check.hint) == (ok, False, hint)


def test_a_system_that_does_not_tell_its_memory_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: None)
    assert found("memory").detail.startswith("unknown on this system, ")


def test_importing_the_command_imports_nothing_heavy() -> None:
    code = (
        "import sys, accullm_cli.commands.doctor\n"
        "print([name for name in ('torch', 'cupy', 'transformers', 'safetensors') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout == "[]\n"
