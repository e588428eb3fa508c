"""Measure how many of an original's right answers artifacts keep, by bits per weight: tables and a plot.

Every row is one conversion by `accullm convert --tasks` in a process of its own; all share one run directory, so that
the original answers the items once. Other tools are rows where `--peer` says which Python they are installed in (see
bench_peers.py): same original, same calibration tokens, same items. At equal bits, regressions are paired.

    python scripts/bench_golden.py --model work/smollm2-135m --tasks identifiers,sql,retrieval:easy
    python scripts/bench_golden.py --model work/qwen2.5-coder-0.5b --peer auto-round=venvs/auto-round/bin/python
    python scripts/bench_golden.py --rows nearest default --task-items 20 --threads 2
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bench_peers
from child import report_of
from matplotlib.figure import Figure
from pydantic import TypeAdapter

from accullm_cli.config import Config
from accullm_cli.config_file import load_config
from accullm_cli.errors import AccullmError
from accullm_cli.measure.statistics import mcnemar
from accullm_cli.model.source import open_source
from accullm_cli.model.structure import read_structure
from accullm_cli.progress import silent
from accullm_cli.report.plots import BLUE, ORANGE, svg
from accullm_cli.run import RunDirectory, key_of, write_text
from accullm_cli.stages.answers import JUDGED, answer_items, load_answers, questions_of, task_inputs
from accullm_cli.stages.job import Job
from accullm_cli.stages.measures import retention_of


@dataclass(frozen=True)
class Row:
    """A line of the tables: `accullm convert` with these flags, or another tool."""

    name: str
    label: str
    flags: tuple[str, ...] = ()


PLAIN = ("--group-size", "64", "--outliers", "0", "--scale-bits", "16", "--encodings", "integer")
ROWS = (
    Row("nearest", "rounding to nearest, groups of 64", ("--rounding", "nearest", "--grid", "minmax", *PLAIN)),
    Row(
        "gptq",
        "error feedback alone (GPTQ), groups of 64",
        ("--rounding", "feedback", "--target", "original", "--grid", "minmax", *PLAIN),
    ),
    Row("default", "default: 4 bits and 0.5% outlier features"),
    *(Row(f"average-{bits}", f"average of {bits} bits", ("--bits", str(bits))) for bits in (4.1, 4.31, 4.4, 5.0, 6.0)),
    Row("eight", "8 bits", ("--bits", "8", "--outliers", "0")),
)


OURS = {row.name for row in ROWS}
# Rows of bench_peers.py.
PEER_ROWS = ["auto-round", "llm-compressor", "gptqmodel", "hqq"]


@dataclass(frozen=True)
class Result:
    """What was measured of one row.

    right: answers that the original gets right; lost, won: those that changed. kept: for each of them, in the order of
    the items, whether the artifact keeps it. tasks: by name, (right, lost, won).
    retention, agreement (of whole answers), margin_change: with their 95% intervals. mean_kl: in nats, None for other
    tools, whose KL bench_peers.py measures.
    """

    name: str
    label: str
    bits_per_weight: float
    right: int
    lost: int
    won: int
    retention: tuple[float, float, float] | None
    agreement: tuple[float, float, float] | None
    margin_change: tuple[float, float, float] | None
    mean_kl: float | None
    tasks: Mapping[str, tuple[int, int, int]]
    kept: tuple[float, ...]
    command: tuple[str, ...]


def main(arguments: list[str] | None = None) -> int:
    """Measure every row; returns the exit code."""
    options = parse(arguments)
    results = read(options) if options.append else []
    try:
        for row in (row for row in ROWS if row.name in options.rows):
            print(f"== {row.label}", file=sys.stderr, flush=True)
            results = merged(results, convert(row, options))
            write(options, results)
        for result in of_peers(options):
            results = merged(results, result)
            write(options, results)
    except AccullmError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return error.exit_code
    print(render(results, options))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("work/qwen2.5-coder-0.5b"), help="the original")
    parser.add_argument("--out", type=Path, help="path of the results, without .md; default: work/bench/golden-MODEL")
    parser.add_argument("--tasks", default="default", help="as for accullm convert")
    parser.add_argument("--task-items", type=int, default=200, help="items of each task")
    parser.add_argument("--rows", nargs="*", choices=names, default=names, help="rows to measure")
    parser.add_argument("--append", action="store_true", help="keep the other rows of an earlier call")
    parser.add_argument("--peer", metavar="TOOL=PYTHON", action="append", default=[], help="as for bench_peers.py")
    parser.add_argument("--peer-rows", nargs="+", default=PEER_ROWS, help="its rows")
    options, options.passed_on = parser.parse_known_args(arguments)
    options.out = options.out or Path("work/bench") / f"golden-{options.model.name}"
    return options


def run_of(options: argparse.Namespace) -> Path:
    return options.out.with_name(f"{options.out.name}.run")


# -- our rows --------------------------------------------------------------------------------------------------


def command_of(row: Row, options: argparse.Namespace) -> tuple[str, ...]:
    """What to type for a row."""
    out = options.out.with_name(f"{options.out.name}-artifacts") / row.name
    return (
        "accullm", "convert", str(options.model), "--out", str(out), *row.flags, "--run", str(run_of(options)),
        "--other-text", "none", "--tasks", options.tasks, "--task-items", str(options.task_items),
        *options.passed_on, "--json",
    )  # fmt: skip


def convert(row: Row, options: argparse.Namespace) -> Result:
    """Convert in a child process, and read its report.

    Raises:
        AccullmError: the conversion failed.
    """
    command = command_of(row, options)
    report = report_of(command, f"row {row.name}")
    found = {measurement["measure"]: measurement for measurement in report["measurements"]}
    (divergence,) = (figure for figure in found["kl"]["figures"] if figure["name"] == "mean_kl")
    return result_of(row, report["bits_per_weight"], found["tasks"], divergence["estimate"]["value"], command)


def result_of(
    row: Row, bits_per_weight: float, tasks: Mapping[str, Any], mean_kl: float | None, command: Sequence[str]
) -> Result:
    """A line of the tables from what the measure of tasks found, as JSON."""
    figures = {figure["name"]: figure["estimate"] for figure in tasks["figures"]}
    counts = dict(tasks["counts"])
    samples = {samples["figure"]: samples["values"] for samples in tasks["samples"]}
    rows = {cells[0]: tuple(int(cell) for cell in cells[2:5]) for cells in tasks["tables"][0]["rows"]}
    return Result(
        name=row.name,
        label=row.label,
        bits_per_weight=bits_per_weight,
        right=counts["right"],
        lost=counts["lost"],
        won=counts["won"],
        retention=bounds(figures.get("retention")),
        agreement=bounds(figures.get("agreement")),
        margin_change=bounds(figures.get("margin_change")),
        mean_kl=mean_kl,
        tasks=rows,
        kept=tuple(samples["retention"]),
        command=tuple(command),
    )


def bounds(estimate: Mapping[str, float] | None) -> tuple[float, float, float] | None:
    return None if estimate is None else (estimate["value"], estimate["low"], estimate["high"])


# -- other tools -----------------------------------------------------------------------------------------------


def of_peers(options: argparse.Namespace) -> Iterator[Result]:
    """A result for each tool that is installed; its weights are made where they are not there yet."""
    if not options.peer:
        return
    chosen = bench_peers.parse([
        "--model", str(options.model), "--run", str(run_of(options)), "--out", f"{options.out}-peers",
        "--rows", *options.peer_rows, *(word for peer in options.peer for word in ("--peer", peer)),
    ])  # fmt: skip
    reference = bench_peers.Reference.open(chosen.model, chosen.run)
    for peer, group_size in bench_peers.installed(chosen, reference):
        label = f"{peer.label}, groups of {group_size}"
        print(f"== {label}", file=sys.stderr, flush=True)
        told = bench_peers.measure(peer, group_size, chosen, reference)
        made, _ = bench_peers.quantized(peer, group_size, chosen, reference)
        with job_of(options) as job:
            tasks = tasks_of_weights(job, made / "weights.safetensors", peer.name)
        yield result_of(Row(peer.name, label), told.bits_per_weight, tasks, told.mean_kl.value, told.command)


def tasks_of_weights(job: Job, weights: Path, name: str) -> dict[str, Any]:
    """What the measure of tasks finds of the original with another tool's linears, as JSON."""
    from safetensors.torch import load_file

    from accullm_cli.measure.measurement import Measurement
    from accullm_cli.model.blocks import Decoder
    from accullm_cli.model.skeleton import build_skeleton

    model = build_skeleton(job.source.directory, job.source.untied)
    structure = read_structure(model)
    tensors = load_file(weights)
    decoder = Decoder(model, bench_peers.PeerWeights(job.source, model, structure, tensors), structure)
    key = key_of({**task_inputs(job, JUDGED), "weights": str(weights), "bytes": str(weights.stat().st_mtime_ns)})
    answer_items(job, f"tasks of {name}", key, JUDGED, name, decoder)
    found = retention_of(job, name, JUDGED)
    content: dict[str, Any] = TypeAdapter(Measurement).dump_python(found, mode="json")
    return content


