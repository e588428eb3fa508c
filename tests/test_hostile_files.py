"""Files that somebody else wrote, damaged in every way: each is read, or refused in one line, and none leads elsewhere.

scripts/bench_fuzz.py does the same with as many inputs as one likes.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from accullm_cli.commands.verify import verify
from accullm_cli.config_file import load_config
from accullm_cli.errors import AccullmError
from accullm_cli.formats import open_artifact
from accullm_cli.formats.manifest import read_manifest
from accullm_cli.json_text import parse_json
from accullm_cli.model.files import inside
from accullm_cli.model.gguf import import_gguf
from accullm_cli.model.skeleton import build_skeleton
from accullm_cli.model.source import describe_source
from accullm_cli.pipeline import convert
from tests.scripts.loading import load_script
from tests.tiny import edit_config, make_checkpoint, tiny_config

script = load_script("bench_fuzz")
INPUTS = 25
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return script.prepare(tmp_path_factory.mktemp("fuzzed"))


@pytest.fixture(scope="module")
def watch(fuzzed: Any) -> Any:
    return script.Watch(fuzzed.secret)


@pytest.mark.parametrize("kind", script.KINDS)
def test_what_is_damaged_is_read_or_refused_in_one_line(kind: str, fuzzed: Any, watch: Any) -> None:
    attack = script.KINDS[kind][0](fuzzed)
    attack_whole = [script.attempt(attack, seed, watch) for seed in range(INPUTS)]
    assert attack_whole == [""] * INPUTS


# -- what would not be survived ------------------------------------------------------------------------------------


def _loops(seed: int) -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("attack", "why"),
    [
        (lambda seed: None, ""),
        (lambda seed: [][seed], "IndexError: list index out of range"),
        (_loops, "takes more than 0.2 s of a CPU"),
        (lambda seed: pickle.loads(b"cos\nsystem\n."), "leads to pickle.find_class('os', 'system')"),
        (lambda seed: read_manifest(Path("absent")), ""),
    ],
)
def test_what_is_not_survived_is_seen(attack: Any, why: str, watch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "LONGEST", 0.2)
    assert script.attempt(attack, 0, watch) == why


def test_a_look_outside_of_the_directory_is_seen(fuzzed: Any, watch: Any) -> None:
    link = fuzzed.directory / "link"
    link.symlink_to(fuzzed.secret)
    assert script.attempt(lambda seed: link.read_text(), 0, watch) == "reads a file outside of the directory"


def test_a_crash_is_one_fault_and_the_others_go_on(fuzzed: Any, watch: Any) -> None:
    def attack(seed: int) -> None:
        if seed == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if seed == 5:
            raise KeyError(seed)

    faults = list(script.in_slices("x", attack, range(2, 7), watch))
    assert [(fault.seed, fault.why) for fault in faults] == [(3, "the process ended with -9"), (5, "KeyError: 5")]


# -- kinds of files ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("whole") / "model", shard_size="60KB")


@pytest.fixture(scope="module")
def place(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the model that tests may damage, and a file beside it that nobody may read."""
    directory = tmp_path_factory.mktemp("place").resolve()
    shutil.copytree(whole, directory / "model")
    (directory / "secret").write_text("{}")
    return directory / "model"


@pytest.fixture
def damage(whole: Path, place: Path) -> Iterator[Callable[[str, bytes | str], None]]:
    """Writes a file of the model; in the end it is whole again."""
    written: set[str] = set()

    def write(name: str, content: bytes | str) -> None:
        written.add(name)
        (place / name).write_bytes(content.encode() if isinstance(content, str) else content)

    yield write
    for name in written:
        shutil.copy(whole / name, place / name)


def _look_at(place: Path) -> None:
    describe_source(str(place), place.parent / "cache")
    build_skeleton(place)


