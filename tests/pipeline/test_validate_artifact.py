"""Artifacts of somebody else, wherever they are."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from accullm_cli.formats import FORMATS
from accullm_cli.formats.manifest import read_manifest
from accullm_cli.pipeline import (
    convert,
    dry_run,
    validate_artifact,
)
from accullm_cli.progress import Event
from accullm_cli.run import locked_output
from tests.artifacts import empty
from tests.formats.test_gguf_places import split
from tests.llama_cpp import byte_tokenizer
from tests.pipeline.observe import refusal, snapshot
from tests.streaming import fast_config
from tests.tiny import edit_config, make_checkpoint


@pytest.fixture
def artifact(finished: Path, tmp_path: Path) -> Path:
    """Moved away from where it was made, without its run directory."""
    shutil.copytree(finished, tmp_path / "moved")
    return tmp_path / "moved"


def test_a_moved_artifact_is_measured_against_a_moved_original(llama: Path, artifact: Path, tmp_path: Path) -> None:
    expected = convert(fast_config(llama, artifact.with_name("again")))
    shutil.copytree(llama, tmp_path / "original")
    config = fast_config(llama, artifact).model_copy(update={"model": str(tmp_path / "original")})
    report = validate_artifact(artifact, config)
    assert report.measurements == expected.measurements
    assert report.artifact == str(artifact)
    assert report.model == str(tmp_path / "original")
    assert [stage.name for stage in report.stages] == ["reading", "reference", "validate accullm"]
    assert report.bits_per_weight == expected.bits_per_weight
    assert (artifact.with_name("moved.validation") / "run.yaml").exists()
    assert read_manifest(artifact).fidelity is not None


def test_measuring_again_finds_everything_done(llama: Path, artifact: Path) -> None:
    config = fast_config(llama, artifact)
    validate_artifact(artifact, config)
    again = validate_artifact(artifact, config)
    assert [stage.reason for stage in again.stages] == ["up to date"] * 3
    forced = validate_artifact(artifact, config, fresh=True)
    assert [stage.reason for stage in forced.stages] == ["forced"] * 3


def test_another_model_is_not_its_original(artifact: Path, tmp_path: Path) -> None:
    other = make_checkpoint("qwen2", tmp_path / "other")
    before = snapshot(artifact)
    assert refusal(lambda: validate_artifact(artifact, fast_config(other, artifact))) == (
        f"{artifact}: was made from another model than {other}; name its original with --original"
    )
    assert snapshot(artifact) == before
    assert not artifact.with_name("moved.validation").exists()


def test_an_artifact_whose_original_has_no_name_to_find_it_by(artifact: Path) -> None:
    """It was made from a directory, of which it keeps the last part alone."""
    config = fast_config(artifact, artifact)
    assert refusal(lambda: validate_artifact(artifact, config)) == (
        f"{artifact}: was made from model; name its place with --original"
    )


def test_other_text_that_is_too_short_is_refused_before_any_work(llama: Path, artifact: Path, tmp_path: Path) -> None:
    letters = tmp_path / "letters.txt"
    letters.write_text("dear sir " * 6)
    config = fast_config(llama, artifact, validation__other_text=letters)
    assert refusal(lambda: validate_artifact(artifact, config)) == (
        f"other text {letters}: has 1 windows, and an interval needs 2; give more text, or --other-text none"
    )
    assert not artifact.with_name("moved.validation").exists()


def test_an_artifact_is_not_replaced_while_it_is_measured(llama: Path, artifact: Path, tmp_path: Path) -> None:
    """Else figures of the one that was there would stand in the new one's manifest. By a link it is the same one."""
    (tmp_path / "link").symlink_to(artifact)
    held: list[str] = []

    def try_to_convert(event: Event) -> None:
        if event.stage == "reading" and event.kind == "start":
            held.append(refusal(lambda: convert(fast_config(llama, artifact, machine__run=tmp_path / "other"))))

    validate_artifact(tmp_path / "link", fast_config(llama, artifact), try_to_convert, fresh=True)
    assert len(held) == 1
    assert held[0].startswith(f"{artifact}: is in use by process {os.getpid()} ")
    with locked_output(artifact):
        line = refusal(lambda: validate_artifact(tmp_path / "link", fast_config(llama, artifact)))
    assert line.startswith(f"{artifact}: is in use by process {os.getpid()} ")
    assert line.endswith("; wait for it to end")


