"""Batches on their way to a device: in order, one ahead of the one that is used, and none on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from accullm_cli.model.ahead import sent_ahead
from tests.quant.elsewhere import THERE, Elsewhere, as_if_there_were_a_gpu, pretend_streams

PARTS = [torch.full((2, 3), float(number)) for number in range(3)]


def asked_for(asked: list[int]) -> Iterator[torch.Tensor]:
    for number, part in enumerate(PARTS):
        asked.append(number)
        yield part


def test_the_cpu_is_given_the_parts_themselves_one_at_a_time() -> None:
    asked: list[int] = []
    for number, part in enumerate(sent_ahead(asked_for(asked), torch.device("cpu"))):
        assert part is PARTS[number]
        assert asked[-1] == number


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which needs no stand-in")
def test_the_next_part_is_sent_before_a_part_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    told: list[str] = []
    sending, arriving = ["other waits for current", "in other"], ["current waits for other"]
    with as_if_there_were_a_gpu(monkeypatch):
        pretend_streams(monkeypatch, told)
        expected = [sending * 2 + arriving, sending + arriving, arriving]
        for number, part in enumerate(sent_ahead(asked_for(asked), THERE)):
            assert isinstance(part, Elsewhere)
            assert torch.equal(part.cpu(), PARTS[number])
            assert asked[-1] == min(number + 1, 2)
            assert told == expected[number]
            told.clear()
    assert list(sent_ahead([], THERE)) == []
