"""Convert a tiny random model of every architecture of the installed transformers, and hold the artifact against it.

Each model is made, converted by the command's own entry point, and loaded as a user would load it: the class that its
configuration names, by `from_pretrained`, original and artifact, both whole. Nothing of how this tool reads a model
is used for that, so that a mistake in its reading shows. Each step is a process of its own, forked from this one, so
that the libraries are imported once.

    python scripts/bench_architectures.py                         # a dozen of different kinds
    python scripts/bench_architectures.py qwen3_next llama4_text
    python scripts/bench_architectures.py --all --jobs 2 --markdown docs/architectures.md
    python scripts/bench_architectures.py --all --resume --markdown docs/architectures.md   # only what is missing
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import string
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures_page import Result, page, read_results
from safetensors.torch import load_file
from tiny_architectures import architectures, make_architecture
from tiny_configurations import NOT_BUILT
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import accullm_cli.pipeline  # noqa: F401  here, so that no fork has to import it
from accullm_cli import cli
from accullm_cli.errors import EXIT_OK, EXIT_USAGE
from accullm_cli.model.structure import find_blocks
from accullm_cli.run import write_text

# One of each kind: plain; Conv1D; convolutions with attention; state space; linear attention with experts; latent
# attention with a correction bias; experts [E, K, N]; experts in one matrix; values for each token; a router in a
# module of its own; blocks that run twice; a vision tower.
DOZEN = ("llama", "gpt2", "lfm2", "mamba2", "qwen3_next", "deepseek_v3", "gpt_oss", "dbrx")
DOZEN += ("gemma3n_text", "hunyuan_v1_moe", "dory", "qwen2_5_vl")
SETTINGS = ("--bits", "4", "--group-size", "32", "--samples", "16", "--seq-len", "64", "--validation-windows", "4")
SETTINGS += ("--other-text", "none", "--threads", "1", "--quiet", "--verbose")
SECONDS = 600  # for one step, on a busy machine; alone it takes less than ten
# Sums in another order differ by far less, in float32.
LARGEST_DIFFERENCE = 1e-3  # nats, of one token's log-likelihood
LARGEST_SHARE = 0.02  # of a mean KL
# To a random model all text is alike but for how often its letters recur: here, as in language, some do far more often.
_LETTERS = string.ascii_letters + string.digits
_WEIGHTS = [1 / rank for rank in range(1, len(_LETTERS) + 1)]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Checked:
    """What transformers' own reading of original and artifact showed, beside what the report says.

    reported_kl, true_kl: mean KL in nats, of the report and of both models run whole on the same tokens.
    nearest_kl: that of the same conversion by nearest rounding.
    difference: the largest of the reference's log-likelihoods to that of transformers, in nats.
    share: of the linear weights in blocks, how much was quantized. records: the report's.
    unnamed: matrices that are neither quantized, nor embedding or output head, nor named in a record.
    error: why the artifact cannot be loaded or run; the figures are NaN then.
    """

    reported_kl: float
    true_kl: float
    nearest_kl: float
    difference: float
    share: float
    records: tuple[str, ...]
    unnamed: tuple[str, ...]
    error: str = ""


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for; returns the exit code, 3 where a model came out wrong or failed."""
    options = parse(arguments)
    quieten()
    done = {result.name for result in read_results(options.results)} if options.resume else set()
    names = [name for name in options.names if name not in done]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for result in run_all(names, options.work, options.jobs):
        results.append(result)
        with options.results.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(result)) + "\n")
        print(line(result), flush=True)
    if options.markdown is not None:
        write_text(options.markdown, page(read_results(options.results)))
    return 3 if any(result.verdict in ("wrong", "failed") for result in results) else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="TYPE", help="model types, or variants (falcon:new)")
    parser.add_argument("--all", action="store_true", help="every type of the installed transformers")
    parser.add_argument("--resume", action="store_true", help="leave out what the results have for this transformers")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--work", type=Path, default=Path("work/bench/architectures"), help="for models and artifacts")
    parser.add_argument(
        "--results", type=Path, default=Path("work/bench/architectures.jsonl"), help="a line for each result is added"
    )
    parser.add_argument("--markdown", type=Path, help="write all results here as a page")
    options = parser.parse_args(arguments)
    every = architectures()
    unknown = [name for name in options.names if name not in every]
    if unknown:
        parser.error(f"no tiny model of {', '.join(unknown)}: {NOT_BUILT.get(unknown[0], 'see tiny_architectures.py')}")
    if options.jobs < 1:
        parser.error("--jobs must be 1 or more")
    options.names = options.names or (every if options.all else [name for name in DOZEN if name in every])
    return options


