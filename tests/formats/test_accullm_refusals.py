"""Artifacts of the native format that are damaged: every refusal by its whole message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from accullm_cli.errors import AccullmError
from accullm_cli.formats import FORMATS, open_artifact
from accullm_cli.formats.accullm import AccullmFormat
from tests.artifacts import empty, make_parts
from tests.tiny import tiny_llama

Q_PROJ = "model.layers.0.self_attn.q_proj"
UP_PROJ = "model.layers.1.mlp.up_proj"
BLOCK = "model-00002-of-00003.safetensors"


def edit_json(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(artifact: Path) -> None:
        content = json.loads((artifact / name).read_text())
        change(content)
        (artifact / name).write_text(json.dumps(content))

    return damage


def edit_block(change: Callable[[dict[str, torch.Tensor]], object], reindex: bool = True) -> Callable[[Path], None]:
    def damage(artifact: Path) -> None:
        tensors = load_file(artifact / BLOCK)
        before = set(tensors)
        change(tensors)
        # A new file: the old one is linked to the run directory.
        (artifact / BLOCK).unlink()
        save_file(tensors, artifact / BLOCK)
        if reindex:
            index = json.loads((artifact / "model.safetensors.index.json").read_text())
            for name in before - tensors.keys():
                del index["weight_map"][name]
            index["weight_map"] |= dict.fromkeys(tensors, BLOCK)
            (artifact / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda artifact: (artifact / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda artifact: (artifact / name).write_text(text) and None


def truncate(artifact: Path) -> None:
    content = (artifact / BLOCK).read_bytes()
    (artifact / BLOCK).unlink()
    (artifact / BLOCK).write_bytes(content[:-100])


def replace(name: str, tensor: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor(tensors[name])})


AGAIN = "copy or download it again"
REFUSALS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no manifest": (remove("accullm.json"), f"accullm.json: file is missing; {AGAIN}"),
    "no config": (remove("config.json"), f"config.json: file is missing; {AGAIN}"),
    "shard absent": (remove(BLOCK), f"{BLOCK}: file is missing; {AGAIN}"),
    "shard truncated": (
        truncate,
        f"{BLOCK}: cut short: its header promises 39,936 bytes, the file has 39,836; download or copy the file again",
    ),
    "no tensors": (
        lambda artifact: [file.unlink() for file in artifact.glob("model*")] and None,
        "artifact: holds neither model.safetensors.index.json nor model.safetensors; copy it again",
    ),
    "manifest not JSON": (
        write("accullm.json", "{"),
        "accullm.json: is not valid JSON (Expecting property name enclosed in double quotes: "
        f"line 1 column 2 (char 1)); {AGAIN}",
    ),
    "manifest no object": (write("accullm.json", "[]"), f"accullm.json: is not a JSON object; {AGAIN}"),
    "manifest without linears": (
        edit_json("accullm.json", lambda content: content.pop("linears")),
        "accullm.json: not a manifest of format version 2 (KeyError: 'linears'); copy the artifact again",
    ),
    "manifest without version": (
        edit_json("accullm.json", lambda content: content.pop("format_version")),
        "accullm.json: has no format_version; copy the artifact again",
    ),
    "newer manifest": (
        edit_json("accullm.json", lambda content: content.update(format_version=5)),
        "accullm.json: format version 5 is newer than 4, the newest that this accullm reads; "
        "upgrade with: pip install -U accullm",
    ),
    "manifest of another format": (
        edit_json("accullm.json", lambda content: content.update(format="gguf")),
        "accullm.json: describes an artifact of format gguf",
    ),
    "newer config": (
        edit_json("config.json", lambda content: content["quantization_config"].update(format_version=5)),
        "config.json: format version 5 is newer than 4, the newest that this accullm reads; "
        "upgrade with: pip install -U accullm",
    ),
    "config without quantization": (
        edit_json("config.json", lambda content: content.pop("quantization_config")),
        "config.json: does not say quant_method accullm; copy the artifact again",
    ),
    "config without linears": (
        edit_json("config.json", lambda content: content["quantization_config"].pop("linears")),
        "config.json: does not name its quantized linears; copy the artifact again",
    ),
    "config disagrees": (
        edit_json("config.json", lambda content: content["quantization_config"].update(bits=3)),
        "config.json: describes model.layers.0.self_attn.q_proj otherwise than accullm.json; copy the artifact again",
    ),
    "config describes more": (
        edit_json("config.json", lambda content: content["quantization_config"]["linears"].update(lm_head={})),
        "config.json: describes lm_head, which accullm.json does not; copy the artifact again",
    ),
    "index without map": (
        edit_json("model.safetensors.index.json", lambda content: content.pop("weight_map")),
        f"model.safetensors.index.json: has no map from tensors to files (weight_map); {AGAIN}",
    ),
    "index points outside": (
        edit_json("model.safetensors.index.json", lambda content: content["weight_map"].update(a="../a.safetensors")),
        "model.safetensors.index.json: points outside its directory (../a.safetensors)",
    ),
    "index promises more": (
        edit_json("model.safetensors.index.json", lambda content: content["weight_map"].update(a=BLOCK)),
        f"{BLOCK}: tensor a is missing, which the index promises",
    ),
    "index promises less": (
        edit_block(lambda tensors: tensors.update(a=torch.zeros(1)), reindex=False),
        f"{BLOCK}: tensor a is not in the index under this file",
    ),
    "tensor missing": (
        edit_block(lambda tensors: tensors.pop(f"{UP_PROJ}.qzeros")),
        f"artifact: tensor {UP_PROJ}.qzeros is missing; copy the artifact again",
    ),
    "tensor of a linear in 16 bits missing": (
        edit_block(lambda tensors: tensors.pop("model.layers.1.self_attn.o_proj.weight")),
        "artifact: tensor model.layers.1.self_attn.o_proj.weight is missing; copy the artifact again",
    ),
    "shape of a linear in 16 bits": (
        edit_block(replace("model.layers.1.self_attn.o_proj.weight", lambda tensor: tensor[:, :60].contiguous())),
        f"{BLOCK}: tensor model.layers.1.self_attn.o_proj.weight has shape [64, 60], expected [64, 64]",
    ),
    "wrong dtype": (
        edit_block(replace(f"{UP_PROJ}.scales", torch.Tensor.float)),
        f"{BLOCK}: tensor {UP_PROJ}.scales is float32, expected float16",
    ),
    "scales beside a table": (
        edit_json("accullm.json", lambda content: content["linears"][UP_PROJ].update(scale_bits=6)),
        f"config.json: describes {UP_PROJ} otherwise than accullm.json; copy the artifact again",
    ),
    "wrong shape": (
        edit_block(replace(f"{UP_PROJ}.qweight", lambda tensor: tensor[:, :-1].contiguous())),
        f"{BLOCK}: tensor {UP_PROJ}.qweight has shape [96, 31], expected [96, 32]",
    ),
    "unknown dtype": (
        edit_block(lambda tensors: tensors.update(a=torch.zeros(2, dtype=torch.complex64))),
        f"{BLOCK}: tensor a has dtype C64, which is not supported",
    ),
    "outliers not ascending": (
        edit_block(replace(f"{UP_PROJ}.outlier_index", lambda tensor: tensor.flip(0).contiguous())),
        f"{BLOCK}: tensor {UP_PROJ}.outlier_index is not ascending",
    ),
    "outlier named twice": (
        edit_block(replace(f"{UP_PROJ}.outlier_index", lambda tensor: torch.full_like(tensor, 3))),
        f"{BLOCK}: tensor {UP_PROJ}.outlier_index is not ascending",
    ),
    "outlier beyond the inputs": (
        edit_block(replace(f"{UP_PROJ}.outlier_index", lambda tensor: tensor.new_tensor([3, 64]))),
        f"{BLOCK}: tensor {UP_PROJ}.outlier_index names feature 64 of 64",
    ),
    "negative outlier": (
        edit_block(replace(f"{UP_PROJ}.outlier_index", lambda tensor: tensor.new_tensor([-1, 3]))),
        f"{BLOCK}: tensor {UP_PROJ}.outlier_index names feature -1 of 64",
    ),
    "weight beside codes": (
        edit_block(lambda tensors: tensors.update({f"{UP_PROJ}.weight": torch.zeros(96, 64)})),
        f"artifact: tensor {UP_PROJ}.weight is stored beside the codes of {UP_PROJ}",
    ),
    "codes of an unknown linear": (
        edit_block(lambda tensors: tensors.update({"a.qweight": torch.zeros(1, 1, dtype=torch.uint8)})),
        f"{BLOCK}: tensor a.qweight belongs to no quantized linear of accullm.json",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case: str, artifact: Path) -> None:
    damage, message = REFUSALS[case]
    damage(artifact)
    with pytest.raises(AccullmError) as error:
        AccullmFormat().open(artifact)
    assert (
        error.value.line() == f"{artifact.parent}/" + ("" if message.startswith("artifact") else "artifact/") + message
    )
    assert error.value.exit_code == 2


def test_zero_points_of_a_symmetric_linear_are_refused(tmp_path: Path) -> None:
    made = make_parts(tiny_llama(), tmp_path / "run", symmetric=True)
    directory = empty(tmp_path / "artifact")
    FORMATS["accullm"].write(directory, made.parts)
    edit_block(lambda tensors: tensors.update({f"{UP_PROJ}.qzeros": torch.zeros(96, 1, dtype=torch.uint8)}))(directory)
    with pytest.raises(AccullmError) as error:
        open_artifact(directory)
    assert error.value.line() == (
        f"{directory}/{BLOCK}: tensor {UP_PROJ}.qzeros is stored although {UP_PROJ} is symmetric"
    )


def test_a_directory_that_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(AccullmError) as error:
        open_artifact(tmp_path)
    assert error.value.line() == (
        f"{tmp_path}: not an artifact of a known format ({', '.join(FORMATS)}); make one with: accullm convert MODEL"
    )


def test_a_directory_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(AccullmError) as error:
        open_artifact(tmp_path / "nowhere")
    assert error.value.line() == f"{tmp_path}/nowhere: no such directory; give the directory of an artifact"
