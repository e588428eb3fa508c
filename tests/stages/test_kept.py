"""--keep: which names a pattern means, what is refused, and what the report says."""

from __future__ import annotations

import pytest

from accullm_cli.errors import AccullmError
from accullm_cli.stages.kept import kept_names, kept_sentence

NAMES = [
    f"model.layers.{block}.{linear}"
    for block in (0, 1, 10)
    for linear in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
]


def test_a_pattern_is_matched_against_the_whole_name() -> None:
    patterns = ["model.layers.1.*", "*.down_proj", "model.layers.?.self_attn.[oq]_proj"]
    assert kept_names(patterns, NAMES) == {
        "model.layers.1.*": tuple(NAMES[3:6]),
        "*.down_proj": (NAMES[2], NAMES[5], NAMES[8]),
        "model.layers.?.self_attn.[oq]_proj": (NAMES[0], NAMES[1], NAMES[3], NAMES[4]),
    }
    assert kept_names([], NAMES) == {}


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("*.downproj", "did you mean '*.down_proj'?"),
        ("down_proj", "did you mean '*.down_proj'?"),
        ("*.Down_Proj", "did you mean '*.down_proj'?"),
        ("model.layers.1.mlp.dwn_proj", "did you mean 'model.layers.1.mlp.down_proj'"),
        ("model.layer.1.*", "did you mean 'model.layers.1.*' or "),
        ("model.layers.11.*", "did you mean 'model.layers.1.*' or "),
        ("xyzzy", "names look like model.layers.0.self_attn.q_proj"),
        ("", "names look like model.layers.0.self_attn.q_proj"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_near_ones(pattern: str, hint: str) -> None:
    with pytest.raises(AccullmError) as refused:
        kept_names(["*", pattern], NAMES)
    assert refused.value.line().startswith(f"--keep: no linear is called '{pattern}'; {hint}")


@pytest.mark.parametrize(
    ("names", "listed"),
    [
        (["lm_head"], "1 linear stays in 16 bits (--keep '*'): lm_head"),
        (NAMES[2::3], "3 linears stay in 16 bits (--keep '*'): model.layers.0-1,10.mlp.down_proj"),
        (
            [f"h.{block}.up.{expert}" for block in (0, 1) for expert in (0, 1, 2)],
            "6 linears stay in 16 bits (--keep '*'): h.0-1.up.0-2",
        ),
        (
            ["h.0.up.0", "h.1.up.3", "h.0.down"],
            "3 linears stay in 16 bits (--keep '*'): h.0.up.0, h.1.up.3, h.0.down",
        ),
    ],
)
def test_the_sentence_names_every_linear_and_is_short(names: list[str], listed: str) -> None:
    assert kept_sentence("*", names) == listed
