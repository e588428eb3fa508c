"""Models on the Hugging Face hub: safetensors only, pinned to a commit, usable from the cache without a network."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, ModelInfo, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is that of its HTTP library
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging as hub_logging

from accullm_cli.errors import AccullmError, MachineError
from accullm_cli.model.files import refuse_adapter, sort_files
from accullm_cli.model.weights import INDEX, WEIGHTS, refuse_pickled, shard_names
from accullm_cli.progress import Event, Progress, silent

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_TIMEOUT = 15.0  # seconds; the call fetches one small page
_BUSY = (429, 500, 502, 503, 504)
# Seconds between two tries where the hub is busy, unless it names a time itself; the longest such time that is waited.
_WAITS = (1.0, 2.0, 4.0, 8.0)
_LONGEST_WAIT = 60.0
_FILES_AT_ONCE = 4

_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class HubId:
    """A repository on the hub and what of it: a branch, tag or commit, None for the newest."""

    repo: str
    revision: str | None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


@dataclass(frozen=True)
class Snapshot:
    """A model in the local cache.

    left_behind: sentences about files of the repository that were not fetched; None where the hub was not asked.
    """

    directory: Path
    commit: str
    left_behind: tuple[str, ...] | None


def parse_hub_id(text: str) -> HubId | None:
    """`owner/name[@revision]`, or None where `text` does not have that form."""
    match = _HUB_ID.fullmatch(text)
    return HubId(match["repo"], match["revision"]) if match else None


def download(model: HubId, progress: Progress = silent, pause: Callable[[float], object] = time.sleep) -> Snapshot:
    """Fetch what is not cached of a model. A stream that breaks off is resumed; what is killed keeps its whole files.

    Args:
        pause: waits for so many seconds before a busy hub is asked again.

    Raises:
        AccullmError: no such model or revision, no access, no safetensors; no network or a busy hub, and not cached.
        MachineError: the cache cannot be written.
    """
    reached = False
    try:
        with _quiet_library():
            info = _patiently(lambda: _ask(model), pause)
            reached = True
            return _fetch(model, info, progress, pause)
    except GatedRepoError:
        raise AccullmError(
            "access to this model is restricted",
            model,
            f"accept its terms on https://huggingface.co/{model.repo} and log in with 'hf auth login'",
        ) from None
    except RevisionNotFoundError:
        raise AccullmError(f"the hub has no revision {model.revision}", model.repo, "check its spelling") from None
    except RepositoryNotFoundError:
        raise AccullmError(
            "not on the hub, or not open to you", model, "check its spelling, or log in with 'hf auth login'"
        ) from None
    except (OSError, HTTPError) as error:
        return _without_hub(model, error, reached)


def _ask(model: HubId) -> ModelInfo:
    """What the hub knows of a model: its commit, its files and their sizes."""
    return HfApi().model_info(model.repo, revision=model.revision, files_metadata=True, timeout=_TIMEOUT)


def _fetch(model: HubId, info: ModelInfo, progress: Progress, pause: Callable[[float], object]) -> Snapshot:
    """Fetch what of a model is read or copied."""
    commit = str(info.sha)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    refuse_adapter(sizes, str(model))
    refuse_pickled(sizes, str(model), model.repo)

    def fetch(name: str, revision: str = commit, bar: type = _NoBar) -> str:
        try:
            return _patiently(lambda: hf_hub_download(model.repo, name, revision=revision, tqdm_class=bar), pause)
        except OSError as error:
            if "Consistency check failed" not in str(error):
                raise
            what = f"{name} arrived with another size than the {sizes[name]:,} bytes that the hub promises"
            raise AccullmError(what, model, "run the same command again") from None

    used = {"config.json", WEIGHTS}
    if WEIGHTS not in sizes:
        used = {"config.json", INDEX, *shard_names(Path(fetch(INDEX))).values()}
    if "config.json" not in sizes:
        raise AccullmError("holds no config.json", model, "give the repository of a model")
    files = sort_files(sizes, used)
    wanted = {name: sizes[name] for name in (*sorted(used & sizes.keys()), *files.companions)}
    directory = Path(fetch("config.json")).parent
    absent = {name: size for name, size in wanted.items() if not (directory / name).exists()}
    # Leaving the meter stops what still runs, which the pool would wait for.
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool, _Meter(absent, str(model), progress) as meter:
        for _ in pool.map(lambda name: fetch(name, commit, meter.bar()), absent):
            pass
    if model.revision != commit:
        # By the branch's name, so that the cache knows its commit and serves it when there is no network.
        fetch("config.json", model.revision or constants.DEFAULT_REVISION)
    return Snapshot(directory, commit, files.records)


def _without_hub(model: HubId, error: Exception, reached: bool) -> Snapshot:
    """The model from the local cache, where asking the hub or fetching from it has failed.

    Args:
        reached: the hub has answered before.

    Raises:
        AccullmError: it is not there, and why the hub did not give it.
    """
    response = _response_of(error)
    status = response.status_code if response is not None else None
    if isinstance(error, OSError) and error.errno is not None:  # the system's, not the network's
        raise MachineError(
            f"the hub's cache cannot be written ({str(error.strerror).lower()})",
            constants.HF_HUB_CACHE,
            "free some space, or set HF_HOME to another directory",
        ) from None
    if status is not None and status not in _BUSY:
        raise AccullmError(f"the hub refuses ({' '.join(str(error).split())})", model) from None
    # Once the hub has named a commit, an older one in the cache is not what was asked for.
    cached = None if reached else _cached_commit(model)
    if cached is not None:
        return Snapshot(*cached, None)
    if status is not None:
        raise AccullmError(
            f"the hub is busy (it answered {status} to {len(_WAITS) + 1} requests)",
            model,
            "run the same command again in a few minutes; files that have arrived are kept",
        ) from None
    if reached:
        cause = error.__cause__ or error
        raise AccullmError(
            f"the download broke off ({' '.join(str(cause).split()) or type(cause).__name__})",
            model,
            "run the same command again; files that have arrived are kept",
        ) from None
    raise AccullmError(
        "not in the local cache, and the hub cannot be reached",
        model,
        "connect to the network once, or give a local directory",
    ) from None


def _patiently(call: Callable[[], _Answer], pause: Callable[[float], object]) -> _Answer:
    """The answer of a call to the hub, which is asked again a few times where it is busy."""
    for wait in _WAITS:
        try:
            return call()
        except (OSError, HTTPError) as error:
            response = _response_of(error)
            if response is None or response.status_code not in _BUSY:
                raise
            asked = response.headers.get("Retry-After", "")
            pause(min(float(asked), _LONGEST_WAIT) if asked.isdecimal() else wait)
    return call()


def _response_of(error: BaseException | None) -> Any:
    """The hub's answer that an error is about, or was caused by; None where there was none."""
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return error.response
        error = error.__cause__
    return None


