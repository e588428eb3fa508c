"""Measure that a conversion holds a few blocks in memory, whatever the model's size.

A random-weight model is written once, one shard per block, and converted by `accullm convert` in a process of its own.
Per stage this prints seconds, seconds per block and peak resident memory, once as the run's manifest has it and once as
the operating system saw it from outside; and beside all of it what a dry run had said.

    python scripts/bench_streaming.py                   # a Llama whose bfloat16 checkpoint is larger than 6 GB
    python scripts/bench_streaming.py --layers 2        # a trial of minutes
    python scripts/bench_streaming.py --shape llama-70b --layers 1
    python scripts/bench_streaming.py --shape mixtral --divide 2 --layers 1
    python scripts/bench_streaming.py --shape llama-70b --dry-run

With `--dry-run` nothing is converted, so that weights are not read: files have a header, and a hole in place of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from random_model import checkpoint_bytes, ensure_model

from accullm_cli.errors import AccullmError
from accullm_cli.run import write_text
from accullm_cli.units import duration, size


@dataclass(frozen=True)
class Benchmark:
    """A model by its sizes, and the resident memory that its whole conversion may take; the reason for streaming."""

    layers: int
    shape: Mapping[str, int]
    target_bytes: int


BENCHMARKS = {
    # 28 blocks of 201 MB and 393 MB of embeddings: 6.03 GB.
    "llama-3b": Benchmark(
        28,
        {
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
        },
        2_500_000_000,
    ),
    "llama-70b": Benchmark(
        80,
        {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
        },
        16_000_000_000,
    ),
    "mixtral": Benchmark(
        32,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        16_000_000_000,
    ),
}
# What `--divide` makes smaller: the sides of matrices, and with them the number of heads.
DIVIDED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
# How far the memory that a dry run names may be from what a conversion takes.
TOLERANCE = 0.15
SECONDS_BETWEEN_LOOKS = 0.05


@dataclass(frozen=True)
class StageFigures:
    """One stage of the conversion. peak_bytes: resident memory, as the stage itself recorded it."""

    name: str
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Foreseen:
    """What a dry run names, and what it took itself."""

    peak_bytes: int
    disk_bytes: int
    artifact_bytes: int
    seconds: float
    own_peak_bytes: int
    own_seconds: float


@dataclass(frozen=True)
class Figures:
    """What a conversion took.

    checkpoint_bytes: size of the source's weight files.
    observed_peak_bytes: the largest VmHWM (resident memory's high-water mark) that was seen from outside.
    """

    layers: int
    checkpoint_bytes: int
    target_bytes: int
    seconds: float
    observed_peak_bytes: int
    stages: tuple[StageFigures, ...]
    foreseen: Foreseen
    command: tuple[str, ...]

    @property
    def peak_bytes(self) -> int:
        """The larger of what the stages recorded and what was seen from outside."""
        return max([self.observed_peak_bytes, *(stage.peak_bytes for stage in self.stages)])


def main(arguments: list[str] | None = None) -> int:
    """Write the model where there is none, convert it, print and keep the figures; returns the exit code."""
    options = parse(arguments)
    try:
        chosen = BENCHMARKS[options.shape]
        shape = {key: size // options.divide if key in DIVIDED else size for key, size in chosen.shape.items()}
        layers = options.layers or chosen.layers
        shape["num_hidden_layers"] = layers
        name = f"{options.shape.partition('-')[0]}-{shape['hidden_size']}-{layers}-layers"
        if options.dry_run:
            model = options.work / f"{name}-without-weights"
            ensure_model(model, shape, with_weights=False)
            text = render_foreseen(foresee(options, model), checkpoint_bytes(shape), layers)
        else:
            model = options.work / name
            ensure_model(model, shape)
            figures = measure(options, model, layers, chosen.target_bytes)
            text = render(figures)
            write_text(options.work / "streaming.json", json.dumps(asdict(figures), indent=1) + "\n")
        write_text(options.work / "streaming.md", text + "\n")
        print(text)
    except AccullmError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return error.exit_code
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; what it does not know goes to `accullm convert`."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        epilog="Other options are passed on to accullm convert, for instance --rounding nearest.",
    )
    parser.add_argument("--work", type=Path, default=Path("work/bench"), help="directory for everything (work/bench)")
    parser.add_argument("--shape", choices=BENCHMARKS, default="llama-3b", help="sizes of the model (llama-3b)")
    parser.add_argument("--divide", type=int, default=1, help="divide the sides of its matrices by this (1)")
    parser.add_argument("--layers", type=int, help="blocks of the model (as many as its shape has)")
    parser.add_argument("--dry-run", action="store_true", help="convert nothing: what is said before, and how fast")
    parser.add_argument("--samples", type=int, default=8, help="calibration windows (8)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a window (512)")
    parser.add_argument("--validation-windows", type=int, default=2, help="validation windows (2)")
    options, options.passed_on = parser.parse_known_args(arguments)
    if options.layers is not None and options.layers < 1:
        parser.error("--layers must be 1 or more")
    heads = BENCHMARKS[options.shape].shape["num_key_value_heads"]
    if options.divide < 1 or heads % options.divide:
        parser.error(f"--divide must divide the {heads} key and value heads")
    return options


# -- the conversion ----------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, model: Path, layers: int, target_bytes: int) -> Figures:
    """Convert `model` in a process of its own, from the start, and look at its memory all the while.

    Raises:
        AccullmError: the conversion failed.
    """
    foreseen = foresee(options, model)
    command = command_of(options, model)
    seconds, observed, _ = timed([*command, "--fresh"])
    manifest = json.loads((options.work / f"{model.name}.run" / "manifest.json").read_text(encoding="utf-8"))
    return Figures(
        layers=layers,
        checkpoint_bytes=sum(file.stat().st_size for file in model.glob("*.safetensors")),
        target_bytes=target_bytes,
        seconds=round(seconds, 1),
        observed_peak_bytes=observed,
        stages=stages_of(manifest),
        foreseen=foreseen,
        command=("accullm", *command[3:]),
    )


def foresee(options: argparse.Namespace, model: Path) -> Foreseen:
    """Have `accullm convert --dry-run` say what a conversion will take."""
    shutil.rmtree(options.work / f"{model.name}.run", ignore_errors=True)
    seconds, peak, output = timed([*command_of(options, model), "--dry-run", "--json"])
    told = json.loads(output)["dry_run"]
    return Foreseen(
        *(told[key] for key in ("peak_bytes", "disk_bytes", "artifact_bytes", "seconds")), peak, round(seconds, 1)
    )


def command_of(options: argparse.Namespace, model: Path) -> list[str]:
    command = [sys.executable, "-m", "accullm_cli", "convert", str(model)]
    command += ["--out", str(options.work / f"{model.name}-int4"), "--run", str(options.work / f"{model.name}.run")]
    command += ["--samples", str(options.samples), "--seq-len", str(options.seq_len)]
    return [*command, "--validation-windows", str(options.validation_windows), *options.passed_on]


def timed(command: Sequence[str]) -> tuple[float, int, str]:
    """Run a command: its seconds, its peak resident memory in bytes, and what it wrote to its output.

    Raises:
        AccullmError: it failed.
    """
    with tempfile.TemporaryFile() as output:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=output)
        observed = watch(process)
        seconds = time.monotonic() - started
        if process.returncode != 0:
            raise AccullmError(f"accullm convert ended with exit code {process.returncode}", command[4])
        output.seek(0)
        return seconds, observed, output.read().decode()


def watch(process: subprocess.Popen[Any]) -> int:
    """Wait for the end of `process`; the largest resident memory in bytes that the kernel reported of it.

    Every stage resets the high-water mark that it records, so one look at the end would show the last stage alone.
    """
    largest = 0
    while process.poll() is None:
        largest = max(largest, high_water_mark(process.pid))
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return largest


def high_water_mark(pid: int) -> int:
    """VmHWM of a process in bytes; 0 where it is gone or the system does not tell."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), "VmHWM: 0 kB")
    return int(line.split()[1]) * 1024


def stages_of(manifest: Mapping[str, Any]) -> tuple[StageFigures, ...]:
    """The stages in a run's manifest, in the order they run."""
    order = ("reading", "calibrate", "profile", "quantize", "export", "validate")
    records = manifest["stages"]
    names = sorted(
        (name for name in records if name.split()[0] in order), key=lambda name: order.index(name.split()[0])
    )
    return tuple(StageFigures(name, records[name]["seconds"], records[name]["peak_bytes"]) for name in names)


def render(figures: Figures) -> str:
    """The figures as a Markdown table with a sentence above and below."""
    rows = [
        (stage.name, duration(stage.seconds), f"{stage.seconds / figures.layers:.2f} s", size(stage.peak_bytes))
        for stage in figures.stages
    ]
    foreseen = figures.foreseen
    for name, seconds, peak in (
        ("whole process", figures.seconds, figures.observed_peak_bytes),
        ("as the dry run said", foreseen.seconds, foreseen.peak_bytes),
    ):
        rows.append((name, duration(seconds), f"{seconds / figures.layers:.2f} s", size(peak)))
    verdict = "met" if figures.peak_bytes < figures.target_bytes else "NOT MET"
    error = foreseen.peak_bytes / figures.peak_bytes - 1
    foresight = "met" if abs(error) <= TOLERANCE else "NOT MET"
    return (
        f"A checkpoint of {size(figures.checkpoint_bytes)} ({figures.layers} blocks), converted with\n"
        f"`{' '.join(figures.command)}` on {os.cpu_count()} cores:\n\n"
        f"{markdown(('stage', 'time', 'per block', 'peak RSS'), rows)}\n\n"
        f"The dry run said {error:+.0%} of that memory; target within {TOLERANCE:.0%}: {foresight}.\n"
        f"Peak resident memory {size(figures.peak_bytes)}, {figures.peak_bytes / figures.checkpoint_bytes:.0%} of the "
        f"checkpoint; target under {size(figures.target_bytes)}: {verdict}."
    )


def render_foreseen(foreseen: Foreseen, checkpoint_bytes: int, layers: int) -> str:
    """What a dry run said, as a Markdown table, and a sentence on itself."""
    rows = [
        ("peak memory", size(foreseen.peak_bytes)),
        ("disk", size(foreseen.disk_bytes)),
        ("artifact", size(foreseen.artifact_bytes)),
        ("time", duration(foreseen.seconds)),
    ]
    return (
        f"{markdown((f'{layers} blocks, {size(checkpoint_bytes)}', 'as the dry run says'), rows)}\n\n"
        f"It took {foreseen.own_seconds:.1f} s and {size(foreseen.own_peak_bytes)} of memory itself."
    )


def markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ("---",) * len(header), *rows))


if __name__ == "__main__":
    sys.exit(main())
