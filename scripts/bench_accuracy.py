"""Measure what each way of rounding brings on a real model, beside other quantizers: a table and a plot.

Every row is one conversion by `accullm convert` in a process of its own. But for those of an effort, rows share one run
directory, so that the original is run twice: calibrate is up to date for every row but the first, and the first with
gradients. Other tools are rows where `--peer` says which Python they are installed in (see bench_peers.py): same
original, same calibration tokens, same held-out text.

    python scripts/bench_accuracy.py
    python scripts/bench_accuracy.py --model gemma3-270m --samples 4 --validation-windows 2 --rows nearest-64
    python scripts/bench_accuracy.py --rows average-4.4 --append --peer hqq=venvs/hqq/bin/python --peer-rows hqq
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from demo_models import DEMO, MODELS, model_directory, results_directory
from matplotlib.figure import Figure

from accullm_cli.config import Calibration
from accullm_cli.errors import AccullmError
from accullm_cli.report.plots import BLUE, ORANGE, RED, plain_numbers, svg
from accullm_cli.run import write_text
from accullm_cli.units import duration, size

PEERS = Path(__file__).resolve().with_name("bench_peers.py")
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
    seconds, peak_bytes: from the original to the artifact on disk.
    stages: of a conversion, by name; a stage that an earlier row had finished is given as it was measured then.
    command: what was run, to be run again.
    """

    name: str
    label: str
    bits_per_weight: float
    perplexity_original: Measured
    perplexity: Measured
    mean_kl: Measured
    mean_kl_floor: Measured
    kl_p99: Measured
    top1_agreement: Measured
    windows: int
    tokens: int
    seconds: float
    peak_bytes: int
    versions: Mapping[str, str]
    command: tuple[str, ...]
    stages: Mapping[str, StageFigures] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversion:
    """A row that `accullm convert` makes with these flags.

    with_gradients: of all calibration windows.
    has_own_run: it calibrates on other windows, in a run directory of its own.
    """

    name: str
    label: str
    flags: tuple[str, ...]
    with_gradients: bool = False
    has_own_run: bool = False

    def command(self, options: argparse.Namespace) -> tuple[str, ...]:
        """What to type for this row."""
        out = options.out.with_name(f"{options.out.name}-artifacts") / self.name
        run = out.with_name(f"{out.name}.run") if self.has_own_run else run_of(options)
        command = [
            "accullm",
            "convert",
            str(options.model),
            "--out",
            str(out),
            *self.flags,
            "--run",
            str(run),
        ]
        for flag, value in (("--samples", options.samples), ("--validation-windows", options.validation_windows)):
            if value is not None:
                command += [flag, str(value)]
        if self.with_gradients:
            command += ["--gradient-samples", str(options.samples or Calibration().samples)]
        return (*command, *options.passed_on, "--json")

    def measure(self, options: argparse.Namespace) -> Result:
        """Convert in a child process, and read its report.

        Raises:
            AccullmError: the conversion failed.
        """
        command = self.command(options)
        done = subprocess.run(
            [sys.executable, "-m", "accullm_cli", *command[1:]], stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode != 0:
            raise AccullmError(f"accullm convert ended with exit code {done.returncode}", f"row {self.name}")
        return result_of(self, json.loads(done.stdout)["reports"][0], command)


def uniform(name: str, label: str, group_size: int, *flags: str, with_gradients: bool = False) -> Conversion:
    """4 bits for every linear, as integer codes: what each part of rounding brings without levels."""
    flags = (*flags, "--group-size", str(group_size), "--encodings", "integer")
    return Conversion(f"{name}-{group_size}", f"{label}, groups of {group_size}", flags, with_gradients)


def average(bits: float) -> Conversion:
    """Bits, group size and outliers of each linear under one budget."""
    flags = ("--bits", f"{bits:g}", "--outlier-mode", "compensating")
    return Conversion(f"average-{bits:g}", f"average of {bits:g} bits, planned", flags, with_gradients=True)


def effort(name: str) -> Conversion:
    """An average of 4.4 bits with a preset."""
    flags = ("--bits", "4.4", "--effort", name)
    return Conversion(f"effort-{name}", f"average of 4.4 bits, --effort {name}", flags, has_own_run=True)


ROWS: tuple[Conversion, ...] = (
    uniform("nearest", "nearest", 64, "--rounding", "nearest", "--outliers", "0"),
    uniform("feedback", "error feedback", 128, "--outliers", "0"),
    uniform("feedback", "error feedback", 64, "--outliers", "0"),
    uniform("float16", "error feedback, float16 scales", 64, "--outliers", "0", "--scale-bits", "16"),
    uniform("stochastic", "stochastic error feedback", 64, "--rounding", "stochastic", "--outliers", "0"),
    uniform("feedback", "error feedback", 32, "--outliers", "0"),
    uniform("untouched", "error feedback, 0.5% outliers untouched", 64, "--outliers", "0.5%"),
    uniform(
        "compensating",
        "error feedback, 0.5% outliers compensating",
        64,
        "--outliers",
        "0.5%",
        "--outlier-mode",
        "compensating",
    ),
    uniform("rows", "error feedback across columns and rows", 64, "--outliers", "0", with_gradients=True),
    Conversion("default", "the default", ()),
    *(average(bits) for bits in (4.1, 4.25, 4.31, 4.4, 4.62, 4.99)),
    effort("fast"),
    effort("balanced"),
    effort("best"),
)


def main(arguments: list[str] | None = None) -> int:
    """Measure the rows asked for and write the table after each of them; returns the exit code."""
    options = parse(arguments)
    results: list[Result] = []
    try:
        options.model = model_directory(options.model)
        if options.append:
            results = read_results(options.out, options.model.name)
        rows = [row for row in ROWS if row.name in options.rows]
        # Those with gradients last, as they take another calibrate.
        for row in sorted(rows, key=lambda row: row.with_gradients):
            print(f"== {row.label}", file=sys.stderr, flush=True)
            results = replaced(results, [row.measure(options)])
            write_results(options.out, options.model.name, results)
        if options.peer:
            results = replaced(results, measure_peers(options))
            write_results(options.out, options.model.name, results)
    except AccullmError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return error.exit_code
    if results:
        print(render(options.model.name, results))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; what it does not know goes to every `accullm convert`."""
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        epilog="Other options are passed on to accullm convert, for instance --threads 2.",
    )
    parser.add_argument("--model", default=DEMO, help=f"the original: a directory, or {', '.join(MODELS)}")
    parser.add_argument(
        "--out", type=Path, help="path of the results, without .md, .json and .svg (work/bench/MODEL/accuracy)"
    )
    parser.add_argument("--rows", nargs="*", choices=names, default=names, help="rows to measure (all)")
    parser.add_argument("--append", action="store_true", help="keep the other rows that are in OUT.json")
    parser.add_argument("--samples", type=int, help="calibration windows (as accullm's default)")
    parser.add_argument("--validation-windows", type=int, help="validation windows (as accullm's default)")
    parser.add_argument(
        "--peer", metavar="TOOL=PYTHON", action="append", default=[], help="another tool to measure, see bench_peers.py"
    )
    parser.add_argument("--peer-rows", nargs="+", metavar="ROW", default=[], help="its rows (all), see bench_peers.py")
    options, options.passed_on = parser.parse_known_args(arguments)
    options.out = options.out or results_directory(options.model) / "accuracy"
    return options


def run_of(options: argparse.Namespace) -> Path:
    """The run directory of all rows."""
    out: Path = options.out
    return out.with_name(f"{out.name}.run")


def measure_peers(options: argparse.Namespace) -> list[Result]:
    """Every row of every other tool that was named, measured by bench_peers.py.

    Raises:
        AccullmError: it failed.
    """
    out = options.out.with_name("peers")
    command = [str(PEERS), "--model", str(options.model), "--run", str(run_of(options)), "--out", str(out)]
    command += [part for peer in options.peer for part in ("--peer", peer)]
    if options.peer_rows:
        command += ["--rows", *options.peer_rows]
    done = subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        raise AccullmError(f"bench_peers.py ended with exit code {done.returncode}", shlex.join(command))
    return [peer_result(entry) for entry in json.loads(out.with_name("peers.json").read_text())["results"]]


def peer_result(entry: Mapping[str, Any]) -> Result:
    """A line of the table from a line of bench_peers.py."""
    figures = ("perplexity_original", "perplexity", "mean_kl", "mean_kl_floor", "kl_p99", "top1_agreement")
    plain = ("bits_per_weight", "windows", "tokens", "seconds", "peak_bytes", "versions")
    return Result(
        name=f"peer {entry['name']}",
        label=entry["label"],
        command=tuple(entry["command"]),
        **{name: Measured(**entry[name]) for name in figures},
        **{name: entry[name] for name in plain},
    )


def replaced(results: Sequence[Result], new: Sequence[Result]) -> list[Result]:
    """The results with new ones in the place of those of the same name, in the order of the table."""
    names = {result.name for result in new}
    order = [row.name for row in ROWS]
    kept = [result for result in results if result.name not in names]
    return sorted(
        [*kept, *new],
        key=lambda result: (order.index(result.name) if result.name in order else len(order), result.name),
    )


def result_of(row: Conversion, report: Mapping[str, Any], command: Sequence[str]) -> Result:
    """A line of the table from a report of `accullm convert --json`."""
    divergence = next(found for found in report["measurements"] if found["measure"] == "kl")
    fidelity = {figure["name"]: figure["estimate"] for figure in divergence["figures"]}
    counts = dict(divergence["counts"])
    # "validate accullm" has its format's name behind it.
    stages = {
        stage["name"].split()[0]: StageFigures(stage["seconds"], stage["peak_bytes"]) for stage in report["stages"]
    }
    before = [figures for name, figures in stages.items() if name != "validate"]
    return Result(
        name=row.name,
        label=row.label,
        bits_per_weight=report["bits_per_weight"],
        perplexity_original=Measured(**fidelity["perplexity_original"]),
        perplexity=Measured(**fidelity["perplexity"]),
        mean_kl=Measured(**fidelity["mean_kl"]),
        mean_kl_floor=Measured(**fidelity["mean_kl_floor"]),
        kl_p99=Measured(**fidelity["kl_p99"]),
        top1_agreement=Measured(**fidelity["top1_agreement"]),
        windows=counts["windows"],
        tokens=counts["tokens"],
        seconds=sum(figures.seconds for figures in before),
        peak_bytes=max(figures.peak_bytes for figures in before),
        versions=report["versions"],
        command=tuple(command),
        stages=stages,
    )


# -- the table ---------------------------------------------------------------------------------------------


def read_results(out: Path, model: str) -> list[Result]:
    """What an earlier call measured.

    Raises:
        AccullmError: on another model.
    """
    path = out.with_name(f"{out.name}.json")
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    if (measured := content.get("model")) != model:
        raise AccullmError(
            f"has results of {measured or 'an earlier version'}, not of {model}", path, "give another --out"
        )
    return [_from_json(entry) for entry in content["results"]]


def _from_json(entry: Mapping[str, Any]) -> Result:
    stages = {name: StageFigures(**figures) for name, figures in entry["stages"].items()}
    figures = {name: Measured(**value) for name, value in entry.items() if isinstance(value, dict) and "low" in value}
    return Result(**{**entry, **figures, "stages": stages, "command": tuple(entry["command"])})


def write_results(out: Path, model: str, results: Sequence[Result]) -> None:
    """OUT.md, OUT.json and OUT.svg."""
    write_text(out.with_name(f"{out.name}.md"), render(model, results) + "\n")
    content = {"schema_version": 3, "model": model, "results": [asdict(result) for result in results]}
    write_text(out.with_name(f"{out.name}.json"), json.dumps(content, indent=1) + "\n")
    write_text(out.with_name(f"{out.name}.svg"), draw(model, results) + "\n")


def render(model: str, results: Sequence[Result]) -> str:
    """Markdown tables, fidelity and cost, with what they were measured on and the commands."""
    first = results[0]
    versions = ", ".join(f"{name} {version}" for name, version in first.versions.items())
    commands = "\n".join(
        f"    {shlex.join(result.command)}" + ("" if result.stages else f"  # {peer_versions(result)}")
        for result in results
    )
    return (
        f"{model}, measured on {first.tokens:,} tokens in {first.windows} windows of held-out text, 95% confidence "
        f"intervals in brackets.\n"
        f"The original's perplexity is {estimate(first.perplexity_original, '.2f')}; the noise floor of the KL "
        f"(one bfloat16 rounding per block) is {first.mean_kl_floor.value:.1e} nats.\n"
        f"Time and peak resident memory are those from the original to the artifact.\n\n"
        f"{fidelity_table(results)}\n\n"
        f"Time and peak resident memory of each stage ({versions}; calibrate runs once for all rows without gradients, "
        f"and once for the others):\n\n"
        f"{cost_table(results)}\n\n"
        f"The commands:\n\n{commands}"
    )


def peer_versions(result: Result) -> str:
    """ "hqq 0.2.8, torch 2.13.0"."""
    return ", ".join(f"{name} {number}" for name, number in result.versions.items())


def fidelity_table(results: Sequence[Result]) -> str:
    """How faithful each row is."""
    header = ("method", "bits/weight", "perplexity", "mean KL (nats)", "p99 KL", "top-1 agreement", "time", "peak")
    return markdown(
        header,
        [
            (
                result.label,
                f"{result.bits_per_weight:.3f}",
                estimate(result.perplexity, ".2f"),
                estimate(result.mean_kl, ".4f"),
                estimate(result.kl_p99, ".3f"),
                estimate(result.top1_agreement, ".2%"),
                duration(result.seconds),
                size(result.peak_bytes),
            )
            for result in results
        ],
    )


def cost_table(results: Sequence[Result]) -> str:
    """What each stage of each conversion took."""

    def cell(figures: StageFigures | None) -> str:
        return "-" if figures is None else f"{duration(figures.seconds)}, {size(figures.peak_bytes)}"

    rows = [
        (result.label, *(cell(result.stages.get(stage)) for stage in STAGES)) for result in results if result.stages
    ]
    return markdown(("method", *STAGES), rows)


def draw(model: str, results: Sequence[Result]) -> str:
    """Mean KL against bits per weight, with its confidence interval: an <svg> element."""
    planned = sorted(
        (result for result in results if result.name.startswith("average")), key=lambda result: result.bits_per_weight
    )
    others = [result for result in results if result.stages and result not in planned]
    peers = [result for result in results if not result.stages]

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        for series, label, colour, form in (
            (planned, "AccuLLM, an average of bits", BLUE, "o-"),
            (others, "AccuLLM, 4 bits everywhere", ORANGE, "s"),
            (peers, "other tools", RED, "^"),
        ):
            if series:
                values = [result.mean_kl for result in series]
                below = [value.value - value.low for value in values]
                above = [value.high - value.value for value in values]
                bits = [result.bits_per_weight for result in series]
                middle = [value.value for value in values]
                axes.errorbar(
                    bits, middle, (below, above), fmt=form, color=colour, label=label, capsize=2, markersize=4
                )
        for result in [*others, *peers]:
            axes.annotate(f"  {result.label}", (result.bits_per_weight, result.mean_kl.value), fontsize=6, va="center")
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)
        axes.set_xlabel("bits per weight, everything stored for the linears")
        axes.set_ylabel("mean KL (nats per token)")
        axes.legend()

    return svg("accuracy", f"{model}: mean KL against bits per weight", 4.6, fill)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def estimate(measured: Measured, form: str) -> str:
    """A figure and its interval: "0.0660 [0.0600, 0.0720]"."""
    return f"{measured.value:{form}} [{measured.low:{form}}, {measured.high:{form}}]"


if __name__ == "__main__":
    sys.exit(main())
