"""Models on the Hugging Face hub: safetensors only, pinned to a commit, usable from the cache without a network."""

from __future__ import annotations

import fnmatch
import glob
import json
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is that of its HTTP library
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from accullm_cli.errors import AccullmError
from accullm_cli.model.files import refuse_adapter, sort_files
from accullm_cli.model.weights import INDEX, WEIGHTS, refuse_pickled

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_TIMEOUT = 15.0  # seconds; the call fetches one small page


@dataclass(frozen=True)
class HubId:
    """A repository on the hub and what of it: a branch, tag or commit, None for the newest."""

    repo: str
    revision: str | None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def parse_hub_id(text: str) -> HubId | None:
    """`owner/name[@revision]`, or None where `text` does not have that form."""
    match = _HUB_ID.fullmatch(text)
    return HubId(match["repo"], match["revision"]) if match else None


def download(model: HubId) -> tuple[Path, str]:
    """Fetch what is not cached of a model; returns its directory and its commit.

    Raises:
        AccullmError: no such model or revision, no access, no safetensors; no network and not cached.
    """
    try:
        info = HfApi().model_info(model.repo, revision=model.revision, files_metadata=True, timeout=_TIMEOUT)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        refuse_adapter(sizes, str(model))
        refuse_pickled(sizes, str(model), model.repo)
        used = [name for name in sizes if fnmatch.fnmatchcase(name, "model*.safetensors")] + [INDEX, "config.json"]
        wanted = [*used, *sort_files(sizes, used).companions]
        commit = str(info.sha)
        directory = snapshot_download(
            model.repo,
            revision=commit,
            allow_patterns=[glob.escape(name) for name in wanted],
        )
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
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            reason = " ".join(str(error).split())
            raise AccullmError(f"the hub refuses ({reason})", model) from None
        return _cached(model)
    return Path(directory), commit


def _cached(model: HubId) -> tuple[Path, str]:
    """The model from the local cache, where the hub cannot be reached."""
    try:
        directory = Path(snapshot_download(model.repo, revision=model.revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        directory = None
    if directory is None or not is_cached(HubId(model.repo, directory.name)):
        raise AccullmError(
            "not in the local cache, and the hub cannot be reached",
            model,
            "connect to the network once, or give a local directory",
        )
    return directory, directory.name


def is_cached(model: HubId) -> bool:
    """Whether config.json and all weight files of the model are in the local cache. Needs no network."""

    def cached(name: str) -> Path | None:
        found = try_to_load_from_cache(model.repo, name, revision=model.revision)
        return Path(found) if isinstance(found, str) else None

    if cached("config.json") is None:
        return False
    if cached(WEIGHTS) is not None:
        return True
    index = cached(INDEX)
    if index is None:
        return False
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return all(cached(shard) is not None for shard in shards)
