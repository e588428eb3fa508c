"""The probe of learned rounding: it begins with the artifact, and its steps are signed ones that bring it nearer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from accullm_cli import convert
from accullm_cli.formats import open_artifact
from tests.scripts.loading import load_script
from tests.streaming import short_config
from tests.tiny import make_checkpoint

script = load_script("probe_learning")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, float]:
    """Original, artifact, tokens, and the mean KL that validate reports; rounded to nearest, so that much is left."""
    place = tmp_path_factory.mktemp("converted")
    source = make_checkpoint("llama", place / "model")
    report = convert(short_config(source, place / "out", rounding__method="nearest"))
    return source, place / "out", place / "out.run" / "tokens.safetensors", report.fidelity.mean_kl.value


def probe_of(converted: tuple[Path, Path, Path, float]) -> object:
    original, artifact, tokens, _ = converted
    windows = load_file(tokens)
    return script.Probe(original, artifact, windows["calibration"], windows["validation"])


def test_a_learned_linear_begins_as_the_artifact_has_it(converted: tuple[Path, Path, Path, float]) -> None:
    linear = open_artifact(converted[1]).linear("model.layers.0.mlp.down_proj")
    assert len(linear.outlier_index)
    original = load_file(converted[0] / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].float()
    learned = script.LearnedLinear(linear, original)
    assert torch.equal(learned.weight().detach(), linear.dequantize())
    assert not bool(learned.moved.any())
    x = torch.randn(3, linear.codes.shape[1], generator=torch.Generator().manual_seed(0))
    learned(x).sum().backward()
    wanted = (x.sum(0) * learned.scale).index_fill(1, learned.outliers, 0.0)
    torch.testing.assert_close(learned.position.grad, wanted)
    with torch.no_grad():
        learned.position += 1
    assert bool((learned.moved == (linear.codes < learned.largest)).all())


def test_without_a_step_it_measures_what_validate_does(converted: tuple[Path, Path, Path, float]) -> None:
    probe = probe_of(converted)
    lines = probe.learn(iterations=0)
    assert [line.split(" | ")[1:] for line in lines] == [["0.00%", "1.00", "1.00 |"]] * 2
    before, after = probe.mean_kl()
    assert before == pytest.approx(converted[3], rel=1e-4)
    assert after == pytest.approx(before, rel=1e-6)


def test_codes_rounded_to_nearest_are_bettered(
    converted: tuple[Path, Path, Path, float], capsys: pytest.CaptureFixture[str]
) -> None:
    """So that what it finds on better codes says something about these."""
    original, artifact, tokens, _ = converted
    arguments = [str(original), str(artifact), "--tokens", str(tokens)]
    assert script.main([*arguments, "--iterations", "60", "--blocks", "1"]) == 0
    (line,) = capsys.readouterr().out.splitlines()[2:3]
    number, moved, own, _ = line.strip("| ").split(" | ")
    assert number == "0"
    assert float(moved.rstrip("%")) > 0.1
    assert float(own) < 0.95


def test_an_artifact_that_is_none_is_refused_in_one_line(
    converted: tuple[Path, Path, Path, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original, _, tokens, _ = converted
    assert script.main([str(original), str(tmp_path), "--tokens", str(tokens)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}")
