"""Embedding and head: what they are rounded for, against transformers' own passes and textbooks in float64."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from accullm_cli.model.blocks import Decoder
from accullm_cli.progress import Event
from accullm_cli.quant.linear import QuantizedLinear
from accullm_cli.quant.rounding import TARGET_DAMPING
from accullm_cli.stages import embedding_rounding
from accullm_cli.stages.embedding_rounding import round_embedding
from accullm_cli.stages.job import open_decoder
from accullm_cli.stages.profile import load_plan
from accullm_cli.stages.quantize import units_of
from tests.quant.references import scale_and_zero, textbook_gptq
from tests.stages.quantized import Call, close, weights_of
from tests.stages.references import rows_of, set_weight
from tests.streaming import opened, reference_model, run_to, short_config
from tests.tiny import make_checkpoint

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@dataclass(frozen=True)
class Rounded:
    """A finished run, the original, and the model with the rounded blocks and, untied, the rounded embedding."""

    run: Path
    original: PreTrainedModel
    model: PreTrainedModel
    ids: torch.Tensor

    @classmethod
    def of(cls, source: Path, run: Path) -> Rounded:
        model = reference_model(source)
        weight = weights_of(run)
        for name in load_plan(run / "plan.json").linears:
            set_weight(model, name, weight(name))
        if (run / "quantize/embedding.safetensors").exists():
            model.get_parameter(f"{EMBEDDING}.weight").data = embedding_of(run, EMBEDDING).dequantize()
        return cls(run, reference_model(source), model, load_file(run / "tokens.safetensors")["calibration"])


def embedding_of(run: Path, name: str) -> QuantizedLinear:
    """An embedding from its shard."""
    plan = load_plan(run / "plan.json").embeddings[name]
    file = "head" if (name == HEAD or not (run / "quantize/embedding.safetensors").exists()) else "embedding"
    tensors = load_file(run / f"quantize/{file}.safetensors")
    assert {key.rpartition(".")[0] for key in tensors} == {name}
    own = {key.rpartition(".")[2]: value for key, value in tensors.items()}
    return QuantizedLinear.from_tensors(own, plan.in_features, plan.bits, plan.group_size)


def head_rows(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """What the output head reads, float64 [T, K]."""
    seen: list[torch.Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda head, args: seen.append(rows_of(args[0])))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return seen[0]


@pytest.fixture
def all_calls(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """As `calls`, those for embeddings among them."""
    from accullm_cli.stages import block_rounding

    monkeypatch.setattr(embedding_rounding, "round_linears", block_rounding.round_linears)
    return calls


# -- what rounding gets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_head_is_rounded_for_what_the_rounded_models_final_norm_makes(
    name: str, all_calls: list[Call], tmp_path: Path
) -> None:
    source = make_checkpoint(name, tmp_path / "model")
    with opened(short_config(source, tmp_path / "out", plan__embedding_bits=4, machine__seed=5)) as job:
        run_to(job, "quantize")
    rounded = Rounded.of(source, tmp_path / "out.run")
    call = all_calls[-1]
    y = head_rows(rounded.model, rounded.ids)
    close(call.hessian, y.T @ y / len(y))
    assert (call.seed, call.source_dtype) == (5, torch.bfloat16)
    if name == "llama-tied":  # its rows are looked up as well: nothing moves them away from the original's
        assert call.names == (f"{EMBEDDING} part 0",)
        assert call.pulls == {}
        return
    assert call.names == (f"{HEAD} part 0",)
    x = head_rows(rounded.original, rounded.ids)
    weight = rounded.original.get_parameter("lm_head.weight").double()
    expected = y.T @ (x - y) @ weight.T / len(y)
    assert expected.abs().max() > 1e-3
    (pull,) = call.pulls.values()
    np.testing.assert_allclose(pull, expected, atol=1e-3 * float(expected.abs().max()), rtol=0)


def test_blocks_behind_a_rounded_embedding_are_rounded_for_it(all_calls: list[Call], tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    with opened(short_config(source, tmp_path / "out", plan__embedding_bits=4)) as job:
        run_to(job, "quantize")
    embedding, first = all_calls[:2]
    assert (embedding.names, embedding.hessian, embedding.pulls) == ((f"{EMBEDDING} part 0",), None, {})
    original, model = reference_model(source), reference_model(source)
    model.get_parameter(f"{EMBEDDING}.weight").data = embedding_of(tmp_path / "out.run", EMBEDDING).dequantize()
    ids = load_file(tmp_path / "out.run/tokens.safetensors")["calibration"]

    def inputs(model: PreTrainedModel) -> torch.Tensor:
        layer = model.model.layers[0]
        return rows_of(layer.input_layernorm(model.model.embed_tokens(ids)))

    x, y = inputs(original), inputs(model)
    close(first.hessian, y.T @ y / len(y))
    for name, pull in first.pulls.items():
        expected = y.T @ (x - y) @ original.get_parameter(f"{name}.weight").double().T / len(y)
        assert expected.abs().max() > 1e-3
        np.testing.assert_allclose(pull, expected, atol=1e-3 * float(expected.abs().max()), rtol=0)


def test_tied_blocks_are_rounded_as_without(tmp_path: Path) -> None:
    """A tied matrix is rounded behind them, so that they begin with the original's."""
    source = make_checkpoint("llama-tied", tmp_path / "model")
    for out, bits in (("out", 4), ("other", 16)):
        with opened(short_config(source, tmp_path / out, plan__embedding_bits=bits)) as job:
            run_to(job, "quantize")
    for block in ("block-00000", "block-00001"):
        one, other = (tmp_path / f"{out}.run/quantize/{block}.safetensors" for out in ("out", "other"))
        assert one.read_bytes() == other.read_bytes()
    assert not (tmp_path / "out.run/quantize/embedding.safetensors").exists()


