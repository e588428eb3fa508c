"""Would it pay to train an artifact end to end? One step of it, on its own text and on text that it has not seen.

The gradient of KL(original || artifact) over calibration windows, with respect to every linear weight and every norm of
the artifact, is where any such training begins. A Kronecker-factored Newton step (K-FAC, arXiv 1503.05671) moves all
weights along it, freely and off their grids: more than training codes, scales or outlier columns could do.

    accullm convert work/smollm2-135m --out ART --run RUN --bits 4.4 --outlier-mode compensating --gradient-samples 128
    python scripts/probe_training.py work/smollm2-135m ART --tokens RUN/tokens.safetensors

Both models, the gradient and the factors are in memory at once, in float32: some 5 GB for 135 million weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from accullm_cli.errors import AccullmError
from accullm_cli.formats import open_artifact
from accullm_cli.model.slots import find_blocks
from accullm_cli.stages.artifact_weights import ArtifactWeights

# What the diagonals of a factor get, as a share of their mean.
INPUT_DAMPING, OUTPUT_DAMPING = 1.0, 3.0
NORM_STEPS = (0.01, 0.03)
WEIGHT_STEPS = (0.0003, 0.001, 0.003)
# So many of the calibration windows are measured after a step.
OWN_WINDOWS = 8


class Factors:
    """Of each linear, summed over tokens: the second moments of its inputs [K, K], and of the gradient of a loss with
    respect to its outputs [N, N] while `watching`."""

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        self.inputs = {name: torch.zeros(module.in_features, module.in_features) for name, module in linears.items()}
        self.outputs = {name: torch.zeros(module.out_features, module.out_features) for name, module in linears.items()}
        self._takes_inputs = self._takes_gradients = False
        for name, module in linears.items():
            module.register_forward_hook(self._hook(name))

    @contextmanager
    def watching(self, inputs: bool = False, gradients: bool = False) -> Iterator[None]:
        self._takes_inputs, self._takes_gradients = inputs, gradients
        yield
        self._takes_inputs = self._takes_gradients = False

    def _hook(self, name: str):  # type: ignore[no-untyped-def]
        def add_gradient(value: torch.Tensor) -> None:
            if self._takes_gradients:
                self.outputs[name] += value[0].T @ value[0]

        def hook(module: nn.Module, arguments: tuple[torch.Tensor], output: torch.Tensor) -> None:
            if self._takes_inputs:
                value = arguments[0].detach()[0]
                self.inputs[name] += value.T @ value
                output.register_hook(add_gradient)

        return hook


class Probe:
    """The original and the artifact, dequantized; windows are int64 [windows, tokens]."""

    def __init__(self, original: Path, artifact: Path) -> None:
        self.original = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
        self.artifact: PreTrainedModel = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
        weights = ArtifactWeights(open_artifact(artifact), self.artifact)
        weights.load(find_blocks(self.artifact))
        self.artifact.float().requires_grad_(False)
        blocks = tuple(f"{name}." for name in find_blocks(self.artifact))
        linears = {
            name: module
            for name, module in self.artifact.named_modules()
            if isinstance(module, nn.Linear) and name.startswith(blocks)
        }
        self.weights = {name: module.weight for name, module in linears.items()}
        self.norms = {name: value for name, value in self.artifact.named_parameters() if "norm" in name}
        for parameter in (*self.weights.values(), *self.norms.values()):
            parameter.requires_grad_(True)
        self.factors = Factors(linears)

    def divergence(self, window: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """KL(original || artifact) of each position [T], and the artifact's log-probabilities [T, vocabulary]."""
        with torch.no_grad():
            wanted = self.original(window[None]).logits[0].log_softmax(-1)
        found = self.artifact(window[None]).logits[0].log_softmax(-1)
        return (wanted.exp() * (wanted - found)).sum(-1), found

    @torch.no_grad()
    def mean_kl(self, windows: torch.Tensor) -> float:
        """In nats per token."""
        return sum(float(self.divergence(window)[0].mean()) for window in windows) / len(windows)

    def gradients(self, windows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of the mean KL, by parameter; it leaves the factors, of a loss on tokens drawn from the artifact."""
        parameters = {**self.weights, **self.norms}
        total = {name: torch.zeros_like(value) for name, value in parameters.items()}
        bottom = next(iter(self.norms.values()))  # a gradient that is taken down to it passes every linear
        draw = torch.Generator().manual_seed(0)
        for number, window in enumerate(windows):
            with self.factors.watching(inputs=True):
                kl, found = self.divergence(window)
            for name, part in zip(
                total, torch.autograd.grad(kl.mean(), [*parameters.values()], retain_graph=True), strict=True
            ):
                total[name] += part / len(windows)
            tokens = torch.multinomial(found.detach().exp(), 1, generator=draw).squeeze(1)
            with self.factors.watching(gradients=True):
                torch.autograd.grad(nn.functional.nll_loss(found, tokens, reduction="sum"), bottom)
            if number % 8 == 7:
                print(f"gradient: {number + 1}/{len(windows)} windows", file=sys.stderr, flush=True)
        return total

    def newton_step(self, name: str, gradient: torch.Tensor, tokens: int) -> torch.Tensor:
        """-G^-1 gradient H^-1 with damped factors, [N, K]."""
        outputs = _damped(self.factors.outputs[name] / tokens, OUTPUT_DAMPING)
        inputs = _damped(self.factors.inputs[name] / tokens, INPUT_DAMPING)
        half = torch.cholesky_solve(gradient.double(), outputs)
        return -torch.cholesky_solve(half.T.contiguous(), inputs).T.float()


def _damped(factor: torch.Tensor, share: float) -> torch.Tensor:
    """The Cholesky factor of it with its diagonal raised by a share of its mean."""
    factor = factor.double()
    factor.diagonal().add_(share * factor.diagonal().mean())
    return torch.linalg.cholesky(factor)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tokens", type=Path, required=True, help="tokens.safetensors of the conversion's run")
    parser.add_argument("--windows", type=int, help="calibration windows; default: all")
    options = parser.parse_args(arguments)
    try:
        print(render(options.original, options.artifact, options.tokens, options.windows))
    except AccullmError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return error.exit_code
    return 0


def render(original: Path, artifact: Path, tokens: Path, count: int | None) -> str:
    """A table of mean KL on the training's own windows and on held-out ones, for some sizes of step."""
    windows = load_file(tokens)
    own, held_out = windows["calibration"][:count], windows["validation"]
    some = own[:: max(1, len(own) // OWN_WINDOWS)][:OWN_WINDOWS]
    probe = Probe(original, artifact)
    gradients = probe.gradients(own)
    lines = ["| what moves | step | mean KL, own windows | mean KL, held out |", "| --- | --- | --- | --- |"]

    def add(what: str, step: float) -> None:
        lines.append(f"| {what} | {step:g} | {probe.mean_kl(some):.5f} | {probe.mean_kl(held_out):.5f} |")
        print(lines[-1], file=sys.stderr, flush=True)

    add("nothing", 0)
    directions = {name: -gradients[name] for name in probe.norms}
    _try(probe.norms, directions, NORM_STEPS, lambda step: add("norms", step))
    directions = {name: probe.newton_step(name, gradients[name], own.numel()) for name in probe.weights}
    _try(probe.weights, directions, WEIGHT_STEPS, lambda step: add("all linear weights", step))
    return "\n".join(lines)


@torch.no_grad()
def _try(parameters, directions, steps, measure) -> None:  # type: ignore[no-untyped-def]
    """Move parameters along their directions, by each step, and put them back."""
    before = 0.0
    for step in (*steps, 0.0):
        for name, parameter in parameters.items():
            parameter += (step - before) * directions[name]
        before = step
        if step:
            measure(step)


if __name__ == "__main__":
    sys.exit(main())
