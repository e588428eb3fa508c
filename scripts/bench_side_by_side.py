"""Measure how long conversions side by side take, beside one alone, and hold the ratios against the target.

    python scripts/bench_side_by_side.py                       # some ten minutes on two cores
    python scripts/bench_side_by_side.py --counts 2 4
    python scripts/bench_side_by_side.py --repeats 1 --samples 2 --seq-len 64

Each conversion is a process of its own, `accullm convert` as a user would start it: the variables that say how threads
wait are taken out of its environment, so that the command's own choice is measured. The machine must do nothing else.
Exit code 3: some number of them side by side takes longer than the target.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from accullm_cli.cli import WAITING
from accullm_cli.errors import EXIT_NOT_SO, EXIT_OK, AccullmError
from accullm_cli.units import duration

# Conversions that share the cores without loss take as many times as long as one that has them all.
TARGET = 1.15


@dataclass(frozen=True)
class Figures:
    """Wall-clock seconds of each repetition: of one conversion alone, and by number of several until all ended."""

    alone: tuple[float, ...]
    side_by_side: Mapping[int, tuple[float, ...]]

    def ratio(self, count: int) -> float:
        return statistics.median(self.side_by_side[count]) / statistics.median(self.alone)

    @property
    def met(self) -> bool:
        return all(self.ratio(count) <= TARGET * count for count in self.side_by_side)


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert, print the table, return the exit code."""
    options = parse(arguments)
    try:
        figures = measure(options)
    except AccullmError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return error.exit_code
    finally:
        shutil.rmtree(options.work, ignore_errors=True)
    print(render(figures))
    return EXIT_OK if figures.met else EXIT_NOT_SO


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what it does not know goes to `accullm convert`."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        epilog="Other options are passed on to accullm convert, for instance --rounding nearest.",
    )
    parser.add_argument("--model", default="work/smollm2-135m", help="what to convert (work/smollm2-135m)")
    parser.add_argument("--work", type=Path, default=Path("work/bench/side-by-side"), help="a directory to write to")
    parser.add_argument("--counts", type=int, nargs="+", default=[2], help="how many run side by side (2)")
    parser.add_argument("--repeats", type=int, default=3, help="how often; medians count (3)")
    parser.add_argument("--samples", type=int, default=8, help="calibration windows (8)")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens in a window (256)")
    options, options.passed_on = parser.parse_known_args(arguments)
    if options.repeats < 1:
        parser.error("--repeats must be 1 or more")
    if min(options.counts) < 2:
        parser.error("--counts must be 2 or more")
    return options


def measure(options: argparse.Namespace) -> Figures:
    """Convert alone and side by side in turns, so that a change of the machine's speed meets both.

    Raises:
        AccullmError: a conversion failed.
    """
    seconds_of(1, options)  # compiles the loops and reads the model into the page cache
    counts = [1, *options.counts]
    rounds = [[seconds_of(count, options) for count in counts] for _ in range(options.repeats)]
    alone, *others = zip(*rounds, strict=True)
    return Figures(alone, dict(zip(options.counts, others, strict=True)))


def seconds_of(count: int, options: argparse.Namespace) -> float:
    """How long `count` conversions that start together take until the last one is done."""
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    shutil.rmtree(options.work, ignore_errors=True)
    commands = [command_of(options.work / f"artifact-{number}", options) for number in range(count)]
    started = time.monotonic()
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) for command in commands]
    codes = [process.wait() for process in running]
    seconds = time.monotonic() - started
    if any(codes):
        raise AccullmError(f"accullm convert ended with exit code {max(codes)}", options.model)
    print(f"{count} at a time: {duration(seconds)}", file=sys.stderr, flush=True)
    return seconds


def command_of(out: Path, options: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-m", "accullm_cli", "convert", options.model, "--out", str(out), "--quiet"]
    return [*command, "--samples", str(options.samples), "--seq-len", str(options.seq_len), *options.passed_on]


def render(figures: Figures) -> str:
    """The figures as a Markdown table with the verdicts below."""
    rows = [("one alone", figures.alone)]
    rows += [(f"{count} side by side", seconds) for count, seconds in figures.side_by_side.items()]
    lines = ["| conversions | median | each |", "| --- | --- | --- |"]
    lines += [
        f"| {name} | {duration(statistics.median(seconds))} | {', '.join(map(duration, seconds))} |"
        for name, seconds in rows
    ]
    lines.append("")
    for count in figures.side_by_side:
        ratio, target = figures.ratio(count), TARGET * count
        verdict = "met" if ratio <= target else "NOT MET"
        lines.append(f"{count} take {ratio:.2f} times as long as one; target at most {target:g}: {verdict}.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
