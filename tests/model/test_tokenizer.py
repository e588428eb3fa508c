"""The tokenizer beside a model, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accullm_cli.errors import AccullmError
from accullm_cli.model.tokenizer import load_tokenizer
from tests.tiny import make_tokenizer


def refusal(directory: Path) -> str:
    with pytest.raises(AccullmError) as caught:
        load_tokenizer(directory)
    assert caught.value.exit_code == 2
    return caught.value.line()


def test_the_saved_tokenizer_comes_back(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    text = "café, 123\n"
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer(text)["input_ids"] == make_tokenizer()(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_directory_without_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert refusal(tmp_path) == (f"{tmp_path}: holds no tokenizer; copy tokenizer.json and tokenizer_config.json there")


def test_a_damaged_one_is_refused_in_one_line(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text()[:200])
    line = refusal(tmp_path)
    assert line.startswith(f"{tmp_path}: its tokenizer cannot be read (")
    assert line.endswith("); download it again")
    assert "\n" not in line


@pytest.mark.parametrize("remove", ["model", "added_tokens"])
def test_one_that_lacks_a_part_is_refused_in_one_line(remove: str, tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    del content[remove]
    path.write_text(json.dumps(content))
    line = refusal(tmp_path)
    assert line.startswith(f"{tmp_path}: its tokenizer cannot be read (")
    assert "\n" not in line
