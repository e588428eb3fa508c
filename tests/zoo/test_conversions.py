"""Many models by one call: what is checked first, what becomes of each, and how the call ends."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from accullm_cli import cli, pipeline
from accullm_cli.cli import Interrupted
from accullm_cli.progress import Event
from tests.end_to_end.test_resume import contents
from tests.tiny import edit_config, make_checkpoint

SHARED = """
calibration: {samples: 2, seq_len: 32}
plan: {group_size: 32}
rounding: {method: nearest, grid: minmax}
validation: {windows: 2, other_text: none, require: [mean_kl<=9]}
machine: {threads: 1}
"""

Accullm = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture
def zoo(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with two models, and a file that names them all."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        shutil.copytree(model, tmp_path / "models" / name)
    (tmp_path / "zoo.yaml").write_text(f"{SHARED}models: [models/*]\n")
    return tmp_path


@pytest.fixture
def accullm(capsys: pytest.CaptureFixture[str]) -> Accullm:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(("zoo", "zoo.yaml", *arguments))
        return (int(str(left.value.code)), *capsys.readouterr())

    return run


def test_all_models_convert_into_one_table_one_page_and_the_files_that_were_asked_for(
    zoo: Path, accullm: Accullm
) -> None:
    code, out, err = accullm("--junit", "zoo.xml", "--summary", "zoo.md")
    assert (code, out) == (0, "zoo-out/a-int4\nzoo-out/b-int4\n")
    lines = err.splitlines()
    begins = [line for line in lines if ": quantize: runs" in line]
    assert begins == ["a-int4: quantize: runs, new", "b-int4: quantize: runs, new"]
    table = lines[lines.index("") + 1 :]
    assert re.split(r"  +", table[0].strip())[:3] == ["model", "format", "bits per weight"]
    assert [line.split()[:3] for line in table[1:]] == [["met", f"models/{name}", "accullm"] for name in ("a", "b")]
    page = (zoo / "zoo-out" / "zoo.html").read_text()
    assert "2 of 2 models converted" in page
    for name in ("a", "b"):
        link = f"{name}-int4.run/report/accullm/report.html"
        assert f'href="{link}"' in page
        assert (zoo / "zoo-out" / link).exists()
    assert (zoo / "zoo.md").read_text().startswith("# ✅ 2 of 2 models converted\n\n|  | model | format |")
    suites = ElementTree.parse(zoo / "zoo.xml").getroot()
    assert [suite.get("name") for suite in suites] == [f"zoo-out/{name}-int4: contract" for name in ("a", "b")]

    code, out, err = accullm("--json")
    assert (code, err.count(": up to date")) == (0, 14)
    results = json.loads(out)["zoo"]
    assert [(result["name"], result["exit_code"], result["error"]) for result in results] == [
        ("a-int4", 0, ""),
        ("b-int4", 0, ""),
    ]
    assert results[0]["reports"][0]["artifact"] == "zoo-out/a-int4"


def test_a_missed_contract_is_exit_code_3_and_all_others_are_done(zoo: Path, accullm: Accullm) -> None:
    own = "  - {model: models/a, validation: {require: [mean_kl<=0]}}\n  - models/b\n"
    (zoo / "zoo.yaml").write_text(f"{SHARED}models:\n{own}")
    code, out, err = accullm("--quiet")
    assert (code, out) == (3, "zoo-out/a-int4\nzoo-out/b-int4\n")
    assert re.fullmatch(r"error: zoo-out/a-int4: the contract is not met: mean_kl<=0 \(measured [\d.]+\)\n", err)


@pytest.mark.parametrize(
    ("failure", "code", "line"),
    [
        (MemoryError(), 4, "out of memory; give fewer --samples or a shorter --seq-len, or free memory, and"),
        (ValueError("odd"), 1, "ValueError: odd; this is a fault of accullm; run with --verbose for the traceback"),
    ],
)
def test_a_model_that_fails_is_a_row_and_the_others_go_on(
    failure: Exception, code: int, line: str, zoo: Path, accullm: Accullm, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_all = pipeline.convert_all

    def fail(config: object, *others: object) -> object:
        if config.model == "models/a":
            raise failure
        return convert_all(config, *others)

    monkeypatch.setattr(pipeline, "convert_all", fail)
    ended, out, err = accullm("--junit", "zoo.xml", "--summary", "zoo.md")
    assert (ended, out) == (code, "zoo-out/b-int4\n")
    assert f"error: models/a: {line}" in err.splitlines()[-1]
    row = next(entry for entry in err.splitlines() if entry.startswith("failed"))
    assert row.split()[1] == "models/a"
    assert line in row
    assert "1 of 2 models converted, 1 failed" in (zoo / "zoo-out" / "zoo.html").read_text()
    assert (zoo / "zoo.md").read_text().startswith("# ❌ 1 of 2 models converted, 1 failed\n")
    failed = ElementTree.parse(zoo / "zoo.xml").getroot()[0]
    assert (failed.get("name"), failed.get("failures")) == ("zoo: models", "1")


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (
            lambda zoo: (zoo / "zoo.yaml").write_text(f"{SHARED}models: [models/a, models/none/]\n"),
            "zoo.yaml:7: models/none/: no directory, GGUF file, alias or hub id (owner/name) of this name; "
            "'accullm models' lists the aliases",
        ),
        (
            lambda zoo: (zoo / "models" / "b" / "config.json").unlink(),
            "zoo.yaml:7: {models}/b: holds no config.json; give a Hugging Face model directory",
        ),
        (
            lambda zoo: edit_config(zoo / "models" / "b", model_type="fancynet"),
            "zoo.yaml:7: {models}/b/config.json: model type fancynet is unknown to the installed transformers; "
            "a newer transformers may know it",
        ),
        (
            lambda zoo: (zoo / "zoo.yaml").write_text(
                f"{SHARED}models:\n  - models/a\n"
                "  - {model: models/b, plan: {bits: 5}, export: {format: [awq]}}\n"
            ),
            "zoo.yaml:9: --format awq: awq holds 4 bits, and model.layers.0.self_attn.q_proj has 5 (and 13 more); "
            "use --bits 4, or export to the format accullm",
        ),
    ],
)
@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_what_cannot_work_is_refused_before_the_first_model(
    flags: tuple[str, ...], spoil: Callable[[Path], object], line: str, zoo: Path, accullm: Accullm
) -> None:
    spoil(zoo)
    assert accullm(*flags) == (2, "", f"error: {line.format(models=zoo / 'models')}\n")
    assert not (zoo / "zoo-out").exists()


def test_a_dry_run_is_a_table_of_estimates_and_writes_nothing(
    zoo: Path, accullm: Accullm, monkeypatch: pytest.MonkeyPatch
) -> None:
    (zoo / "zoo.yaml").write_text(f"{SHARED}models: [models/*, owner/far-away]\n")
    before = contents(zoo)
    code, out, err = accullm("--dry-run", "--json")
    assert (code, err, contents(zoo)) == (0, "", before)
    first, second, third = json.loads(out)["zoo"]
    assert (first["model"], first["artifact"]) == ("models/a", "zoo-out/a-int4")
    assert {**second, "model": "", "artifact": "", "seconds": 0} == {**first, "model": "", "artifact": "", "seconds": 0}
    assert first["peak_bytes"] > first["disk_bytes"] > first["artifact_bytes"] > 0
    assert (third["model"], third["artifact_bytes"]) == ("owner/far-away", None)
    monkeypatch.setattr("accullm_cli.model.source.ContentHashes", None)  # no content is read
    code, out, err = accullm("--dry-run")
    assert (code, err) == (0, "")
    assert re.split(r"  +", out.splitlines()[0]) == [
        *("model", "format", "artifact", "bits per weight", "artifact bytes", "size is exact", "peak bytes"),
        *("disk bytes", "seconds"),
    ]


def test_interrupted_it_resumes_where_it_was(zoo: Path, accullm: Accullm, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def interrupt(event: Event) -> None:
        seen.append(event.stage)
        if event.stage == "b-int4: quantize":
            raise Interrupted(2)

    from accullm_cli.console import Console

    with monkeypatch.context() as patch:
        patch.setattr(Console, "progress", lambda console, event: interrupt(event))
        assert accullm()[0] == 130
    assert "1 of 2 models converted" in (zoo / "zoo-out" / "zoo.html").read_text()
    code, _, err = accullm()
    assert code == 0
    assert [line for line in err.splitlines() if ": quantize: " in line] == [
        "a-int4: quantize: up to date",
        "b-int4: quantize: runs, new",
        *[line for line in err.splitlines() if line.startswith("b-int4: quantize: done")],
    ]
    assert not (zoo / ".zoo-out.lock").exists()


def test_two_calls_do_not_share_a_zoo(zoo: Path, accullm: Accullm) -> None:
    from accullm_cli.run import locked_output

    with locked_output(zoo / "zoo-out"):
        code, out, err = accullm("--quiet")
    assert (code, out) == (2, "")
    assert err.startswith("error: zoo-out: is in use by process ")
