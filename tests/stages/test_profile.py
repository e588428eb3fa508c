"""profile: the features that cost most, counted right, and a plan that reads back."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from accullm_cli.errors import AccullmError
from accullm_cli.quant.plan import LinearPlan
from accullm_cli.run import Reason
from accullm_cli.stages import profile as profile_module
from accullm_cli.stages.calibrate import load_block_stats, stats_path
from accullm_cli.stages.gradients import load_sensitivities
from accullm_cli.stages.job import open_decoder
from accullm_cli.stages.profile import (
    average_choices,
    load_plan,
    load_stats,
    make_plan,
    planning,
    refuse_impossible,
    scale_dtype,
)
from accullm_cli.stages.rows import zero_point_sentences
from tests.kinds import KINDS
from tests.stages.references import inputs_of, rounding_damage, weight_of
from tests.streaming import opened, reference_model, run_alone, run_to, short_config
from tests.tiny import make_checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama") / "model")


def cast(directory: Path, dtype: torch.dtype, *ends: str) -> None:
    """Store the tensors whose names end like this in another dtype."""
    tensors = load_file(directory / "model.safetensors")
    tensors = {name: value.to(dtype) if name.endswith(ends) else value for name, value in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("group_size", [32, -1])
def test_outliers_are_the_features_whose_rounding_costs_most(group_size: int, llama: Path, tmp_path: Path) -> None:
    """E[x_j^2] * ||w_j - nearest(w_j)||^2, from transformers' inputs and brute-force rounding in float64."""
    with opened(short_config(llama, tmp_path / "out", plan__group_size=group_size, plan__outliers=0.1)) as job:
        run_to(job, "profile")
        plan = load_plan(job.run.file("plan.json"))
        ids = load_file(job.run.file("tokens.safetensors"))["calibration"]
    model = reference_model(llama)
    rows = inputs_of(model, ids)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        entry = plan.linears[f"model.layers.1.{name}"]
        cost = rows[entry.name].square().mean(0).numpy() * rounding_damage(weight_of(model, entry.name), group_size)
        count = {64: 6, 96: 10}[entry.in_features]
        assert len(entry.outlier_index) == count
        assert list(entry.outlier_index) == sorted(np.argsort(-cost)[:count].tolist())


def test_linears_of_one_input_have_outliers_of_their_own(llama: Path, tmp_path: Path) -> None:
    with opened(short_config(llama, tmp_path / "out")) as job:
        run_to(job, "profile")
        plan = load_plan(job.run.file("plan.json"))
    chosen = {plan.linears[f"model.layers.0.self_attn.{name}_proj"].outlier_index for name in "qkv"}
    assert len(chosen) > 1


def test_the_plan_says_for_every_linear_what_was_asked_for(llama: Path, tmp_path: Path) -> None:
    settings = {"plan__bits": 3, "plan__group_size": 64, "plan__symmetric": True, "plan__outliers": 0}
    with opened(short_config(llama, tmp_path / "out", **settings)) as job:
        outcome = run_to(job, "profile")["profile"]
        plan = load_plan(job.run.file("plan.json"))
    shapes = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64)}
    shapes = {f"self_attn.{name}_proj": shape for name, shape in shapes.items()}
    shapes |= {"mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96)}
    assert list(plan.linears.items()) == [
        (
            f"model.layers.{index}.{name}",
            LinearPlan(f"model.layers.{index}.{name}", *shape, 3, 64, True, scale_bits=6, encoding="trellis"),
        )
        for index in range(2)
        for name, shape in shapes.items()
    ]
    assert outcome.record.outputs.keys() == {"plan.json", "outliers.html"}


def test_the_plan_reads_back_as_it_was_made(llama: Path, tmp_path: Path) -> None:
    with opened(short_config(llama, tmp_path / "out", export__format="[compressed-tensors]")) as job:
        plan = make_plan(job, open_decoder(job))
        job.run.file("copy.json").write_text(json.dumps(asdict(plan)))
        read = load_plan(job.run.file("copy.json"))
    assert read == plan
    assert plan.scale_dtype == "bfloat16"
    assert all(entry.outlier_index for entry in plan.linears.values())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda text: text[:-9], "not a plan of this version (Unterminated string"),
        (lambda text: text.replace('"bits"', '"width"'), "not a plan of this version (LinearPlan.__init__() got an"),
        (lambda text: text.replace('"trellis"', '"woven"', 1), "not a plan of this version ('woven')"),
        (lambda text: "[]", "not a plan of this version (list indices"),
        (
            lambda text: text.replace('"bits": 4', '"bits": 7', 1),
            "model.layers.0.self_attn.q_proj is to have 7 bits, and trellis has 2 to 5",
        ),
    ],
)
def test_a_plan_that_was_changed_is_refused_in_one_line(
    change: Callable[[str], str], what: str, llama: Path, tmp_path: Path
) -> None:
    with opened(short_config(llama, tmp_path / "out")) as job:
        plan = make_plan(job, open_decoder(job))
    path = tmp_path / "plan.json"
    path.write_text(change(json.dumps(asdict(plan))))
    with pytest.raises(AccullmError) as refusal:
        load_plan(path)
    assert refusal.value.line().startswith(f"{path}: {what}")
    assert refusal.value.line().endswith("; run profile again with --fresh")


