"""Windows of tokens for calibration and validation, from packaged texts, a file, or a dataset on the hub."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import platform
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.model import packaged_text
from accullm_cli.model.generated_text import generated_document
from accullm_cli.model.hub_text import hub_rows
from accullm_cli.model.json_lines import JsonLines, parse_json_lines
from accullm_cli.model.mixture import SAMPLED, apportion
from accullm_cli.model.other_text import KINDS, documents_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A token of English or Python has three to four characters: one piece of a document fills about one window.
_CHARACTERS_PER_TOKEN = 4
_SMALLEST_PIECE = 2_000

# The part of the default calibration text that comes with Python and this package.
PACKAGED = "packaged"
# Shares of the calibration windows. Held-out text is prose and code; the rest keeps digits, tables and clause
# numbers from being strangers to the quantized model.
_PACKAGED_SHARES = {"prose": 0.45, "code": 0.35, "licences": 0.08, "generated": 0.12}
# By default other languages are a part of it, and chats and tool calls of a model that is talked to.
_DEFAULT_SHARES = {"prose": 0.42, "code": 0.34, "licences": 0.06, "generated": 0.12, "languages": 0.06}
_CHATTING_SHARES = {
    **{"prose": 0.36, "code": 0.3, "licences": 0.05, "generated": 0.11},
    **{"languages": 0.06, "chat": 0.09, "tools": 0.03},
}
_VALIDATION_SHARES = {"prose": 0.5, "code": 0.5}

# Windows, each a list of tokens, and what they were cut from.
_Found = tuple[list[list[int]], str]


@dataclass(frozen=True)
class Windows:
    """Token windows. Where the tokenizer adds a BOS token, each starts with it, or in calibration every other one.

    ids: int64 [windows, seq_len].
    description: what they were cut from, one line for the report.
    sha256: hex, of `ids` as little-endian int64.
    """

    ids: torch.Tensor
    description: str
    sha256: str


def calibration_windows(
    text: str, tokenizer: PreTrainedTokenizerBase, samples: int, seq_len: int, seed: int
) -> Windows:
    """The windows that weights are rounded for.

    Where the tokenizer adds a BOS token, half of them do without. Models make it the token that is attended to when
    there is nothing to say (attention sinks, arXiv 2309.17453), and give it activations of its own; without it another
    token takes its place. Weights that were rounded for texts with BOS alone are worse there: in the chunks of a long
    document, and in programs that do not add it.

    Args:
        text: "default", "packaged", one of `other_text.KINDS`, a UTF-8 file (plain text or JSON Lines), or
            "hub:NAME[:COLUMN]". (What the model writes, `mixture.SAMPLED`, is not found here.)

    Raises:
        AccullmError: no such file, not UTF-8, too short for one window; the dataset cannot be had.
    """
    adds_bos = bool(start_of_text(tokenizer))
    cutter = _Cutter(tokenizer, seq_len + 1 if adds_bos else seq_len)
    windows, origin = _for_calibration(cutter, text, samples, seed)
    if adds_bos:
        windows = [window[1:] if number % 2 else window[:-1] for number, window in enumerate(windows)]
    return _wrap((windows, origin), samples)


def mixed(parts: Sequence[Windows], seed: int) -> Windows:
    """The windows of several texts among each other, so that the first ones, which are measured, have some of all."""
    if len(parts) == 1:
        return parts[0]
    windows = [window for part in parts for window in part.ids]
    random.Random(f"mixture {seed}").shuffle(windows)
    ids = torch.stack(windows)
    return Windows(ids, "; ".join(part.description for part in parts), ids_sha256(ids))


def ids_sha256(ids: torch.Tensor) -> str:
    """Of token ids as little-endian int64."""
    return hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()


def _for_calibration(cutter: _Cutter, text: str, samples: int, seed: int) -> _Found:
    rng = random.Random(f"calibration {seed}")
    if text in SAMPLED:
        raise AccullmError("is text that the model samples; it is found in no file", f"calibration text {text}")
    if text in ("default", PACKAGED):
        code, held_out = packaged_text.code("calibration"), packaged_text.held_out_runs()
        documents = {
            "prose": packaged_text.prose("calibration", code),
            "code": code,
            "licences": packaged_text.licences(),
        }
        streams = {
            kind: _clean(packaged_text.pieces(texts, cutter.piece, rng), held_out) for kind, texts in documents.items()
        }
        streams["generated"] = (generated_document(f"calibration {seed} {number}") for number in itertools.count())
        shares, remark = (_PACKAGED_SHARES, "") if text == PACKAGED else _default_shares(cutter.tokenizer)
        for kind in filter(KINDS.__contains__, shares):
            streams[kind] = documents_of(kind, cutter.tokenizer, f"default {seed}", "calibration")
        windows, origin = _mixture(cutter, streams, shares, samples, rng, "for calibration")
        return windows, origin + remark
    if text in KINDS:
        return _of_kind(cutter, text, samples, seed, "calibration")
    if text.startswith("hub:"):
        rows = hub_rows(text, samples * cutter.seq_len * _CHARACTERS_PER_TOKEN * 2, seed)
        return cutter.cut(rows, samples), text
    return next(_from_file(cutter, text, samples, rng))


def _default_shares(tokenizer: PreTrainedTokenizerBase) -> tuple[Mapping[str, float], str]:
    """The shares of the default text, and what its description is to say of them."""
    if tokenizer.chat_template is None:
        return _DEFAULT_SHARES, ""
    try:
        for kind in ("chat", "tools"):
            next(documents_of(kind, tokenizer, 0, "calibration"))
    except AccullmError as error:
        return _DEFAULT_SHARES, f", no chats ({error.what})"
    return _CHATTING_SHARES, ""


def validation_windows(text: str, tokenizer: PreTrainedTokenizerBase, windows: int, seq_len: int, seed: int) -> Windows:
    """The windows that artifact and original are compared on; "default" is text that calibration never sees.

    Args:
        text: "default" or a UTF-8 file.

    Raises:
        AccullmError: no such file, not UTF-8, too short for one window.
    """
    return _wrap(next(_held_out(text, tokenizer, windows, seq_len, seed)), windows)


def search_windows(text: str, tokenizer: PreTrainedTokenizerBase, windows: int, seq_len: int, seed: int) -> Windows:
    """As many windows again of the same text, none of which overlaps any of `validation_windows`.

    Raises:
        AccullmError: as above, or fewer than two are left.
    """
    _, (found, origin) = _held_out(text, tokenizer, windows, seq_len, seed)
    if len(found) < 2:
        raise AccullmError(
            f"has {len(found)} windows left to search on, beside the {windows} that the contract is judged on",
            f"validation text {text}",
            "give more text, or fewer --validation-windows",
        )
    return _wrap((found, origin), windows)


def other_sources(text: str) -> tuple[str, ...]:
    """What `--other-text` asks for, in its order; nothing for "none".

    Raises:
        AccullmError: one comes twice, or there is more than one that is no named kind.
    """
    names = [] if text.strip() == "none" else [name for part in text.split(",") if (name := part.strip())]
    where = "--other-text"
    if repeated := next((name for place, name in enumerate(names) if name in names[:place]), ""):
        raise AccullmError(f"{repeated} is given twice", where, "give it once")
    unnamed = [name for name in names if name not in KINDS]
    if len(unnamed) > 1:
        kinds = ", ".join(KINDS)
        raise AccullmError(f"{unnamed[0]} and {unnamed[1]} are two texts", where, f"give one, beside {kinds}")
    return tuple(names)


def other_windows(text: str, tokenizer: PreTrainedTokenizerBase, windows: int, seq_len: int, seed: int) -> Windows:
    """Windows of a text of another kind than calibration's; "default" is C++, the headers that come with torch.

    Args:
        text: "default", one of `other_text.KINDS`, or a UTF-8 file.

    Raises:
        AccullmError: no such file, not UTF-8, fewer than two windows, or turns that do not fit the chat template.
    """
    cutter = _Cutter(tokenizer, seq_len)
    rng = random.Random(f"other {seed}")
    if text == "default":
        pieces = packaged_text.pieces(packaged_text.headers(), cutter.piece, rng)
        found = cutter.cut(pieces, windows), f"C++ headers of torch {importlib.metadata.version('torch')}"
    elif text in KINDS:
        found = _of_kind(cutter, text, windows, seed, "held out")
    else:
        found = next(_from_file(cutter, text, windows, rng))
    if len(found[0]) < 2:
        raise AccullmError(
            f"has {len(found[0])} windows, and an interval needs 2",
            f"other text {text}",
            "give more text, or --other-text none",
        )
    return _wrap(found, windows)


def _of_kind(cutter: _Cutter, kind: str, windows: int, seed: int, part: packaged_text.Part) -> _Found:
    """Windows of one of `other_text.KINDS`."""
    turns = ", as plain turns" if kind in ("chat", "tools") and cutter.tokenizer.chat_template is None else ""
    documents = documents_of(kind, cutter.tokenizer, seed, part)
    return cutter.cut(documents, windows), f"generated text: {kind}{turns}"


def _held_out(text: str, tokenizer: PreTrainedTokenizerBase, windows: int, seq_len: int, seed: int) -> Iterator[_Found]:
    """Validation windows, and after them as many others, or as there are."""
    cutter = _Cutter(tokenizer, seq_len)
    rng = random.Random(f"validation {seed}")
    if text != "default":
        yield from _from_file(cutter, text, windows, rng)
        return
    code = packaged_text.code("held out")
    streams = {
        "prose": packaged_text.pieces(packaged_text.prose("held out", code), cutter.piece, rng),
        "code": packaged_text.pieces(code, cutter.piece, rng),
    }
    for purpose in ("held out", "held out, to search on,"):
        yield _mixture(cutter, streams, _VALIDATION_SHARES, windows, rng, purpose)


def check_text(text: str) -> None:
    """Refuse a file that cannot be read, before anything is computed. What is no file is no concern here.

    Raises:
        AccullmError: no such file, not UTF-8, JSON other than the JSON Lines that are understood.
    """
    if text not in ("default", PACKAGED, *SAMPLED, *KINDS) and not text.startswith("hub:"):
        path = Path(text).expanduser()
        parse_json_lines(_read_file(path), path)


def start_of_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS token where the tokenizer adds it by default; else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


class _Cutter:
    """Turns documents into windows of exactly `seq_len` tokens for one tokenizer.

    piece: characters of a document that fill about one window.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> None:
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.piece = max(_SMALLEST_PIECE, seq_len * _CHARACTERS_PER_TOKEN)
        self._start = start_of_text(tokenizer)
        self._separator: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def tokens(self, document: str) -> list[int]:
        """The document's tokens, without special ones."""
        return list(self.tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])

    def document(self, document: str) -> list[int]:
        """A whole document's tokens with the EOS that parts it from the next.

        A chat template may have written BOS and EOS: windows begin with BOS of themselves, and one EOS is enough.
        """
        tokens = self.tokens(document)
        if self._start and tokens[:1] == self._start:
            tokens = tokens[1:]
        return tokens if self._separator and tokens[-1:] == self._separator else tokens + self._separator

    def window(self, tokens: list[int]) -> list[int]:
        """One window from the start of `tokens`."""
        return self._start + tokens[: self.body]

    @property
    def body(self) -> int:
        """Tokens of text in a window."""
        return self.seq_len - len(self._start)

    def cut(self, documents: Iterable[str], count: int) -> list[list[int]]:
        """Up to `count` windows from consecutive documents, parted by the tokenizer's EOS."""
        windows: list[list[int]] = []
        rest: list[int] = []
        if count == 0:
            return windows
        for document in documents:
            rest += self.document(document)
            while len(rest) >= self.body:
                windows.append(self.window(rest))
                rest = rest[self.body :]
                if len(windows) == count:
                    return windows
        return windows


