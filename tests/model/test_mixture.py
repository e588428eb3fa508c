"""What --calibration asks for: sources, their shares, and how many windows these are."""

from __future__ import annotations

from pathlib import Path

import pytest

from accullm_cli.errors import AccullmError
from accullm_cli.model.mixture import calibration_shares, window_counts


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("default", {"default": 1.0}),
        ("default, self-chat=25%", {"default": 0.75, "self-chat": 0.25}),
        ("a.txt,chat=10%,b.txt", {"a.txt": 0.45, "chat": 0.1, "b.txt": 0.45}),
        ("self=62.5%,tools=37.5%", {"self": 0.625, "tools": 0.375}),
        ("lr=0.1/text.txt,hub:owner/name:column=50%", {"lr=0.1/text.txt": 0.5, "hub:owner/name:column": 0.5}),
    ],
)
def test_sources_without_a_share_divide_what_is_left(text: str, shares: dict[str, float]) -> None:
    assert calibration_shares(text) == pytest.approx(shares)
    assert list(calibration_shares(text)) == list(shares)


def test_a_file_with_commas_in_its_name_is_one_source(tmp_path: Path) -> None:
    text = str(tmp_path / "chat,default=25%.txt")
    assert len(calibration_shares(text)) == 2
    Path(text).write_text("text")
    assert calibration_shares(text) == {text: 1.0}


def test_windows_are_counted_by_largest_remainders() -> None:
    assert window_counts("default,self-chat=25%", 32) == {"default": 24, "self-chat": 8}
    assert window_counts("default,chat,tools", 10) == {"default": 4, "chat": 3, "tools": 3}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("chat,default,chat=5%", "--calibration: chat is given twice; give it once"),
        (" , ", "--calibration: names no text; give 'default', or leave it out"),
        ("chat=100%,default", "--calibration: the other shares leave nothing for default; give it a share"),
        (
            "chat=50%,default=40%",
            "--calibration: the shares make 0.9 of 1; make them 100%, or leave one source without a share for the rest",
        ),
        (
            "chat=80%,default=40%",
            "--calibration: the shares make 1.2 of 1; make them 100%, or leave one source without a share for the rest",
        ),
        ("chat=0%,default", "--calibration: chat=0% has no share between 0 and 100%; write SOURCE=25%"),
        ("chat=much%,default", "--calibration: chat=much% has no share between 0 and 100%; write SOURCE=25%"),
        (
            "chat=3%,default",
            "--calibration: 0.03 of 8 windows is none, for chat; give it a larger share, or more --samples",
        ),
    ],
)
def test_shares_that_make_no_mixture_are_refused(text: str, line: str) -> None:
    with pytest.raises(AccullmError) as caught:
        window_counts(text, 8)
    assert caught.value.line() == line
    assert caught.value.exit_code == 2
