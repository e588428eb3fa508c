r"""How byte-level BPE cuts up text before it merges, by the names that llama.cpp has for it (tokenizer.ggml.pre).

The regular expressions are those of the tokenizer.json files that llama.cpp's own were made from; which name means
which is in its src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# What ByteLevel does with use_regex; the digits before it are a step of their own.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS = r"\p{N}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Split:
    """How text is cut up.

    cuts: regular expressions, each of which cuts what the one before has left.
    keeps_tokens: a piece that is a token is not merged from its characters (ignore_merges).
    begins: a text gets the token for its beginning, where the file does not say whether.
    """

    cuts: tuple[str, ...]
    keeps_tokens: bool = False
    begins: bool = False


_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
# Of several names for one way, a file that is written has the first.
_NAMES: tuple[tuple[Split, str], ...] = (
    (Split((GPT2,)), "gpt-2 olmo mpt jais exaone4 phi-2 a.x-4.0 mellum modern-bert trillion granite-docling"),
    (Split((DIGITS, GPT2)), "smollm starcoder refact command-r codeshell exaone minerva-7b"),
    (Split((_LLAMA3,), True, True), "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano"),
    (Split((_LLAMA3,)), "dbrx smaug-bpe"),
    (
        Split((rf"{_CONTRACTIONS}|{_WORD}\p{{L}}+|\p{{N}}|{_TAIL}",)),
        "qwen2 stablelm2 deepseek-r1-qwen megrez hunyuan kormo f2llmv2",
    ),
    (
        Split((rf"{_CONTRACTIONS}|{_WORD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|"
               r"\s*[\r\n]+|\s+(?!\S)|\s+",)),
        "qwen35",
    ),
    (
        Split((rf"{_CONTRACTIONS}|{_WORD}\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",)),
        "seed-coder",
    ),
    (
        Split((rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASHES}",), True, True),
        "tekken",
    ),
    (
        Split((rf"{_WORD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_WORD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}|"
               rf"{_SLASHES}",)),
        "gpt-4o llama4 kanana2 minimax-m2 talkie",
    ),
)  # fmt: skip
SPLITS: Mapping[str, Split] = {name: split for split, names in _NAMES for name in names.split()}


def name_of(cuts: tuple[str, ...], keeps_tokens: bool) -> str | None:
    """llama.cpp's name for a way to cut up text; None where it has none."""
    found = (name for name, split in SPLITS.items() if (split.cuts, split.keeps_tokens) == (cuts, keeps_tokens))
    return next(found, None)
