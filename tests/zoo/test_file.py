"""Zoo files: shared and own settings, patterns, and every refusal with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from accullm_cli.errors import AccullmError
from accullm_cli.zoo.file import read_zoo

SHARED = "plan:\n  bits: 5\nvalidation:\n  require: [mean_kl<=0.1]\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "zoo.yaml"
    path.write_text(text)
    return path


def test_an_entry_has_the_shared_settings_and_its_own(tmp_path: Path) -> None:
    text = f"""{SHARED}models:
  - llama-7b
  - model: owner/name@main
    plan: {{bits: 4.4}}
    validation: {{require: [top1_agreement>=0.9]}}
  - model: there/model
    export: {{out: mine}}
"""
    zoo = read_zoo(write(tmp_path, text))
    first, second, third = (entry.config for entry in zoo.entries)
    assert [entry.where for entry in zoo.entries] == [f"{tmp_path}/zoo.yaml:{line}" for line in (6, 7, 10)]
    assert (first.model, first.plan.bits, first.validation.require) == ("llama-7b", 5, ["mean_kl<=0.1"])
    assert (second.plan.bits, second.plan.is_average) == (4.4, True)
    assert second.validation.require == ["top1_agreement>=0.9"]
    assert [config.export.out for config in (first, second, third)] == [
        Path("zoo-out/llama-7b-int5"),
        Path("zoo-out/name-int4.4"),
        Path("mine"),
    ]
    assert [entry.name for entry in zoo.entries] == ["llama-7b-int5", "name-int4.4", "mine"]
    assert zoo.out == Path("zoo-out")


def test_the_directory_of_all_is_in_the_file_or_a_flag(tmp_path: Path) -> None:
    path = write(tmp_path, "export: {out: here}\nmodels: [llama-7b]\n")
    assert read_zoo(path).entries[0].config.export.out == Path("here/llama-7b-int4")
    zoo = read_zoo(path, out=Path("there"))
    assert (zoo.out, zoo.entries[0].config.export.out) == (Path("there"), Path("there/llama-7b-int4"))


def test_a_pattern_stands_for_the_directories_and_gguf_files_that_match(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / "models" / name).mkdir(parents=True)
    for name in ("c.gguf", "notes.txt"):
        (tmp_path / "models" / name).touch()
    text = f"models:\n  - model: {tmp_path}/models/*\n    plan: {{bits: 3}}\n"
    zoo = read_zoo(write(tmp_path, text))
    assert [entry.config.model for entry in zoo.entries] == [
        f"{tmp_path}/models/{name}" for name in ("a", "b", "c.gguf")
    ]
    assert [entry.name for entry in zoo.entries] == ["a-int3", "b-int3", "c-int3"]


def test_presets_come_before_what_all_models_share(tmp_path: Path) -> None:
    path = write(tmp_path, "calibration: {seq_len: 64}\nmodels: [llama-7b]\n")
    plain, fast = (read_zoo(path, files).entries[0].config for files in ((), ("fast",)))
    assert plain.calibration.seq_len == fast.calibration.seq_len == 64
    assert fast.calibration.samples != plain.calibration.samples


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "{f}: holds no mapping of keys; write `models:` and below it, indented, `- MODEL` for each"),
        ("- a\n", "{f}: holds no mapping of keys; write `models:` and below it, indented, `- MODEL` for each"),
        (SHARED, "{f}: names no models; write `models:` and below it, indented, `- MODEL` for each"),
        (
            "models: a\n",
            "{f}:1: models: is not a list of models; write `models:` and below it, indented, `- MODEL` for each",
        ),
        (
            "models: []\n",
            "{f}:1: models: is not a list of models; write `models:` and below it, indented, `- MODEL` for each",
        ),
        ("models: [a/b]\nmodels: [c/d]\n", "{f}:2: models: given twice (first in line 1); keep one of the two"),
        (
            "model: a/b\nmodels: [a/b]\n",
            "{f}:1: model: a zoo has models; write `models:` and below it, indented, `- MODEL` for each",
        ),
        ("plan: {bit: 4}\nmodels: [a/b]\n", "{f}:1: plan.bit: unknown key; did you mean plan.bits?"),
        ("models:\n  - model: a/b\n    bits: 4\n", "{f}:3: bits: unknown key; did you mean plan.bits?"),
        ("models:\n  - plan: {bits: 4}\n", "{f}:2: names no model; write `model: MODEL` there"),
        ("models:\n  - model: a/b\n    plan: {bits: 9}\n", "{f}:3: plan.bits: 9 is above 8; give 2 to 8"),
        (
            "plan: {bits: 9}\nmodels:\n  - model: a/b\n    plan: {bits: 4}\n",
            "{f}:1: plan.bits: 9 is above 8; give 2 to 8",
        ),
        (
            "models:\n  - [a/b]\n",
            "{f}:2: a list is not a mapping of keys; write `plan:` and below it, indented, `bits: VALUE`",
        ),
        (
            f"models:\n  - {300 * 'a'}/*\n",
            f"{{f}}:2: model: no directory and no GGUF file matches {300 * 'a'}/*; check its spelling",
        ),
        (
            "models:\n  - {d}/none/*\n",
            "{f}:2: model: no directory and no GGUF file matches {d}/none/*; check its spelling",
        ),
        (
            "models:\n  - a/x\n  - b/x\n",
            "{f}:3: a/x and b/x would both write to zoo-out/x-int4; give each a export.out of its own",
        ),
        (
            "machine: {run: r}\nmodels:\n  - a/x\n  - b/y\n",
            "{f}:4: a/x and b/y would both write to r; give each a machine.run of its own",
        ),
        (
            "validation: {summary: s.md}\nmodels:\n  - a/x\n  - b/y\n",
            "{f}:4: a/x and b/y would both write to s.md; give each a validation.summary of its own",
        ),
        ("models: [a\n", "{f}:2: not valid YAML (expected ',' or ']', but got '<stream end>'); correct this line"),
    ],
)
def test_a_zoo_file_that_makes_no_sense(text: str, line: str, tmp_path: Path) -> None:
    path = write(tmp_path, text.replace("{d}", str(tmp_path)))
    with pytest.raises(AccullmError) as refused:
        read_zoo(path)
    assert refused.value.line() == line.replace("{f}", str(path)).replace("{d}", str(tmp_path))
    assert refused.value.exit_code == 2


def test_a_zoo_is_read_without_anything_heavy(tmp_path: Path) -> None:
    import subprocess
    import sys

    path = write(tmp_path, "models: [llama-7b]\n")
    code = f"import sys, pathlib, accullm_cli.zoo.file as file; file.read_zoo(pathlib.Path({str(path)!r}))"
    code += "; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
