"""Time a conversion of random blocks of Llama-7B's shape, stage by stage, and say what all of Llama-7B would take.

    python scripts/time_blocks.py [--device cuda] [--layers 2] [--samples 128] [--seq-len 2048] [--gradients N]

First come the machine's limits: products, and copies to the device, back, and on it. Then, for each stage, what its
last block took (the first one also compiles), and how much that is of arithmetic and of bytes to the device and back,
both counted from shapes; what the stage took beside its blocks; and the sum for 32 blocks. Each line is printed as soon
as it is known. --shrink N divides all widths by N, for a trial.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from random_model import ensure_model

from accullm_cli.config import Config
from accullm_cli.config_file import load_config
from accullm_cli.errors import AccullmError
from accullm_cli.pipeline import convert
from accullm_cli.progress import Event
from accullm_cli.stages.calibrate import STATISTICS_WINDOWS
from accullm_cli.stages.compute import compute_of
from accullm_cli.stages.device import check_device, describe_device
from accullm_cli.stages.estimate import PASSES_OF_THE_ORIGINAL, PASSES_OF_THE_ROUNDED

HIDDEN, INTERMEDIATE, HEADS, VOCABULARY, BLOCKS = 4096, 11008, 32, 32000, 32
# Minutes for all blocks, without gradients and with them.
TARGETS = 10.0, 20.0
VALIDATION_WINDOWS = 16
FLOAT, STORED = 4, 2  # bytes of a number in a stream, and of a weight in the checkpoint
# How often the two streams go to the device or back in quantize: the original's there and back, the rounded one's there
# for each of four inputs, and at the end there and back.
TRIPS = 8
REPEATS = 5


@dataclass(frozen=True)
class Shape:
    """A conversion's sizes. tokens: of calibration; measured, with_gradient: of these; held_out: of validation."""

    hidden: int
    intermediate: int
    tokens: int
    measured: int
    with_gradient: int
    held_out: int

    @property
    def weights(self) -> int:
        """Of a block's linears."""
        return 4 * self.hidden**2 + 3 * self.hidden * self.intermediate

    def work(self, stage: str, kind: str) -> tuple[float, float]:
        """Operations on a block in one stage, and bytes to the device and back."""
        product, stream = 2.0 * self.weights, FLOAT * self.hidden
        if stage == "calibrate" and kind == "gradient":
            # Forth once more, and back.
            return 2 * product * self.with_gradient, STORED * self.weights + 2 * stream * self.with_gradient
        if stage == "calibrate":
            passes = self.measured + 2 * self.held_out
            return product * passes, STORED * self.weights + 2 * stream * passes
        if stage == "quantize":
            passes = PASSES_OF_THE_ORIGINAL + PASSES_OF_THE_ROUNDED
            inputs = 3 * self.hidden**2 + self.intermediate**2
            outputs = 4 * self.hidden**2 + 2 * self.intermediate**2 + self.hidden**2
            operations = product * passes * self.tokens + 4 * inputs * self.tokens
            operations += (product + 2 * outputs) * self.with_gradient
            return operations, STORED * self.weights + TRIPS * stream * self.tokens
        return product * self.held_out, FLOAT * self.weights + 2 * stream * self.held_out


@dataclass
class Clock:
    """Takes the time of every block, and prints each stage when it ends."""

    shape: Shape
    layers: int
    minutes: float = 0.0
    _began: float = 0.0
    _last: float = 0.0
    _blocks: dict[str, list[float]] = field(default_factory=dict)

    def progress(self, event: Event) -> None:
        now = time.perf_counter()
        if event.kind == "start":
            self._began = self._last = now
            self._blocks = {}
        elif event.kind == "step":
            kind = event.label.split()[0]
            if kind in ("block", "gradient"):
                self._blocks.setdefault(kind, []).append(now - self._last)
            self._last = now
        elif event.kind == "end":
            self._print(event.stage, now - self._began)

    def _print(self, stage: str, seconds: float) -> None:
        beside = seconds
        for kind, of_blocks in self._blocks.items():
            last = of_blocks[-1]
            beside -= sum(of_blocks)
            self.minutes += BLOCKS * last / 60
            operations, moved = self.shape.work(stage.split()[0], kind)
            speed = f"{operations / last / 1e12:.2f} TFLOP/s"
            say(stage, kind, f"{last:.3f} s", speed, f"{moved / last / 1e9:.2f} GB/s")
        # What tells of no block goes through all of them at once: it reads, or it writes, the whole model.
        self.minutes += beside / 60 * (1 if self._blocks else BLOCKS / self.layers)
        say(stage, "beside its blocks" if self._blocks else "all blocks", f"{beside:.3f} s", "", "")