def test_what_is_no_artifact_is_refused(llama: Path, tmp_path: Path) -> None:
    config = fast_config(llama, tmp_path / "out")
    assert refusal(lambda: validate_artifact(llama, config)) == (
        f"{llama}: not an artifact of a known format ({', '.join(FORMATS)}); make one with: accullm convert MODEL"
    )


def test_a_validation_leaves_a_conversions_files_alone(llama: Path, finished: Path, tmp_path: Path) -> None:
    """Both keep a reference, but a validation calibrates nothing."""
    run = tmp_path / "run"
    shutil.copytree(finished.with_name("out.run"), run)
    before = snapshot(run)
    config = fast_config(llama, finished, machine__run=run)
    assert refusal(lambda: validate_artifact(finished, config)) == (
        f"{run}: holds a conversion; give another directory with --run"
    )
    assert snapshot(run) == before


def test_a_conversion_does_not_go_on_in_a_validations_directory(llama: Path, artifact: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = fast_config(llama, artifact, machine__run=run)
    validate_artifact(artifact, config)
    line = f"{run}: holds the validation of a finished artifact; give another directory with --run"
    config = config.model_copy(update={"export": config.export.model_copy(update={"out": tmp_path / "out"})})
    assert refusal(lambda: convert(config)) == refusal(lambda: dry_run(config)) == line


def test_windows_longer_than_the_model_reads_are_refused(tmp_path: Path) -> None:
    """GPT-2 has no position beyond its last one; other models compute nonsense there."""
    source = make_checkpoint("gpt2", tmp_path / "model")
    convert(fast_config(source, tmp_path / "out"))
    line = "--seq-len: 300 is more than the model's 256 positions; give 256 or less"
    longer = fast_config(source, tmp_path / "out", calibration__seq_len=300)
    assert refusal(lambda: validate_artifact(tmp_path / "out", longer)) == line
    assert refusal(lambda: convert(longer)) == line


def test_a_file_alone_is_an_artifact(tmp_path: Path) -> None:
    """A downloaded GGUF file, in a directory in which nothing else of it may lie."""
    model = make_checkpoint("llama-tied", tmp_path / "model")
    edit_config(model, vocab_size=260)
    byte_tokenizer().save_pretrained(model)
    sets = {"export__format": '["gguf"]', "plan__outliers": "null", "plan__group_size": "null"}
    expected = convert(fast_config(model, tmp_path / "out", **sets))
    file = tmp_path / "downloads" / "some-model.gguf"
    file.parent.mkdir()
    shutil.copy(next((tmp_path / "out").glob("*.gguf")), file)
    report = validate_artifact(file, fast_config(model, tmp_path / "out", **sets))
    assert report.measurements == expected.measurements
    assert (report.artifact, report.artifact_bytes) == (str(file), file.stat().st_size)
    assert sorted(path.name for path in file.parent.iterdir()) == [file.name, f"{file.name}.validation"]
    again = validate_artifact(file, fast_config(model, tmp_path / "out", **sets))
    assert [stage.reason for stage in again.stages] == ["up to date"] * 3
    first = split(file, empty(tmp_path / "parts"), 12)
    report = validate_artifact(first, fast_config(model, tmp_path / "out", **sets))
    assert report.measurements == expected.measurements
    assert report.artifact_bytes == sum(part.stat().st_size for part in first.parent.glob("*.gguf"))
    assert len(list(first.parent.glob("*.gguf"))) > 1
