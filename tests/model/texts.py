"""A tokenizer whose windows can be read back, and how texts are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from accullm_cli.errors import AccullmError
from accullm_cli.model.text import Windows, calibration_windows, validation_windows

BOS, EOS = 256, 257


def byte_tokenizer(bos: bool = False, eos: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8, so that every window can be read back exactly."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>" if eos else None, model_max_length=64
    )


def text_of(windows: Windows, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode(row) for row in windows.ids]


def refusal(text: Path | str, seq_len: int = 16, validation: bool = False) -> str:
    with pytest.raises(AccullmError) as caught:
        (validation_windows if validation else calibration_windows)(str(text), byte_tokenizer(), 4, seq_len, 0)
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.line()
    return caught.value.line()
