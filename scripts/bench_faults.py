"""Break conversions of a tiny model in every way that a machine can, and hold what becomes of them against one whole.

    python scripts/bench_faults.py                         # 200 kills at random instants, then a sample of operations
    python scripts/bench_faults.py --kills 20 --operations 40
    python scripts/bench_faults.py --only kill --first 117 --kills 1        # one of them again, by its seed
    python scripts/bench_faults.py --only kill --first 100 --kills 50       # a part of them

kill: SIGKILL at a random instant of a conversion with settings drawn by the seed (formats, gradients, averages, how
often streams are stored); again until one call ends by itself, with three kills at most in one directory.
operation: SIGKILL just before the n-th operation that changes a directory (a file that is opened to be written, a
rename, a link, a removal), where a random instant seldom hits.
full: the same operation, and each that writes after it, fails for want of space; then there is space again.

Each time the same command must end in the same bytes as a conversion that nobody disturbed, or refuse in one line with
the exit code of a user's error or the machine's. Exit code 3: one did not.

Each conversion is a process of its own, forked from one that has imported everything and read the texts that come with
Python, and its pictures are empty: importing, reading and drawing took most of the time, and leave nothing in a
directory that a later call could stumble over.
"""

from __future__ import annotations

import argparse
import errno
import functools
import gc
import hashlib
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from accullm_cli.config import Config
from accullm_cli.config_file import load_config
from accullm_cli.errors import EXIT_FAULT, EXIT_NOT_SO, EXIT_OK
from accullm_cli.failure import failure_of
from accullm_cli.model import packaged_text
from accullm_cli.pipeline import convert_all
from accullm_cli.progress import Event
from accullm_cli.report import plots
from accullm_cli.stages import streams

