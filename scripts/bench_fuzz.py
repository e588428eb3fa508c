"""Damage each kind of file that accullm reads and may not have written, seed by seed, and see what becomes of it.

    python scripts/bench_fuzz.py                                       # 100,000 inputs
    python scripts/bench_fuzz.py --only gguf --first 117 --inputs 1    # one of them again, by its seed

A file's bytes are changed, left out, doubled or cut short, or one or two of its values replaced by what has no business
there; then it is read by the functions that the commands call. Survived is what is read, or refused by the one error
that the console prints as a line. Not survived: any other exception, a crash, more than ten seconds of a CPU, and
whatever leads elsewhere: a file outside of the directory, a pickled class, a program, a connection. Exit code 3: one
was not survived.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from typing import Any

import torch
import transformers
from bench_faults import BASE, make_model
from damaged_gguf import gguf_data, gguf_head, gguf_model
from safetensors.torch import load_file

from accullm_cli.commands.verify import verify
from accullm_cli.config_file import load_config
from accullm_cli.errors import EXIT_NOT_SO, EXIT_OK, AccullmError
from accullm_cli.failure import failure_of
from accullm_cli.formats import open_artifact
from accullm_cli.formats.manifest import read_manifest
from accullm_cli.formats.shards import write_index, write_shard
from accullm_cli.model.gguf import import_gguf
from accullm_cli.model.gguf_file import read_gguf
from accullm_cli.model.json_lines import parse_json_lines
from accullm_cli.model.skeleton import build_skeleton
from accullm_cli.model.source import describe_source
from accullm_cli.model.tokenizer import load_tokenizer, tokenizer_records
from accullm_cli.model.weights import read_weights
from accullm_cli.pipeline import convert
from accullm_cli.zoo.file import read_zoo

# In the place of any value. Counts that are merely large are no damage: such models exist.
HOSTILE: tuple[Any, ...] = (
    *(None, True, -1, 0, 7, 1.5, float("nan"), float("inf"), "", "x", [], {}, [[]], {"": None}),
    *("../secret", "{secret}", "a\0b", "\ud800", "x" * 5000, "models--o--n/blobs/x", [{}], {"a": {"b": []}}),
)
PIECES = (b"\0", b"\xff\xfe", b'"', b"{", b"]", b"!!int ''", b"&a *a", b"9" * 5000)
# Seconds of a CPU that one input may take.
LONGEST = 10
# Inputs that one process takes, so that a crash costs no more.
SLICE = 500
# What nothing that is read may lead to, by the names of Python's audit events.
ELSEWHERE = ("pickle.find_class", "socket.connect", "subprocess.Popen", "os.system", "os.exec")


# -- damage --------------------------------------------------------------------------------------------------------


def damaged_bytes(content: bytes, seed: int) -> bytes:
    """A few bytes changed, left out, doubled or put in; or cut short."""
    draw = random.Random(seed)
    damaged = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(damaged) + 1)
        kind = draw.randrange(5)
        if kind == 0:
            damaged[place : place + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            del damaged[place : place + draw.randint(1, 20)]
        elif kind == 2:
            damaged[place:place] = damaged[place : place + draw.randint(1, 50)]
        elif kind == 3:
            damaged[place:place] = draw.choice(PIECES)
        elif draw.random() < 0.3:
            del damaged[place:]
    return bytes(damaged)


def damaged_values(content: Any, seed: int, secret: Path) -> Any:
    """The same with one or two values anywhere replaced or left out."""
    draw = random.Random(seed)
    damaged = json.loads(json.dumps(content))
    for _ in range(draw.randint(1, 2)):
        places = list(_places(damaged))
        if not places:
            break
        holder, key = draw.choice(places)
        if isinstance(holder, dict) and draw.random() < 0.2:
            del holder[key]
            continue
        value = draw.choice(HOSTILE)
        holder[key] = str(secret) if value == "{secret}" else json.loads(json.dumps(value))
    return damaged


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys)[:200]:
        yield value, key
        yield from _places(value[key])


# -- kinds of files ------------------------------------------------------------------------------------------------

# Damages a file by a seed, and reads it.
Attack = Callable[[int], object]


@dataclass(frozen=True)
class Place:
    """Where files are damaged. model: a checkpoint in shards; secret: a file beside it that nothing may read."""

    directory: Path

    @property
    def model(self) -> Path:
        return self.directory / "model"

    @property
    def secret(self) -> Path:
        return self.directory / "secret"

    def json(self, content: bytes, seed: int) -> bytes:
        """A JSON file, damaged as bytes or as values."""
        if seed % 2:
            return damaged_bytes(content, seed)
        return json.dumps(damaged_values(json.loads(content), seed, self.secret)).encode()


def prepare(directory: Path) -> Place:
    """A checkpoint in four shards, and its neighbour."""
    place = Place(directory.resolve())
    place.secret.write_text("{}")
    make_model(place.model)
    single = place.model / "model.safetensors"
    tensors = load_file(single)
    names = sorted(tensors)
    shards = [place.model / f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    for number, shard in enumerate(shards):
        write_shard(shard, {name: tensors[name] for name in names[number::4]})
    write_index(place.model, shards)
    single.unlink()
    return place


def _file_of_model(place: Place, name: str, read: Callable[[], object]) -> Attack:
    """Of a JSON file of the model, which is whole again after each."""
    path = place.model / name
    content = path.read_bytes()

    def attack(seed: int) -> None:
        try:
            path.write_bytes(place.json(content, seed))
            read()
        finally:
            path.write_bytes(content)

    return attack


def _config(place: Place) -> Attack:
    def read() -> None:
        describe_source(str(place.model), place.directory / "cache")
        build_skeleton(place.model)

    return _file_of_model(place, "config.json", read)


def _weights(place: Place) -> object:
    return read_weights(place.model, {path.name for path in place.model.iterdir()})


def _index(place: Place) -> Attack:
    return _file_of_model(place, "model.safetensors.index.json", lambda: _weights(place))


def _header(place: Place) -> Attack:
    path = place.model / "model-00001-of-00004.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]

    def attack(seed: int) -> None:
        damaged = place.json(header, seed) if seed % 3 else header
        start = struct.pack("<Q", len(damaged)) + damaged
        try:
            path.write_bytes((start if seed % 3 else damaged_bytes(start, seed)) + data)
            _weights(place)
        finally:
            path.write_bytes(content)

    return attack


def _tokenizer(place: Place) -> Attack:
    def read() -> None:
        load_tokenizer(place.model)
        tokenizer_records(place.model)

    own = [_file_of_model(place, name, read) for name in ("tokenizer.json", "tokenizer_config.json")]
    return lambda seed: own[seed // 2 % 2](seed)


def _yaml(place: Place) -> Attack:
    text = 'calibration: {samples: 2, text: "a.txt"}\nplan:\n  bits: 4\n  keep: [a, b]\n'
    text += "validation:\n  require: [mean_kl<=1]\n"
    models = "models:\n  - a/b\n  - {model: c/d, plan: {bits: 3}}\n"
    path = place.directory / "zoo.yaml"

    def attack(seed: int) -> None:
        path.write_bytes(damaged_bytes((text + models * (seed % 2)).encode(), seed))
        if seed % 2:
            read_zoo(path)
        else:
            load_config("m", [path])

    return attack


def _json_lines(place: Place) -> Attack:
    rows = [
        {"messages": [{"role": "user", "content": "a"}], "tools": []},
        {"messages": [{"role": "x", "content": None}]},
    ]

    def attack(seed: int) -> None:
        if seed % 2:
            text = damaged_bytes(json.dumps(rows[0]).encode(), seed).decode(errors="replace")
        else:
            text = "\n".join(json.dumps(damaged_values(row, seed + at, place.secret)) for at, row in enumerate(rows))
        parse_json_lines(text, place.directory / ("a.txt" if seed % 2 else "a.jsonl"))

    return attack


def _manifest(place: Place) -> Attack:
    artifact = place.directory / "artifact"
    if not artifact.exists():
        sets = [*BASE, f"export.out={artifact}", "rounding.method=nearest", "rounding.grid=minmax"]
        convert(load_config(str(place.model), sets=sets))
    path = artifact / "accullm.json"
    content = path.read_bytes()

    def attack(seed: int) -> None:
        try:
            path.write_bytes(place.json(content, seed))
            if seed % 8 < 2:
                verify(artifact)
            else:
                read_manifest(artifact)
        finally:
            path.write_bytes(content)

    return attack


def _gguf_head(place: Place) -> Attack:
    path = place.directory / "a.gguf"
    metadata, tensors = gguf_model()
    head, data = gguf_head(metadata, tensors), gguf_data(tensors)

    def attack(seed: int) -> None:
        if seed % 2:
            content = damaged_bytes(head, seed)
        else:
            damaged = damaged_values([metadata, tensors], seed, place.secret)
            content = gguf_head(*damaged)
        path.write_bytes(content + data)
        for tensor in (file := read_gguf(path)).tensors:
            file.octets(tensor)

    return attack


def _gguf_model(place: Place) -> Attack:
    path, out = place.directory / "model.gguf", place.directory / "imported"
    metadata, tensors = gguf_model()
    data = gguf_data(tensors)

    def attack(seed: int) -> None:
        path.write_bytes(gguf_head(damaged_values(metadata, seed, place.secret), tensors) + data)
        shutil.rmtree(out, ignore_errors=True)
        if seed % 2:
            open_artifact(path)
        else:
            import_gguf(path, out)

    return attack


# By the name of each kind: how it is attacked, and its share of all inputs, smaller where reading takes long.
KINDS: Mapping[str, tuple[Callable[[Place], Attack], float]] = {
    "config.json": (_config, 0.015),
    "index of shards": (_index, 0.12),
    "safetensors header": (_header, 0.15),
    "tokenizer": (_tokenizer, 0.02),
    "YAML": (_yaml, 0.15),
    "JSON Lines": (_json_lines, 0.2),
    "manifest": (_manifest, 0.135),
    "GGUF": (_gguf_head, 0.2),
    "model in GGUF": (_gguf_model, 0.01),
}


# -- attacks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """One that was not survived."""

    kind: str
    seed: int
    why: str


class _TooLong(BaseException):
    """An input took more than LONGEST."""


class Watch:
    """Notes where Python is led while it is on, and stops what takes too long; both stay as long as the process."""

    def __init__(self, secret: Path) -> None:
        self.secret, self.is_on, self.seen = str(secret), False, ""
        sys.addaudithook(self._see)
        signal.signal(signal.SIGPROF, _stop)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        if event in ELSEWHERE:
            self.seen = f"leads to {event}{arguments[:2]}"
        elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            if os.path.realpath(os.fsdecode(arguments[0])) == self.secret:
                self.seen = "reads a file outside of the directory"


def attempt(attack: Attack, seed: int, watch: Watch) -> str:
    """Why an input was not survived, or ""."""
    watch.is_on, watch.seen = True, ""
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    try:
        attack(seed)
    except AccullmError as error:
        line, _ = failure_of(error)
        if "\n" in line:
            return f"a refusal of several lines: {line!r}"
    except _TooLong:
        return f"takes more than {LONGEST} s of a CPU{_where()}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}{_where()}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        watch.is_on = False
    return watch.seen


def _where() -> str:
    """The innermost line of accullm's that the exception went through."""
    frames = traceback.extract_tb(sys.exc_info()[2])
    own = [frame for frame in frames if "accullm_cli" in frame.filename]
    return f" (in {Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""


