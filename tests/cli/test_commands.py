"""The command line: what each command calls, what it prints on which stream, and its exit code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest

from accullm_cli.config_options import config_schema
from tests.cli.fakes import (
    CONVERTING,
    MISSED,
    ROOT,
    Check,
    Comparison,
    Diagnosis,
    Verification,
)
from tests.samples import a_report

# -- what is printed ---------------------------------------------------------------------------------------


def test_convert_prints_the_artifact_on_stdout_and_everything_else_on_stderr(accullm, pipeline):
    code, out, err = accullm("convert", "m")
    assert (code, out) == (0, "work/m-int4\n")
    assert err.startswith("calibrate: up to date\n\nmodel ")
    assert "mean KL" in err


def test_quiet_leaves_only_the_path(accullm, pipeline):
    assert accullm("convert", "m", "--quiet") == (0, "work/m-int4\n", "")


def test_each_format_has_its_line(accullm, pipeline):
    pipeline.reports = (a_report((), artifact="a"), a_report((), artifact="b"))
    assert accullm("convert", "m", "--quiet")[:2] == (0, "a\nb\n")


def test_json_is_one_object_with_all_reports(accullm, pipeline):
    pipeline.reports = (a_report((), artifact="a"), a_report((), artifact="b"))
    code, out, _ = accullm("convert", "m", "--json")
    content = json.loads(out)
    assert (code, content["schema_version"]) == (0, 1)
    assert [report["artifact"] for report in content["reports"]] == ["a", "b"]
    schema = json.loads((ROOT / "docs" / "report.schema.json").read_text())
    jsonschema.validate(content["reports"][0], schema)


def test_a_missed_contract_is_exit_code_3_with_the_path_still_printed(accullm, pipeline):
    pipeline.reports = (a_report((MISSED,), artifact="work/m-int4"),)
    assert accullm("convert", "m", "--quiet") == (
        3,
        "work/m-int4\n",
        "error: work/m-int4: the contract is not met: mean_kl<=0.02 (measured 0.06612)\n",
    )


def test_dry_run_prints_a_table_and_runs_nothing(accullm, pipeline):
    code, out, err = accullm("convert", "m", "--dry-run")
    assert [call[0] for call in pipeline.calls] == ["dry_run"]
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "model            m",
        "bits per weight  4.400",
        "artifact bytes   130 MB",
        "peak bytes       2 GB",
        "seconds          1 h 01 min",
        "",
        "stages:",
        "  name              reason      runs",
        "  calibrate         new         yes",
        "  validate accullm  up to date  no",
    ]


def test_a_dry_run_of_an_average_says_what_it_knows(accullm, pipeline):
    _, out, _ = accullm("convert", "m", "--bits", "4.4", "--dry-run")
    assert out.splitlines()[1:3] == ["bits per weight  at most 4.400", "artifact bytes   at most 130 MB"]
    content = json.loads(accullm("convert", "m", "--bits", "4.4", "--dry-run", "--json")[1])
    assert content["schema_version"] == 1
    assert (content["dry_run"]["bits_per_weight"], content["dry_run"]["size_is_exact"]) == (4.4, False)


@pytest.mark.parametrize(("bits", "at_most"), [("4", ""), ("4.4", "at most ")])
def test_a_dry_run_of_several_formats_says_the_size_of_each(accullm, pipeline, bits, at_most):
    formats = ("--format", "accullm", "--format", "compressed-tensors")
    lines = accullm("convert", "m", *formats, "--outliers", "0", "--bits", bits, "--dry-run")[1].splitlines()
    assert not any(line.startswith(("bits per weight", "artifact bytes")) for line in lines)
    table = lines[lines.index("artifacts:") + 1 :][:3]
    rows = [
        ("format", "path", "bits per weight", "artifact bytes"),
        ("accullm", "work/accullm", f"{at_most}4.400", f"{at_most}130 MB"),
        ("compressed-tensors", "work/compressed-tensors", f"{at_most}5.400", f"{at_most}130 MB"),
    ]
    assert [tuple(re.split(" {2,}", line.strip())) for line in table] == rows


@pytest.mark.parametrize("command", CONVERTING)
def test_a_dry_run_is_of_the_command_that_was_typed(accullm, pipeline, command):
    assert accullm(command, "m", "--dry-run", "--fresh")[0] == 0
    only = None if command == "convert" else command
    assert [(name, fresh, stage) for name, _, fresh, stage in pipeline.calls] == [("dry_run", True, only)]


@pytest.mark.parametrize("stage", ["calibrate", "profile", "quantize"])
def test_a_stage_prints_the_run_directory(accullm, pipeline, stage):
    assert accullm(stage, "m", "--fresh")[:2] == (0, "work/m.run\n")
    assert (pipeline.calls[0][0], pipeline.calls[0][2]) == (stage, True)


def test_export_prints_what_it_wrote(accullm, pipeline):
    assert accullm("export", "m")[:2] == (0, "out-a\nout-b\n")


def test_a_stage_as_json(accullm, pipeline):
    content = json.loads(accullm("quantize", "m", "--json")[1])
    assert content == {
        "schema_version": 1,
        "stage": {
            "stage": "quantize",
            "run": "work/m.run",
            "outputs": ["out-a", "out-b"],
            "seconds": 1.0,
            "reports": [],
        },
    }


def test_validate_of_a_model_is_the_runs_last_stage(accullm, pipeline):
    assert accullm("validate", "m", "--quiet") == (0, "work/m-int4\n", "")
    assert pipeline.calls[0][0] == "validate"


@pytest.mark.parametrize("original", [None, "theirs"])
def test_validate_of_an_artifact_measures_that_artifact(accullm, pipeline, tmp_path, original):
    (tmp_path / "accullm.json").write_text("{}")
    pipeline.reports = (a_report((MISSED,), artifact="work/m-int4"),)
    extra = ["--original", original] if original else []
    assert accullm("validate", str(tmp_path), "--validation-windows", "3", *extra)[0] == 3
    [(name, artifact, config, fresh)] = pipeline.calls
    assert (name, artifact, fresh) == ("validate_artifact", tmp_path, False)
    assert (config.model, config.validation.windows) == (original or str(tmp_path), 3)


def test_an_artifact_is_measured_again_where_that_is_asked_for(accullm, pipeline, tmp_path):
    (tmp_path / "accullm.json").write_text("{}")
    assert accullm("validate", str(tmp_path), "--fresh")[0] == 0
    assert pipeline.calls[0][3] is True


def test_a_dry_run_measures_no_artifact(accullm, pipeline, tmp_path):
    (tmp_path / "accullm.json").write_text("{}")
    assert accullm("validate", str(tmp_path), "--dry-run") == (
        2,
        "",
        f"error: {tmp_path}: is an artifact, which a dry run does not measure; leave out --dry-run, or give a model\n",
    )
    assert pipeline.calls == []


def test_original_without_an_artifact_is_refused(accullm, pipeline):
    assert accullm("validate", "m", "--original", "o") == (
        2,
        "",
        "error: m: is not an artifact; --original goes with an artifact's directory\n",
    )


# -- questions ---------------------------------------------------------------------------------------------


def test_inspect_prints_what_it_found_on_stdout(accullm, answer):
    calls = answer("inspect", Verification(("a",), ()))
    assert accullm("inspect", "m") == (0, "problems  -\n\nfiles:\n  a\n", "")
    assert calls == [((Path("m"),), {})]


def test_compare_beyond_its_limit_is_exit_code_3(accullm, answer):
    calls = answer("compare", Comparison(0.5, ("mean KL 0.5 is above 0.1",)))
    code, out, _ = accullm("compare", "a", "b", "--max-mean-kl", "0.1")
    assert code == 3
    assert "mean KL 0.5 is above 0.1" in out
    assert calls == [((Path("a"), Path("b")), {"max_mean_kl": 0.1})]


def test_diagnose_hands_on_what_it_was_given(accullm, answer):
    calls = answer("diagnose", Verification((), ()))
    assert accullm("diagnose", "a", "--original", "m", "--by", "linear", "--windows", "3")[0] == 0
    ((arguments, named),) = calls
    assert arguments == (Path("a"), "m", "linear", 3, 256)
    assert set(named) == {"progress"}
    code, _, err = accullm("diagnose", "a", "--by", "layer")
    assert (code, err) == (2, "error: --by: 'layer' is no part of a model; give block or linear\n")


def test_compare_within_its_limit_is_exit_code_0(accullm, answer):
    answer("compare", Comparison(0.05, ()))
    assert accullm("compare", "a", "b")[0] == 0


@pytest.mark.parametrize(("problems", "code"), [((), 0), (("x.safetensors: differs",), 3)])
def test_verify_with_problems_is_exit_code_3(accullm, answer, problems, code):
    answer("verify", Verification(("a",), problems))
    got, out, _ = accullm("verify", "art", "--json")
    assert got == code
    assert json.loads(out) == {
        "schema_version": 1,
        "verification": {"files": ["a"], "problems": list(problems)},
    }


@pytest.mark.parametrize(("required", "code"), [(False, 0), (True, 3)])
def test_doctor_fails_only_where_what_is_required_is_missing(accullm, answer, required, code):
    answer(
        "doctor", Diagnosis((Check("torch", True, True, "2.13", ""), Check("gpu", False, required, "none", "get one")))
    )
    got, out, _ = accullm("doctor")
    assert got == code
    assert out.splitlines()[1:] == [
        "  name   ok   required  detail  hint",
        "  torch  yes  yes       2.13    -",
        f"  gpu    no   {'yes' if required else 'no '}       none    get one",
    ]


def test_models_is_a_table(accullm, answer):
    answer("models", (Comparison(1.0, ()),))
    assert accullm("models") == (0, "mean kl  exceeded\n1        -\n", "")


def test_schema_prints_the_json_schema(accullm):
    code, out, err = accullm("schema")
    assert (code, err) == (0, "")
    assert json.loads(out) == config_schema()


def test_version(accullm):
    import accullm_cli

    assert accullm("--version") == (0, f"accullm {accullm_cli.__version__}\n", "")