def test_before_calibration_the_plan_has_its_size_already(llama: Path, tmp_path: Path) -> None:
    with opened(short_config(llama, tmp_path / "out")) as job:
        before = make_plan(job, open_decoder(job))
        run_to(job, "profile")
        after = load_plan(job.run.file("plan.json"))
    assert before != after
    assert before.bits_per_weight == after.bits_per_weight
    assert [len(entry.outlier_index) for entry in before.linears.values()] == [
        len(entry.outlier_index) for entry in after.linears.values()
    ]


@pytest.mark.parametrize(
    ("dtype", "formats", "expected"),
    [
        (torch.bfloat16, "[accullm]", "float16"),
        (torch.bfloat16, "[compressed-tensors]", "bfloat16"),
        (torch.bfloat16, "[accullm,compressed-tensors]", "float16"),
        (torch.float16, "[compressed-tensors]", "float16"),
        (torch.float32, "[accullm]", "float16"),
    ],
)
def test_scales_are_exact_in_the_format_that_the_plan_is_for(
    dtype: torch.dtype, formats: str, expected: str, tmp_path: Path
) -> None:
    source = make_checkpoint("llama", tmp_path / "model", dtype)
    with opened(short_config(source, tmp_path / "out", export__format=formats, plan__outliers=0)) as job:
        assert scale_dtype(job) == expected
        assert make_plan(job, open_decoder(job)).scale_dtype == expected


