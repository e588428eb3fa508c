"""Measure other quantizers as we measure ourselves: same original, same calibration tokens, same held-out text.

Each tool runs in the Python where it is installed; `run_peer.py` has the settings. Tokens and the original's hidden
states are those of a run of ours, whose calibrate stage must be done. Weights are compared as dequantized, in float32;
everything but the linears in the blocks is the original's.

    accullm calibrate work/smollm2-135m --run work/bench/smollm2-135m/accuracy.run
    python scripts/bench_peers.py --peer hqq=venvs/hqq/bin/python --peer auto-round=venvs/auto-round/bin/python
    python scripts/bench_peers.py --model gemma3-270m --rows hqq --peer hqq=venvs/hqq/bin/python

A result that is already there and was made of the same original, tokens and settings is measured again, not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from demo_models import DEMO, MODELS, model_directory, results_directory, with_earlier_config
from safetensors.torch import load_file

from accullm_cli.errors import AccullmError
from accullm_cli.measure.divergence import Divergence
from accullm_cli.measure.result import Estimate, Fidelity
from accullm_cli.model.blocks import Decoder, batches
from accullm_cli.model.checkpoint import Checkpoint
from accullm_cli.model.skeleton import build_skeleton
from accullm_cli.model.source import ModelSource, open_source
from accullm_cli.model.structure import Structure, read_structure
from accullm_cli.progress import silent
from accullm_cli.run import file_sha256, key_of, write_text
from accullm_cli.stages.keyed import facts_of
from accullm_cli.units import duration, size

RUNNER = Path(__file__).resolve().with_name("run_peer.py")
# Of resampling the windows for the confidence intervals.
SEED = 0


# Stands for the largest group size, up to COARSEST, that divides the input features of every linear of the model.
COARSE: Literal["coarse"] = "coarse"
COARSEST = 192


@dataclass(frozen=True)
class Peer:
    """A line of the table: a tool with these flags of run_peer.py.

    package: what must be importable in the tool's Python.
    """

    name: str
    label: str
    tool: str
    package: str
    flags: tuple[str, ...] = ()
    group_size: int | Literal["coarse"] = 64

    def label_with(self, group_size: int) -> str:
        """The label in the table, where groups of 64 are not named."""
        return self.label if group_size == 64 else f"{self.label}, groups of {group_size}"


PEERS = (
    Peer("auto-round", "AutoRound, asymmetric, 200 iterations (default)", "auto-round", "auto_round"),
    Peer("auto-round-50", "AutoRound, asymmetric, 50 iterations", "auto-round", "auto_round", ("--iterations", "50")),
    Peer("llm-compressor", "llm-compressor GPTQ, asymmetric", "llm-compressor", "llmcompressor"),
    Peer(
        "llm-compressor-symmetric",
        "llm-compressor GPTQ, symmetric (preset W4A16)",
        "llm-compressor",
        "llmcompressor",
        ("--symmetric",),
    ),
    Peer("gptqmodel", "GPTQModel, symmetric (default)", "gptqmodel", "gptqmodel", ("--symmetric",)),
    Peer("hqq", "HQQ", "hqq", "hqq"),
    Peer("mlx-lm", "mlx_lm.convert -q", "mlx-lm", "mlx_lm"),
    Peer("mlx-lm-gptq", "mlx_lm.gptq", "mlx-lm-gptq", "mlx_lm"),
    Peer("mlx-lm-dwq", "mlx_lm.dwq, 32 steps of 2 windows", "mlx-lm-dwq", "mlx_lm", ("--iterations", "32")),
    Peer("mlx-lm-dynamic", "mlx_lm.dynamic_quant, 4 and 5 bits", "mlx-lm-dynamic", "mlx_lm"),
    *(
        Peer(f"{name}-{suffix}", label, name, package, group_size=size)
        for suffix, size in (("g32", 32), ("coarse", COARSE))
        for name, label, package in (
            ("auto-round", "AutoRound, asymmetric, 200 iterations (default)", "auto_round"),
            ("llm-compressor", "llm-compressor GPTQ, asymmetric", "llmcompressor"),
        )
    ),
)


@dataclass(frozen=True)
class PeerResult:
    """One measured line; fields that bench_accuracy.Result has too mean the same.

    bits_per_weight: everything the tool stored for the linear weights.
    seconds, peak_bytes: of the tool, from loading the model to the end of saving.
    settings: what the tool was told.
    """

    name: str
    label: str
    group_size: int
    bits_per_weight: float
    perplexity_original: Estimate
    perplexity: Estimate
    mean_kl: Estimate
    mean_kl_floor: Estimate
    kl_p99: Estimate
    top1_agreement: Estimate
    windows: int
    tokens: int
    seconds: float
    peak_bytes: int
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    command: tuple[str, ...]


def main(arguments: list[str] | None = None) -> int:
    """Run and measure every tool that is installed; returns the exit code."""
    options = parse(arguments)
    results: list[PeerResult] = []
    try:
        options.model = model_directory(options.model)
        reference = Reference.open(options.model, options.run)
        for peer, group_size in installed(options, reference):
            print(f"== {peer.label_with(group_size)}", file=sys.stderr, flush=True)
            results.append(measure(peer, group_size, options, reference))
            write_results(options.out, results)
    except AccullmError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return error.exit_code
    if results:
        print(render(results))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    names = [peer.name for peer in PEERS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", default=DEMO, help=f"the original: a directory, or {', '.join(MODELS)}")
    parser.add_argument("--run", type=Path, help="run directory of accullm calibrate (work/bench/MODEL/accuracy.run)")
    parser.add_argument("--out", type=Path, help="path of the results, without .md and .json (work/bench/MODEL/peers)")
    parser.add_argument(
        "--peer",
        metavar="TOOL=PYTHON",
        type=interpreter,
        action="append",
        default=[],
        help=f"the Python where a tool is installed ({', '.join(sorted({peer.tool for peer in PEERS}))})",
    )
    parser.add_argument("--rows", nargs="+", choices=names, default=names, help="rows to measure (all)")
    options = parser.parse_args(arguments)
    options.peer = dict(options.peer)
    results = results_directory(options.model)
    options.run = options.run or results / "accuracy.run"
    options.out = options.out or results / "peers"
    return options


def interpreter(text: str) -> tuple[str, str]:
    """The value of --peer."""
    return named_python(text, "TOOL", {peer.tool for peer in PEERS})


def named_python(text: str, what: str, names: Container[str]) -> tuple[str, str]:
    """A program's name, which must be one of these, and the Python where it is installed, of NAME=PYTHON."""
    name, equals, python = text.partition("=")
    if not equals or name not in names:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}=PYTHON")
    return name, python


