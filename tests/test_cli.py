"""The command line: what each command calls and prints, exit codes, streams, interruption, and how fast it answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest
from typer.main import get_command

from accullm_cli import cli
from accullm_cli.config import config_schema, options
from accullm_cli.errors import AccullmError, MachineError
from accullm_cli.measure.result import Clause, StageSummary
from accullm_cli.progress import Event
from tests.test_console import a_report

ROOT = Path(__file__).resolve().parent.parent
CONVERTING = ("convert", "calibrate", "profile", "quantize", "export", "validate")
MISSED = Clause("mean_kl<=0.02", "mean_kl", "<=", 0.02, 0.06612, False)


@dataclass(frozen=True)
class StageResult:
    stage: str
    run: str
    outputs: tuple[str, ...]
    seconds: float
    reports: tuple[object, ...] = ()


@dataclass(frozen=True)
class DryRun:
    model: str
    stages: tuple[StageSummary, ...]
    bits_per_weight: float
    artifact_bytes: int
    peak_bytes: int
    seconds: float


class Pipeline(types.ModuleType):
    """Stands for accullm_cli.pipeline: notes what it is called with, and answers with tiny results."""

    def __init__(self) -> None:
        super().__init__("accullm_cli.pipeline")
        self.calls: list[tuple] = []
        self.reports = (a_report(),)
        self.failure: BaseException | None = None

    def convert_all(self, config, progress, fresh=False):
        self.calls.append(("convert_all", config, fresh))
        progress(Event("calibrate", "skip"))
        if self.failure:
            raise self.failure
        return self.reports

    def run_stage(self, name, config, progress, fresh=False):
        self.calls.append((name, config, fresh))
        reports = self.reports if name == "validate" else ()
        return StageResult(name, "work/m.run", ("out-a", "out-b"), 1.0, reports)

    def dry_run(self, config):
        self.calls.append(("dry_run", config))
        stages = (StageSummary("calibrate", "new", True, 61.0, 1_500_000_000),)
        return DryRun(config.model, stages, 4.4, 130_000_000, 2_000_000_000, 3700.0)

    def validate_artifact(self, artifact, config, progress):
        self.calls.append(("validate_artifact", artifact, config))
        return self.reports[0]


@pytest.fixture
def pipeline(monkeypatch):
    import accullm_cli

    fake = Pipeline()
    monkeypatch.setitem(sys.modules, "accullm_cli.pipeline", fake)
    monkeypatch.setattr(accullm_cli, "pipeline", fake, raising=False)
    return fake


@pytest.fixture
def accullm(capsys):
    """Run one command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(arguments)
        return (left.value.code, *capsys.readouterr())

    return run


def child(*arguments: str, **settings) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accullm_cli", *arguments]
    environment = {**os.environ, **settings.pop("env", {})}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60, **settings)


# -- what is printed ---------------------------------------------------------------------------------------


def test_convert_prints_the_artifact_on_stdout_and_everything_else_on_stderr(accullm, pipeline):
    code, out, err = accullm("convert", "m")
    assert (code, out) == (0, "work/m-int4\n")
    assert err.startswith("calibrate: up to date\n\nmodel ")
    assert "mean KL" in err


def test_quiet_leaves_only_the_path(accullm, pipeline):
    assert accullm("convert", "m", "--quiet") == (0, "work/m-int4\n", "")


def test_each_format_has_its_line(accullm, pipeline):
    pipeline.reports = (a_report("a"), a_report("b"))
    assert accullm("convert", "m", "--quiet")[:2] == (0, "a\nb\n")


def test_json_is_one_object_with_all_reports(accullm, pipeline):
    pipeline.reports = (a_report("a"), a_report("b"))
    code, out, _ = accullm("convert", "m", "--json")
    content = json.loads(out)
    assert (code, content["schema_version"]) == (0, 1)
    assert [report["artifact"] for report in content["reports"]] == ["a", "b"]
    schema = json.loads((ROOT / "docs" / "report.schema.json").read_text())
    content["reports"][0]["fidelity"]["kl_histogram"] = []  # its last edge is infinite, which JSON writes as null
    jsonschema.validate(content["reports"][0], schema)


def test_a_missed_contract_is_exit_code_3_with_the_path_still_printed(accullm, pipeline):
    pipeline.reports = (a_report(clauses=(MISSED,)),)
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
        "bits per weight  4.4",
        "artifact bytes   130 MB",
        "peak bytes       2 GB",
        "seconds          1 h 01 min",
        "",
        "stages:",
        "  name       reason  ran  seconds     peak bytes",
        "  calibrate  new     yes  1 min 01 s  1.5 GB",
    ]


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
    pipeline.reports = (a_report(clauses=(MISSED,)),)
    extra = ["--original", original] if original else []
    assert accullm("validate", str(tmp_path), "--validation-windows", "3", *extra)[0] == 3
    [(name, artifact, config)] = pipeline.calls
    assert (name, artifact) == ("validate_artifact", tmp_path)
    assert (config.model, config.validation.windows) == (original or str(tmp_path), 3)


