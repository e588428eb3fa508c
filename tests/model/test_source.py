"""Opening a model: what is found in a directory, and every refusal with its whole line."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from accullm_cli.errors import AccullmError
from accullm_cli.model.source import ModelSource, TensorInfo, check_finite, check_shapes, open_source
from accullm_cli.progress import Event

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 32,
}
AGAIN = "download or copy the file again"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with a configuration, two tensors and a tokenizer file."""
    directory = tmp_path / "tiny model"
    directory.mkdir()
    write_config(directory)
    save_file(tensors(), directory / "model.safetensors")
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture
def sharded(model: Path) -> Path:
    """The same in two shards."""
    (model / "model.safetensors").unlink()
    parts = {name: f"model-{number}-of-2.safetensors" for number, name in enumerate(tensors(), start=1)}
    for name, part in parts.items():
        save_file({name: tensors()[name]}, model / part)
    write_index(model, parts)
    return model


def tensors() -> dict[str, np.ndarray]:
    return {
        "model.norm.weight": np.ones(8, dtype=np.float16),
        "model.embed_tokens.weight": np.arange(32 * 8, dtype=np.float32).reshape(32, 8),
    }


def write_config(directory: Path, **changes: Any) -> None:
    config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def read(directory: Path) -> ModelSource:
    return open_source(str(directory), directory.parent / "cache")


def refusal(directory: Path | str, cache: Path | None = None) -> str:
    with pytest.raises(AccullmError) as caught:
        open_source(str(directory), cache or Path(directory).parent / "cache")
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.line()
    return caught.value.line()


# -- what is found ---------------------------------------------------------------------------------------------


