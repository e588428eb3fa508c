"""The outlier map: what it counts, what it draws, and that odd inputs do not stop it."""

import re
from dataclasses import replace

import pytest
import torch

from accullm_cli.report.outlier_map import _pool, _prepare, draw_outlier_map
from tests.report.test_html import Page
from tests.samples import STRONG_FEATURE, inputs, plan_of


@pytest.fixture
def drawn(tmp_path):
    def draw(stats, plan=None) -> str:
        path = tmp_path / "run" / "outliers.html"
        draw_outlier_map(stats, plan or plan_of(stats), path)
        return path.read_text(encoding="utf-8")

    return draw


def words(text: str) -> str:
    return " ".join(Page(text).text.split())


def test_page_counts_what_the_plan_keeps(drawn):
    assert "6 of 384 input features (1.56%) stay in the source's dtype, in 6 distinct inputs." in words(drawn(inputs()))


def test_each_kind_of_input_has_its_map(drawn):
    text = words(drawn(inputs()))
    assert "Input of self_attn.q_proj, self_attn.k_proj: 64 features." in text
    assert "Input of mlp.down_proj: 64 features." in text
    assert drawn(inputs()).count("<svg") == 2 + 4


def test_wide_inputs_are_pooled_and_say_so(drawn):
    assert "1,500 features. Each column shows the strongest of 3 neighbouring features." in words(drawn(inputs(1500)))


def test_table_has_a_row_for_each_input(drawn):
    # 1000 of 1000 + 63 is 94.1%; the largest value is 2 * sqrt(1000).
    assert "model.layers.2.mlp.down_proj 64 1 94.1% 63.2 1 4,096" in words(drawn(inputs()))


def test_linears_of_one_input_that_keep_different_features_share_a_map():
    stats = inputs()[0]
    plan = plan_of([stats])
    plan.linears["model.layers.0.self_attn.k_proj"] = replace(
        plan.linears["model.layers.0.self_attn.k_proj"], outlier_index=(2, 40)
    )
    assert _prepare(stats, plan).chosen == (2, STRONG_FEATURE, 40)


def test_strength_is_relative_to_the_median():
    strength = _prepare(inputs()[0], plan_of(inputs())).strength
    expected = [0.0] * 64
    expected[STRONG_FEATURE] = 3.0
    assert strength.tolist() == pytest.approx(expected)


def test_pooling_keeps_the_strongest_of_neighbours():
    assert _pool(torch.tensor([1.0, 5.0, -2.0, -3.0, -1.0]), 2).tolist() == [5.0, -2.0, -1.0]


def test_each_kept_feature_is_marked_at_its_place(drawn):
    """Three blocks, one mark each, all in one column of the first map and at even distances."""
    first = re.search(r'<svg role="img" aria-label="Input of self_attn.*?</svg>', drawn(inputs()), re.DOTALL).group()
    marks = [
        (float(x), float(y))
        for x, y in re.findall(r'<use xlink:href="#[^"]*" x="([\d.]+)" y="([\d.]+)" style="fill: none', first)
    ]
    assert len(marks) == 3
    assert len({x for x, _ in marks}) == 1
    ys = sorted(y for _, y in marks)
    assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=1e-3)


def test_inputs_that_are_always_zero_or_were_never_reached_do_not_stop_it(drawn):
    stats = inputs()
    stats[0] = replace(stats[0], second_moment=torch.zeros(64), absolute_maximum=torch.zeros(64))
    stats[1] = replace(stats[1], tokens=0)
    text = drawn(stats)
    assert "nan" not in re.sub(r'(?s)xlink:href="data:.*?"', "", text).lower()
    assert "model.layers.0.mlp.down_proj 64 1" in words(text)


def test_inputs_outside_of_blocks_are_in_the_table(drawn):
    stats = [replace(inputs()[0], linears=("lm_head",))]
    assert "lm_head 64 1 94.1%" in words(drawn(stats))


def test_page_is_well_formed_and_loads_nothing(drawn):
    page = Page(drawn(inputs()))
    assert page.open == []
    assert [link for link in page.links if not link.startswith(("#", "data:image/png;base64,"))] == []
    assert len(page.ids) == len(set(page.ids))


def test_same_statistics_give_the_same_bytes(drawn):
    assert drawn(inputs()) == drawn(inputs())


def test_names_are_escaped(drawn):
    stats = [replace(entry, linears=("model.layers.0.<b>q</b>",)) for entry in inputs(blocks=1)]
    assert "b" not in Page(drawn(stats)).tags
