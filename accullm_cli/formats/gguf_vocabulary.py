"""A tokenizer as GGUF has it: tokens, their types, merges or scores, and the name of how text is cut up before.

llama.cpp has its own programs for byte-level BPE and for SentencePiece's BPE; a tokenizer.json that is neither is
refused. Text is cut up by one of its regular expressions, which goes by a name ("tokenizer.ggml.pre"); here it is found
by the expressions that stand in tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from tokenizers import Tokenizer

from accullm_cli.errors import AccullmError
from accullm_cli.model.gguf_splits import DIGITS, GPT2, name_of

FILE = "tokenizer.json"
# The score of a token that no merge makes.
_UNREACHED = -1e6


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    model: "gpt2" for byte-level BPE, "llama" for SentencePiece's.
    tokens: by id, as many as the embedding has rows. types: of each.
    scores: of each, where `model` is "llama". merges: in their order, where it is "gpt2".
    space_in_front: whether a text gets a space in front; None where `model` knows no such thing.
    begins, ends: whether a text gets the token for its beginning, for its end.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[TokenType]
    scores: Sequence[float]
    merges: Sequence[str]
    space_in_front: bool | None
    begins: bool
    ends: bool

    def write(self, writer: GGUFWriter, directory: Path) -> None:
        """Write it, with the special tokens and the chat template of a model directory."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.space_in_front is not None:
            writer.add_add_space_prefix(self.space_in_front)
        special = SpecialVocab(directory, n_vocab=len(self.tokens))
        special.add_special_token = {"bos": self.begins, "eos": self.ends}
        special.add_to_gguf(writer, quiet=True)


