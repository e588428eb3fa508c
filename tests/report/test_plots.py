"""What the plots draw: which linear belongs where, and the figures at their places."""

import re

import pytest

from accullm_cli.measure.fidelity import divergence_found
from accullm_cli.report.plots import (
    block_and_kind,
    by_kind_and_block,
    draw_bits_per_weight,
    draw_histogram,
    draw_relative_errors,
)
from tests.samples import FIDELITY, linear

(HISTOGRAM,) = divergence_found(FIDELITY).histograms


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.12.self_attn.q_proj", (12, "self_attn.q_proj")),
        ("transformer.h.0.attn.c_attn", (0, "attn.c_attn")),
        ("model.layers.3.mlp.experts.down_proj.7", (3, "mlp.experts.down_proj.*")),
        ("model.layers.3.mlp.experts.7.w1", (3, "mlp.experts.*.w1")),
        ("lm_head", (None, "lm_head")),
        ("model.layers.1.mlp.fc1", (1, "mlp.fc1")),
    ],
)
def test_place_of_a_linear(name, place):
    assert block_and_kind(name) == place


def test_experts_of_a_block_are_averaged_and_other_linears_left_out():
    figures = [("l.0.experts.0.up", 1.0), ("l.0.experts.1.up", 3.0), ("l.1.experts.0.up", 5.0), ("lm_head", 9.0)]
    assert by_kind_and_block(figures) == {"experts.*.up": {0: 2.0, 1: 5.0}}


def test_histogram_draws_the_share_of_each_bin():
    """Heights of the bars, read back from the path, are in the ratio of the counts 36 : 500 : 800 : 200."""
    drawing = draw_histogram(HISTOGRAM)
    path = next(d for d in re.findall(r'<path d="([^"]*)"', drawing) if d.count("L") >= 8)
    points = [tuple(map(float, pair)) for pair in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]
    base = points[0][1]
    heights = [base - y for x, y in points if y < base - 1e-6]
    levels = list(dict.fromkeys(round(height, 2) for height in heights))
    assert [level / max(levels) for level in levels] == pytest.approx([36 / 800, 500 / 800, 1.0, 200 / 800], abs=1e-3)


def test_marks_of_the_histogram_name_their_values():
    for label in ("noise floor: 3.3e-05", "mean: 0.066", "99%: 0.61", "99.9%: 1.4"):
        assert label in draw_histogram(HISTOGRAM)


def test_linears_without_measured_error_are_not_drawn():
    assert draw_relative_errors([linear("model.layers.0.up", relative_error=None)]) == ""
    drawing = draw_relative_errors([linear("model.layers.0.up"), linear("model.layers.0.down", relative_error=None)])
    assert ">up<" in drawing
    assert ">down<" not in drawing


def test_bits_are_drawn_where_all_are_equal_and_where_all_stay_in_16():
    for bits in (4, 16):
        assert ">up<" in draw_bits_per_weight([linear(f"model.layers.{block}.up", bits=bits) for block in range(2)])


def test_linear_left_in_16_bits_is_orange():
    drawing = draw_bits_per_weight([linear("model.layers.0.up"), linear("model.layers.1.up", bits=16)])
    assert "fill: #d9822b" in drawing
    assert "fill: #d9822b" not in draw_bits_per_weight([linear("model.layers.0.up")])


def test_names_of_linears_are_escaped_in_plots():
    drawing = draw_relative_errors([linear("model.layers.0.<b>up</b>")])
    assert "<b>" not in drawing
    assert "&lt;b&gt;up&lt;/b&gt;" in drawing
