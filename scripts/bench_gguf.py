"""GGUF files of one size, by llama.cpp and by accullm: which is closer to the original, by llama.cpp's own logits.

llama.cpp quantizes as its users have it do: from the original in bfloat16, with an importance matrix (the mean square
of each input feature) over the same calibration tokens that accullm rounds for. For each of its files accullm makes one
that is no larger. Both are run on the same held-out windows by llama.cpp itself, and so is the original.

    python scripts/bench_gguf.py --model work/smollm2-135m --types Q4_0 Q4_K_M Q5_K_M --json smollm2-135m.json
    python scripts/bench_gguf.py --plot smollm2-135m.json qwen2.5-coder-0.5b.json --out docs/gguf.svg
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from llama_cpp import LlamaCpp
from matplotlib.figure import Figure
from safetensors.torch import load_file

from accullm_cli.formats.base import ModelShape, Parts
from accullm_cli.formats.gguf import FORMAT, Layout
from accullm_cli.model.gguf_programs import architecture_of
from accullm_cli.quant.plan import LinearPlan, Plan
from accullm_cli.report.plots import BLUE, RED, plain_numbers, svg
from accullm_cli.run import write_text

TYPES = ("IQ4_XS", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_K_M")
SPEED_TOKENS = 32
SPEED_TURNS = 5
# What the names of llama.cpp's own files begin with.
THEIRS = "llama.cpp-"


@dataclass(frozen=True)
class Row:
    """One file. bits: of the whole file over all weights. KL in nats per token, towards the original."""

    name: str
    bytes: int
    bits: float
    mean_kl: float
    p99_kl: float
    top1: float
    tokens_per_second: float


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 of float32 [T, vocabulary]."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def measure(llama: LlamaCpp, path: Path, windows: Sequence[list[int]], threads: int) -> Iterator[np.ndarray]:
    """Log-probabilities of a file, window by window."""
    with llama.model(path, len(windows[0]), threads) as model:
        for window in windows:
            yield log_softmax(model.logits(window)).astype(np.float32)


def speeds(llama: LlamaCpp, paths: Sequence[Path], prompt: Sequence[int], threads: int) -> list[float]:
    """Tokens per second of each file, the medians of several turns, in which the files take turns."""
    measured: list[list[float]] = [[] for _ in paths]
    with ExitStack() as open_files:
        models = [open_files.enter_context(llama.model(path, 512, threads)) for path in paths]
        for _ in range(SPEED_TURNS):
            for own, model in zip(measured, models, strict=True):
                own.append(model.tokens_per_second(prompt, SPEED_TOKENS))
    return list(map(median, measured))


def compare(
    llama: LlamaCpp,
    original: Path,
    path: Path,
    weights: int,
    windows: Sequence[list[int]],
    threads: int,
    speed: float,
) -> Row:
    """Both are run window by window, so that only one window's logits are held."""
    divergences, agree = [], []
    with (
        llama.model(original, len(windows[0]), threads) as first,
        llama.model(path, len(windows[0]), threads) as second,
    ):
        for window in windows:
            known, found = log_softmax(first.logits(window)), log_softmax(second.logits(window))
            divergences.append((np.exp(known) * (known - found)).sum(-1))
            agree.append(known.argmax(-1) == found.argmax(-1))
    divergence = np.concatenate(divergences)
    size = path.stat().st_size
    return Row(
        name=path.stem,
        bytes=size,
        bits=8 * size / weights,
        mean_kl=float(divergence.mean()),
        p99_kl=float(np.quantile(divergence, 0.99)),
        top1=100 * float(np.concatenate(agree).mean()),
        tokens_per_second=speed,
    )


def convert(model: Path, out: Path, run: Path, *options: str) -> Path:
    """Convert, and return the GGUF file."""
    accullm("convert", model, run, "--out", str(out), *options)
    return next(out.glob("*.gguf"))


def accullm(command: str, model: Path, run: Path, *options: str) -> None:
    words = [sys.executable, "-m", "accullm_cli", command, str(model), "--format", "gguf", "--run", str(run), *options]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def unquantized(model: Path, directory: Path) -> tuple[Path, Layout]:
    """The original as a GGUF file in its own dtype, and what its tensors are called."""
    from transformers import AutoConfig

    from accullm_cli.model.checkpoint import Checkpoint
    from accullm_cli.model.skeleton import build_skeleton
    from accullm_cli.model.source import open_source
    from accullm_cli.model.structure import read_structure

    source = open_source(str(model), directory / "cache")
    skeleton = build_skeleton(source.directory, source.untied)
    structure = read_structure(skeleton)
    checkpoint = Checkpoint(source, skeleton)
    dtype = next(iter(source.tensors.values())).torch_dtype
    linears = {
        slot.name: LinearPlan(slot.name, slot.out_features, slot.in_features, 16, -1, False)
        for slots in structure.slots
        for slot in slots
    }
    kinds = {slot.name: slot.kind for slots in structure.slots for slot in slots}
    tied = skeleton.all_tied_weights_keys
    shapes = {name: tuple(value.shape) for name, value in skeleton.named_parameters() if name not in tied}
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    shape = ModelShape(
        str(config["model_type"]), dtype, kinds, config=config, companions=source.companions, parameters=shapes
    )
    plan = Plan(linears)
    facts = {"source": "original", "source_sha256": source.sha256, "config": {}, "records": []}
    out = directory / "original"
    if not (out / "original.gguf").exists():
        out.mkdir(parents=True, exist_ok=True)
        parts = Parts(config, source.companions, plan, shape, (), checkpoint.outside(()), facts)
        FORMAT.write(out, parts)
    known = AutoConfig.for_model(**config)
    return out / "original.gguf", Layout(shapes, known, architecture_of(known), plan)


