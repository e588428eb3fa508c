"""--file-size: what it may be, and that a file of that size comes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from accullm_cli.config_file import load_config
from accullm_cli.errors import AccullmError
from accullm_cli.formats.gguf_pace import TIMES, pace_of
from accullm_cli.model.gguf_file import read_gguf
from accullm_cli.pipeline import convert, dry_run
from accullm_cli.run import RunDirectory
from accullm_cli.stages.checks import check_config
from accullm_cli.stages.file_size import file_bytes
from tests.llama_cpp import byte_tokenizer
from tests.tiny import edit_checkpoint, edit_config, make_checkpoint, tiny_config

SIZES = {"105MB": 105_000_000, "1.5 GiB": 3 << 29, "64k": 64_000, "123": 123, "2kib": 2048}


@pytest.mark.parametrize("text", SIZES)
def test_sizes_have_units(text: str) -> None:
    assert file_bytes(text) == SIZES[text]


def test_a_file_stands_for_its_size(tmp_path: Path) -> None:
    (tmp_path / "other.gguf").write_bytes(bytes(777))
    assert file_bytes(str(tmp_path / "other.gguf")) == 777


def test_what_is_neither_is_refused() -> None:
    with pytest.raises(AccullmError) as refusal:
        file_bytes("large")
    assert refusal.value.line() == (
        "--file-size: 'large' is neither a size nor a file; give 105MB, say, or the path of a file"
    )


def test_a_format_of_many_files_has_no_such_size(tmp_path: Path) -> None:
    config = load_config("model", sets=["plan.file_size=1MB"])
    with pytest.raises(AccullmError, match="an artifact of accullm is not one file"):
        check_config(config, RunDirectory(tmp_path / "run"), converts=True, only_validates=False)


def file_of(size: str, asked: list[str], place: Path) -> tuple[Path, tuple[str, ...]]:
    """A tiny model's file of a size, of the encodings that were asked for, and what the report says of it.

    The model and its calibration are kept for the next one.
    """
    model = place / "model"
    if not model.exists():
        edit_config(make_checkpoint("llama-tied", model), vocab_size=260)
        byte_tokenizer().save_pretrained(model)
    settings = {
        "export__format": '["gguf"]',
        "plan__file_size": size,
        "plan__encodings": json.dumps(asked),
        "plan__outliers": "null",
        "plan__group_size": "null",
        "calibration__gradient_samples": 2,
        "calibration__samples": 2,
    }
    out = place / "-".join(["out", Path(size).stem, *asked])
    config = tiny_config(model, out, **settings)
    report = convert(config.model_copy(update={"machine": config.machine.model_copy(update={"run": place / "run"})}))
    (file,) = out.glob("*.gguf")
    return file, report.records


def test_what_the_model_does_not_run_is_left_out_of_a_file_and_told(tmp_path: Path) -> None:
    model = make_checkpoint("llama", tmp_path / "model")
    edit_config(model, vocab_size=260, num_nextn_predict_layers=1)
    edit_checkpoint(model, {"model.layers.2.eh_proj.weight": torch.zeros(64, 128, dtype=torch.bfloat16)})
    byte_tokenizer().save_pretrained(model)
    settings = {"export__format": '["gguf"]', "plan__outliers": "null", "plan__group_size": "null"}
    report = convert(tiny_config(model, tmp_path / "out", **settings))
    said = "LlamaForCausalLM does not run model.layers.2: tensor model.layers.2.eh_proj.weight left out of the artifact"
    assert any(sentence.startswith(said) for sentence in report.records)
    (file,) = (tmp_path / "out").glob("*.gguf")
    assert not any(name.startswith("blk.2.") for name in read_gguf(file).tensors)
    both = {**settings, "export__format": '["accullm", "gguf"]'}
    with pytest.raises(AccullmError) as caught:
        dry_run(tiny_config(model, tmp_path / "both", **both))
    assert caught.value.line() == (
        "--format gguf: llama.cpp's architecture llama has no tensor for model.layers.2.eh_proj.weight; make the GGUF "
        "file in a run of its own, which leaves it out"
    )


def manifest(file: Path) -> Any:
    return json.loads((file.parent / "accullm.json").read_text())


@pytest.mark.parametrize("asked", [[], ["IQ4_NL", "Q5_1"]])
def test_the_file_is_no_larger_and_not_much_smaller(asked: list[str], tmp_path: Path) -> None:
    file, _ = file_of("60000", asked, tmp_path)
    # One step of the smallest linear is 32 * 64 / 8 bytes for half a bit.
    assert 60_000 - 3_000 < file.stat().st_size <= 60_000
    encodings = {row.get("encoding") for row in manifest(file)["linears"].values()}
    assert len(encodings) > 1
    # What saves little and is slow has to be asked for.
    assert encodings <= set(asked) if asked else encodings.isdisjoint({"Q4_1", "Q5_1"})


# -- as fast as another file -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the two encodings that are quick."""
    return file_of("60000", ["IQ4_NL", "Q8_0"], tmp_path_factory.mktemp("other"))[0]


def paces(*files: Path) -> list[float]:
    return [pace.time for pace in map(pace_of, files) if pace is not None]


def test_a_file_is_no_larger_and_no_slower_than_the_one_that_is_named(other: Path, tmp_path: Path) -> None:
    size = other.stat().st_size
    (of_its_size, _), (as_fast, records) = (file_of(asked, [], tmp_path) for asked in (str(size), str(other)))
    slow, quick, limit = paces(of_its_size, as_fast, other)
    assert quick <= limit < slow
    assert size - 3_000 < as_fast.stat().st_size <= size
    assert not [sentence for sentence in records if "fast" in sentence]


def test_what_cannot_be_as_fast_says_so(other: Path, tmp_path: Path) -> None:
    found, records = file_of(str(other), ["Q5_0", "Q4_1"], tmp_path)
    slow, limit = paces(found, other)
    assert (
        f"no plan of the size of model.gguf is as fast as it is on a CPU; this one takes {slow / limit - 1:.0%} longer"
        in records
    )


def test_a_file_of_unknown_speed_is_a_size_alone(other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(TIMES, "Q8_0")  # type: ignore[arg-type]
    (found, records), (of_its_size, _) = (
        file_of(asked, [], tmp_path) for asked in (str(other), str(other.stat().st_size))
    )
    assert manifest(found)["linears"] == manifest(of_its_size)["linears"]
    said = f"{other.name} holds Q8_0, and how fast a CPU is with that is not known here: the plan goes by size alone"
    assert said in records
