"""--file-size: what it may be, and that a file of that size comes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accullm_cli.config_file import load_config
from accullm_cli.errors import AccullmError
from accullm_cli.pipeline import convert
from accullm_cli.run import RunDirectory
from accullm_cli.stages.checks import check_config
from accullm_cli.stages.file_size import file_bytes
from tests.llama_cpp import byte_tokenizer
from tests.tiny import edit_config, make_checkpoint, tiny_config

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


@pytest.mark.parametrize("asked", [[], ["IQ4_NL", "Q5_1"]])
def test_the_file_is_no_larger_and_not_much_smaller(asked: list[str], tmp_path: Path) -> None:
    model = make_checkpoint("llama-tied", tmp_path / "model")
    edit_config(model, vocab_size=260)
    byte_tokenizer().save_pretrained(model)
    settings = {
        "export__format": '["gguf"]',
        "plan__file_size": "60000",
        "plan__encodings": json.dumps(asked),
        "plan__outliers": "null",
        "plan__group_size": "null",
        "calibration__gradient_samples": 2,
        "calibration__samples": 2,
    }
    config = tiny_config(model, tmp_path / "out", **settings)
    config = config.model_copy(update={"machine": config.machine.model_copy(update={"run": tmp_path / "run"})})
    convert(config)
    (file,) = (tmp_path / "out").glob("*.gguf")
    # One step of the smallest linear is 32 * 64 / 8 bytes for half a bit.
    assert 60_000 - 3_000 < file.stat().st_size <= 60_000
    encodings = {
        row.get("encoding") for row in json.loads((tmp_path / "out" / "accullm.json").read_text())["linears"].values()
    }
    assert len(encodings) > 1
    # What saves little and is slow has to be asked for.
    assert encodings <= set(asked) if asked else encodings.isdisjoint({"Q4_1", "Q5_1"})
