"""Measure in the programs that people run: our artifacts beside what these programs' users make, at the same bits.

Each client has a Python of its own, and run_client.py runs in it: original and artifact through the client's own loader
and modules, on the same held-out windows. For each tool whose artifacts a client reads, accullm makes one that takes no
more bits for its linears, with embeddings of the same width. Bits are counted alike for all, everything stored. Of each
artifact the client's log-probabilities are held against those of our own reader.

    python -m venv venvs/mlx && venvs/mlx/bin/pip install torch 'mlx[cpu]' mlx-lm
    python -m venv venvs/transformers && venvs/transformers/bin/pip install torch transformers compressed-tensors
    python -m venv venvs/llm-compressor && venvs/llm-compressor/bin/pip install torch llmcompressor
    python -m venv venvs/auto-round && venvs/auto-round/bin/pip install torch auto-round
    python scripts/bench_runtimes.py --samples 32 --windows 8 \\
        --client mlx_lm=venvs/mlx/bin/python --client transformers=venvs/transformers/bin/python \\
        --peer mlx-lm=venvs/mlx/bin/python --peer mlx-lm-gptq=venvs/mlx/bin/python \\
        --peer mlx-lm-dwq=venvs/mlx/bin/python --peer mlx-lm-dynamic=venvs/mlx/bin/python \\
        --peer llm-compressor=venvs/llm-compressor/bin/python --peer auto-round=venvs/auto-round/bin/python

What is not installed is left out, and said. Exit code 3: a client reads one of our artifacts otherwise than we do.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import bench_peers
import numpy as np
import torch
from bench_peers import (
    PEERS,
    Peer,
    Reference,
    interpreter,
    interval,
    lacking,
    missing,
    named_python,
    shared_features,
    unfit,
)
from demo_models import DEMO, MODELS, model_directory, results_directory

from accullm_cli.errors import EXIT_NOT_SO, EXIT_OK, AccullmError
from accullm_cli.formats import open_artifact
from accullm_cli.measure.agreement import Difference, largest_difference
from accullm_cli.measure.result import Estimate
from accullm_cli.measure.statistics import bootstrap_mean
from accullm_cli.run import write_text
from accullm_cli.stages.artifact_weights import open_artifact_decoder
from accullm_cli.stages.reading import logits_by_blocks

RUNNER = Path(__file__).resolve().with_name("run_client.py")
# Of the mean KL of the best tool of its users.
TARGET = 0.5


@dataclass(frozen=True)
class Client:
    """A program that reads artifacts.

    package: what must be importable in its Python. format: what accullm writes for it.
    peers: rows of bench_peers.py whose artifacts it reads.
    with_own: those that it reads with the tool's own package beside it, so in the tool's Python.
    """

    name: str
    package: str
    format: str
    peers: tuple[str, ...]
    with_own: tuple[str, ...] = ()


CLIENTS = (
    Client("mlx_lm", "mlx_lm", "mlx", ("mlx-lm", "mlx-lm-gptq", "mlx-lm-dwq", "mlx-lm-dynamic")),
    Client(
        "transformers",
        "compressed_tensors",
        "compressed-tensors",
        ("llm-compressor-symmetric", "auto-round-50", "auto-round"),
        with_own=("auto-round-50", "auto-round"),
    ),
)


@dataclass(frozen=True)
class Row:
    """One artifact in one client.

    name: "accullm", or the row of bench_peers.py; rival: of ours, the row whose bits it may take.
    bits_per_weight: everything stored for the linears of the blocks, over their weights; embedding_bits the same of
        embedding and head, 16 where they are as in the original.
    mean_kl: KL(original || artifact) in nats, both in the client in float32.
    difference: from our reader, the largest of a log-probability, in nats; agrees: it is that of float32 sums.
    """

    client: str
    name: str
    label: str
    rival: str
    bits_per_weight: float
    embedding_bits: float
    mean_kl: Estimate
    top1_agreement: Estimate
    difference: float
    agrees: bool
    tokens_per_second: float
    versions: Mapping[str, str]
    commands: tuple[tuple[str, ...], ...]


def main(arguments: list[str] | None = None) -> int:
    """Measure every client that is installed; returns the exit code."""
    options = parse(arguments)
    rows: list[Row] = []
    try:
        options.model = model_directory(options.model)
        clients = [client for client in CLIENTS if client.name in options.only and installed(client, options)]
        if not clients:
            return EXIT_OK
        accullm("calibrate", options)
        reference = Reference.open(options.model, run_of(options))
        for client in clients:
            for row in measured(client, options, reference):
                rows.append(row)
                write_results(options, rows)
    except AccullmError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return error.exit_code
    print(render(options, rows))
    return EXIT_OK if all(row.agrees for row in rows if row.name == "accullm") else EXIT_NOT_SO


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; what it does not know goes to `accullm`."""
    names = [client.name for client in CLIENTS]
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        epilog="Other options are passed on to accullm, for instance --effort fast.",
    )
    parser.add_argument("--model", default=DEMO, help=f"the original: a directory, or {', '.join(MODELS)}")
    parser.add_argument(
        "--out", type=Path, help="path of the results, without .md and .json (work/bench/MODEL/runtimes)"
    )
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="clients to measure (all)")
    parser.add_argument("--rows", nargs="*", choices=[peer.name for peer in PEERS], help="tools' rows to measure (all)")
    parser.add_argument(
        "--client", metavar="CLIENT=PYTHON", type=client_python, action="append", default=[],
        help="the Python where a client is installed",
    )  # fmt: skip
    parser.add_argument(
        "--peer", metavar="TOOL=PYTHON", type=interpreter, action="append", default=[],
        help="the Python where a tool is installed, see bench_peers.py",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=128, help="calibration windows, of every tool (128)")
    parser.add_argument("--windows", type=int, default=16, help="validation windows (16)")
    options, options.passed_on = parser.parse_known_args(arguments)
    options.client, options.peer = dict(options.client), dict(options.peer)
    options.out = options.out or results_directory(options.model) / "runtimes"
    return options


