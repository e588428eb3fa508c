"""Break conversions of a tiny model in every way that a machine can, and hold what becomes of them against one whole.

    python scripts/bench_faults.py                         # 200 kills at random instants, then a sample of operations
    python scripts/bench_faults.py --kills 20 --operations 40
    python scripts/bench_faults.py --only kill --first 117 --kills 1        # one of them again, by its seed

kill: SIGKILL at a random instant of a conversion with settings drawn by the seed (formats, gradients, averages, how
often streams are stored); again until one call ends by itself, with three kills at most in one directory.
operation: SIGKILL just before the n-th operation that changes a directory (a file that is opened to be written, a
rename, a link, a removal), where a random instant seldom hits.
full: the same operation, and each that writes after it, fails for want of space; then there is space again.

Each time the same command must end in the same bytes as a conversion that nobody disturbed, or refuse in one line with
the exit code of a user's error or the machine's. Exit code 3: one did not.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
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
from accullm_cli.pipeline import convert_all
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


@dataclass(frozen=True)
class Ended:
    """How a call ended: its exit code (negative: the signal), and its line."""

    code: int
    line: str = ""


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
    with tempfile.TemporaryDirectory(prefix="accullm-faults-") as scratch:
        place = Path(scratch)
        model = make_model(place / "model")
        whole: dict[int, tuple[dict[str, str], float, int]] = {}
        for kind in options.only:
            for seed in range(options.first, options.first + counts[kind]):
                number = seed % len(SETTINGS)
                if number not in whole:
                    whole[number] = undisturbed(model, place / f"whole-{number}", SETTINGS[number])
                why = disturb(kind, seed, model, place / "out", SETTINGS[number], whole[number])
                if why:
                    faults.append(Fault(kind, seed, why))
                    print(f"{kind} {seed}: {why}", file=sys.stderr, flush=True)
    print(render({kind: counts[kind] for kind in options.only}, faults, time.monotonic() - started))
    return EXIT_NOT_SO if faults else EXIT_OK


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="kills at random instants (200)")
    parser.add_argument("--operations", type=int, default=100, help="operations to be killed at, and to fail (100)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (0)")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="what to do (all)")
    return parser.parse_args(arguments)


def render(counts: Mapping[str, int], faults: Sequence[Fault], seconds: float) -> str:
    """A row for each kind, and a line for each fault."""
    lines = ["| what | times | not survived |", "| --- | --- | --- |"]
    for kind, count in counts.items():
        lines.append(f"| {kind} | {count} | {sum(fault.kind == kind for fault in faults)} |")
    lines += ["", f"In {seconds:.0f} s."]
    lines += [f"{fault.kind}, seed {fault.seed}: {fault.why}" for fault in faults]
    return "\n".join(lines)


# -- one disturbance -----------------------------------------------------------------------------------------------


def undisturbed(model: Path, out: Path, settings: Mapping[str, str]) -> tuple[dict[str, str], float, int]:
    """The bytes of a conversion that nobody disturbed, its seconds, and the operations in it."""
    counted = out.with_name(f"{out.name}.operations")
    started = time.monotonic()
    ended = call(config_of(model, out, settings), count_into=counted)
    if ended.code:
        raise SystemExit(f"an undisturbed conversion failed: {ended.line}")
    return contents(out), time.monotonic() - started, int(counted.read_text())


def disturb(
    kind: str,
    seed: int,
    model: Path,
    out: Path,
    settings: Mapping[str, str],
    whole: tuple[dict[str, str], float, int],
) -> str:
    """Disturb one directory up to three times, then let it be; why it was not survived, or ""."""
    expected, seconds, operations = whole
    draw = random.Random(seed)
    config = config_of(model, out, settings)
    for directory in (out, out.with_name(f"{out.name}.run")):
        shutil.rmtree(directory, ignore_errors=True)
    for _ in range(draw.randint(1, DISTURBED)):
        often = draw.random() < 0.5  # streams are stored behind each block, or never
        if kind == "kill":
            ended = call(config, often, kill_after=draw.uniform(0, 1.1 * seconds))
        else:
            ended = call(config, often, fail_at=draw.randrange(operations), is_full=kind == "full")
        if ended.code == EXIT_FAULT:
            return f"ended as a fault: {ended.line}"
    ended = call(config)
    if ended.code:
        return f"does not resume: {ended.line}"
    found = contents(out)
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return f"other bytes in {', '.join(differing)}" if differing else ""


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
    child = os.fork()
    if child == 0:
        os.close(reads)
        code, line = EXIT_FAULT, "?"
        try:
            streams.SECONDS_BETWEEN_STORES = 0.0 if often else 1e9
            operations = Operations(config, fail_at, is_full)
            try:
                convert_all(config)
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
    return Ended(os.waitstatus_to_exitcode(status), line)


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
    """A Llama of two blocks with random weights, and a tokenizer with a token for each byte."""
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
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(directory)
    return directory


if __name__ == "__main__":
    sys.exit(main())
