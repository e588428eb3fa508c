"""The times of encodings are measured with llama.cpp's own library, on files of its own quantizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.llama_cpp import byte_tokenizer, llama_cpp
from tests.scripts.loading import load_script


def test_each_encoding_has_a_file_of_its_own_and_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llama_cpp()
    script = load_script("bench_gguf_encodings")
    small = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
    monkeypatch.setattr(script, "SHAPE", {**script.SHAPE, **small, "vocab_size": 320})
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    options = ["--layers", "1", "--tokens", "2", "--turns", "1", "--encodings", "Q4_K", "F16"]
    script.main(["--work", str(tmp_path / "work"), "--tokenizer", str(tmp_path / "tokenizer"), *options])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert {name.strip() for name, _, _ in rows} == {"IQ4_NL", "Q4_K", "F16"}
    assert [float(ratio) for name, _, ratio in rows if name.strip() == "IQ4_NL"] == [1.0]
    sizes = {name: (tmp_path / "work" / f"{name}.gguf").stat().st_size for name in ("IQ4_NL", "Q4_K", "F16")}
    assert sizes["Q4_K"] < sizes["F16"] / 2
