"""Measure what each way of rounding brings on a real model: the table of the README.

Every row is one conversion by `accullm convert` in a process of its own. All rows share one run directory, so that
the original is run twice: calibrate is up to date for every row but the first, and the first with gradients.

    python scripts/bench_accuracy.py
    python scripts/bench_accuracy.py --samples 4 --validation-windows 2 --rows nearest --group-sizes 64
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accullm_cli.config import Calibration
from accullm_cli.errors import AccullmError
from accullm_cli.run import write_text
from accullm_cli.units import duration, size

STAGES = ("calibrate", "profile", "quantize", "export", "validate")


@dataclass(frozen=True)
class StageFigures:
    """One stage. peak_bytes: resident memory of the process during it."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Measured:
    """A figure with its 95% confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """One line of the table.

    bits_per_weight: everything stored for the linear weights. mean_kl, kl_p99: KL(original || artifact) in nats.
    stages: by name; a stage that an earlier row had finished is given as it was measured then.
    command: what was run, to be run again.
    """

    name: str
    label: str
    group_size: int
    bits_per_weight: float
    artifact_bytes: int
    perplexity_original: Measured
    perplexity: Measured
    mean_kl: Measured
    mean_kl_floor: Measured
    kl_p99: Measured
    top1_agreement: Measured
    windows: int
    tokens: int
    stages: Mapping[str, StageFigures]
    versions: Mapping[str, str]
    command: tuple[str, ...]


@dataclass(frozen=True)
class Conversion:
    """A row that `accullm convert` makes with these flags.

    with_gradients: of all calibration windows.
    """

    name: str
    label: str
    flags: tuple[str, ...]
    with_gradients: bool = False

    def command(self, options: argparse.Namespace, group_size: int) -> tuple[str, ...]:
        """What to type for this row."""
        out = options.out.with_name(f"{options.out.name}-artifacts") / f"{self.name}-{group_size}"
        command = ["accullm", "convert", str(options.model), "--out", str(out), "--group-size", str(group_size)]
        command += [*self.flags, "--run", str(options.out.with_name(f"{options.out.name}.run"))]
        for flag, value in (("--samples", options.samples), ("--validation-windows", options.validation_windows)):
            if value is not None:
                command += [flag, str(value)]
        if self.with_gradients:
            command += ["--gradient-samples", str(options.samples or Calibration().samples)]
        return (*command, *options.passed_on, "--json")

    def measure(self, options: argparse.Namespace, group_size: int) -> Result:
        """Convert in a child process, and read its report.

        Raises:
            AccullmError: the conversion failed.
        """
        command = self.command(options, group_size)
        done = subprocess.run(
            [sys.executable, "-m", "accullm_cli", *command[1:]], stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode != 0:
            raise AccullmError(f"accullm convert ended with exit code {done.returncode}", f"row {self.name}")
        return result_of(self, group_size, json.loads(done.stdout)["reports"][0], command)


ROWS: tuple[Conversion, ...] = (
    Conversion("nearest", "nearest", ("--rounding", "nearest", "--outliers", "0")),
    Conversion("feedback", "error feedback", ("--rounding", "feedback", "--outliers", "0")),
    Conversion(
        "untouched",
        "error feedback, 0.5% outliers untouched",
        ("--rounding", "feedback", "--outliers", "0.5%", "--outlier-mode", "untouched"),
    ),
    Conversion(
        "compensating",
        "error feedback, 0.5% outliers compensating",
        ("--rounding", "feedback", "--outliers", "0.5%", "--outlier-mode", "compensating"),
    ),
    Conversion(
        "rows",
        "error feedback across columns and rows",
        ("--rounding", "feedback", "--outliers", "0"),
        with_gradients=True,
    ),
    Conversion(
        "average",
        "the same, an average of 4.4 bits planned",
        ("--rounding", "feedback", "--bits", "4.4", "--outlier-mode", "compensating"),
        with_gradients=True,
    ),
)
GROUP_SIZES = (64, 128)


def main(arguments: list[str] | None = None) -> int:
    """Measure the rows asked for and write the table after each of them; returns the exit code."""
    options = parse(arguments)
    results: list[Result] = []
    try:
        rows = [row for row in ROWS if row.name in options.rows]
        # Those with gradients last, as they take another calibrate.
        for row, group_size in sorted(
            itertools.product(rows, options.group_sizes), key=lambda pair: (pair[0].with_gradients, pair[1])
        ):
            print(f"== {row.label}, group size {group_size}", file=sys.stderr, flush=True)
            results.append(row.measure(options, group_size))
            write_results(options.out, results)
    except AccullmError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return error.exit_code
    print(render(results))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; what it does not know goes to every `accullm convert`."""
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        epilog="Other options are passed on to accullm convert, for instance --threads 2.",
    )
    parser.add_argument("--model", type=Path, default=Path("work/smollm2-135m"), help="the original")
    parser.add_argument(
        "--out", type=Path, default=Path("work/bench/accuracy"), help="path of the results, without .md and .json"
    )
    parser.add_argument("--rows", nargs="+", choices=names, default=names, help="rows to measure (all)")
    parser.add_argument("--group-sizes", nargs="+", type=int, default=list(GROUP_SIZES), help="group sizes (64 128)")
    parser.add_argument("--samples", type=int, help="calibration windows (as accullm's default)")
    parser.add_argument("--validation-windows", type=int, help="validation windows (as accullm's default)")
    options, options.passed_on = parser.parse_known_args(arguments)
    return options