def quieten() -> None:
    """Nothing of transformers but errors; one thread, as forks of a process with several may hang."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


def line(result: Result) -> str:
    """A result on the terminal."""
    figures = "" if result.kl is None else f"KL {result.kl:.4g}, nearest {result.nearest_kl or math.nan:.4g}  "
    return f"{result.name:24s} {result.verdict:10s} {figures}{result.message}"


# -- one model -----------------------------------------------------------------------------------------------


def run_all(names: Sequence[str], work: Path, jobs: int) -> Iterator[Result]:
    """The results as they come."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as executor:
        for future in as_completed([executor.submit(run, name, work) for name in names]):
            yield future.result()


def run(name: str, work: Path) -> Result:
    """Make, convert and check one model, in a directory of its own that is gone afterwards."""
    place = work.resolve() / name.replace(":", "--")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        return _run(name, place)
    finally:
        shutil.rmtree(place)


def _run(name: str, place: Path) -> Result:
    source, artifact, nearest = place / "source", place / "artifact", place / "nearest"
    made = in_child(make_architecture, name, source)
    if isinstance(made, Failure):
        return Result(name, "not built", made.text)
    conversion = convert("convert", place, artifact)
    if conversion.code != EXIT_OK:
        verdict = "refused" if conversion.code == EXIT_USAGE else "failed"
        return Result(name, verdict, conversion.message, conversion.seconds)
    for stage in ("quantize", "export"):
        rounded = convert(stage, place, nearest, "--rounding", "nearest")
        if rounded.code != EXIT_OK:
            return Result(name, "failed", f"{stage} --rounding nearest: {rounded.message}", conversion.seconds)
    checked = in_child(check, place)
    if isinstance(checked, Failure):
        return Result(name, "failed", f"check: {checked.text}", conversion.seconds)
    return replace(judge(name, checked), seconds=conversion.seconds)


def judge(name: str, checked: Checked) -> Result:
    """The verdict on a model that was converted."""
    faults = []
    if checked.error:
        faults.append(f"transformers cannot use the artifact: {checked.error}")
    elif not math.isfinite(checked.true_kl):
        faults.append("the artifact computes no numbers (NaN)")
    elif abs(checked.true_kl - checked.reported_kl) > LARGEST_SHARE * checked.true_kl + 1e-6:
        faults.append(f"the report's mean KL is {checked.reported_kl:.4g}, in truth it is {checked.true_kl:.4g}")
    if not checked.difference <= LARGEST_DIFFERENCE:
        faults.append(f"the reference's log-likelihoods are off by {checked.difference:.2g} nats")
    if checked.unnamed:
        faults.append(f"left in 16 bits without a word: {', '.join(checked.unnamed)}")
    return Result(
        name,
        "wrong" if faults else "right",
        "; ".join(faults),
        kl=checked.reported_kl,
        nearest_kl=checked.nearest_kl,
        share=checked.share,
        records=checked.records,
    )


# -- conversion ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conversion:
    """How `accullm convert` ended: exit code, last line on stderr, and seconds of the processor."""

    code: int
    message: str
    seconds: float


def convert(command: str, place: Path, artifact: Path, *flags: str) -> Conversion:
    """Run the entry point for the model in `place`, in a process of its own."""
    texts = []
    for option in ("calibration", "validation-text"):
        text = place / f"{option}.txt"
        text.write_text("".join(random.Random(option).choices(_LETTERS, _WEIGHTS, k=8192)), encoding="utf-8")
        texts += [f"--{option}", str(text)]
    arguments = [command, str(place / "source"), "--out", str(artifact), "--run", str(place / "run")]
    log = place / "log"
    ended = in_child(_convert, [*arguments, *texts, *SETTINGS, *flags], log)
    if isinstance(ended, Failure):
        return Conversion(1, ended.text, SECONDS)
    code, seconds = ended
    lines = [entry for entry in log.read_text(encoding="utf-8").splitlines() if entry.strip()]
    message = (lines[-1] if lines else "").removeprefix("error: ").replace(f"{place}{os.sep}", "")
    if code in (EXIT_OK, EXIT_USAGE):
        return Conversion(code, message, seconds)
    fault = message.partition("; this is a fault of accullm")[0]
    return Conversion(code, f"{fault} ({_last_place(lines)})", seconds)


def _convert(arguments: list[str], log: Path) -> tuple[int, float]:
    with log.open("w", encoding="utf-8") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    started = time.process_time()
    try:
        cli.main(arguments)
    except SystemExit as end:
        sys.stderr.flush()
        return int(end.code or 0), round(time.process_time() - started, 1)


def _last_place(lines: Iterable[str]) -> str:
    """The line of this package that a traceback names last: "quantize.py:272"."""
    places = re.findall(r'File ".*/accullm_cli/(\S+\.py)", line (\d+)', "\n".join(lines))
    return ":".join(places[-1]) if places else ""