@lru_cache(maxsize=1)
def read_vocabulary(path: Path, rows: int) -> Vocabulary:
    """The tokenizer in a tokenizer.json.

    Args:
        rows: of the embedding.

    Raises:
        AccullmError: it is absent, or llama.cpp has no program for it.
    """
    if not path.exists():
        raise AccullmError("file is missing", path, "save the tokenizer as a fast one: it then has a tokenizer.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    model = content["model"]
    if not model.get("merges") and model.get("type", "BPE") == "BPE":
        raise _refusal(path, "merges nothing")
    if model.get("type", "BPE") != "BPE":
        raise _refusal(path, f"is of kind {model['type']}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _refusal(path, f"has {key} {model[key]!r}")
    tokenizer = Tokenizer.from_file(str(path))
    added = {entry["id"]: entry for entry in content.get("added_tokens", [])}
    begins, ends = _brackets(tokenizer)
    of_bytes = _is_byte_level(content)
    text_of = {number: text for text, number in model["vocab"].items()} | {
        number: entry["content"] for number, entry in added.items()
    }
    tokens = [text_of.get(number, f"[PAD{number}]") for number in range(rows)]
    types = [_type(number, text_of, added, model, of_bytes) for number in range(rows)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if of_bytes:
        pre = _pre(path, content)
        return Vocabulary("gpt2", pre, tokens, types, (), _encoded(model["merges"]), None, begins, ends)
    spaces = _spaces_in_front(path, content)
    for number, kind in enumerate(types):
        if kind == TokenType.USER_DEFINED:
            tokens[number] = tokens[number].replace("▁", " ")
    scores = _scores(path, model["vocab"], [merge.split(" ") for merge in merges], rows)
    return Vocabulary("llama", "default", tokens, types, scores, (), spaces, begins, ends)


def _type(
    number: int, text_of: Mapping[int, str], added: Mapping[int, Any], model: Mapping[str, Any], of_bytes: bool
) -> TokenType:
    if number not in text_of:
        return TokenType.UNUSED
    text = text_of[number]
    if not of_bytes and text == model.get("unk_token"):
        return TokenType.UNKNOWN
    if number in added:
        return TokenType.CONTROL if added[number]["special"] or _looks_special(text) else TokenType.USER_DEFINED
    if not of_bytes and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return TokenType.BYTE
    return TokenType.NORMAL


def _looks_special(text: str) -> bool:
    """Tokens that some models do not mark as special, and that no text is meant to have."""
    ends = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        text.startswith(begin) and text.endswith(end) for begin, end in ends
    )


def _encoded(merges: Sequence[str | Sequence[str]]) -> list[str]:
    """Merges as lines; a space within a part, which would divide it, is written as byte-level BPE writes a space."""
    return [merge if isinstance(merge, str) else " ".join(part.replace(" ", "Ġ") for part in merge) for merge in merges]


def _brackets(tokenizer: Tokenizer) -> tuple[bool, bool]:
    """Whether the tokenizer puts a token in front of a text, and one behind it."""
    plain, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    if not plain:
        return False, False
    begin = next((place for place in range(len(whole)) if whole[place : place + len(plain)] == plain), 0)
    return begin > 0, begin + len(plain) < len(whole)


# -- how text is cut up ------------------------------------------------------------------------------------


def _steps(part: Any, key: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer or a pre-tokenizer."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for step in part[key]:
            yield from _steps(step, key)
    else:
        yield part


def _is_byte_level(content: Mapping[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(content.get("pre_tokenizer"), "pretokenizers"))


def _pre(path: Path, content: Mapping[str, Any]) -> str:
    """llama.cpp's name for how byte-level BPE cuts up text.

    Raises:
        AccullmError: it has none.
    """
    for step in _steps(content.get("normalizer"), "normalizers"):
        # llama.cpp does not compose characters; those of almost all texts are composed.
        if step["type"] != "NFC":
            raise _refusal(path, f"normalizes text by {step['type']}")
    cuts: list[str] = []
    for step in _steps(content["pre_tokenizer"], "pretokenizers"):
        kind = step["type"]
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            cuts += [GPT2] if step.get("use_regex", True) else []
        elif kind == "Digits" and step.get("individual_digits"):
            cuts.append(DIGITS)
        elif kind == "Split" and "Regex" in step["pattern"] and _isolates(step):
            cuts.append(step["pattern"]["Regex"])
        else:
            raise _refusal(path, f"cuts up text by {kind} in a way that has no name there")
    found = name_of(tuple(cuts), bool(content["model"].get("ignore_merges")))
    if found is None:
        shown = " and then ".join(cuts)
        whole = " without merging pieces that are tokens" if content["model"].get("ignore_merges") else ""
        raise _refusal(path, f"cuts up text{whole} by {shown}")
    return found


def _isolates(step: Mapping[str, Any]) -> bool:
    """Whether a Split keeps all of the text, with each match by itself: Removed and inverted, gaps are the matches."""
    return (step["behavior"], bool(step.get("invert"))) in (("Isolated", False), ("Removed", True), ("Isolated", True))


def _spaces_in_front(path: Path, content: Mapping[str, Any]) -> bool:
    """Whether SentencePiece's BPE gets a space in front of a text.

    Raises:
        AccullmError: it is another one, that does not write spaces as SentencePiece does, or knows no bytes.
    """
    if not content["model"].get("byte_fallback"):
        raise _refusal(path, "has neither bytes as its characters nor tokens for bytes that no other token holds")
    in_front = written = False
    for step in _steps(content.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == "▁":
            in_front = True
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == "▁":
            written = True
        else:
            raise _refusal(path, f"normalizes text by {step['type']}")
    for step in _steps(content.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace" and step.get("replacement") == "▁" and not step.get("split", True):
            written = True
            in_front = in_front or step.get("prepend_scheme", "always") != "never"
        # Of a space there is none left by then.
        elif not (step["type"] == "Split" and step["pattern"] == {"String": " "} and written):
            raise _refusal(path, f"cuts up text by {step['type']}")
    if not written:
        raise _refusal(path, "does not write spaces as SentencePiece does")
    return in_front


def _scores(path: Path, vocabulary: Mapping[str, int], merges: Sequence[Sequence[str]], rows: int) -> list[float]:
    """SentencePiece's scores for merges in their order: it joins what makes the token of the highest score.

    Raises:
        AccullmError: the same token is made by merges of different rank, between which others lie.
    """
    scores = [_UNREACHED] * rows
    last = ""
    seen: set[str] = set()
    for left, right in merges:
        token = left + right
        if token == last:
            continue
        if token in seen:
            raise _refusal(path, f"merges {token!r} at several ranks")
        seen.add(token)
        if vocabulary[token] < rows:
            scores[vocabulary[token]] = -float(len(seen))
        last = token
    return scores


def _refusal(path: Path, what: str) -> AccullmError:
    return AccullmError(
        f"llama.cpp has no program for this tokenizer, which {what}", path, "choose another --format for this model"
    )
