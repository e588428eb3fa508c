"""quantize --device cuda, as if there were a GPU: the kernels run on the CPU, on tensors that stay there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from accullm_cli.kernels.launch import Launch
from accullm_cli.kernels.rounding import cuda_loops
from accullm_cli.kernels.rounding_check import checked_loops
from accullm_cli.quant.loops import Loops
from accullm_cli.stages import compute as module
from tests.cuda_emulation import emulate, needs_compiler
from tests.streaming import opened, run_to, short_config
from tests.tiny import make_checkpoint

pytestmark = needs_compiler
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are launched on the GPU, which is none."""
    names: list[str] = []

    def launch(what: Launch, device: torch.device) -> None:
        names.append(what.kernel)
        emulate(what)

    def loops(device: torch.device) -> Loops:
        return cuda_loops(CPU, launch, 99 * 1024) if device == GPU else checked_loops(device)

    monkeypatch.setattr(module, "checked_loops", loops)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    return names


def shards(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "quantize").glob("*.safetensors")}


@pytest.mark.parametrize(
    ("settings", "kernels"),
    [
        ({}, {"feedback_round", "descend"}),
        ({"rounding__method": "nearest"}, set()),
        ({"rounding__method": "stochastic"}, {"feedback_round"}),
        # The first rounding alone, by which scales are fitted: where rows feed each other the CPU rounds.
        ({"calibration__gradient_samples": 2}, {"feedback_round"}),
    ],
)
def test_the_shards_come_from_the_kernels(
    settings: dict[str, object], kernels: set[str], launched: list[str], tmp_path: Path
) -> None:
    """The products around the kernels being the CPU's, so are all bytes; but they count as made by another device."""
    source = make_checkpoint("llama", tmp_path / "model")
    with opened(short_config(source, tmp_path / "out", **settings)) as job:
        run_to(job, "quantize")
    assert not launched
    before = shards(tmp_path / "out.run")
    with opened(short_config(source, tmp_path / "out", machine__device="cuda", **settings)) as job:
        outcome = run_to(job, "quantize")
    assert set(launched) == kernels
    assert shards(tmp_path / "out.run") == before
    reasons = {name: str(done.reason) for name, done in outcome.items()}
    assert reasons["calibrate"] == reasons["profile"] == "up to date"
    assert reasons["quantize"] == "machine changed (device)"


def test_the_head_is_rounded_there_too(launched: list[str], tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    counts = []
    for bits in (16, 8):
        launched.clear()
        with opened(
            short_config(source, tmp_path / f"{bits}", machine__device="cuda", plan__embedding_bits=bits)
        ) as job:
            run_to(job, "quantize")
        counts.append(len(launched))
    assert counts[1] > counts[0]
