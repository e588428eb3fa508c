"""Which scheme a module has: by hand, held against the package's own matching, and every refusal by its words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from accullm_cli.errors import AccullmError
from accullm_cli.formats.config_groups import EMBEDDING, LINEAR, Scheme, Schemes, groups_of

PATH = Path("artifact/config.json")


def group(targets: list[str], bits: int = 4, size: int | None = 32, **weights: Any) -> dict[str, Any]:
    """As llm-compressor writes it."""
    return {
        "format": "pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "targets": targets,
        "weights": {
            "actorder": None,
            "block_structure": None,
            "dynamic": False,
            "group_size": size,
            "num_bits": bits,
            "observer": "memoryless_minmax",
            "strategy": "group" if size else "channel",
            "symmetric": True,
            "type": "int",
            **weights,
        },
    }


def config(*groups: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {
        "config_groups": {f"group_{number}": entry for number, entry in enumerate(groups)},
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        **keys,
    }


def find(name: str, *groups: dict[str, Any], class_name: str = LINEAR, **keys: Any) -> Scheme:
    return Schemes(config(*groups, **keys), PATH).find(name, class_name)


# -- precedence ----------------------------------------------------------------------------------------------


def test_an_exact_name_comes_before_an_expression_and_that_before_a_class() -> None:
    groups = group(["Linear"], 8), group(["re:.*q_proj"], 5), group(["a.q_proj"], 3)
    assert find("a.q_proj", *groups).bits == 3
    assert find("b.q_proj", *groups).bits == 5
    assert find("b.k_proj", *groups).bits == 8


def test_an_expression_matches_from_the_beginning_and_may_end_early() -> None:
    groups = group(["re:a\\.q"], 5), group(["Linear"], 8)
    assert find("a.q_proj", *groups).bits == 5
    assert find("b.a.q_proj", *groups).bits == 8


def test_of_two_expressions_the_first_by_spelling_counts() -> None:
    assert find("x.q_proj", group(["re:.*q_proj"], 5), group(["re:.*_proj"], 3)).bits == 3


def test_a_target_in_two_groups_counts_for_the_last() -> None:
    assert find("x", group(["Linear"], 5), group(["Linear"], 3)).bits == 3


def test_embeddings_have_a_class_of_their_own() -> None:
    groups = group(["Embedding"], 8), group(["Linear"], 4)
    assert find("model.embed_tokens", *groups, class_name=EMBEDDING).bits == 8
    assert find("lm_head", *groups, ignore=[]).bits == 4


def test_what_a_group_says_of_weights() -> None:
    assert find("x", group(["Linear"], 6, 64, symmetric=False, actorder="static")) == Scheme(6, 64, False)
    assert find("x", group(["Linear"], 8, None)) == Scheme(8, -1, True)
    assert find("x", group(["Linear"], 4, 128, strategy=None)) == Scheme(4, 128, True)


def test_a_group_may_be_named_for_its_scheme() -> None:
    content = config() | {"config_groups": {"W4A16_ASYM": ["re:a.*"], "w8a16": ["Linear"]}}
    schemes = Schemes(content, PATH)
    assert schemes.find("a.b", LINEAR) == Scheme(4, 128, False)
    assert schemes.find("b", LINEAR) == Scheme(8, 128, True)


def test_what_is_written_is_read() -> None:
    written = {Scheme(4, 64, False): ["a", "b"], Scheme(3, -1, True): ["c"]}
    schemes = Schemes(config() | {"config_groups": groups_of(written)}, PATH)
    assert [schemes.find(name, LINEAR) for name in "abc"] == [Scheme(4, 64, False)] * 2 + [Scheme(3, -1, True)]


TARGETS = ["a.q", "a.k", "b.q", "re:.*q", "re:a.*", "re:.*", "re:b\\.", "Linear", "Embedding"]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.sampled_from(TARGETS), min_size=1, max_size=3), min_size=1, max_size=4))
def test_any_groups_match_as_the_package_matches(targets: list[list[str]]) -> None:
    match = pytest.importorskip("compressed_tensors.utils.match", reason="compressed-tensors is not installed")
    schemes = Schemes(config(*(group(own, 2 + number) for number, own in enumerate(targets))), PATH)
    of_target = {target: 2 + number for number, own in enumerate(targets) for target in own}
    for name, module, class_name in (
        ("a.q", nn.Linear(1, 1), LINEAR),
        ("b.k", nn.Linear(1, 1), LINEAR),
        ("b.q", nn.Embedding(1, 1), EMBEDDING),
    ):
        theirs = match.match_targets(name, module, of_target)
        if theirs:
            assert schemes.find(name, class_name).bits == of_target[theirs[0]]
            continue
        with pytest.raises(AccullmError):
            schemes.find(name, class_name)


# -- refusals ------------------------------------------------------------------------------------------------

LINEAR_GROUP = group(["Linear"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            config(LINEAR_GROUP, format="float-quantized"),
            "is in format float-quantized, of which only pack-quantized is supported",
        ),
        (
            config(LINEAR_GROUP, quantization_status="frozen"),
            "has the status frozen, and only compressed is supported",
        ),
        (
            config(LINEAR_GROUP, kv_cache_scheme={"num_bits": 8}),
            "quantizes the key-value cache, too, which is not supported",
        ),
        (
            config(LINEAR_GROUP, transform_config={"config_groups": {}}),
            "transforms weights or activations, too, which is not supported",
        ),
        (config(), "has no config_groups"),
        (config(group([])) | {"config_groups": {"g": {"targets": "Linear"}}}, "g of config_groups names no targets"),
        (config() | {"config_groups": {"FP8": ["Linear"]}}, "FP8 of config_groups is a scheme that is not supported"),
        (
            config(LINEAR_GROUP | {"format": "float-quantized"}, format="mixed-precision"),
            "group_0 of config_groups is in format float-quantized, of which only pack-quantized is supported",
        ),
        (
            config(LINEAR_GROUP | {"input_activations": {"num_bits": 8}}),
            "group_0 of config_groups quantizes input activations, which is not supported",
        ),
        (config(LINEAR_GROUP | {"weights": None}), "group_0 of config_groups says nothing of weights"),
        (
            config(group(["Linear"], 8, type="float")),
            "group_0 of config_groups has weights of 8 bits (float), and only integers of 2 to 8 are supported",
        ),
        (
            config(group(["Linear"], 1)),
            "group_0 of config_groups has weights of 1 bits (int), and only integers of 2 to 8 are supported",
        ),
        (
            config(group(["Linear"], actorder="group")),
            "group_0 of config_groups: reordered inputs (actorder group) are not supported",
        ),
        (
            config(group(["Linear"], strategy="block")),
            "group_0 of config_groups has the strategy block, and only group and channel are supported",
        ),
        (
            config(group(["re:("])),
            "has a target that is no regular expression (re:(: missing ), unterminated subpattern at position 0)",
        ),
    ],
)
def test_what_is_not_supported_is_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(AccullmError) as error:
        Schemes(content, PATH)
    assert error.value.line() == f"artifact/config.json: {message}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("b", "no target in config_groups is b, which is stored as codes"),
        ("lm_head", "ignores lm_head (lm_head), which is stored as codes"),
        ("a.gate", "ignores a.gate (re:.*gate$), which is stored as codes"),
    ],
)
def test_codes_without_a_scheme_are_refused(name: str, message: str) -> None:
    groups = group(["re:a.*", "lm_head"])
    with pytest.raises(AccullmError) as error:
        find(name, groups, ignore=["lm_head", "re:.*gate$"])
    assert error.value.line() == f"artifact/config.json: {message}"
