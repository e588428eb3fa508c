"""quantize: a shard holds just what it should, linears that stay in 16 bits included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from accullm_cli.quant.rounding import RoundedLinear, round_linears
from accullm_cli.stages import block_rounding
from accullm_cli.stages.profile import load_plan
from tests.stages.quantized import (
    LLAMA_ORDER,
    Call,
    check_pulls,
    close,
    edit_plan,
    linear_of,
    record,
    shard,
    weights_of,
)
from tests.stages.references import inputs_of, seen, set_weight, weight_of
from tests.streaming import opened, reference_model, run_to, short_config
from tests.tiny import make_checkpoint


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


def test_round_linears_returns_what_the_shard_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results: dict[str, RoundedLinear] = {}

    def spy(*args: object, **kwargs: object) -> dict[str, RoundedLinear]:
        found = round_linears(*args, **kwargs)  # type: ignore[arg-type]
        results.update(found)
        return found

    monkeypatch.setattr(block_rounding, "round_linears", spy)
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


# -- linears that stay in 16 bits --------------------------------------------------------------------------


def test_a_linear_of_16_bits_is_stored_bit_for_bit(calls: list[Call], tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    with opened(short_config(source, tmp_path / "out")) as job:
        run_to(job, "profile")
        edit_plan(job.run.path, **{"0.self_attn.q_proj": 16, "1.mlp.down_proj": 16})
        run_to(job, "quantize")
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
        run_to(job, "profile")
        kept = ("o_proj", "gate_proj", "up_proj", "down_proj")
        edit_plan(job.run.path, **{f"layers.0.{'self_attn' if n == 'o_proj' else 'mlp'}.{n}": 16 for n in kept})
        run_to(job, "quantize")
    run = tmp_path / "out.run"
    ids = load_file(run / "tokens.safetensors")["calibration"]
    rounded, model = weights_of(run), reference_model(source)
    for name in calls[0].names:
        set_weight(model, name, rounded(name))
    now = seen(model, ids)
    y = now.inputs["model.layers.1.self_attn.q_proj"]
    close(calls[1].hessian, y.T @ y / len(y))
    check_pulls(calls[1], seen(reference_model(source), ids), now)


def test_a_block_of_16_bits_alone_loses_nothing(calls: list[Call], tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    with opened(short_config(source, tmp_path / "out")) as job:
        run_to(job, "profile")
        for linears in LLAMA_ORDER:
            edit_plan(job.run.path, **{f"layers.0.{linear}": 16 for linear in linears})
        run_to(job, "quantize")
    first = calls[0]
    assert first.names[0] == "model.layers.1.self_attn.q_proj"
    y = inputs_of(reference_model(source), load_file(tmp_path / "out.run" / "tokens.safetensors")["calibration"])
    close(first.hessian, y[first.names[0]].T @ y[first.names[0]] / 288)
    assert first.pulls.keys() == set(first.names)
    assert not any(bool(pull.any()) for pull in first.pulls.values())


def test_one_expert_of_a_stack_may_stay_in_16_bits(tmp_path: Path) -> None:
    source = make_checkpoint("mixtral", tmp_path / "model")
    with opened(short_config(source, tmp_path / "out")) as job:
        run_to(job, "profile")
        edit_plan(job.run.path, **{"1.mlp.experts.down_proj.2": 16})
        run_to(job, "quantize")
    held = shard(tmp_path / "out.run", 1)
    name = "model.layers.1.mlp.experts.down_proj"
    expected = load_file(source / "model.safetensors")["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    assert torch.equal(held[f"{name}.2.weight"], expected)
    assert held[f"{name}.2.weight"].dtype == torch.bfloat16
    assert {f"{name}.{e}.qweight" in held for e in (0, 1, 3)} == {True}
    assert name not in held
