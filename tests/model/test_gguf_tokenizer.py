"""The tokenizer of a GGUF file cuts text as llama.cpp does, which is what its writer's did."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import TokenType
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from accullm_cli.errors import AccullmError
from accullm_cli.model.gguf_file import read_gguf
from accullm_cli.model.gguf_splits import SPLITS
from accullm_cli.model.gguf_tokenizer import read_tokenizer
from tests.llama_cpp import llama_cpp
from tests.model.test_gguf import F32, HIDDEN, write

TEXTS = (
    "Hello wörld, it's 12345 DON'T we'LL\n\n  def f(x):\n\treturn x+1;  ",
    "don't 1 22 333 4444 a1b2 3.14 5% x_y /* c */ //path/to HTTPServer camelCase",
    "   leading, trailing   \r\n\r\n  naïve café テスト 日本語 Ünïcödé ¿qué? …—“q” €5\u00a0x",
    "!!! ??? ... --- === a'b 'tis 'S 's\n\n\n\nend zebra",
    "<s>a <think> b</s> <｜User｜>c",
)
SPECIAL = {"<s>": TokenType.CONTROL, "</s>": TokenType.CONTROL, "<｜User｜>": TokenType.CONTROL}
ADDED = {**SPECIAL, "<think>": TokenType.USER_DEFINED, "Ġzebra": TokenType.NORMAL}  # the last one is made by no merge


@cache
def vocabulary() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tokens and merges of the texts, across whatever divides them, so that each way to cut them up shows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False, min_frequency=1)
    tokenizer.train_from_iterator(TEXTS, trainer)
    content = json.loads(tokenizer.to_str())["model"]
    return (*ADDED, *sorted(content["vocab"])), tuple(" ".join(merge) for merge in content["merges"])


def byte_level(directory: Path, **metadata: Any) -> Path:
    """A model with this vocabulary; metadata: of the tokenizer."""
    tokens, merges = vocabulary()
    return write(
        directory / "tiny.gguf",
        F32,
        metadata={f"tokenizer.ggml.{key}": value for key, value in metadata.items()},
        tokens=tokens,
        merges=merges,
        kinds=[ADDED.get(token, TokenType.NORMAL) for token in tokens],
        without="token_embd.weight",
        extra={"token_embd.weight": np.zeros((len(tokens), HIDDEN), np.float32)},
    )


@pytest.mark.parametrize("name", SPLITS)
def test_byte_level_bpe_cuts_text_as_llama_cpp_does(name: str, tmp_path: Path) -> None:
    path = byte_level(tmp_path, pre=name)
    tokenizer = read_tokenizer(read_gguf(path))
    with llama_cpp().model(path) as loaded:
        for text in TEXTS:
            assert tokenizer(text, add_special_tokens=False).input_ids == loaded.tokenize(text, special=True)
            assert tokenizer(text).input_ids == loaded.tokenize(text, special=True, add_special=True)


@pytest.mark.parametrize(("begins", "ends"), [(True, False), (False, True), (True, True)])
def test_a_text_gets_the_tokens_in_front_and_behind_that_the_file_says(
    begins: bool, ends: bool, tmp_path: Path
) -> None:
    tokenizer = read_tokenizer(read_gguf(byte_level(tmp_path, add_bos_token=begins, add_eos_token=ends)))
    found = tokenizer.convert_ids_to_tokens(tokenizer("zebra").input_ids)
    assert (found[0] == "<s>", found[-1] == "</s>") == (begins, ends)
    assert tokenizer.decode(tokenizer(TEXTS[2]).input_ids, skip_special_tokens=True) == TEXTS[2]


def test_a_letter_that_a_file_names_for_padding_is_one_of_a_text_like_others(tmp_path: Path) -> None:
    letter = vocabulary()[0].index("!")
    tokenizer = read_tokenizer(read_gguf(byte_level(tmp_path, pre="qwen2", padding_token_id=letter)))
    assert tokenizer.pad_token is None
    assert tokenizer.convert_ids_to_tokens(tokenizer("!!!").input_ids) == ["!!", "!"]
    marked = read_tokenizer(read_gguf(byte_level(tmp_path, pre="qwen2", padding_token_id=1)))
    assert marked.pad_token == "</s>"


def test_merges_of_what_is_no_token_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", merges=["t h", "e x"])
    with pytest.raises(AccullmError) as caught:
        read_tokenizer(read_gguf(path))
    assert caught.value.what.startswith("holds no tokenizer that transformers can read (")
    assert "ex" in caught.value.what