def test_original_without_an_artifact_is_refused(accullm, pipeline):
    assert accullm("validate", "m", "--original", "o") == (
        2,
        "",
        "error: m: is not an artifact; --original goes with an artifact's directory\n",
    )


# -- flags -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", CONVERTING)
@pytest.mark.parametrize("option", list(options()), ids=lambda option: option.flag)
def test_every_option_is_a_flag_of_every_converting_command(accullm, pipeline, command, option):
    value = [] if option.kind == "boolean" else [option.example]
    assert accullm(command, "m", option.flag, *value)[0] == 0
    section, name = option.key.split(".")
    got = getattr(getattr(pipeline.calls[0][1], section), name)
    wanted = {"integer": int, "number": lambda text: float(text.strip("%")) / 100 if "%" in text else float(text)}
    expected = True if option.kind == "boolean" else wanted.get(option.kind, str)(option.example)
    assert ([str(item) for item in got] if option.repeatable else got if option.kind != "path" else str(got)) == (
        [expected] if option.repeatable else expected
    )


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


def test_repeated_flags_make_a_list(accullm, pipeline):
    accullm("convert", "m", "--format", "accullm", "--format", "compressed-tensors")
    assert pipeline.calls[0][1].export.format == ["accullm", "compressed-tensors"]


def test_a_negative_value_is_no_flag(accullm, pipeline):
    accullm("convert", "m", "--group-size", "-1")
    assert pipeline.calls[0][1].plan.group_size == -1


# -- usage errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["convrt", "m"], "accullm: no such command 'convrt'; did you mean 'convert'?"),
        (["qqq"], "accullm: no such command 'qqq'; see accullm --help"),
        (["convert", "m", "--bist", "4"], "accullm convert: no such option --bist; did you mean --bits?"),
        (["convert", "m", "--qqq"], "accullm convert: no such option --qqq; see accullm convert --help"),
        (["convert", "m", "n"], "accullm convert: got unexpected extra argument(s) (n); see accullm convert --help"),
        (["convert", "m", "--bits"], "accullm: option '--bits' requires an argument; see accullm --help"),
        (["inspect"], "accullm inspect: missing argument 'PATH'; see accullm inspect --help"),
        (["convert", "m", "--bits", "9"], "--bits: 9 is above 8; give 2 to 8"),
        (["convert", "m", "--set", "bits=4"], "--set bits: unknown key; did you mean plan.bits?"),
        (["convert", "m", "--config", "fsat"], "--config: fsat is neither a file nor a preset; did you mean fast?"),
        (
            ["convert"],
            "MODEL: not given; name a directory, a GGUF file, a hub id or an alias, "
            "or set `model` in the --config file",
        ),
    ],
)
def test_a_usage_error_is_one_line_and_exit_code_2(accullm, arguments, line):
    assert accullm(*arguments) == (2, "", f"error: {line}\n")


def test_no_command_at_all_shows_the_help_and_exits_with_2(accullm):
    code, out, err = accullm()
    assert (code, err) == (2, "")
    assert "Usage: accullm" in out


# -- errors ------------------------------------------------------------------------------------------------


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


MEMORY = (
    "out of memory; give fewer --samples or a shorter --seq-len, or free memory, "
    "and run the same command again to resume"
)


@pytest.mark.parametrize(
    ("failure", "code", "line"),
    [
        (AccullmError("holds NaN", "norm.weight", "download it again"), 2, "norm.weight: holds NaN; download it again"),
        (AccullmError("two\nlines"), 2, "two lines"),
        (MachineError("full", "/x", "free some"), 4, "/x: full; free some"),
        (MemoryError(), 4, MEMORY),
        (OutOfMemoryError("CUDA out of memory."), 4, MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), 4, MEMORY),
        (
            KeyError("x"),
            1,
            "KeyError: 'x'; this is a fault of accullm; run with --verbose for the traceback",
        ),
        (
            RuntimeError("a\nb"),
            1,
            "RuntimeError: a b; this is a fault of accullm; run with --verbose for the traceback",
        ),
    ],
)
def test_a_failure_is_one_line_with_its_exit_code(accullm, pipeline, failure, code, line):
    pipeline.failure = failure
    assert accullm("convert", "m", "--quiet") == (code, "", f"error: {line}\n")


def test_a_full_disk_is_the_machines_limit_whoever_noticed_it(accullm, pipeline, tmp_path):
    pipeline.failure = OSError(28, "No space left on device", str(tmp_path))
    code, _, err = accullm("convert", "m", "--quiet")
    assert code == 4
    assert err.startswith(f"error: {tmp_path}: no space left on the disk (")


def test_verbose_shows_the_traceback_of_a_fault(accullm, pipeline):
    pipeline.failure = KeyError("x")
    code, out, err = accullm("convert", "m", "--verbose")
    assert (code, out) == (1, "")
    assert "Traceback (most recent call last)" in err
    assert err.endswith("error: KeyError: 'x'; this is a fault of accullm; please report it with the traceback above\n")


# -- questions ---------------------------------------------------------------------------------------------