def client_python(text: str) -> tuple[str, str]:
    """The value of --client."""
    return named_python(text, "CLIENT", {client.name for client in CLIENTS})


def installed(client: Client, options: argparse.Namespace) -> bool:
    """Whether a client can be run; where it cannot, that is said."""
    python = options.client.get(client.name)
    reason = f"no --client {client.name}=PYTHON was given" if python is None else lacking(python, client.package)
    if reason is not None:
        print(f"{client.name} is left out: {reason}", file=sys.stderr)
    return reason is None


def run_of(options: argparse.Namespace) -> Path:
    """The run directory of all of accullm's artifacts."""
    out: Path = options.out
    return out.with_name(f"{out.name}.run")


def accullm(command: str, options: argparse.Namespace, *flags: str) -> tuple[str, ...]:
    """Run `accullm` on the model; returns what to type for it.

    Raises:
        AccullmError: it failed.
    """
    windows = ("--samples", str(options.samples), "--validation-windows", str(options.windows))
    # An average of bits takes gradients, which calibrate is to have taken before other tools see its text.
    bits = () if "--bits" in flags else ("--bits", "4.5")
    typed = ("accullm", command, str(options.model), "--run", str(run_of(options)), *bits, *flags, *windows)
    typed += ("--other-text", "none", *options.passed_on, "--quiet")
    done = subprocess.run([sys.executable, "-m", "accullm_cli", *typed[1:]], stdout=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        raise AccullmError(f"ended with exit code {done.returncode}", shlex.join(typed))
    return typed


def measured(client: Client, options: argparse.Namespace, reference: Reference) -> Iterator[Row]:
    """Each tool's artifact in a client, and one of ours that takes no more bits.

    Raises:
        AccullmError: something could not be made, or the client failed.
    """
    artifacts = options.out.with_name(f"{options.out.name}-artifacts")
    artifacts.mkdir(parents=True, exist_ok=True)
    windows = artifacts / "windows.npz"
    np.savez(windows, ids=reference.ids[: options.windows].numpy())
    shared = shared_features(reference.source)
    own: dict[tuple[float, float], Row] = {}  # by the bits that they may take
    for peer in (peer for peer in PEERS if peer.name in client.peers):
        if options.rows is not None and peer.name not in options.rows:
            continue
        assert isinstance(peer.group_size, int)
        if (reason := missing(peer, options.peer) or unfit(peer, peer.group_size, shared)) is not None:
            print(f"{client.name}: {peer.name} is left out: {reason}", file=sys.stderr)
            continue
        print(f"== {client.name}: {peer.label}", file=sys.stderr, flush=True)
        made, command = bench_peers.quantized(peer, peer.group_size, options, reference)
        python = options.peer[peer.tool] if peer.name in client.with_own else options.client[client.name]
        theirs = in_client(client, python, options.model, made / "artifact", windows, peer, "", (command,))
        yield theirs
        bits = (theirs.bits_per_weight, theirs.embedding_bits)
        if bits not in own:
            own[bits] = ours(client, options, windows, peer, theirs)
        yield replace(own[bits], rival=peer.name)


def ours(client: Client, options: argparse.Namespace, windows: Path, peer: Peer, theirs: Row) -> Row:
    """An artifact of ours that takes no more bits than another tool's."""
    bits = f"{theirs.bits_per_weight:.4f}"
    flags = ["--bits", bits, "--format", client.format]
    if theirs.embedding_bits < 16:
        flags += ["--embedding-bits", str(int(theirs.embedding_bits))]
    out = windows.with_name(f"{client.format}-{bits}-{theirs.embedding_bits:g}")
    command = accullm("convert", options, "--out", str(out), *flags)
    row = in_client(client, options.client[client.name], options.model, out, windows, None, peer.name, (command,))
    if row.bits_per_weight > theirs.bits_per_weight or row.embedding_bits > theirs.embedding_bits:
        raise AccullmError(f"takes more bits than that of {peer.name}", out)
    return row


def in_client(
    client: Client,
    python: str,
    original: Path,
    artifact: Path,
    windows: Path,
    peer: Peer | None,
    rival: str,
    commands: tuple[tuple[str, ...], ...],
) -> Row:
    """Run an artifact in a client, and hold it against our reader.

    Raises:
        AccullmError: the client failed; its output is beside its result.
    """
    out = windows.with_name(f"{client.name}-{'' if peer is None else peer.name + '-'}{artifact.name}.npz")
    command = (python, str(RUNNER), client.name, "--original", str(original), "--artifact", str(artifact))
    command += ("--windows", str(windows), "--out", str(out))
    log = out.with_suffix(".log")
    with log.open("w") as stream:
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        raise AccullmError(f"ended with exit code {done.returncode}", shlex.join(command), f"read {log}")
    found = np.load(out)
    difference = from_our_reader(artifact, windows, torch.from_numpy(found["logits"]))
    linears, embeddings = stored_bits(artifact)
    return Row(
        client=client.name,
        name="accullm" if peer is None else peer.name,
        label=f"accullm, --format {client.format}" if peer is None else peer.label,
        rival=rival,
        bits_per_weight=linears,
        embedding_bits=embeddings,
        mean_kl=bootstrap_mean(list(torch.from_numpy(found["kl"])), bench_peers.SEED),
        top1_agreement=bootstrap_mean(list(torch.from_numpy(found["agrees"]).double()), bench_peers.SEED),
        difference=difference.nats,
        agrees=difference.is_arithmetic,
        tokens_per_second=float(found["tokens_per_second"]),
        versions=json.loads(str(found["versions"])),
        commands=(*commands, command),
    )


def from_our_reader(artifact: Path, windows: Path, logits: torch.Tensor) -> Difference:
    """Between a client's logits [P, vocabulary] of the first tokens and those of what `accullm validate` runs."""
    ids = torch.from_numpy(np.load(windows)["ids"][:1, : len(logits)])
    return largest_difference(logits_by_blocks(open_artifact_decoder(artifact), ids)[0], logits)


def stored_bits(artifact: Path) -> tuple[float, float]:
    """Everything stored for the linears of the blocks over their weights; the same of embeddings, 16 if kept."""
    opened = open_artifact(artifact)
    embeddings = opened.plan.embeddings
    weights = sum(row.weights for row in embeddings.values())
    stored = sum(map(opened.linear_bytes, embeddings))
    return opened.bits_per_weight, 8 * stored / weights if weights else 16.0


# -- the table -----------------------------------------------------------------------------------------------


def write_results(options: argparse.Namespace, rows: Sequence[Row]) -> None:
    """OUT.md and OUT.json."""
    out: Path = options.out
    write_text(out.with_name(f"{out.name}.md"), render(options, rows) + "\n")
    content = {"schema_version": 1, "results": [asdict(row) for row in rows]}
    write_text(out.with_name(f"{out.name}.json"), json.dumps(content, indent=1) + "\n")


def render(options: argparse.Namespace, rows: Sequence[Row]) -> str:
    """A Markdown table for each client, with how far the target is met, and the commands."""
    parts = [
        f"{Path(options.model).name}, {options.samples} calibration windows for every tool, measured on "
        f"{options.windows} windows of held-out text in the client itself, 95% confidence intervals in brackets."
    ]
    for client in dict.fromkeys(row.client for row in rows):
        own = [row for row in rows if row.client == client]
        versions = ", ".join(f"{name} {number}" for name, number in own[-1].versions.items())
        header = (
            "artifact",
            "bits/weight",
            "of embeddings",
            "mean KL (nats)",
            "top-1 agreement",
            "tokens/s",
            "from our reader (nats)",
        )
        # One of ours may be there for several tools.
        table = dict.fromkeys((header, ("---",) * len(header), *map(_cells, own)))
        lines = [f"| {' | '.join(cells)} |" for cells in table]
        parts += [f"{client} ({versions}):", "\n".join(lines), *_verdict(own)]
    typed = dict.fromkeys(shlex.join(command) for row in rows for command in row.commands)
    return "\n\n".join([*parts, "The commands:", "\n".join(f"    {line}" for line in typed)])


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.label,
        f"{row.bits_per_weight:.3f}",
        f"{row.embedding_bits:.3f}",
        interval(row.mean_kl, ".4f"),
        interval(row.top1_agreement, ".2%"),
        f"{row.tokens_per_second:.1f}",
        f"{row.difference:.1e}" + ("" if row.agrees else ", more than float32 sums differ"),
    )


def _verdict(rows: Sequence[Row]) -> Iterator[str]:
    """What ours lose of what each other tool's lose, at no more bits."""
    for row in rows:
        theirs = next((other for other in rows if other.name == row.rival), None)
        if theirs is not None:
            share = row.mean_kl.value / theirs.mean_kl.value
            met = "met" if share <= TARGET else "NOT MET"
            yield f"{share:.2f} times the mean KL of {theirs.label}; target at most {TARGET:g}: {met}."


if __name__ == "__main__":
    sys.exit(main())