@dataclass(frozen=True)
class Failure:
    """A step that did not end as it should."""

    text: str


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own; a Failure where it raises, dies, or takes too long."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(SECONDS):
            process.kill()
            return Failure(f"took longer than {SECONDS} s")
        return receiver.recv()
    except EOFError:
        process.join()
        return Failure(f"the process ended with {signal.Signals(-process.exitcode or 0).name}")
    finally:
        process.join()


def _send(sender: Any, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    # torch makes a fork's thread pool anew at the first call that needs it, which two threads must not be at once.
    torch.set_num_threads(1)
    try:
        sender.send(function(*arguments))
    except Exception as error:  # whatever it is: it is told
        sender.send(Failure(_told(error)))


def _told(error: Exception) -> str:
    """ "KeyError: 'I64' (checkpoint.py:177)"."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"


# -- the check -----------------------------------------------------------------------------------------------


def check(place: Path) -> Checked:
    """Run original and artifacts whole, in the class that the configuration names."""
    import accullm_cli.hf  # noqa: F401  teaches transformers the format, in this process alone

    run_directory, artifact = place / "run", place / "artifact"
    report = json.loads((run_directory / "report" / "accullm" / "report.json").read_text(encoding="utf-8"))
    original = load(place / "source")
    ids = load_file(run_directory / "tokens.safetensors")["validation"]
    expected = logits(original, ids)
    reference = load_file(run_directory / "reference.safetensors")["negative_log_likelihood"]
    likelihood = nn.functional.cross_entropy(expected[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    linears = set(json.loads((artifact / "config.json").read_text())["quantization_config"]["linears"])
    true_kl, nearest_kl, error = math.nan, math.nan, ""
    try:
        true_kl, nearest_kl = (mean_kl(expected, logits(load(made), ids)) for made in (artifact, place / "nearest"))
    except Exception as fault:  # whatever modeling code raises is the finding
        error = _told(fault)
    figures = {
        figure["name"]: figure["estimate"]
        for found in report["measurements"]
        for figure in found["figures"]
        if found["judged"]
    }
    return Checked(
        reported_kl=figures["mean_kl"]["value"],
        true_kl=true_kl,
        nearest_kl=nearest_kl,
        difference=float((likelihood - reference).abs().max()),
        share=quantized_share(original, linears),
        records=tuple(report["records"]),
        unnamed=unnamed(original, linears, report["records"]),
        error=error,
    )


def load(directory: Path) -> PreTrainedModel:
    """A model in float32, as a user of transformers loads it."""
    kind = getattr(transformers, AutoConfig.from_pretrained(directory).architectures[0])
    return kind.from_pretrained(directory, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Of windows [V, T], each run on its own; float32 [V, T, vocabulary]."""
    return torch.cat([model(input_ids=window[None], use_cache=False).logits.float() for window in ids])


def mean_kl(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """KL(expected || actual) in nats, of all positions."""
    p, q = (values.double().log_softmax(-1) for values in (expected, actual))
    return float((p.exp() * (p - q)).sum(-1).mean())


def quantized_share(model: PreTrainedModel, linears: set[str]) -> float:
    """Of the weights of linear layers and stacks of experts in blocks, how much was quantized."""
    prefixes = tuple(f"{block}." for block in find_blocks(model))
    total = quantized = 0
    for name, module, parameter in matrices(model):
        done = is_quantized(name, linears)
        stacked = parameter.dim() == 3 and not isinstance(module, _CONVOLUTIONS)
        if name.startswith(prefixes) and (done or stacked or isinstance(module, nn.Linear | Conv1D)):
            total += parameter.numel()
            quantized += done * parameter.numel()
    return quantized / max(1, total)


def unnamed(model: PreTrainedModel, linears: set[str], records: Sequence[str]) -> tuple[str, ...]:
    """Matrices that stay as they are, and no record says so; alike ones once, with * for numbers."""
    places = [match[1] for record in records if (match := re.match(r"kept as stored: (\S+) \(", record))]
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    outer = {id(parameter) for module in ends if module is not None for parameter in module.parameters()}
    left: dict[str, None] = {}
    for name, _, parameter in matrices(model):
        general = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name.removesuffix(".weight"))
        named = any(f"{general}.".startswith(f"{place}.") for place in places)
        if not named and id(parameter) not in outer and not is_quantized(name, linears):
            left[general] = None
    return tuple(left)


def matrices(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Every parameter of two and more dimensions, with its module."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            yield name, model.get_submodule(name.rpartition(".")[0]), parameter


def is_quantized(name: str, linears: set[str]) -> bool:
    """Whether a parameter is among the artifact's quantized linears, whole or one expert after the other."""
    return name.removesuffix(".weight") in linears or f"{name}.0" in linears


if __name__ == "__main__":
    sys.exit(main())