def in_slices(kind: str, attack: Attack, seeds: range, watch: Watch) -> Iterator[Fault]:
    """Attack in processes of their own, one after another."""
    progress = mmap.mmap(-1, 8)
    while seeds:
        reads, writes = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reads)
            with open(writes, "w", encoding="utf-8", errors="replace") as out:
                for seed in seeds[:SLICE]:
                    progress[:] = struct.pack("<q", seed)
                    if why := attempt(attack, seed, watch):
                        print(json.dumps([seed, why]), file=out, flush=True)
            os._exit(0)
        os.close(writes)
        with open(reads, encoding="utf-8") as pipe:
            for line in pipe:
                yield Fault(kind, *json.loads(line))
        _, status = os.waitpid(child, 0)
        (last,) = struct.unpack("<q", progress[:])
        if code := os.waitstatus_to_exitcode(status):
            yield Fault(kind, last, f"the process ended with {code}")
        seeds = range(last + 1, seeds.stop)


def main(arguments: Sequence[str] | None = None) -> int:
    """Attack, print what became of it, return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="of all kinds together (100,000)")
    parser.add_argument("--first", type=int, default=0, help="the first seed of each kind (0)")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of files (all)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    shares = sum(KINDS[kind][1] for kind in options.only)
    faults: list[Fault] = []
    print("| file | inputs | not survived | milliseconds each |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="accullm-fuzz-") as scratch:
        place = prepare(Path(scratch))
        watch = Watch(place.secret)
        for kind in options.only:
            make, share = KINDS[kind]
            count = round(options.inputs * share / shares)
            attack = make(place)
            attempt(attack, 0, watch)  # whatever is imported late is imported now
            started = time.process_time() + getrusage(RUSAGE_CHILDREN).ru_utime
            found = list(in_slices(kind, attack, range(options.first, options.first + count), watch))
            spent = time.process_time() + getrusage(RUSAGE_CHILDREN).ru_utime - started
            print(f"| {kind} | {count:,} | {len(found)} | {1000 * spent / max(1, count):.2f} |", flush=True)
            faults += found
    print(f"\nAt most {getrusage(RUSAGE_CHILDREN).ru_maxrss / 1e6:.2f} GB of memory.")
    alike = Counter((fault.kind, fault.why) for fault in faults)
    for fault in {(fault.kind, fault.why): fault for fault in reversed(faults)}.values():
        print(f"{fault.kind}, seed {fault.seed} and {alike[fault.kind, fault.why] - 1} more: {fault.why}")
    return EXIT_NOT_SO if faults else EXIT_OK


def _stop(number: int, frame: Any) -> None:
    raise _TooLong


if __name__ == "__main__":
    sys.exit(main())
