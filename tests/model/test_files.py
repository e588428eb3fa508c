"""What is copied, and what is left behind and why, told from names and sizes."""

from __future__ import annotations

import pytest

from accullm_cli.model.files import LARGEST_COMPANION, sort_files


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer.model",
        "qwen.tiktoken",
        "vocab.txt",
        "chat_template.jinja",
        "additional_chat_templates/rag.jinja",
        "audio/preprocessor_config.json",
        "LICENSE",
        "README.md",
        "figures/accuracy.png",
        "original/params.json",
        "onnx/config.json",
    ],
)
def test_what_is_no_weights_code_or_hidden_file_is_copied(name: str) -> None:
    assert sort_files({name: 1}, ()).companions == (name,)


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("model.bin", "weights that are not read (model.bin)"),
        ("Model.Q4_0.GGUF", "weights that are not read (Model.Q4_0.GGUF)"),
        ("onnx/model.onnx_data", "weights that are not read (onnx/model.onnx_data)"),
        ("adapter_model.safetensors", "weights that are not read (adapter_model.safetensors)"),
        ("original/consolidated.00.pth", "weights that are not read (original/consolidated.00.pth)"),
        ("modeling_x.py", "code (modeling_x.py)"),
        ("kernels/x.cu", "code (kernels/x.cu)"),
        (".gitattributes", "hidden files (.gitattributes)"),
        (".git/", "hidden files (.git/)"),
        (".cache/huggingface/x.lock", "hidden files (.cache/)"),
        ("a/__pycache__/x.pyc", "hidden files (a/__pycache__/)"),
        ("accullm.json", "what accullm wrote (accullm.json)"),
    ],
)
def test_what_is_left_behind_is_named_with_the_reason(name: str, record: str) -> None:
    files = sort_files({name: 1}, ())
    assert (files.companions, files.records) == ((), (f"left behind: {record}",))


@pytest.mark.parametrize(
    ("names", "record"),
    [
        (["c/config.json", "c/model.safetensors", "c/tokenizer.json"], "directories with a model of their own (c/)"),
        (["c/config.json", "c/pytorch_model.bin", "c/d/x.txt"], "directories with a model of their own (c/)"),
        (["lora/adapter_config.json", "lora/x.txt"], "directories with a model of their own (lora/)"),
        (["int4/accullm.json", "int4/tokenizer.json"], "what accullm wrote (int4/)"),
        (["int4.run/run.yaml", "int4.run/report/report.html"], "what accullm wrote (int4.run/)"),
    ],
)
def test_directories_with_another_model_or_our_output_are_left_behind_whole(names: list[str], record: str) -> None:
    files = sort_files(dict.fromkeys(names, 1), ())
    assert (files.companions, files.records) == ((), (f"left behind: {record}",))


def test_a_file_that_is_far_too_large_for_a_companion_is_left_behind() -> None:
    files = sort_files({"a.json": LARGEST_COMPANION, "data.jsonl": LARGEST_COMPANION + 1}, ())
    assert files.companions == ("a.json",)
    assert files.records == ("left behind: files of more than 500 MB (data.jsonl)",)


def test_many_names_are_counted() -> None:
    files = sort_files({f"{number:02d}.bin": 1 for number in range(23)}, ("00.bin",))
    shown = ", ".join(f"{number:02d}.bin" for number in range(1, 21))
    assert files.records == (f"left behind: weights that are not read ({shown} and 2 more)",)
