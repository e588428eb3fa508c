"""The probe of end-to-end training: its gradients are those of the KL; factors and step are what they are called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from accullm_cli import convert
from tests.scripts.loading import load_script
from tests.streaming import short_config
from tests.tiny import make_checkpoint

script = load_script("probe_training")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, float]:
    """Original, artifact, tokens, and the mean KL that validate reports."""
    place = tmp_path_factory.mktemp("converted")
    source = make_checkpoint("llama", place / "model")
    report = convert(short_config(source, place / "out"))
    return source, place / "out", place / "out.run" / "tokens.safetensors", report.fidelity.mean_kl.value


def test_without_a_step_it_measures_what_validate_does(converted: tuple[Path, Path, Path, float]) -> None:
    original, artifact, tokens, mean_kl = converted
    probe = script.Probe(original, artifact)
    assert probe.mean_kl(load_file(tokens)["validation"]) == pytest.approx(mean_kl, rel=1e-4)


def test_the_gradient_is_that_of_the_mean_kl(converted: tuple[Path, Path, Path, float]) -> None:
    original, artifact, tokens, _ = converted
    windows = load_file(tokens)["calibration"]
    probe = script.Probe(original, artifact)
    gradients = probe.gradients(windows)
    parameters = {**probe.weights, **probe.norms}
    slope = sum(float(gradient.square().sum()) for gradient in gradients.values())
    for step in (1e-3 / slope**0.5, -1e-3 / slope**0.5):
        with torch.no_grad():
            before = probe.mean_kl(windows)
            for name, parameter in parameters.items():
                parameter += step * gradients[name]
            found = probe.mean_kl(windows) - before
            for name, parameter in parameters.items():
                parameter -= step * gradients[name]
        assert found == pytest.approx(step * slope, rel=0.05)


def test_the_factors_are_second_moments_of_inputs_and_of_gradients(converted: tuple[Path, Path, Path, float]) -> None:
    original, artifact, tokens, _ = converted
    window = load_file(tokens)["calibration"][:1]
    probe = script.Probe(original, artifact)
    probe.gradients(window)
    name = "model.layers.1.mlp.down_proj"
    seen: list[torch.Tensor] = []
    module = probe.artifact.get_submodule(name)
    module.register_forward_hook(lambda module, arguments, output: seen.extend((arguments[0][0].detach(), output)))
    found = probe.artifact(window).logits[0].log_softmax(-1)
    torch.testing.assert_close(probe.factors.inputs[name], seen[0].T @ seen[0])
    drawn = torch.multinomial(found.detach().exp(), 1, generator=torch.Generator().manual_seed(0)).squeeze(1)
    (gradient,) = torch.autograd.grad(torch.nn.functional.nll_loss(found, drawn, reduction="sum"), seen[1])
    torch.testing.assert_close(probe.factors.outputs[name], gradient[0].T @ gradient[0], rtol=1e-4, atol=1e-5)


def test_the_step_solves_the_damped_system(converted: tuple[Path, Path, Path, float]) -> None:
    original, artifact, tokens, _ = converted
    windows = load_file(tokens)["calibration"]
    probe = script.Probe(original, artifact)
    gradients = probe.gradients(windows)
    name, count = "model.layers.0.self_attn.v_proj", windows.numel()
    step = probe.newton_step(name, gradients[name], count).double()
    outputs, inputs = (probe.factors.outputs[name] / count).double(), (probe.factors.inputs[name] / count).double()
    outputs += 3 * outputs.diagonal().mean() * torch.eye(len(outputs))
    inputs += inputs.diagonal().mean() * torch.eye(len(inputs))
    expected = -gradients[name].double()
    torch.testing.assert_close(outputs @ step @ inputs, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_weights_are_put_back_and_every_step_is_a_line(
    converted: tuple[Path, Path, Path, float], capsys: pytest.CaptureFixture[str]
) -> None:
    original, artifact, tokens, _ = converted
    assert script.main([str(original), str(artifact), "--tokens", str(tokens), "--windows", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == ["0", "0.01", "0.03", "0.0003", "0.001", "0.003"]
    parameters = {"a": torch.ones(2)}
    seen: list[list[float]] = []
    script._try(
        parameters, {"a": torch.tensor([1.0, 2.0])}, (1.0, 2.0), lambda step: seen.append(parameters["a"].tolist())
    )
    assert seen == [[2.0, 3.0], [3.0, 5.0]]
    assert parameters["a"].tolist() == [1.0, 1.0]
