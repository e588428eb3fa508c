"""Configuration: precedence, the exact line of every mistake, and what is derived from the declaration."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from accullm_cli.config import Config, FormatName
from accullm_cli.config_file import load_config, presets
from accullm_cli.config_options import config_schema, options, sections
from accullm_cli.errors import AccullmError

FORMATS = get_args(FormatName)


@pytest.fixture
def conf(tmp_path, monkeypatch):
    """Write a file that errors then name simply `conf.yaml`."""
    monkeypatch.chdir(tmp_path)

    def write(content: str | bytes) -> str:
        Path("conf.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
        return "conf.yaml"

    return write


def line_of(**layers) -> str:
    with pytest.raises(AccullmError) as refused:
        load_config(**{"model": "m", **layers})
    assert refused.value.exit_code == 2
    return refused.value.line()


# -- precedence --------------------------------------------------------------------------------------------


def test_defaults_hold_where_nothing_is_given():
    assert load_config("m") == Config(model="m")


def test_each_layer_overrides_the_one_before(conf):
    file = conf("model: from-file\nplan: {bits: 3, group_size: 32}\ncalibration: {samples: 7}\n")
    config = load_config(
        None, files=[file], sets=["plan.bits=5", "plan.group_size=16", "plan.bits=6"], flags={"plan.group_size": "8"}
    )
    assert (config.model, config.calibration.samples) == ("from-file", 7)
    assert (config.plan.bits, config.plan.group_size) == (6, 8)


def test_a_later_file_overrides_an_earlier_one(conf, tmp_path):
    (tmp_path / "second.yaml").write_text("plan: {bits: 8}\n")
    config = load_config("m", files=[conf("plan: {bits: 3, group_size: 32}\n"), "second.yaml"])
    assert (config.plan.bits, config.plan.group_size) == (8, 32)


def test_the_positional_model_overrides_the_file(conf):
    assert load_config("mine", files=[conf("model: theirs\n")]).model == "mine"


def test_a_section_without_keys_is_allowed(conf):
    assert load_config("m", files=[conf("plan:\n  # bits: 3\nrounding: {grid: minmax}\n")]).rounding.grid == "minmax"


def test_an_empty_file_changes_nothing(conf):
    assert load_config("m", files=[conf("")]) == Config(model="m")


@pytest.mark.parametrize("text", ["0.5%", "0.005", " 0.5 % "])
def test_a_percentage_and_its_fraction_mean_the_same(text):
    assert load_config("m", flags={"plan.outliers": text}).plan.outliers == pytest.approx(0.005, rel=1e-12)


def test_set_takes_lists_and_null():
    config = load_config("m", sets=["validation.require=[mean_kl<=0.02, kl_max<=1]", "machine.threads=null"])
    assert config.validation.require == ["mean_kl<=0.02", "kl_max<=1"]
    assert config.machine.threads is None


def test_set_keeps_text_that_looks_like_a_number():
    assert load_config(None, sets=["model=123"]).model == "123"


def test_a_preset_is_found_by_its_name():
    assert load_config("m", files=["fast"]).calibration.samples == 16
    assert load_config("m", files=["best"]).gradient_samples == 256


def test_a_file_of_that_name_wins_over_the_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("fast").write_text("plan: {bits: 7}\n")
    assert load_config("m", files=["fast"]).plan.bits == 7


def test_every_preset_loads():
    for name in presets():
        assert load_config("m", files=[name]).model == "m"


def test_the_default_preset_is_the_defaults():
    assert load_config("m", files=["default"]) == Config(model="m")


@settings(deadline=None)
@given(
    bits=st.one_of(st.integers(2, 8), st.floats(2, 8), st.integers(2, 8).map(float)),
    group_size=st.one_of(st.just(-1), st.integers(1, 4096)),
    outliers=st.floats(0, 0.5),
    text=st.text(min_size=1).filter(lambda text: text.isprintable()),
    require=st.lists(st.sampled_from(["mean_kl<=0.02", "top1_agreement>=0.9"])),
)
def test_yaml_written_is_read_back_equal(tmp_path_factory, bits, group_size, outliers, text, require):
    config = Config.model_validate(
        {
            "model": text,
            "plan": {"bits": bits, "group_size": group_size, "outliers": outliers},
            "validation": {"require": require},
            "export": {"out": Path("a b")},
        }
    )
    file = tmp_path_factory.mktemp("yaml") / "run.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    read = load_config(None, files=[file])
    assert read == config
    assert type(read.plan.bits) is type(bits)


@pytest.mark.parametrize(
    ("written", "bits"),
    [("5", 5), ("+5", 5), ("5.0", 5.0), ("5.", 5.0), (" 8.0 ", 8.0), ("4.4", 4.4), ("5e0", 5)],
)
def test_bits_with_a_decimal_point_are_an_average(conf, written, bits):
    file = conf(f"plan:\n  bits: '{written}'\n")
    for layer in ({"flags": {"plan.bits": written}}, {"sets": [f"plan.bits={written}"]}, {"files": [file]}):
        plan = load_config("m", **layer).plan
        assert (plan.bits, type(plan.bits)) == (bits, type(bits))
        assert plan.is_average == isinstance(bits, float)


def test_bits_in_a_file_and_from_python_are_told_apart_too(conf):
    assert not load_config("m", files=[conf("plan: {bits: 5}\n")]).plan.is_average
    assert load_config("m", files=[conf("plan: {bits: 5.0}\n")]).plan.is_average
    assert not Config(model="m", plan={"bits": 5}).plan.is_average
    assert Config(model="m", plan={"bits": 5.0}).plan.is_average


def test_an_infinite_average_is_refused():
    assert line_of(flags={"plan.bits": "inf"}) == "--bits: inf is above 8; give 2 to 8"


# -- mistakes in a file ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (
            "# hello\n\nmodel: m\n\nplan:\n  bits: 4\n  group_sise: 64\n",
            "conf.yaml:7: plan.group_sise: unknown key; did you mean plan.group_size?",
        ),
        ("bits: 4\n", "conf.yaml:1: bits: unknown key; did you mean plan.bits?"),
        ("plan:\n  group-size: 4\n", "conf.yaml:2: plan.group-size: unknown key; did you mean plan.group_size?"),
        ("validation-text: x\n", "conf.yaml:1: validation-text: unknown key; did you mean validation.text?"),
        ("plans:\n  bits: 4\n", "conf.yaml:1: plans: unknown key; did you mean plan?"),
        (
            "plan:\n  colour: red\n",
            "conf.yaml:2: plan.colour: unknown key; "
            "the keys of plan are bits, file_size, spend, group_size, scale_bits, symmetric, outliers, "
            "outlier_adapter, embedding_bits, encodings, keep",
        ),
        (
            "zzz: 1\n",
            "conf.yaml:1: zzz: unknown key; "
            "the keys here are model, calibration, plan, rounding, export, validation, search, machine",
        ),
        ("model: m\nplan:\n  bits: 9\n", "conf.yaml:3: plan.bits: 9 is above 8; give 2 to 8"),
        ("plan:\n  bits: 1\n", "conf.yaml:2: plan.bits: 1 is below 2; give 2 to 8"),
        (
            "calibration:\n  samples: 4.5\n",
            "conf.yaml:2: calibration.samples: 4.5 is not a whole number; give 1 or more",
        ),
        ("plan:\n  bits: four\n", "conf.yaml:2: plan.bits: 'four' is not a number; give 2 to 8"),
        ("plan:\n  bits:\n", "conf.yaml:2: plan.bits: null is not a number; give 2 to 8"),
        (
            "plan:\n  bits: on\n",
            "conf.yaml:2: plan.bits: true and false are not values of this key "
            "(YAML reads yes, no, on and off as these); give 2 to 8",
        ),
        ("plan:\n  bits: {a: 1}\n", "conf.yaml:2: plan.bits: a mapping is not a number; give 2 to 8"),
        (
            "plan:\n  group_size: 0\n",
            "conf.yaml:2: plan.group_size: 0 is not a group size; give -1 (one scale per output row), or 1 or more",
        ),
        ("plan:\n  group_size: -2\n", "conf.yaml:2: plan.group_size: -2 is below -1; give -1, or 1 or more"),
        ("plan:\n  outliers: 60%\n", "conf.yaml:2: plan.outliers: 60% is above 0.5; give 0 to 0.5"),
        ("plan:\n  outliers: lots%\n", "conf.yaml:2: plan.outliers: 'lots%' is not a number; give 0 to 0.5"),
        (
            "plan:\n  symmetric: maybe\n",
            "conf.yaml:2: plan.symmetric: 'maybe' is not true or false; give true or false",
        ),
        ("rounding:\n  damping: 0\n", "conf.yaml:2: rounding.damping: 0 is not above 0; give more than 0, up to 1"),
        (
            "rounding:\n  method: neerest\n",
            "conf.yaml:2: rounding.method: 'neerest' is not allowed; did you mean nearest?",
        ),
        (
            "rounding:\n  method: 7\n",
            "conf.yaml:2: rounding.method: 7 is not allowed; give nearest, feedback or stochastic",
        ),
        (
            "plan:\n  embedding_bits: 9\n",
            "conf.yaml:2: plan.embedding_bits: 9 is not allowed; give 16, 8, 7, 6, 5, 4, 3 or 2",
        ),
        (
            "plan:\n  embedding_bits: many\n",
            "conf.yaml:2: plan.embedding_bits: 'many' is not allowed; give 16, 8, 7, 6, 5, 4, 3 or 2",
        ),
        ("calibration:\n  samples: 0\n", "conf.yaml:2: calibration.samples: 0 is below 1; give 1 or more"),
        ("calibration:\n  text: 7\n", "conf.yaml:2: calibration.text: 7 is not text; put it in quotes"),
        ("export:\n  format: accullm\n", "conf.yaml:2: export.format: 'accullm' is not a list; write it as [accullm]"),
        ("export:\n  format: []\n", "conf.yaml:2: export.format: the list is empty; give at least one"),
        (
            "export:\n  format:\n  - accullm\n  - zip\n",
            f"conf.yaml:4: export.format: 'zip' is not allowed; give {', '.join(FORMATS[:-1])} or {FORMATS[-1]}",
        ),
        (
            "export:\n  format: [accullm, accullm]\n",
            "conf.yaml:2: export.format: accullm is given twice; give it once",
        ),
        ("export:\n  out: 7\n", "conf.yaml:2: export.out: 7 is not a path; put it in quotes"),
        (
            "machine:\n  device: gpu\n",
            "conf.yaml:2: machine.device: 'gpu' is not allowed; give auto, cpu, cuda or cuda:N",
        ),
        ("machine:\n  seed: -1\n", "conf.yaml:2: machine.seed: -1 is below 0; give 0 to 2**63 - 1"),
        ("model: 7\n", "conf.yaml:1: model: 7 is not text; put it in quotes"),
        ("plan:\n  bits: 4\n  bits: 5\n", "conf.yaml:3: plan.bits: given twice (first in line 2); keep one of the two"),
        ("plan: {bits: 4}\nplan: {bits: 5}\n", "conf.yaml:2: plan: given twice (first in line 1); keep one of the two"),
        (
            "- bits\n",
            "conf.yaml:1: a list is not a mapping of keys; write `plan:` and below it, indented, `bits: VALUE`",
        ),
        (
            "model: m\nrounding: nearest\n",
            "conf.yaml:2: rounding: 'nearest' is not a mapping of keys; "
            "write `rounding:` and below it, indented, `method: VALUE`",
        ),
        (
            "plan:\n  bits: [4\n",
            "conf.yaml:3: not valid YAML (expected ',' or ']', but got '<stream end>'); correct this line",
        ),
        ("model: m\n---\nmodel: n\n", "conf.yaml:2: not valid YAML (but found another document); correct this line"),
        (
            "model: !!python/object:os.system x\n",
            "conf.yaml:1: not valid YAML (could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object:os.system'); correct this line",
        ),
        ("model: m\nplan: \x07\n", "conf.yaml:2: not valid YAML (character #x0007 is not allowed); remove it"),
        (b"model: m\nplan: \xff\n", "conf.yaml:2: not UTF-8 (byte 0xff); save the file as UTF-8"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_that_names_file_line_and_key(conf, content, line):
    assert line_of(files=[conf(content)]) == line


def test_a_mistake_is_refused_even_where_a_flag_overrides_it(conf):
    file = conf("plan:\n  bits: 9\n")
    assert line_of(files=[file], flags={"plan.bits": "4"}) == "conf.yaml:2: plan.bits: 9 is above 8; give 2 to 8"


def test_a_missing_file_is_refused_with_the_presets():
    line = "--config: nope.yaml is neither a file nor a preset; give a path, or one of best, default, fast"
    assert line_of(files=["nope.yaml"]) == line


def test_a_misspelled_preset_is_refused_with_the_nearest():
    assert line_of(files=["fsat"]) == "--config: fsat is neither a file nor a preset; did you mean fast?"


def test_a_directory_is_refused(tmp_path):
    assert line_of(files=[tmp_path]) == f"{tmp_path}: cannot be read (is a directory); give a YAML file"


# -- mistakes in --set and flags ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plan.bits=9", "--set plan.bits: 9 is above 8; give 2 to 8"),
        ("plan.bit=4", "--set plan.bit: unknown key; did you mean plan.bits?"),
        ("bits=4", "--set bits: unknown key; did you mean plan.bits?"),
        ("plan.bits", "--set plan.bits: no value given; write --set plan.bits=VALUE"),
        ("plan=4", "--set plan: this is a section; name one of its keys, as in --set plan.bits=VALUE"),
        ("export.format=[a", "--set export.format: '[a' is not a YAML list; write it as [one, two]"),
        ("plan.bits=", "--set plan.bits: '' is not a number; give 2 to 8"),
    ],
)
def test_a_mistake_in_set_names_the_key(text, line):
    assert line_of(sets=[text]) == line


@pytest.mark.parametrize(
    "given",
    [{"flags": {"plan.embedding_bits": "8"}}, {"sets": ["plan.embedding_bits= 8"]}],
    ids=["flag", "set"],
)
def test_choices_that_are_numbers_come_as_text(given):
    bits = load_config("m", **given).plan.embedding_bits
    assert (bits, type(bits)) == (8, int)


def test_a_mistake_in_a_flag_names_the_flag():
    widths = "16, 8, 7, 6, 5, 4, 3 or 2"
    assert line_of(flags={"plan.embedding_bits": "9"}) == f"--embedding-bits: '9' is not allowed; give {widths}"
    assert line_of(flags={"plan.bits": "9"}) == "--bits: 9 is above 8; give 2 to 8"
    assert line_of(flags={"export.format": ["accullm", "x"]}) == (
        f"--format: 'x' is not allowed; give {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
    )


def test_no_model_at_all_is_refused():
    assert line_of(model=None) == (
        "MODEL: not given; name a directory, a GGUF file, a hub id or an alias, or set `model` in the --config file"
    )


# -- the declaration ---------------------------------------------------------------------------------------


def test_every_option_has_a_flag_of_its_own_a_help_and_an_example():
    declared = list(options())
    assert len({option.flag for option in declared}) == len(declared) == 39
    for option in declared:
        assert option.flag.startswith("--")
        assert "_" not in option.flag
        assert option.help.endswith("."), option.key
        assert option.example not in ("", "None"), option.key


def test_every_example_is_a_valid_value_that_the_flag_takes():
    for option in options():
        value = [option.example] if option.repeatable else option.example
        section, name = option.key.split(".")
        config = load_config("m", flags={option.key: value})
        assert getattr(getattr(config, section), name) is not None, option.key


def test_every_number_says_its_range():
    for option in options():
        assert option.allowed or option.kind not in ("integer", "number"), option.key


def test_the_json_schema_accepts_what_the_loader_accepts():
    for path in presets().values():
        jsonschema.validate(yaml.safe_load(path.read_text()), config_schema())
    jsonschema.validate({"plan": {"outliers": "0.5%", "group_size": -1}}, config_schema())
    jsonschema.validate(yaml.safe_load(Config(model="m").to_yaml()), config_schema())


@pytest.mark.parametrize(
    "content",
    [
        {"plan": {"bits": 9}},
        {"plan": {"group_size": 0}},
        {"plan": {"group_sise": 64}},
        {"plan": {"outliers": "lots"}},
        {"plan": {"embedding_bits": 9}},
        {"rounding": {"method": "best"}},
        {"bits": 4},
        {"machine": {"device": "gpu"}},
        {"export": {"format": []}},
    ],
)
def test_the_json_schema_refuses_what_the_loader_refuses(content, conf):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, config_schema())
    line_of(files=[conf(yaml.safe_dump(content))])


def test_the_json_schema_is_itself_valid_and_keeps_our_own_notes_out():
    schema = config_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert "flag" not in str(schema)
    assert set(schema["properties"]) == {"model", *sections()}