@pytest.fixture
def answer(monkeypatch):
    """Put a fake accullm_cli.commands.NAME in place, whose function answers with `value`."""

    def put(name: str, value: object) -> list:
        calls: list = []
        module = types.ModuleType(f"accullm_cli.commands.{name}")
        setattr(module, name, lambda *args, **kwargs: (calls.append((args, kwargs)), value)[1])
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return calls

    return put


@dataclass(frozen=True)
class Comparison:
    mean_kl: float
    exceeded: tuple[str, ...]


@dataclass(frozen=True)
class Verification:
    files: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    required: bool
    detail: str
    hint: str


@dataclass(frozen=True)
class Diagnosis:
    checks: tuple[Check, ...]


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


# -- every command and option is documented ----------------------------------------------------------------


@pytest.mark.parametrize("name", list(cli.HELP))
def test_every_command_has_help_an_example_of_itself_and_help_for_each_parameter(name):
    command = get_command(cli.app).commands[name]
    assert command.help.endswith(".") or ". " in command.help
    assert f"accullm {name}" in command.epilog
    for parameter in command.params:
        assert parameter.help, parameter.name


@pytest.mark.parametrize("example", [line for _, examples in cli.HELP.values() for line in examples])
def test_every_example_parses(accullm, pipeline, answer, example):
    import shlex

    for name, value in {
        "inspect": Verification((), ()),
        "compare": Comparison(0.0, ()),
        "verify": Verification((), ()),
        "doctor": Diagnosis(()),
        "models": (),
    }.items():
        answer(name, value)
    words = shlex.split(example.removeprefix("art=$(").removesuffix(")").partition(" > ")[0])
    assert words[0] == "accullm"
    code, _, err = accullm(*words[1:])
    # The demo's artifact is not there in a test, so that --original has none to go with.
    assert (code, "not an artifact" in err) == ((2, True) if "--original" in words else (0, False))


def test_the_docs_are_as_the_code_declares_them():
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "generate_docs.py"), "--check"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (result.stdout, result.returncode) == ("", 0), result.stdout + result.stderr


# -- speed, completion, signals, pipes ---------------------------------------------------------------------

LIGHT = (
    "import sys\n"
    "from accullm_cli.cli import main\n"
    "try: main()\n"
    "finally:\n"
    "    heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'safetensors', 'huggingface_hub'}\n"
    "    print('HEAVY', sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
)


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["--help"], {}),
        (["convert", "--help"], {}),
        (["convert", "m", "--bits", "9"], {}),
        (["convert", "m", "--bist", "9"], {}),
        (["schema"], {}),
        ([], {"_ACCULLM_COMPLETE": "complete_bash", "COMP_WORDS": "accullm convert ", "COMP_CWORD": "2"}),
    ],
)
def test_help_usage_errors_and_completion_import_nothing_heavy(arguments, environment):
    result = subprocess.run(
        [sys.executable, "-c", LIGHT, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert result.stderr.splitlines()[-1] == "HEAVY []"


def completions(words: str) -> list[str]:
    position = str(len(words.split(" ")) - 1)
    result = child(env={"_ACCULLM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": position})
    return result.stdout.split()


def test_completion_knows_commands_flags_choices_presets_keys_and_aliases():
    assert completions("accullm conv") == ["convert"]
    assert completions("accullm convert m --outlier") == ["--outliers", "--outlier-mode"]
    assert completions("accullm convert m --rounding s") == ["stochastic"]
    assert completions("accullm convert m --config g") == ["golden"]
    assert completions("accullm convert m --set plan.b") == ["plan.bits="]
    aliases = sorted(path.stem for path in (ROOT / "configs" / "models").glob("ll*.yaml"))
    assert completions("accullm convert ll") == aliases
    assert completions("accullm convert test") == ["tests/"]


SLOW = (
    "import sys, time, types\n"
    "fake = types.ModuleType('accullm_cli.pipeline')\n"
    "def convert_all(config, progress, fresh=False):\n"
    "    print('working', flush=True)\n"
    "    time.sleep(30)\n"
    "fake.convert_all = convert_all\n"
    "sys.modules['accullm_cli.pipeline'] = fake\n"
    "import accullm_cli; accullm_cli.pipeline = fake\n"
    "from accullm_cli.cli import main\n"
    "main(['convert', 'm'])\n"
)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_is_one_line_and_can_be_resumed(number, code):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "working\n"
    began = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (code, "", "interrupted; run the same command again to resume\n")
    assert time.monotonic() - began < 10


def test_a_reader_that_goes_away_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "accullm_cli", "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=20) == 0


def test_the_module_is_the_command():
    result = child("--version")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("accullm ")


def test_the_public_names_come_from_the_package():
    import accullm_cli
    from accullm_cli.config import Config

    assert accullm_cli.Config is Config
    assert {"Config", "convert", "Report", "AccullmError"} <= set(accullm_cli.__all__)
    with pytest.raises(AttributeError, match="module 'accullm_cli' has no attribute 'nothing'"):
        accullm_cli.nothing  # noqa: B018
