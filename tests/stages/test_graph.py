"""The graph of stages: what each one depends on, for every option there is, and what walks it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from accullm_cli.config_options import options
from accullm_cli.stages.graph import conversion, measurements
from accullm_cli.stages.stage import foresee
from tests.streaming import opened, short_config, write_text
from tests.tiny import make_checkpoint

REFERENCES = {"reference", "other reference"}
MEASURED = {"validate accullm", "validate accullm on other text"}
ANSWERS = {"task answers"}  # which is among what the artifact is asked with
SEEDED = {*REFERENCES, *MEASURED, *ANSWERS}

# For each option another value than the one of `CONFIG`, and the stages whose own inputs that changes.
ASKED = {"validation__tasks": "arithmetic:easy", "validation__task_items": 3}
CONFIG = {"validation__windows": 4, "validation__other_text": "{tmp}/letters.txt", **ASKED}
DEPENDS: dict[str, tuple[Any, set[str]]] = {
    "calibration.text": ("{tmp}/another.txt", {"calibrate"}),
    "calibration.samples": (5, {"calibrate"}),
    "calibration.seq_len": (40, {"calibrate", *REFERENCES}),
    "calibration.gradient_samples": (2, {"calibrate"}),
    "plan.bits": (3, {"profile"}),
    "plan.file_size": ("1MB", {"calibrate", "profile"}),
    "plan.spend": ("outliers", set()),
    "plan.group_size": (16, {"profile"}),
    "plan.scale_bits": (8, {"profile"}),
    "plan.symmetric": (True, {"profile"}),
    "plan.outliers": (0.1, {"profile"}),
    "plan.outlier_adapter": (True, {"profile"}),
    "plan.embedding_bits": (8, {"profile"}),
    "plan.encodings": ("['integer']", {"profile"}),
    "plan.keep": ("['*.down_proj']", {"profile"}),
    "rounding.method": ("stochastic", {"profile", "quantize"}),  # levels are not rounded at random
    "rounding.outlier_mode": ("compensating", {"quantize"}),
    "rounding.target": ("original", {"quantize"}),
    "rounding.grid": ("minmax", {"quantize"}),
    "rounding.damping": (0.5, {"quantize"}),
    "export.format": ("[compressed-tensors]", {"export"}),
    "export.out": ("{tmp}/elsewhere", {"export"}),
    "validation.text": ("{tmp}/another.txt", {"reference"}),
    "validation.windows": (5, {"reference"}),  # half as many of the other text
    "validation.other_text": ("{tmp}/another.txt", {"other reference"}),
    "validation.speed": (True, set()),
    "validation.tasks": ("arithmetic:medium", ANSWERS),
    "validation.task_items": (4, ANSWERS),
    "validation.require": ("[mean_kl<=1]", set()),
    "validation.junit": ("{tmp}/tests.xml", set()),
    "validation.summary": ("{tmp}/summary.md", set()),
    "search.golden": (True, {"calibrate"}),  # as it needs gradients
    "search.max_bits_per_weight": (5, set()),
    "search.max_plans": (2, set()),
    "machine.run": ("{tmp}/run", set()),
    "machine.device": ("cuda", {"calibrate", "quantize", "validate accullm on tasks", *SEEDED}),
    "machine.threads": (1, set()),  # in keys as what torch uses
    "machine.precision": ("auto", {"calibrate", "quantize"}),
    "machine.seed": (1, {"calibrate", *SEEDED}),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llama")
    write_text(place / "letters.txt", 3)
    write_text(place / "another.txt", 4)
    return make_checkpoint("llama", place / "model")


def inputs_of(llama: Path, **settings: object) -> dict[str, dict[str, str]]:
    """Each stage's own inputs: what it does not have of a stage before it."""
    settings = {key: str(value).replace("{tmp}", str(llama.parent)) for key, value in (CONFIG | settings).items()}
    with opened(short_config(llama, llama.with_name("out"), **settings)) as job:
        stages = conversion(job)
        earlier = {f"input:{name}" for name in ("artifact", *(stage.name for stage in stages))}
        return {
            decision.stage: {name: value for name, value in decision.inputs.items() if name not in earlier}
            for decision in foresee(job, stages)
        }


