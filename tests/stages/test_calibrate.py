"""calibrate: statistics, damage and reference are those of transformers' own forward pass in float64."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from accullm_cli.config import Config
from accullm_cli.model import self_text
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.source import ModelSource
from accullm_cli.model.text import Windows
from accullm_cli.progress import Event, Progress, silent
from accullm_cli.quant.stats import InputStats
from accullm_cli.run import Reason, RunDirectory
from accullm_cli.stages import streams
from accullm_cli.stages.calibrate import DAMAGE_GROUP_SIZES, load_block_stats
from accullm_cli.stages.job import Job
from accullm_cli.stages.reference import described
from accullm_cli.stages.texts import CALIBRATION, VALIDATION, calibration_inputs
from tests.stages.references import inputs_of, rounding_damage, weight_of
from tests.streaming import WORDS, opened, reference_model, run_to, short_config, write_text
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
        run_to(job, "calibrate")
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
        run_to(job, "calibrate")
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
        run_to(job, "calibrate")
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
        outcome = run_to(job, "calibrate")["calibrate"]
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


# -- tokens ------------------------------------------------------------------------------------------------


def test_tokens_are_windows_of_the_texts(calibrated: tuple[str, Path, Path]) -> None:
    _, source, run = calibrated
    ids = load_file(run / "tokens.safetensors")
    read = {"calibration": ids["calibration"], "validation": load_file(run / "reference.safetensors")["ids"]}
    assert ids.keys() == read.keys()
    assert torch.equal(ids["validation"], read["validation"])  # for whoever looks for both there
    assert {name: (tuple(value.shape), value.dtype) for name, value in read.items()} == {
        "calibration": ((6, 48), torch.int64),
        "validation": ((3, 48), torch.int64),
    }
    tokenizer = make_tokenizer()
    for name, windows in read.items():
        text = source.with_name(f"{name}.txt").read_text()
        assert len({tuple(window.tolist()) for window in windows}) == len(windows)
        for window in windows:
            written = tokenizer.decode(window).split("</s>")[0]
            assert set(written.split()[1:-1]) <= set(WORDS)
            assert written in text
    with opened(short_config(source, run.with_name("out"))) as job:
        assert str(source.with_name("validation.txt")) in described(job, VALIDATION)


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
        run_to(job, "calibrate")
    assert (tmp_path / "out.run/calibrate/streams.safetensors").exists() == (seconds == 0.0)
    calls: list[int] = []
    original = Decoder.run
    monkeypatch.setattr(Decoder, "run", lambda self, index, *rest: calls.append(index) or original(self, index, *rest))
    reasons: list[tuple[str, str]] = []
    with opened(config, lambda event: reasons.append((event.label, str(event.reason)))) as job:
        run_to(job, "calibrate")
    assert digests(tmp_path / "out.run") == digests(run)
    # The first block is not measured again; with its streams stored it is not even run again.
    assert calls.count(0) == (0 if seconds == 0.0 else 3)
    if seconds:
        assert ("block 1/2", "up to date") in reasons
    assert ("block 2/2", "new") in reasons


def again(config: Config) -> Reason:
    with opened(config) as job:
        return run_to(job, "calibrate")["calibrate"].reason


def test_it_runs_again_for_what_it_depends_on_and_nothing_else(tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")

    def config(**settings: object) -> Config:
        return short_config(source, tmp_path / "out", **settings)

    assert again(config()) == Reason("new")
    unrelated = {
        "plan__bits": 3,
        "rounding__damping": 0.5,
        "validation__require": "[mean_kl<=1]",
        "validation__windows": 2,
        "validation__text": write_text(tmp_path / "another.txt", 5),
        "validation__other_text": write_text(tmp_path / "letters.txt", 6),
    }
    assert again(config(**unrelated)) == Reason("up to date")
    assert again(config(calibration__samples=5)) == Reason("input changed", "calibration tokens")
    assert again(config(calibration__samples=5, machine__seed=1)) == Reason("input changed", "calibration tokens")
    with_gradients = {"calibration__gradient_samples": 2}
    assert again(config(**with_gradients)) == Reason("config changed", "calibration.gradient_samples")


def test_what_counts_of_a_text_are_its_tokens(tmp_path: Path) -> None:
    """Neither its name, nor how windows are asked for; but how they are cut does, for that is what a model reads."""
    source = make_checkpoint("llama", tmp_path / "model")
    text = tmp_path / "own.txt"
    text.write_text("one two three " * 60)  # 840 tokens

    def config(**settings: object) -> Config:
        return short_config(
            source, tmp_path / "out", **{"calibration__text": text, "calibration__samples": 99} | settings
        )

    again(config())
    (tmp_path / "copy.txt").write_text(text.read_text())
    assert again(config(calibration__text=tmp_path / "copy.txt", calibration__samples=98)) == Reason("up to date")
    assert again(config(calibration__seq_len=96)) == Reason("input changed", "calibration tokens")


def test_the_same_tokens_cut_otherwise_are_another_text(tmp_path: Path) -> None:
    """Without a token at their beginning, one window of 64 is two of 32."""
    windows = [Windows(torch.arange(64).view(shape), "", "3f") for shape in ((1, 64), (2, 32))]
    jobs = [
        Job(Config(model="m"), RunDirectory(tmp_path), None, lambda event: None, windows={CALIBRATION: cut})  # type: ignore[arg-type]
        for cut in windows
    ]
    assert [calibration_inputs(job) for job in jobs] == [
        {"input:calibration tokens": "1 x 64, 3f"},
        {"input:calibration tokens": "2 x 32, 3f"},
    ]


@pytest.mark.parametrize("home", [False, True])
def test_it_runs_again_when_a_text_has_other_content(
    home: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    source = make_checkpoint("llama", tmp_path / "model")
    text = tmp_path / "own.txt"
    text.write_text("one two three " * 60)
    config = short_config(source, tmp_path / "out", calibration__text="~/own.txt" if home else text)
    again(config)
    text.write_text("four five six " * 60)
    assert again(config) == Reason("input changed", "calibration tokens")
    ids = load_file(tmp_path / "out.run/tokens.safetensors")["calibration"]
    assert "four" in make_tokenizer().decode(ids[0])


# -- texts that cannot be had again at will ----------------------------------------------------------------


def test_a_data_set_on_the_hub_is_read_once_and_again_when_asked_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    rows, reads = ["one two three " * 60], []

    def read(text: str, characters: int, seed: int) -> list[str]:
        reads.append(text)
        return rows

    monkeypatch.setattr("accullm_cli.model.text.hub_rows", read)
    config = short_config(source, tmp_path / "out", calibration__text="hub:some/texts")
    assert again(config) == Reason("new")
    assert again(config) == Reason("up to date")
    rows[0] = "four five six " * 60
    assert again(config) == Reason("up to date")
    assert reads == ["hub:some/texts"]
    assert again(short_config(source, tmp_path / "out", calibration__text="hub:some/texts", machine__seed=1)).runs
    with opened(config, fresh=True) as job:
        assert run_to(job, "calibrate")["calibrate"].reason == Reason("forced")
    assert len(reads) == 3
    ids = load_file(tmp_path / "out.run/tokens.safetensors")["calibration"]
    assert "four" in make_tokenizer().decode(ids[0])


def test_text_that_the_model_writes_is_named_by_what_it_depends_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint("llama", tmp_path / "model")

    def config(**settings: object) -> Config:
        return short_config(source, tmp_path / "out", calibration__text="self", **settings)

    with pytest.raises(InterruptedRunError), opened(config(), stop_after("block 1/2")) as job:
        run_to(job, "calibrate")
    written = load_file(tmp_path / "out.run/tokens.safetensors")["calibration"]
    labels: list[str] = []
    with opened(config(), lambda event: labels.append(event.label)) as job:
        run_to(job, "calibrate")
    assert not any(label.startswith("text ") for label in labels)  # what was written before is read
    assert torch.equal(load_file(tmp_path / "out.run/tokens.safetensors")["calibration"], written)
    assert again(config()) == Reason("up to date")
    assert again(config(validation__windows=2)) == Reason("up to date")
    assert again(config(machine__seed=1)) == Reason("config changed", "machine.seed")
    assert not torch.equal(load_file(tmp_path / "out.run/tokens.safetensors")["calibration"], written)
    assert again(config(calibration__samples=5, machine__seed=1)) == Reason("config changed", "calibration.samples")


def test_a_mixture_is_written_once_and_again_where_a_part_of_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    (tmp_path / "letters.txt").write_text("one two three " * 200)
    monkeypatch.setattr("accullm_cli.model.self_text.WINDOWS_PER_BATCH", 1)
    config = short_config(source, tmp_path / "out", calibration__text=f"{tmp_path}/letters.txt,self=50%")

    def texts(progress: Progress = silent) -> Reason:
        with opened(config, progress) as job:
            return run_to(job, "calibrate")["calibrate"].reason

    # What was written of it before an interruption is read, and the rest is written as it would have been.
    with pytest.raises(InterruptedRunError):
        texts(stop_after("text 1/3"))
    labels: list[str] = []
    monkeypatch.setattr("accullm_cli.model.self_text._load", _counted(labels, "read"))
    assert texts() == Reason("new")
    ids = load_file(tmp_path / "out.run/tokens.safetensors")["calibration"]
    assert ids.shape == (6, config.calibration.seq_len)
    assert len(list((tmp_path / "out.run/calibrate").glob("self-*.safetensors"))) == 3
    assert labels == ["read"]
    assert texts() == Reason("up to date")
    with opened(config, fresh=True) as job:
        run_to(job, "calibrate")
    assert torch.equal(load_file(tmp_path / "out.run/tokens.safetensors")["calibration"], ids)
    assert labels == ["read", "read"]
    # Another file under the same name; what the model wrote stays.
    (tmp_path / "letters.txt").write_text("four five six " * 200)
    assert texts().runs
    changed = load_file(tmp_path / "out.run/tokens.safetensors")["calibration"]
    assert sum(row in changed.tolist() for row in ids.tolist()) == 3
    assert labels == ["read", "read"]


def _counted(labels: list[str], label: str) -> Callable[[ModelSource], object]:
    """The function that reads a model, with a note of each call."""
    read = self_text._load

    def load(source: ModelSource) -> object:
        labels.append(label)
        return read(source)

    return load
