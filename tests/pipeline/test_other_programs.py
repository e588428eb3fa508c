"""Artifacts for other programs and of other tools: converted, measured and held against the program that reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from accullm_cli.commands.compare import compare
from accullm_cli.commands.inspect import Fact, inspect
from accullm_cli.commands.verify import verify
from accullm_cli.formats import open_artifact
from accullm_cli.pipeline import convert, validate_artifact
from tests.pipeline.observe import refusal
from tests.streaming import fast_config
from tests.tiny import make_checkpoint

COMPRESSED = {"export__format": "[compressed-tensors]", "plan__outliers": 0}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("mixtral") / "model")


@pytest.fixture(scope="module")
def converted(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts, with zero points where these may be; held against transformers when it was measured."""
    out = tmp_path_factory.mktemp("converted") / "out"
    report = convert(fast_config(mixture, out, **COMPRESSED))
    assert not [sentence for sentence in report.records if "as users load it" in sentence]
    return out


@pytest.fixture(scope="module")
def foreign(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as another tool would leave it: without a manifest."""
    directory = tmp_path_factory.mktemp("foreign") / "theirs"
    shutil.copytree(converted, directory)
    (directory / "accullm.json").unlink()
    return directory


def test_the_card_says_where_it_runs(converted: Path) -> None:
    card = (converted / "README.md").read_text()
    assert "| transformers 5.24 with compressed-tensors 0.20 | yes |" in card
    assert "| vLLM 0.32 on CPUs | yes |" in card
    assert Fact("vLLM 0.32 on CPUs", "yes") in inspect(converted).runs


def test_bits_of_a_mixture_count_what_lies_on_disk(converted: Path) -> None:
    """With the shapes of experts' parts, of which gate and up have one each."""
    recorded = json.loads((converted / "accullm.json").read_text())["bits_per_weight"]
    opened = open_artifact(converted)
    assert any(".gate_up_proj." in name for name in opened.plan.linears)
    assert opened.bits_per_weight == pytest.approx(recorded, rel=1e-12)


def test_what_another_tool_wrote_is_inspected_and_verified(foreign: Path, converted: Path) -> None:
    found = inspect(foreign)
    assert (found.format, found.validated) == ("compressed-tensors", False)
    expert = next(row for row in found.linears if row.name == "model.layers.0.block_sparse_moe.experts.2.w3")
    assert (expert.bits, expert.group_size, expert.symmetric) == (4, 32, True)
    assert found.bits_per_weight == inspect(converted).bits_per_weight
    assert verify(foreign).intact


def test_what_another_tool_wrote_is_compared_with_its_original(foreign: Path, mixture: Path) -> None:
    found = compare(foreign, mixture)
    assert not found.unmatched
    assert {0.05 < row.relative_difference < 0.2 for row in found.linears} == {True}


def test_what_another_tool_wrote_measures_as_ours_does(
    foreign: Path, converted: Path, mixture: Path, tmp_path: Path
) -> None:
    config = fast_config(mixture, tmp_path / "out", machine__run=tmp_path / "run")
    theirs = validate_artifact(foreign, config)
    ours = json.loads((converted / "accullm.json").read_text())["fidelity"]["mean_kl"]["value"]
    figure = theirs.figure("mean_kl")
    assert figure is not None
    assert figure.value == pytest.approx(ours, rel=1e-6)
    assert not (foreign / "accullm.json").exists()


def test_what_another_tool_wrote_does_not_say_what_it_was_made_from(foreign: Path, tmp_path: Path) -> None:
    config = fast_config(foreign, tmp_path / "out")
    assert refusal(lambda: validate_artifact(foreign, config)) == (
        f"{foreign}: was made from an unnamed model; name its place with --original"
    )


def test_quantized_embeddings_are_measured_as_they_are_stored(tmp_path: Path) -> None:
    source = make_checkpoint("llama-tied", tmp_path / "model", torch.bfloat16)
    settings = {"plan__embedding_bits": 8, "plan__bits": 8, "plan__group_size": 32}
    report = convert(fast_config(source, tmp_path / "out", **COMPRESSED, **settings))
    assert not [sentence for sentence in report.records if "as users load it" in sentence]
    opened = open_artifact(tmp_path / "out")
    assert list(opened.plan.embeddings) == ["model.embed_tokens"]
    assert "lm_head.weight" not in opened.files.infos