# -- what it makes of it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_a_tied_matrix_has_the_codes_of_textbook_gptq(bits: int, tmp_path: Path) -> None:
    source = make_checkpoint("llama-tied", tmp_path / "model")
    settings = {"plan__embedding_bits": bits, "rounding__grid": "minmax"}
    with opened(short_config(source, tmp_path / "out", **settings)) as job:
        run_to(job, "quantize")
    rounded = Rounded.of(source, tmp_path / "out.run")
    y = head_rows(rounded.model, rounded.ids)
    found = embedding_of(rounded.run, EMBEDDING)
    weight = rounded.original.get_parameter(f"{EMBEDDING}.weight").double().numpy()
    scale, zero = scale_and_zero(found)
    codes, _ = textbook_gptq(weight, (y.T @ y / len(y)).numpy(), scale, zero, bits, TARGET_DAMPING)
    # Sums in float32 move a few targets across the middle between two codes, and what follows them in their row.
    assert (found.codes.numpy() != codes).mean() < 0.02
    lost = np.abs(weight - (codes - zero) * scale).mean()
    assert np.abs(found.dequantize().double().numpy() - (codes - zero) * scale).mean() < 0.05 * lost
    assert (np.rint(weight / scale + zero) != codes).mean() > 0.1  # feedback had a say


def nearest_on_best_range(weight: np.ndarray, bits: int, size: int) -> np.ndarray:
    """Of 21 fractions of each group's range the one whose nearest rounding has the least squared error: [N, K]."""
    best = np.zeros_like(weight)
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], size):
            group = weight[row, start : start + size]
            low, high = min(0.0, group.min()), max(0.0, group.max())
            least = np.inf
            for step in range(21):
                fraction = 1 - 0.02 * step
                scale = float(np.float16(np.float32(fraction * (high - low)) / np.float32(2**bits - 1)))
                zero = round(-low * fraction / scale)
                codes = np.clip(np.rint(group / scale + zero), 0, 2**bits - 1)
                values = (codes - zero) * scale
                error = ((group - values) ** 2).sum()
                if error < least:
                    least, best[row, start : start + size] = error, values
    return best


