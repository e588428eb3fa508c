"""reference: what the original makes of a text, alone and along with calibrate; it goes on where it was stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from accullm_cli.config import Config
from accullm_cli.model.blocks import Decoder
from accullm_cli.progress import Event
from accullm_cli.run import Reason
from accullm_cli.stages import streams
from accullm_cli.stages.precision import products
from accullm_cli.stages.reference import reference
from accullm_cli.stages.stage import StageOutcome
from accullm_cli.stages.texts import OTHER, SEARCH, VALIDATION, Text
from tests.streaming import opened, reference_model, run_alone, run_to, short_config, write_text
from tests.tiny import make_checkpoint

PREFIX = {"llama": "model.layers", "gpt2": "transformer.h"}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Architecture, source and run directory, where calibrate made every reference that there may be."""
    place = tmp_path_factory.mktemp(request.param)
    source = make_checkpoint(request.param, place / "model")
    with opened(everything(source, place / "out")) as job:
        run_to(job, "calibrate")
    return request.param, source, place / "out.run"


def everything(source: Path, out: Path, **settings: object) -> Config:
    """With all texts."""
    letters = write_text(source.with_name("letters.txt"), 3)
    golden = {"search__golden": True, "calibration__gradient_samples": 0, "validation__require": "[mean_kl<=1]"}
    return short_config(source, out, validation__other_text=letters, **golden, **settings)


def test_the_reference_is_the_last_blocks_output(made: tuple[str, Path, Path]) -> None:
    name, source, run = made
    model = reference_model(source)
    found: dict[str, torch.Tensor] = {}

    def note(module: nn.Module, args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        found["hidden"] = output[0] if isinstance(output, tuple) else output

    model.get_submodule(f"{PREFIX[name]}.1").register_forward_hook(note)
    ids = load_file(run / "reference.safetensors")["ids"]
    with products("float32"):
        logits = model(ids).logits.double()
    reference = load_file(run / "reference.safetensors")
    assert torch.equal(reference["hidden"], found["hidden"])
    expected = -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert reference["negative_log_likelihood"].shape == (3, 47)
    np.testing.assert_allclose(reference["negative_log_likelihood"], expected, atol=1e-5)


def test_the_noise_floor_rounds_to_bfloat16_behind_the_embedding_and_every_block(
    made: tuple[str, Path, Path],
) -> None:
    name, source, run = made
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
        model(load_file(run / "reference.safetensors")["ids"])
    reference = load_file(run / "reference.safetensors")
    assert torch.equal(reference["floor"], found["hidden"])
    assert not torch.equal(reference["floor"], reference["hidden"])


@pytest.mark.parametrize("text", [VALIDATION, SEARCH, OTHER], ids=lambda text: text.name)
def test_a_reference_alone_is_the_one_that_calibrate_makes(
    text: Text, tmp_path: Path, made: tuple[str, Path, Path]
) -> None:
    _, source, run = made
    file = f"{text.place}reference.safetensors"
    with opened(everything(source, tmp_path / "out")) as job:
        outcome = run_alone(job, reference(text))
    assert outcome.record.outputs == {file: hashlib.sha256((run / file).read_bytes()).hexdigest()}
    assert not (tmp_path / "out.run/calibrate").exists()


def test_a_conversion_reads_the_original_once_for_calibrate_and_all_references(
    tmp_path: Path, made: tuple[str, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, source, _ = made
    loaded: list[int] = []
    load = Decoder.load_block
    monkeypatch.setattr(Decoder, "load_block", lambda self, index: loaded.append(index) or load(self, index))
    with opened(everything(source, tmp_path / "out")) as job:
        run_to(job, "reading")
        loaded.clear()
        done = run_to(job, "calibrate")
    assert list(done) == ["reading", "calibrate", "reference", "search reference", "other reference"]
    assert [str(outcome.reason) for outcome in done.values()] == ["up to date", *["new"] * 4]
    assert loaded == [0, 1]


class InterruptedRunError(Exception):
    pass


def stop_at(label: str) -> Callable[[Event], None]:
    def progress(event: Event) -> None:
        if event.label == label:
            raise InterruptedRunError

    return progress


@pytest.mark.parametrize("text", [VALIDATION, SEARCH, OTHER], ids=lambda text: text.name)
@pytest.mark.parametrize("along", [False, True], ids=["alone", "with calibrate"])
def test_interrupted_it_goes_on_from_its_streams(
    along: bool, text: Text, tmp_path: Path, made: tuple[str, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is asked for in another way than before."""
    _, source, run = made
    monkeypatch.setattr(streams, "SECONDS_BETWEEN_STORES", 0.0)
    config = everything(source, tmp_path / "out")

    def make(progress: Callable[[Event], None], along: bool) -> StageOutcome:
        with opened(config, progress) as job:
            return run_to(job, "calibrate")[text.reference] if along else run_alone(job, reference(text))

    with pytest.raises(InterruptedRunError):
        make(stop_at("block 1/2"), along)
    ran: list[tuple[int, int]] = []
    original = Decoder.run
    monkeypatch.setattr(
        Decoder,
        "run",
        lambda self, index, block, hidden, *rest: (
            ran.append((index, len(hidden))) or original(self, index, block, hidden, *rest)
        ),
    )
    outcome = make(lambda event: None, along=False)
    windows = 2 if text is OTHER else 3
    assert ran == [(1, windows), (1, windows)]
    file = f"{text.place}reference.safetensors"
    assert outcome.record.outputs == {file: hashlib.sha256((run / file).read_bytes()).hexdigest()}
    assert not (tmp_path / f"out.run/{text.place}reference-streams.safetensors").exists()


def test_it_is_made_again_for_other_tokens_and_nothing_else(tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")

    def again(text: Text, **settings: object) -> Reason:
        with opened(everything(source, tmp_path / "out", **settings)) as job:
            return run_alone(job, reference(text)).reason

    assert [again(text) for text in (VALIDATION, OTHER)] == [Reason("new")] * 2
    unrelated = {
        "calibration__samples": 2,
        "plan__bits": 3,
        "rounding__method": "nearest",
        "machine__precision": "auto",
    }
    assert [again(text, **unrelated) for text in (VALIDATION, OTHER)] == [Reason("up to date")] * 2
    copy = tmp_path / "copy.txt"
    copy.write_text(source.with_name("validation.txt").read_text())
    assert again(VALIDATION, validation__text=copy) == Reason("up to date")
    # Half as many windows of the other text as of the first, but two at least.
    assert again(OTHER, validation__windows=2) == Reason("up to date")
    assert again(VALIDATION, validation__windows=2) == Reason("input changed", "validation tokens")
    assert again(OTHER, validation__windows=6) == Reason("input changed", "other tokens")


def test_asked_for_afresh_it_is_computed_again(
    tmp_path: Path, made: tuple[str, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, source, _ = made
    config = everything(source, tmp_path / "out")
    with opened(config) as job:
        run_to(job, "calibrate")
    embedded: list[int] = []
    embed_all = Decoder.embed_all
    monkeypatch.setattr(Decoder, "embed_all", lambda self, ids: embedded.append(len(ids)) or embed_all(self, ids))
    with opened(config, fresh=True) as job:
        done = run_to(job, "calibrate")
    assert {str(outcome.reason) for outcome in done.values()} == {"forced"}
    assert embedded == [6, 3, 3, 2]  # calibration, validation, search, other: each once