def changed(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> set[str]:
    return {name for name in before.keys() & after.keys() if before[name] != after[name]}


@pytest.mark.parametrize("key", [option.key for option in options()])
def test_an_option_is_in_the_keys_of_what_depends_on_it_and_in_no_other(
    key: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    value, expected = DEPENDS[key]
    if key == "machine.precision":
        with opened(short_config(llama, llama.with_name("out"), machine__precision="auto")) as job:
            expected = expected if job.compute.precision == "bfloat16" else set()
    assert changed(inputs_of(llama), inputs_of(llama, **{key.replace(".", "__"): value})) == expected


@pytest.mark.parametrize(
    ("settings", "key", "value", "expected"),
    [
        # Nearest rounding reads no streams, and draws nothing.
        ({"rounding__method": "nearest"}, "rounding__damping", 0.5, set()),
        ({"rounding__method": "nearest"}, "rounding__target", "original", set()),
        ({"rounding__method": "nearest"}, "rounding__outlier_mode", "compensating", set()),
        ({"rounding__method": "nearest"}, "rounding__grid", "minmax", {"quantize"}),
        # What is drawn: rounding, and the tokens that gradients are those of.
        (
            {"rounding__method": "stochastic"},
            "machine__seed",
            1,
            {"calibrate", "quantize", *REFERENCES, *MEASURED, *ANSWERS},
        ),
        # What is spent on, where there is something to spend.
        ({"plan__bits": 4.5}, "plan__spend", "outliers", {"profile"}),
        # Default values that are given.
        ({"plan__group_size": "null"}, "plan__group_size", 64, set()),
        ({}, "calibration__gradient_samples", 0, set()),
        # What the model writes is known by what it is written from.
        ({"calibration__text": "self"}, "machine__seed", 1, {"calibrate", *SEEDED}),
        ({"calibration__text": "self"}, "calibration__samples", 5, {"calibrate"}),
        ({"calibration__text": "self"}, "validation__windows", 5, {"reference"}),
    ],
)
def test_what_an_option_matters_for_depends_on_others(
    settings: dict[str, object], key: str, value: object, expected: set[str], llama: Path
) -> None:
    assert changed(inputs_of(llama, **settings), inputs_of(llama, **settings | {key: value})) == expected


def test_every_stage_depends_on_the_stages_that_it_names(llama: Path) -> None:
    """Some of them only through others between."""
    config = short_config(llama, llama.with_name("out"), validation__speed=True, **ASKED)
    with opened(config) as job:
        stages = conversion(job)
        decisions = {decision.stage: decision for decision in foresee(job, stages)}
    for number, stage in enumerate(stages):
        before = {other.name for other in stages[:number]}
        read = {name.removeprefix("input:") for name in decisions[stage.name].inputs} & before
        assert read <= set(stage.after) <= before
        # Of export it is the artifact that is read; reading leaves nothing, and stops what would follow.
        assert set(stage.after) - read <= {"export", "reading"}


def test_a_command_stands_for_every_stage(llama: Path) -> None:
    settings = {"validation__speed": True, "validation__other_text": llama.with_name("letters.txt")}
    settings |= ASKED
    with opened(short_config(llama, llama.with_name("out"), **settings)) as job:
        commands = {stage.name: stage.commands for stage in conversion(job)}
        assert list(commands) == [
            "reading",
            "calibrate",
            "profile",
            "quantize",
            "export",
            "reference",
            "validate accullm",
            "other reference",
            "validate accullm on other text",
            "task answers",
            "validate accullm on tasks",
            "validate speed",
        ]
        assert commands["reference"] == commands["other reference"] == ("validate", "calibrate")
        assert commands["reading"] == ("calibrate",)
        for name in ("calibrate", "profile", "quantize", "export"):
            assert commands[name] == (name,)
        measuring = [name for name in commands if name.startswith(("validate", "task"))]
        assert {commands[name] for name in measuring} == {("validate",)}
        # The validation of a finished artifact is that part of it alone.
        alone = measurements(job, {"accullm": llama.with_name("elsewhere")})
        assert [stage.name for stage in alone] == list(commands)[5:]
