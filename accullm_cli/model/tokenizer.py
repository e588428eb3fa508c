"""The tokenizer that lies beside a model, and whether its tokens have rows in the model's embedding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from accullm_cli.errors import AccullmError, is_refusal_of_library
from accullm_cli.json_text import parse_json

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
_ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model directory.

    Raises:
        AccullmError: there is none, it is Python code, or it cannot be read.
    """
    if not any((directory / name).exists() for name in _TOKENIZER_FILES):
        raise AccullmError("holds no tokenizer", directory, "copy tokenizer.json and tokenizer_config.json there")
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except BaseException as error:
        if not is_refusal_of_library(error):
            raise
        _refuse_code(directory)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AccullmError(f"its tokenizer cannot be read ({reason})", directory, "download it again") from None


def _refuse_code(directory: Path) -> None:
    """Say so where a tokenizer that cannot be loaded is a class in the checkpoint's own Python code.

    Raises:
        AccullmError: tokenizer_config.json names such a class.
    """
    path = directory / "tokenizer_config.json"
    try:
        mapped = parse_json(path.read_bytes())["auto_map"]["AutoTokenizer"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    names = [name for name in (mapped if isinstance(mapped, list) else [mapped]) if name]
    hint = (
        "if tokenizer.json does the same without that code, take auto_map out of tokenizer_config.json"
        if (directory / "tokenizer.json").exists()
        else "convert it to a tokenizer.json where you trust the code, and take auto_map out of tokenizer_config.json"
    )
    raise AccullmError(
        f"its tokenizer is Python code of the checkpoint (auto_map: {', '.join(map(str, names))}), which is never run",
        path,
        hint,
    )


def embedding_rows(directory: Path) -> int | None:
    """Rows of the embedding of the model that config.json describes; None where it does not say."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False).get_text_config()
    rows = getattr(config, "vocab_size", None)
    return rows if isinstance(rows, int) else None


def check_ids(ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Refuse windows with tokens that the model has no embedding for.

    Args:
        ids: int64 [windows, tokens].

    Raises:
        AccullmError: names the first such token, its id and how many rows there are.
    """
    rows = embedding_rows(directory)
    if rows is None or not bool((beyond := ids >= rows).any()):
        return
    token = int(ids[beyond][0])
    role = next((f", the tokenizer's {role}" for role in _ROLES if getattr(tokenizer, role, None) == token), "")
    raise AccullmError(
        f"the text has token {tokenizer.convert_ids_to_tokens(token)!r} (id {token}{role}), but the model's embedding "
        f"has {rows:,} rows",
        directory,
        "tokenizer and weights belong to different models, or a token was added without resizing the embedding: take "
        "both from one place",
    )


def tokenizer_records(directory: Path) -> tuple[str, ...]:
    """Sentences about tokens that the tokenizer or the configurations name and the embedding has no row for."""
    rows = embedding_rows(directory)
    return () if rows is None else tuple(_beyond(directory, rows))


def _beyond(directory: Path, rows: int) -> Iterator[str]:
    vocabulary = load_tokenizer(directory).get_vocab()
    beyond = sorted((number, token) for token, number in vocabulary.items() if number >= rows)
    if beyond:
        number, token = beyond[0]
        count = "1 token" if len(beyond) == 1 else f"{len(beyond):,} tokens"
        yield (
            f"the tokenizer has {count} beyond the {rows:,} rows of the embedding, the first {token!r} (id {number}): "
            "a text that uses one cannot be run"
        )
    for name in ("config.json", "generation_config.json"):
        try:
            config = parse_json((directory / name).read_bytes())
        except (OSError, ValueError):
            continue
        if not isinstance(config, dict):
            continue
        for role in _ROLES:
            value = config.get(role)
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int) and number >= rows:
                    yield f"{role} {number} in {name} lies beyond the {rows:,} rows of the embedding"