@contextmanager
def job_of(options: argparse.Namespace) -> Iterator[Job]:
    """The run that our rows left, with the items that they were asked."""
    sets = [f"validation.tasks={options.tasks}", f"validation.task_items={options.task_items}"]
    config: Config = load_config(str(options.model), sets=sets)
    run = RunDirectory(run_of(options))
    with run.locked():
        job = Job(config, run, open_source(config.model, run.path, silent), silent)
        questions_of(job, JUDGED)
        load_answers(job, JUDGED, None)
        yield job


# -- tables ----------------------------------------------------------------------------------------------------


def merged(results: Sequence[Result], new: Result) -> list[Result]:
    """The results with a new one in the place of that of its name, by bits."""
    others = [result for result in results if result.name != new.name]
    return sorted([*others, new], key=lambda result: (result.bits_per_weight, result.name))


def read(options: argparse.Namespace) -> list[Result]:
    path = options.out.with_name(f"{options.out.name}.json")
    content = json.loads(path.read_text()) if path.exists() else {"results": []}
    found: list[Result] = TypeAdapter(list[Result]).validate_python(content["results"])
    return found


def write(options: argparse.Namespace, results: Sequence[Result]) -> None:
    """OUT.md, OUT.json and OUT.svg."""
    write_text(options.out.with_name(f"{options.out.name}.md"), render(results, options) + "\n")
    content = {"schema_version": 1, "results": [asdict(result) for result in results]}
    write_text(options.out.with_name(f"{options.out.name}.json"), json.dumps(content, indent=1) + "\n")
    write_text(options.out.with_name(f"{options.out.name}.svg"), plot(results) + "\n")


