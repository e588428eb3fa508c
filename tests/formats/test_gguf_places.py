"""GGUF files and directories as users have them: downloaded, alone or several, incomplete, of another model."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter

from accullm_cli.commands.compare import compare
from accullm_cli.commands.inspect import FileRow, inspect
from accullm_cli.commands.verify import verify
from accullm_cli.errors import AccullmError
from accullm_cli.formats import FORMATS, open_artifact
from accullm_cli.model.source import open_source
from accullm_cli.run import RunDirectory
from accullm_cli.stages.checks import check_config, check_sizes
from accullm_cli.stages.file_size import file_bytes
from tests.artifacts import empty
from tests.formats.test_gguf import build, parts_of
from tests.llama_cpp import llama_cpp
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


def test_a_file_of_another_architecture_is_one_line(downloads: Path) -> None:
    path = downloads / "model.gguf"
    path.write_bytes(path.read_bytes().replace(b"qwen2", b"rwkv6"))
    assert refusal(path) == (
        f"{path}: architecture rwkv6 is not read as an artifact; those that are: "
        "afmoe, arcee, bloom, chatglm, cohere2, command-r, dots1, ernie4_5, ernie4_5-moe, exaone, "
        "exaone-moe, exaone4, falcon, gemma, gemma2, gemma3, glm4, glm4moe, gptneox, granite, granitemoe, "
        "hunyuan-dense, hunyuan-moe, jais2, llama, minimax-m2, mistral3, mpt, nemotron, olmo, olmo2, olmoe, "
        "phi2, phi3, qwen2, qwen2moe, qwen3, qwen3moe, seed_oss, smollm3, stablelm, starcoder, starcoder2"
    )


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


# -- parts -------------------------------------------------------------------------------------------------


def split(path: Path, directory: Path, tensors: int = 6) -> Path:
    """The same model in parts of so many tensors, by the `gguf` package; the first of them."""
    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(directory / "model.gguf", architecture, split_max_tensors=tensors)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(directory.iterdir())


@pytest.fixture
def parts(written: Path, tmp_path: Path) -> Path:
    """The first of three parts, in a directory of their own."""
    path = split(written / NAME, empty(tmp_path / "parts"))
    assert [file.name for file in sorted(path.parent.iterdir())] == [f"model-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    return path


def test_a_model_in_parts_is_the_model_in_one_file(parts: Path, written: Path) -> None:
    whole, found = open_artifact(written), open_artifact(parts)
    assert found.plan.quantized == whole.plan.quantized
    assert sorted(found.names()) == sorted(whole.names())
    for name in whole.plan.quantized:
        assert torch.equal(found.linear(name).dequantize(), whole.linear(name).dequantize())
    for name in whole.names():
        assert torch.equal(found.tensor(name), whole.tensor(name))
    assert verify(parts).intact
    files = tuple(FileRow(part.name, part.stat().st_size) for part in sorted(parts.parent.iterdir()))
    for place in (parts, parts.parent):
        inspection = inspect(place)
        assert inspection.files == files
        assert inspection.encodings == inspect(written).encodings
    assert file_bytes(str(parts)) == sum(row.bytes for row in files)
    assert {row.relative_difference for row in compare(parts, written).linears} == {0.0}


def test_llama_cpp_takes_these_parts_for_a_model(parts: Path, written: Path) -> None:
    ids = list(range(20))
    with llama_cpp().model(written / NAME, len(ids)) as whole, llama_cpp().model(parts, len(ids)) as found:
        assert np.array_equal(whole.logits(ids), found.logits(ids))


def test_another_part_than_the_first_is_refused(parts: Path) -> None:
    second = parts.with_name("model-00002-of-00003.gguf")
    assert refusal(second) == f"{second}: is a part of a model in 3 parts, and not the first; give {parts}"
    parts.unlink()
    found = f"{parts.parent}: holds 2 files each of which may be a model, {second.name} and model-00003-of-00003.gguf"
    assert refusal(parts.parent) == f"{found}; give the path of one"


def test_a_missing_part_is_named(parts: Path) -> None:
    third = parts.with_name("model-00003-of-00003.gguf")
    third.unlink()
    line = f"{third}: part 3 of 3 is missing; put it beside the first"
    assert refusal(parts) == refusal(parts.parent) == line
    assert verify(parts).problems == (line,)


def test_parts_that_were_renamed_are_refused(parts: Path) -> None:
    path = parts.rename(parts.with_name("other.gguf"))
    assert refusal(path) == (
        f"{path}: is the first of 3 parts of a model, which its name does not say; "
        "give them the names that they had, NAME-00001-of-00003.gguf and so on"
    )


def test_parts_of_several_models_are_refused(parts: Path, written: Path, tmp_path: Path) -> None:
    hint = "the parts must be of one model: download or copy them again"
    second, third = (parts.with_name(f"model-0000{number}-of-00003.gguf") for number in (2, 3))
    whole = third.read_bytes()
    shutil.copy(second, third)
    assert refusal(parts) == f"{third}: is not part 3 of 3 (split.no, split.count = 1, 3); {hint}"
    shutil.copy(written / NAME, third)
    assert refusal(parts) == f"{third}: is not part 3 of 3 (split.no, split.count = None, None); {hint}"
    third.write_bytes(whole)
    other = split(written / NAME, empty(tmp_path / "other"), 5)  # in three, of five each
    shutil.copy(other.with_name(second.name), second)
    assert refusal(parts) == f"{second}: tensor blk.0.attn_v.bias is in {parts.name}, too; {hint}"
    third.write_bytes(other.with_name(third.name).read_bytes())
    counts = (b"split.tensors.count" + struct.pack("<Ii", 5, count) for count in (14, 15))  # 5: of type INT32
    parts.write_bytes(other.read_bytes().replace(*counts))
    what = "promises 15 tensors in all parts of the model (split.tensors.count), and they hold 14"
    assert refusal(parts) == f"{parts}: {what}; {hint}"


def test_a_model_in_parts_is_not_converted_from(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(AccullmError) as caught:
        open_source(str(parts), tmp_path / "cache")
    line = f"{parts}: one of 3 parts of a model; join them with 'llama-gguf-split --merge' first"
    assert caught.value.line() == line


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
