"""Widths that the rows of a model cannot have in a GGUF file: whole messages, and that what they advise works."""

from __future__ import annotations

from pathlib import Path

import pytest

from accullm_cli.errors import AccullmError
from accullm_cli.pipeline import dry_run
from tests.formats.test_gguf import build
from tests.llama_cpp import byte_tokenizer
from tests.tiny import tiny_config


def saved(directory: Path, **fields: int) -> Path:
    build("llama", **fields).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose rows are of 64 and 96 weights."""
    return saved(tmp_path_factory.mktemp("narrow"))


def planned(model: Path, out: Path, **settings: object) -> None:
    usual = {"export__format": "[gguf]", "plan__outliers": 0, "plan__group_size": "null"}
    dry_run(tiny_config(model, out, **{**usual, **settings}))


def refusal(model: Path, out: Path, **settings: object) -> str:
    with pytest.raises(AccullmError) as caught:
        planned(model, out, **settings)
    return caught.value.line()


FIRST = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("settings", "message", "works"),
    [
        (
            {"plan__bits": 2},
            f"gguf holds 3, 4, 5, 6 or 8 bits, and {FIRST} has 2 (and 13 more); use --bits 4, 5 or 8, or export to the "
            "format accullm",
            [{"plan__bits": bits} for bits in (4, 5, 8)],
        ),
        (
            {"plan__bits": 6},
            f"{FIRST} has 64 input features, which are no multiple of Q6_K's blocks of 256 (and 13 more); use --bits "
            "4, 5 or 8, or export to the format accullm",
            [],
        ),
        (
            {"plan__bits": 4, "plan__encodings": "[Q4_K]"},
            f"{FIRST} has 64 input features, which are no multiple of Q4_K's blocks of 256 (and 13 more); use "
            "--encodings IQ4_NL --encodings Q4_0 --encodings Q4_1, or export to the format accullm",
            [{"plan__bits": 4, "plan__encodings": "[IQ4_NL, Q4_0, Q4_1]"}],
        ),
        (
            {"plan__bits": 5, "plan__encodings": "[Q4_0]", "plan__embedding_bits": 16},
            f"Q4_0 of gguf has 4 bits, and {FIRST} has 5 (and 13 more); leave out --encodings, or export to the format "
            "accullm",
            [{"plan__bits": 5, "plan__embedding_bits": 16}],
        ),
        (
            {"plan__bits": 4, "plan__group_size": 64},
            f"{FIRST} is to have group size 64, and Q4_K has 32 (and 13 more); leave out --group-size, or export to "
            "the format accullm",
            [{"plan__bits": 4}],
        ),
    ],
)
def test_widths_that_rows_cannot_have(
    settings: dict[str, object], message: str, works: list[dict[str, object]], narrow: Path, tmp_path: Path
) -> None:
    assert refusal(narrow, tmp_path / "out", **settings) == f"--format gguf: {message}"
    for other in works:
        planned(narrow, tmp_path / "out", **other)


def test_rows_that_no_encoding_holds_are_to_be_kept(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", intermediate_size=72)
    assert refusal(model, tmp_path / "out", plan__bits=4) == (
        "--format gguf: model.layers.0.mlp.down_proj has 72 input features, which are no multiple of Q4_K's blocks of "
        "256 (and 1 more); keep them in 16 bits (--keep '*.down_proj'), or export to the format accullm"
    )
    planned(model, tmp_path / "out", plan__bits=4, plan__keep="['*.down_proj']")


def test_an_average_that_cannot_be_had_names_the_format(narrow: Path, tmp_path: Path) -> None:
    """And nothing that it cannot be had by: groups are as large as a block's."""
    settings = {"plan__bits": 4.3, "calibration__gradient_samples": 1}
    assert refusal(narrow, tmp_path / "out", **settings) == (
        "--bits: an average of 4.3 bits cannot be had in gguf: the smallest plan takes 4.500, scales included; "
        "give more"
    )
    planned(narrow, tmp_path / "out", **{**settings, "plan__bits": 4.5})


def test_rows_of_several_lengths(tmp_path: Path) -> None:
    """Those that 256 does not divide take another width, another encoding, or stay as they are."""
    model = saved(tmp_path / "model", hidden_size=256, head_dim=64, intermediate_size=320, num_hidden_layers=1)
    what = "--format gguf: model.layers.0.mlp.down_proj has 320 input features, which are no multiple of"
    assert refusal(model, tmp_path / "out", plan__bits=6) == (
        f"{what} Q6_K's blocks of 256; use --bits 4, 5 or 8, or keep it in 16 bits (--keep '*.down_proj'), or export "
        "to the format accullm"
    )
    planned(model, tmp_path / "out", plan__bits=6, plan__keep="['*.down_proj']")
    assert refusal(model, tmp_path / "out", plan__bits=4, plan__encodings="[Q4_K]") == (
        f"{what} Q4_K's blocks of 256; use --encodings Q4_K --encodings IQ4_NL --encodings Q4_0 --encodings Q4_1, or "
        "export to the format accullm"
    )
    planned(model, tmp_path / "out", plan__bits=4, plan__encodings="[Q4_K, IQ4_NL, Q4_0, Q4_1]")


def test_zero_points_that_were_asked_for(narrow: Path, tmp_path: Path) -> None:
    assert refusal(narrow, tmp_path / "out", plan__bits=4, plan__symmetric="false", plan__embedding_bits=4) == (
        f"--format gguf: {FIRST} has 64 input features, which are no multiple of Q4_K's blocks of 256 (and 13 more); "
        "use --encodings IQ4_NL --encodings Q4_0 --encodings Q4_1, or export to the format accullm"
    )
    planned(
        narrow,
        tmp_path / "out",
        plan__bits=4,
        plan__symmetric="false",
        plan__encodings="[IQ4_NL, Q4_0, Q4_1]",
    )
