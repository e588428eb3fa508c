"""Tokens per second: what is timed, of which models, and what else is told of it."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from accullm_cli.kernels import packed
from accullm_cli.stages import speed
from accullm_cli.stages.job import Job
from accullm_cli.stages.speed import load_speed, time_model
from accullm_cli.stages.whole_model import engines, load_artifact, load_original
from tests.streaming import fast_config, opened, reference_model, run_alone, run_to
from tests.tiny import make_checkpoint

CPU = torch.device("cpu")


class Clock:
    """A model that takes as long as it is told to; `calls` are the ids and caches that it was given."""

    def __init__(self, seconds: list[float]) -> None:
        self.now = 0.0
        self.seconds: Iterator[float] = iter(seconds)
        self.calls: list[tuple[list[int], Any, int | None]] = []

    def forward(self, ids: torch.Tensor, use_cache: bool, cache: Any = None, logits_to_keep: int | None = None) -> Any:
        assert use_cache
        self.calls.append((ids[0].tolist(), cache, logits_to_keep))
        self.now += next(self.seconds)
        return types.SimpleNamespace(cache=f"cache {len(self.calls)}")

    __call__ = forward


def test_medians_leave_out_the_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of one prompt and two tokens; the first, which compiles, is slow, and one of the others has an outlier."""
    model = Clock([99, 99, 99, 2.0, 0.1, 0.3, 4.0, 0.5, 0.5, 5.0, 90, 90])
    monkeypatch.setattr(speed, "time", types.SimpleNamespace(perf_counter=lambda: model.now))
    found = time_model(model, torch.tensor([[5, 6, 7, 8]]), torch.tensor([[1, 2]]))  # type: ignore[arg-type]
    assert found.prefill == pytest.approx(4 / 4.0)
    assert found.decode == pytest.approx(2 / 1.0)
    assert model.calls[:3] == [([5, 6, 7, 8], None, 1), ([1], "cache 1", None), ([2], "cache 1", None)]
    assert model.calls[3:6] == [([5, 6, 7, 8], None, 1), ([1], "cache 4", None), ([2], "cache 4", None)]


def test_a_model_that_gives_all_logits_and_calls_its_cache_otherwise_is_timed() -> None:
    class Older:
        def forward(self, ids: torch.Tensor, use_cache: bool, past_key_values: Any = None) -> Any:
            return types.SimpleNamespace(past_key_values=0)

        __call__ = forward

    assert time_model(Older(), torch.tensor([[5]]), torch.tensor([[1]])).decode > 0  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp(request.param)
    source = make_checkpoint(request.param, place / "model")
    with opened(fast_config(source, place / "out", plan__group_size=32)) as job:
        run_to(job, "export", "reference")
    return source, place / "out"


def measured(job: Job, out: Path) -> str:
    return str(run_alone(job, speed.speed("accullm", out)).reason)


def test_both_models_are_timed_and_the_engines_named(exported: tuple[Path, Path]) -> None:
    source, out = exported
    linears = 14 if "llama" in str(out) else 8
    with opened(fast_config(source, out)) as job:
        assert measured(job, out) == "new"
        assert measured(job, out) == "up to date"
        found = load_speed(job)
    assert (found.dtype, found.prompt_tokens, found.decoded_tokens) == ("float32", 48, 32)
    for throughput in (found.original, found.artifact):
        assert throughput.prefill > 0
        assert throughput.decode > 0
    assert found.prefill_engine == f"torch: dequantize, then multiply ({linears} linears)"
    assert found.decode_engine == f"CPU: packed 4-bit ({linears} linears)"


def test_a_prompt_leaves_positions_for_what_follows(exported: tuple[Path, Path]) -> None:
    source, out = exported
    with opened(fast_config(source, out)) as job:
        object.__setattr__(job.source, "config", {"max_position_embeddings": 50})
        prompt, following = speed._prompt_and_next(job)
    assert (prompt.shape, following.shape) == ((1, 18), (1, 32))


@torch.no_grad()
def test_what_is_timed_are_the_models_themselves(exported: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = exported
    ids = torch.arange(40)[None]
    monkeypatch.setattr(packed, "PACKED_TOKENS", 0)
    with opened(fast_config(source, out)) as job:
        original = load_original(job, CPU, torch.float32)
    torch.testing.assert_close(original(ids).logits, reference_model(source)(ids).logits, rtol=0, atol=1e-5)
    artifact = load_artifact(out, CPU, torch.float32)
    torch.testing.assert_close(artifact(ids).logits, reference_model(out)(ids).logits, rtol=0, atol=1e-5)
    assert float((artifact(ids).logits - original(ids).logits).abs().max()) > 1e-3
    with opened(fast_config(source, out)) as job:
        half = load_original(job, CPU, torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half(ids).logits.dtype == torch.bfloat16


def test_experts_and_heads_count_as_linears(tmp_path: Path) -> None:
    source = make_checkpoint("mixtral", tmp_path / "model")
    with opened(fast_config(source, tmp_path / "out", plan__group_size=32, plan__embedding_bits=4)) as job:
        run_to(job, "export", "reference")
    model = load_artifact(tmp_path / "out", CPU, torch.float32)
    found = engines(model, 1)
    experts = sum(len(m) for m in model.modules() if type(m).__name__ == "HybridExperts")
    linears = sum(type(m).__name__ in ("HybridLinear", "TiedHead") for m in model.modules())
    assert experts > 0
    parts = {f"CPU: packed 4-bit ({linears} linears)", f"torch: dequantize, then multiply ({experts} linears)"}
    assert found in (", ".join(parts), ", ".join(reversed(list(parts))))
