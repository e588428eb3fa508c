"""Windows for calibration and validation: sizes, mixture, separation, determinism, and what is refused."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from accullm_cli.errors import AccullmError
from accullm_cli.model import packaged_text
from accullm_cli.model.generated_text import generated_document
from accullm_cli.model.other_text import KINDS, documents_of
from accullm_cli.model.packaged_text import line_runs
from accullm_cli.model.text import (
    Windows,
    calibration_windows,
    mixed,
    other_sources,
    other_windows,
    search_windows,
    validation_windows,
)

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


def test_default_calibration_is_a_mixture_by_shares(calibration: Windows) -> None:
    version = ".".join(map(str, sys.version_info[:3]))
    assert calibration.description == (
        f"100 windows of 256 tokens from packaged text for calibration from Python {version}: "
        "45 prose, 35 code, 8 licences, 12 generated"
    )


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


def test_no_document_is_in_both_parts() -> None:
    code, unseen = packaged_text.code("calibration"), packaged_text.code("held out")
    seen = {document.name for document in [*code, *packaged_text.prose("calibration", code)]}
    held_out = {document.name for document in [*unseen, *packaged_text.prose("held out", unseen)]}
    assert len(seen) > 150
    assert len(held_out) > 50
    assert seen.isdisjoint(held_out)


def test_calibration_shares_no_run_of_lines_with_validation() -> None:
    """Every calibration window of a large sample against every held-out document, by a plain search."""
    unseen = packaged_text.code("held out")
    held_out = [*unseen, *packaged_text.prose("held out", unseen)]
    haystack = "\n\n".join("\n".join(_lines(document.text)) for document in held_out)
    tokenizer = byte_tokenizer(eos=False)
    sample = calibration_windows("default", tokenizer, 60, 2048, 1)
    runs = 0
    for text in text_of(sample, tokenizer):
        lines = _lines(text)[1:-1]  # the first and the last may be cut within
        for start in range(len(lines) - 2):
            run = "\n".join(lines[start : start + 3])
            if len(run) >= 60:
                runs += 1
                assert run not in haystack
    assert runs > 1_000


def test_without_the_cut_calibration_would_share_runs_with_validation() -> None:
    """The topic "compound" holds the topics "if", "for", ...: a split by document alone would leak."""
    code, unseen = packaged_text.code("calibration"), packaged_text.code("held out")
    held_out = packaged_text.runs_of([*unseen, *packaged_text.prose("held out", unseen)])
    seen = packaged_text.runs_of(packaged_text.prose("calibration", code))
    assert len(seen & held_out) > 100


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


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


def test_tables_of_numbers_are_no_text() -> None:
    table = "\n".join(f"{number:08x}: {number * 7:06d}" for number in range(500))
    prose = "Sentences about something, in many words and few figures.\n" * 50
    documents = [packaged_text.Document("table", table), packaged_text.Document("prose", prose)]
    assert "".join(packaged_text.pieces(documents, 500, random.Random(0))) == prose


def test_pieces_take_every_document_in_turn_and_nothing_twice() -> None:
    long = packaged_text.Document("long", "".join(f"long line {'abcdefghij'[n]}\n" for n in range(10)))
    short = packaged_text.Document("short", "short line one\nshort line two\n")
    found = list(packaged_text.pieces([long, short], 10, random.Random(1)))
    assert sorted(found) == sorted([*long.text.splitlines(True), *short.text.splitlines(True)])
    assert sum(piece.startswith("short") for piece in found[:4]) == 2


def test_runs_that_form_anew_when_lines_are_cut_are_cut_too() -> None:
    a, b, c, d, e = (f"line {letter} is long enough to count as text" for letter in "abcde")
    runs = {f"{b}\n{c}\n{d}", f"{a}\n{e}\nend"}
    assert packaged_text.without_runs("\n".join([a, b, "", c, d, e, "end", "kept"]), runs) == "\nkept"


# -- generated documents -----------------------------------------------------------------------------------------


def test_a_generated_document_depends_on_its_seed_alone() -> None:
    assert generated_document("calibration 0 1") == generated_document("calibration 0 1")
    documents = {generated_document(f"calibration 0 {number}") for number in range(100)}
    assert len(documents) == 100


def test_generated_sums_are_right() -> None:
    checked = 0
    for number in range(200):
        for line in generated_document(f"calibration 0 {number}").splitlines():
            left, _, right = line.rpartition(" = ")
            if left and set(left) <= set("0123456789 +-*/()="):
                assert eval(left.partition(" = ")[0]) == int(right)
                checked += 1
    assert checked > 100


def test_generated_foreign_keys_exist() -> None:
    checked = 0
    for number in range(200):
        lines = generated_document(f"calibration 0 {number}").splitlines()
        tables = [line.split()[2] for line in lines if line.startswith("CREATE TABLE")]
        if not tables:
            continue
        rows = [line.split(" VALUES (") for line in lines if line.startswith("INSERT INTO")]
        parents = {row[1].split(",")[0] for row in rows if row[0].endswith(tables[0])}
        children = [row[1].split(", ")[1] for row in rows if row[0].endswith(tables[1])]
        assert children
        assert set(children) <= parents
        checked += 1
    assert checked > 10


def test_generated_clauses_refer_to_clauses_that_exist() -> None:
    checked = 0
    for number in range(100):
        document = generated_document(f"calibration 0 {number}")
        clauses = {line.split()[0] for line in document.splitlines() if line[:1].isdigit() and "AGREEMENT" in document}
        for line in document.splitlines():
            if " Clause " in line:
                assert line.split(" Clause ")[1].split()[0] in clauses
                checked += 1
    assert checked > 20


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


# -- other texts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["self", "self-chat"])
def test_text_that_the_model_samples_is_not_found_here(text: str) -> None:
    assert refusal(text) == f"calibration text {text}: is text that the model samples; it is found in no file"


def test_a_hub_dataset_needs_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refusal("hub:owner/name") == "hub:owner/name: needs the package datasets; pip install datasets"


class FakeDataset(list):
    def shuffle(self, seed: int, buffer_size: int) -> FakeDataset:
        return self


def fake_datasets(monkeypatch: pytest.MonkeyPatch, rows: Any) -> None:
    """A `datasets` whose load_dataset gives these rows, or fails."""

    def load_dataset(name: str, split: str, streaming: bool) -> Any:
        assert (name, split, streaming) == ("owner/name", "train", True)
        if isinstance(rows, Exception):
            raise rows
        return FakeDataset(rows)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


@pytest.mark.parametrize(("text", "letter"), [("hub:owner/name", "b"), ("hub:owner/name:other", "c")])
def test_a_hub_dataset_gives_its_first_or_the_named_text_column(
    monkeypatch: pytest.MonkeyPatch, text: str, letter: str
) -> None:
    fake_datasets(monkeypatch, [{"id": 1, "text": "b" * 40, "other": "c" * 40}] * 9)
    windows = calibration_windows(text, byte_tokenizer(), 2, 16, 0)
    assert text_of(windows, byte_tokenizer()) == [letter * 16] * 2
    assert windows.description == f"2 windows of 16 tokens from {text}"


def test_a_hub_dataset_without_the_column_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, [{"id": 1, "body": "b"}])
    assert refusal("hub:owner/name:text") == ("hub:owner/name:text: has no text column text; its columns are id, body")


def test_a_hub_dataset_that_cannot_be_reached_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, ConnectionError("no network\nat all"))
    assert refusal("hub:owner/name") == (
        "hub:owner/name: the dataset cannot be had (no network); connect to the network, or give a local file"
    )


@pytest.mark.parametrize(
    "error",
    [
        # datasets 3 and before, and 4
        ValueError("The repository for owner/name contains custom code which must be executed ... `trust_remote_code`"),
        RuntimeError("Dataset scripts are no longer supported, but found name.py"),
    ],
)
def test_a_hub_dataset_that_is_a_script_is_refused(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    fake_datasets(monkeypatch, error)
    assert refusal("hub:owner/name") == (
        "hub:owner/name: the dataset is a script, Python code that is never run; give one in Parquet or JSON, or a file"
    )


def test_a_version_of_datasets_that_would_run_code_is_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []

    def load_dataset(name: str, split: str, streaming: bool, trust_remote_code: bool | None = None) -> FakeDataset:
        told.append(trust_remote_code)
        return FakeDataset([{"text": "b" * 40}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    calibration_windows("hub:owner/name", byte_tokenizer(), 1, 16, 0)
    assert told == [False]


def test_a_hub_dataset_with_too_little_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, [{"text": "few"}])
    assert refusal("hub:owner/name") == (
        "hub:owner/name: holds too little text for one window; give more text or a smaller --seq-len"
    )


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


# -- text of another kind ----------------------------------------------------------------------------------------


def test_the_other_text_is_of_another_kind() -> None:
    """C++, of which calibration and validation have nothing."""
    tokenizer = byte_tokenizer()
    found = other_windows("default", tokenizer, 8, 512, 0)
    assert found.ids.shape == (8, 512)
    assert found.description == f"8 windows of 512 tokens from C++ headers of torch {torch.__version__}"
    texts = text_of(found, tokenizer)
    assert sum("#include" in text or "at::" in text or "//" in text or ";" in text for text in texts) >= 6
    assert torch.equal(other_windows("default", tokenizer, 8, 512, 0).ids, found.ids)
    assert not torch.equal(other_windows("default", tokenizer, 8, 512, 1).ids, found.ids)


def test_every_further_kind_is_seeded_and_no_part_of_calibrations_text() -> None:
    tokenizer = byte_tokenizer()
    calibration = set(
        itertools.chain(*map(line_runs, text_of(calibration_windows("default", tokenizer, 64, 512, 0), tokenizer)))
    )
    for kind in KINDS:
        found = other_windows(kind, tokenizer, 6, 512, 0)
        assert found.ids.shape == (6, 512)
        assert torch.equal(other_windows(kind, tokenizer, 6, 512, 0).ids, found.ids)
        assert not torch.equal(other_windows(kind, tokenizer, 6, 512, 1).ids, found.ids)
        assert calibration.isdisjoint(itertools.chain(*map(line_runs, text_of(found, tokenizer))))


def test_what_is_held_out_of_a_kind_is_in_no_calibration_text() -> None:
    """By runs of lines where texts are packaged, and by phrases, tools and sentences where they are made up."""
    tokenizer = byte_tokenizer()
    held_out = packaged_text.held_out_runs()
    chats = calibration_windows("chat", tokenizer, 40, 2048, 0)
    assert held_out.isdisjoint(itertools.chain(*map(line_runs, text_of(chats, tokenizer))))
    assert chats.description == "40 windows of 2048 tokens from generated text: chat, as plain turns"
    pairs = {kind: (documents(kind, 60, part="calibration"), documents(kind, 60)) for kind in KINDS}
    for seen, unseen in pairs.values():
        assert set(seen).isdisjoint(unseen)
    for kind, pattern in (("tools", r'"name": "(\w+)", "arguments"'), ("languages", r"[^\W\d_]{4,}")):
        seen, unseen = (set(re.findall(pattern, "\n".join(texts))) for texts in pairs[kind])
        if kind == "tools":
            assert (len(seen), len(unseen), seen & unseen) == (4, 6, set())
        else:  # a few words of a language are in any letter
            assert len(seen & unseen) < 0.1 * len(seen)
    questions = [set(re.findall(r"^User: (\w+ \w+)", "\n".join(texts), re.MULTILINE)) for texts in pairs["chat"]]
    assert questions[0].isdisjoint(questions[1])


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


def documents(kind: str, count: int, template: str | None = None, part: packaged_text.Part = "held out") -> list[str]:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return list(itertools.islice(documents_of(kind, tokenizer, 0, part), count))


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"


def test_chats_go_through_the_models_template_or_are_plain_turns() -> None:
    for through, plain in zip(documents("chat", 5, TEMPLATE), documents("chat", 5), strict=True):
        turns = re.findall(r"<(user|assistant)>(.*?)</\1>", through, re.DOTALL)
        assert [role for role, _ in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert len(turns) >= 4
        assert plain == "\n\n".join(f"{role.capitalize()}: {text}" for role, text in turns)
    assert other_windows("chat", byte_tokenizer(), 2, 64, 0).description.endswith(
        "generated text: chat, as plain turns"
    )


def test_calls_of_tools_fit_what_was_declared_and_asked_for() -> None:
    types = {"string": str, "integer": int, "number": float}
    for text in documents("tools", 20, TEMPLATE):
        turns = [content for _, content in re.findall(r"<(user|assistant)>(.*?)</\1>", text, re.DOTALL)]
        declared = {tool["name"]: tool for tool in json.loads(turns[0].split("\n", 1)[1].rpartition("\n\n")[0])}
        for asked, call, result, answer in zip(*(turns[place::4] for place in range(4)), strict=True):
            called = json.loads(call)
            parameters = declared[called["name"]]["parameters"]
            assert list(called["arguments"]) == parameters["required"]
            for name, value in called["arguments"].items():
                assert type(value) is types[parameters["properties"][name]["type"]]
                assert str(value) in asked
            assert json.loads(result)["tool"] == called["name"]
            assert all(f"{name} {value}" in answer for name, value in json.loads(result)["result"].items())


def test_letters_take_ten_languages_by_turns() -> None:
    letters = documents("languages", 20)
    begun = [re.match(r"\W*\w+", letter)[0] for letter in letters]
    assert begun[:7] == ["Sehr", "Madame", "Estimada", "Gentile", "Prezada", "Geachte", "Szanowna"]
    assert all("{" not in letter for letter in letters)
    assert all(first != second for first, second in zip(letters[:10], letters[10:], strict=True))


def test_annexes_of_a_long_document_refer_back() -> None:
    (document,) = documents("documents", 1)
    assert len(document) > 10_000
    parts = re.split(r"^Annex (\d+)$", document, flags=re.MULTILINE)
    assert list(map(int, parts[1::2])) == list(range(1, 17))
    for number, text in zip(map(int, parts[1::2]), parts[2::2], strict=True):
        referred = re.findall(r"read together with Annex (\d+)\.", text)
        assert len(referred) == (number > 1)
        assert all(1 <= int(other) < number for other in referred)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("chat,default,chat", "--other-text: chat is given twice; give it once"),
        (
            "default,letters.txt",
            "--other-text: default and letters.txt are two texts; give one, beside chat, tools, languages, documents",
        ),
    ],
)
def test_other_texts_that_make_no_sense_together(text: str, line: str) -> None:
    with pytest.raises(AccullmError) as caught:
        other_sources(text)
    assert caught.value.line() == line
    assert (other_sources("none"), other_sources("chat, a.txt")) == ((), ("chat", "a.txt"))


def test_the_other_text_may_be_a_file_of_two_windows_or_more(tmp_path: Path) -> None:
    file = tmp_path / "letters.txt"
    file.write_text("dear sir " * 8)
    assert other_windows(str(file), byte_tokenizer(), 8, 16, 0).ids.shape == (4, 16)
    file.write_text("dear sir dear sir ")
    with pytest.raises(AccullmError) as caught:
        other_windows(str(file), byte_tokenizer(), 8, 16, 0)
    assert caught.value.line() == (
        f"other text {file}: has 1 windows, and an interval needs 2; give more text, or --other-text none"
    )
