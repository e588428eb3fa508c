"""Measure what calibration's text brings on each kind of text: a conversion for each mixture, paired with the first.

Every row is one conversion by `accullm convert --calibration` in a process of its own; all share one run directory, so
that the original reads each held-out text once. Unknown options are handed on to it.

    python scripts/bench_calibration.py --model work/smollm2-135m --effort fast --samples 32
    python scripts/bench_calibration.py --mixtures packaged self-chat --append --effort fast --samples 32
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from child import report_of
from demo_models import DEMO, MODELS, model_directory, results_directory
from pydantic import TypeAdapter

from accullm_cli.errors import AccullmError
from accullm_cli.measure.result import Estimate
from accullm_cli.measure.statistics import paired_difference
from accullm_cli.run import write_text

MIXTURES = (
    "packaged",
    "default",
    "packaged,self=25%",
    "packaged,self-chat=25%",
    "packaged,chat=25%",
    "packaged,tools=25%",
    "packaged,languages=25%",
    "packaged,documents=25%",
)
KINDS = ("default", "chat", "tools", "languages", "documents")
# What the report calls the texts, and what the table does.
TITLES = {"kl": "prose and code", "other text": "C++"} | {f"other text, {kind}": kind for kind in KINDS[1:]}
SEED = 0


@dataclass(frozen=True)
class Result:
    """One mixture. kl: by text, the mean KL in nats of each window of it."""

    mixture: str
    kl: Mapping[str, tuple[float, ...]]
    command: tuple[str, ...]

    def mean(self, title: str) -> float:
        return sum(self.kl[title]) / len(self.kl[title])


def main(arguments: list[str] | None = None) -> int:
    """Measure every mixture; returns the exit code."""
    options = parse(arguments)
    results = read(options.out) if options.append else {}
    try:
        options.model = model_directory(str(options.model))
        for mixture in options.mixtures:
            print(f"== {mixture}", file=sys.stderr, flush=True)
            results[mixture] = convert(mixture, options)
            write(options, results)
    except AccullmError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return error.exit_code
    print(render(options.model.name, list(results.values())))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", default=DEMO, help=f"the original: a directory, or {', '.join(MODELS)}")
    parser.add_argument("--out", type=Path, help="path of the results, without .md (work/bench/MODEL/calibration)")
    parser.add_argument("--mixtures", nargs="+", default=list(MIXTURES), help="as for --calibration")
    parser.add_argument("--append", action="store_true", help="keep the other rows of an earlier call")
    options, options.passed_on = parser.parse_known_args(arguments)
    options.out = options.out or results_directory(options.model) / "calibration"
    return options


def command_of(mixture: str, options: argparse.Namespace) -> tuple[str, ...]:
    """What to type for a mixture."""
    out = options.out.with_name(f"{options.out.name}-artifacts") / re.sub(r"[^\w.-]+", "-", mixture).strip("-")
    return (
        "accullm", "convert", str(options.model), "--calibration", mixture, "--out", str(out),
        "--run", str(options.out.with_name(f"{options.out.name}.run")), "--other-text", ",".join(KINDS),
        *options.passed_on, "--json",
    )  # fmt: skip


def convert(mixture: str, options: argparse.Namespace) -> Result:
    """Convert in a child process, and read its report.

    Raises:
        AccullmError: the conversion failed.
    """
    command = command_of(mixture, options)
    report = report_of(command, f"mixture {mixture}")
    kl = {}
    for measurement in report["measurements"]:
        if (title := TITLES.get(measurement["measure"])) is not None:
            (samples,) = (samples for samples in measurement["samples"] if samples["figure"] == "mean_kl")
            kl[title] = tuple(samples["values"])
    return Result(mixture, kl, command)


# -- tables ------------------------------------------------------------------------------------------------------


def read(out: Path) -> dict[str, Result]:
    path = out.with_name(f"{out.name}.json")
    content = json.loads(path.read_text()) if path.exists() else {"results": []}
    found = TypeAdapter(list[Result]).validate_python(content["results"])
    return {result.mixture: result for result in found}


def write(options: argparse.Namespace, results: Mapping[str, Result]) -> None:
    """OUT.md and OUT.json."""
    found = list(results.values())
    write_text(options.out.with_name(f"{options.out.name}.md"), render(options.model.name, found) + "\n")
    content = {"schema_version": 1, "results": [asdict(result) for result in found]}
    write_text(options.out.with_name(f"{options.out.name}.json"), json.dumps(content, indent=1) + "\n")


def render(model: str, results: Sequence[Result]) -> str:
    """Markdown: the figures, the paired differences, and the commands."""
    parts = [f"## {model}: mean KL (nats) by calibration text\n", *table(results), "", *differences(results), ""]
    parts += ["```", *(shlex.join(result.command) for result in results), "```"]
    return "\n".join(parts)


def table(results: Sequence[Result]) -> Iterator[str]:
    titles = list(results[0].kl)
    yield f"| calibration | {' | '.join(titles)} | mean | worst |"
    yield f"| --- | {' | '.join('---' for _ in titles)} | --- | --- |"
    for result in results:
        means = [result.mean(title) for title in titles]
        cells = [f"{value:.4f}" for value in (*means, sum(means) / len(means), max(means))]
        yield f"| `{result.mixture}` | {' | '.join(cells)} |"


def differences(results: Sequence[Result]) -> Iterator[str]:
    """In percent of the first mixture's, with intervals of the differences by window; bold beyond chance."""
    first, *others = results
    if not others:
        return
    titles = list(first.kl)
    yield f"| beside `{first.mixture}`, in percent | {' | '.join(titles)} |"
    yield f"| --- | {' | '.join('---' for _ in titles)} |"
    for other in others:
        cells = (percent(paired_difference(other.kl[t], first.kl[t], SEED), first.mean(t)) for t in titles)
        yield f"| `{other.mixture}` | {' | '.join(cells)} |"


def percent(difference: Estimate, whole: float) -> str:
    value, low, high = (f"{100 * bound / whole:+.0f}" for bound in (difference.value, difference.low, difference.high))
    cell = f"{value} [{low}, {high}]"
    return f"**{cell}**" if difference.low > 0 or difference.high < 0 else cell


if __name__ == "__main__":
    sys.exit(main())
