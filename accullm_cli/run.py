"""The run directory: what each stage was made from, whether it is still good, and how files appear in it.

A file appears by write-to-temporary, fsync, rename, so that a process killed at any instant leaves either the
old file or the new one. `manifest.json` says for every finished stage which inputs it was made from (name by
name, so that the reason for running again can name the one that changed) and which files it wrote.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from accullm_cli.errors import AccullmError, MachineError
from accullm_cli.lock import locked

Code = Literal[
    "new",
    "config changed",
    "source changed",
    "input changed",
    "version changed",
    "machine changed",
    "output missing",
    "forced",
    "up to date",
]

# What the hub has of the source beside what was fetched.
HUB_RECORDS = "hub-files.json"
LOCK = ".lock"
MANIFEST = "manifest.json"
# What a run directory holds before its first stage has written anything.
_BEFORE_ANY_STAGE = {LOCK, "run.yaml", "source-hashes.json", HUB_RECORDS}

# The prefix of an input's name tells what kind of change it is.
_CODE_BY_PREFIX: dict[str, Code] = {
    "source": "source changed",
    "version": "version changed",
    "machine": "machine changed",
    "config": "config changed",
}
_CODE_RANK: tuple[Code, ...] = (
    "source changed",
    "version changed",
    "machine changed",
    "config changed",
    "input changed",
)


@dataclass(frozen=True)
class Reason:
    """Why a stage or a block runs, or why it is skipped."""

    code: Code
    detail: str = ""

    @property
    def runs(self) -> bool:
        return self.code != "up to date"

    def __str__(self) -> str:
        return f"{self.code} ({self.detail})" if self.detail else self.code


UP_TO_DATE = Reason("up to date")


def key_of(inputs: Mapping[str, str]) -> str:
    """SHA-256 (hex) over the inputs, sorted by name."""
    return hashlib.sha256(json.dumps(dict(inputs), sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def compare_inputs(before: Mapping[str, str], now: Mapping[str, str]) -> Reason:
    """The reason that the difference between two sets of inputs gives, naming the first input that differs.

    Input names are `kind:name`; the kinds are source, version, machine, config and input. One that came or went is
    named only where no other changed: most often it matters, or no longer does, because of what changed.
    """
    changed = sorted(name for name in before.keys() & now.keys() if before[name] != now[name])
    changed = changed or sorted(before.keys() ^ now.keys())
    if not changed:
        return UP_TO_DATE
    by_code: dict[Code, list[str]] = {}
    for name in changed:
        kind, _, rest = name.partition(":")
        by_code.setdefault(_CODE_BY_PREFIX.get(kind, "input changed"), []).append(rest or kind)
    code = next(code for code in _CODE_RANK if code in by_code)
    return Reason(code, ", ".join(by_code[code]))


@dataclass(frozen=True)
class StageRecord:
    """What the manifest keeps of one finished stage.

    inputs: `kind:name` to value, everything that the stage's outputs depend on.
    outputs: path relative to the run directory to SHA-256.
    seconds: wall clock; peak_bytes: peak resident memory of the process during the stage.
    records: sentences about everything that was treated differently from the plan.
    """

    inputs: dict[str, str]
    outputs: dict[str, str]
    seconds: float
    peak_bytes: int
    records: list[str]
    versions: dict[str, str]

    @property
    def key(self) -> str:
        return key_of(self.inputs)


class RunDirectory:
    """One conversion's working files. Use `locked()` around anything that writes."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    # -- files -------------------------------------------------------------------------------------------

    def file(self, name: str) -> Path:
        return self.path / name

    def check(self) -> None:
        """Refuse a directory that holds something else than a run.

        Raises:
            AccullmError: it is a file, or has files and neither a lock file, which is the first thing in a run, nor a
                manifest, as a copy without hidden files has.
        """
        if self.path.is_file():
            raise AccullmError("is a file, not a directory", self.path, "give another directory with --run")
        is_run = self.file(LOCK).exists() or self.file(MANIFEST).exists()
        if self.path.is_dir() and any(self.path.iterdir()) and not is_run:
            raise AccullmError("holds something else than a run", self.path, "give another directory with --run")

    def remove(self, patterns: Iterable[str]) -> None:
        """Remove the files of these names, in which * stands for anything."""
        for path in [path for pattern in patterns for path in self.path.glob(pattern)]:
            path.unlink()

    @contextmanager
    def removed_if_refused(self) -> Iterator[None]:
        """Leave no directory behind where a refusal comes before anything was computed."""
        try:
            yield
        except AccullmError:
            found = sorted(self.path.iterdir(), key=lambda path: path.name == LOCK)
            if {path.name for path in found} <= _BEFORE_ANY_STAGE:
                with suppress(OSError):  # the refusal is what counts
                    for path in found:  # the lock last: without it, the rest would count as something else than a run
                        path.unlink()
                    self.path.rmdir()
            raise

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run's lock: one process writes to a run directory at a time."""
        with machine_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        hint = "wait for it to end, or give another directory with --run"
        with _made(locked(self.file(LOCK), self.path, hint), self.path):
            yield

    # -- manifest ----------------------------------------------------------------------------------------

    def stages(self) -> dict[str, StageRecord]:
        """The finished stages by name; empty for a new run."""
        path = self.file(MANIFEST)
        if not path.exists():
            return {}
        try:
            content = json.loads(path.read_text())
            return {name: StageRecord(**record) for name, record in content["stages"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AccullmError(
                f"not a manifest of this version ({error})", path, "start over with --fresh, or give another --run"
            ) from None

    def decide(self, stage: str, inputs: Mapping[str, str], force: bool = False) -> Reason:
        """Whether `stage` must run for these inputs, and why."""
        if force:
            return Reason("forced")
        record = self.stages().get(stage)
        if record is None:
            return Reason("new")
        reason = compare_inputs(record.inputs, inputs)
        if reason.runs:
            return reason
        for name in record.outputs:
            if not self.file(name).exists():
                return Reason("output missing", name)
        return UP_TO_DATE

    def finish(self, stage: str, record: StageRecord) -> None:
        """Write `record` into the manifest: from here on the stage counts as done."""
        stages = self.stages()
        stages[stage] = record
        content = {"format_version": 1, "stages": {name: asdict(entry) for name, entry in stages.items()}}
        write_text(self.file(MANIFEST), json.dumps(content, indent=1, sort_keys=True))


@contextmanager
def locked_output(
    directory: Path, hint: str = "wait for it to end, or give another directory with --out"
) -> Iterator[None]:
    """Hold the lock of an artifact's directory, a file beside it: two runs may not write to one place.

    Directories above that were made for it, and are empty in the end, are removed.

    Args:
        hint: what to do where somebody else holds it.

    Raises:
        HeldError: another process writes there.
    """
    made = [parent for parent in directory.absolute().parents if not parent.exists()]
    with machine_errors(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
    lock = directory.with_name(f".{directory.name}{LOCK}")
    try:
        with _made(locked(lock, directory, hint, temporary=True), directory):
            yield
    finally:
        for parent in made:
            with suppress(OSError):  # it is not empty
                parent.rmdir()


@contextmanager
def artifact_held(artifact: Path) -> Iterator[None]:
    """Keep others from replacing an artifact that is measured, and from putting their figures into it meanwhile.

    Raises:
        HeldError: another process writes it, or measures it.
    """
    # A file is of somebody else; and where no lock can be written, no artifact can.
    if artifact.is_dir() and os.access(artifact.resolve().parent, os.W_OK):
        with locked_output(artifact.resolve(), "wait for it to end"):
            yield
    else:
        yield


@contextmanager
def _made(lock: AbstractContextManager[None], directory: Path) -> Iterator[None]:
    """A lock whose making may fail as any file's; what happens while it is held is none of that."""
    with ExitStack() as stack:
        with machine_errors(directory):
            stack.enter_context(lock)
        yield


# -- files that appear at once, or not at all --------------------------------------------------------------


@contextmanager
def machine_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses into one line that names the path and the way out."""
    try:
        yield
    except OSError as error:
        raise machine_error(error, path) from error
    except Exception as error:
        # safetensors reports a full disk as its own exception, with the errno in its text only.
        if type(error).__name__ == "SafetensorError" and "os error" in str(error):
            number = int(str(error).split("os error ")[1].split(")")[0])
            raise machine_error(OSError(number, os.strerror(number)), path) from error
        raise


def machine_error(error: OSError, path: Path) -> MachineError:
    """The refusal for an OSError while writing `path`."""
    if error.errno == errno.ENOSPC:
        free = shutil.disk_usage(existing_parent(path)).free
        return MachineError(
            f"no space left on the disk ({free / 1e6:,.0f} MB free)", path, "free some and run the same command again"
        )
    if error.errno == errno.EDQUOT:  # what the disk has free is not for this user
        return MachineError("the disk quota is used up", path, "free some and run the same command again")
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG):
        what = os.strerror(error.errno)
        return MachineError(f"cannot be written ({what})", path, "give another path with --out or --run")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return MachineError(
            f"cannot be written ({os.strerror(error.errno).lower()})", path, "give a writable path with --out or --run"
        )
    return MachineError(f"cannot be written ({error.strerror or error})", path, "run the same command again to resume")


def existing_parent(path: Path) -> Path:
    """The nearest existing ancestor of `path`, `path` itself included."""
    path = Path(path).absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Make `path` appear at once: `write` fills a temporary file beside it, which is synced and renamed.

    Its mode is what a plain `open` would give, the umask's: safetensors makes files that their owner alone can read.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with machine_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.unlink(missing_ok=True)
            temporary.touch()
            mode = stat.S_IMODE(temporary.stat().st_mode)
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(mode)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_file` for text in UTF-8."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def sync_directory(path: Path) -> None:
    """fsync a directory, so that the renames in it survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- memory ------------------------------------------------------------------------------------------------


def reset_peak_memory() -> None:
    """Start a new measurement of peak resident memory, where the system can (Linux: /proc/self/clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def give_back_memory() -> None:
    """Have the C library give the system what this process has freed (glibc).

    By itself it keeps what lies between pieces that are in use, of matrices below 32 MB: after a block of small experts
    it was a third of all resident memory.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return  # another library, which knows no such request


def peak_memory() -> int:
    """Peak resident memory of this process in bytes since the last reset (since its start where none is possible)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory() -> int | None:
    """Bytes that this process may still take without swapping; None where the system does not tell.

    The smaller of what is free or can be freed (Linux: MemAvailable) and what the control group leaves (version 2,
    https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files).
    """
    found: list[int] = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            found.append(max(0, int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text())))
    except (OSError, ValueError):
        pass  # no such files here: whatever was found until now counts
    return min(found, default=None)
