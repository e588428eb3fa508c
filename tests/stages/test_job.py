"""What stages depend on of a section and of the machine, and what they share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from accullm_cli.config import Calibration
from accullm_cli.model.structure import Structure, read_structure
from accullm_cli.stages import job as job_module
from accullm_cli.stages.compute import Compute
from accullm_cli.stages.job import open_decoder, section_inputs
from tests.streaming import fast_config, opened
from tests.tiny import make_checkpoint


def test_a_section_gives_an_input_for_each_field() -> None:
    values = Calibration(text="a.txt", samples=3, seq_len=16)
    assert section_inputs("calibration", values) == {
        "config:calibration.text": "'a.txt'",
        "config:calibration.samples": "3",
        "config:calibration.seq_len": "16",
        "config:calibration.gradient_samples": "None",
    }
    assert section_inputs("calibration", values, "samples") == {"config:calibration.samples": "3"}


def test_the_number_of_threads_is_an_input() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = Compute().inputs()
        torch.set_num_threads(1)
        one = Compute().inputs()
    finally:
        torch.set_num_threads(before)
    assert {name for name in one if one[name] != two[name]} == {"machine:threads"}


def test_decoders_of_a_job_share_what_was_read_of_their_structure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Structure] = []

    def count(model: PreTrainedModel) -> Structure:
        read.append(read_structure(model))
        return read[-1]

    monkeypatch.setattr(job_module, "read_structure", count)
    with opened(fast_config(make_checkpoint("llama", tmp_path / "model"), tmp_path / "out")) as job:
        first, second = open_decoder(job), open_decoder(job)
    assert [first.structure, second.structure] == [read[0], read[0]]
    assert len(read) == 1
    assert first.model is not second.model