def _cached_commit(model: HubId) -> tuple[Path, str] | None:
    """Directory and commit of a model that is whole in the local cache."""
    config = _cached(model, "config.json")
    if config is None or not is_cached(HubId(model.repo, config.parent.name)):
        return None
    return config.parent, config.parent.name


def is_cached(model: HubId) -> bool:
    """Whether config.json and all weight files of the model are in the local cache. Needs no network."""
    if _cached(model, "config.json") is None:
        return False
    if _cached(model, WEIGHTS) is not None:
        return True
    index = _cached(model, INDEX)
    if index is None:
        return False
    try:
        shards = {*shard_names(index).values()}
    except AccullmError:
        return False
    return all(_cached(model, shard) is not None for shard in shards)


def _cached(model: HubId, name: str) -> Path | None:
    path = try_to_load_from_cache(model.repo, name, revision=model.revision)
    return Path(path) if isinstance(path, str) else None


# -- progress ----------------------------------------------------------------------------------------------


class _Meter:
    """Counts what arrives of several files, and tells it in megabytes whenever a percent more has arrived."""

    def __init__(self, sizes: Mapping[str, int], model: str, progress: Progress) -> None:
        self._total = sum(sizes.values())
        self._model = model
        self._progress = progress
        self._arrived = 0
        self._told = 0
        self._stopped = False
        self._lock = threading.Lock()

    def __enter__(self) -> _Meter:
        if self._total:
            self._progress(Event("source", "start", f"downloading {self._model}", total=_megabytes(self._total)))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stopped = kind is not None
        if self._total and kind is None:
            self._progress(Event("source", "end"))

    def bar(self) -> type:
        """A class that huggingface_hub takes for that of its progress bars, for one file."""
        return type("_Bar", (_NoBar,), {"meter": self})

    def add(self, count: int) -> None:
        if self._stopped:
            raise InterruptedError("the download was stopped")
        with self._lock:
            self._arrived += count
            percent = 100 * self._arrived // max(self._total, 1)
            if percent > self._told:
                self._told = percent
                done, total = _megabytes(self._arrived), _megabytes(self._total)
                self._progress(Event("source", "step", f"MB of {self._model}", done=done, total=total))


class _NoBar:
    """A progress bar that draws nothing, with what huggingface_hub calls of one."""

    meter: _Meter | None = None

    def __init__(self, *_: object, total: int | None = None, initial: int = 0, **settings: object) -> None:
        self.total = total
        self.n = 0
        self.format_dict: dict[str, object] = {}
        if initial:
            self.update(initial)

    def update(self, count: float | None = 1) -> None:
        self.n += int(count or 0)
        if self.meter is not None:
            self.meter.add(int(count or 0))

    def update_transfer(self, count: float | None = 1) -> None:
        """What comes over the network; `update` is told what reaches the disk."""

    def refresh(self) -> None:
        """Nothing is drawn."""

    def close(self) -> None:
        """Nothing is drawn."""

    def set_postfix_str(self, postfix: str, refresh: bool = False) -> None:
        """Nothing is drawn."""

    set_transfer_postfix_str = set_description = set_description_str = set_postfix_str

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _megabytes(count: int) -> int:
    return -(-count // 1_000_000)


@contextmanager
def _quiet_library() -> Iterator[None]:
    """Let huggingface_hub say nothing on stderr: each failure is one line of ours, and tries are not failures."""
    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        hub_logging.set_verbosity(before)
