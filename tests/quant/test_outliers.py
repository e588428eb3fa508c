"""Which features become outliers."""

from __future__ import annotations

import pytest
import torch

from accullm_cli.quant.outliers import choose_outliers, expected_loss


def test_loss_is_second_moment_times_damage():
    assert expected_loss(torch.tensor([4.0, 0.0, 0.5]), torch.tensor([0.25, 9.0, 3.0])).tolist() == [1.0, 0.0, 1.5]


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [(0.0, ()), (0.1, (7,)), (0.2, (2, 7)), (0.3, (2, 4, 7)), (0.4, (2, 4, 5, 7)), (1.0, tuple(range(10)))],
)
def test_the_features_with_the_largest_losses_are_chosen_in_ascending_order(fraction, expected):
    loss = torch.tensor([0.0, 1.0, 5.0, 2.0, 4.0, 3.0, 0.0, 9.0, 0.5, 0.25])
    assert choose_outliers(loss, fraction) == expected


def test_ties_go_to_the_lower_index():
    assert choose_outliers(torch.tensor([1.0, 2.0, 2.0, 2.0, 1.0]), 0.4) == (1, 2)


def test_the_number_is_rounded():
    loss = torch.arange(576.0)
    assert len(choose_outliers(loss, 0.005)) == 3  # 2.88
    assert len(choose_outliers(loss, 0.0008)) == 0  # 0.46
    assert len(choose_outliers(loss, 0.001)) == 1  # 0.58
