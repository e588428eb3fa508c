"""Flags reach the configuration, and every command and option is documented."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from typer.main import get_command

from accullm_cli import cli
from accullm_cli.config_options import options
from accullm_cli.measure.result import ModelResult
from tests.cli.fakes import (
    CONVERTING,
    ROOT,
    Comparison,
    Diagnosis,
    Verification,
)


@pytest.mark.parametrize("command", CONVERTING)
@pytest.mark.parametrize("option", list(options()), ids=lambda option: option.flag)
def test_every_option_is_a_flag_of_every_converting_command(accullm, pipeline, command, option):
    value = [] if option.kind == "boolean" else [option.example]
    assert accullm(command, "m", option.flag, *value)[0] == 0
    section, name = option.key.split(".")
    got = getattr(getattr(pipeline.calls[0][1], section), name)
    wanted = {"integer": int, "number": lambda text: float(text.strip("%")) / 100 if "%" in text else float(text)}
    expected = True if option.kind == "boolean" else wanted.get(option.kind, str)(option.example)
    assert (
        [str(item) for item in got] if option.repeatable else got if option.kind not in ("path", "choice") else str(got)
    ) == ([expected] if option.repeatable else expected)


def test_what_is_not_given_stays_at_its_default(accullm, pipeline):
    from accullm_cli.config import Config

    accullm("convert", "m")
    assert pipeline.calls[0][1] == Config(model="m")


def test_files_sets_and_flags_reach_the_config_in_their_order(accullm, pipeline, tmp_path):
    (tmp_path / "c.yaml").write_text("model: from-file\nplan: {bits: 2, group_size: 16, outliers: 0}\n")
    arguments = ["--config", str(tmp_path / "c.yaml"), "--set", "plan.bits=3", "--set", "plan.group_size=32"]
    accullm("convert", *arguments, "--bits", "5", "--no-symmetric")
    config = pipeline.calls[0][1]
    assert (config.model, config.plan.outliers, config.plan.group_size, config.plan.bits) == ("from-file", 0, 32, 5)


def test_an_effort_comes_before_everything_else(accullm, pipeline, tmp_path):
    (tmp_path / "c.yaml").write_text("calibration: {samples: 7}\n")
    accullm("convert", "m", "--config", str(tmp_path / "c.yaml"), "--effort", "fast")
    accullm("convert", "m", "--effort", "best", "--samples", "9")
    accullm("convert", "m", "--effort", "balanced")
    fast, best, balanced = (config for _, config, *_ in pipeline.calls)
    assert (fast.calibration.samples, fast.rounding.target) == (7, "original")
    assert (best.gradient_samples, best.rounding.outlier_mode) == (9, "compensating")
    assert balanced == type(balanced)(model="m")


def test_an_unknown_effort_is_refused(accullm, pipeline):
    code, _, err = accullm("convert", "m", "--effort", "most")
    assert code == 2
    assert err == "error: --effort: 'most' is not allowed; give fast, balanced or best\n"
    assert pipeline.calls == []


def test_repeated_flags_make_a_list(accullm, pipeline):
    accullm("convert", "m", "--format", "accullm", "--format", "compressed-tensors")
    assert pipeline.calls[0][1].export.format == ["accullm", "compressed-tensors"]


def test_a_negative_value_is_no_flag(accullm, pipeline):
    accullm("convert", "m", "--group-size", "-1")
    assert pipeline.calls[0][1].plan.group_size == -1


# -- every command and option is documented ----------------------------------------------------------------


@pytest.mark.parametrize("name", list(cli.HELP))
def test_every_command_has_help_an_example_of_itself_and_help_for_each_parameter(name):
    command = get_command(cli.app).commands[name]
    assert command.help.endswith(".") or ". " in command.help
    assert f"accullm {name}" in command.epilog
    for parameter in command.params:
        assert parameter.help, parameter.name


@pytest.mark.parametrize("example", [line for _, examples in cli.HELP.values() for line in examples])
def test_every_example_parses(accullm, pipeline, answer, example, tmp_path, monkeypatch):
    import shlex

    monkeypatch.chdir(tmp_path)  # where no artifact lies
    for name, value in {
        "inspect": Verification((), ()),
        "compare": Comparison(0.0, ()),
        "diagnose": Verification((), ()),
        "verify": Verification((), ()),
        "doctor": Diagnosis(()),
        "models": (),
    }.items():
        answer(name, value)
    conversions = types.ModuleType("accullm_cli.zoo.conversions")
    cluster = types.ModuleType("accullm_cli.zoo.cluster")
    done = ModelResult("m-int4", "m", 0, "", 1.0, ())
    conversions.__dict__.update(
        check_zoo=lambda zoo: {},
        plan_zoo=lambda zoo: (),
        convert_here=lambda fresh: None,
        convert_zoo=lambda *given: (done,),
    )
    cluster.convert_on_ray = lambda address, estimates: None
    for module in (conversions, cluster):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("accullm_cli.zoo.conversions", conversions, raising=False)
    Path("zoo.yaml").write_text("models: [llama-7b]\n")
    words = shlex.split(example.removeprefix("art=$(").removesuffix(")").partition(" > ")[0])
    assert words[0] == "accullm"
    code, _, err = accullm(*words[1:])
    # So --original has none to go with.
    assert (code, "not an artifact" in err) == ((2, True) if "--original" in words else (0, False))


def test_the_docs_are_as_the_code_declares_them():
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "generate_docs.py"), "--check"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (result.stdout, result.returncode) == ("", 0), result.stdout + result.stderr
