"""GGUF files and directories as users have them: downloaded, alone or several, incomplete, of another model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from accullm_cli.commands.inspect import FileRow, inspect
from accullm_cli.commands.verify import verify
from accullm_cli.errors import AccullmError
from accullm_cli.formats import FORMATS, open_artifact
from accullm_cli.run import RunDirectory
from accullm_cli.stages.checks import check_config, check_sizes
from tests.artifacts import empty
from tests.formats.test_gguf import build, parts_of
from tests.tiny import tiny_config

NAME = "Tiny-Model.gguf"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose linears are Q4_0 and Q8_0 in turn, and its embedding, which is its head, Q8_0."""
    place = tmp_path_factory.mktemp("gguf")
    model = build("qwen2", torch.bfloat16, tie_word_embeddings=True, num_hidden_layers=1)
    FORMATS["gguf"].write(empty(place / "artifact"), parts_of(model, place / "run", encodings=("Q4_0", "Q8_0")))
    return place / "artifact"


@pytest.fixture
def downloads(written: Path, tmp_path: Path) -> Path:
    """A directory with the file alone."""
    shutil.copy(written / NAME, empty(tmp_path / "downloads") / "model.gguf")
    return tmp_path / "downloads"


def refusal(path: Path) -> str:
    with pytest.raises(AccullmError) as caught:
        open_artifact(path)
    return caught.value.line()


@pytest.mark.parametrize("place", ["ours", "a file", "a directory with one file"])
def test_inspect_names_what_tensors_are_stored_as(place: str, written: Path, downloads: Path) -> None:
    path = {"ours": written, "a file": downloads / "model.gguf", "a directory with one file": downloads}[place]
    found = inspect(path)
    rows = {row.name: row for row in found.encodings}
    # q, v, gate and down are Q4_0; k, o, up and the embedding Q8_0; 64 and 96 wide, 2 of 4 heads of keys.
    four, eight = 64 * 64 + 32 * 64 + 2 * 64 * 96, 32 * 64 + 64 * 64 + 64 * 96 + 264 * 64
    assert (rows["Q4_0"].tensors, rows["Q4_0"].weights, rows["Q4_0"].bits_per_weight) == (4, four, 4.5)
    assert (rows["Q8_0"].tensors, rows["Q8_0"].weights, rows["Q8_0"].bits_per_weight) == (4, eight, 8.5)
    single = 3 * 64 + 64 + 2 * 32  # norms, and biases of q, k and v
    assert (rows["F32"].tensors, rows["F32"].weights, rows["F32"].bits_per_weight) == (6, single, 32)
    assert list(rows) == ["Q8_0", "Q4_0", "F32"]
    assert [row.encoding for row in found.linears] == ["Q4_0", "Q8_0", "Q4_0", "Q8_0", "Q4_0", "Q8_0", "Q4_0"]
    assert found.path == str(path)
    if place != "ours":
        assert found.files == (FileRow("model.gguf", (downloads / "model.gguf").stat().st_size),)
    bits = 4.5 * four + 8.5 * eight + 32 * single
    assert found.all_bits_per_weight == pytest.approx(bits / (four + eight + single))


def test_a_downloaded_file_is_verified(downloads: Path) -> None:
    assert verify(downloads / "model.gguf").intact
    assert verify(downloads).tensors_checked == 14
    content = bytearray((downloads / "model.gguf").read_bytes())
    (downloads / "model.gguf").write_bytes(content[:-1000])
    (problem,) = verify(downloads).problems
    assert "damaged or not a GGUF file (tensor " in problem


def test_of_several_files_in_a_directory_one_is_to_be_named(downloads: Path) -> None:
    shutil.copy(downloads / "model.gguf", downloads / "other.gguf")
    assert refusal(downloads) == (
        f"{downloads}: holds 2 files each of which may be a model, model.gguf and other.gguf; give the path of one"
    )
    assert open_artifact(downloads / "other.gguf").format == "gguf"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("accullm.json", "{}/accullm.json: file is missing; copy the artifact again"),
        ("config.json", "{}/config.json: file is missing; copy or download it again"),
        (NAME, "{}/" + NAME + ": file is missing; copy or download it again"),
    ],
)
def test_each_missing_file_is_one_line(name: str, line: str, written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "artifact")
    (tmp_path / "artifact" / name).unlink()
    assert refusal(tmp_path / "artifact") == line.format(tmp_path / "artifact")


def test_a_configuration_of_no_model_is_one_line(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "artifact")
    path = tmp_path / "artifact" / "config.json"
    content = {key: value for key, value in json.loads(path.read_text()).items() if key != "model_type"}
    path.write_text(json.dumps(content))
    assert refusal(tmp_path / "artifact") == f"{path}: names no model_type that is read; copy the artifact again"


def job_of(**config: Any) -> Any:
    return cast(Any, SimpleNamespace(source=SimpleNamespace(config=config, origin="other")))


def test_an_original_of_other_sizes_is_refused(written: Path) -> None:
    check_sizes(job_of(hidden_size=64, num_hidden_layers=1, vocab_size=264), written, written)
    check_sizes(job_of(text_config={}), written, written)  # sizes that are elsewhere are not compared
    with pytest.raises(AccullmError) as caught:
        check_sizes(job_of(hidden_size=64, num_hidden_layers=30), written, written)
    assert caught.value.line() == (
        f"{written}: was made from another model than other: its num_hidden_layers is 1, and that one's 30; "
        "name its original with --original"
    )


STOCHASTIC = {"rounding__method": "stochastic", "plan__outliers": 0}


def test_stochastic_rounding_is_refused_before_the_model_is_opened(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "absent", tmp_path / "out", **STOCHASTIC, export__format="[gguf]")
    with pytest.raises(AccullmError) as caught:
        check_config(config, RunDirectory(tmp_path / "run"), converts=True, only_validates=False)
    assert caught.value.line() == (
        "--rounding stochastic: gguf has grids that need not hold the range of the weights, so that they cannot be "
        "rounded at random; use another --rounding, or export to the format accullm"
    )
    check_config(
        tiny_config(tmp_path / "absent", tmp_path / "out", **STOCHASTIC, export__format="[mlx]"),
        RunDirectory(tmp_path / "run"), converts=True, only_validates=False,
    )  # fmt: skip