def render(results: Sequence[Result], options: argparse.Namespace) -> str:
    """Markdown: all together, task by task, and the commands."""
    parts = [f"## {options.model.name}: right answers kept\n", *whole_table(results), "", *task_table(results), ""]
    if paired := list(paired_table(results)):
        parts += [*paired, ""]
    parts += ["```", *(shlex.join(result.command) for result in results), "```"]
    return "\n".join(parts)


def whole_table(results: Sequence[Result]) -> Iterator[str]:
    yield "| method | bits/weight | mean KL | retention | lost | won | change of the margin | whole answers alike |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for result in results:
        kl = "" if result.mean_kl is None else f"{result.mean_kl:.4f}"
        retention = interval(result.retention, ".2%") or f"too few ({result.right} right)"
        yield (
            f"| {result.label} | {result.bits_per_weight:.3f} | {kl} | {retention} | {result.lost} of {result.right} | "
            f"{result.won} | {interval(result.margin_change, '.3f')} | {interval(result.agreement, '.1%')} |"
        )


def task_table(results: Sequence[Result]) -> Iterator[str]:
    """Lost and won of the original's right answers, task by task."""
    names = list(dict.fromkeys(name for result in results for name in result.tasks))
    right = {name: next(result.tasks[name][0] for result in results if name in result.tasks) for name in names}
    yield f"| lost + won | {' | '.join(f'{name} ({right[name]} right)' for name in names)} |"
    yield f"| --- | {' | '.join('---' for _ in names)} |"
    for result in results:
        cells = (result.tasks.get(name) for name in names)
        yield f"| {result.label} | {' | '.join('' if cell is None else f'{cell[1]} + {cell[2]}' for cell in cells)} |"


def paired_table(results: Sequence[Result]) -> Iterator[str]:
    """Each other tool beside the one of our rows that is nearest in bits, on the same answers of the original's."""
    ours = [result for result in results if result.name in OURS]
    others = [result for result in results if result.name not in OURS]
    if not ours or not others:
        return
    yield "| other tool | bits/weight | ours | bits/weight | lost there alone | lost by ours alone | McNemar's p |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for other in others:
        own = min(ours, key=lambda result: abs(result.bits_per_weight - other.bits_per_weight))
        there = sum(kept > also for kept, also in zip(own.kept, other.kept, strict=True))
        here = sum(kept < also for kept, also in zip(own.kept, other.kept, strict=True))
        yield (
            f"| {other.label} | {other.bits_per_weight:.3f} | {own.label} | {own.bits_per_weight:.3f} | "
            f"{there} | {here} | {mcnemar(there, here):.2g} |"
        )


def interval(bounds: Sequence[float] | None, form: str) -> str:
    if bounds is None:
        return ""
    value, low, high = (format(bound, form) for bound in bounds)
    return f"{value} [{low}, {high}]"


def plot(results: Sequence[Result]) -> str:
    """Retention by bits per weight, with its intervals."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for result in results:
            if result.retention is None:
                continue
            value, low, high = (100 * bound for bound in result.retention)
            colour = BLUE if result.name in OURS else ORANGE
            axes.errorbar(result.bits_per_weight, value, [[value - low], [high - value]], fmt="o", color=colour)
            axes.annotate(f"  {result.label}", (result.bits_per_weight, value), fontsize=6, va="center")
        axes.set_xlabel("bits per weight")
        axes.set_ylabel("right answers kept (%)")

    return svg("golden", "Retention by bits per weight", 4.0, draw)


if __name__ == "__main__":
    sys.exit(main())
