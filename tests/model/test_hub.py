"""Models on the hub: a server on loopback that speaks as the hub does, stock huggingface_hub, and an empty cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from safetensors.numpy import save_file

from accullm_cli.errors import AccullmError, MachineError
from accullm_cli.model.hub import HubId, download, is_cached, parse_hub_id
from accullm_cli.model.source import open_source
from accullm_cli.progress import Event, Progress, silent
from tests.model.checkpoints import CONFIG, tensors
from tests.model.hub_server import COMMIT, Hub, serve

OTHER_COMMIT = "f" * 40
MODEL = HubId("owner/tiny", None)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and a hub that cannot be reached."""
    directory = tmp_path / "hub"
    directory.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(directory))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    point_to("http://127.0.0.1:9", monkeypatch)  # the port of "discard": nobody listens
    return directory


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_ENDPOINT does, which is read when huggingface_hub is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + template[template.index("/{repo_id}") :])


@pytest.fixture
def hub(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a model of one weight file."""
    files = complete(tmp_path) | {
        "tokenizer.json": b"{}",
        "templates/tools.jinja": b"x",
        "modeling_evil.py": b"raise SystemExit",
        "pytorch_model.bin": b"pickled",
        "onnx/model.onnx": b"x",
        ".gitattributes": b"x",
    }
    hub = Hub(files)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    # Between two tries of a stream that broke off, the library waits for a second.
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    with serve(hub):
        point_to(hub.url, monkeypatch)
        yield hub
    close_session()


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


def fetch(model: HubId = MODEL, progress: Progress = silent) -> tuple[Path, str, list[float]]:
    """Directory, commit, and the seconds that were waited for a busy hub."""
    waited: list[float] = []
    snapshot = download(model, progress, waited.append)
    return snapshot.directory, snapshot.commit, waited


def refusal(model: HubId = MODEL) -> str:
    with pytest.raises(AccullmError) as caught:
        fetch(model)
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.line()
    return caught.value.line()


# -- names -------------------------------------------------------------------------------------------------------


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


# -- a download --------------------------------------------------------------------------------------------------


def test_what_is_read_or_copied_is_fetched_and_the_rest_is_named(hub: Hub, tmp_path: Path) -> None:
    source = open_source("owner/tiny", tmp_path / "run")
    fetched = ["config.json", "model.safetensors", "templates/tools.jinja", "tokenizer.json"]
    assert hub.fetched() == fetched
    assert sorted(path.relative_to(source.directory).as_posix() for path in source.directory.rglob("*.*")) == fetched
    assert (source.name, source.origin) == ("tiny", f"owner/tiny@{COMMIT}")
    assert set(source.tensors) == set(tensors())
    assert set(source.companions) == {"templates/tools.jinja", "tokenizer.json"}
    assert source.records == (
        "left behind: hidden files (.gitattributes); code (modeling_evil.py); weights that are not read "
        "(onnx/model.onnx, pytorch_model.bin)",
    )


def test_a_run_that_goes_on_without_network_says_and_hashes_the_same(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = open_source("owner/tiny", tmp_path / "run")
    point_to("http://127.0.0.1:9", monkeypatch)
    assert open_source("owner/tiny", tmp_path / "run") == online


def test_a_newer_commit_that_does_not_arrive_is_refused_and_leaves_the_older_one_to_use_offline(
    hub: Hub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = put(cache, complete(tmp_path), OTHER_COMMIT)
    hub.breaks["model.safetensors"], hub.vanishes = 100, True
    assert refusal().startswith("owner/tiny: the download broke off (")
    point_to("http://127.0.0.1:9", monkeypatch)
    assert fetch()[:2] == (older, OTHER_COMMIT)


def test_a_model_that_is_cached_is_not_fetched_again(hub: Hub) -> None:
    fetch()
    hub.requests.clear()
    fetch()
    assert hub.fetched() == []


def test_the_shards_that_the_index_names_are_fetched(hub: Hub, tmp_path: Path) -> None:
    parts = {name: f"part-{number}.safetensors" for number, name in enumerate(tensors())}
    del hub.files["model.safetensors"]
    hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": parts}).encode()
    for name, part in parts.items():
        hub.files[part] = weights(tmp_path, {name: tensors()[name]})
    hub.files["old.safetensors"] = b"x"
    source = open_source("owner/tiny", tmp_path / "run")
    assert {name: info.file.name for name, info in source.tensors.items()} == parts
    assert "old.safetensors" in source.records[0]


def test_a_revision_asked_for_is_the_one_that_is_fetched(hub: Hub) -> None:
    hub.branches = ("main", "beta")
    assert fetch(HubId("owner/tiny", "beta"))[1] == COMMIT
    assert hub.requests[0][1] == "/api/models/owner/tiny/revision/beta"
    assert fetch(HubId("owner/tiny", COMMIT))[1] == COMMIT


def test_a_stream_that_breaks_off_goes_on_where_it_stopped(hub: Hub) -> None:
    hub.files["model.safetensors"] += bytes(range(256)) * 1_000
    hub.breaks["model.safetensors"] = 150_000
    directory, _, _ = fetch()
    assert (directory / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert hub.ranges("model.safetensors") == [None, "bytes=100000-"]  # what was read in whole pieces


def test_a_download_that_is_stopped_keeps_the_files_that_have_arrived(hub: Hub) -> None:
    def stop(event: Event) -> None:
        if event.kind == "step":
            raise KeyboardInterrupt

    hub.files["model.safetensors"] += bytes(2_000_000)
    with pytest.raises(KeyboardInterrupt):
        download(MODEL, stop)
    hub.requests.clear()
    directory, _, _ = fetch()
    assert (directory / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert hub.fetched()[0] == "model.safetensors"
    assert "config.json" not in hub.fetched()


def test_progress_is_our_own_in_megabytes(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    hub.files["model.safetensors"] += bytes(2_500_000)
    events: list[Event] = []
    fetch(progress=events.append)
    assert [(event.kind, event.total) for event in events[:1] + events[-1:]] == [("start", 3), ("end", 0)]
    steps = [event.done for event in events if event.kind == "step"]
    assert (steps == sorted(steps), steps[-1]) == (True, 3)
    assert 20 < len(steps) < 30  # one for each piece of 100,000 bytes that is a percent or more
    assert capfd.readouterr() == ("", "")


# -- a hub that is busy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "waited"),
    [
        ([(503, None), (503, None)], [1.0, 2.0]),
        ([(429, "3"), (429, "600"), (502, "soon")], [3.0, 60.0, 4.0]),
    ],
)
def test_a_busy_hub_is_asked_again(hub: Hub, answers: list[tuple[int, str | None]], waited: list[float]) -> None:
    hub.busy = answers
    directory, commit, pauses = fetch()
    assert (commit, pauses) == (COMMIT, waited)
    assert (directory / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_stays_busy_is_one_line_that_says_so(hub: Hub, status: int) -> None:
    hub.busy = [(status, None)] * 5
    assert refusal() == (
        f"owner/tiny: the hub is busy (it answered {status} to 5 requests); run the same command again in a few "
        "minutes; files that have arrived are kept"
    )
    assert hub.busy == []


def test_a_busy_hub_does_not_matter_where_the_model_is_cached(hub: Hub) -> None:
    directory, _, _ = fetch()
    hub.busy = [(503, None)] * 5
    assert fetch()[0] == directory


# -- what the hub refuses ----------------------------------------------------------------------------------------


def test_a_gated_model_is_one_line(hub: Hub) -> None:
    hub.gated = True
    assert refusal() == (
        "owner/tiny: access to this model is restricted; accept its terms on https://huggingface.co/owner/tiny "
        "and log in with 'hf auth login'"
    )


def test_an_unknown_model_is_one_line(hub: Hub) -> None:
    assert refusal(HubId("owner/huge", None)) == (
        "owner/huge: not on the hub, or not open to you; check its spelling, or log in with 'hf auth login'"
    )


def test_a_revision_that_is_not_there_is_one_line(hub: Hub) -> None:
    assert refusal(HubId("owner/tiny", "v9")) == "owner/tiny: the hub has no revision v9; check its spelling"


def test_another_refusal_is_one_line(hub: Hub) -> None:
    hub.busy = [(418, None)]
    assert refusal().startswith("owner/tiny: the hub refuses (Client error '418 I'm a Teapot' for url ")


def test_a_file_that_is_smaller_than_promised_is_one_line(hub: Hub) -> None:
    hub.short["model.safetensors"] = 900
    size = len(hub.files["model.safetensors"])
    assert refusal() == (
        f"owner/tiny: model.safetensors arrived with another size than the {size:,} bytes that the hub promises; run "
        "the same command again"
    )


def test_a_hub_that_goes_away_in_the_middle_is_one_line(hub: Hub) -> None:
    hub.breaks["model.safetensors"] = 100
    hub.vanishes = True
    assert refusal() == (
        "owner/tiny: the download broke off (Server disconnected without sending a response.); run the same command "
        "again; files that have arrived are kept"
    )


def test_a_cache_that_cannot_be_written_is_the_machine_s_fault(hub: Hub, cache: Path) -> None:
    (cache / "models--owner--tiny").mkdir()
    (cache / "models--owner--tiny" / "blobs").write_text("in the way")
    with pytest.raises(MachineError) as caught:
        fetch()
    assert caught.value.line() == (
        f"{cache}: the hub's cache cannot be written (file exists); free some space, or set HF_HOME to another "
        "directory"
    )


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (
            ["config.json", "pytorch_model.bin"],
            "the weights are pickled (pytorch_model.bin), and loading a pickle can run any code in it; convert "
            'it once where you trust it: python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer '
            "as T; M.from_pretrained('owner/tiny', dtype='auto').save_pretrained('converted'); "
            "T.from_pretrained('owner/tiny').save_pretrained('converted')\"",
        ),
        (["tiny.Q4_0.gguf"], "holds GGUF files only; download one and give its path"),
        (["model.safetensors"], "holds no config.json; give the repository of a model"),
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            "is an adapter (LoRA), not a model (adapter_config.json); merge it into the model first (peft: "
            "merge_and_unload, then save_pretrained)",
        ),
    ],
)
def test_a_repository_without_a_usable_model_is_refused_before_anything_is_fetched(
    hub: Hub, files: list[str], line: str
) -> None:
    hub.files = dict.fromkeys(files, b"x")
    assert refusal() == f"owner/tiny: {line}"
    assert hub.fetched() == []


# -- without network ---------------------------------------------------------------------------------------------


def test_without_network_a_cached_model_is_used_and_its_commit_known(cache: Path, tmp_path: Path) -> None:
    snapshot = put(cache, complete(tmp_path))
    assert fetch()[:2] == (snapshot, COMMIT)


def test_a_revision_asked_for_is_the_one_that_is_used(cache: Path, tmp_path: Path) -> None:
    put(cache, complete(tmp_path))
    other = put(cache, complete(tmp_path), OTHER_COMMIT, "beta")
    assert fetch(HubId("owner/tiny", "beta"))[:2] == (other, OTHER_COMMIT)
    assert fetch(HubId("owner/tiny", OTHER_COMMIT))[:2] == (other, OTHER_COMMIT)
    assert fetch()[1] == COMMIT


UNREACHABLE = (
    "not in the local cache, and the hub cannot be reached; connect to the network once, or give a local directory"
)


@pytest.mark.parametrize("offline", [False, True])
def test_without_network_a_model_that_is_not_cached_is_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    assert refusal() == f"owner/tiny: {UNREACHABLE}"


@pytest.mark.parametrize("present", ["config.json", "model.safetensors"])
def test_without_network_a_half_cached_model_counts_as_not_cached(cache: Path, tmp_path: Path, present: str) -> None:
    put(cache, {present: complete(tmp_path)[present]})
    assert refusal(HubId("owner/tiny", "main")) == f"owner/tiny@main: {UNREACHABLE}"


def test_sharded_models_are_cached_when_every_shard_is(cache: Path, tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    files = {"config.json": b"{}", "model.safetensors.index.json": index, "model-1.safetensors": b""}
    put(cache, files)
    assert not is_cached(MODEL)
    put(cache, {**files, "model-2.safetensors": b""}, OTHER_COMMIT)
    assert is_cached(MODEL)


# -- the command -------------------------------------------------------------------------------------------------


def test_a_quiet_command_says_nothing_but_its_error(hub: Hub, cache: Path, tmp_path: Path) -> None:
    hub.files["model.safetensors"] += bytes(12_000_000)  # damaged, once it has arrived
    hub.breaks["model.safetensors"] = 100
    program = "import sys; from accullm_cli.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", program, "convert", "owner/tiny", "--out", str(tmp_path / "out"), "--quiet"]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(cache)}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "model.safetensors: not a whole safetensors file" in done.stderr
    assert done.stderr.count("\n") == 1