def test_reads_names_dtypes_and_shapes_of_a_single_file(model: Path) -> None:
    source = read(model)
    file = model / "model.safetensors"
    assert source.tensors == {
        "model.norm.weight": TensorInfo(file, "F16", (8,)),
        "model.embed_tokens.weight": TensorInfo(file, "F32", (32, 8)),
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


def test_companions_are_the_tokenizer_generation_template_and_licence_files(model: Path) -> None:
    for name in ("generation_config.json", "chat_template.jinja", "LICENSE.txt", "merges.txt"):
        (model / name).write_text("x")
    for name in ("README.md", "modeling_evil.py", "optimizer.bin", "trainer_state.json"):
        (model / name).write_text("x")
    assert [path.name for path in read(model).companions] == [
        "LICENSE.txt",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "tokenizer.json",
    ]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_hash_depends_on_the_content_of_every_file(model: Path, name: str) -> None:
    before = read(model).sha256
    if name == "model.safetensors":
        save_file({**tensors(), "model.norm.weight": np.zeros(8, dtype=np.float16)}, model / name)
    else:
        (model / name).write_text((model / name).read_text() + " ")
    assert read(model).sha256 != before


def test_hash_does_not_depend_on_the_place(model: Path, tmp_path: Path) -> None:
    before = read(model).sha256
    assert read(model.rename(tmp_path / "elsewhere")).sha256 == before


def test_hash_is_over_names_and_file_hashes(model: Path) -> None:
    lines = sorted(
        f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in model.iterdir() if path.is_file()
    )
    assert read(model).sha256 == hashlib.sha256("\n".join(lines).encode()).hexdigest()


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
    before = read(model).sha256
    with open(model / "tokenizer.json", "r+") as file:  # in place: the inode stays, too
        file.write("[]")
    os.utime(model / "tokenizer.json", ns=(1, 1))
    assert read(model).sha256 != before


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


def test_links_into_the_blobs_of_a_hub_cache_are_followed(model: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in list(model.iterdir()):
        path.rename(repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert set(read(snapshot).tensors) == set(tensors())


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


# -- what is refused: configuration ------------------------------------------------------------------------------


def test_refuses_a_directory_without_configuration(model: Path) -> None:
    (model / "config.json").unlink()
    assert refusal(model) == f"{model}: holds no config.json; give a Hugging Face model directory"


def test_refuses_a_configuration_that_is_not_json(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": ')
    assert refusal(model) == f"{model}/config.json: not JSON (Expecting value: line 1 column 16 (char 15)); {AGAIN}"


def test_refuses_a_configuration_that_is_no_object(model: Path) -> None:
    (model / "config.json").write_text("[1]")
    assert refusal(model) == f"{model}/config.json: not a JSON object; {AGAIN}"


def test_refuses_quantized_weights(model: Path) -> None:
    write_config(model, quantization_config={"quant_method": "gptq", "bits": 4})
    assert refusal(model) == (
        f"{model}/config.json: the weights are already quantized (quant_method gptq); give the original checkpoint"
    )


def test_refuses_a_configuration_without_model_type(model: Path) -> None:
    write_config(model, model_type=None)
    assert refusal(model) == f"{model}/config.json: has no model_type; give a Hugging Face model directory"


def test_refuses_an_unknown_model_type(model: Path) -> None:
    write_config(model, model_type="martian")
    assert refusal(model) == (
        f"{model}/config.json: model type martian is unknown to the installed transformers; "
        "a newer transformers may know it"
    )


def test_refuses_an_unknown_model_type_with_remote_code(model: Path) -> None:
    write_config(model, model_type="martian", auto_map={"AutoModel": "evil.Evil"})
    assert refusal(model) == (
        f"{model}/config.json: model type martian needs Python code from the checkpoint (auto_map), which is never "
        "run; use a checkpoint whose architecture is part of transformers"
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, "BertModel is not a causal language model"),
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"]}, "BertLMHeadModel is an encoder"),
        ({"model_type": "mistral", "architectures": ["MistralModel"]}, "MistralModel is not a causal language model"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "LlamaForSequenceClassification is not a causal language model",
        ),
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
            "T5ForConditionalGeneration is an encoder-decoder",
        ),
        ({"model_type": "vit", "architectures": None}, "vit is not a causal language model"),
    ],
)
def test_refuses_what_is_no_decoder(model: Path, changes: dict[str, Any], sentence: str) -> None:
    write_config(model, **changes)
    assert refusal(model) == (
        f"{model}/config.json: architecture {sentence}; decoder-only causal language models (LlamaForCausalLM and "
        "the like) can be converted"
    )


def test_accepts_a_configuration_that_names_no_architecture(model: Path) -> None:
    write_config(model, architectures=None)
    assert set(read(model).tensors) == set(tensors())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"hidden_size": 9},
            "Class validation error for validator 'validate_architecture': ValueError: The hidden size (9) is not a "
            "multiple of the number of attention heads (2)",
        ),
        (
            {"vocab_size": "many"},
            "Validation error for field 'vocab_size': TypeError: Field 'vocab_size' expected int, got str "
            "(value: 'many')",
        ),
    ],
)
def test_refuses_a_configuration_that_transformers_cannot_read(
    model: Path, changes: dict[str, Any], reason: str
) -> None:
    write_config(model, **changes)
    assert refusal(model) == f"{model}/config.json: transformers cannot read it ({reason}); correct the value"


# -- what is refused: weights ------------------------------------------------------------------------------------


def test_refuses_a_directory_without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert refusal(model) == (f"{model}: holds no weights (model.safetensors); give a Hugging Face model directory")


def test_refuses_pickled_weights_with_the_reason_and_the_way_out(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert refusal(model) == (
        f"{model}: the weights are pickled (pytorch_model.bin), and loading a pickle can run any code in it; convert "
        'it once where you trust it: python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as '
        f"T; M.from_pretrained('{model}', dtype='auto').save_pretrained('converted'); "
        f"T.from_pretrained('{model}').save_pretrained('converted')\""
    )


def test_refuses_safetensors_under_another_name(model: Path) -> None:
    (model / "model.safetensors").rename(model / "consolidated.safetensors")
    assert refusal(model) == (
        f"{model}: holds consolidated.safetensors, but neither model.safetensors nor model.safetensors.index.json; "
        "give a Hugging Face model directory"
    )


def test_refuses_a_directory_of_gguf_files_and_names_one(model: Path) -> None:
    (model / "config.json").unlink()
    (model / "model.safetensors").rename(model / "tiny.Q4_0.gguf")
    assert refusal(model) == f"{model}: holds GGUF files only; give one of them: {model}/tiny.Q4_0.gguf"


def test_refuses_weights_that_are_cut_short(model: Path) -> None:
    file = model / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 3)
    assert refusal(model) == (
        f"{file}: cut short: its header promises {size:,} bytes, the file has {size - 3:,}; {AGAIN}"
    )


