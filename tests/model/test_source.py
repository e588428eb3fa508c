"""Opening a model: what is found in a directory, where a model is looked for, and the checks for its readers."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from accullm_cli.errors import AccullmError
from accullm_cli.model.source import TensorInfo, check_finite, check_shapes, open_source
from accullm_cli.progress import Event
from tests.model.checkpoints import read, refusal, tensors, write_config

# -- what is found ---------------------------------------------------------------------------------------------


def test_reads_names_dtypes_and_shapes_of_a_single_file(model: Path) -> None:
    source = read(model)
    file = model / "model.safetensors"
    data = file.stat().st_size - 32 * 8 * 4 - 8 * 2  # the widest dtype comes first
    assert source.tensors == {
        "model.norm.weight": TensorInfo(file, "F16", (8,), data + 1024, data + 1040),
        "model.embed_tokens.weight": TensorInfo(file, "F32", (32, 8), data, data + 1024),
    }
    assert source.weight_bytes == file.stat().st_size
    assert source.config["hidden_size"] == 8
    assert source.directory == model
    assert source.origin == str(model)
    assert source.name == "tiny-model"
    assert source.records == ()


def test_reads_every_shard_in_the_order_of_the_index(sharded: Path) -> None:
    source = read(sharded)
    assert {name: tensor.file.name for name, tensor in source.tensors.items()} == {
        "model.norm.weight": "model-1-of-2.safetensors",
        "model.embed_tokens.weight": "model-2-of-2.safetensors",
    }
    assert source.weight_bytes == sum(path.stat().st_size for path in sharded.glob("*.safetensors"))


def test_companions_are_all_files_but_weights_code_and_what_is_hidden(model: Path) -> None:
    companions = ["LICENSE.txt", "README.md", "additional_chat_templates/tools.jinja", "chat_template.jinja",
                  "imported.json", "mm/processor_config.json", "trainer_state.json", "voices.dat"]  # fmt: skip
    left = ["modeling_evil.py", "optimizer.pt", "pytorch_model.bin", "original/consolidated.00.pth", ".gitattributes",
            "consolidated.safetensors", "pytorch_model.bin.index.json"]  # fmt: skip
    for name in (*companions, *left):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("x")
    source = read(model)
    assert source.companions == {name: model / name for name in sorted([*companions, "tokenizer.json"])}
    assert source.records == (
        "left behind: hidden files (.gitattributes); weights that are not read (consolidated.safetensors, "
        "optimizer.pt, original/consolidated.00.pth, pytorch_model.bin, pytorch_model.bin.index.json); "
        "code (modeling_evil.py)",
    )


def test_links_to_nowhere_and_to_directories_are_left_behind(model: Path) -> None:
    (model / "chat_template.jinja").symlink_to("absent")
    (model / "data").symlink_to(model.parent)
    source = read(model)
    assert list(source.companions) == ["tokenizer.json"]
    assert source.records == ("left behind: links to directories (data); broken links (chat_template.jinja)",)


def test_a_run_inside_the_model_s_directory_is_no_part_of_the_model(model: Path) -> None:
    cache = model / "run"
    first = open_source(str(model), cache)
    second = open_source(str(model), cache)
    assert (second.sha256, list(second.companions)) == (first.sha256, ["tokenizer.json"])
    assert second.records == ("left behind: what accullm wrote (run/)",)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_hash_depends_on_the_content_of_every_file(model: Path, name: str) -> None:
    """Weights and config.json make one, companions another: what is rounded does not depend on a licence."""
    before = read(model)
    if name == "model.safetensors":
        save_file({**tensors(), "model.norm.weight": np.zeros(8, dtype=np.float16)}, model / name)
    else:
        (model / name).write_text((model / name).read_text() + " ")
    after = read(model)
    is_companion = name == "tokenizer.json"
    assert (after.sha256 == before.sha256) is is_companion
    assert (after.companions_sha256 != before.companions_sha256) is is_companion


def test_hash_does_not_depend_on_the_place(model: Path, tmp_path: Path) -> None:
    before = read(model).sha256
    assert read(model.rename(tmp_path / "elsewhere")).sha256 == before


def test_hash_is_over_names_and_file_hashes(model: Path) -> None:
    def digest(*names: str) -> str:
        lines = [f"{name} {hashlib.sha256((model / name).read_bytes()).hexdigest()}" for name in names]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    source = read(model)
    assert source.sha256 == digest("config.json", "model.safetensors")
    assert source.companions_sha256 == digest("tokenizer.json")


def test_files_are_hashed_once_while_they_stay_the_same(model: Path) -> None:
    cache = model.parent / "cache"
    events: list[Event] = []
    open_source(str(model), cache, events.append)
    assert [event.label for event in events if event.kind == "step"] == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    events.clear()
    open_source(str(model), cache, events.append)
    assert events == []
    (model / "tokenizer.json").write_text('{"changed": 1}')
    open_source(str(model), cache, events.append)
    assert [event.label for event in events if event.kind == "step"] == ["tokenizer.json"]


def test_an_edit_that_keeps_the_size_is_noticed(model: Path) -> None:
    before = read(model).companions_sha256
    with open(model / "tokenizer.json", "r+") as file:  # in place: the inode stays, too
        file.write("[]")
    os.utime(model / "tokenizer.json", ns=(1, 1))
    assert read(model).companions_sha256 != before


def test_a_damaged_hash_cache_is_made_anew(model: Path) -> None:
    before = read(model).sha256
    (model.parent / "cache" / "source-hashes.json").write_text("{damaged")
    assert read(model).sha256 == before


def test_an_integer_buffer_is_no_weight(model: Path) -> None:
    save_file({**tensors(), "position_ids": np.arange(4)}, model / "model.safetensors")
    assert read(model).tensors["position_ids"].dtype == "I64"


def test_a_known_model_type_with_remote_code_uses_transformers_own_and_says_so(model: Path) -> None:
    write_config(model, auto_map={"AutoModelForCausalLM": "evil.Evil"})
    assert read(model).records == (
        "config.json names Python code of its own (auto_map); it is not run, transformers' own model is used",
    )


@pytest.fixture
def snapshot(model: Path, tmp_path: Path) -> Path:
    """The model as the hub's cache has it: a directory of links into the blobs of its repository."""
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in list(model.iterdir()):
        path.rename(repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    return snapshot


def test_links_into_the_blobs_of_a_hub_cache_are_followed(snapshot: Path) -> None:
    assert set(read(snapshot).tensors) == set(tensors())


def test_a_link_to_a_snapshot_is_the_snapshot(snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(snapshot)
    assert read(tmp_path / "link").sha256 == read(snapshot).sha256


def test_a_directory_of_links_into_a_snapshot_is_the_snapshot(snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    for path in snapshot.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    assert read(tmp_path / "links").sha256 == read(snapshot).sha256


# -- what is refused: which model --------------------------------------------------------------------------------


def test_refuses_a_path_that_is_not_there(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent") == f"{tmp_path}/absent: no such file or directory; check its spelling"


def test_refuses_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("")
    assert refusal(tmp_path / "x.safetensors") == (
        f"{tmp_path}/x.safetensors: is neither a model directory nor a GGUF file; give the directory that it lies in"
    )


def test_refuses_an_unknown_name_with_the_nearest_alias(tmp_path: Path) -> None:
    assert refusal("mistral-7", tmp_path) == (
        "mistral-7: no directory, GGUF file, alias or hub id (owner/name) of this name; did you mean mistral-7b?"
    )


def test_refuses_an_unknown_name_that_is_near_to_none(tmp_path: Path) -> None:
    assert refusal("zzzzzz", tmp_path) == (
        "zzzzzz: no directory, GGUF file, alias or hub id (owner/name) of this name; 'accullm models' lists the aliases"
    )


def test_an_existing_path_comes_before_an_alias(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model.rename(model.parent / "mistral-7b")
    monkeypatch.chdir(model.parent)
    assert open_source("mistral-7b", model.parent / "cache").origin == str(model.parent / "mistral-7b")


# -- checks for those who read the tensors -----------------------------------------------------------------------


def line_of(caught: pytest.ExceptionInfo[AccullmError]) -> str:
    return caught.value.line()


def test_check_shapes_accepts_what_agrees_and_ignores_the_rest(model: Path) -> None:
    check_shapes(read(model), {"model.norm.weight": (8,)})


def test_check_shapes_names_the_first_that_disagrees_and_counts_the_others(model: Path) -> None:
    with pytest.raises(AccullmError) as caught:
        check_shapes(read(model), {"model.norm.weight": (9,), "model.embed_tokens.weight": (32, 9)})
    assert line_of(caught) == (
        f"{model}: tensor model.norm.weight has shape [8], but config.json makes it [9] (and 1 more); config.json and "
        "weights belong to different models: take both from one place"
    )


def test_check_shapes_names_the_first_that_is_missing_and_counts_the_others(model: Path) -> None:
    with pytest.raises(AccullmError) as caught:
        check_shapes(read(model), {"a.weight": (9,), "model.norm.weight": (8,), "b.weight": (1,), "c.weight": (1,)})
    assert line_of(caught) == (
        f"{model}: tensor a.weight is missing (and 2 more); download the weights again, or correct config.json"
    )


def test_check_finite_accepts_finite_and_integer_tensors() -> None:
    check_finite("a", torch.tensor([65504.0, -1e-7], dtype=torch.float16))
    check_finite("b", torch.arange(3))


def test_check_finite_names_tensor_count_and_first_place() -> None:
    tensor = torch.zeros(3, 4, dtype=torch.bfloat16)
    tensor[1, 2], tensor[2, 0], tensor[2, 3] = float("nan"), float("inf"), float("-inf")
    with pytest.raises(AccullmError) as caught:
        check_finite("model.norm.weight", tensor)
    assert line_of(caught) == (
        "tensor model.norm.weight holds 3 NaN or Inf values, the first at [1, 2]; "
        "the checkpoint is damaged: download it again, or take another"
    )
