"""quantize: each linear is rounded for the input that it will really get; what runs again, and what need not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from accullm_cli.formats.capabilities import CAPABILITIES, Storable
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.slots import LinearSlot
from accullm_cli.progress import Event
from accullm_cli.quant.packing import unpack
from accullm_cli.stages import block_rounding
from accullm_cli.stages import quantize as quantize_module
from accullm_cli.stages.gradients import load_token_weights
from accullm_cli.stages.profile import load_plan
from accullm_cli.stages.quantize import rounding
from accullm_cli.stages.units import shard_path
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
from tests.streaming import opened, reference_model, run_alone, run_to, short_config
from tests.tiny import make_checkpoint

MIXTRAL_ORDER = [
    *LLAMA_ORDER[:2],
    *((f"mlp.experts.gate_up_proj.{e}",) for e in range(4)),
    *((f"mlp.experts.down_proj.{e}",) for e in range(4)),
]
GPT2_ORDER = [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)]


# -- what rounding gets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prefix", "order"), [("llama", "model.layers", LLAMA_ORDER), ("gpt2", "transformer.h", GPT2_ORDER)]
)
def test_each_input_is_that_of_the_model_rounded_so_far(
    name: str, prefix: str, order: list[tuple[str, ...]], calls: list[Call], tmp_path: Path
) -> None:
    """Hessian and pulls (see quant.rounding), from transformers' model with all earlier linears replaced."""
    source = make_checkpoint(name, tmp_path / "model")
    with opened(short_config(source, tmp_path / "out")) as job:
        run_to(job, "quantize")
    run = tmp_path / "out.run"
    assert [call.names for call in calls] == [
        tuple(f"{prefix}.{index}.{linear}" for linear in group) for index in range(2) for group in order
    ]
    ids = load_file(run / "tokens.safetensors")["calibration"]
    rounded = weights_of(run)
    original = seen(reference_model(source), ids)
    model = reference_model(source)
    for number, call in enumerate(calls):
        now = seen(model, ids)
        y = now.inputs[call.names[0]]
        close(call.hessian, y.T @ y / len(y))
        if number == 0:  # nothing was lost yet
            assert not any(bool(pull.any()) for pull in call.pulls.values())
        else:
            check_pulls(call, original, now)
        for linear in call.names:
            set_weight(model, linear, rounded(linear))


