"""Would it pay to learn the rounding of each block, on top of an artifact's codes?

AutoRound (arXiv 2309.05516) rounds so: signed gradient descent on the squared error of a block's output, with codes
rounded in the forward pass and a gradient that passes as if they were not. Here it begins with the artifact's codes,
scales and outliers, block after block, each for what the blocks before it make of the calibration text by then. It says
how the error of each block changes on this text and on held-out text, and the mean KL there before and after. A block
whose error on its own text has grown gets its codes back.

    accullm convert work/smollm2-135m --out ART --run RUN --bits 4.4 --outlier-mode compensating --gradient-samples 128
    python scripts/probe_learning.py work/smollm2-135m ART --tokens RUN/tokens.safetensors --blocks 2

Only linears that are a torch.nn.Linear are learned. One block of each model is in memory, and three streams.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from accullm_cli.errors import AccullmError
from accullm_cli.formats import open_artifact
from accullm_cli.formats.base import Artifact
from accullm_cli.model.blocks import Decoder, batches
from accullm_cli.model.checkpoint import Checkpoint, build_skeleton
from accullm_cli.model.source import open_source
from accullm_cli.quant.linear import QuantizedLinear, spread
from accullm_cli.stages.artifact_weights import ArtifactWeights
from accullm_cli.stages.precision import products

ITERATIONS = 200  # AutoRound's own
WINDOWS = 8  # of each iteration
# How far signed steps can carry a weight, in steps of its grid, as they become smaller linearly.
REACH = 0.5


# Positions this near to a code are rounded to it.
WITHIN_A_CODE = 0.499


class LearnedLinear(nn.Module):
    """A quantized linear whose codes are the nearest whole numbers to a parameter, `position` [N, K].

    It begins where the original's weight [N, K] is on the grid, or as near to it as rounds to the artifact's code.
    """

    def __init__(self, linear: QuantizedLinear, original: torch.Tensor) -> None:
        super().__init__()
        size, count = linear.columns_per_group, linear.codes.shape[1]
        zeros = torch.full_like(linear.scales, 2 ** (linear.bits - 1)) if linear.zeros is None else linear.zeros
        self.scale, self.zero = spread(linear.scales.float(), size, count), spread(zeros.float(), size, count)
        self.largest = 2**linear.bits - 1
        self.outliers, self.kept = linear.outlier_index.long(), linear.outlier_weight.float()
        self._codes = linear.codes.float()
        offset = original / self.scale + self.zero - self._codes
        self.position = nn.Parameter(self._codes + offset.clamp_(-WITHIN_A_CODE, WITHIN_A_CODE))

    @property
    def moved(self) -> torch.Tensor:
        """Which codes are others than they were, [N, K]."""
        return self._rounded() != self._codes

    def weight(self) -> torch.Tensor:
        """Its weight as rounded, [N, K]; the gradient is that of the weight before it."""
        codes = self.position + (self._rounded() - self.position).detach()
        weight = (codes - self.zero) * self.scale
        return weight.index_copy(1, self.outliers, self.kept) if len(self.outliers) else weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight())

    def _rounded(self) -> torch.Tensor:
        return self.position.detach().round().clamp_(0, self.largest)


class Probe:
    """Original and artifact over the same windows, the artifact with its own codes and with learned ones.

    Args:
        own: int64 [S, T], the windows that codes are learned on.
        held_out: int64 [V, T].
    """

    def __init__(self, original: Path, artifact: Path, own: torch.Tensor, held_out: torch.Tensor) -> None:
        self._artifact: Artifact = open_artifact(artifact)
        source = open_source(str(original), artifact.parent)
        skeleton, rounded = (
            build_skeleton(source.directory, source.untied),
            build_skeleton(source.directory, source.untied),
        )
        self._original = Decoder(skeleton, Checkpoint(source, skeleton))
        self._rounded = Decoder(rounded, ArtifactWeights(self._artifact, rounded))
        self._count = len(own)
        ids = torch.cat([own, held_out])
        for decoder in (self._original, self._rounded):
            decoder.load_outside()
            decoder.embed(own[:WINDOWS])  # what blocks are called with, in steps
            decoder.learn_calls(held_out)
        # Hidden states behind the blocks that are done: the original's, and the artifact's with codes learned and not.
        self._wanted, self._learned = self._original.embed_all(ids), self._rounded.embed_all(ids)
        self._before = self._learned[self._count :].clone()

    def learn(self, iterations: int, blocks: int | None = None) -> list[str]:
        """Learn the codes of the first blocks, or of all, and run all; the lines of a table, one for each learned."""
        lines = []
        for index in range(len(self._original.block_names)):
            original, block = self._original.load_block(index), self._rounded.load_block(index)
            self._advance(self._original, index, original, self._wanted)
            self._advance(self._rounded, index, block, self._before)
            if blocks is None or index < blocks:
                before = self._errors(index, block)
                own = {path: block.get_submodule(path) for path in self._learnable(index, block)}
                linears = {path: self._learned_linear(index, path, original) for path in own}
                _replace(block, linears)
                self._descend(index, block, list(linears.values()), iterations)
                ratios = [new / old for old, new in zip(before, self._errors(index, block), strict=True)]
                moved = sum(int(linear.moved.sum()) for linear in linears.values())
                share = moved / max(1, sum(linear.position.numel() for linear in linears.values()))
                lines.append(f"| {index} | {share:.2%} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
                print(lines[-1], file=sys.stderr, flush=True)
                _replace(block, own)
                for path, linear in linears.items() if ratios[0] < 1 else ():
                    own[path].weight = nn.Parameter(linear.weight().detach(), requires_grad=False)
            self._advance(self._rounded, index, block, self._learned)
            self._rounded.release_block(index)
            self._original.release_block(index)
        return lines

    def mean_kl(self) -> tuple[float, float]:
        """In nats per held-out token, with the artifact's own codes and with those learned; once `learn` is done."""
        before = after = 0.0
        wanted, learned = self._wanted[self._count :], self._learned[self._count :]
        for window in range(len(wanted)):
            of_original, own, new = (
                self._original.logits(hidden[window : window + 1]).log_softmax(-1)
                for hidden in (wanted, self._before, learned)
            )
            before += float((of_original.exp() * (of_original - own)).sum(-1).mean()) / len(wanted)
            after += float((of_original.exp() * (of_original - new)).sum(-1).mean()) / len(wanted)
        return before, after

    def _errors(self, index: int, block: nn.Module) -> tuple[float, float]:
        """Mean squared error of the block's output, on own and on held-out windows."""
        hidden = self._learned.clone()
        self._advance(self._rounded, index, block, hidden)
        error = (hidden - self._wanted).square_()
        return float(error[: self._count].mean()), float(error[self._count :].mean())

    def _advance(self, decoder: Decoder, index: int, block: nn.Module, hidden: torch.Tensor) -> None:
        """Run a block over a stream, in place."""
        with products("float32"):
            for rows in batches(*hidden.shape[:2]):
                hidden[rows] = decoder.run(index, block, hidden[rows])

    def _descend(self, index: int, block: nn.Module, linears: list[LearnedLinear], iterations: int) -> None:
        """Signed gradient descent on the squared error of the block's output."""
        draw = torch.Generator().manual_seed(index)
        positions = [linear.position for linear in linears]
        for iteration in range(iterations):
            rows = torch.randperm(self._count, generator=draw)[:WINDOWS]
            hidden = self._learned[rows].requires_grad_()  # without it, blocks run without gradients
            with products("float32"):
                error = self._rounded.run(index, block, hidden) - self._wanted[rows]
                gradients = torch.autograd.grad(error.square().mean(), positions)
            step = 2 * REACH / iterations * (1 - iteration / iterations)
            with torch.no_grad():
                for position, gradient in zip(positions, gradients, strict=True):
                    position.sub_(step * gradient.sign())

    def _learnable(self, index: int, block: nn.Module) -> list[str]:
        """The paths of a block's quantized linears in it."""
        bits = {name: plan.bits for name, plan in self._artifact.plan.linears.items()}
        name = self._original.block_names[index]
        paths = [path for path, module in block.named_modules() if isinstance(module, nn.Linear)]
        return [path for path in paths if bits.get(f"{name}.{path}", 16) < 16]

    def _learned_linear(self, index: int, path: str, original: nn.Module) -> LearnedLinear:
        linear = self._artifact.linear(f"{self._original.block_names[index]}.{path}")
        return LearnedLinear(linear, original.get_submodule(path).weight)


def _replace(block: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules into a block by their paths."""
    for path, module in modules.items():
        block.set_submodule(path, module)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tokens", type=Path, required=True, help="tokens.safetensors of the conversion's run")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="steps for each block (%(default)s)")
    parser.add_argument("--blocks", type=int, help="learn the first ones alone; default: all")
    options = parser.parse_args(arguments)
    try:
        windows = load_file(options.tokens)
        probe = Probe(options.original, options.artifact, windows["calibration"], windows["validation"])
        lines = probe.learn(options.iterations, options.blocks)
        before, after = probe.mean_kl()
    except AccullmError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return error.exit_code
    print("| block | codes moved | error, own windows | error, held out |\n| --- | --- | --- | --- |")
    print("\n".join(lines))
    print(f"\nErrors are over those before. Mean KL, held out: {before:.5f} before, {after:.5f} after.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
