"""Killed at any instant, the next call goes on, and the artifact is byte-identical to an uninterrupted run's."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from accullm_cli.config import Config
from accullm_cli.errors import AccullmError
from accullm_cli.lock import HeldError
from accullm_cli.pipeline import convert
from accullm_cli.progress import Event
from accullm_cli.stages import streams
from tests.streaming import copy_run, short_config
from tests.tiny import make_checkpoint, tiny_config

KILLS = 24

# Runs in a process of its own, which forks: a child then starts converting at once, and is a real process to kill.
DRIVER = """
import os, random, signal, sys, time
from pathlib import Path
from accullm_cli.pipeline import convert
from accullm_cli.stages import streams
from tests.streaming import short_config

model, out, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
streams.SECONDS_BETWEEN_STORES = 0.0  # so that stored streams are restored, too
rng = random.Random(int(sys.argv[4]))
longest = 2.0
killed = finished = 0
while killed < kills:
    child = os.fork()
    if child == 0:
        streams.SECONDS_BETWEEN_STORES = rng.choice([0.0, 1e9])
        convert(short_config(model, out, calibration__gradient_samples=2))
        os._exit(0)
    time.sleep(rng.uniform(0, longest))
    rng.random()
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        killed += 1
    else:  # it was done before: begin again from an older state
        finished += 1
        longest = max(0.2, longest * 0.7)
        victim = rng.choice(["manifest.json", "quantize/block-00001.json", "plan.json",
                             "calibrate/gradient-00000.safetensors"])
        (out.with_name(out.name + ".run") / victim).unlink(missing_ok=True)
print(killed, finished)
"""


def contents(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def with_gradients(model: Path, out: Path, **settings: object) -> Config:
    """So that the backward pass is interrupted, too."""
    return short_config(model, out, calibration__gradient_samples=2, **settings)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def uninterrupted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    convert(with_gradients(model, out))
    return contents(out)


def test_an_artifact_is_the_same_after_two_dozen_kills(
    model: Path, uninterrupted: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", DRIVER, model, out, str(KILLS), "0"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout.split()[0]) == KILLS
    convert(with_gradients(model, out))
    assert contents(out) == uninterrupted
    leftovers = [path.name for path in tmp_path.rglob(".*") if path.name != ".lock"]
    assert [name for name in leftovers if not name.endswith(".tmp")] == []


def test_the_same_conversion_elsewhere_gives_the_same_bytes(
    model: Path, uninterrupted: dict[str, str], tmp_path: Path
) -> None:
    convert(with_gradients(model, tmp_path / "other-name"))
    assert contents(tmp_path / "other-name") == uninterrupted


def test_another_seed_or_text_gives_other_bytes(model: Path, uninterrupted: dict[str, str], tmp_path: Path) -> None:
    convert(with_gradients(model, tmp_path / "out", machine__seed=1))
    assert contents(tmp_path / "out") != uninterrupted


class InterruptError(Exception):
    pass


@pytest.mark.parametrize("moment", range(1, 16))
def test_an_exception_at_any_event_leaves_a_run_that_goes_on(
    moment: int, model: Path, uninterrupted: dict[str, str], tmp_path: Path
) -> None:
    seen = 0

    def interrupt(event: Event) -> None:
        nonlocal seen
        seen += 1
        if seen == moment:
            raise InterruptError

    with pytest.raises(InterruptError):
        convert(with_gradients(model, tmp_path / "out"), interrupt)
    convert(with_gradients(model, tmp_path / "out"))
    assert contents(tmp_path / "out") == uninterrupted


@pytest.fixture(scope="module")
def with_embeddings(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("with-embeddings") / "out"
    convert(tiny_config(model, out, plan__embedding_bits=8))
    return contents(out)


@pytest.mark.parametrize("seconds_between_stores", [0.0, 1e9])
@pytest.mark.parametrize("unit", ["embedding", "block 2/2", "head"])
def test_an_exception_behind_any_unit_leaves_a_run_that_goes_on(
    unit: str,
    seconds_between_stores: float,
    model: Path,
    with_embeddings: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With streams that were stored behind the last block, and with none."""
    monkeypatch.setattr(streams, "SECONDS_BETWEEN_STORES", seconds_between_stores)
    config = tiny_config(model, tmp_path / "out", plan__embedding_bits=8)

    def interrupt(event: Event) -> None:
        if event.stage == "quantize" and event.label == unit:
            raise InterruptError

    with pytest.raises(InterruptError):
        convert(config, interrupt)
    units = ["embedding", "block 1/2", "block 2/2", "head"]
    done = units.index(unit) + 1
    assert [line for line in events_of(config) if line.split(":")[0] in units] == [
        f"{name}: {'up to date' if number < done else 'new'}" for number, name in enumerate(units)
    ]
    assert contents(tmp_path / "out") == with_embeddings


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    convert(tiny_config(model, out))
    return out


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return copy_run(finished, tmp_path)


def events_of(config: object) -> list[str]:
    lines: list[str] = []

    def note(event: Event) -> None:
        if event.kind in ("start", "skip"):
            lines.append(f"{event.stage}: {event.reason}")
        if event.kind == "step" and event.stage == "quantize":
            lines.append(f"{event.label}: {event.reason}")

    convert(config, note)  # type: ignore[arg-type]
    return [line for line in lines if not line.startswith("source")]


