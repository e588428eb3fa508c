"""The tokenizer that lies beside a model."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from accullm_cli.errors import AccullmError


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model directory.

    Raises:
        AccullmError: there is none, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AccullmError(
            f"no tokenizer can be read ({reason})", directory, "copy tokenizer.json and tokenizer_config.json there"
        ) from None
