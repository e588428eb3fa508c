"""`accullm models`, and every alias file."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from accullm_cli.commands.models import models
from accullm_cli.errors import AccullmError
from accullm_cli.model.alias import aliases, read_alias
from accullm_cli.model.hub import parse_hub_id
from accullm_cli.resources import resource

REQUIRED = (
    "llama-7b llama-2-7b llama-3.1-8b mistral-7b qwen2.5-7b qwen3-8b gemma-3-4b phi-3.5-mini smollm2-135m".split()
)
FILES = sorted(resource("configs", "models").iterdir())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_alias_file_is_complete(path: Path) -> None:
    alias = read_alias(path)
    assert path.suffix == ".yaml"
    assert alias.name == path.stem == path.stem.lower()
    assert parse_hub_id(alias.source) is not None
    # Published in 16 bits: two bytes a parameter, and headers of less than a thousandth of it.
    assert 2 * alias.parameters <= alias.size < 2.002 * alias.parameters
    assert alias.license
    assert alias.notes.endswith(".")


def test_the_well_known_models_have_aliases() -> None:
    assert set(REQUIRED) <= set(aliases())


def test_lists_every_alias_with_its_facts_and_whether_it_is_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--Qwen--Qwen3-8B" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--Qwen--Qwen3-8B" / "refs").mkdir()
    (tmp_path / "models--Qwen--Qwen3-8B" / "refs" / "main").write_text("abc")
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_text("{}")
    listed = models()
    assert [model.name for model in listed] == sorted(path.stem for path in FILES)
    assert [model.name for model in listed if model.cached] == ["qwen3-8b"]
    [smollm] = [model for model in listed if model.name == "smollm2-135m"]
    assert (smollm.source, smollm.parameters, smollm.size, smollm.license) == (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        134515008,
        269030016,
        "Apache-2.0",
    )


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("source: a/b\nparameters: 1\nsize: 2\nlicense: x\nextra: 1\n", "extra: Extra inputs are not permitted"),
        ("source: a/b\nparameters: 0\nsize: 2\nlicense: x\n", "parameters: Input should be greater than 0"),
        ("source: a\nparameters: 1\nsize: 2\nlicense: x", "source: String should match pattern '^[\\w.-]+/[\\w.-]+$'"),
        ("source: a/b\nparameters: 1\nsize: 2\n", "license: Field required"),
        ("[1]", "not keys with values"),
        ("a: [", 'not YAML (while parsing a flow node expected the node content, but found \'<stream end>\' in '
                 '"<unicode string>", line 1, column 5: a: [ ^)'),
    ],
)  # fmt: skip
def test_an_alias_file_that_breaks_the_schema_is_one_line(tmp_path: Path, content: str, line: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(AccullmError) as caught:
        read_alias(path)
    assert caught.value.line() == f"{path}: {line}"
