"""calibrate: statistics, damage and reference are those of transformers' own forward pass in float64."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from accullm_cli.config import Config
from accullm_cli.model.blocks import Decoder
from accullm_cli.progress import Event
from accullm_cli.quant.stats import InputStats
from accullm_cli.run import Reason
from accullm_cli.stages import streams
from accullm_cli.stages.calibrate import (
    DAMAGE_GROUP_SIZES,
    calibrate,
    load_block_stats,
    make_reference,
    validation_text,
)
from accullm_cli.stages.precision import products
from tests.stages.references import inputs_of, rounding_damage, weight_of
from tests.streaming import WORDS, opened, reference_model, short_config
from tests.tiny import make_checkpoint, make_tokenizer

GROUPS = {
    "llama": [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ],
    "gpt2": [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
}
PREFIX = {"llama": "model.layers", "gpt2": "transformer.h"}


def spiky_checkpoint(name: str, directory: Path) -> Path:
    """Some features of the first norm of each block are large, as in real models."""
    make_checkpoint(name, directory)
    tensors = load_file(directory / "model.safetensors")
    for key, value in tensors.items():
        if key.endswith(("input_layernorm.weight", "ln_1.weight")):
            value[[3, 40]] *= 9
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def calibrated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Architecture, source and run directory."""
    place = tmp_path_factory.mktemp(request.param)
    source = spiky_checkpoint(request.param, place / "model")
    with opened(short_config(source, place / "out")) as job:
        calibrate(job)
    return request.param, source, place / "out.run"


def stats_of(run: Path, index: int) -> list[InputStats]:
    return load_block_stats(run / "calibrate" / f"block-{index:05d}.safetensors")


# -- statistics --------------------------------------------------------------------------------------------


def test_there_is_one_entry_for_each_distinct_input(calibrated: tuple[str, Path, Path]) -> None:
    name, _, run = calibrated
    for index in range(2):
        expected = [tuple(f"{PREFIX[name]}.{index}.{linear}" for linear in group) for group in GROUPS[name]]
        assert [entry.linears for entry in stats_of(run, index)] == expected


def test_statistics_are_those_of_a_float64_pass(calibrated: tuple[str, Path, Path]) -> None:
    _, source, run = calibrated
    rows = inputs_of(reference_model(source), load_file(run / "tokens.safetensors")["calibration"])
    beyond = 0.0
    for index in range(2):
        for entry in stats_of(run, index):
            x = rows[entry.linears[0]]
            assert entry.tokens == len(x) == 6 * 48
            np.testing.assert_allclose(entry.second_moment, x.square().mean(0), rtol=1e-5)
            np.testing.assert_allclose(entry.absolute_maximum, x.abs().amax(0), rtol=1e-5)
            np.testing.assert_allclose(entry.share_beyond_threshold, (x.abs() > 6).double().mean(0), atol=1e-6)
            beyond += float(entry.share_beyond_threshold.sum())
    assert beyond > 0.1  # the threshold is tried


