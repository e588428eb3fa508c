"""The tokenizer of a GGUF file, from its metadata: tokens, what kind each is, merges, and how text is cut up.

Byte-level BPE is made here; SentencePiece's BPE and what other kinds transformers knows come from its own converters,
which know what single architectures do beyond what the metadata say. Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from accullm_cli.errors import AccullmError, is_refusal_of_library
from accullm_cli.model.gguf_file import GgufFile
from accullm_cli.model.gguf_splits import DIGITS, GPT2, SPLITS, Split

_ROOM = "tokenizer.ggml."
# Of a file that does not say; llama.cpp has a way of its own for these, which no tokenizer had.
_DEFAULT = "gpt-2"
_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def read_tokenizer(file: GgufFile) -> Any:
    """The tokenizer in a file, with its chat template.

    Raises:
        AccullmError: there is none, or none that can be made.
    """
    try:
        if file.metadata.get(f"{_ROOM}model") == "gpt2":
            return _byte_level(file.metadata)
        return _by_transformers(file)
    except BaseException as error:
        if not is_refusal_of_library(error):
            raise
        reason = " ".join(repr(error).split())
        raise AccullmError(
            f"holds no tokenizer that transformers can read ({reason})",
            file.path,
            "give the model's safetensors checkpoint",
        ) from None


def split_records(metadata: Mapping[str, Any]) -> list[str]:
    """A sentence about a way to cut up text that has no name here."""
    name = metadata.get(f"{_ROOM}pre", _DEFAULT)
    if metadata.get(f"{_ROOM}model") != "gpt2" or name in SPLITS or name == "default":
        return []
    return [
        f"the tokenizer splits text in a way that is not known here (tokenizer.ggml.pre = {name}); GPT-2's is taken "
        "for it, and tokens may differ from llama.cpp's"
    ]


def _byte_level(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    tokens: Sequence[str] = metadata[f"{_ROOM}tokens"]
    split = SPLITS.get(metadata.get(f"{_ROOM}pre", _DEFAULT), SPLITS[_DEFAULT])
    merges = [_parts(merge) for merge in metadata.get(f"{_ROOM}merges", ())]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split.keeps_tokens))
    made.pre_tokenizer = pre_tokenizers.Sequence([*_cuts(split)])
    made.decoder = decoders.ByteLevel()
    kinds = metadata.get(f"{_ROOM}token_type", ())
    for kind, special in ((TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
        own = [token for token, found in zip(tokens, kinds, strict=False) if found == kind]
        made.add_tokens([AddedToken(token, normalized=False, special=special) for token in own])
    named = {role: metadata[f"{_ROOM}{key}"] for role, key in _NAMED.items() if f"{_ROOM}{key}" in metadata}
    if kinds and kinds[named.get("pad_token", 0)] == TokenType.NORMAL:
        named.pop("pad_token", None)  # what is named is cut out of every text, and some files name a letter
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        add_bos_token=bool(metadata.get(f"{_ROOM}add_bos_token", split.begins and "bos_token" in named)),
        add_eos_token=bool(metadata.get(f"{_ROOM}add_eos_token", False)),
        **{role: tokens[number] for role, number in named.items()},
    )
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


def _parts(merge: str) -> tuple[str, str]:
    """The two parts of a merge; the first may begin with the space that divides them elsewhere."""
    place = merge.index(" ", 1)
    return merge[:place], merge[place + 1 :]


def _cuts(split: Split) -> list[Any]:
    steps: list[Any] = []
    for cut in split.cuts:
        if cut == DIGITS:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif cut != GPT2:
            steps.append(pre_tokenizers.Split(Regex(cut), behavior="isolated"))
    return [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=GPT2 in split.cuts)]


def _by_transformers(file: GgufFile) -> Any:
    with TemporaryDirectory() as place:  # where no other tokenizer lies that would be taken instead
        (Path(place) / "model.gguf").symlink_to(file.path.resolve())
        tokenizer = PreTrainedTokenizerFast.from_pretrained(place, gguf_file="model.gguf")
    architecture = str(file.metadata.get("general.architecture"))
    wanted = bool(file.metadata.get(f"{_ROOM}add_space_prefix", True))
    # Of these transformers has classes, whose way with spaces in front is kept where the file does not contradict it.
    is_as_its_class = architecture.startswith("gemma") or (architecture == "llama" and wanted)
    if file.metadata.get(f"{_ROOM}model") == "llama" and not is_as_its_class:
        _space_in_front(tokenizer.backend_tokenizer, wanted)
    return tokenizer


def _space_in_front(tokenizer: Tokenizer, wanted: bool) -> None:
    """Let SentencePiece's BPE put a space in front of a text, as llama.cpp does, or none.

    transformers puts one in front whatever the file says, and none where the text begins with one.
    """
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if wanted else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if wanted else steps)
