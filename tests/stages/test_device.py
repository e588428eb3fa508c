"""Where rounding and validation compute: which devices are refused, in which words, and what is computed in on each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from accullm_cli.config import Config
from accullm_cli.errors import AccullmError
from accullm_cli.quant.loops import COMPILED, Loops
from accullm_cli.stages import compute
from accullm_cli.stages import device as module
from accullm_cli.stages.compute import Compute, compute_of
from accullm_cli.stages.device import (
    check_device,
    check_format,
    chosen_device,
    compute_dtype,
    describe_device,
)
from tests.tiny import tiny_config

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def on(device: str, **settings: object) -> Config:
    return tiny_config(Path("model"), Path("out"), machine__device=device, **settings)


def checked_loops(device: torch.device) -> Loops:
    return replace(COMPILED, device=device)


def gpus(monkeypatch: pytest.MonkeyPatch, count: int, reason: str | None = None) -> None:
    """As if torch saw so many GPUs, on which the kernels can run unless there is a reason."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for where in (module, compute):
        monkeypatch.setattr(where, "why_no_kernels", lambda device, dtype: reason)
        monkeypatch.setattr(where, "checked_loops", checked_loops)


@pytest.mark.parametrize(
    ("name", "device"),
    [("cpu", torch.device("cpu")), ("cuda", GPU), ("cuda:3", torch.device("cuda", 3))],
)
def test_names_of_devices(name: str, device: torch.device) -> None:
    assert compute_of(on(name)).device == device


@pytest.mark.parametrize(
    ("name", "count", "reason", "line"),
    [
        ("auto", 0, None, None),
        ("cpu", 0, None, None),
        ("cuda:1", 2, None, None),
        ("cuda", 0, None, "--device cuda: torch sees no GPU; give cpu; accullm doctor says what is missing"),
        ("cuda:2", 2, None, "--device cuda:2: there is no such GPU among 2; give cuda:0 to cuda:1"),
        (
            "cuda:0",
            1,
            "CuPy is missing: pip install it",
            "--device cuda:0: the CUDA kernels cannot run there: CuPy is missing: pip install it; give cpu",
        ),
    ],
)
@pytest.mark.parametrize("only_validates", [False, True])
def test_devices_that_are_there_and_others(
    name: str, count: int, reason: str | None, line: str | None, only_validates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, count, reason)
    config = on(name, validation__speed=only_validates)  # which, as rounding does, needs the kernels
    if line is None:
        check_device(config, only_validates)
        return
    with pytest.raises(AccullmError) as refusal:
        check_device(config, only_validates)
    assert refusal.value.line() == line


def test_what_only_measures_needs_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 1, "CuPy is missing")
    check_device(on("cuda"), only_validates=True)


@pytest.mark.parametrize(
    ("count", "reason", "device", "line"),
    [
        (0, None, CPU, ""),
        (2, None, GPU, "computes on Some GPU; --device cpu leaves it alone"),
        (1, "no CuPy", CPU, "computes on the CPU, as the CUDA kernels cannot run on Some GPU: no CuPy"),
    ],
)
def test_a_gpu_is_used_where_it_can_be(
    count: int, reason: str | None, device: torch.device, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, count, reason)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert compute_of(on("auto")).device == device
    assert chosen_device(on("auto")) == line
    assert chosen_device(on("cpu")) == chosen_device(on("cuda")) == ""


def test_half_of_a_gpus_free_memory_is_room_for_what_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)  # by torch, which uses a third of it
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert Compute(GPU).free_memory() == 1200
    assert Compute(GPU).room() == 600
    assert Compute().room() == 0


def test_what_products_round_to_is_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    usual, asked = (compute_of(on("cuda", machine__precision=name)) for name in ("auto", "float32"))
    assert (usual.precision, asked.precision) == ("tf32", "float32")
    assert usual.inputs()["machine:tokens a batch"] == str(compute.TOKENS_OF_A_GPU)
    assert "machine:tokens a batch" not in compute_of(on("cpu")).inputs()


def test_where_kernels_round_otherwise_than_the_cpu_nothing_is_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 1)
    asked: list[torch.device] = []

    def refuse(device: torch.device) -> Loops:
        asked.append(device)
        raise AccullmError("the CUDA kernels round otherwise than the CPU: descend: 3 of 26880 codes", str(device))

    monkeypatch.setattr(module, "checked_loops", refuse)
    check_device(on("cuda"), only_validates=True)
    check_device(on("cpu"), only_validates=False)
    with pytest.raises(AccullmError, match="round otherwise than the CPU"):
        check_device(on("cuda"), only_validates=False)
    assert asked == [GPU]


def test_on_a_cpu_the_compiled_loops_round() -> None:
    assert compute_of(on("cpu")).loops is COMPILED


def test_kernels_read_one_format() -> None:
    config = on("cpu", validation__speed=True)
    check_format(config, "accullm")
    with pytest.raises(AccullmError) as refusal:
        check_format(config, "compressed-tensors")
    assert refusal.value.line() == (
        "--speed: the kernels multiply by the format accullm, not by compressed-tensors; leave it out"
    )


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_without_speed_any_format_is_measured_anywhere(device: str) -> None:
    check_format(on(device), "compressed-tensors")


@pytest.mark.parametrize(
    ("stored", "no_bfloat16", "dtype"),
    [
        ("bfloat16", None, torch.bfloat16),
        ("bfloat16", "compute capability 7.5", torch.float16),
        ("float16", None, torch.float16),
        ("float32", None, torch.float16),
    ],
)
def test_gpus_compute_in_16_bits(
    stored: str, no_bfloat16: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, 1, no_bfloat16)
    assert compute_dtype(GPU, {"dtype": stored}) == compute_dtype(GPU, {"torch_dtype": stored}) == dtype
    assert compute_dtype(torch.device("cpu"), {"dtype": stored}) == torch.float32


def test_a_result_of_a_gpu_is_not_taken_for_one_of_the_cpu_or_of_another_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU of kind {device.index}")
    kinds = [
        Compute(device).inputs()["machine:device"] for device in (torch.device("cpu"), GPU, torch.device("cuda", 1))
    ]
    assert kinds == ["cpu", "GPU of kind 0", "GPU of kind 1"]
    assert Compute() == Compute(torch.device("cpu"))
    assert describe_device(GPU) == "GPU of kind 0"


def test_a_cpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    for threads, words in ((1, "1 thread"), (2, "2 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert describe_device(torch.device("cpu")) == f"CPU with AVX2, {words}"