@pytest.mark.parametrize(("name", "gradients", "expected"), [("llama", 0, 2), ("llama", 3, 3), ("mixtral", 0, 6)])
def test_some_of_the_windows_are_enough_for_statistics_but_for_experts(
    name: str, gradients: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accullm_cli.stages.calibrate.STATISTICS_WINDOWS", 2)
    source = make_checkpoint(name, tmp_path / "model")
    config = short_config(source, tmp_path / "out", calibration__gradient_samples=gradients)
    with opened(config) as job:
        calibrate(job)
    run = tmp_path / "out.run"
    ids = load_file(run / "tokens.safetensors")["calibration"]
    assert len(ids) == 6  # quantize reads them all
    first = stats_of(run, 0)[0]
    assert first.tokens == expected * 48
    x = inputs_of(reference_model(source), ids[:expected])[first.linears[0]]
    np.testing.assert_allclose(first.second_moment, x.square().mean(0), rtol=1e-5)


def test_damage_is_what_rounding_to_nearest_does_to_each_column(calibrated: tuple[str, Path, Path]) -> None:
    name, source, run = calibrated
    model = reference_model(source)
    for entry in stats_of(run, 1):
        for linear in entry.linears:
            assert entry.damage[linear].keys() == set(DAMAGE_GROUP_SIZES)
    for linear in (f"{PREFIX[name]}.1.{GROUPS[name][group][0]}" for group in (0, 3)):
        (entry,) = (entry for entry in stats_of(run, 1) if linear in entry.linears)
        for size in DAMAGE_GROUP_SIZES:
            expected = rounding_damage(weight_of(model, linear), size)
            np.testing.assert_allclose(entry.damage[linear][size], expected, rtol=1e-3)


def test_experts_are_measured_on_the_tokens_that_reach_them(tmp_path: Path) -> None:
    source = make_checkpoint("mixtral", tmp_path / "model")
    with opened(short_config(source, tmp_path / "out")) as job:
        calibrate(job)
    ids = load_file(tmp_path / "out.run" / "tokens.safetensors")["calibration"]
    model = reference_model(source)
    moe = model.model.layers[1].mlp
    seen: dict[str, torch.Tensor] = {}
    moe.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].reshape(-1, 64).double()))
    moe.gate.register_forward_hook(lambda _, args, result: seen.update(chosen=result[2]))
    model(ids)
    entries = {entry.linears[0]: entry for entry in stats_of(tmp_path / "out.run", 1)}
    for expert in range(4):
        x = seen["x"][(seen["chosen"] == expert).any(-1)]
        entry = entries[f"model.layers.1.mlp.experts.gate_up_proj.{expert}"]
        assert 0 < entry.tokens == len(x) < 288
        np.testing.assert_allclose(entry.second_moment, x.square().mean(0), rtol=1e-5)


def test_experts_that_no_token_reaches_are_named(tmp_path: Path) -> None:
    source = make_checkpoint("mixtral", tmp_path / "model")
    text = tmp_path / "a.txt"
    text.write_text("a" * 100)
    with opened(short_config(source, tmp_path / "out", calibration__text=text, calibration__samples=1)) as job:
        outcome = calibrate(job)
    reached = {index: [entry.tokens > 0 for entry in stats_of(tmp_path / "out.run", index)] for index in range(2)}
    assert False in reached[0]
    for index in range(2):
        for entry in stats_of(tmp_path / "out.run", index):
            told = any(
                entry.linears[0] in sentence.split(" ") or f"{entry.linears[0]}," in sentence.split(" ")
                for sentence in outcome.record.records
            )
            assert told == (entry.tokens == 0)
            assert bool(torch.isfinite(entry.second_moment).all())


# -- tokens and reference ----------------------------------------------------------------------------------


def test_tokens_are_windows_of_the_texts(calibrated: tuple[str, Path, Path]) -> None:
    _, source, run = calibrated
    ids = load_file(run / "tokens.safetensors")
    assert {name: (tuple(value.shape), value.dtype) for name, value in ids.items()} == {
        "calibration": ((6, 48), torch.int64),
        "validation": ((3, 48), torch.int64),
    }
    tokenizer = make_tokenizer()
    for name, windows in ids.items():
        text = source.with_name(f"{name}.txt").read_text()
        assert len({tuple(window.tolist()) for window in windows}) == len(windows)
        for window in windows:
            written = tokenizer.decode(window).split("</s>")[0]
            assert set(written.split()[1:-1]) <= set(WORDS)
            assert written in text
    with opened(short_config(source, run.with_name("out"))) as job:
        assert str(source.with_name("validation.txt")) in validation_text(job)