def installed(options: argparse.Namespace, reference: Reference) -> Iterator[tuple[Peer, int]]:
    """The rows that were asked for and can be run, each with its group size; a line on stderr for each other one."""
    shared = shared_features(reference.source)
    coarse = coarse_group_size(shared)
    for peer in (peer for peer in PEERS if peer.name in options.rows):
        group_size = coarse if peer.group_size == COARSE else peer.group_size
        if (reason := missing(peer, options.peer) or unfit(peer, group_size, shared)) is not None:
            print(f"{peer.name} is left out: {reason}", file=sys.stderr)
            continue
        yield peer, group_size


def missing(peer: Peer, interpreters: Mapping[str, str]) -> str | None:
    """Why a tool cannot be run; None where it can."""
    python = interpreters.get(peer.tool)
    return f"no --peer {peer.tool}=PYTHON was given" if python is None else lacking(python, peer.package)


def lacking(python: str, package: str) -> str | None:
    """Why nothing can be run in a Python that needs a package; None where it can."""
    if shutil.which(python) is None:
        return f"{python} is no program"
    find = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    if subprocess.run([python, "-c", find], capture_output=True, check=False).returncode != 0:
        return f"{python} has no package {package}"
    return None


def shared_features(source: ModelSource) -> int:
    """The greatest common divisor of the input features of all linears."""
    structure = read_structure(build_skeleton(source.directory, source.untied))
    return math.gcd(*(slot.in_features for slots in structure.slots for slot in slots))


