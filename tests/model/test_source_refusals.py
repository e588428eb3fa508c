"""Checkpoints that are refused before anything is computed, each with its whole line."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from accullm_cli.model import integrity
from tests.model.checkpoints import AGAIN, read, refusal, tensors, write_config, write_index

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


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_refuses_a_link_to_nowhere_in_place_of_what_is_read(model: Path, name: str) -> None:
    (model / name).unlink()
    (model / name).symlink_to("../../blobs/gone")
    assert refusal(model) == f"{model}: {name} is a link to ../../blobs/gone, which is no file; download it again"


def test_refuses_a_companion_that_cannot_be_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(integrity, "file_sha256", fail)  # the tests may run as root, who may read everything
    assert refusal(model) == f"{model}/config.json: cannot be read (permission denied)"


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


def test_refuses_a_tensor_that_two_shards_hold_differently(sharded: Path) -> None:
    save_file({**tensors(), "model.norm.weight": np.zeros(8, np.float16)}, sharded / "model-2-of-2.safetensors")
    assert refusal(sharded) == (
        f"{sharded}/model.safetensors.index.json: tensor model.norm.weight differs between model-1-of-2.safetensors "
        "and model-2-of-2.safetensors; download both again"
    )


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_refuses_an_adapter_beside_the_weights(model: Path, weights: str) -> None:
    (model / "adapter_config.json").write_text("{}")
    (model / weights).write_bytes(b"")
    assert refusal(model) == (
        f"{model}: holds an unmerged adapter (LoRA) beside a model (adapter_config.json); merge it into the model "
        "first (peft: merge_and_unload, then save_pretrained), or take it away to convert the model without it"
    )


def test_refuses_a_directory_that_holds_an_adapter_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert refusal(tmp_path, tmp_path) == (
        f"{tmp_path}: is an adapter (LoRA), not a model (adapter_config.json); merge it into the model first (peft: "
        "merge_and_unload, then save_pretrained)"
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
