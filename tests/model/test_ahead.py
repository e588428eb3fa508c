"""What is read or sent before it is used: batches to a device, in order, and a block's tensors from the disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from accullm_cli.errors import AccullmError
from accullm_cli.model import ahead
from accullm_cli.model.ahead import ReadAhead, sent_ahead
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.checkpoint import Checkpoint
from accullm_cli.model.integrity import TensorInfo, read_header, read_tensor
from accullm_cli.model.skeleton import build_skeleton
from accullm_cli.model.source import open_source
from tests.quant.elsewhere import THERE, Elsewhere, as_if_there_were_a_gpu, pretend_streams
from tests.streaming import reference_model
from tests.tiny import make_checkpoint

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


# -- stored tensors ----------------------------------------------------------------------------------------


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[TensorInfo]:
    """What is read; and nothing here is pinned, as there may be no GPU."""
    told: list[TensorInfo] = []

    def note(info: TensorInfo, room: torch.Tensor | None = None) -> torch.Tensor:
        told.append(info)
        return read_tensor(info, room)

    empty = torch.empty
    monkeypatch.setattr(ahead, "read_tensor", note)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **kwargs: empty(*size, **kwargs))
    return told


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, TensorInfo]:
    tensors = {f"t{number}": part.bfloat16() for number, part in enumerate(PARTS)}
    save_file(tensors, tmp_path / "x.safetensors")
    return read_header(tmp_path / "x.safetensors")


def test_what_was_begun_is_taken_without_a_second_reading(
    stored: dict[str, TensorInfo], read: list[TensorInfo]
) -> None:
    reader = ReadAhead()
    reader.begin([stored["t0"], stored["t1"]])
    for number in (1, 0, 2):  # the last one was not begun
        found = reader.take(stored[f"t{number}"])
        assert found.dtype == torch.bfloat16
        assert torch.equal(found.float(), PARTS[number])
    assert read == [stored["t0"], stored["t1"], stored["t2"]]
    assert torch.equal(reader.take(stored["t1"]).float(), PARTS[1])  # it is held for one who takes it
    assert len(read) == 4


def test_beginning_again_lets_go_of_what_was_not_taken(stored: dict[str, TensorInfo], read: list[TensorInfo]) -> None:
    reader = ReadAhead()
    reader.begin([stored["t0"]])
    reader.begin([stored["t1"]])
    reader.take(stored["t1"])
    read.clear()
    assert torch.equal(reader.take(stored["t0"]).float(), PARTS[0])
    assert read == [stored["t0"]]


def test_a_file_cut_short_is_said_to_who_takes_from_it(stored: dict[str, TensorInfo], read: list[TensorInfo]) -> None:
    os.truncate(stored["t2"].file, stored["t2"].end - 1)
    reader = ReadAhead()
    reader.begin(stored.values())
    assert torch.equal(reader.take(stored["t0"]).float(), PARTS[0])
    with pytest.raises(AccullmError, match="was cut short while it was read"):
        reader.take(stored["t2"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which needs no stand-in")
@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("step", [1, -1])
def test_beside_a_gpu_the_next_blocks_tensors_are_read_while_a_block_is_worked_on(
    name: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_checkpoint(name, tmp_path / "model")
    expected = dict(reference_model(directory).named_parameters())
    source = open_source(str(directory), tmp_path)
    read: list[tuple[TensorInfo, bool]] = []

    def note(info: TensorInfo, room: torch.Tensor | None = None) -> torch.Tensor:
        read.append((info, room is not None))
        return read_tensor(info, room)

    monkeypatch.setattr(ahead, "read_tensor", note)
    own = [{info for key, info in source.tensors.items() if f"layers.{index}." in key} for index in range(2)]
    order = [0, 1][::step]
    with as_if_there_were_a_gpu(monkeypatch):
        model = build_skeleton(directory, source.untied)
        weights = Checkpoint(source, model)
        decoder = Decoder(model, weights, device=THERE)
        for index in order:
            block = decoder.load_block(index, step)
            for key, value in block.named_parameters():
                assert isinstance(value.data, Elsewhere)
                assert torch.equal(value.data.cpu(), expected[f"model.layers.{index}.{key}"])
            weights._ahead._reader.submit(lambda: None).result()  # whatever was begun is read by now
            # The first block when it is wanted, the other before; and both once.
            assert {info for info, was_ahead in read if not was_ahead} == own[order[0]]
            assert {info for info, was_ahead in read if was_ahead} == own[order[1]]
            assert len(read) == len(own[0]) + len(own[1])
            decoder.release_block(index)