def _clean(texts: Iterator[str], held_out: Set[str]) -> Iterator[str]:
    """The texts without what validation holds out."""
    return (packaged_text.without_runs(text, held_out) for text in texts)


def _mixture(
    cutter: _Cutter,
    streams: Mapping[str, Iterator[str]],
    shares: Mapping[str, float],
    count: int,
    rng: random.Random,
    purpose: str,
) -> _Found:
    """Windows from several streams by their shares; a stream that ends early is made up for by the next ones."""
    wanted = apportion(shares, count)
    found = {kind: cutter.cut(stream, wanted[kind]) for kind, stream in streams.items()}
    for kind in ("code", "prose", "generated"):
        lacking = count - sum(map(len, found.values()))
        if kind in streams and lacking:
            found[kind] += cutter.cut(streams[kind], lacking)
    windows = [window for kind in found for window in found[kind]]
    rng.shuffle(windows)
    parts = ", ".join(f"{len(found[kind])} {kind}" for kind in found if found[kind])
    return windows, f"packaged text {purpose} from Python {platform.python_version()}: {parts}"


def _from_file(cutter: _Cutter, name: str, count: int, rng: random.Random) -> Iterator[_Found]:
    """Windows from a user's file: consecutive ones if it is short, from all over it if it is long.

    After them as many others, or as there are, that overlap none of them.

    Raises:
        AccullmError: the file holds too little for one window.
    """
    path = Path(name).expanduser()
    text = _read_file(path)
    rows = parse_json_lines(text, path)
    reach = 4 * cutter.seq_len * _CHARACTERS_PER_TOKEN
    is_long = len(text) > 4 * count * reach
    if rows is None and is_long:
        # Too long to tokenize for so few windows: one window from each of `count` equal stretches.
        stretch = len(text) // count
        places = [(number * stretch, rng.randrange(stretch - reach)) for number in range(count)]
        beside = [(start, at + reach if at + 2 * reach <= stretch else at - reach) for start, at in places]
        for chosen_places in (places, beside):
            taken = [cutter.tokens(text[start + at : start + at + reach]) for start, at in chosen_places]
            windows = [cutter.window(tokens) for tokens in taken if len(tokens) >= cutter.body]
            yield windows, f"{name}, {len(windows)} places"
        return
    if rows is None:
        tokens, origin = cutter.tokens(text), name
    else:
        tokens, origin = _tokens_of_rows(cutter, rows, count, rng if is_long else None), f"{name} ({rows.kind})"
    bodies = [tokens[start : start + cutter.body] for start in range(0, len(tokens) - cutter.body + 1, cutter.body)]
    if not bodies:
        raise AccullmError(
            f"holds {len(tokens)} tokens, but one window needs {cutter.body}",
            name,
            "give more text or a smaller --seq-len",
        )
    left = list(range(len(bodies)))
    for _ in range(2):
        chosen = sorted(rng.sample(left, min(count, len(left))))
        yield [cutter.window(bodies[index]) for index in chosen], origin
        left = [index for index in left if index not in chosen]


