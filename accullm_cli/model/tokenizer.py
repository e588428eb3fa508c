"""The tokenizer that lies beside a model."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from accullm_cli.errors import AccullmError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model directory.

    Raises:
        AccullmError: there is none, or it cannot be read.
    """
    if not any((directory / name).exists() for name in _TOKENIZER_FILES):
        raise AccullmError("holds no tokenizer", directory, "copy tokenizer.json and tokenizer_config.json there")
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        # The tokenizers library raises bare Exceptions for what it cannot parse.
        if not isinstance(error, OSError | ValueError | KeyError | TypeError) and type(error) is not Exception:
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AccullmError(f"its tokenizer cannot be read ({reason})", directory, "download it again") from None
