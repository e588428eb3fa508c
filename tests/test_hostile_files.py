"""Files that somebody else wrote, damaged in every way: each is read, or refused in one line, and none leads elsewhere.

ACCULLM_FUZZ=2000 tries as many of each kind; by default there are few, always the same.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accullm_cli.commands.verify import verify
from accullm_cli.config_file import load_config
from accullm_cli.errors import AccullmError
from accullm_cli.formats.manifest import read_manifest
from accullm_cli.json_text import parse_json
from accullm_cli.model.files import inside
from accullm_cli.model.json_lines import parse_json_lines
from accullm_cli.model.skeleton import build_skeleton
from accullm_cli.model.source import describe_source
from accullm_cli.model.tokenizer import load_tokenizer, tokenizer_records
from accullm_cli.model.weights import read_weights
from accullm_cli.pipeline import convert
from accullm_cli.zoo.file import read_zoo
from tests.tiny import edit_config, make_checkpoint, tiny_config

EXAMPLES = int(os.environ.get("ACCULLM_FUZZ", "25"))
FEW = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
DEEP = "[" * 100_000
# In the place of any value of a JSON file. Counts that are merely large are no damage: such models exist.
HOSTILE: list[Any] = [
    *(None, True, -1, 0, 7, 1.5, float("nan"), float("inf"), "", "x", [], {}, [[]], {"": None}),
    *("../secret", "{secret}", "a\0b", "\ud800", "x" * 5000, "models--o--n/blobs/x", [{}], {"a": {"b": []}}),
]


def damaged_bytes(content: bytes, seed: int) -> bytes:
    """A few bytes changed, left out, doubled or put in; or cut short."""
    draw = random.Random(seed)
    damaged = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(damaged) + 1)
        kind = draw.randrange(5)
        if kind == 0:
            damaged[place : place + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            del damaged[place : place + draw.randint(1, 20)]
        elif kind == 2:
            damaged[place:place] = damaged[place : place + draw.randint(1, 50)]
        elif kind == 3:
            damaged[place:place] = draw.choice(
                [b"\0", b"\xff\xfe", b'"', b"{", b"]", b"!!int ''", b"&a *a", b"9" * 5000]
            )
        elif draw.random() < 0.3:
            del damaged[place:]
    return bytes(damaged)


def damaged_json(content: Any, seed: int, secret: Path) -> str:
    """One or two values anywhere replaced or left out."""
    draw = random.Random(seed)
    damaged = json.loads(json.dumps(content))
    for _ in range(draw.randint(1, 2)):
        places = list(_places(damaged))
        if not places:
            break
        holder, key = draw.choice(places)
        if isinstance(holder, dict) and draw.random() < 0.2:
            del holder[key]
            continue
        value = draw.choice(HOSTILE)
        holder[key] = str(secret) if value == "{secret}" else json.loads(json.dumps(value))
    return json.dumps(damaged)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys)[:200]:
        yield value, key
        yield from _places(value[key])


# -- what is opened ------------------------------------------------------------------------------------------------

_opened: list[str] = []
_watching = False


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        _opened.append(os.fsdecode(arguments[0]))


@pytest.fixture(scope="module", autouse=True)
def watch() -> None:
    sys.addaudithook(_note)  # which stays as long as the process


def read_or_refuse(read: Callable[[], object], secret: Path) -> str:
    """The line of the refusal; "" where there is none. Anything else is raised."""
    global _watching
    _opened.clear()
    _watching = True
    line = ""
    try:
        read()
    except AccullmError as error:
        line = error.line()
    finally:
        _watching = False
    assert not [name for name in _opened if os.path.realpath(name) == str(secret)]
    return line


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


@FEW
@given(seed=st.integers(0, 2**32), as_json=st.booleans())
def test_config_json(seed: int, as_json: bool, place: Path, whole: Path, damage: Any) -> None:
    content = (whole / "config.json").read_bytes()
    secret = place.parent / "secret"
    damage("config.json", damaged_json(json.loads(content), seed, secret) if as_json else damaged_bytes(content, seed))
    read_or_refuse(lambda: _look_at(place), secret)


@FEW
@given(seed=st.integers(0, 2**32), as_json=st.booleans())
def test_the_index_of_shards(seed: int, as_json: bool, place: Path, whole: Path, damage: Any) -> None:
    name = "model.safetensors.index.json"
    content = (whole / name).read_bytes()
    secret = place.parent / "secret"
    damage(name, damaged_json(json.loads(content), seed, secret) if as_json else damaged_bytes(content, seed))
    read_or_refuse(lambda: read_weights(place, {path.name for path in place.iterdir()}), secret)


@FEW
@given(seed=st.integers(0, 2**32), as_json=st.booleans())
def test_a_shards_header(seed: int, as_json: bool, place: Path, whole: Path, damage: Any) -> None:
    name = "model-00001-of-00004.safetensors"
    content = (whole / name).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    secret = place.parent / "secret"
    if as_json:
        header = damaged_json(json.loads(header), seed, secret).encode()
        damage(name, struct.pack("<Q", len(header)) + header + data)
    else:
        damage(name, damaged_bytes(content[: 8 + length], seed) + data)
    read_or_refuse(lambda: read_weights(place, {path.name for path in place.iterdir()}), secret)


@FEW
@given(
    seed=st.integers(0, 2**32),
    file=st.sampled_from(["tokenizer.json", "tokenizer_config.json"]),
    whole_file=st.booleans(),
)
def test_the_tokenizer(seed: int, file: str, whole_file: bool, place: Path, whole: Path, damage: Any) -> None:
    content = (whole / file).read_bytes()
    secret = place.parent / "secret"
    damage(file, damaged_bytes(content, seed) if whole_file else damaged_json(json.loads(content), seed, secret))
    read_or_refuse(lambda: (load_tokenizer(place), tokenizer_records(place)), secret)


@FEW
@given(seed=st.integers(0, 2**32))
def test_yaml(seed: int, tmp_path: Path) -> None:
    text = 'calibration: {samples: 2, text: "a.txt"}\nplan:\n  bits: 4\n  keep: [a, b]\n'
    text += "validation:\n  require: [mean_kl<=1]\n"
    path = tmp_path / "zoo.yaml"
    secret = tmp_path / "secret"
    secret.touch()
    path.write_bytes(damaged_bytes(text.encode(), seed))
    read_or_refuse(lambda: load_config("m", [path]), secret)
    path.write_bytes(damaged_bytes(f"{text}models:\n  - a/b\n  - {{model: c/d, plan: {{bits: 3}}}}\n".encode(), seed))
    read_or_refuse(lambda: read_zoo(path), secret)


@FEW
@given(seed=st.integers(0, 2**32))
def test_json_lines(seed: int, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a"}], "tools": []},
        {"messages": [{"role": "x", "content": None}]},
    ]
    text = "\n".join(damaged_json(row, seed + number, tmp_path) for number, row in enumerate(rows))
    read_or_refuse(lambda: parse_json_lines(text, tmp_path / "a.jsonl"), tmp_path / "secret")
    changed = damaged_bytes(json.dumps(rows[0]).encode(), seed).decode(errors="replace")
    read_or_refuse(lambda: parse_json_lines(changed, tmp_path / "a.txt"), tmp_path / "secret")


@pytest.fixture(scope="module")
def artifact(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("artifact").resolve()
    (directory / "secret").touch()
    convert(tiny_config(whole, directory / "out", rounding__method="nearest", rounding__grid="minmax"))
    return directory / "out"


@FEW
@given(seed=st.integers(0, 2**32), as_json=st.booleans())
def test_a_manifest(seed: int, as_json: bool, artifact: Path) -> None:
    path = artifact / "accullm.json"
    content, secret = path.read_bytes(), artifact.parent / "secret"
    try:
        damaged = damaged_json(json.loads(content), seed, secret).encode() if as_json else damaged_bytes(content, seed)
        path.write_bytes(damaged)
        read_or_refuse(lambda: read_manifest(artifact), secret)
        read_or_refuse(lambda: verify(artifact), secret)
    finally:
        path.write_bytes(content)


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


def test_json_is_parsed_as_before() -> None:
    assert parse_json('{"a": [1, "é"]}') == {"a": [1, "é"]}
