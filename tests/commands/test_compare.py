"""What `compare` reports, against references in float64."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from accullm_cli.commands.compare import compare
from accullm_cli.errors import AccullmError
from accullm_cli.formats import FORMATS
from accullm_cli.formats.accullm import record_fidelity
from accullm_cli.measure.result import Estimate
from tests.artifacts import Made, empty, make_parts
from tests.samples import report_of
from tests.tiny import tiny_gpt2, tiny_llama, tiny_mixtral

UP_PROJ = "model.layers.1.mlp.up_proj"


def export(directory: Path, model: nn.Module, format: str = "accullm", **options: object) -> Made:
    made = make_parts(model, directory.parent / f"{directory.name}.run", **options)
    FORMATS[format].write(empty(directory), made.parts)
    return made


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def test_two_artifacts_by_linear(tmp_path: Path) -> None:
    first = export(tmp_path / "a", tiny_llama(), outliers=(3,))
    second = export(tmp_path / "b", tiny_llama(), "compressed-tensors", bits=8)
    found = compare(tmp_path / "a", tmp_path / "b")
    assert [row.name for row in found.linears] == list(first.linears)
    for row in found.linears:
        wanted = relative(first.linears[row.name].dequantize(), second.linears[row.name].dequantize())
        assert row.relative_difference == pytest.approx(wanted, rel=1e-5)
    assert found.unmatched == ()
    assert (found.a.format, found.b.format) == ("accullm", "compressed-tensors")
    assert found.a.bits_per_weight == pytest.approx(first.parts.plan.bits_per_weight, rel=0.1)
    assert found.figures == ()


def test_an_artifact_with_itself_differs_by_nothing(tmp_path: Path) -> None:
    export(tmp_path / "a", tiny_mixtral(), keep=("down_proj.2",))
    assert {row.relative_difference for row in compare(tmp_path / "a", tmp_path / "a").linears} == {0.0}


def test_an_artifact_with_its_original(tmp_path: Path) -> None:
    model = tiny_llama()
    made = export(tmp_path / "a", model, keep=("o_proj",))
    model.save_pretrained(tmp_path / "b")
    found = compare(tmp_path / "a", tmp_path / "b")
    rows = {row.name: row for row in found.linears}
    wanted = relative(made.linears[UP_PROJ].dequantize(), model.get_parameter(f"{UP_PROJ}.weight"))
    assert rows[UP_PROJ].relative_difference == pytest.approx(wanted, rel=1e-5)
    assert 0.02 < wanted < 0.2
    assert rows["model.layers.0.self_attn.o_proj"].relative_difference == 0
    assert (found.b.format, found.b.bits_per_weight, found.figures) == ("checkpoint", 32, ())


def test_experts_that_the_original_stores_one_by_one(tmp_path: Path) -> None:
    model = tiny_mixtral()
    made = export(tmp_path / "a", model, keep=("down_proj.2",))
    model.save_pretrained(tmp_path / "b")
    assert any(".w2." in name for name in load_file(tmp_path / "b" / "model.safetensors"))
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found.unmatched == ()
    assert [row.name for row in found.linears] == list(made.parts.plan.linears)
    for row in found.linears:
        stack, _, number = row.name.rpartition(".")
        weight = (
            model.get_parameter(stack)[int(number)] if number.isdigit() else model.get_parameter(f"{row.name}.weight")
        )
        kept = row.name.endswith("down_proj.2")
        wanted = 0 if kept else relative(made.linears[row.name].dequantize(), weight)
        assert row.relative_difference == pytest.approx(wanted, rel=1e-5)
        assert row.bits_per_weight_b == 32
        assert kept or 0.02 < wanted < 0.3


def test_a_square_conv1d_of_a_base_checkpoint(tmp_path: Path) -> None:
    """attn.c_proj is [48, 48]: its shape does not tell that it is transposed."""
    model = tiny_gpt2()
    made = export(tmp_path / "a", model, keep=("1.attn.c_proj",))
    model.transformer.save_pretrained(tmp_path / "b")
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found.unmatched == ()
    rows = {row.name: row.relative_difference for row in found.linears}
    name = "transformer.h.0.attn.c_proj"
    weight = model.get_parameter(f"{name}.weight").T
    assert rows[name] == pytest.approx(relative(made.linears[name].dequantize(), weight), rel=1e-5)
    assert rows["transformer.h.1.attn.c_proj"] == 0


def test_linears_that_one_side_lacks_are_named(tmp_path: Path) -> None:
    model = tiny_llama()
    export(tmp_path / "a", model)
    tiny_llama(hidden=48).save_pretrained(tmp_path / "b")
    found = compare(tmp_path / "a", tmp_path / "b")
    # Every linear reads or writes the hidden state, whose size differs.
    assert len(found.unmatched) == 14
    assert found.linears == ()


def test_recorded_fidelity_side_by_side(tmp_path: Path) -> None:
    windows_a, windows_b = (0.05, 0.07, 0.06, 0.10), (0.04, 0.05, 0.05, 0.08)
    for name, windows, mean in (("a", windows_a, 0.07), ("b", windows_b, 0.055)):
        export(tmp_path / name, tiny_llama())
        record_fidelity(tmp_path / name, report_of(mean, windows))
    found = compare(tmp_path / "a", tmp_path / "b")
    figures = {figure.figure: figure for figure in found.figures}
    mean_kl = figures["mean_kl"]
    assert mean_kl.a == Estimate(0.07, 0.07 * 0.9, 0.07 * 1.1)
    assert figures["top1_agreement"].b is not None
    assert figures["top1_agreement"].b.value == 0.8459
    wanted = statistics.fmean(a - b for a, b in zip(windows_a, windows_b, strict=True))
    assert mean_kl.difference is not None
    assert mean_kl.difference.value == pytest.approx(wanted)
    assert mean_kl.difference.low > 0


def test_figures_from_other_windows_are_not_paired(tmp_path: Path) -> None:
    for name, windows in (("a", (0.1, 0.2)), ("b", (0.1, 0.2, 0.3))):
        export(tmp_path / name, tiny_llama())
        record_fidelity(tmp_path / name, report_of(0.1, windows))
    assert all(figure.difference is None for figure in compare(tmp_path / "a", tmp_path / "b").figures)


def test_a_limit_that_one_side_exceeds(tmp_path: Path) -> None:
    for name, mean in (("a", 0.07), ("b", 0.05)):
        export(tmp_path / name, tiny_llama())
        record_fidelity(tmp_path / name, report_of(mean))
    found = compare(tmp_path / "a", tmp_path / "b", max_mean_kl=0.05)
    assert found.exceeded == (f"{tmp_path}/a: mean KL 0.07 is above 0.05",)


def test_a_limit_without_recorded_fidelity_is_refused(tmp_path: Path) -> None:
    export(tmp_path / "a", tiny_llama())
    with pytest.raises(AccullmError) as error:
        compare(tmp_path / "a", tmp_path / "a", max_mean_kl=0.05)
    assert error.value.line() == (
        f"{tmp_path}/a: not validated yet, so there is no mean KL; run accullm validate first"
    )


def test_two_plain_checkpoints_are_refused(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "a")
    with pytest.raises(AccullmError) as error:
        compare(tmp_path / "a", tmp_path / "a")
    assert error.value.line() == (
        f"{tmp_path}/a: neither this nor the other directory is an artifact; give at least one artifact"
    )


@pytest.mark.parametrize("tied", [False, True])
def test_quantized_embeddings_are_compared_with_whatever_the_other_has(tied: bool, tmp_path: Path) -> None:
    model = tiny_llama(tied=tied)
    first = export(tmp_path / "a", model, embedding_bits=8)
    second = export(tmp_path / "b", model, embedding_bits=4)
    export(tmp_path / "c", model)
    model.save_pretrained(tmp_path / "d")
    names = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    for other, bits in (("b", 8 * (32 + 4 + 1) / 64), ("c", 32.0), ("d", 32.0)):
        found = compare(tmp_path / "a", tmp_path / other)
        assert found.unmatched == ()
        assert [row.name for row in found.linears] == [*first.linears, *names]
        for row in found.linears[-len(names) :]:
            own = first.embeddings[row.name].dequantize()
            theirs = (
                second.embeddings[row.name].dequantize() if other == "b" else model.get_parameter(f"{row.name}.weight")
            )
            assert row.relative_difference == pytest.approx(relative(own, theirs), rel=1e-5)
            assert (row.bits_per_weight_a, row.bits_per_weight_b) == (8 * 70 / 64, bits)
        # What counts is what the linears take.
        assert found.a.bits_per_weight == compare(tmp_path / "c", tmp_path / other).a.bits_per_weight
