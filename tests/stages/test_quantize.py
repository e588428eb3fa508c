"""quantize: each linear is rounded for the input that it will really get, and shards hold just what they should."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from accullm_cli.model.blocks import Decoder
from accullm_cli.model.slots import LinearSlot
from accullm_cli.progress import Event
from accullm_cli.quant.linear import QuantizedLinear
from accullm_cli.quant.plan import Plan
from accullm_cli.quant.rounding import RoundedLinear, round_linears
from accullm_cli.stages import quantize as stage
from accullm_cli.stages.calibrate import calibrate
from accullm_cli.stages.profile import load_plan, profile
from accullm_cli.stages.quantize import quantize
from tests.stages.references import inputs_of, set_weight, weight_of
from tests.streaming import opened, reference_model, run_to, short_config
from tests.tiny import make_checkpoint

LLAMA_ORDER = [
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
]
MIXTRAL_ORDER = [
    *LLAMA_ORDER[:2],
    *((f"mlp.experts.gate_up_proj.{e}",) for e in range(4)),
    *((f"mlp.experts.down_proj.{e}",) for e in range(4)),
]
GPT2_ORDER = [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)]


@dataclass(frozen=True)
class Call:
    """One call of `round_linears`, as the stage made it."""

    names: tuple[str, ...]
    hessian: torch.Tensor | None
    drift: torch.Tensor | None
    importance: torch.Tensor | None
    seed: int
    source_dtype: torch.dtype


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Every call of `round_linears`, in order; it does its work as before."""
    made: list[Call] = []

    def copy(matrix: torch.Tensor | None) -> torch.Tensor | None:
        return None if matrix is None else matrix.double().clone()

    def spy(weights, plans, options, dtype, hessian=None, drift=None, importance=None):  # type: ignore[no-untyped-def]
        assert weights.keys() == plans.keys()
        made.append(Call(tuple(weights), copy(hessian), copy(drift), copy(importance), options.seed, dtype))
        return round_linears(weights, plans, options, dtype, hessian, drift, importance)

    monkeypatch.setattr(stage, "round_linears", spy)
    return made


def shard(run: Path, index: int) -> dict[str, torch.Tensor]:
    return load_file(run / "quantize" / f"block-{index:05d}.safetensors")


def record(run: Path, index: int) -> dict[str, object]:
    content: dict[str, object] = json.loads((run / "quantize" / f"block-{index:05d}.json").read_text())
    return content


def linear_of(run: Path, plan: Plan, name: str) -> QuantizedLinear:
    """One linear from its shard."""
    index = int(name.removeprefix("model.layers.").removeprefix("transformer.h.").split(".")[0])
    own = {
        key.removeprefix(f"{name}."): value for key, value in shard(run, index).items() if key.startswith(f"{name}.")
    }
    entry = plan.linears[name]
    return QuantizedLinear.from_tensors(own, entry.in_features, entry.bits, entry.group_size)


def weights_of(run: Path) -> Callable[[str], torch.Tensor]:
    """Rounded weights [N, K] by name, as the shards hold them."""
    plan = load_plan(run / "plan.json")
    return lambda name: linear_of(run, plan, name).dequantize(torch.float32)


def close(found: torch.Tensor | None, expected: torch.Tensor) -> None:
    """Equal up to float32 sums, measured by the largest element."""
    assert found is not None
    np.testing.assert_allclose(found, expected, atol=2e-5 * float(expected.abs().max()), rtol=0)


def check_drift(found: torch.Tensor | None, x: torch.Tensor, y: torch.Tensor) -> None:
    """Against Y^T (X - Y) / T. X and Y are near each other, so float32 leaves fewer digits than for the Hessian."""
    expected = y.T @ (x - y) / len(y)
    assert expected.abs().max() > 1e-3
    assert found is not None
    np.testing.assert_allclose(found, expected, atol=1e-3 * float(expected.abs().max()), rtol=0)