def test_with_gradients_tokens_count_by_their_weights(calls: list[Call], tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    with opened(short_config(source, tmp_path / "out", calibration__gradient_samples=2)) as job:
        run_to(job, "quantize")
        weights = {index: load_token_weights(job, index) for index in range(2)}
    run = tmp_path / "out.run"
    ids = load_file(run / "tokens.safetensors")["calibration"]
    rounded, model, original = weights_of(run), reference_model(source), seen(reference_model(source), ids)
    spread = []
    for number, call in enumerate(calls):
        now = seen(model, ids)
        y = now.inputs[call.names[0]]
        own = [weights[number // len(LLAMA_ORDER)][name].of(y) for name in call.names]
        w = torch.stack(own).mean(0).double()[:, None]
        close(call.hessian, y.T @ (w * y) / w.sum())
        for linear in call.names if number else ():
            pull = y.T @ (w * (original.outputs[linear] - now.outputs[linear])) / w.sum()
            np.testing.assert_allclose(call.pulls[linear], pull, atol=2e-3 * float(pull.abs().max()), rtol=0)
        for linear in call.names:
            set_weight(model, linear, rounded(linear))
        spread.append(float(w.max() / w.min()))
    assert max(spread) > 1.5


def test_towards_the_original_weights_nothing_pulls(calls: list[Call], tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    with opened(short_config(source, tmp_path / "out", rounding__target="original", machine__seed=5)) as job:
        run_to(job, "quantize")
    run = tmp_path / "out.run"
    assert len(calls) == 8
    assert all(call.pulls == {} for call in calls)
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
    original = seen(reference_model(source), ids)
    for call in calls:
        (name, *_) = call.names
        parts = name.split(".")
        if "experts" not in parts:
            if call is not calls[0]:
                check_pulls(call, original, seen(model, ids))
            for linear in call.names:
                set_weight(model, linear, rounded(linear))
            continue
        layer, which, expert = int(parts[2]), parts[-2], int(parts[-1])
        assert call.pulls == {}
        y = expert_rows(model, ids, layer, expert)[which == "down_proj"]
        assert 0 < len(y) < 288
        close(call.hessian, y.T @ y / len(y))
        getattr(model.model.layers[layer].mlp.experts, which).data[expert] = rounded(name)


# -- nearest ------------------------------------------------------------------------------------------------


def test_nearest_runs_no_block(tmp_path: Path, calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    settings = {"rounding__method": "nearest", "rounding__grid": "minmax", "plan__scale_bits": 16}
    settings |= {"plan__encodings": "[integer]"}
    with opened(short_config(source, tmp_path / "out", **settings)) as job:
        run_to(job, "profile")

        def refuse(*args: object, **kwargs: object) -> None:
            raise AssertionError("a forward pass")

        for method in ("embed", "run", "run_capturing", "load_outside"):
            monkeypatch.setattr(Decoder, method, refuse)
        run_to(job, "quantize")
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
    assert all(call.hessian is None and call.pulls == {} for call in calls)
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
        run_to(job, "quantize")
        before = shard(job.run.path, 1)
        steps.clear()
        edit_plan(job.run.path, **{"layers.0.self_attn.q_proj": 3})
        run_alone(job, rounding("accullm"), profile="edited")
        after = shard(job.run.path, 1)
    assert steps == ["block 1/2: config changed (plan)", "block 2/2: input changed (block before)"]
    codes = "model.layers.1.mlp.up_proj.qweight"
    assert not torch.equal(before[codes], after[codes])


def test_groups_are_cut_so_that_their_matrices_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two float32 matrices of K x K for each group: 8 K^2 bytes."""
    monkeypatch.setattr(block_rounding, "GRAM_BYTES", 3 * 8 * 10**2)
    widths = {"a": 10, "b": 10, "c": 10, "d": 10, "huge": 1000, "e": 10, "f": 17}
    slot_of = {name: LinearSlot(name, name, "linear", 1, width) for name, width in widths.items()}
    parts = block_rounding._parts_in_memory([(name,) for name in widths], slot_of)
    assert parts == [[("a",), ("b",), ("c",)], [("d",)], [("huge",)], [("e",)], [("f",)]]
    assert block_rounding._parts_in_memory([], slot_of) == []


def test_parts_make_no_difference(finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part for each expert, instead of one for all of them."""
    source, run = finished
    monkeypatch.setattr(block_rounding, "GRAM_BYTES", 1)
    with opened(short_config(source, tmp_path / "out")) as job:
        run_to(job, "quantize")
    for index in range(2):
        expected, found = shard(run, index), shard(tmp_path / "out.run", index)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_block_is_run_again_from_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    begun: list[tuple[str, ...]] = []
    run = Decoder.run

    def spy(self, index, block, hidden, known=None, **filler):  # type: ignore[no-untyped-def]
        if known is not None and not filler:  # of the rounded block, and not to find out where a run can begin
            begun.append(tuple(name.rsplit(".", 1)[1] for name in known))
        return run(self, index, block, hidden, known, **filler)

    with opened(short_config(source, tmp_path / "out", calibration__samples=1)) as job:
        run_to(job, "profile")
        with monkeypatch.context() as patch:
            patch.setattr(Decoder, "run", spy)
            run_to(job, "quantize")
        shards = [shard(job.run.path, index) for index in range(2)]
        monkeypatch.setattr(Decoder, "shortcuts", lambda *args: ())
        run_alone(replace(job, fresh=True), rounding("accullm"))
        # For q, k and v, for o, for gate and up, for down, and at the end for the next block.
        assert begun == 2 * [(), (), ("o_proj",), ("o_proj",), ("o_proj", "down_proj")]
        for index, expected in enumerate(shards):
            found = shard(job.run.path, index)
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_what_two_formats_have_alike_is_rounded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal plans: the second format's shards are the first one's files. Another width for one of them: all anew."""
    source = make_checkpoint("llama", tmp_path / "model", torch.float16)
    names = ("accullm", "compressed-tensors")
    alike = {"plan__outliers": 0, "plan__group_size": 32, "plan__scale_bits": 16, "plan__encodings": "[integer]"}
    alike["export__format"] = f"[{','.join(names)}]"
    rounded: list[int] = []
    quantize_block = quantize_module._quantize_block

    def watch(*given):
        rounded.append(given[4])
        return quantize_block(*given)

    monkeypatch.setattr(quantize_module, "_quantize_block", watch)
    with opened(short_config(source, tmp_path / "out", **alike)) as job:
        run_to(job, "quantize")
        shards = [shard_path(job.of(name), "block-00001") for name in names]
        assert rounded == [0, 1]
        assert shards[0] != shards[1]
        assert shards[0].samefile(shards[1])
    with opened(short_config(source, tmp_path / "out", **alike | {"plan__scale_bits": "null"})) as job:
        run_to(job, "quantize")
        assert rounded == [0, 1, 0, 1]  # the native one has tables now, and the other is up to date
        assert not shards[0].samefile(shards[1])


def test_a_format_that_stores_offsets_is_planned_and_rounded_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linears, embedding and head as code * scale + offset; and blocks that are made again are the same."""
    name = "compressed-tensors"
    affine = Storable("affine", bits=(2, 3, 4, 5, 6, 8), group_sizes=(32, 64, 128), symmetric=(False,))
    declared = replace(CAPABILITIES[name], linears=(affine,), embeddings=(affine,))
    monkeypatch.setitem(CAPABILITIES, name, declared)
    source = make_checkpoint("llama", tmp_path / "model")
    settings = {"plan__bits": 5.5, "plan__outliers": "null", "plan__group_size": "null", "plan__embedding_bits": 8}
    settings |= {"export__format": f"[{name}]", "calibration__gradient_samples": 2, "plan__symmetric": False}
    with opened(short_config(source, tmp_path / "out", **settings)) as job:
        run_to(job, "quantize")
        plan = load_plan(job.own("plan.json"))
        shards = [shard_path(job, unit) for unit in ("block-00000", "block-00001", "embedding", "head")]
        before = [shard.read_bytes() for shard in shards]
        shards[1].unlink()
        run_to(job, "quantize")
        assert [shard.read_bytes() for shard in shards] == before
        tensors = {key: tensor for shard in shards for key, tensor in load_file(shard).items()}
    # 96 input features are a multiple of 32 alone, and gate and up are alike, as q, k and v.
    assert {row.group_size for row in plan.linears.values() if row.in_features == 96} == {32}
    assert {row.encoding for row in plan.quantized.values()} == {"affine"}
    assert len({row.bits for row in plan.linears.values()}) > 1
    model = reference_model(source)
    for row in plan.quantized.values():
        size, count = row.group_size, row.in_features
        codes = unpack(tensors[f"{row.name}.qweight"], row.bits, count).float()
        scale, offset = (tensors[f"{row.name}.{part}"].float() for part in ("scales", "offsets"))
        column = torch.arange(count) // size
        weight = weight_of(model, row.name) if row.name in plan.linears else model.get_parameter(f"{row.name}.weight")
        lost = codes * scale[:, column] + offset[:, column] - torch.as_tensor(weight)
        relative = float(lost.norm() / torch.as_tensor(weight).norm())
        assert relative < {3: 0.6, 4: 0.3, 5: 0.2, 6: 0.15, 8: 0.1}[row.bits]  # targets make up for earlier blocks
        assert torch.equal(offset.bfloat16().float(), offset)