def test_refuses_an_empty_weight_file(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"")
    assert refusal(model) == (f"{model}/model.safetensors: not a whole safetensors file (header too small); {AGAIN}")


def test_refuses_a_header_that_is_garbage(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    assert refusal(model) == (f"{model}/model.safetensors: not a whole safetensors file (header too large); {AGAIN}")


@pytest.mark.parametrize("dtype", [np.float64, np.complex64])
def test_refuses_weights_of_other_dtypes(model: Path, dtype: type) -> None:
    save_file({**tensors(), "extra.weight": np.ones(2, dtype=dtype)}, model / "model.safetensors")
    stored = {np.float64: "F64", np.complex64: "C64"}[dtype]
    assert refusal(model) == (
        f"{model}/model.safetensors: tensor extra.weight is stored as {stored}; weights must be F32, F16 or BF16; "
        "convert it to bfloat16 first"
    )


def test_refuses_an_index_that_names_an_absent_shard(sharded: Path) -> None:
    (sharded / "model-2-of-2.safetensors").unlink()
    assert refusal(sharded) == (
        f"{sharded}/model.safetensors.index.json: names model-2-of-2.safetensors, which is absent; "
        "download the missing file"
    )


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/secret.safetensors"])
def test_refuses_an_index_that_points_outside_the_directory(sharded: Path, place: str) -> None:
    write_index(sharded, {"model.norm.weight": place})
    assert refusal(sharded) == (
        f"{sharded}/model.safetensors.index.json: names {place}, outside the model's directory; "
        "a model's files must lie in its own directory; copy the file there if you trust it"
    )


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_refuses_a_link_out_of_the_directory(model: Path, tmp_path: Path, name: str) -> None:
    (model / name).rename(tmp_path / "elsewhere")
    (model / name).symlink_to(tmp_path / "elsewhere")
    assert refusal(model) == (
        f"{model}: {name} is a link to {tmp_path}/elsewhere, outside the model's directory; "
        "a model's files must lie in its own directory; copy the file there if you trust it"
    )


def test_refuses_a_tensor_that_its_shard_does_not_hold(sharded: Path) -> None:
    parts = {name: f"model-{number}-of-2.safetensors" for number, name in enumerate(tensors(), start=1)}
    write_index(sharded, {**parts, "lm_head.weight": "model-2-of-2.safetensors"})
    assert refusal(sharded) == (
        f"{sharded}/model.safetensors.index.json: puts tensor lm_head.weight into model-2-of-2.safetensors, which "
        "does not hold it; download both again"
    )


def test_refuses_a_tensor_that_the_index_does_not_name(sharded: Path) -> None:
    save_file({"model.norm.weight": np.ones(8, np.float32), "stray": np.ones(1, np.float32)},
              sharded / "model-1-of-2.safetensors")  # fmt: skip
    assert refusal(sharded) == (
        f"{sharded}/model.safetensors.index.json: model-1-of-2.safetensors holds tensor stray, but the index does not "
        "name it; download both again"
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("{}", "'weight_map'"),
        ('{"weight_map": {}}', "weight_map names no files"),
        ('{"weight_map": {"a": 3}}', "weight_map names no files"),
    ],
)
def test_refuses_what_is_no_index(sharded: Path, content: str, reason: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    assert refusal(sharded) == (
        f"{sharded}/model.safetensors.index.json: not an index of shards ({reason}); download it again"
    )


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