# -- what rounding gets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prefix", "order"), [("llama", "model.layers", LLAMA_ORDER), ("gpt2", "transformer.h", GPT2_ORDER)]
)
def test_each_input_is_that_of_the_model_rounded_so_far(
    name: str, prefix: str, order: list[tuple[str, ...]], calls: list[Call], tmp_path: Path
) -> None:
    """Hessian Y^T Y / T and drift Y^T (X - Y) / T, from transformers' model with all earlier linears replaced."""
    source = make_checkpoint(name, tmp_path / "model")
    with opened(short_config(source, tmp_path / "out")) as job:
        run_to(job, "quantize")
    run = tmp_path / "out.run"
    assert [call.names for call in calls] == [
        tuple(f"{prefix}.{index}.{linear}" for linear in group) for index in range(2) for group in order
    ]
    ids = load_file(run / "tokens.safetensors")["calibration"]
    rounded = weights_of(run)
    original = inputs_of(reference_model(source), ids)
    model = reference_model(source)
    for number, call in enumerate(calls):
        x, y = original[call.names[0]], inputs_of(model, ids)[call.names[0]]
        close(call.hessian, y.T @ y / len(y))
        if number == 0:  # nothing was lost yet
            assert call.drift is None or not bool(call.drift.any())
        else:
            check_drift(call.drift, x, y)
        for linear in call.names:
            set_weight(model, linear, rounded(linear))


def test_towards_the_original_weights_there_is_no_drift(calls: list[Call], tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    with opened(short_config(source, tmp_path / "out", rounding__target="original", machine__seed=5)) as job:
        run_to(job, "quantize")
    run = tmp_path / "out.run"
    assert len(calls) == 8
    assert all(call.drift is None for call in calls)
    assert {(call.seed, call.source_dtype) for call in calls} == {(5, torch.bfloat16)}
    rounded, model = weights_of(run), reference_model(source)
    for call in calls[:-1]:
        for linear in call.names:
            set_weight(model, linear, rounded(linear))
    y = inputs_of(model, load_file(run / "tokens.safetensors")["calibration"])[calls[-1].names[0]]
    close(calls[-1].hessian, y.T @ y / len(y))


def expert_rows(
    model: PreTrainedModel, ids: torch.Tensor, layer: int, expert: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What an expert's gate_up_proj and down_proj read, float64 [T, 64] and [T, 96]."""
    seen: dict[str, torch.Tensor] = {}
    moe = model.model.layers[layer].mlp
    handles = [
        moe.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].reshape(-1, 64))),
        moe.gate.register_forward_hook(lambda _, args, result: seen.update(chosen=result[2])),
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    x = seen["x"][(seen["chosen"] == expert).any(-1)].double()
    gate, up = (x @ moe.experts.gate_up_proj[expert].double().T).chunk(2, -1)
    return x, torch.nn.functional.silu(gate) * up


def test_experts_get_the_rows_that_are_routed_to_them(calls: list[Call], tmp_path: Path) -> None:
    source = make_checkpoint("mixtral", tmp_path / "model")
    with opened(short_config(source, tmp_path / "out")) as job:
        run_to(job, "quantize")
    run = tmp_path / "out.run"
    assert [call.names for call in calls] == [
        tuple(f"model.layers.{index}.{linear}" for linear in group) for index in range(2) for group in MIXTRAL_ORDER
    ]
    ids = load_file(run / "tokens.safetensors")["calibration"]
    rounded, model = weights_of(run), reference_model(source)
    original = inputs_of(reference_model(source), ids)
    for call in calls:
        (name, *_) = call.names
        parts = name.split(".")
        if "experts" not in parts:
            if call is not calls[0]:
                check_drift(call.drift, original[name], inputs_of(model, ids)[name])
            for linear in call.names:
                set_weight(model, linear, rounded(linear))
            continue
        layer, which, expert = int(parts[2]), parts[-2], int(parts[-1])
        assert call.drift is None
        y = expert_rows(model, ids, layer, expert)[which == "down_proj"]
        assert 0 < len(y) < 288
        close(call.hessian, y.T @ y / len(y))
        getattr(model.model.layers[layer].mlp.experts, which).data[expert] = rounded(name)


# -- what the shards hold ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Source and run directory of a Mixtral with untouched outliers."""
    place = tmp_path_factory.mktemp("finished")
    source = make_checkpoint("mixtral", place / "model")
    with opened(short_config(source, place / "out")) as job:
        run_to(job, "quantize")
    return source, place / "out.run"


def source_weight(model: PreTrainedModel, name: str) -> torch.Tensor:
    owner, _, last = name.rpartition(".")
    return model.get_parameter(owner)[int(last)] if last.isdigit() else weight_of(model, name)