@pytest.mark.parametrize("method", ["feedback", "nearest"])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_only_looked_up_is_rounded_to_nearest_on_the_best_range(method: str, bits: int, tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    settings = {"plan__embedding_bits": bits, "rounding__method": method}
    with opened(short_config(source, tmp_path / "out", **settings)) as job:
        run_to(job, "quantize")
    names = (EMBEDDING,) if method == "feedback" else (EMBEDDING, HEAD)  # nearest knows of no input
    for name in names:
        weight = reference_model(source).get_parameter(f"{name}.weight").double().numpy()
        found = embedding_of(tmp_path / "out.run", name).dequantize().double().numpy()
        expected = nearest_on_best_range(weight, bits, 32)
        # Two ranges may be as good as each other, and a value lie in the middle of two.
        assert (np.abs(found - expected) > 1e-6).mean() < 0.02
        assert ((found - weight) ** 2).sum() <= ((expected - weight) ** 2).sum() * 1.001


def test_nearest_runs_no_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_checkpoint("llama-tied", tmp_path / "model")
    with opened(short_config(source, tmp_path / "out", rounding__method="nearest", plan__embedding_bits=8)) as job:
        run_to(job, "profile")

        def refuse(*args: object, **kwargs: object) -> None:
            raise AssertionError("a forward pass")

        for method in ("embed", "run", "run_capturing", "load_outside", "head_input"):
            monkeypatch.setattr(Decoder, method, refuse)
        run_to(job, "quantize")
    assert (tmp_path / "out.run/quantize/head.safetensors").exists()


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Source and output of a run to quantize, its tied matrix in 4 bits."""
    place = tmp_path_factory.mktemp("tied")
    source = make_checkpoint("llama-tied", place / "model")
    with opened(short_config(source, place / "out", plan__embedding_bits=4)) as job:
        run_to(job, "quantize")
    return source, place / "out"


def rounded_again(source: Path, out: Path, **settings: object) -> dict[str, torch.Tensor]:
    """The tied matrix rounded under an identity Hessian."""
    with opened(short_config(source, out, plan__embedding_bits=4, **settings)) as job:
        decoder, plan = open_decoder(job), load_plan(job.run.file("plan.json"))
        slot = units_of(decoder, plan)[-1].embedding
        assert slot is not None
        gram = embedding_rounding.GramMatrices(64)
        gram.add(torch.eye(64))
        return round_embedding(job, decoder, plan, slot, gram)[0]


def test_parts_make_no_difference(tied: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """260 rows of 64: the last of three parts is a short one."""
    whole = rounded_again(*tied)
    monkeypatch.setattr(embedding_rounding, "ELEMENTS_TOGETHER", 100 * 64 + 63)
    parts = rounded_again(*tied)
    assert parts.keys() == whole.keys() == {"qweight", "scales", "qzeros"}
    for suffix, tensor in whole.items():
        assert torch.equal(parts[suffix], tensor), suffix


def test_parts_draw_random_numbers_of_their_own(tied: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        embedding_rounding.Checkpoint, "read", lambda self, name: torch.linspace(-1, 1, 64).bfloat16().repeat(260, 1)
    )
    monkeypatch.setattr(embedding_rounding, "ELEMENTS_TOGETHER", 130 * 64)
    codes = rounded_again(*tied, rounding__method="stochastic")["qweight"]
    assert not torch.equal(codes[:130], codes[130:])
    assert torch.equal(rounded_again(*tied)["qweight"][0], rounded_again(*tied)["qweight"][259])


# -- running again -----------------------------------------------------------------------------------------


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize("method", ["feedback", "nearest"])
@pytest.mark.parametrize(
    ("name", "units"),
    [("llama", ["embedding", "block 1/2", "block 2/2", "head"]), ("llama-tied", ["block 1/2", "block 2/2", "head"])],
)
def test_a_shard_that_is_gone_is_made_again_with_all_behind_it(
    name: str, units: list[str], method: str, tmp_path: Path
) -> None:
    source = make_checkpoint(name, tmp_path / "model")
    settings = {"plan__embedding_bits": 8, "rounding__method": method, "rounding__grid": "minmax"}
    steps: list[str] = []

    def note(event: Event) -> None:
        if event.stage == "quantize" and event.kind == "step":
            steps.append(f"{event.label}: {event.reason}")

    with opened(short_config(source, tmp_path / "out", **settings), note) as job:
        run_to(job, "quantize")
        assert steps == [f"{unit}: new" for unit in units]
        before = files_of(job.run.file("quantize"))
        for unit in units:
            steps.clear()
            file = f"block-0000{int(unit[6]) - 1}" if unit.startswith("block") else unit
            job.run.file(f"quantize/{file}.safetensors").unlink()
            run_to(job, "quantize")
            place = units.index(unit)
            assert steps[: place + 1] == [f"{earlier}: up to date" for earlier in units[:place]] + [f"{unit}: new"]
            assert files_of(job.run.file("quantize")) == before


def test_other_bits_round_a_tied_matrix_again_and_no_block(tmp_path: Path) -> None:
    source = make_checkpoint("llama-tied", tmp_path / "model")
    steps: list[str] = []

    def note(event: Event) -> None:
        if event.stage == "quantize" and event.kind == "step":
            steps.append(f"{event.label}: {event.reason}")

    for bits in (16, 4, 8):
        steps.clear()
        with opened(short_config(source, tmp_path / "out", plan__embedding_bits=bits), note) as job:
            run_to(job, "quantize")
        blocks = [line for line in steps if line.startswith("block")]
        assert blocks == [f"block {number}/2: {'new' if bits == 16 else 'up to date'}" for number in (1, 2)]
        assert steps[2:] == {16: [], 4: ["head: new"], 8: ["head: config changed (plan)"]}[bits]