KINDS = ("kill", "operation", "full")
# What a conversion may be: each seed takes one of them.
SETTINGS: tuple[Mapping[str, str], ...] = (
    {},
    {"rounding.method": "nearest", "plan.embedding_bits": "8"},
    {"calibration.gradient_samples": "2"},
    {"plan.bits": "4.5", "calibration.gradient_samples": "2"},
    {"export.format": "[accullm, compressed-tensors]", "plan.outliers": "0"},
    {"export.format": "[gptq]", "plan.outliers": "0"},
    {"export.format": "[mlx]", "plan.outliers": "0"},
    {"export.format": "[awq, gptq_v2]", "plan.outliers": "0"},
    {"export.format": "[gguf]", "plan.outliers": "0"},
    {"export.format": "[compressed-tensors]", "plan.outlier_adapter": "true"},
    {"rounding.method": "stochastic", "validation.tasks": "words", "validation.task_items": "2"},
)
BASE = (
    *("calibration.samples=4", "calibration.seq_len=48", "validation.windows=2", "validation.other_text=none"),
    *("plan.group_size=32", "machine.threads=1", "machine.precision=float32"),
)
# Operations that Python tells of before they happen, and that change a directory or a file's content.
CHANGES = ("os.rename", "os.remove", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod")
# Times that a directory is disturbed before a call may end by itself.
DISTURBED = 3
# Where a conversion is before its first stage, and the order of the stages in the table.
OPENING = "before the first stage"
STAGES = (OPENING, "source", "reading", "calibrate", "profile", "quantize", "export", "reference", "validate")


@dataclass(frozen=True)
class Ended:
    """How a call ended: its exit code (negative: the signal), its line, and the last stage that it began."""

    code: int
    line: str = ""
    stage: str = OPENING


@dataclass(frozen=True)
class Fault:
    """One that was not survived."""

    kind: str
    seed: int
    why: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Disturb, print what became of it, return the exit code."""
    options = parse(arguments)
    torch.set_num_threads(1)
    started = time.monotonic()
    counts = {"kill": options.kills, "operation": options.operations, "full": options.operations}
    faults: list[Fault] = []
    hits: dict[str, Counter[str]] = {kind: Counter() for kind in options.only}
    with tempfile.TemporaryDirectory(prefix="accullm-faults-") as scratch:
        place = Path(scratch)
        model = make_model(place / "model")
        get_ready(model, place / "ready")
        whole: dict[int, Whole] = {}
        for kind in options.only:
            for seed in range(options.first, options.first + counts[kind]):
                number = seed % len(SETTINGS)
                if number not in whole:
                    whole[number] = undisturbed(model, place / f"whole-{number}", SETTINGS[number])
                why, stages = disturb(kind, seed, model, place / "out", SETTINGS[number], whole[number])
                hits[kind].update(stages)
                print(
                    f"{kind} {seed} ({', '.join(stages) or 'not hit'}): {why or 'survived'}",
                    file=sys.stderr,
                    flush=True,
                )
                if why:
                    faults.append(Fault(kind, seed, why))
    print(render({kind: counts[kind] for kind in options.only}, hits, faults, time.monotonic() - started))
    return EXIT_NOT_SO if faults else EXIT_OK


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="kills at random instants (200)")
    parser.add_argument("--operations", type=int, default=100, help="operations to be killed at, and to fail (100)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (0)")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="what to do (all)")
    return parser.parse_args(arguments)


def render(counts: Mapping[str, int], hits: Mapping[str, Counter[str]], faults: Sequence[Fault], seconds: float) -> str:
    """A row for each kind, a row for each stage that was hit, and a line for each fault."""
    lines = ["| what | conversions | hit | not survived |", "| --- | --- | --- | --- |"]
    for kind, count in counts.items():
        failed = sum(fault.kind == kind for fault in faults)
        lines.append(f"| {kind} | {count} | {hits[kind].total()} | {failed} |")
    lines += ["", f"| hit in | {' | '.join(counts)} |", f"| --- |{' --- |' * len(counts)}"]
    stages = [*STAGES, *sorted({stage for own in hits.values() for stage in own}.difference(STAGES))]
    lines += [f"| {stage} | {' | '.join(str(hits[kind][stage]) for kind in counts)} |" for stage in stages]
    lines += ["", f"In {seconds:.0f} s."]
    lines += [f"{fault.kind}, seed {fault.seed}: {fault.why}" for fault in faults]
    return "\n".join(lines)


# -- one disturbance -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """A conversion that nobody disturbed: the SHA-256 of its files, its seconds, and the operations in it."""

    hashes: Mapping[str, str]
    seconds: float
    operations: int


def get_ready(model: Path, out: Path) -> None:
    """Import, compile and read here, once, what every conversion would, by a conversion in this process.

    It takes no gradients: torch does not take any in a process forked from one that did.
    """
    for name in ("code", "licences", "held_out_runs"):
        setattr(packaged_text, name, functools.cache(getattr(packaged_text, name)))
    plots._rendered = lambda height, draw: "<svg></svg>"
    convert_all(config_of(model, out, {}))
    gc.collect()
    gc.freeze()


def undisturbed(model: Path, out: Path, settings: Mapping[str, str]) -> Whole:
    """Convert in a process that nobody disturbs."""
    counted = out.with_name(f"{out.name}.operations")
    started = time.monotonic()
    ended = call(config_of(model, out, settings), count_into=counted)
    if ended.code:
        raise SystemExit(f"an undisturbed conversion failed: {ended.line}")
    return Whole(contents(out), time.monotonic() - started, int(counted.read_text()))


def disturb(
    kind: str, seed: int, model: Path, out: Path, settings: Mapping[str, str], whole: Whole
) -> tuple[str, list[str]]:
    """Disturb one directory up to three times, then let it be.

    Returns:
        Why it was not survived, or "", and the stages in which a call was killed or could not write.
    """
    draw = random.Random(seed)
    config = config_of(model, out, settings)
    hit: list[str] = []
    for directory in (out, out.with_name(f"{out.name}.run")):
        shutil.rmtree(directory, ignore_errors=True)
    for _ in range(draw.randint(1, DISTURBED)):
        often = draw.random() < 0.5  # streams are stored behind each block, or never
        if kind == "kill":
            ended = call(config, often, kill_after=draw.uniform(0, 1.1 * whole.seconds))
        else:
            ended = call(config, often, fail_at=draw.randrange(whole.operations), is_full=kind == "full")
        if ended.code == EXIT_FAULT:
            return f"ended as a fault: {ended.line}", hit
        if ended.code:
            hit.append(ended.stage)
    ended = call(config)
    if ended.code:
        return f"does not resume: {ended.line}", hit
    found = contents(out)
    names = sorted(whole.hashes.keys() | found.keys())
    differing = [name for name in names if whole.hashes.get(name) != found.get(name)]
    return f"other bytes in {', '.join(differing)}" if differing else "", hit


def call(
    config: Config,
    often: bool = False,
    kill_after: float | None = None,
    fail_at: int | None = None,
    is_full: bool = False,
    count_into: Path | None = None,
) -> Ended:
    """Convert in a process of its own, which is forked, so that it begins at once."""
    reads, writes = os.pipe()
    board = mmap.mmap(-1, 64)  # what both processes see: the stage, also of one that was killed
    child = os.fork()
    if child == 0:
        os.close(reads)

        def show(event: Event) -> None:
            board[:] = event.stage.partition(" ")[0].encode().ljust(len(board))

        code, line = EXIT_FAULT, "?"
        try:
            streams.SECONDS_BETWEEN_STORES = 0.0 if often else 1e9
            operations = Operations(config, fail_at, is_full)
            try:
                convert_all(config, show)
                code, line = EXIT_OK, ""
            except Exception as error:
                line, code = failure_of(error)
                if code == EXIT_FAULT:
                    line = f"{line}\n{traceback.format_exc()}"
            operations.watches = False
            if count_into is not None:
                count_into.write_text(str(operations.count))
            os.write(writes, line.encode()[:60_000])
        finally:
            os._exit(code)
    os.close(writes)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    with open(reads, "rb") as pipe:
        line = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    stage = board[:].decode().strip(" \0") or OPENING
    return Ended(os.waitstatus_to_exitcode(status), line, stage)


class Operations:
    """Counts this process's operations on the conversion's files from here on; dies or fails at one of them."""

    def __init__(self, config: Config, fail_at: int | None, is_full: bool) -> None:
        self.count, self.watches = 0, True
        self._fail_at, self._is_full = fail_at, is_full
        self._place = str((config.export.out or Path()).parent.resolve())
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.watches or not self._changes(event, arguments):
            return
        self.count += 1
        if self._fail_at is None or self.count <= self._fail_at:
            return
        if not self._is_full:
            os.kill(os.getpid(), signal.SIGKILL)
        if event in ("open", "os.mkdir", "os.link"):  # what is removed or renamed needs no space
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

    def _changes(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, str | bytes | os.PathLike) or not flags & (os.O_WRONLY | os.O_RDWR):
                return False
        elif event in CHANGES:
            path = arguments[0]
        else:
            return False
        return os.path.abspath(os.fsdecode(path)).startswith(self._place) if not isinstance(path, int) else False


# -- what is converted ---------------------------------------------------------------------------------------------


def config_of(model: Path, out: Path, settings: Mapping[str, str]) -> Config:
    return load_config(str(model), sets=[*BASE, f"export.out={out}", *(f"{key}={settings[key]}" for key in settings)])


def contents(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below a directory, by its name."""
    return dict(_hashes(directory))


def _hashes(directory: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            yield path.relative_to(directory).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()


def make_model(directory: Path) -> Path:
    """A Llama of two blocks with random weights, and a tokenizer of bytes with one merge, as llama.cpp wants one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**shape, num_key_value_heads=2, vocab_size=260, max_position_embeddings=1024)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
    model.to(torch.bfloat16).save_pretrained(directory)
    vocabulary = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary["er"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("e", "r")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(directory)
    return directory


if __name__ == "__main__":
    sys.exit(main())
