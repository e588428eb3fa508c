"""Amounts in the words of terminal and report."""

from __future__ import annotations

import pytest

from accullm_cli.units import duration, size


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (123_456, "123 kB"),
        (1_234_567, "1.23 MB"),
        (269_000_000, "269 MB"),
        (999_900_000, "1000 MB"),
        (1_340_000_000, "1.34 GB"),
        (13_500_000_000, "13.5 GB"),
        (7_000_000_000_000_000, "7000 TB"),
    ],
)
def test_sizes_are_decimal(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (3.21, "3.2 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (61, "1 min 01 s"),
        (185, "3 min 05 s"),
        (245, "4 min 05 s"),
        (7620, "2 h 07 min"),
        (7800, "2 h 10 min"),
    ],
)
def test_durations_are_said_as_people_do(seconds, text):
    assert duration(seconds) == text