def _tokens_of_rows(cutter: _Cutter, rows: JsonLines, count: int, rng: random.Random | None) -> list[int]:
    """The tokens of all rows one after the other, parted by EOS; with `rng`, of random rows, as many as are needed."""
    order = list(range(len(rows.rows)))
    if rng is not None:
        rng.shuffle(order)
    tokens: list[int] = []
    for row in order:
        tokens += cutter.document(rows.render(row, cutter.tokenizer))
        if rng is not None and len(tokens) > 8 * count * cutter.seq_len:
            break
    return tokens


def _read_file(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise AccullmError(
            f"not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start})", path, "convert it to UTF-8"
        ) from None
    except FileNotFoundError:
        raise AccullmError("no such file", path, "check its spelling") from None
    except OSError as error:
        raise AccullmError(f"cannot be read ({error.strerror})", path) from None


def _wrap(found: _Found, asked: int) -> Windows:
    """The windows as a value.

    Raises:
        AccullmError: there are none.
    """
    windows, origin = found
    if not windows:
        raise AccullmError("holds too little text for one window", origin, "give more text or a smaller --seq-len")
    ids = torch.tensor(windows, dtype=torch.int64)
    size = f"{len(windows)} windows of {ids.shape[1]} tokens"
    if len(windows) < asked:
        size += f" (of {asked} asked for: there is no more text)"
    return Windows(ids, f"{size} from {origin}", ids_sha256(ids))
