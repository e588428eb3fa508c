"""Whole conversions as if there were a GPU, whose tensors refuse to meet others: byte for byte those of the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from accullm_cli.pipeline import convert
from accullm_cli.progress import Event
from tests.llama_cpp import byte_tokenizer
from tests.quant import elsewhere
from tests.stages.gpu import NAME, a_gpu
from tests.streaming import short_config
from tests.tiny import make_checkpoint

GRADIENTS: dict[str, object] = {"calibration__gradient_samples": 2}
PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "mv", "linear")}
# Elements of a block's smallest weight. How a model is built is found out by products of a few numbers.
SMALLEST = 32 * 64
TASKS: dict[str, object] = {"validation__tasks": "arithmetic:easy", "validation__task_items": 2}
FILE: dict[str, object] = {"export__format": "[gguf]", "plan__outliers": "null", "plan__group_size": "null"}
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "feedback": ("llama", {}),
    "an average of bits, embeddings, tasks": ("llama-tied", {**GRADIENTS, **TASKS, "plan__bits": 4.5}),
    "experts at random, embeddings": ("qwen2-moe", {"rounding__method": "stochastic", "plan__embedding_bits": 8}),
    "nearest": ("gpt2", {"rounding__method": "nearest"}),
    "compensating outliers": ("gemma3", {"rounding__outlier_mode": "compensating"}),
    "outliers in an adapter": ("llama", {"export__format": "[compressed-tensors]", "plan__outlier_adapter": True}),
    "blocks of a file": ("llama", {**GRADIENTS, **FILE, "plan__bits": 5.5}),
}


def make_source(kind: str, place: Path, settings: Mapping[str, object]) -> Path:
    """A tiny model, for a file with a tokenizer that its readers have."""
    source = make_checkpoint(kind, place)
    if settings.items() >= FILE.items():
        byte_tokenizer().save_pretrained(source)
    return source


def files_of(place: Path) -> dict[str, bytes]:
    """What a conversion leaves: its artifact and all stages' tensors and answers, but not when it was made."""
    found = {}
    for directory in (place / "out", place / "out.run"):
        for path in directory.rglob("*"):
            if path.suffix in (".safetensors", ".gguf") or "answers" in path.name or path.name.startswith("original"):
                found[str(path.relative_to(place))] = path.read_bytes()
    return found


def keyless(content: bytes) -> bytes:
    """A file of tensors without its header, which holds the key that it was made for."""
    return content[8 + int.from_bytes(content[:8], "little") :]


def without_keys(files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name: keyless(content) if name.endswith(".safetensors") else content for name, content in files.items()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which needs no stand-in")
@pytest.mark.parametrize("case", CASES)
def test_a_conversion_on_a_gpu_leaves_the_bytes_of_the_cpus(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, settings = CASES[case]
    settings = {"machine__precision": "float32", **settings}
    source = make_source(kind, tmp_path / "model", settings)
    convert(short_config(source, tmp_path / "cpu" / "out", machine__device="cpu", **settings))
    told: list[Event] = []
    on_the_cpu: set[str] = set()

    def watched(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if function._schema.name in PRODUCTS and args[0].device.type == "cpu" and args[1].numel() >= SMALLEST:
            on_the_cpu.update(event.stage for event in told[-1:])
        return computed(function, args, kwargs)

    computed = elsewhere.compute
    with a_gpu(monkeypatch), monkeypatch.context() as patched:
        patched.setattr(elsewhere, "compute", watched)
        convert(short_config(source, tmp_path / "gpu" / "out", machine__device="auto", **settings), told.append)
    # What a source or an artifact is held against is plain transformers.
    format = str(settings.get("export__format", "[accullm]")).strip("[]")
    assert on_the_cpu <= {"reading", f"validate {format}"}
    assert f"computes on {NAME}; --device cpu leaves it alone" in [event.label for event in told]
    here, there = (without_keys(files_of(tmp_path / place)) for place in ("cpu", "gpu"))
    assert here.keys() == there.keys()
    assert [name for name in here if here[name] != there[name]] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_a_conversion_on_a_real_gpu_is_as_near_as_the_cpus(case: str, tmp_path: Path) -> None:
    """Its sums differ in their last bits, and so do few of the codes; a second one repeats the first."""
    pytest.importorskip("cupy")
    kind, settings = CASES[case]
    source = make_source(kind, tmp_path / "model", settings)
    reports = {
        place: convert(short_config(source, tmp_path / place / "out", machine__device=device, **settings))
        for place, device in (("cpu", "cpu"), ("gpu", "cuda"), ("again", "cuda"))
    }
    assert reports["gpu"].figure("mean_kl").value == pytest.approx(reports["cpu"].figure("mean_kl").value, rel=0.1)
    first, second = (without_keys(files_of(tmp_path / place)) for place in ("gpu", "again"))
    assert [name for name in first if first[name] != second[name]] == []
