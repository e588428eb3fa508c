"""Gradients of the loss, and the Fisher matrices made of them, are those of transformers' own backward pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from accullm_cli.model.blocks import Decoder
from accullm_cli.model.slots import LinearSlot
from accullm_cli.progress import Event
from accullm_cli.quant.philox import uniform
from accullm_cli.stages import gradients
from accullm_cli.stages.job import Job
from tests.stages.quantized import Call
from tests.stages.references import inputs_of, rows_of
from tests.streaming import opened, reference_model, run_to, short_config
from tests.tiny import make_checkpoint

WINDOWS = 2
SLOT = LinearSlot("b.w", "w", "linear", 3, 2)
LINEARS = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "c_attn", "c_proj")


def whole_backward(source: Path, ids: torch.Tensor, seed: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """One backward pass: the gradient of each block's output [S, T, hidden], and of each linear's output as rows."""
    model = reference_model(source)
    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    made: list[torch.Tensor] = []
    outputs: dict[str, torch.Tensor] = {}

    def note(name: str):  # type: ignore[no-untyped-def]
        return lambda module, args, result: outputs.update({name: result})

    for name, module in model.named_modules():
        if name.endswith(LINEARS):
            module.register_forward_hook(note(name))
    for block in blocks:
        block.register_forward_hook(
            lambda module, args, result: made.append(result[0] if isinstance(result, tuple) else result)
        )
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, result: result.requires_grad_())
    logits = model(input_ids=ids).logits
    drawn = drawn_tokens(torch.softmax(logits.detach().double(), -1), seed)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), drawn.flatten(), reduction="sum")
    found = torch.autograd.grad(loss, [*made, *outputs.values()])
    of_linears = zip(outputs, found[len(made) :], strict=True)
    return list(found[: len(made)]), {name: rows_of(gradient) for name, gradient in of_linears}


def drawn_tokens(probabilities: torch.Tensor, seed: int) -> torch.Tensor:
    """The token for which the sum of probabilities [S, T, V] passes a random number, [S, T]."""
    windows, length, _ = probabilities.shape
    drawn = torch.empty(windows, length, dtype=torch.int64)
    for window, position in np.ndindex(windows, length):
        number = float(uniform(seed, window, torch.arange(length), 1)[position])
        drawn[window, position] = int((np.cumsum(probabilities[window, position].numpy()) <= number).sum())
    return drawn


def near(found: torch.Tensor, expected: torch.Tensor, digits: float) -> None:
    scale = float(expected.abs().max())
    assert scale > 0
    np.testing.assert_allclose(found.double(), expected.double(), atol=digits * scale, rtol=0)


class Layout:
    """Stands for a decoder whose hidden states have so many features."""

    def __init__(self, features: int) -> None:
        self.features = features

    def states(self, stream: torch.Tensor) -> torch.Tensor:
        return stream[..., : self.features]


@pytest.mark.parametrize(("features", "kept"), [(3, [1.0, 256.0, 0.330078125]), (2, [1.0, 257.0, 0.33])])
def test_what_goes_into_a_block_is_kept_in_bfloat16_unless_there_are_token_ids_in_it(
    features: int, kept: list[float], tmp_path: Path
) -> None:
    hidden = torch.tensor([[[1.0, 257.0, 0.33]]])
    with opened(short_config(make_checkpoint("llama", tmp_path / "model"), tmp_path / "out")) as job:
        gradients.keep_input(job, Layout(features), 0, hidden)  # type: ignore[arg-type]
    stored = load_file(tmp_path / "out.run/calibrate/input-00000.safetensors")["hidden"]
    assert torch.equal(stored.float(), torch.tensor([[kept]]))


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.375, 0.125, 0.0]).expand(8000, 6)
    drawn = gradients.draw_tokens(probabilities, 5, 2)
    expected = 8000 * probabilities[0]
    count = torch.bincount(drawn, minlength=6)
    assert count[expected == 0].tolist() == [0, 0, 0]
    # Five standard deviations of the largest.
    assert (count - expected).abs().max() < 5 * 2000**0.5
    assert torch.equal(drawn, gradients.draw_tokens(probabilities, 5, 2))
    assert not torch.equal(drawn, gradients.draw_tokens(probabilities, 5, 3))
    assert not torch.equal(drawn, gradients.draw_tokens(probabilities, 6, 2))
    # Where the probabilities in float32 add up to less than 1, or to more.
    assert int(gradients.draw_tokens(probabilities * 0.999, 5, 2).max()) == 4
    assert torch.equal(drawn, gradients.draw_tokens(probabilities * 2, 5, 2))


@pytest.mark.parametrize(("name", "positions"), [("llama", None), ("gpt2", None), ("gemma2", 3), ("mixtral", 1)])
def test_gradients_are_those_of_one_backward_pass(
    name: str, positions: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few positions pass the head at once."""
    if positions is not None:
        monkeypatch.setattr(gradients, "POSITIONS", positions)
    source = make_checkpoint(name, tmp_path / "model")
    config = short_config(source, tmp_path / "out", calibration__gradient_samples=WINDOWS, machine__seed=3)
    with opened(config) as job:
        outcome = run_to(job, "calibrate")["calibrate"]
        found = [gradients.load_gradient(job, index) for index in range(2)]
    run = tmp_path / "out.run"
    ids = load_file(run / "tokens.safetensors")["calibration"][:WINDOWS]
    expected, _ = whole_backward(source, ids, seed=3)
    for own, reference in zip(found, expected, strict=True):
        assert own is not None
        assert own.dtype == torch.bfloat16
        near(own, reference, 0.02)  # bfloat16 keeps 8 bits, twice
    assert not list((run / "calibrate").glob("input-*"))
    kept = {f"calibrate/{kind}-0000{index}.safetensors" for index in range(2) for kind in ("gradient", "sensitivity")}
    assert kept <= set(outcome.record.outputs)


