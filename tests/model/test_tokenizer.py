"""The tokenizer beside a model, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from accullm_cli.errors import AccullmError
from accullm_cli.model.tokenizer import check_ids, load_tokenizer, tokenizer_records
from tests.tiny import make_tokenizer


def refusal(directory: Path) -> str:
    with pytest.raises(AccullmError) as caught:
        load_tokenizer(directory)
    assert caught.value.exit_code == 2
    return caught.value.line()


def test_the_saved_tokenizer_comes_back(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    text = "café, 123\n"
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer(text)["input_ids"] == make_tokenizer()(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_directory_without_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert refusal(tmp_path) == (f"{tmp_path}: holds no tokenizer; copy tokenizer.json and tokenizer_config.json there")


def test_a_damaged_one_is_refused_in_one_line(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text()[:200])
    line = refusal(tmp_path)
    assert line.startswith(f"{tmp_path}: its tokenizer cannot be read (")
    assert line.endswith("); download it again")
    assert "\n" not in line


@pytest.mark.parametrize("remove", ["model", "added_tokens"])
def test_one_that_lacks_a_part_is_refused_in_one_line(remove: str, tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    del content[remove]
    path.write_text(json.dumps(content))
    line = refusal(tmp_path)
    assert line.startswith(f"{tmp_path}: its tokenizer cannot be read (")
    assert "\n" not in line


# -- tokenizers that are code ------------------------------------------------------------------------------------

CODE = "tok.FancyTokenizer"


@pytest.mark.parametrize("mapped", [[CODE, None], [None, CODE], CODE])
@pytest.mark.parametrize(
    ("file", "hint"),
    [
        ("vocab.json", "convert it to a tokenizer.json where you trust the code, and take"),
        ("tokenizer.json", "if tokenizer.json does the same without that code, take"),
    ],
)
def test_a_tokenizer_that_is_code_is_never_run_and_the_hint_says_what_to_do(
    tmp_path: Path, mapped: object, file: str, hint: str
) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / file)
    config = {"tokenizer_class": "FancyTokenizer", "auto_map": {"AutoTokenizer": mapped}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tok.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass FancyTokenizer: pass\n")
    assert refusal(tmp_path) == (
        f"{tmp_path}/tokenizer_config.json: its tokenizer is Python code of the checkpoint (auto_map: {CODE}), which "
        f"is never run; {hint} auto_map out of tokenizer_config.json"
    )
    assert not (tmp_path / "ran").exists()


# -- tokens beyond the embedding ---------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A tokenizer of 259 tokens (256 bytes, <s>, </s>, <pad>) beside a model that has rows for 257 of them."""
    make_tokenizer().save_pretrained(tmp_path)
    config = LlamaConfig(vocab_size=257, bos_token_id=256, eos_token_id=257, pad_token_id=None)
    config.save_pretrained(tmp_path)
    return tmp_path


def test_ids_up_to_the_last_row_are_accepted(directory: Path) -> None:
    check_ids(torch.tensor([[0, 256]]), make_tokenizer(), directory)


@pytest.mark.parametrize(
    ("ids", "token"),
    [
        ([[1, 2, 257], [258, 0, 0]], "'</s>' (id 257, the tokenizer's eos_token_id)"),
        ([[1, 258, 257]], "'<pad>' (id 258, the tokenizer's pad_token_id)"),
    ],
)
def test_a_token_beyond_the_embedding_is_named_with_its_id_and_the_rows(
    directory: Path, ids: list[list[int]], token: str
) -> None:
    with pytest.raises(AccullmError) as caught:
        check_ids(torch.tensor(ids), make_tokenizer(), directory)
    assert caught.value.line() == (
        f"{directory}: the text has token {token}, but the model's embedding has 257 rows; tokenizer and weights "
        "belong to different models, or a token was added without resizing the embedding: take both from one place"
    )


def test_tokens_and_settings_beyond_the_embedding_are_named(directory: Path) -> None:
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 300]}))
    assert tokenizer_records(directory) == (
        "the tokenizer has 2 tokens beyond the 257 rows of the embedding, the first '</s>' (id 257): a text that uses "
        "one cannot be run",
        "eos_token_id 257 in config.json lies beyond the 257 rows of the embedding",
        "eos_token_id 300 in generation_config.json lies beyond the 257 rows of the embedding",
    )


def test_a_tokenizer_that_fits_is_no_record(directory: Path) -> None:
    LlamaConfig(vocab_size=260, eos_token_id=257).save_pretrained(directory)
    assert tokenizer_records(directory) == ()