def coarse_group_size(shared: int) -> int:
    """The largest group size, up to COARSEST, that divides `shared`."""
    return max(size for size in range(1, COARSEST + 1) if shared % size == 0)


def unfit(peer: Peer, group_size: int, shared: int) -> str | None:
    """Why a row is nothing for a model; None where it is. Some tools refuse groups that do not divide."""
    if shared % group_size != 0:
        return f"groups of {group_size} do not divide the input features of every linear"
    if peer.group_size == COARSE and group_size <= 64:
        return f"groups of more than {group_size} do not divide the input features of every linear"
    return None


def quantized(
    peer: Peer, group_size: int, options: argparse.Namespace, reference: Reference
) -> tuple[Path, tuple[str, ...]]:
    """Make what one tool makes of the original, where it is not there yet: the directory, and the command.

    Raises:
        AccullmError: the tool failed.
    """
    made = options.out.with_name(f"{options.out.name}-weights")
    out = made / f"{peer.name}-{group_size}"
    settings = ("--group-size", str(group_size), *peer.flags)
    inputs = {"source": reference.source.sha256, "tokens": file_sha256(reference.tokens)}
    model = options.model
    if peer.package == "mlx_lm":
        model = with_earlier_config(model, made / "original")
        inputs["config"] = file_sha256(model / "config.json")
    command = (options.peer[peer.tool], str(RUNNER), peer.tool, "--model", str(model))
    command += ("--tokens", str(reference.tokens), *settings, "--out", str(out))
    make(command, out, key_of({**inputs, "settings": shlex.join((peer.tool, *settings))}))
    return out, command


def measure(peer: Peer, group_size: int, options: argparse.Namespace, reference: Reference) -> PeerResult:
    """Make one tool's weights where they are not there yet, and measure them.

    Raises:
        AccullmError: the tool failed, or did not quantize what it should.
    """
    out, command = quantized(peer, group_size, options, reference)
    made = json.loads((out / "peer.json").read_text())
    fidelity = compare(reference, out / "weights.safetensors")
    return PeerResult(
        name=peer.name,
        label=peer.label_with(group_size),
        group_size=group_size,
        bits_per_weight=made["bits_per_weight"],
        perplexity_original=fidelity.perplexity_original,
        perplexity=fidelity.perplexity,
        mean_kl=fidelity.mean_kl,
        mean_kl_floor=fidelity.mean_kl_floor,
        kl_p99=fidelity.kl_p99,
        top1_agreement=fidelity.top1_agreement,
        windows=fidelity.windows,
        tokens=fidelity.tokens,
        seconds=made["seconds"],
        peak_bytes=made["peak_bytes"],
        versions=made["versions"],
        settings=made["settings"],
        command=command,
    )


def make(command: Sequence[str], out: Path, key: str) -> None:
    """Run a tool, unless `out` holds what was made under the same key: of the same inputs with the same settings.

    What an interrupted run with this key has left there stays, for the tool to go on from.

    Raises:
        AccullmError: it failed; its output is in `out`/log.txt.
    """
    marker, begun = out / "made-by.txt", out / "begun-by.txt"
    if marker.exists() and marker.read_text() == key:
        return
    if not begun.exists() or begun.read_text() != key:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        write_text(begun, key)
    log = out / "log.txt"
    with log.open("w") as stream:
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        raise AccullmError(f"ended with exit code {done.returncode}", shlex.join(command), f"read {log}")
    write_text(marker, key)