def test_a_second_call_finds_everything_done(model: Path, copied: Path) -> None:
    stages = ("reading", "calibrate", "profile", "quantize", "export", "reference", "validate accullm")
    assert events_of(tiny_config(model, copied)) == [f"{stage}: up to date" for stage in stages]


def test_a_new_rounding_option_reruns_from_quantize_and_says_why(model: Path, copied: Path) -> None:
    assert events_of(tiny_config(model, copied, rounding__damping=0.02)) == [
        "reading: up to date",
        "calibrate: up to date",
        "profile: up to date",
        "quantize: config changed (rounding.damping)",
        "block 1/2: config changed (rounding.damping)",
        "block 2/2: config changed (rounding.damping)",
        "export: input changed (quantize)",
        "reference: up to date",
        "validate accullm: input changed (artifact)",
    ]


def test_a_new_contract_measures_nothing_again(model: Path, copied: Path) -> None:
    config = tiny_config(model, copied, validation__require="[mean_kl<=9]")
    assert all(line.endswith(": up to date") for line in events_of(config))


def test_a_changed_plan_of_the_last_block_keeps_the_blocks_before_it(model: Path, copied: Path) -> None:
    run = copied.with_name("out.run")
    plan = json.loads((run / "plan.json").read_text())
    name = next(name for name in plan["linears"] if ".layers.1." in name)
    plan["linears"][name]["bits"] = 5
    (run / "plan.json").write_text(json.dumps(plan))
    (run / "quantize" / "block-00001.json").touch()
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["stages"]["profile"]["outputs"] = {}
    del manifest["stages"]["quantize"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert events_of(tiny_config(model, copied))[3:6] == [
        "quantize: new",
        "block 1/2: up to date",
        "block 2/2: config changed (plan)",
    ]


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_shard_is_made_again(damage: str, model: Path, uninterrupted: dict[str, str], tmp_path: Path) -> None:
    convert(with_gradients(model, tmp_path / "out"))
    shard = tmp_path / "out.run" / "quantize" / "block-00000.safetensors"
    content = bytearray(shard.read_bytes())
    if damage == "flipped":
        content[-5] ^= 1
    shard.unlink()  # the artifact holds a link to it
    shard.write_bytes(content[:-100] if damage == "truncated" else content)
    (tmp_path / "out.run" / "manifest.json").unlink()
    convert(with_gradients(model, tmp_path / "out"))
    assert contents(tmp_path / "out") == uninterrupted


@pytest.mark.parametrize("shared", ["run", "out"])
def test_two_conversions_do_not_share_a_directory(shared: str, model: Path, tmp_path: Path) -> None:
    """Nothing is left of the second one, and the first one goes on."""
    first = tiny_config(model, tmp_path / "out")
    run = tmp_path / ("out.run" if shared == "run" else "second.run")
    second = tiny_config(model, tmp_path / ("out" if shared == "out" else "other"), machine__run=run)
    refused: list[str] = []

    def interfere(event: Event) -> None:
        if event.kind == "end" and event.stage == "profile":
            with pytest.raises(HeldError) as refusal:
                convert(second)
            refused.append(refusal.value.line())

    assert convert(first, interfere).artifact == str(tmp_path / "out")
    (line,) = refused
    place = tmp_path / ("out.run" if shared == "run" else "out")
    assert line.startswith(f"{place}: is in use by process {os.getpid()} on ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.run"]


def flipped(file: Path) -> bytes:
    """A weight file's content with one bit of its last tensor changed."""
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    return bytes(content)


@pytest.fixture(scope="module")
def changed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a conversion makes of the model that has changed."""
    place = tmp_path_factory.mktemp("changed")
    source = shutil.copytree(model, place / "model")
    (source / "model.safetensors").write_bytes(flipped(source / "model.safetensors"))
    convert(tiny_config(source, place / "out"))
    return contents(place / "out")


@pytest.mark.parametrize("stage", ["calibrate", "quantize"])
@pytest.mark.parametrize("how", ["written to", "replaced", "removed"])
def test_a_source_that_changes_while_it_is_read_is_refused(
    stage: str, how: str, model: Path, changed: dict[str, str], tmp_path: Path
) -> None:
    """Nothing is made of two models; when the file stands still, the same command converts what is there then."""
    source = tmp_path / "model"
    shutil.copytree(model, source)
    file = source / "model.safetensors"
    content = flipped(file)

    def change(event: Event) -> None:
        if event.stage == stage and event.kind == "step" and event.label == "block 1/2":
            if how == "removed":
                file.unlink()
            elif how == "replaced":
                file.with_suffix(".new").write_bytes(content)
                file.with_suffix(".new").rename(file)
            else:
                file.write_bytes(content)

    with pytest.raises(AccullmError) as refusal:
        convert(tiny_config(source, tmp_path / "out"), change)
    assert refusal.value.line() == (
        f"{file}: changed while it was being converted; run the same command again when nobody writes to it any more"
    )
    file.write_bytes(content)
    convert(tiny_config(source, tmp_path / "out"))
    assert contents(tmp_path / "out") == changed
