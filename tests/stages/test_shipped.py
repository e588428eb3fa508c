"""What validate measured is what users load, or the run ends and says so."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import accullm_cli.hf
from accullm_cli.cli import main
from accullm_cli.errors import NotSoError
from accullm_cli.pipeline import convert, validate_artifact
from accullm_cli.places import run_path
from accullm_cli.run import RunDirectory
from accullm_cli.stages import shipped
from tests.streaming import fast_config
from tests.tiny import edit_config, make_checkpoint

COMPRESSED = {"export__format": "[compressed-tensors]", "plan__outliers": 0}
HINT = "do not use it; report it with the model's config.json"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama") / "model")


def refusal(source: Path, out: Path) -> str:
    """Of a conversion that ends with exit code 3, its figures on no record."""
    config = fast_config(source, out)
    with pytest.raises(NotSoError) as caught:
        convert(config)
    assert caught.value.exit_code == 3
    assert "validate accullm" not in RunDirectory(run_path(config)).stages()
    assert not (run_path(config) / "report").exists()
    return caught.value.line()


@pytest.mark.parametrize(
    ("name", "settings", "kept"),
    [
        ("llama-tied", {"plan__embedding_bits": 4}, ()),
        ("gpt2", {}, ("kept as stored: transformer.wpe (embedding; 16,384 weights)",)),
        ("mixtral", {}, ("kept as stored: model.layers.*.mlp.gate (router; 512 weights)",)),
        ("gemma3", COMPRESSED, ()),
        ("llama", {**COMPRESSED, "plan__bits": 8, "plan__symmetric": True}, ()),
    ],
)
def test_what_users_load_is_compared_and_agrees(
    name: str, settings: dict[str, object], kept: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []
    compare = shipped.largest_difference

    def watch(ours: torch.Tensor, other: torch.Tensor):
        compared.append(compare(ours, other))
        return compared[-1]

    monkeypatch.setattr(shipped, "largest_difference", watch)
    report = convert(fast_config(make_checkpoint(name, tmp_path / "model"), tmp_path / "out", **settings))
    assert report.records == kept
    # By dequantized and by packed weights. With zero points, compressed-tensors' reader rounds weights to bfloat16, and
    # so they were when they were measured.
    assert len(compared) == 2
    assert max(difference.nats for difference in compared) < 5e-5


def test_frequencies_that_depend_on_the_windows_length_are_no_difference(tmp_path: Path) -> None:
    """Phi-3's longrope: windows of 48 tokens take the long factors, 32 tokens the short ones."""
    source = make_checkpoint("phi3", tmp_path / "model")
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 40}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    edit_config(source, rope_parameters=rope, original_max_position_embeddings=40)
    assert convert(fast_config(source, tmp_path / "out")).records == ()


def test_modeling_code_that_fails_on_the_modules_ends_the_run(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object, x: torch.Tensor) -> torch.Tensor:
        raise AttributeError("'HybridLinear' object has no attribute 'width'")

    monkeypatch.setattr(accullm_cli.hf.HybridLinear, "forward", fail)
    assert refusal(llama, tmp_path / "out") == (
        f"{tmp_path}/out: transformers cannot run the artifact (AttributeError: 'HybridLinear' object has no attribute "
        f"'width'); {HINT}"
    )


def test_a_machine_without_memory_says_nothing_about_the_artifact(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: ...")

    monkeypatch.setattr(accullm_cli.hf.HybridLinear, "forward", fail)
    with pytest.raises(RuntimeError, match="allocate memory"):
        convert(fast_config(llama, tmp_path / "out"))


@pytest.mark.parametrize(("factor", "nats"), [(1.01, r"[\d.e-]+"), (float("nan"), "inf")])
def test_modules_that_compute_something_else_end_the_run(
    factor: float, nats: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = accullm_cli.hf.HybridLinear.forward
    monkeypatch.setattr(accullm_cli.hf.HybridLinear, "forward", lambda self, x: factor * forward(self, x))
    line = refusal(llama, tmp_path / "out")
    assert re.fullmatch(
        rf"{tmp_path}/out: the artifact as users load it is not what was measured: of 32 tokens, log-probabilities "
        rf"differ by up to {nats} nats for token \d+ at position \d+; {HINT}",
        line,
    )


def test_products_with_packed_weights_are_compared_too(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = accullm_cli.hf.HybridLinear.forward

    def wrong_for_few(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x) * (1.01 if x.shape[-2] <= 16 else 1)

    monkeypatch.setattr(accullm_cli.hf.HybridLinear, "forward", wrong_for_few)
    assert "is not what was measured: of 16 tokens" in refusal(llama, tmp_path / "out")


def test_a_validation_on_its_own_ends_so_too(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    convert(fast_config(llama, tmp_path / "out"))
    monkeypatch.setattr(accullm_cli.hf.HybridLinear, "forward", lambda self, x: x @ x.new_zeros(1))
    arguments = ["validate", str(tmp_path / "out"), "--original", str(llama), "--seq-len", "48", "--threads", "1"]
    arguments += ["--validation-text", str(llama.with_name("validation.txt")), "--validation-windows", "2"]
    arguments += ["--other-text", "none"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--quiet"])
    assert ended.value.code == 3
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {tmp_path}/out: transformers cannot run the artifact (RuntimeError: ")
    assert captured.err.endswith(f"; {HINT}\n")
    assert captured.err.count("\n") == 1


def test_what_cannot_be_loaded_here_is_on_record(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "available_memory", lambda: 100_000)
    report = convert(fast_config(llama, tmp_path / "out"))
    (record,) = report.records
    assert re.fullmatch(
        r"the accullm artifact was not run as users load it: it takes \d+ kB of memory, of which 100 kB are free",
        record,
    )


def test_without_the_package_a_record_says_so(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    absent = {"compressed_tensors"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else find(name, *rest))
    report = convert(fast_config(llama, tmp_path / "out", **COMPRESSED))
    assert report.records == (
        "the compressed-tensors artifact was not run as users load it: it needs the package compressed-tensors",
    )
    validate_artifact(tmp_path / "out", fast_config(llama, tmp_path / "out", machine__run=tmp_path / "again"))
