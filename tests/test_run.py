"""The run directory: why a stage runs, and files that appear at once."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from accullm_cli.errors import AccullmError
from accullm_cli.run import (
    Reason,
    RunDirectory,
    StageRecord,
    compare_inputs,
    file_sha256,
    key_of,
    write_file,
    write_text,
)

INPUTS = {
    "source:weights": "a",
    "version:quantize": "1",
    "machine:threads": "2",
    "config:plan.bits": "4",
    "input:statistics": "c",
}


def record(inputs=INPUTS, outputs=()) -> StageRecord:
    return StageRecord(dict(inputs), dict.fromkeys(outputs, "0"), 1.5, 1000, ["a note"], {"torch": "2"})


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


# -- reasons -----------------------------------------------------------------------------------------------


def test_a_stage_without_a_record_is_new(run):
    assert str(run.decide("quantize", INPUTS)) == "new"


def test_equal_inputs_and_present_outputs_are_up_to_date(run):
    run.path.mkdir()
    run.file("block-0").write_text("x")
    run.finish("quantize", record(outputs=["block-0"]))
    reason = run.decide("quantize", dict(reversed(INPUTS.items())))
    assert str(reason) == "up to date"
    assert not reason.runs


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("source:weights", "source changed (weights)"),
        ("version:quantize", "version changed (quantize)"),
        ("machine:threads", "machine changed (threads)"),
        ("config:plan.bits", "config changed (plan.bits)"),
        ("input:statistics", "input changed (statistics)"),
    ],
)
def test_a_changed_input_names_its_kind_and_itself(run, name, sentence):
    run.finish("quantize", record())
    reason = run.decide("quantize", {**INPUTS, name: "other"})
    assert str(reason) == sentence
    assert reason.runs


def test_an_input_that_came_or_went_is_a_change():
    fewer = {name: value for name, value in INPUTS.items() if name != "config:plan.bits"}
    assert str(compare_inputs(INPUTS, fewer)) == "config changed (plan.bits)"
    assert str(compare_inputs(fewer, INPUTS)) == "config changed (plan.bits)"


def test_what_comes_or_goes_with_a_change_is_not_named_beside_it():
    nearest = {"config:method": "nearest", "input:a": "1"}
    feedback = {"config:method": "feedback", "config:damping": "0.3", "input:a": "1"}
    assert compare_inputs(nearest, feedback) == Reason("config changed", "method")
    assert compare_inputs(feedback, nearest) == Reason("config changed", "method")


def test_the_weightiest_kind_is_named_with_all_its_inputs():
    after = {"source:weights": "a", "config:plan.bits": "5", "config:a": "1", "input:statistics": "d"}
    before = {"source:weights": "a", "config:plan.bits": "4", "config:a": "0", "input:statistics": "c"}
    assert compare_inputs(before, after) == Reason("config changed", "a, plan.bits")
    assert compare_inputs(before, {**after, "source:weights": "b"}) == Reason("source changed", "weights")


def test_a_missing_output_is_named(run):
    run.finish("quantize", record(outputs=["blocks/003"]))
    assert str(run.decide("quantize", INPUTS)) == "output missing (blocks/003)"


def test_force_runs_what_is_up_to_date(run):
    run.finish("quantize", record())
    assert str(run.decide("quantize", INPUTS, force=True)) == "forced"


def test_a_record_survives_the_manifest_unchanged(run):
    run.finish("calibrate", record(outputs=["a"]))
    run.finish("quantize", record({"config:x": "1"}))
    assert RunDirectory(run.path).stages() == {
        "calibrate": record(outputs=["a"]),
        "quantize": record({"config:x": "1"}),
    }


def test_the_key_depends_on_names_and_values_but_not_on_their_order():
    keys = {key_of(INPUTS), key_of({**INPUTS, "config:plan.bits": "5"}), key_of({"x": "1"}), key_of({"y": "1"})}
    assert len(keys) == 4
    assert key_of({"b": "1", "a": "2"}) == key_of({"a": "2", "b": "1"})


# -- a damaged manifest ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        ("", "Expecting value: line 1 column 1 (char 0)"),
        ('{"stages"', "Expecting ':' delimiter: line 1 column 10 (char 9)"),
        ("{}", "'stages'"),
        ("[]", "list indices must be integers or slices, not str"),
        ('{"stages": []}', "'list' object has no attribute 'items'"),
    ],
)
def test_a_damaged_manifest_is_refused_with_the_way_out(run, content, finding):
    run.path.mkdir()
    run.file("manifest.json").write_text(content)
    with pytest.raises(AccullmError) as refused:
        run.decide("quantize", INPUTS)
    assert refused.value.exit_code == 2
    assert refused.value.line() == (
        f"{run.path}/manifest.json: not a manifest of this version ({finding}); "
        "start over with --fresh, or give another --run"
    )


def test_a_record_with_a_missing_field_is_refused(run):
    run.path.mkdir()
    run.file("manifest.json").write_text('{"stages": {"quantize": {"inputs": {}}}}')
    with pytest.raises(AccullmError, match="not a manifest of this version"):
        run.stages()


# -- files that appear at once -----------------------------------------------------------------------------


def test_a_file_appears_with_its_folder_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_text(path, "été")
    assert path.read_bytes() == "été".encode()
    assert os.listdir(path.parent) == ["b.json"]


@pytest.mark.parametrize("failure", [ValueError("bad"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, failure):
    path = tmp_path / "shard"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half of the n")
        raise failure

    with pytest.raises(type(failure)):
        write_file(path, write)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["shard"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_a_file_takes_the_mode_of_the_umask_whoever_writes_it(tmp_path, umask, mode):
    path = tmp_path / "shard.safetensors"
    (tmp_path / f".{path.name}.tmp").touch(0o600)  # left by a process that was killed
    before = os.umask(umask)
    try:
        write_file(path, lambda temporary: save_file({"w": torch.zeros(2)}, temporary))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_until_the_rename_readers_see_the_old_file(tmp_path):
    path = tmp_path / "shard"
    path.write_text("old")
    seen = []

    def write(temporary: Path) -> None:
        temporary.write_text("new")
        seen.append(path.read_text())

    write_file(path, write)
    assert (seen, path.read_text()) == (["old"], "new")


def test_the_content_is_synced_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    kind = {True: "folder", False: "file"}
    monkeypatch.setattr(
        os, "fsync", lambda handle: (order.append(kind[os.path.isdir(f"/proc/self/fd/{handle}")]), fsync(handle))
    )
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("rename"), replace(*paths)))
    write_text(tmp_path / "x", "y")
    assert order == ["file", "rename", "folder"]


def test_the_hash_of_a_file_is_sha256_of_its_bytes(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-4, the published example for the message "abc".
    assert file_sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_files_are_removed_by_name_and_by_pattern(run):
    for name in ("calibrate/block-00000.safetensors", "calibrate/streams.safetensors", "plan.json", "plan.json.old"):
        write_text(run.file(name), "")
    run.remove(["calibrate/*", "plan.json", "absent.json"])
    assert [path.name for path in run.path.rglob("*") if path.is_file() and path.name != ".lock"] == ["plan.json.old"]


def test_of_a_refused_run_the_lock_goes_last(run, monkeypatch):
    """Killed in between, what is left is still a run."""
    unlink, gone = Path.unlink, []
    monkeypatch.setattr(Path, "unlink", lambda path, **options: (gone.append(path.name), unlink(path, **options)))
    run.path.mkdir()
    for name in ("run.yaml", "source-hashes.json"):
        run.file(name).write_text("")
    with pytest.raises(AccullmError), run.locked(), run.removed_if_refused():
        raise AccullmError("no")
    assert gone[-1] == ".lock"
    assert set(gone) == {".lock", "run.yaml", "source-hashes.json"}
    assert not run.path.exists()


def test_a_copy_without_its_hidden_files_is_still_a_run(run):
    run.path.mkdir()
    run.file("notes.txt").write_text("")
    with pytest.raises(AccullmError, match="holds something else than a run"):
        run.check()
    run.finish("calibrate", record())
    run.check()
    assert run.stages() == {"calibrate": record()}