def importance(layout: Layout, run: Path) -> Mapping[str, np.ndarray]:
    """The mean square of each linear's input features over the calibration text, by the names in the file."""
    found: dict[str, np.ndarray] = {}
    for path in sorted((run / "calibrate").glob("block-*.safetensors")):
        tensors = load_file(path)
        for key, value in tensors.items():
            if ".damage." not in key or not key.endswith(".32"):
                continue
            number, _, rest = key.partition(".damage.")
            parameter = f"{rest.rpartition('.')[0]}.weight"
            for piece in layout.pieces.get(parameter, ()):
                found[piece.name] = tensors[f"{number}.second_moment"].numpy()
            del value
    return found


def held_out(run: Path, count: int, length: int) -> list[list[int]]:
    """The windows that validate measures on."""
    ids = load_file(run / "reference.safetensors")["ids"]
    assert isinstance(ids, torch.Tensor)
    return [window[:length].tolist() for window in ids[:count]]


def draw(measured: Mapping[str, Sequence[Row]]) -> str:
    """Mean KL against the size of the file, a panel for each model: an <svg> element."""

    def fill(figure: Figure) -> None:
        panels = figure.subplots(1, len(measured), squeeze=False)[0]
        for axes, (model, rows) in zip(panels, measured.items(), strict=True):
            theirs = [row for row in rows if row.name.startswith(THEIRS)]
            ours = [row for row in rows if not row.name.startswith(THEIRS)]
            for series, label, colour, form in ((theirs, "llama.cpp", RED, "^"), (ours, "AccuLLM", BLUE, "o-")):
                ordered = sorted(series, key=lambda row: row.bytes)
                sizes, values = [row.bytes / 1e6 for row in ordered], [row.mean_kl for row in ordered]
                axes.plot(sizes, values, form, color=colour, label=label, markersize=4)
            for row in theirs:
                label, place = row.name.removeprefix(THEIRS), (row.bytes / 1e6, row.mean_kl)
                axes.annotate(label, place, (4, 0), textcoords="offset points", fontsize=6, va="center")
            axes.set_yscale("log")
            plain_numbers(axes.yaxis)
            axes.set_title(model, fontsize=9)
            axes.set_xlabel("size of the file (MB)")
        panels[0].set_ylabel("mean KL (nats per token), by llama.cpp's logits")
        panels[0].legend()

    return svg("gguf", f"Mean KL against the size of GGUF files: {', '.join(measured)}", 4.0, fill)


def read_rows(path: Path) -> list[Row]:
    """What --json wrote."""
    return [Row(**entry) for entry in json.loads(path.read_text())]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("work/smollm2-135m"))
    parser.add_argument("--types", nargs="+", default=list(TYPES), metavar="TYPE")
    parser.add_argument("--work", type=Path, default=Path("work/bench-gguf"))
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--calibration", default="default")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--gradient-samples", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where the rows go as JSON")
    parser.add_argument("--plot", type=Path, nargs="+", metavar="JSON", help="measure nothing; draw what --json wrote")
    parser.add_argument("--out", type=Path, default=Path("docs/gguf.svg"), help="where --plot draws")
    options = parser.parse_args(arguments)
    if options.plot:
        write_text(options.out, draw({path.stem: read_rows(path) for path in options.plot}) + "\n")
        return
    llama = LlamaCpp()
    work = options.work / options.model.name
    work.mkdir(parents=True, exist_ok=True)
    original, layout = unquantized(options.model, work)
    weights = sum(int(np.prod(shape)) for shape in layout.parameters.values())
    run = work / "run"
    settings = ["--calibration", options.calibration]
    settings += ["--samples", str(options.samples), "--gradient-samples", str(options.gradient_samples)]
    settings += ["--seq-len", str(options.seq_len), "--set", f"validation.windows={options.windows}", "--quiet"]
    rows: list[Row] = []
    print("| file | bytes | bits of all weights | mean KL | p99 | top-1 | tokens/s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    # Its statistics are llama.cpp's importance matrix, too.
    accullm("calibrate", options.model, run, "--bits", "5.0", *settings)
    matrix, windows = importance(layout, run), held_out(run, options.windows, options.seq_len)
    for name in options.types:
        theirs = work / f"{THEIRS}{name}.gguf"
        if not theirs.exists():
            partial = theirs.with_suffix(".partial")
            llama.quantize(original, partial, name, matrix, options.threads)
            partial.rename(theirs)
        ours = convert(options.model, work / f"accullm-{name}", run, "--file-size", str(theirs), *settings)
        if ours.stat().st_size > theirs.stat().st_size:
            raise SystemExit(f"{ours} is larger than {theirs}")
        pair = theirs, ours
        for path, speed in zip(pair, speeds(llama, pair, windows[0][:16], options.threads), strict=True):
            row = compare(llama, original, path, weights, windows, options.threads, speed)
            rows.append(row)
            shown = f"accullm, at most {name}" if path is ours else f"llama.cpp {name}"
            print(
                f"| {shown} | {row.bytes:,} | {row.bits:.3f} | {row.mean_kl:.5f} | {row.p99_kl:.4f} | "
                f"{row.top1:.2f}% | {row.tokens_per_second:.1f} |",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