def test_untouched_outliers_are_bit_for_bit_those_of_the_source(finished: tuple[Path, Path]) -> None:
    source, run = finished
    plan, model = load_plan(run / "plan.json"), reference_model(source)
    for name, entry in plan.linears.items():
        linear = linear_of(run, plan, name)
        assert len(entry.outlier_index) == round(0.05 * entry.in_features)
        assert linear.outlier_index.tolist() == list(entry.outlier_index)
        assert linear.outlier_weight.dtype == torch.bfloat16
        assert torch.equal(linear.outlier_weight, source_weight(model, name)[:, list(entry.outlier_index)].bfloat16())
        assert torch.equal(linear.outlier_weight.float(), source_weight(model, name)[:, list(entry.outlier_index)])


def test_compensating_outliers_move(tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    with opened(short_config(source, tmp_path / "out", rounding__outlier_mode="compensating")) as job:
        run_to(job, "quantize")
    plan, model = load_plan(tmp_path / "out.run" / "plan.json"), reference_model(source)
    for name, entry in plan.linears.items():
        kept = linear_of(tmp_path / "out.run", plan, name).outlier_weight
        assert kept.dtype == torch.bfloat16
        original = weight_of(model, name)[:, list(entry.outlier_index)]
        assert not torch.equal(kept.float(), original)
        assert (kept.float() - original).norm() < original.norm()


def test_all_else_of_a_block_is_as_in_the_source(finished: tuple[Path, Path]) -> None:
    """Norms and the router, in the source's dtype, and nothing twice."""
    source, run = finished
    stored = load_file(source / "model.safetensors")
    plan = load_plan(run / "plan.json")
    for index in range(2):
        prefix = f"model.layers.{index}"
        others = {
            name: value
            for name, value in shard(run, index).items()
            if not any(name.startswith(f"{linear}.") for linear in plan.linears)
        }
        assert others.keys() == {
            f"{prefix}.input_layernorm.weight",
            f"{prefix}.post_attention_layernorm.weight",
            f"{prefix}.mlp.gate.weight",
        }
        for name, value in others.items():
            expected = stored[name.replace("mlp.gate", "block_sparse_moe.gate")]
            assert value.dtype == torch.bfloat16
            assert torch.equal(value, expected)


def test_biases_stay_as_they_are(tmp_path: Path) -> None:
    source = make_checkpoint("gpt2", tmp_path / "model")
    with opened(short_config(source, tmp_path / "out")) as job:
        run_to(job, "quantize")
    stored = load_file(source / "model.safetensors")
    held = shard(tmp_path / "out.run", 1)
    names = [name for name in stored if name.startswith("transformer.h.1.") and name.endswith("bias")]
    assert len(names) == 6
    assert all(torch.equal(held[name], stored[name]) for name in names)


def test_relative_errors_are_those_of_the_outputs_on_the_calibration_rows(calls: list[Call], tmp_path: Path) -> None:
    """||Y (W - Q)^T|| / ||Y W^T||."""
    source = make_checkpoint("llama", tmp_path / "model")
    with opened(short_config(source, tmp_path / "out")) as job:
        run_to(job, "quantize")
    run = tmp_path / "out.run"
    ids = load_file(run / "tokens.safetensors")["calibration"]
    rounded, model, original = weights_of(run), reference_model(source), reference_model(source)
    errors = record(run, 0)["relative_errors"] | record(run, 1)["relative_errors"]  # type: ignore[operator]
    assert errors.keys() == load_plan(run / "plan.json").linears.keys()
    for call in calls:
        y = inputs_of(model, ids)[call.names[0]]
        for name in call.names:
            w, q = weight_of(original, name).double(), rounded(name).double()
            expected = float((y @ (w - q).T).norm() / (y @ w.T).norm())
            assert errors[name] == pytest.approx(expected, rel=1e-3)
            assert 0.01 < expected < 0.5
            set_weight(model, name, rounded(name))


# -- linears that stay in 16 bits --------------------------------------------------------------------------


def edit_plan(run: Path, **bits: int) -> None:
    """Give linears whose names end like this other bits; 16-bit ones have no outliers."""
    plan = json.loads((run / "plan.json").read_text())
    for end, value in bits.items():
        found = [entry for name, entry in plan["linears"].items() if name.endswith(end)]
        assert found
        for entry in found:
            entry["bits"] = value
            if value == 16:
                entry["outlier_index"] = []
    (run / "plan.json").write_text(json.dumps(plan))


def test_a_linear_of_16_bits_is_stored_bit_for_bit(calls: list[Call], tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    with opened(short_config(source, tmp_path / "out")) as job:
        done = run_to(job, "profile")
        edit_plan(job.run.path, **{"0.self_attn.q_proj": 16, "1.mlp.down_proj": 16})
        quantize(job, done["calibrate"].record.key, done["profile"].record.key)
    run, stored = tmp_path / "out.run", load_file(source / "model.safetensors")
    for index, name in enumerate(("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")):
        own = {key: value for key, value in shard(run, index).items() if key.startswith(f"{name}.")}
        assert own.keys() == {f"{name}.weight"}
        assert own[f"{name}.weight"].dtype == torch.bfloat16
        assert torch.equal(own[f"{name}.weight"], stored[f"{name}.weight"])
        assert name not in record(run, index)["relative_errors"]  # type: ignore[operator]
    assert calls[0].names == ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj")
    assert [call.names for call in calls[-1:]] == [("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")]


def test_the_streams_go_through_blocks_that_end_in_16_bits(calls: list[Call], tmp_path: Path) -> None:
    """What a block's last linear is does not matter for the input of the next block."""
    source = make_checkpoint("llama", tmp_path / "model")
    with opened(short_config(source, tmp_path / "out")) as job:
        done = run_to(job, "profile")
        kept = ("o_proj", "gate_proj", "up_proj", "down_proj")
        edit_plan(job.run.path, **{f"layers.0.{'self_attn' if n == 'o_proj' else 'mlp'}.{n}": 16 for n in kept})
        quantize(job, done["calibrate"].record.key, done["profile"].record.key)
    run = tmp_path / "out.run"
    ids = load_file(run / "tokens.safetensors")["calibration"]
    rounded, model = weights_of(run), reference_model(source)
    for name in calls[0].names:
        set_weight(model, name, rounded(name))
    x, y = (inputs_of(m, ids)["model.layers.1.self_attn.q_proj"] for m in (reference_model(source), model))
    close(calls[1].hessian, y.T @ y / len(y))
    check_drift(calls[1].drift, x, y)


def test_a_block_of_16_bits_alone_loses_nothing(calls: list[Call], tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    with opened(short_config(source, tmp_path / "out")) as job:
        done = run_to(job, "profile")
        for linears in LLAMA_ORDER:
            edit_plan(job.run.path, **{f"layers.0.{linear}": 16 for linear in linears})
        quantize(job, done["calibrate"].record.key, done["profile"].record.key)
    first = calls[0]
    assert first.names[0] == "model.layers.1.self_attn.q_proj"
    y = inputs_of(reference_model(source), load_file(tmp_path / "out.run" / "tokens.safetensors")["calibration"])
    close(first.hessian, y[first.names[0]].T @ y[first.names[0]] / 288)
    assert first.drift is not None
    assert not bool(first.drift.any())


def test_one_expert_of_a_stack_may_stay_in_16_bits(tmp_path: Path) -> None:
    source = make_checkpoint("mixtral", tmp_path / "model")
    with opened(short_config(source, tmp_path / "out")) as job:
        done = run_to(job, "profile")
        edit_plan(job.run.path, **{"1.mlp.experts.down_proj.2": 16})
        quantize(job, done["calibrate"].record.key, done["profile"].record.key)
    held = shard(tmp_path / "out.run", 1)
    name = "model.layers.1.mlp.experts.down_proj"
    expected = load_file(source / "model.safetensors")["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    assert torch.equal(held[f"{name}.2.weight"], expected)
    assert held[f"{name}.2.weight"].dtype == torch.bfloat16
    assert {f"{name}.{e}.qweight" in held for e in (0, 1, 3)} == {True}
    assert name not in held


# -- nearest ------------------------------------------------------------------------------------------------


def test_nearest_runs_no_block(tmp_path: Path, calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    with opened(short_config(source, tmp_path / "out", rounding__method="nearest", rounding__grid="minmax")) as job:
        done = run_to(job, "profile")

        def refuse(*args: object, **kwargs: object) -> None:
            raise AssertionError("a forward pass")

        for method in ("embed", "run", "run_capturing", "load_outside"):
            monkeypatch.setattr(Decoder, method, refuse)
        quantize(job, done["calibrate"].record.key, done["profile"].record.key)
    run = tmp_path / "out.run"
    plan, model = load_plan(run / "plan.json"), reference_model(source)
    for name, entry in plan.linears.items():
        linear = linear_of(run, plan, name)
        rest = [column for column in range(entry.in_features) if column not in entry.outlier_index]
        error = (weight_of(model, name) - linear.dequantize())[:, rest].abs()
        half = linear.scales.float().repeat_interleave(32, 1)[:, rest] / 2
        # No weight is further from its value than half a step, but where the last code is a rounding short of it.
        assert bool((error <= half * 1.02).all())
        assert bool((error > half * 0.8).any())
    assert all(call.hessian is None and call.drift is None for call in calls)
    rows = inputs_of(model, load_file(run / "tokens.safetensors")["calibration"])
    for call in calls:
        close(call.importance, rows[call.names[0]].square().mean(0))
    assert record(run, 0)["records"] == []


def test_unreached_experts_are_rounded_without_data_and_on_record(tmp_path: Path, calls: list[Call]) -> None:
    source = make_checkpoint("mixtral", tmp_path / "model")
    text = tmp_path / "a.txt"
    text.write_text("a" * 100)
    with opened(short_config(source, tmp_path / "out", calibration__text=text, calibration__samples=1)) as job:
        outcome = run_to(job, "quantize")["quantize"]
    expected = [
        f"{name}: no calibration token reached its input: rounded to nearest without data"
        for call in calls
        if call.hessian is None
        for name in call.names
    ]
    assert expected
    assert all(".experts." in sentence for sentence in expected)
    found = outcome.record.records
    assert [sentence for sentence in found if "without data" in sentence] == expected
    errors = record(tmp_path / "out.run", 0)["relative_errors"] | record(tmp_path / "out.run", 1)["relative_errors"]  # type: ignore[operator]
    assert {name for name, error in errors.items() if error is None} == {line.split(":")[0] for line in expected}


# -- running again -----------------------------------------------------------------------------------------


def test_a_changed_plan_of_the_first_block_runs_all_that_follow(tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    steps: list[str] = []

    def note(event: Event) -> None:
        if event.stage == "quantize" and event.kind == "step":
            steps.append(f"{event.label}: {event.reason}")

    with opened(short_config(source, tmp_path / "out"), note) as job:
        calibrated = calibrate(job).record.key
        profiled = profile(job, calibrated).record.key
        quantize(job, calibrated, profiled)
        before = shard(job.run.path, 1)
        steps.clear()
        edit_plan(job.run.path, **{"layers.0.self_attn.q_proj": 3})
        quantize(job, calibrated, f"{profiled} edited")
        after = shard(job.run.path, 1)
    assert steps == ["block 1/2: config changed (plan)", "block 2/2: input changed (block before)"]
    codes = "model.layers.1.mlp.up_proj.qweight"
    assert not torch.equal(before[codes], after[codes])


def test_groups_are_cut_so_that_their_matrices_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two float32 matrices of K x K for each group: 8 K^2 bytes."""
    monkeypatch.setattr(stage, "GRAM_BYTES", 3 * 8 * 10**2)
    widths = {"a": 10, "b": 10, "c": 10, "d": 10, "huge": 1000, "e": 10, "f": 17}
    slot_of = {name: LinearSlot(name, name, "linear", 1, width) for name, width in widths.items()}
    parts = stage._parts_in_memory([(name,) for name in widths], slot_of)
    assert parts == [[("a",), ("b",), ("c",)], [("d",)], [("huge",)], [("e",)], [("f",)]]
    assert stage._parts_in_memory([], slot_of) == []


def test_parts_make_no_difference(finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part for each expert, instead of one for all of them."""
    source, run = finished
    monkeypatch.setattr(stage, "GRAM_BYTES", 1)
    with opened(short_config(source, tmp_path / "out")) as job:
        run_to(job, "quantize")
    for index in range(2):
        expected, found = shard(run, index), shard(tmp_path / "out.run", index)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_round_linears_returns_what_the_shard_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results: dict[str, RoundedLinear] = {}

    def spy(*args: object, **kwargs: object) -> dict[str, RoundedLinear]:
        found = round_linears(*args, **kwargs)  # type: ignore[arg-type]
        results.update(found)
        return found

    monkeypatch.setattr(stage, "round_linears", spy)
    source = make_checkpoint("llama", tmp_path / "model")
    with opened(short_config(source, tmp_path / "out", plan__symmetric=True)) as job:
        run_to(job, "quantize")
    tensors = shard(tmp_path / "out.run", 0) | shard(tmp_path / "out.run", 1)
    expected = {
        f"{name}.{suffix}": value
        for name, entry in results.items()
        for suffix, value in entry.linear.to_tensors().items()
    }
    assert len(results) == 14
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())
    assert not any(name.endswith("qzeros") for name in tensors)