def test_the_heads_rows_and_columns_are_weighed_by_the_gradients_of_its_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "POSITIONS", 9)
    source = make_checkpoint("llama", tmp_path / "model")
    config = short_config(source, tmp_path / "out", calibration__gradient_samples=WINDOWS, machine__seed=3)
    with opened(config) as job:
        run_to(job, "calibrate")
        rows, columns = gradients.load_head_gradient(job)
    ids = load_file(tmp_path / "out.run/tokens.safetensors")["calibration"][:WINDOWS]
    model, read = reference_model(source), []
    model.lm_head.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad():
        probabilities = torch.softmax(model(input_ids=ids).logits.double(), -1)
    drawn = nn.functional.one_hot(drawn_tokens(probabilities, 3), probabilities.shape[-1])
    squares = (probabilities - drawn).square().flatten(0, 1)
    inputs = read[0].double().square().flatten(0, 1)
    near(rows, (squares * inputs.sum(1, keepdim=True)).mean(0), 0.01)
    near(columns, squares.sum(1) @ inputs / len(inputs), 0.01)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sensitivities_weigh_each_input_by_the_gradient_at_its_token(name: str, tmp_path: Path) -> None:
    source = make_checkpoint(name, tmp_path / "model")
    with opened(short_config(source, tmp_path / "out", calibration__gradient_samples=WINDOWS)) as job:
        run_to(job, "calibrate")
        found = gradients.load_sensitivities(job, 2)
    ids = load_file(tmp_path / "out.run" / "tokens.safetensors")["calibration"][:WINDOWS]
    _, expected = whole_backward(source, ids, seed=0)
    rows = inputs_of(reference_model(source), ids)
    assert len(found) == {"llama": 14, "gpt2": 8}[name]
    for linear, gradient in expected.items():
        weight = gradient.double().square().mean(1)
        near(found[linear], weight @ rows[linear].square() / len(weight), 0.03)


def test_a_massive_input_counts_as_little_as_what_it_becomes() -> None:
    """One token has an input a thousand times as large and no gradient: it decides nothing."""
    gradient, rows = torch.ones(4, 3), torch.ones(4, 2)
    gradient[0], rows[0] = 0.0, 1000.0
    found = gradients._OfLinear(SLOT, torch.device("cpu"))
    found.add(rows, gradient)
    assert found.sensitivity.tolist() == [3.0, 3.0]
    weights = found.token_weights()
    assert weights is not None
    assert float(weights.of(rows)[0]) < float(weights.of(rows)[1])


def test_what_the_loss_does_not_depend_on_has_no_weights() -> None:
    found = gradients._OfLinear(SLOT, torch.device("cpu"))
    assert found.token_weights() is None
    found.add(torch.ones(4, 2), torch.zeros(4, 3))
    assert found.token_weights() is None


