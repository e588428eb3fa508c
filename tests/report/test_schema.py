"""Reports as JSON: the way there and back, the documented schema, and every refusal word for word."""

import json
import math
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from accullm_cli.errors import AccullmError
from accullm_cli.report import from_json, to_json
from accullm_cli.report.schema import json_schema
from tests.samples import a_report, linear

DOCUMENTED = Path(__file__).resolve().parents[2] / "docs" / "report.schema.json"


def test_documented_schema_is_the_one_of_the_code():
    assert json.loads(DOCUMENTED.read_text()) == json_schema()


def test_report_fulfils_the_documented_schema():
    schema = json.loads(DOCUMENTED.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    content = json.loads(json.dumps(to_json(a_report(records=("a dead feature",)))))
    jsonschema.validate(content, schema)


def test_schema_refuses_a_figure_without_its_interval():
    content = to_json(a_report())
    del content["measurements"][0]["figures"][0]["estimate"]["low"]
    with pytest.raises(jsonschema.ValidationError, match="'low' is a required property"):
        jsonschema.validate(content, json_schema())


def test_report_survives_json():
    report = a_report(records=("a dead feature",))
    assert from_json(json.loads(json.dumps(to_json(report)))) == report


def test_number_that_is_not_finite_is_null():
    report = replace(a_report(), linears=(linear("lm_head", relative_error=math.nan),))
    assert to_json(report)["linears"][0]["relative_error"] is None


def refusal(content) -> str:
    with pytest.raises(AccullmError) as error:
        from_json(content)
    return error.value.line()


def test_another_schema_version_is_refused():
    content = {**to_json(a_report()), "schema_version": 99}
    assert refusal(content) == (
        "report.json: schema version 99 of a report is not 2; write it again with accullm validate"
    )


def test_missing_field_is_refused_by_its_name():
    content = to_json(a_report())
    del content["measurements"][0]["figures"][0]["estimate"]["low"]
    assert refusal(content) == (
        "report.json: measurements.0.figures.0.estimate.low: field required; write it again with accullm validate"
    )


def test_wrong_type_is_refused_by_its_name():
    content = to_json(a_report())
    content["stages"][1]["seconds"] = "long"
    assert refusal(content) == (
        "report.json: stages.1.seconds: input should be a valid number, unable to parse string as a number; write it "
        "again with accullm validate"
    )
