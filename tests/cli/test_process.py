"""The command as a process: how fast it answers, completion, signals, pipes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import types

import pytest

from accullm_cli import cli
from tests.cli.fakes import (
    ROOT,
)

LIGHT = (
    "import sys\n"
    "from accullm_cli.cli import main\n"
    "try: main()\n"
    "finally:\n"
    "    heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'safetensors', 'huggingface_hub'}\n"
    "    print('HEAVY', sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
)


def child(*arguments: str, **settings) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accullm_cli", *arguments]
    environment = {**os.environ, **settings.pop("env", {})}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60, **settings)


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
    assert completions("accullm convert m --outlier") == ["--outliers", "--outlier-adapter", "--outlier-mode"]
    assert completions("accullm convert m --rounding s") == ["stochastic"]
    assert completions("accullm convert m --config b") == ["best"]
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


# -- threads that wait -------------------------------------------------------------------------------------


def test_waiting_threads_sleep():
    """By what the OpenMP runtime says that it read when a command loaded torch: one that loads little else."""
    environment = {name: value for name, value in os.environ.items() if name not in cli.WAITING}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE", "PYTHONPATH": str(ROOT)}
    program = "from accullm_cli.cli import main; main(['verify', 'no/such/artifact'])"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    lines = [line.partition("] ")[2] or line for line in ended.stderr.splitlines() if " = " in line]
    read = {name.strip(): value.strip().strip("'") for name, _, value in (line.partition(" = ") for line in lines)}
    if "GOMP_SPINCOUNT" not in read:
        pytest.skip("torch does not run on libgomp here")
    assert (read["OMP_WAIT_POLICY"], read["GOMP_SPINCOUNT"]) == ("PASSIVE", "0")


@pytest.mark.parametrize("name", [*cli.WAITING, None])
def test_what_the_user_says_of_waiting_stands(name, monkeypatch):
    for other in cli.WAITING:
        monkeypatch.setenv(other, "")
        monkeypatch.delenv(other)
    monkeypatch.delitem(sys.modules, "torch")
    if name is not None:
        monkeypatch.setenv(name, "as the user says")
    cli.let_waiting_threads_sleep()
    expected = {"OMP_WAIT_POLICY": "PASSIVE"} if name is None else {name: "as the user says"}
    assert {name: os.environ[name] for name in cli.WAITING if name in os.environ} == expected


def test_where_torch_is_there_already_the_environment_is_left_alone(monkeypatch):
    for name in cli.WAITING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    cli.let_waiting_threads_sleep()
    assert "OMP_WAIT_POLICY" not in os.environ


@pytest.mark.parametrize("is_loaded", [False, True])
def test_few_compiled_products_are_kept_unless_the_user_or_a_torch_that_is_there_says_otherwise(is_loaded, monkeypatch):
    first, second = cli.PROGRAMS
    monkeypatch.setenv(first, "7")
    monkeypatch.setenv(second, "")
    monkeypatch.delenv(second)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    if is_loaded:
        monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    cli.keep_few_compiled_products()
    assert (os.environ[first], os.environ.get(second)) == ("7", None if is_loaded else "32")


def test_what_a_command_says_of_compiled_products_reaches_onednn():
    """Products of 200 shapes leave much less memory than where all of their programs are kept."""
    program = (
        "import sys\n"
        "from accullm_cli import cli\n"
        "cli.keep_few_compiled_products()\n"
        "import torch\n"
        "from accullm_cli.run import peak_memory\n"
        "from accullm_cli.stages.precision import products\n"
        "weight, before = torch.randn(64, 64), 0\n"
        "with torch.no_grad(), products('float32'):\n"
        "    for tokens in range(300, 500):\n"
        "        torch.nn.functional.linear(torch.randn(tokens, 64), weight)\n"
        "        before = before or peak_memory()\n"
        "print(peak_memory() - before)\n"
    )
    found = []
    for kept in (None, "1024"):
        environment = {name: value for name, value in os.environ.items() if name not in cli.PROGRAMS}
        environment |= {"PYTHONPATH": str(ROOT)} | (dict.fromkeys(cli.PROGRAMS, kept) if kept else {})
        ended = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
        )
        found.append(int(ended.stdout))
    if found[1] < 50_000_000:
        pytest.skip("torch compiles no products of float32 matrices here")
    assert found[0] < found[1] / 2, found


def test_threads_of_the_commands_that_only_ask_keep_to_the_quota(monkeypatch):
    monkeypatch.setattr(cli, "usable_cores", lambda: 3)
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cli.keep_threads_to_the_quota()
    assert "OMP_NUM_THREADS" not in os.environ  # too late: it was read
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    cli.keep_threads_to_the_quota()
    assert os.environ["OMP_NUM_THREADS"] == "7"
    monkeypatch.delenv("OMP_NUM_THREADS")
    cli.keep_threads_to_the_quota()
    assert os.environ["OMP_NUM_THREADS"] == "3"
