"""quantize --device cuda, as if there were a GPU: the kernels run on the CPU, on tensors that stay there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda_emulation import needs_compiler
from tests.stages.gpu import a_gpu
from tests.streaming import opened, run_to, short_config
from tests.tiny import make_checkpoint

pytestmark = needs_compiler


def shards(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "quantize").glob("*.safetensors")}


@pytest.mark.parametrize(
    ("settings", "kernels"),
    [
        ({}, {"trellis_round", "trellis_descend"}),
        ({"plan__encodings": '["integer"]'}, {"feedback_round", "descend"}),
        ({"rounding__method": "nearest"}, set()),
        ({"rounding__method": "stochastic"}, {"feedback_round"}),
        # The kernel rounds first, by which scales are fitted; then with rows that feed each other.
        ({"calibration__gradient_samples": 2}, {"trellis_round", "trellis_round_fed", "trellis_descend_fed"}),
        ({"calibration__gradient_samples": 2, "plan__encodings": '["integer"]'}, {"feedback_round", "descend"}),
    ],
)
def test_the_shards_come_from_the_kernels(
    settings: dict[str, object], kernels: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The products around the kernels being the CPU's, so are all bytes; but they count as made by another device."""
    source, settings = make_checkpoint("llama", tmp_path / "model"), {"machine__precision": "float32", **settings}
    with opened(short_config(source, tmp_path / "out", machine__device="cpu", **settings)) as job:
        run_to(job, "quantize")
    before = shards(tmp_path / "out.run")
    with a_gpu(monkeypatch) as launched:
        with opened(short_config(source, tmp_path / "out", machine__device="cuda", **settings)) as job:
            outcome = run_to(job, "quantize")
    assert set(launched) == kernels
    assert shards(tmp_path / "out.run") == before
    assert str(outcome["calibrate"].reason) == str(outcome["quantize"].reason) == "machine changed (device)"


def test_the_head_is_rounded_there_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    counts = []
    for bits in (16, 8):
        config = short_config(source, tmp_path / f"{bits}", machine__device="cuda", plan__embedding_bits=bits)
        with a_gpu(monkeypatch) as launched, opened(config) as job:
            run_to(job, "quantize")
        counts.append(len(launched))
    assert counts[1] > counts[0]