def test_float32_norms_do_not_make_it_a_float32_model(tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    cast(source, torch.float32, "norm.weight")
    with opened(short_config(source, tmp_path / "out", export__format="[compressed-tensors]")) as job:
        assert scale_dtype(job) == "bfloat16"


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_the_plan_counts_outliers_in_the_sources_dtype(dtype: torch.dtype, itemsize: int, tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model", dtype)
    with opened(short_config(source, tmp_path / "out")) as job:
        plan = make_plan(job, open_decoder(job))
    assert {entry.source_itemsize for entry in plan.linears.values()} == {itemsize}


# -- refusals and reasons ----------------------------------------------------------------------------------


def test_what_a_format_cannot_hold_is_refused_with_the_way_out(llama: Path, tmp_path: Path) -> None:
    settings = {"export__format": "[compressed-tensors]", "plan__group_size": 64, "plan__outliers": 0}
    with opened(short_config(llama, tmp_path / "out", **settings)) as job:
        decoder = open_decoder(job)
        with pytest.raises(AccullmError) as refusal:
            refuse_impossible(job, make_plan(job, decoder), decoder)
    assert refusal.value.line() == (
        "--format compressed-tensors: compressed-tensors needs a group size that divides the 96 input features of "
        "model.layers.0.mlp.down_proj, and 64 does not (and 1 more); use --group-size 32 or -1, or export to the "
        "format accullm"
    )


def test_outliers_of_several_dtypes_are_refused(tmp_path: Path) -> None:
    """They would not stay bit for bit; without outliers there is nothing to refuse."""
    source = make_checkpoint("llama", tmp_path / "model")
    cast(source, torch.float32, "1.self_attn.k_proj.weight")
    for outliers in (0.05, 0):
        with opened(short_config(source, tmp_path / "out", plan__outliers=outliers)) as job:
            decoder = open_decoder(job)
            plan = make_plan(job, decoder)
            if not outliers:
                refuse_impossible(job, plan, decoder)
                continue
            with pytest.raises(AccullmError) as refusal:
                refuse_impossible(job, plan, decoder)
            assert refusal.value.line() == (
                f"{source}: model.layers.1.self_attn.k_proj is stored in float32 and most weights in bfloat16, but an "
                "artifact keeps all outliers in one dtype; use --outliers 0, or convert the checkpoint to one dtype"
            )


def test_another_budget_runs_profile_again_and_not_calibrate(llama: Path, tmp_path: Path) -> None:
    with opened(short_config(llama, tmp_path / "out")) as job:
        run_to(job, "profile")
    with opened(short_config(llama, tmp_path / "out", plan__outliers=0.1)) as job:
        done = run_to(job, "profile")
    assert done["calibrate"].reason == Reason("up to date")
    assert done["profile"].reason == Reason("config changed", "plan.outliers")
    with opened(short_config(llama, tmp_path / "out", plan__outliers=0.1)) as job:
        assert run_alone(job, planning("accullm"), calibrate="another key").reason == Reason(
            "input changed", "calibrate"
        )


# -- an average ----------------------------------------------------------------------------------------------

AVERAGE = {"plan__bits": 5.5, "plan__group_size": 32, "calibration__gradient_samples": 2}


def test_an_average_goes_where_the_loss_is(llama: Path, tmp_path: Path) -> None:
    """The widths follow the loss per weight: a linear with more of it never has fewer bits by two."""
    with opened(short_config(llama, tmp_path / "out", **AVERAGE, plan__outliers=0)) as job:
        run_to(job, "profile")
        plan, sensitivities = load_plan(job.run.file("plan.json")), load_sensitivities(job, 2)
    assert 5.3 < plan.bits_per_weight <= 5.5
    assert len({linear.bits for linear in plan.linears.values()}) > 1
    model = reference_model(llama)
    per_weight = {}
    for name, linear in plan.linears.items():
        loss = sensitivities[name].numpy() * rounding_damage(weight_of(model, name), 32)
        per_weight[name] = loss.sum() / linear.weights
    falling = sorted(plan.linears.values(), key=lambda linear: -per_weight[linear.name])
    for earlier, later in itertools.pairwise(falling):
        assert earlier.bits >= later.bits or per_weight[earlier.name] < 1.2 * per_weight[later.name]


def test_an_average_may_be_spent_on_outliers_alone(llama: Path, tmp_path: Path) -> None:
    settings = {**AVERAGE, "plan__bits": 4.8, "plan__spend": "outliers", "plan__group_size": 64}
    with opened(short_config(llama, tmp_path / "out", **settings)) as job:
        run_to(job, "profile")
        plan = load_plan(job.run.file("plan.json"))
    assert {linear.bits for linear in plan.linears.values()} == {4}
    counts = [len(linear.outlier_index) for linear in plan.linears.values()]
    assert 0 < sum(counts)
    assert max(counts) <= 0.03 * 96
    assert plan.bits_per_weight <= 4.8


def test_an_expert_without_tokens_keeps_four_bits(tmp_path: Path) -> None:
    source = make_checkpoint("mixtral", tmp_path / "model")
    text = tmp_path / "a.txt"
    text.write_text("a" * 100)
    settings = {**AVERAGE, "calibration__text": text, "calibration__samples": 1, "calibration__gradient_samples": 1}
    with opened(short_config(source, tmp_path / "out", **settings)) as job:
        run_to(job, "profile")
        plan = load_plan(job.run.file("plan.json"))
        decoder = open_decoder(job)
        stats = [entry for index in range(2) for entry in load_block_stats(stats_path(job, index))]
        assert make_plan(job, decoder, stats) == plan
    unreached = {name for entry in stats if not entry.tokens for name in entry.linears}
    assert unreached
    assert all((plan.linears[name].bits, plan.linears[name].outlier_index) == (4, ()) for name in unreached)
    assert plan.bits_per_weight <= 5.5


def test_an_expert_that_no_gradient_reached_keeps_four_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration has more windows than give gradients, so it may reach experts that these do not."""
    source = make_checkpoint("mixtral", tmp_path / "model")
    name = "model.layers.0.mlp.experts.down_proj.2"
    with opened(short_config(source, tmp_path / "out", **AVERAGE)) as job:
        run_to(job, "calibrate")
        known = load_sensitivities(job, 2)
        assert known[name].any()
        unknown = {**known, name: torch.zeros_like(known[name])}
        monkeypatch.setattr(profile_module, "load_sensitivities", lambda *_: unknown)
        run_to(job, "profile")
        plan = load_plan(job.run.file("plan.json"))
    assert (plan.linears[name].bits, plan.linears[name].outlier_index) == (4, ())


def test_each_group_size_is_weighed_by_its_own_damage(llama: Path, tmp_path: Path) -> None:
    """The sensitivity and ||w_j - nearest(w_j)||^2 in groups of that size, by brute force in float64."""
    settings = {**AVERAGE, "plan__group_size": "null", "calibration__gradient_samples": 2}
    with opened(short_config(llama, tmp_path / "out", **settings)) as job:
        run_to(job, "profile")
        decoder = open_decoder(job)
        choices = average_choices(job, decoder, load_stats(job, decoder))
        plan, sensitivities = load_plan(job.run.file("plan.json")), load_sensitivities(job, 2)
    model = reference_model(llama)
    for name in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"):
        assert list(choices.losses[name]) == [32, 64, 128]
        for size, loss in choices.losses[name].items():
            expected = sensitivities[name].numpy() * rounding_damage(weight_of(model, name), size)
            np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert plan.bits_per_weight <= 5.5
    assert {linear.group_size for linear in plan.linears.values()} <= {32, 64, 128}


def test_whole_bits_without_a_group_size_have_groups_of_64(llama: Path, tmp_path: Path) -> None:
    with opened(short_config(llama, tmp_path / "out", plan__group_size="null")) as job:
        run_to(job, "profile")
        plan = load_plan(job.run.file("plan.json"))
    assert {linear.group_size for linear in plan.linears.values()} == {64}


def test_each_format_has_a_plan_of_its_own(llama: Path, tmp_path: Path) -> None:
    """What is not asked for is what the format holds: tables and outliers in the one, neither in the other."""
    settings = {"export__format": "[accullm,compressed-tensors]", "plan__outliers": "null", "plan__group_size": "null"}
    with opened(short_config(llama, tmp_path / "out", **settings)) as job:
        done = run_to(job, "profile")
        native, other = (load_plan(job.of(name).own("plan.json")) for name in ("accullm", "compressed-tensors"))
    assert list(done)[-2:] == ["profile", "profile compressed-tensors"]
    assert {linear.scale_bits for linear in native.linears.values()} == {6}
    assert {linear.scale_bits for linear in other.linears.values()} == {16}
    assert {linear.group_size for linear in native.linears.values()} == {64}
    # Of 96 input features, groups of 32 or 96 can be formed; both are as near to 64.
    assert {linear.in_features: linear.group_size for linear in other.linears.values()} == {64: 64, 96: 32}
    assert not any(linear.outlier_index for linear in other.linears.values())
    assert (native.scale_dtype, other.scale_dtype) == ("float16", "bfloat16")


def test_an_average_is_planned_for_what_the_format_holds(llama: Path, tmp_path: Path) -> None:
    settings = {"plan__outliers": "null", "plan__group_size": "null", "export__format": "[compressed-tensors]"}
    with opened(short_config(llama, tmp_path / "out", **{**AVERAGE, **settings})) as job:
        run_to(job, "profile")
        plan = load_plan(job.own("plan.json"))
        decoder = open_decoder(job)
        refuse_impossible(job, plan, decoder)
        choices = average_choices(job, decoder, load_stats(job, decoder))
    assert {linear.bits for linear in plan.linears.values()} == {4, 5, 6}
    # Of several schemes, one of the format's readers takes none with zero points.
    assert all(linear.symmetric for linear in plan.linears.values())
    assert not any(linear.outlier_index for linear in plan.linears.values())
    assert 5.0 < choices.bits_per_weight(plan) <= 5.5
    for index in range(2):
        for fused in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            partners = [plan.linears[f"model.layers.{index}.{name}"] for name in fused]
            assert len({(linear.bits, linear.group_size) for linear in partners}) == 1


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"plan__scale_bits": 6},
            "--format compressed-tensors: compressed-tensors stores scales of 16 bits, and those of "
            "model.layers.0.self_attn.q_proj have 6 (and 13 more); leave out --scale-bits, or export to the format "
            "accullm",
        ),
        (
            {**AVERAGE, "plan__group_size": 64},
            "--format compressed-tensors: compressed-tensors needs a group size that divides the 96 input features of "
            "model.layers.0.mlp.down_proj, and 64 does not (and 1 more); use --group-size 32 or -1, or export to the "
            "format accullm",
        ),
    ],
)
def test_what_was_asked_for_is_not_replaced(
    settings: dict[str, object], line: str, llama: Path, tmp_path: Path
) -> None:
    settings = {"export__format": "[compressed-tensors]", "plan__outliers": 0, "plan__group_size": "null"} | settings
    with opened(short_config(llama, tmp_path / "out", **settings)) as job:
        decoder = open_decoder(job)
        with pytest.raises(AccullmError) as refusal:
            refuse_impossible(job, make_plan(job, decoder), decoder)
    assert refusal.value.line() == line


COMPRESSED = {"export__format": "[compressed-tensors]", "plan__outliers": 0}


def planned(source: Path, out: Path, **settings: object):
    """The plan before calibration, and what the format objects to first ("" for nothing)."""
    with opened(short_config(source, out, **COMPRESSED, **settings)) as job:
        decoder = open_decoder(job)
        plan = make_plan(job, decoder)
        try:
            refuse_impossible(job, plan, decoder)
        except AccullmError as error:
            return plan, error.line()
    return plan, ""


@pytest.mark.parametrize(
    ("settings", "symmetric"),
    [
        ({}, False),
        ({"plan__group_size": "null"}, True),  # groups of 64 and of 32
        ({"plan__embedding_bits": 8}, True),
        ({"plan__bits": "5.0", "calibration__gradient_samples": 2}, True),
        ({"plan__bits": "5.0", "calibration__gradient_samples": 2, "plan__symmetric": False}, False),
        ({"plan__group_size": "null", "plan__symmetric": False}, False),
        ({"plan__symmetric": True}, True),
    ],
)
def test_zero_points_go_where_a_reader_takes_none_of_several_ways(
    settings: dict[str, object], symmetric: bool, llama: Path, tmp_path: Path
) -> None:
    plan, objection = planned(llama, tmp_path / "out", **settings)
    assert {row.symmetric for row in plan.linears.values()} == {symmetric}
    assert not objection
    with opened(short_config(llama, tmp_path / "out", **COMPRESSED, **settings)) as job:
        said = list(zero_point_sentences(job, plan))
    expected = (
        "no zero points are stored: transformers 5.24 with compressed-tensors 0.20 takes them only where all linears "
        "and embeddings are stored in one way"
        + ("" if "plan__embedding_bits" in settings else "; --no-symmetric stores them")
    )
    assert said == ([expected] if symmetric and "plan__symmetric" not in settings else [])


def test_embeddings_have_no_zero_points_and_are_not_given_any_that_were_asked_for(llama: Path, tmp_path: Path) -> None:
    plan, objection = planned(llama, tmp_path / "out", plan__embedding_bits=6, plan__symmetric=False)
    assert objection == (
        "--format compressed-tensors: compressed-tensors holds symmetric grids of embedding and head only, and that of "
        "model.embed_tokens is not (and 1 more); use --symmetric"
    )
    plan, objection = planned(llama, tmp_path / "out", plan__embedding_bits=6)
    assert not objection
    assert {(row.bits, row.symmetric) for row in plan.embeddings.values()} == {(6, True)}


def test_all_experts_are_planned_alike_and_without_zero_points(tmp_path: Path) -> None:
    source = make_checkpoint("qwen2-moe", tmp_path / "model")
    plan, objection = planned(source, tmp_path / "out", plan__group_size="null")
    assert not objection
    experts = {name: row for name, row in plan.linears.items() if ".experts." in name}
    # Of 64 and 32 input features.
    assert {(row.bits, row.group_size, row.symmetric) for row in experts.values()} == {(4, 32, True)}


def test_experts_that_no_checkpoint_has_one_by_one_are_refused_by_name(tmp_path: Path) -> None:
    source = KINDS["experts [E, K, N]"].save(tmp_path / "model")
    _, objection = planned(source, tmp_path / "out", plan__symmetric=True)
    assert objection == (
        "--format compressed-tensors: compressed-tensors stores experts one by one, and transformers has no names of "
        "that kind for model.layers.0.mlp.experts.gate_up_proj of a gpt_oss model; "
        "keep them (--keep '*.gate_up_proj.*'), or export to the format accullm"
    )
