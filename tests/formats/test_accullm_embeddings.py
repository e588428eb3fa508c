"""Quantized embeddings and heads in the native format: round trip, what is written of them, and refusals."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from accullm_cli.errors import AccullmError
from accullm_cli.formats import FORMATS, open_artifact
from accullm_cli.formats.base import ModelShape
from accullm_cli.formats.objections import objections
from accullm_cli.quant.plan import LinearPlan, Plan
from tests.artifacts import Made, empty, make_parts
from tests.formats.test_accullm_refusals import edit_json
from tests.tiny import tiny_llama

EMBEDDING = "model.embed_tokens"


def with_embeddings(tmp_path: Path, **options: object) -> tuple[Made, Path]:
    made = make_parts(tiny_llama(), tmp_path / "run", **{"outliers": (3,), "embedding_bits": 8, **options})
    directory = empty(tmp_path / "artifact")
    FORMATS["accullm"].write(directory, made.parts)
    return made, directory


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(8, 32, False), (4, 25, False), (4, -1, True)])
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_read_back_as_they_were_written(
    tied: bool, bits: int, group_size: int, symmetric: bool, tmp_path: Path
) -> None:
    made = make_parts(
        tiny_llama(tied=tied), tmp_path / "run", 4, group_size, symmetric, embedding_bits=bits, outliers=(3,)
    )
    directory = empty(tmp_path / "artifact")
    FORMATS["accullm"].write(directory, made.parts)
    opened = open_artifact(directory)
    assert list(opened.plan.embeddings) == ([EMBEDDING] if tied else [EMBEDDING, "lm_head"])
    assert dict(opened.plan.embeddings) == dict(made.parts.plan.embeddings)
    for name, embedding in made.embeddings.items():
        read = opened.linear(name)
        assert torch.equal(read.codes, embedding.codes)
        assert torch.equal(read.dequantize(), embedding.dequantize())
        assert f"{name}.weight" not in opened.files.infos


def test_quantized_embeddings_are_described_beside_the_linears(artifact: Path, tmp_path: Path) -> None:
    _, other = with_embeddings(tmp_path / "other")

    def described(directory: Path) -> tuple[dict, dict]:
        config = json.loads((directory / "config.json").read_text())["quantization_config"]
        return config, json.loads((directory / "accullm.json").read_text())

    assert not any("embeddings" in content for content in described(artifact))
    config, manifest = described(other)
    scheme = {"bits": 8, "group_size": 32, "symmetric": False}
    assert config["embeddings"] == {EMBEDDING: scheme, "lm_head": scheme}
    kinds = {EMBEDDING: "embedding", "lm_head": "head"}
    assert manifest["embeddings"] == {name: {"kind": kind, "shape": [96, 64], **scheme} for name, kind in kinds.items()}
    assert not {EMBEDDING, "lm_head"} & (config["linears"].keys() | manifest["linears"].keys())


def test_the_card_says_what_embeddings_are_stored_in(tmp_path: Path) -> None:
    made, directory = with_embeddings(tmp_path)
    card = (directory / "README.md").read_text()
    assert "| bits of model.embed_tokens, not counted above | 8 |\n| bits of lm_head, not counted above | 8 |\n" in card
    assert f"everything counted | {made.parts.plan.bits_per_weight:.3f} |" in card


def test_the_shards_of_embeddings_are_hard_links_behind_the_blocks(tmp_path: Path) -> None:
    made, directory = with_embeddings(tmp_path)
    shards = sorted(directory.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [f"model-{n:05d}-of-00005.safetensors" for n in range(1, 6)]
    for source, shard in zip((*made.parts.blocks, *made.parts.embeddings), shards, strict=False):
        assert os.path.samefile(source, shard)
    assert list(load_file(shards[-1])) == ["model.norm.weight"]


EMBEDDING_REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "manifest without embeddings": (
        edit_json("accullm.json", lambda content: content.pop("embeddings")),
        "config.json: describes model.embed_tokens, which accullm.json does not; copy the artifact again",
    ),
    "config without embeddings": (
        edit_json("config.json", lambda content: content["quantization_config"].pop("embeddings")),
        f"config.json: describes {EMBEDDING} otherwise than accullm.json; copy the artifact again",
    ),
    "config disagrees": (
        edit_json(
            "config.json", lambda content: content["quantization_config"]["embeddings"]["lm_head"].update(bits=4)
        ),
        "config.json: describes lm_head otherwise than accullm.json; copy the artifact again",
    ),
    "config describes more": (
        edit_json("config.json", lambda content: content["quantization_config"]["embeddings"].update(wpe={})),
        "config.json: describes wpe, which accullm.json does not; copy the artifact again",
    ),
    "config malformed": (
        edit_json("config.json", lambda content: content["quantization_config"].update(embeddings=["lm_head"])),
        "config.json: does not name its quantized embeddings; copy the artifact again",
    ),
    "neither knows of embeddings": (
        lambda artifact: [
            edit_json("accullm.json", lambda content: content.pop("embeddings"))(artifact),
            edit_json("config.json", lambda content: content["quantization_config"].pop("embeddings"))(artifact),
        ],
        "model-00003-of-00005.safetensors: tensor model.embed_tokens.qweight belongs to no quantized linear of "
        "accullm.json",
    ),
    "tensor of another shape": (
        edit_json("accullm.json", lambda content: content["embeddings"]["lm_head"].update(shape=[95, 64])),
        "model-00004-of-00005.safetensors: tensor lm_head.qweight has shape [96, 64], expected [95, 64]",
    ),
}


@pytest.mark.parametrize("name", EMBEDDING_REFUSALS)
def test_embeddings_that_are_not_as_described_are_refused(name: str, tmp_path: Path) -> None:
    damage, line = EMBEDDING_REFUSALS[name]
    _, directory = with_embeddings(tmp_path)
    damage(directory)
    with pytest.raises(AccullmError) as error:
        open_artifact(directory)
    assert error.value.line() == f"{directory}/{line}"


def test_embeddings_are_objected_to_as_linears_are() -> None:
    rows = {"e": LinearPlan("e", 8, 100, 9, 64, False), "f": LinearPlan("f", 8, 100, 8, 0, False)}
    plan = Plan({}, embeddings=rows)
    found = objections("accullm", plan, ModelShape("llama", torch.float32, {}))
    assert [objection.what for objection in found] == [
        "accullm holds 2 to 8 bits, and e has 9",
        "f is to have group size 0",
    ]