# -- measuring -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """The original, and what its calibrate stage left in a run directory.

    tokens: file with "calibration" ids.
    text: what the validation ids were cut from.
    ids: validation, int64 [V, T].
    hidden: the last block's output on them, float32 [V, T, hidden].
    floor: the same with one bfloat16 rounding per block.
    """

    source: ModelSource
    tokens: Path
    text: str
    ids: torch.Tensor
    hidden: torch.Tensor
    floor: torch.Tensor

    @staticmethod
    def open(model: Path, run: Path) -> Reference:
        """Read them.

        Raises:
            AccullmError: calibrate has not run there.
        """
        tokens, states = run / "tokens.safetensors", run / "reference.safetensors"
        if not tokens.exists() or not states.exists():
            raise AccullmError("calibrate has not run", run, f"run accullm calibrate {model} --run {run}")
        stored = load_file(states)
        source = open_source(str(model), run, silent)
        return Reference(source, tokens, facts_of(states)["text"], stored["ids"], stored["hidden"], stored["floor"])


class PeerWeights(Checkpoint):
    """The original's weights with a tool's in place of the linears in the blocks."""

    def __init__(
        self, source: ModelSource, model: Any, structure: Structure, weights: Mapping[str, torch.Tensor]
    ) -> None:
        super().__init__(source, model)
        self._slots = dict(zip(structure.blocks, structure.slots, strict=True))
        self._replacements = weights

    def load(self, prefixes: Iterable[str]) -> None:
        """Put every parameter under these module names into the model, linears dequantized to float32.

        Raises:
            AccullmError: a linear is missing or has another shape.
        """
        for prefix in prefixes:
            super().load([prefix])
            block = self.model.get_submodule(prefix).float()
            for slot in self._slots[prefix]:
                weight = self._replacements.get(slot.name)
                if weight is None or weight.shape != (slot.out_features, slot.in_features):
                    raise AccullmError("was not quantized, or has another shape", slot.name)
                slot.write(block, weight)


@torch.no_grad()
def compare(reference: Reference, weights: Path) -> Fidelity:
    """How far the original with these weights is from the original, on the validation ids."""
    model = build_skeleton(reference.source.directory, reference.source.untied)
    structure = read_structure(model)
    decoder = Decoder(model, PeerWeights(reference.source, model, structure, load_file(weights)), structure)
    decoder.load_outside()
    rows = batches(*reference.ids.shape)
    hidden = torch.cat([decoder.embed(reference.ids[batch]) for batch in rows])
    for index in range(len(decoder.block_names)):
        block = decoder.load_block(index)
        for batch in rows:
            hidden[batch] = decoder.run(index, block, hidden[batch])
        decoder.release_block(index)
    divergence = Divergence()
    for window, ids in enumerate(reference.ids):
        original, peer, floor = (
            decoder.logits(states[window : window + 1])[0] for states in (reference.hidden, hidden, reference.floor)
        )
        divergence.add(original, peer, ids, floor)
    return divergence.finish(reference.text, SEED)


# -- the table -----------------------------------------------------------------------------------------------


def write_results(out: Path, results: Sequence[PeerResult]) -> None:
    """OUT.md and OUT.json."""
    write_text(out.with_name(f"{out.name}.md"), render(results) + "\n")
    content = {"schema_version": 1, "results": [asdict(result) for result in results]}
    write_text(out.with_name(f"{out.name}.json"), json.dumps(content, indent=1) + "\n")


def render(results: Sequence[PeerResult]) -> str:
    """A Markdown table with what it was measured on, the versions and the commands."""
    first = results[0]
    header = ("method", "bits/weight", "perplexity", "mean KL (nats)", "p99 KL", "top-1 agreement", "time", "peak")
    rows = [
        (
            result.label,
            f"{result.bits_per_weight:.3f}",
            interval(result.perplexity, ".2f"),
            interval(result.mean_kl, ".4f"),
            interval(result.kl_p99, ".3f"),
            interval(result.top1_agreement, ".2%"),
            duration(result.seconds),
            size(result.peak_bytes),
        )
        for result in results
    ]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ("---",) * len(header), *rows))
    runs = "\n".join(f"    {shlex.join(result.command)}  # {versions(result)}" for result in results)
    return (
        f"Measured on {first.tokens:,} tokens in {first.windows} windows of held-out text, 95% confidence intervals "
        f"in brackets.\nThe original's perplexity is {interval(first.perplexity_original, '.2f')}.\n\n"
        f"{table}\n\nThe commands:\n\n{runs}"
    )


def versions(result: PeerResult) -> str:
    """ "hqq 0.2.8, torch 2.13.0"."""
    return ", ".join(f"{name} {number}" for name, number in result.versions.items())


def interval(estimate: Estimate, form: str) -> str:
    """A figure and its interval: "0.0660 [0.0600, 0.0720]"."""
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


if __name__ == "__main__":
    sys.exit(main())