def result_of(row: Conversion, group_size: int, report: Mapping[str, Any], command: Sequence[str]) -> Result:
    """A line of the table from a report of `accullm convert --json`."""
    fidelity = report["fidelity"]
    return Result(
        name=row.name,
        label=row.label,
        group_size=group_size,
        bits_per_weight=report["bits_per_weight"],
        artifact_bytes=report["artifact_bytes"],
        perplexity_original=Measured(**fidelity["perplexity_original"]),
        perplexity=Measured(**fidelity["perplexity"]),
        mean_kl=Measured(**fidelity["mean_kl"]),
        mean_kl_floor=Measured(**fidelity["mean_kl_floor"]),
        kl_p99=Measured(**fidelity["kl_p99"]),
        top1_agreement=Measured(**fidelity["top1_agreement"]),
        windows=fidelity["windows"],
        tokens=fidelity["tokens"],
        # "validate accullm" has its format's name behind it.
        stages={
            stage["name"].split()[0]: StageFigures(stage["seconds"], stage["peak_bytes"]) for stage in report["stages"]
        },
        versions=report["versions"],
        command=tuple(command),
    )


# -- the table ---------------------------------------------------------------------------------------------


def write_results(out: Path, results: Sequence[Result]) -> None:
    """OUT.md and OUT.json."""
    write_text(out.with_name(f"{out.name}.md"), render(results) + "\n")
    content = {"schema_version": 1, "results": [asdict(result) for result in results]}
    write_text(out.with_name(f"{out.name}.json"), json.dumps(content, indent=1) + "\n")


def render(results: Sequence[Result]) -> str:
    """Two Markdown tables, fidelity and cost, with what they were measured on and the commands."""
    first = results[0]
    versions = ", ".join(f"{name} {version}" for name, version in first.versions.items())
    commands = "\n".join(f"    {shlex.join(result.command)}" for result in results)
    return (
        f"Measured on {first.tokens:,} tokens in {first.windows} windows of held-out text, 95% confidence intervals "
        f"in brackets.\nThe original's perplexity is {estimate(first.perplexity_original, '.2f')}; the noise floor of "
        f"the KL (one bfloat16 rounding per block) is {first.mean_kl_floor.value:.1e} nats.\n\n"
        f"{fidelity_table(results)}\n\n"
        f"Time and peak resident memory of each stage ({versions}; calibrate runs once for all rows without gradients, "
        f"and once for the others):\n\n"
        f"{cost_table(results)}\n\n"
        f"The commands:\n\n{commands}"
    )


def fidelity_table(results: Sequence[Result]) -> str:
    """How faithful each row is."""
    header = ("rounding", "group", "bits/weight", "perplexity", "mean KL (nats)", "p99 KL", "top-1 agreement", "size")
    return markdown(
        header,
        [
            (
                result.label,
                "row" if result.group_size == -1 else str(result.group_size),
                f"{result.bits_per_weight:.3f}",
                estimate(result.perplexity, ".2f"),
                estimate(result.mean_kl, ".4f"),
                estimate(result.kl_p99, ".3f"),
                estimate(result.top1_agreement, ".2%"),
                size(result.artifact_bytes),
            )
            for result in results
        ],
    )


def cost_table(results: Sequence[Result]) -> str:
    """What each stage of each row took."""

    def cell(figures: StageFigures | None) -> str:
        return "-" if figures is None else f"{duration(figures.seconds)}, {size(figures.peak_bytes)}"

    rows = [
        (result.label, str(result.group_size), *(cell(result.stages.get(stage)) for stage in STAGES))
        for result in results
    ]
    return markdown(("rounding", "group", *STAGES), rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def estimate(measured: Measured, form: str) -> str:
    """A figure and its interval: "0.0660 [0.0600, 0.0720]"."""
    return f"{measured.value:{form}} [{measured.low:{form}}, {measured.high:{form}}]"


if __name__ == "__main__":
    sys.exit(main())
