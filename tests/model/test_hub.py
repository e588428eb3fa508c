"""Models on the hub, without a network: a cache made by hand, and a hub that answers what the test says."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.numpy import save_file

from accullm_cli.errors import AccullmError
from accullm_cli.model import hub
from accullm_cli.model.hub import HubId, download, is_cached, parse_hub_id
from accullm_cli.model.source import open_source
from tests.model.checkpoints import CONFIG, tensors

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "f" * 40
MODEL = HubId("owner/tiny", None)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and a hub that cannot be reached."""
    directory = tmp_path / "hub"
    directory.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(directory))
    answer(monkeypatch, hub.HTTPError("no network"))
    return directory


def answer(monkeypatch: pytest.MonkeyPatch, what: Any) -> None:
    """Make the hub answer `model_info` with a value, or fail with an error."""

    def model_info(self: hub.HfApi, repo: str, revision: str | None, timeout: float) -> Any:
        if isinstance(what, BaseException):
            raise what
        return what

    monkeypatch.setattr(hub.HfApi, "model_info", model_info)


def http_error(kind: type[HfHubHTTPError], status: int) -> Exception:
    return kind("the hub's answer", response=SimpleNamespace(status_code=status, headers={}, request=None))


def put(cache: Path, files: dict[str, bytes], commit: str = COMMIT, branch: str = "main") -> Path:
    """Put a snapshot into the cache as huggingface_hub does: blobs, links to them, and a branch."""
    repository = cache / "models--owner--tiny"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for folder in ("blobs", "refs"):
        (repository / folder).mkdir(exist_ok=True)
    for name, content in files.items():
        (repository / "blobs" / f"{commit[:4]}-{name}").write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{commit[:4]}-{name}")
    (repository / "refs" / branch).write_text(commit)
    return snapshot


def weights(tmp_path: Path, stored: dict[str, np.ndarray] | None = None) -> bytes:
    save_file(stored or tensors(), tmp_path / "weights")
    return (tmp_path / "weights").read_bytes()


def complete(tmp_path: Path) -> dict[str, bytes]:
    return {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": weights(tmp_path)}


def refusal(model: HubId) -> str:
    with pytest.raises(AccullmError) as caught:
        download(model)
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.line()
    return caught.value.line()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("meta-llama/Llama-2-7b-hf", HubId("meta-llama/Llama-2-7b-hf", None)),
        ("owner/name@v1.0", HubId("owner/name", "v1.0")),
        ("owner/name@refs/pr/3", HubId("owner/name", "refs/pr/3")),
        ("name", None),
        ("a/b/c", None),
        ("owner/", None),
        ("../name", None),
        ("owner/name@", None),
    ],
)
def test_hub_ids_have_an_owner_a_name_and_perhaps_a_revision(text: str, expected: HubId | None) -> None:
    assert parse_hub_id(text) == expected


def test_without_network_a_cached_model_is_used_and_its_commit_known(cache: Path, tmp_path: Path) -> None:
    snapshot = put(cache, complete(tmp_path))
    assert download(MODEL) == (snapshot, COMMIT)


def test_a_cached_model_opens_under_its_name_with_the_commit_in_its_origin(cache: Path, tmp_path: Path) -> None:
    put(cache, complete(tmp_path))
    source = open_source("owner/tiny", tmp_path / "cache")
    assert (source.name, source.origin) == ("tiny", f"owner/tiny@{COMMIT}")
    assert set(source.tensors) == set(tensors())


def test_a_revision_asked_for_is_the_one_that_is_used(cache: Path, tmp_path: Path) -> None:
    put(cache, complete(tmp_path))
    other = put(cache, complete(tmp_path), OTHER_COMMIT, "beta")
    assert download(HubId("owner/tiny", "beta")) == (other, OTHER_COMMIT)
    assert download(HubId("owner/tiny", OTHER_COMMIT)) == (other, OTHER_COMMIT)
    assert download(MODEL)[1] == COMMIT


def test_without_network_a_model_that_is_not_cached_is_one_line(cache: Path) -> None:
    assert refusal(MODEL) == (
        "owner/tiny: not in the local cache, and the hub cannot be reached; "
        "connect to the network once, or give a local directory"
    )


@pytest.mark.parametrize("present", ["config.json", "model.safetensors"])
def test_without_network_a_half_cached_model_counts_as_not_cached(cache: Path, tmp_path: Path, present: str) -> None:
    put(cache, {present: complete(tmp_path)[present]})
    assert refusal(HubId("owner/tiny", "main")) == (
        "owner/tiny@main: not in the local cache, and the hub cannot be reached; "
        "connect to the network once, or give a local directory"
    )


def test_sharded_models_are_cached_when_every_shard_is(cache: Path, tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    files = {"config.json": b"{}", "model.safetensors.index.json": index, "model-1.safetensors": b""}
    put(cache, files)
    assert not is_cached(MODEL)
    put(cache, {**files, "model-2.safetensors": b""}, OTHER_COMMIT)
    assert is_cached(MODEL)


def test_only_safetensors_and_companions_are_fetched_at_the_commit_of_the_hub(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    siblings = [SimpleNamespace(rfilename=name) for name in ("model.safetensors", "pytorch_model.bin")]
    answer(monkeypatch, SimpleNamespace(sha=COMMIT, siblings=siblings))
    asked: dict[str, Any] = {}

    def snapshot_download(repo: str, **arguments: Any) -> str:
        asked.update(arguments, repo=repo)
        return str(cache)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert download(HubId("owner/tiny", "main")) == (cache, COMMIT)
    assert (asked["repo"], asked["revision"]) == ("owner/tiny", COMMIT)

    from huggingface_hub.utils import filter_repo_objects

    offered = """config.json model.safetensors model-00001-of-00002.safetensors model.safetensors.index.json LICENSE
        tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json vocab.json merges.txt
        generation_config.json chat_template.jinja USE_POLICY.md pytorch_model.bin model.bin consolidated.safetensors
        original/consolidated.00.pth original/params.json onnx/model.onnx modeling.py README.md tf_model.h5
        flax_model.msgpack training_args.bin""".split()
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(offered, **patterns)) == offered[:14]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            http_error(GatedRepoError, 403),
            "owner/tiny: access to this model is restricted; accept its terms on https://huggingface.co/owner/tiny "
            "and log in with 'hf auth login'",
        ),
        (
            http_error(RepositoryNotFoundError, 401),
            "owner/tiny: not on the hub, or not open to you; check its spelling, or log in with 'hf auth login'",
        ),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    answer(monkeypatch, error)
    assert refusal(MODEL) == line


def test_a_revision_that_is_not_there_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, http_error(RevisionNotFoundError, 404))
    assert refusal(HubId("owner/tiny", "v9")) == "owner/tiny: the hub has no revision v9; check its spelling"


def test_a_repository_with_pickled_weights_only_is_refused_before_anything_is_fetched(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    siblings = [SimpleNamespace(rfilename=name) for name in ("config.json", "pytorch_model.bin")]
    answer(monkeypatch, SimpleNamespace(sha=COMMIT, siblings=siblings))
    assert refusal(MODEL) == (
        "owner/tiny: the weights are pickled (pytorch_model.bin), and loading a pickle can run any code in it; convert "
        'it once where you trust it: python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as '
        "T; M.from_pretrained('owner/tiny', dtype='auto').save_pretrained('converted'); "
        "T.from_pretrained('owner/tiny').save_pretrained('converted')\""
    )


def test_a_repository_of_gguf_files_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename="tiny.Q4_0.gguf")]))
    assert refusal(MODEL) == "owner/tiny: holds GGUF files only; download one and give its path"
