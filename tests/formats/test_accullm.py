"""The native format: what is written, and what is read back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from accullm_cli.errors import AccullmError
from accullm_cli.formats import FORMATS, open_artifact
from accullm_cli.formats.accullm import quantization_config, record_fidelity
from accullm_cli.formats.assemble import assemble
from accullm_cli.formats.base import ModelShape
from accullm_cli.formats.objections import objections
from accullm_cli.formats.shards import link_or_copy
from accullm_cli.quant.plan import LinearPlan, Plan
from tests.artifacts import Made, empty, make_parts
from tests.samples import report_of
from tests.tiny import tiny_llama, tiny_mixtral

Q_PROJ = "model.layers.0.self_attn.q_proj"
UP_PROJ = "model.layers.1.mlp.up_proj"


# -- round trip --------------------------------------------------------------------------------------------


def test_every_linear_reads_back_as_it_was_written(made: Made, artifact: Path) -> None:
    opened = open_artifact(artifact)
    for name, linear in made.linears.items():
        read = opened.linear(name)
        for field in dataclasses.fields(linear):
            wanted, found = getattr(linear, field.name), getattr(read, field.name)
            assert torch.equal(found, wanted) if isinstance(wanted, torch.Tensor) else found == wanted, field.name


def test_the_plan_reads_back_with_outliers_reasons_and_order(made: Made, artifact: Path) -> None:
    opened = open_artifact(artifact)
    assert list(opened.plan.linears.items()) == list(made.parts.plan.linears.items())
    assert opened.plan.scale_dtype == "float16"


def test_other_tensors_read_back_unchanged(made: Made, artifact: Path) -> None:
    opened = open_artifact(artifact)
    model = made.reference.state_dict()
    weights = {f"{name}.weight" for name in made.linears}
    assert set(opened.names()) == model.keys() - weights
    for name in opened.names():
        assert torch.equal(opened.tensor(name), model[name]), name


def test_experts_in_16_bits_and_short_last_groups_round_trip(tmp_path: Path) -> None:
    made = make_parts(tiny_mixtral(), tmp_path / "run", bits=3, group_size=32, keep=("down_proj.2",))
    directory = empty(tmp_path / "artifact")
    FORMATS["accullm"].write(directory, made.parts)
    opened = open_artifact(directory)
    name = "model.layers.1.mlp.experts.gate_up_proj.3"
    assert opened.linear(name).scales.shape == (80, 2)  # 48 input features in groups of 32
    assert torch.equal(opened.linear(name).dequantize(), made.linears[name].dequantize())
    kept = "model.layers.0.mlp.experts.down_proj.2"
    assert opened.plan.linears[kept].bits == 16
    with pytest.raises(AccullmError, match=r"down_proj\.2 is not a quantized linear of this artifact$"):
        opened.linear(kept)


@pytest.mark.parametrize("scale_bits", [4, 6, 8])
def test_scales_in_a_table_round_trip(scale_bits: int, tmp_path: Path) -> None:
    made = make_parts(tiny_llama(), tmp_path / "run", group_size=16, outliers=(3,), scale_bits=scale_bits)
    directory = empty(tmp_path / "artifact")
    FORMATS["accullm"].write(directory, made.parts)
    opened = open_artifact(directory)
    assert list(opened.plan.linears.items()) == list(made.parts.plan.linears.items())
    for name, linear in made.linears.items():
        read = opened.linear(name)
        assert read.scale_bits == scale_bits
        assert torch.equal(read.scales, linear.scales)
        assert torch.equal(read.dequantize(), linear.dequantize())
        assert opened.linear_bytes(name) == opened.plan.linears[name].stored_bytes
    assert list(opened.problems()) == []


def test_an_artifact_of_version_1_is_read(made: Made, artifact: Path, tmp_path: Path) -> None:
    """It knew nothing of tables: neither file says how many bits a scale has."""
    old = tmp_path / "old"
    shutil.copytree(artifact, old)
    manifest = json.loads((old / "accullm.json").read_text())
    manifest["format_version"] = 1
    for entry in manifest["linears"].values():
        del entry["scale_bits"]
    (old / "accullm.json").write_text(json.dumps(manifest))
    config = json.loads((old / "config.json").read_text())
    config["quantization_config"]["format_version"] = 1
    del config["quantization_config"]["scale_bits"]
    (old / "config.json").write_text(json.dumps(config))
    opened = open_artifact(old)
    assert list(opened.plan.linears.items()) == list(made.parts.plan.linears.items())
    assert torch.equal(opened.linear(Q_PROJ).dequantize(), made.linears[Q_PROJ].dequantize())


# -- what is written ---------------------------------------------------------------------------------------


def test_block_shards_are_hard_links_of_the_run_directory(made: Made, artifact: Path) -> None:
    shards = sorted(artifact.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
    for block, shard in zip(made.parts.blocks, shards, strict=False):
        assert os.path.samefile(block, shard)


def test_a_file_system_without_links_gets_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_bytes(b"tensors")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"tensors"
    assert not os.path.samefile(tmp_path / "a", tmp_path / "b")


def test_outside_tensors_are_split_at_the_limit(made: Made, tmp_path: Path) -> None:
    directory = empty(tmp_path / "artifact")
    # Embedding and head are 96 * 64 * 4 = 24,576 bytes each, the norm 256.
    assemble(directory, made.parts, "accullm", {}, link_or_copy, shard_bytes=24_900)
    assert sorted(load_file(directory / "model-00003-of-00004.safetensors")) == [
        "model.embed_tokens.weight",
        "model.norm.weight",
    ]
    assert list(load_file(directory / "model-00004-of-00004.safetensors")) == ["lm_head.weight"]


def test_the_same_parts_give_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for run in ("first", "second"):
        made = make_parts(tiny_llama(), tmp_path / run / "run", outliers=(5,))
        directory = empty(tmp_path / run / "artifact")
        FORMATS["accullm"].write(directory, made.parts)
        written.append({file.name: file.read_bytes() for file in directory.iterdir()})
    assert written[0] == written[1]


def test_the_manifest_holds_size_and_sha256_of_every_other_file(artifact: Path) -> None:
    manifest = json.loads((artifact / "accullm.json").read_text())
    assert manifest["files"] == {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in artifact.iterdir()
        if file.name != "accullm.json"
    }
    assert manifest["fidelity"] is None


def test_the_config_names_the_common_scheme_and_what_deviates(made: Made, tmp_path: Path) -> None:
    linears = dict(made.parts.plan.linears)
    linears[UP_PROJ] = dataclasses.replace(linears[UP_PROJ], group_size=-1, outlier_index=())
    config = quantization_config(Plan(linears))
    assert {key: config[key] for key in ("quant_method", "format_version", "bits", "group_size", "outliers")} == {
        "quant_method": "accullm",
        "format_version": 2,
        "bits": 4,
        "group_size": 32,
        "outliers": 2,
    }
    assert config["linears"][Q_PROJ] == {}
    assert config["linears"][UP_PROJ] == {"group_size": -1, "outliers": 0}
    assert config["skipped"] == ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]


def test_companions_are_copied_with_their_directories_and_in_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    companions = dict.fromkeys(("tokenizer.json", "templates/tools.jinja"), tmp_path / "tokenizer.json")
    made = make_parts(tiny_llama(), tmp_path / "run", companions=companions)
    directory = empty(tmp_path / "artifact")
    FORMATS["accullm"].write(directory, made.parts)
    for name in companions:
        assert (directory / name).read_text() == "{}"
        assert json.loads((directory / "accullm.json").read_text())["files"][name]["bytes"] == 2


@pytest.mark.parametrize(
    ("names", "renamed"),
    [
        (["README.md"], "README.original.md"),
        (["readme.md"], "readme.original.md"),
        (["README.md", "README.original.md"], "README.original.original.md"),
    ],
)
def test_the_source_s_readme_makes_room_for_the_artifact_s_card(tmp_path: Path, names: list[str], renamed: str) -> None:
    for name in names:
        (tmp_path / name).write_text(name)
    made = make_parts(tiny_llama(), tmp_path / "run", companions={name: tmp_path / name for name in names})
    directory = empty(tmp_path / "artifact")
    FORMATS["accullm"].write(directory, made.parts)
    assert (directory / renamed).read_text() == names[0]
    assert "# Quantized model" in (directory / "README.md").read_text()


@pytest.mark.parametrize("name", ["accullm.json", "config.json", "x.safetensors"])
def test_a_companion_must_not_replace_a_file_of_the_artifact(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("the source's")
    made = make_parts(tiny_llama(), tmp_path / "run", companions={name: tmp_path / name})
    with pytest.raises(AccullmError) as error:
        FORMATS["accullm"].write(empty(tmp_path / "artifact"), made.parts)
    assert error.value.line() == f"{tmp_path}/{name}: cannot be copied into the artifact, which has a file of that name"


# -- recorded fidelity -------------------------------------------------------------------------------------


def test_fidelity_is_recorded_in_manifest_and_card(artifact: Path) -> None:
    assert "Not validated yet." in (artifact / "README.md").read_text()
    record_fidelity(artifact, report_of())
    manifest = json.loads((artifact / "accullm.json").read_text())
    assert manifest["fidelity"]["mean_kl"]["value"] == 0.05
    assert manifest["fidelity"]["contract_met"] is False
    assert manifest["fidelity"]["samples"][0]["of"].startswith("held-out.txt, ")
    assert "/home" not in json.dumps(manifest["fidelity"])
    card = (artifact / "README.md").read_text()
    assert "Not validated yet." not in card
    assert "/home" not in card
    assert "| Mean KL divergence (nats per token) | 0.05 | 0.045 to 0.055 |" in card
    assert "| contract mean_kl<=0.02 | 0.05 | not met |" in card
    assert manifest["files"]["README.md"]["sha256"] == hashlib.sha256(card.encode()).hexdigest()


def test_recording_twice_replaces_the_first_figures(artifact: Path) -> None:
    record_fidelity(artifact, report_of(0.9))
    record_fidelity(artifact, report_of(0.05))
    once = (artifact / "README.md").read_text()
    assert "0.9 |" not in once
    assert once.count("<!-- fidelity -->") == 1
    assert "## Where it comes from" in once


# -- objections --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "group_size", "kind", "what", "hint"),
    [
        (9, 64, "linear", "accullm holds 2 to 8 bits, and p has 9", "use --bits 2 to 8"),
        (1, 64, "linear", "accullm holds 2 to 8 bits, and p has 1", "use --bits 2 to 8"),
        (4, 0, "linear", "p is to have group size 0", "use another --group-size"),
        (
            4,
            64,
            "conv2d",
            "accullm holds torch.nn.Linear, Conv1D and stacked experts only, and p is of kind conv2d",
            "convert another model",
        ),
    ],
)
def test_objections(bits: int, group_size: int, kind: str, what: str, hint: str) -> None:
    plan = Plan({"p": LinearPlan("p", 8, 100, bits, group_size, False)})
    (objection,) = objections("accullm", plan, ModelShape("llama", torch.float32, {"p": kind}))
    assert (objection.what, objection.hint) == (what, hint)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
def test_group_sizes_that_do_not_divide_are_no_objection(bits: int) -> None:
    plan = Plan({"p": LinearPlan("p", 8, 576, bits, 128, False)})
    assert objections("accullm", plan, ModelShape("llama", torch.float32, {"p": "linear"})) == []


def test_names_of_formats_need_no_torch() -> None:
    code = "import sys, accullm_cli.formats as f; print(*f.FORMATS); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "accullm compressed-tensors mlx gguf gptq_v2 gptq awq\n"


def test_the_card_lists_a_few_of_many_records_that_are_alike(tmp_path: Path) -> None:
    made = make_parts(tiny_llama(), tmp_path / "run")
    records = [f"model.layers.{number}.mlp.up_proj: damping 0.{number} instead of 0.01" for number in range(9)]
    parts = dataclasses.replace(
        made.parts, provenance={**made.parts.provenance, "records": [*records, "a dead feature"]}
    )
    FORMATS["accullm"].write(empty(tmp_path / "out"), parts)
    card = (tmp_path / "out" / "README.md").read_text()
    listed = [line.removeprefix("- records: ") for line in card.splitlines() if line.startswith("- records: ")]
    assert listed == [*records[:4], "and 5 more like these, in accullm.json", "a dead feature"]
    assert json.loads((tmp_path / "out" / "accullm.json").read_text())["provenance"]["records"][:9] == records