def test_the_reference_is_the_last_blocks_output(calibrated: tuple[str, Path, Path]) -> None:
    name, source, run = calibrated
    model = reference_model(source)
    found: dict[str, torch.Tensor] = {}

    def note(module: nn.Module, args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        found["hidden"] = output[0] if isinstance(output, tuple) else output

    model.get_submodule(f"{PREFIX[name]}.1").register_forward_hook(note)
    ids = load_file(run / "tokens.safetensors")["validation"]
    with products("float32"):
        logits = model(ids).logits.double()
    reference = load_file(run / "reference.safetensors")
    assert torch.equal(reference["hidden"], found["hidden"])
    expected = -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert reference["negative_log_likelihood"].shape == (3, 47)
    np.testing.assert_allclose(reference["negative_log_likelihood"], expected, atol=1e-5)


def test_the_noise_floor_rounds_to_bfloat16_behind_the_embedding_and_every_block(
    calibrated: tuple[str, Path, Path],
) -> None:
    name, source, run = calibrated
    model = reference_model(source)
    found: dict[str, torch.Tensor] = {}

    def round_input(module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]):  # type: ignore[no-untyped-def]
        if args:
            return (args[0].bfloat16().float(), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"].bfloat16().float()}

    def note(module: nn.Module, args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        found["hidden"] = (output[0] if isinstance(output, tuple) else output).bfloat16().float()

    for index in range(2):
        block = model.get_submodule(f"{PREFIX[name]}.{index}")
        block.register_forward_pre_hook(round_input, with_kwargs=True)
        block.register_forward_hook(note)
    with products("float32"):
        model(load_file(run / "tokens.safetensors")["validation"])
    reference = load_file(run / "reference.safetensors")
    assert torch.equal(reference["floor"], found["hidden"])
    assert not torch.equal(reference["floor"], reference["hidden"])


def test_the_reference_alone_is_the_same_one(tmp_path: Path, calibrated: tuple[str, Path, Path]) -> None:
    _, source, run = calibrated
    with opened(short_config(source, tmp_path / "out")) as job:
        outcome = make_reference(job)
    assert outcome.record.outputs.keys() == {"tokens.safetensors", "reference.safetensors"}
    expected, found = load_file(run / "reference.safetensors"), load_file(tmp_path / "out.run/reference.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    tokens = load_file(tmp_path / "out.run/tokens.safetensors")
    assert torch.equal(tokens["validation"], load_file(run / "tokens.safetensors")["validation"])
    assert not (tmp_path / "out.run/calibrate").exists()


# -- running again -----------------------------------------------------------------------------------------


def digests(run: Path) -> dict[str, str]:
    paths = [*(run / "calibrate").iterdir(), run / "tokens.safetensors", run / "reference.safetensors"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


class InterruptedRunError(Exception):
    pass


def stop_after(label: str):  # type: ignore[no-untyped-def]
    def progress(event: Event) -> None:
        if event.label == label:
            raise InterruptedRunError

    return progress


@pytest.mark.parametrize("seconds", [0.0, 1e9], ids=["streams stored", "streams recomputed"])
def test_resumed_behind_a_block_it_leaves_the_same_files(
    seconds: float, calibrated: tuple[str, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, source, run = calibrated
    monkeypatch.setattr(streams, "SECONDS_BETWEEN_STORES", seconds)
    config = short_config(source, tmp_path / "out")
    with pytest.raises(InterruptedRunError), opened(config, stop_after("block 1/2")) as job:
        calibrate(job)
    assert (tmp_path / "out.run/calibrate/streams.safetensors").exists() == (seconds == 0.0)
    calls: list[int] = []
    original = Decoder.run
    monkeypatch.setattr(Decoder, "run", lambda self, index, *rest: calls.append(index) or original(self, index, *rest))
    reasons: list[tuple[str, str]] = []
    with opened(config, lambda event: reasons.append((event.label, str(event.reason)))) as job:
        calibrate(job)
    assert digests(tmp_path / "out.run") == digests(run)
    # The first block is not measured again; with its streams stored it is not even run again.
    assert calls.count(0) == (0 if seconds == 0.0 else 3)
    if seconds:
        assert ("block 1/2", "up to date") in reasons
    assert ("block 2/2", "new") in reasons


def again(config: Config) -> Reason:
    with opened(config) as job:
        return calibrate(job).reason


def test_it_runs_again_for_what_it_depends_on_and_nothing_else(tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")

    def config(**settings: object) -> Config:
        return short_config(source, tmp_path / "out", **settings)

    assert again(config()) == Reason("new")
    unrelated = {"plan__bits": 3, "rounding__damping": 0.5, "validation__require": "[mean_kl<=1]"}
    assert again(config(**unrelated)) == Reason("up to date")
    assert again(config(calibration__samples=5)) == Reason("config changed", "calibration.samples")
    assert again(config(calibration__samples=5, machine__seed=1)) == Reason("config changed", "machine.seed")


def test_it_runs_again_when_a_text_has_other_content(tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    text = tmp_path / "own.txt"
    text.write_text("one two three " * 60)
    config = short_config(source, tmp_path / "out", calibration__text=text)
    again(config)
    text.write_text("four five six " * 60)
    assert again(config) == Reason("input changed", f"text {text}")
    ids = load_file(tmp_path / "out.run/tokens.safetensors")["calibration"]
    assert "four" in make_tokenizer().decode(ids[0])
