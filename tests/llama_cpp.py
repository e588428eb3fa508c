"""llama.cpp's own library for tests, where it is installed; `make llama-cpp` does that."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.scripts.loading import load_script


@cache
def _library() -> Any:
    script = load_script("llama_cpp")
    try:
        return script.LlamaCpp()
    except FileNotFoundError as error:
        return str(error)


def llama_cpp() -> Any:
    """The library; the test is skipped where there is none."""
    found = _library()
    if isinstance(found, str):
        pytest.skip(found)
    return found


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a few merges, 262 tokens; llama.cpp has no program for one without any."""
    vocabulary = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("t", "e"), ("s", "t"), ("te", "st")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
