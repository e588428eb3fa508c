"""diagnose: gains against models that were put together by hand, the ranking, and what it advises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from accullm_cli.commands import diagnose as module
from accullm_cli.commands.diagnose import EMBEDDINGS, Part, diagnose
from accullm_cli.errors import AccullmError
from accullm_cli.formats import open_artifact
from accullm_cli.model import text as text_module
from accullm_cli.pipeline import convert
from accullm_cli.progress import Event
from tests.llama_cpp import byte_tokenizer
from tests.streaming import fast_config, random_ids, reference_model
from tests.tiny import make_checkpoint

IDS = random_ids(3, 32, seed=5)


@pytest.fixture(autouse=True)
def _text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random tokens in the place of packaged text, which takes long to collect."""
    windows = text_module.Windows(IDS, "random tokens", "0" * 64)
    monkeypatch.setattr(module, "validation_windows", lambda *arguments: windows)


@pytest.fixture(scope="module", params=["llama", "mixtral", "gpt2"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp(request.param)
    source = make_checkpoint(request.param, place / "model")
    convert(fast_config(source, place / "out"))
    return source, place / "out"


def artifact_in_memory(source: Path, out: Path) -> PreTrainedModel:
    """The original with all of the artifact's linears."""
    model = reference_model(source)
    artifact = open_artifact(out)
    with torch.no_grad():
        for name in artifact.plan.linears:
            put(model, name, artifact.linear(name).dequantize(torch.float32))
    return model


def place_of(model: PreTrainedModel, name: str) -> torch.Tensor:
    """The weight of a linear as [N, K], a view."""
    stack, _, number = name.rpartition(".")
    if number.isdigit():
        return model.get_parameter(stack).data[int(number)]
    module = model.get_submodule(name)
    weight = module.weight.data
    return weight.T if type(module).__name__ == "Conv1D" else weight


def put(model: PreTrainedModel, name: str, weight: torch.Tensor) -> None:
    place_of(model, name).copy_(weight)


def figures(original: PreTrainedModel, other: PreTrainedModel) -> tuple[float, float]:
    """Mean KL, and the mean margin of the original's most likely token."""
    with torch.no_grad():
        first, second = (model(IDS).logits.double().log_softmax(-1) for model in (original, other))
    kl = float((first.exp() * (first - second)).sum(-1).mean())
    best = first.argmax(-1, keepdim=True)
    top = second.topk(2, -1)
    others = torch.where(top.indices[..., :1] == best, top.values[..., 1:], top.values[..., :1])
    return kl, float((second.gather(-1, best) - others).mean())


def test_each_block_is_put_back_alone(made: tuple[Path, Path]) -> None:
    source, out = made
    found = diagnose(out, str(source))
    original, plain = reference_model(source), artifact_in_memory(source, out)
    kl, margin = figures(original, plain)
    assert found.mean_kl == pytest.approx(kl, rel=1e-4)
    assert found.mean_margin == pytest.approx(margin, rel=1e-4)
    assert found.mean_margin_original == pytest.approx(figures(original, original)[1], rel=1e-4)
    linears = open_artifact(out).plan.linears
    assert len(found.parts) == 2
    for part in found.parts:
        restored = artifact_in_memory(source, out)
        for name in linears:
            if name.startswith(f"{part.name}."):
                put(restored, name, place_of(original, name))
        kl_restored, margin_restored = figures(original, restored)
        assert part.mean_kl == pytest.approx(kl_restored, rel=1e-3, abs=1e-7)
        assert part.gain == pytest.approx(kl - kl_restored, rel=1e-2, abs=1e-5)
        assert part.margin_gain == pytest.approx(margin_restored - margin, abs=1e-4)
        assert part.keep == f"--keep '{part.name}.*'"
    assert [part.gain for part in found.parts] == sorted((part.gain for part in found.parts), reverse=True)


def test_each_linear_is_put_back_alone_and_experts_of_a_stack_together(made: tuple[Path, Path]) -> None:
    source, out = made
    found = diagnose(out, str(source), by="linear")
    original = reference_model(source)
    linears = open_artifact(out).plan.linears
    for part in found.parts:
        names = [name for name in linears if name == part.name or name.startswith(f"{part.name}.")]
        assert names
        restored = artifact_in_memory(source, out)
        for name in names:
            put(restored, name, place_of(original, name))
        assert part.mean_kl == pytest.approx(figures(original, restored)[0], rel=1e-3, abs=1e-7)
    covered = [name for part in found.parts for name in linears if f"{name}.".startswith(f"{part.name}.")]
    assert sorted(covered) == sorted(linears)


def test_what_it_advises_is_what_gains_most_per_bit_and_the_flag_does_it(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    source, out = made
    found = diagnose(out, str(source))
    best = max(found.parts, key=lambda part: part.gain_per_bit)
    assert found.advice.startswith(f"{best.keep} takes ")
    pattern = best.keep.removeprefix("--keep '").removesuffix("'")
    kept = convert(fast_config(source, tmp_path / "kept", plan__keep=f"['{pattern}']"))
    added = kept.bits_per_weight - found.bits_per_weight
    assert added == pytest.approx(best.extra_bits_per_weight, rel=1e-6)


def test_many_parts_are_measured_in_several_sweeps(made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = made
    whole = diagnose(out, str(source), by="linear")
    monkeypatch.setattr(module, "COPIES", 3)
    events: list[Event] = []
    assert diagnose(out, str(source), by="linear", progress=events.append) == whole
    assert len({event.label.partition(":")[0] for event in events if event.kind == "step"}) > 1


def test_quantized_embeddings_are_a_part(tmp_path: Path) -> None:
    source = make_checkpoint("llama-tied", tmp_path / "model")
    convert(fast_config(source, tmp_path / "out", plan__embedding_bits=4, plan__bits=8))
    found = diagnose(tmp_path / "out", str(source))
    first = found.parts[0]
    assert (first.name, first.keep) == (EMBEDDINGS, "--embedding-bits 16")
    assert first.share > 0.9


def test_where_no_part_would_help_that_is_said() -> None:
    assert module._advice((), 4.0) == "no single part would help"
    harmful = Part("a", 1.0, -0.1, -0.1, 0.0, 0.5, -0.2, "--keep 'a.*'")
    assert module._advice((harmful,), 4.0) == "no single part would help"


def test_another_model_than_the_original_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = made
    other = make_checkpoint("qwen2", tmp_path / "other")
    with pytest.raises(AccullmError) as error:
        diagnose(out, str(other))
    assert error.value.line() == f"{out}: was made from another model than {other}; name its original with --original"


# -- artifacts of other tools --------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["compressed-tensors", "mlx", "gptq"])
def test_what_another_tool_wrote_is_diagnosed_against_a_named_original(format: str, tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    settings = {"export__format": f"[{format}]", "plan__outliers": "null", "plan__group_size": "32"}
    convert(fast_config(source, tmp_path / "out", **settings))
    expected = diagnose(tmp_path / "out", str(source))
    (tmp_path / "out" / "accullm.json").unlink()
    found = diagnose(tmp_path / "out", str(source))
    assert found.mean_kl == expected.mean_kl > 0
    assert [part.gain for part in found.parts] == [part.gain for part in expected.parts]


def test_a_gguf_file_alone_is_diagnosed_against_a_named_original(tmp_path: Path) -> None:
    """It does not say what it was made from."""
    source = make_checkpoint("llama-tied", tmp_path / "model")
    byte_tokenizer().save_pretrained(source)
    settings = {"export__format": "[gguf]", "plan__outliers": "null", "plan__group_size": "null"}
    convert(fast_config(source, tmp_path / "out", **settings))
    file = tmp_path / "model.gguf"
    next((tmp_path / "out").glob("*.gguf")).rename(file)
    assert diagnose(file, str(source)).mean_kl > 0


def test_names_of_checkpoints_are_those_of_the_model(tmp_path: Path) -> None:
    """A mixture's experts are stored one by one, and called otherwise."""
    source = make_checkpoint("mixtral", tmp_path / "model")
    settings = {"export__format": "[compressed-tensors]", "plan__outliers": "null", "plan__group_size": "8"}
    convert(fast_config(source, tmp_path / "out", **settings, plan__symmetric=True))
    expected = diagnose(tmp_path / "out", str(source), by="linear")
    (tmp_path / "out" / "accullm.json").unlink()
    assert [(part.name, part.gain) for part in diagnose(tmp_path / "out", str(source), by="linear").parts] == [
        (part.name, part.gain) for part in expected.parts
    ]


def test_without_a_name_the_original_is_asked_for(tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    convert(fast_config(source, tmp_path / "out", export__format="[mlx]", plan__outliers="null", plan__group_size="32"))
    (tmp_path / "out" / "accullm.json").unlink()
    with pytest.raises(AccullmError) as error:
        diagnose(tmp_path / "out")
    out = tmp_path / "out"
    assert error.value.line() == f"{out}: was made from an unnamed model; name its place with --original"


def test_a_model_that_is_built_otherwise_is_not_its_original(tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    convert(fast_config(source, tmp_path / "out", export__format="[mlx]", plan__outliers="null", plan__group_size="32"))
    (tmp_path / "out" / "accullm.json").unlink()
    out, other = tmp_path / "out", make_checkpoint("mixtral", tmp_path / "other")
    with pytest.raises(AccullmError) as error:
        diagnose(out, str(other))
    assert error.value.line() == f"{out}: was made from another model than {other}; name its original with --original"