def test_an_expert_has_sensitivities_but_no_weights() -> None:
    found = gradients._OfLinear(replace(SLOT, kind="expert", expert=0, experts=2), torch.device("cpu"))
    found.add(torch.ones(4, 2), torch.ones(4, 3))
    assert found.sensitivity.tolist() == [4.0, 4.0]
    assert found.token_weights() is None


@pytest.mark.parametrize(("name", "linears"), [("llama", 4), ("gpt2", 2)])
@pytest.mark.parametrize("target", ["corrected", "original"])
def test_fisher_matrices_are_the_second_moments_of_output_gradients(
    name: str, linears: int, target: str, calls: list[Call], tmp_path: Path
) -> None:
    source = make_checkpoint(name, tmp_path / "model")
    settings = {"calibration__gradient_samples": WINDOWS, "rounding__target": target}
    with opened(short_config(source, tmp_path / "out", **settings)) as job:
        run_to(job, "quantize")
    ids = load_file(tmp_path / "out.run" / "tokens.safetensors")["calibration"][:WINDOWS]
    _, expected = whole_backward(source, ids, seed=0)
    checked = 0
    for call in calls:
        assert call.fishers.keys() == set(call.names)
        for linear, fisher in call.fishers.items():
            if linear in expected:
                gradient = expected[linear]
                wanted = gradient.T @ gradient
                near(fisher / fisher.diagonal().mean(), wanted / wanted.diagonal().mean(), 0.03)
                checked += 1
    assert checked >= 2 * linears


def test_experts_have_none(calls: list[Call], tmp_path: Path) -> None:
    source = make_checkpoint("mixtral", tmp_path / "model")
    with opened(short_config(source, tmp_path / "out", calibration__gradient_samples=1)) as job:
        run_to(job, "quantize")
    for call in calls:
        assert call.fishers.keys() == (set() if "experts" in call.names[0] else set(call.names))


def test_without_gradients_nothing_is_kept(calls: list[Call], tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    with opened(short_config(source, tmp_path / "out")) as job:
        run_to(job, "quantize")
        assert gradients.load_gradient(job, 0) is None
    assert not list((tmp_path / "out.run" / "calibrate").glob("*t-*"))
    assert all(call.fishers == {} for call in calls)


def test_a_broken_off_backward_pass_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    whole = short_config(source, tmp_path / "whole", calibration__gradient_samples=WINDOWS)
    with opened(whole) as job:
        run_to(job, "calibrate")
    config = short_config(source, tmp_path / "out", calibration__gradient_samples=WINDOWS)
    through = gradients._through_block

    def stop(job: Job, decoder: Decoder, index: int) -> object:
        if index == 0:
            raise KeyboardInterrupt
        return through(job, decoder, index)

    monkeypatch.setattr(gradients, "_through_block", stop)
    with pytest.raises(KeyboardInterrupt), opened(config) as job:
        run_to(job, "calibrate")
    monkeypatch.setattr(gradients, "_through_block", through)
    of_the_loss: list[Decoder] = []
    monkeypatch.setattr(gradients, "_of_the_loss", lambda decoder, *rest: of_the_loss.append(decoder))
    seen: list[Event] = []
    with opened(config, seen.append) as job:
        run_to(job, "calibrate")
    assert of_the_loss == []
    names = ("gradient-00000.safetensors", "gradient-00001.safetensors")
    for file in names:
        one, other = ((tmp_path / f"{run}.run" / "calibrate" / file).read_bytes() for run in ("whole", "out"))
        assert one == other
    steps = [(event.label, event.reason.runs) for event in seen if event.label.startswith("gradient") and event.reason]
    assert steps == [("gradient 1/2", False), ("gradient 2/2", True)]


def test_gradients_of_other_draws_are_made_anew(tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    for out, seed in (("out", 1), ("out", 2), ("fresh", 2)):
        settings = {"calibration__gradient_samples": WINDOWS, "machine__seed": seed}
        with opened(short_config(source, tmp_path / out, **settings)) as job:
            run_to(job, "calibrate")
    for index in range(2):
        file = f"calibrate/gradient-0000{index}.safetensors"
        assert (tmp_path / "out.run" / file).read_bytes() == (tmp_path / "fresh.run" / file).read_bytes()
