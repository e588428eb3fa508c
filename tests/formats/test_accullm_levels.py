"""Levels and trellis codes in the native format: what is written and read back, older and damaged files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import accullm_cli.hf  # noqa: F401
from accullm_cli.errors import AccullmError
from accullm_cli.formats import FORMATS, open_artifact
from accullm_cli.formats.accullm import quantization_config
from accullm_cli.quant.plan import Plan
from tests.artifacts import Made, empty, make_parts
from tests.tiny import tiny_llama, tiny_mixtral

Q_PROJ = "model.layers.0.self_attn.q_proj"
UP_PROJ = "model.layers.1.mlp.up_proj"
OUTLIERS = (3, 17)


def make(tmp_path: Path, **options: object) -> tuple[Made, Path]:
    settings = {"symmetric": True, "outliers": OUTLIERS, "scale_bits": 7, "encoding": "levels"} | options
    made = make_parts(tiny_llama(), tmp_path / "run", **settings)  # type: ignore[arg-type]
    directory = empty(tmp_path / "artifact")
    FORMATS["accullm"].write(directory, made.parts)
    return made, directory


@pytest.mark.parametrize("encoding", ["levels", "trellis"])
@pytest.mark.parametrize(("bits", "scale_bits"), [(2, 7), (3, 4), (4, 7), (4, 16), (5, 8)])
def test_they_round_trip(bits: int, scale_bits: int, encoding: str, tmp_path: Path) -> None:
    made, directory = make(tmp_path, bits=bits, scale_bits=scale_bits, encoding=encoding)
    opened = open_artifact(directory)
    assert list(opened.plan.linears.items()) == list(made.parts.plan.linears.items())
    for name, linear in made.linears.items():
        read = opened.linear(name)
        for field in dataclasses.fields(linear):
            wanted, found = getattr(linear, field.name), getattr(read, field.name)
            assert torch.equal(found, wanted) if isinstance(wanted, torch.Tensor) else found == wanted, field.name
        assert opened.linear_bytes(name) == opened.plan.linears[name].stored_bytes
    assert list(opened.problems()) == []


@pytest.mark.parametrize("encoding", ["levels", "trellis"])
def test_experts_beside_integer_embeddings(encoding: str, tmp_path: Path) -> None:
    made = make_parts(
        tiny_mixtral(), tmp_path / "run", bits=3, symmetric=True, encoding=encoding, keep=("down_proj.2",),
        embedding_bits=8,
    )  # fmt: skip
    directory = empty(tmp_path / "artifact")
    FORMATS["accullm"].write(directory, made.parts)
    opened = open_artifact(directory)
    name = "model.layers.1.mlp.experts.gate_up_proj.3"
    assert torch.equal(opened.linear(name).dequantize(), made.linears[name].dequantize())
    assert opened.plan.embeddings["model.embed_tokens"].encoding == "integer"
    assert list(opened.problems()) == []


def test_the_config_says_so_and_an_older_version_is_written_where_there_are_none(tmp_path: Path) -> None:
    made, directory = make(tmp_path)
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert (config["format_version"], config["encoding"], config["scale_bits"]) == (3, "levels", 7)
    assert json.loads((directory / "accullm.json").read_text())["format_version"] == 3
    plan = made.parts.plan
    integer = {name: dataclasses.replace(row, encoding="integer") for name, row in plan.linears.items()}
    mixed = quantization_config(Plan({**plan.linears, UP_PROJ: integer[UP_PROJ]}))
    assert mixed["linears"][UP_PROJ] == {"encoding": "integer"}
    assert mixed["format_version"] == 3
    trellis = {name: dataclasses.replace(row, encoding="trellis", scale_bits=6) for name, row in plan.linears.items()}
    assert quantization_config(Plan({**plan.linears, UP_PROJ: trellis[UP_PROJ]}))["format_version"] == 4
    old = quantization_config(Plan(integer))
    assert old["format_version"] == 2
    assert "encoding" not in old


@pytest.mark.parametrize("encoding", ["levels", "trellis"])
def test_transformers_loads_what_was_stored(encoding: str, tmp_path: Path) -> None:
    made, directory = make(tmp_path, encoding=encoding)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, made.reference(ids).logits, rtol=0, atol=1e-4)
    for dtype in (torch.float32, torch.bfloat16):
        weight = model.get_submodule(Q_PROJ).dequantize(dtype)
        assert torch.equal(weight, made.linears[Q_PROJ].dequantize(dtype))


@pytest.mark.parametrize("encoding", ["levels", "trellis"])
def test_codes_of_outliers_and_tables_are_looked_at(encoding: str, tmp_path: Path) -> None:
    _, directory = make(tmp_path, encoding=encoding)
    shard = next(path for path in sorted(directory.glob("*.safetensors")) if f"{Q_PROJ}.qweight" in load_file(path))
    tensors = load_file(shard)
    tensors[f"{Q_PROJ}.qweight"][0, OUTLIERS[0] // 2] ^= 0x10
    tensors[f"{Q_PROJ}.scale_table"][5] = 2
    shard.unlink()  # it is a link to the run directory's
    save_file(tensors, shard)
    assert [problem.partition(": ")[2] for problem in open_artifact(directory).problems()] == [
        "scale_table is not ascending",
        "the codes of outlier feature 3 differ from the level 0",
    ]


def test_a_config_that_does_not_say_so_is_refused(tmp_path: Path) -> None:
    _, directory = make(tmp_path)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["encoding"]
    path.write_text(json.dumps(config))
    with pytest.raises(AccullmError) as refusal:
        open_artifact(directory)
    first = "model.layers.0.self_attn.q_proj"
    assert refusal.value.line() == f"{path}: describes {first} otherwise than accullm.json; copy the artifact again"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"symmetric": False}, "is to have zero points, and levels has none"),
        ({"bits": 6}, "is to have 6 bits, and levels has 2 to 5"),
        ({"encoding": "trellis", "bits": 8}, "is to have 8 bits, and trellis has 2 to 5"),
        ({"encoding": "stairs"}, "has an unknown encoding"),
    ],
)
def test_what_levels_cannot_be_is_refused(change: dict[str, object], what: str, tmp_path: Path) -> None:
    _, directory = make(tmp_path)
    path, config_path = directory / "accullm.json", directory / "config.json"
    manifest, config = (json.loads(own.read_text()) for own in (path, config_path))
    manifest["linears"][Q_PROJ] |= change
    path.write_text(json.dumps(manifest))
    with pytest.raises(AccullmError) as refusal:
        open_artifact(directory)
    line = f"{path}: not a manifest of format version 3 (ValueError: {Q_PROJ} {what}); copy the artifact again"
    assert refusal.value.line() == line
    config["quantization_config"]["linears"][Q_PROJ] |= change
    config_path.write_text(json.dumps(config))
    with pytest.raises(AccullmError) as refusal:
        AutoModelForCausalLM.from_pretrained(directory)
    assert refusal.value.line() == f"config.json: describes {Q_PROJ} as no accullm stores it; copy the artifact again"
