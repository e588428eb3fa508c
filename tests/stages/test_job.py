"""What stages depend on of a section and of the machine."""

from __future__ import annotations

import torch

from accullm_cli.config import Calibration
from accullm_cli.stages.compute import Compute
from accullm_cli.stages.job import section_inputs


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