def say(*cells: str) -> None:
    """One line of a table, at once."""
    print("| " + " | ".join(cells) + " |", flush=True)


def main(arguments: Sequence[str]) -> int:
    """Print the machine's limits and the stages' times; the exit code of a refusal, or 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--gradients", type=int, default=0)
    parser.add_argument("--shrink", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("work/bench"))
    chosen = parser.parse_args(arguments)
    shape = Shape(
        HIDDEN // chosen.shrink,
        INTERMEDIATE // chosen.shrink,
        chosen.samples * chosen.seq_len,
        min(chosen.samples, max(STATISTICS_WINDOWS, chosen.gradients)) * chosen.seq_len,
        chosen.gradients * chosen.seq_len,
        VALIDATION_WINDOWS * chosen.seq_len,
    )
    model = chosen.work / f"llama-{shape.hidden}-{chosen.layers}-layers"
    config = config_of(model, chosen)
    try:
        check_device(config, only_validates=False)
        print_limits(config)
        heads = max(1, HEADS // chosen.shrink)
        ensure_model(
            model,
            {
                "hidden_size": shape.hidden,
                "intermediate_size": shape.intermediate,
                "num_attention_heads": heads,
                "num_key_value_heads": heads,
                "vocab_size": VOCABULARY,
                "num_hidden_layers": chosen.layers,
            },
        )
        print(f"\n{chosen.samples} x {chosen.seq_len} tokens, {chosen.gradients} windows with gradients\n")
        say("stage", "", "seconds", "arithmetic", "to the device and back")
        say(*5 * ("---",))
        clock = Clock(shape, chosen.layers)
        convert(config, clock.progress, fresh=True)
    except AccullmError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return error.exit_code
    finally:
        shutil.rmtree(run_of(model), ignore_errors=True)
    target = TARGETS[chosen.gradients > 0]
    verdict = "within" if clock.minutes <= target else "over"
    print(f"\n{BLOCKS} blocks: {clock.minutes:.1f} min, {verdict} the target of {target:g} min")
    return 0


def run_of(model: Path) -> Path:
    return model.with_name(f"{model.name}.times.run")


def config_of(model: Path, chosen: argparse.Namespace) -> Config:
    sets = [
        f"machine.device={chosen.device}",
        f"machine.run={run_of(model)}",
        f"export.out={model.with_name(f'{model.name}.times')}",
        f"calibration.samples={chosen.samples}",
        f"calibration.seq_len={chosen.seq_len}",
        f"calibration.gradient_samples={chosen.gradients}",
        f"validation.windows={VALIDATION_WINDOWS}",
        "validation.other_text=none",
    ]
    return load_config(str(model), sets=sets)


def print_limits(config: Config) -> None:
    """What the machine reaches where nothing else has to be done."""
    compute = compute_of(config)
    device, side = compute.device, 1024 if compute.device.type == "cpu" else 8192
    print(f"{describe_device(device)}, torch {torch.__version__}\n")
    say("limit", "")
    say("---", "---")
    left, right = (torch.ones(side, side, device=device) for _ in range(2))
    for precision in dict.fromkeys(("float32", compute.precision)):
        with compute.products(precision):
            seconds = seconds_of(lambda: left @ right, device)
        say(f"products in {precision}", f"{2 * side**3 / seconds / 1e12:.2f} TFLOP/s")
    if device.type == "cpu":
        return
    there = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    for memory, pinned in (("pinned", True), ("other", False)):
        here = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=pinned)
        for what, seconds in (
            (f"to the device from {memory} memory", seconds_of(lambda here=here: there.copy_(here), device)),
            (f"from the device to {memory} memory", seconds_of(lambda here=here: here.copy_(there), device)),
        ):
            say(what, f"{here.nbytes / seconds / 1e9:.1f} GB/s")
    seconds = seconds_of(lambda: there.copy_(there.flip(0)), device)
    say("copies on the device, read and written twice", f"{4 * there.nbytes / seconds / 1e9:.0f} GB/s")


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Of one of several runs, after one that is not counted."""
    for count in (1, REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(count):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) / REPEATS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
