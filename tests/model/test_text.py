"""Windows for calibration and validation: sizes, mixture, determinism, and what is refused."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accullm_cli.errors import AccullmError
from accullm_cli.model.text import Windows, calibration_windows, mixed, search_windows, validation_windows
from tests.model.texts import BOS, EOS, byte_tokenizer, refusal, text_of

# -- the packaged texts ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibration() -> Windows:
    return calibration_windows("default", byte_tokenizer(), 100, 256, 0)


@pytest.fixture(scope="module")
def validation() -> Windows:
    return validation_windows("default", byte_tokenizer(), 40, 256, 0)


def test_windows_have_the_size_asked_for(calibration: Windows, validation: Windows) -> None:
    assert (calibration.ids.shape, calibration.ids.dtype) == ((100, 256), torch.int64)
    assert (validation.ids.shape, validation.ids.dtype) == ((40, 256), torch.int64)


CHATS = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{{ eos_token }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("text", "template", "shares"),
    [
        ("packaged", CHATS, "45 prose, 35 code, 8 licences, 12 generated"),
        ("default", None, "42 prose, 34 code, 6 licences, 12 generated, 6 languages"),
        ("default", CHATS, "36 prose, 30 code, 5 licences, 11 generated, 6 languages, 9 chat, 3 tools"),
    ],
)
def test_calibration_is_a_mixture_by_shares(text: str, template: str | None, shares: str) -> None:
    version = ".".join(map(str, sys.version_info[:3]))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    windows = calibration_windows(text, tokenizer, 100, 256, 0)
    assert windows.description == (
        f"100 windows of 256 tokens from packaged text for calibration from Python {version}: {shares}"
    )
    with_turns = ["<assistant>" in text or "<user>" in text for text in text_of(windows, tokenizer)]
    assert any(with_turns) == ("chat" in shares)
    assert any(with_turns[:50]) == any(with_turns[50:])  # all kinds are among each other
    ends = windows.ids == EOS
    assert ends.any()
    assert not (ends[:, 1:] & ends[:, :-1]).any()  # a turn's end is the document's


def test_a_template_that_takes_no_chats_is_done_without() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('a system message comes first') }}"
    windows = calibration_windows("default", tokenizer, 20, 64, 0)
    assert windows.description.endswith(
        ", no chats (its messages do not fit the model's chat template (a system message comes first))"
    )
    tokenizer.chat_template = None
    assert torch.equal(windows.ids, calibration_windows("default", tokenizer, 20, 64, 0).ids)


def test_default_validation_is_half_prose_and_half_code(validation: Windows) -> None:
    version = ".".join(map(str, sys.version_info[:3]))
    assert validation.description == (
        f"40 windows of 256 tokens from packaged text held out from Python {version}: 20 prose, 20 code"
    )


def test_the_hash_is_over_the_token_ids(calibration: Windows) -> None:
    content = np.array(calibration.ids.tolist(), dtype="<i8").tobytes()
    assert calibration.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("windows", [calibration_windows, validation_windows])
def test_the_same_seed_gives_the_same_windows_and_another_gives_others(windows: Any) -> None:
    tokenizer = byte_tokenizer()
    first, again, other = (windows("default", tokenizer, 8, 64, seed) for seed in (3, 3, 4))
    assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.ids, other.ids)


def test_windows_come_from_many_documents(calibration: Windows) -> None:
    assert len({tuple(row.tolist()) for row in calibration.ids}) == 100


def test_documents_are_parted_by_eos() -> None:
    tokenizer = byte_tokenizer()
    ids = validation_windows("default", tokenizer, 10, 4096, 0).ids
    assert int((ids == EOS).sum()) >= 5
    assert not (validation_windows("default", byte_tokenizer(eos=False), 10, 4096, 0).ids == EOS).any()


def test_every_window_starts_with_bos_where_the_tokenizer_adds_it() -> None:
    ids = validation_windows("default", byte_tokenizer(bos=True), 6, 64, 0).ids
    assert ids.shape == (6, 64)
    assert ids[:, 0].tolist() == [BOS] * 6
    assert not (ids[:, 1:] == BOS).any()
    assert not (validation_windows("default", byte_tokenizer(), 6, 64, 0).ids == BOS).any()


def test_every_other_calibration_window_has_no_bos(tmp_path: Path) -> None:
    letters = "".join(chr(97 + number % 26) for number in range(5 * 16))
    (tmp_path / "text.txt").write_text(letters)
    tokenizer = byte_tokenizer(bos=True)
    ids = calibration_windows(str(tmp_path / "text.txt"), tokenizer, 5, 16, 0).ids
    assert ids.shape == (5, 16)
    assert (ids == BOS).nonzero().tolist() == [[0, 0], [2, 0], [4, 0]]
    # No window overlaps another, and those without BOS have one token of text more instead.
    read = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    assert read == [letters[16 * number : 16 * number + 15 + number % 2] for number in range(5)]
    packaged = calibration_windows("default", tokenizer, 10, 64, 0).ids
    assert (packaged == BOS).nonzero().tolist() == [[number, 0] for number in range(0, 10, 2)]
    assert not (calibration_windows("default", byte_tokenizer(), 10, 64, 0).ids == BOS).any()


def test_says_so_when_there_is_less_text_than_asked_for() -> None:
    windows = validation_windows("default", byte_tokenizer(), 400, 16384, 0)
    found = len(windows.ids)
    assert 20 < found < 400
    assert windows.description.startswith(
        f"{found} windows of 16384 tokens (of 400 asked for: there is no more text) from packaged text held out"
    )


# -- a user's file -----------------------------------------------------------------------------------------------


def test_a_short_file_gives_consecutive_windows_in_order(tmp_path: Path) -> None:
    content = "".join(chr(ord("a") + number % 26) for number in range(70))
    (tmp_path / "short.txt").write_text(content)
    windows = calibration_windows(str(tmp_path / "short.txt"), byte_tokenizer(), 100, 16, 0)
    assert text_of(windows, byte_tokenizer()) == [content[start : start + 16] for start in (0, 16, 32, 48)]
    assert windows.description == (
        f"4 windows of 16 tokens (of 100 asked for: there is no more text) from {tmp_path}/short.txt"
    )


def test_a_long_file_gives_windows_from_all_over_it(tmp_path: Path) -> None:
    content = "".join(f"{number:07d} " for number in range(20_000))
    (tmp_path / "long.txt").write_text(content)
    windows = validation_windows(str(tmp_path / "long.txt"), byte_tokenizer(), 8, 16, 0)
    places = [content.index(text) for text in text_of(windows, byte_tokenizer())]
    assert [place * 8 // len(content) for place in places] == list(range(8))


def test_a_mark_of_byte_order_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + b"abcdefghijklmnop")
    windows = calibration_windows(str(tmp_path / "bom.txt"), byte_tokenizer(), 1, 16, 0)
    assert text_of(windows, byte_tokenizer()) == ["abcdefghijklmnop"]


@pytest.mark.parametrize("validation", [False, True])
def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path, validation: bool) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    assert refusal(tmp_path / "latin.txt", validation=validation) == (
        f"{tmp_path}/latin.txt: not UTF-8 (byte 0xe9 at offset 3); convert it to UTF-8"
    )


@pytest.mark.parametrize("validation", [False, True])
def test_a_file_shorter_than_one_window_is_refused(tmp_path: Path, validation: bool) -> None:
    (tmp_path / "few.txt").write_text("fifteen letters")
    assert refusal(tmp_path / "few.txt", validation=validation) == (
        f"{tmp_path}/few.txt: holds 15 tokens, but one window needs 16; give more text or a smaller --seq-len"
    )


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent.txt") == f"{tmp_path}/absent.txt: no such file; check its spelling"


def test_a_directory_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path}: cannot be read (Is a directory)"


@pytest.mark.parametrize("text", ["self", "self-chat"])
def test_text_that_the_model_samples_is_not_found_here(text: str) -> None:
    assert refusal(text) == f"calibration text {text}: is text that the model samples; it is found in no file"


# -- windows to search on ----------------------------------------------------------------------------------------


def overlaps(first: Windows, second: Windows, tokens: int = 120) -> bool:
    """Whether a run of tokens of one window is in another."""
    runs = {tuple(row[at : at + tokens].tolist()) for row in first.ids for at in range(len(row) - tokens + 1)}
    rows = [row.tolist() for row in second.ids]
    return any(tuple(row[at : at + tokens]) in runs for row in rows for at in range(len(row) - tokens + 1))


def test_the_packaged_text_has_windows_to_search_on_that_validation_does_not_see() -> None:
    tokenizer = byte_tokenizer()
    judged = validation_windows("default", tokenizer, 16, 256, 0)
    searched = search_windows("default", tokenizer, 16, 256, 0)
    assert searched.ids.shape == judged.ids.shape
    assert not overlaps(judged, searched)
    assert "held out, to search on," in searched.description
    # The same again, and the windows that are judged on are those of a run without a search.
    assert torch.equal(search_windows("default", tokenizer, 16, 256, 0).ids, searched.ids)


@pytest.mark.parametrize("lines", [60, 6000], ids=["short", "long"])
def test_a_file_has_windows_to_search_on_that_validation_does_not_see(lines: int, tmp_path: Path) -> None:
    """From a short file they are cut side by side, from a long one at random places."""
    file = tmp_path / "text.txt"
    file.write_text("".join(f"line number {number} says {number * number}\n" for number in range(lines)))
    tokenizer = byte_tokenizer()
    for seed in range(8):
        judged = validation_windows(str(file), tokenizer, 6, 64, seed)
        searched = search_windows(str(file), tokenizer, 6, 64, seed)
        assert searched.ids.shape == judged.ids.shape == (6, 64)
        assert not overlaps(judged, searched)


def test_a_text_with_too_little_left_to_search_on_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("x" * (7 * 16 + 3))
    with pytest.raises(AccullmError) as caught:
        search_windows(str(file), byte_tokenizer(), 6, 16, 0)
    assert caught.value.line() == (
        f"validation text {file}: has 1 windows left to search on, beside the 6 that the contract is judged on; "
        "give more text, or fewer --validation-windows"
    )


def test_windows_of_several_texts_are_mixed_by_the_seed() -> None:
    tokenizer = byte_tokenizer()
    parts = [calibration_windows(text, tokenizer, 20, 64, 0) for text in ("default", "languages")]
    found = mixed(parts, 0)
    rows = [tuple(row) for part in parts for row in part.ids.tolist()]
    assert sorted(rows) == sorted(map(tuple, found.ids.tolist()))
    assert 4 <= sum(tuple(row) in rows[:20] for row in found.ids[:16].tolist()) <= 12
    assert found.description == f"{parts[0].description}; {parts[1].description}"
    assert found.sha256 == hashlib.sha256(np.array(found.ids.tolist(), dtype="<i8").tobytes()).hexdigest()
    assert torch.equal(mixed(parts, 0).ids, found.ids)
    assert not torch.equal(mixed(parts, 1).ids, found.ids)
    assert mixed(parts[:1], 0) is parts[0]