@pytest.fixture(scope="module")
def artifact(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("artifact").resolve()
    (directory / "secret").touch()
    convert(tiny_config(whole, directory / "out", rounding__method="nearest", rounding__grid="minmax"))
    return directory / "out"


# -- what was found ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        (
            "config.json",
            DEEP,
            "{d}/config.json: not JSON (brackets are nested too deep); download or copy the file again",
        ),
        ("config.json", '{"model_type": ["llama"]}', "{d}/config.json: model_type is not a name; correct the value"),
        (
            "config.json",
            '{"model_type": "llama", "architectures": {"a": 1}}',
            "{d}/config.json: architectures is not a list of names; correct the value",
        ),
        (
            "model.safetensors.index.json",
            DEEP,
            "{d}/model.safetensors.index.json: not an index of shards (brackets are nested too deep); "
            "download it again",
        ),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "b\\u0000c"}}',
            "{d}/model.safetensors.index.json: names 'b\\x00c', which no file can have; download it again",
        ),
    ],
)
def test_what_was_no_single_line(name: str, content: str, line: str, place: Path, damage: Any) -> None:
    damage(name, content)
    with pytest.raises(AccullmError) as refused:
        _look_at(place)
    assert refused.value.line() == line.format(d=place)


def test_a_configuration_that_transformers_cannot_build_with(place: Path, damage: Any) -> None:
    edit_config(place, num_key_value_heads=0)
    damage("config.json", (place / "config.json").read_bytes())  # to be mended in the end
    with pytest.raises(AccullmError, match=r"config\.json: transformers cannot (read|build)"):
        _look_at(place)


@pytest.mark.parametrize("name", ["\ud800", "a/" + "b" * 256, "c" * 5000, "\0"])
def test_a_name_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    with pytest.raises(AccullmError, match="which no file can have; download it again"):
        inside(tmp_path, name, tmp_path)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plan: {bits: !!int ''}", "{f}:1: not valid YAML (string index out of range); put it in quotes"),
        ("plan: {symmetric: !!bool x}", "{f}:1: not valid YAML ('x'); put it in quotes"),
        (DEEP, "{f}: not valid YAML (nested too deep); correct it"),
        ("? [a]\n: b\n", "{f}:1: a key is no word; correct this line"),
        (
            'export: {out: "a\\0b"}',
            "{f}:1: export.out: the text holds a character that is none; take it out",
        ),
    ],
)
def test_yaml_that_was_no_single_line(text: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(AccullmError) as refused:
        load_config("m", [path])
    assert refused.value.line() == line.format(f=path)


def test_a_manifest_that_names_a_file_elsewhere(artifact: Path) -> None:
    path = artifact / "accullm.json"
    content = path.read_text()
    try:
        path.write_text(content.replace('"config.json"', '"../secret"'))
        with pytest.raises(AccullmError, match=r"file '\.\./secret' lies outside"):
            verify(artifact)
    finally:
        path.write_text(content)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ('"bits": 4', '"bits": "4"', "TypeError: the numbers that describe {} are none"),
        ('"bits": 4', '"bits": 0', "ValueError: {} is no linear"),
    ],
)
def test_a_manifest_of_other_things_than_numbers(old: str, new: str, what: str, artifact: Path) -> None:
    path = artifact / "accullm.json"
    content = path.read_text()
    try:
        path.write_text(content.replace(old, new))
        with pytest.raises(AccullmError) as refused:
            read_manifest(artifact)
    finally:
        path.write_text(content)
    line = f"not a manifest of format version 4 ({what.format('model.layers.0.self_attn.q_proj')})"
    assert refused.value.line() == f"{path}: {line}; copy the artifact again"


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        (
            "tokenizer.ggml.merges",
            ["t q"],
            "holds no tokenizer that transformers can read (Exception('Error while initializing BPE: Token `tq` out of "
            "vocabulary'))",
        ),
        (
            "llama.embedding_length",
            "x",
            "metadata llama.embedding_length = x cannot be followed by transformers' class",
        ),
        ("llama.attention.head_count", 5, "architecture llama is not a causal language model of transformers ("),
    ],
)
def test_a_gguf_file_that_transformers_cannot_read(key: str, value: Any, line: str, tmp_path: Path) -> None:
    metadata, tensors = script.gguf_model()
    path = tmp_path / "a.gguf"
    path.write_bytes(script.gguf_head(metadata | {key: value}, tensors) + script.gguf_data(tensors))
    for read in (lambda: import_gguf(path, tmp_path / "out"), lambda: open_artifact(path)):
        with pytest.raises(AccullmError) as refused:
            read()
        assert refused.value.line().startswith(f"{path}: {line}")
        assert refused.value.line().endswith("; give the model's safetensors checkpoint")


def test_json_is_parsed_as_before() -> None:
    assert parse_json('{"a": [1, "é"]}') == {"a": [1, "é"]}
