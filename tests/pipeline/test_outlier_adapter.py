"""Outlier features in an adapter, from the command line to what is measured and read back."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from accullm_cli.cli import main
from accullm_cli.commands.compare import compare
from accullm_cli.commands.inspect import inspect
from accullm_cli.commands.verify import verify
from accullm_cli.formats import open_artifact
from accullm_cli.formats.adapters import FOLDER
from accullm_cli.formats.capabilities import ADAPTERS, CAPABILITIES
from accullm_cli.measure.result import Report
from accullm_cli.model.checkpoint import Checkpoint
from accullm_cli.model.skeleton import build_skeleton
from accullm_cli.model.source import open_source
from accullm_cli.pipeline import convert, validate_artifact
from accullm_cli.stages import shipped
from tests.pipeline.observe import refusal
from tests.streaming import fast_config

FORMAT = "compressed-tensors"
ADAPTED = {"export__format": f"[{FORMAT}]", "plan__outlier_adapter": True}
AVERAGE = {"calibration__samples": 2, "calibration__gradient_samples": 2}


@pytest.fixture(scope="module")
def converted(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    out = tmp_path_factory.mktemp("adapted") / "out"
    return convert(fast_config(llama, out, **ADAPTED, plan__outliers=0.05))


@pytest.fixture
def artifact(converted: Report, tmp_path: Path) -> Path:
    shutil.copytree(converted.artifact, tmp_path / "artifact")
    return tmp_path / "artifact"


def test_what_is_measured_has_the_adapter_and_what_it_brings_is_told(converted: Report, llama: Path) -> None:
    alone = converted.figure("mean_kl", "without adapter")
    assert converted.figure("mean_kl").value < 0.8 * alone.value
    settings = {"export__format": f"[{FORMAT}]", "plan__outliers": 0}
    plain = convert(fast_config(llama, Path(converted.artifact).with_name("plain"), **settings))
    assert 0.5 * plain.figure("mean_kl").value < alone.value < 2 * plain.figure("mean_kl").value
    assert plain.measurement("without adapter") is None


def test_its_bits_are_counted(converted: Report) -> None:
    found, opened = inspect(Path(converted.artifact)), open_artifact(Path(converted.artifact))
    assert opened.adapter is not None
    assert found.adapter is not None
    weights = sum(row.weights for row in opened.plan.linears.values())
    features = {name: len(row.outlier_index) for name, row in opened.plan.linears.items()}
    # 5% of 64 and of 96 features: a row of A in 8 bits and a column of B in 16.
    stored = sum(
        count * (opened.plan.linears[name].in_features + 2 * opened.plan.linears[name].out_features)
        for name, count in features.items()
    )
    assert set(features.values()) == {3, 5}
    assert (found.adapter.kind, found.adapter.linears, found.adapter.rank) == ("peft", 14, 5)
    assert found.adapter.bytes == stored
    assert found.adapter.bits_per_weight == 8 * stored / weights
    own = sum(opened.without_adapter().linear_bytes(name) for name in features)
    assert converted.bits_per_weight == found.bits_per_weight == 8 * (own + stored) / weights
    assert found.outlier_features == sum(features.values()) == 46
    assert {row.name for row in found.files} > {f"{FOLDER}/adapter_config.json", f"{FOLDER}/adapter_model.safetensors"}
    written = json.loads((Path(converted.artifact) / "accullm.json").read_text())["files"]
    assert {f"{FOLDER}/adapter_config.json", f"{FOLDER}/adapter_model.safetensors"} < written.keys()
    # As it was before the figures were written into the model card.
    card = next(row.bytes for row in found.files if row.name == "README.md")
    of_all = sum(row.bytes for row in found.files if row.name != "accullm.json")
    assert 0 <= of_all - converted.artifact_bytes <= card


def test_the_report_says_what_it_takes(converted: Report) -> None:
    bits = inspect(Path(converted.artifact)).adapter.bits_per_weight  # type: ignore[union-attr]
    told = f"the outlier adapter holds 46 features and takes {bits:.3f} bits per weight; runtimes need room for rank 8"
    assert told in converted.records


def test_corrected_columns_are_the_originals(converted: Report, llama: Path, tmp_path: Path) -> None:
    opened = open_artifact(Path(converted.artifact))
    model = build_skeleton(llama)
    checkpoint = Checkpoint(open_source(str(llama), tmp_path), model)
    alone = opened.without_adapter()
    for name, row in opened.plan.linears.items():
        original = checkpoint.read(f"{name}.weight").double()
        columns = list(row.outlier_index)
        lost = original - alone.linear(name).dequantize().double()
        left = original - opened.linear(name).dequantize().double()
        assert (left[:, columns].abs() <= 2.0**-11 * lost[:, columns].abs() + 2.0**-23).all()
        rest = [column for column in range(row.in_features) if column not in columns]
        assert torch.equal(left[:, rest], lost[:, rest])


def test_validating_and_comparing_take_it_along(converted: Report, artifact: Path, llama: Path, tmp_path: Path) -> None:
    settings = {"validation__require": "[mean_kl<=100]"}
    again = validate_artifact(artifact, fast_config(llama, tmp_path / "out", **settings))
    assert again.figure("mean_kl") == converted.figure("mean_kl")
    assert again.contract_met
    found = compare(artifact, llama)
    shutil.rmtree(artifact / FOLDER)
    (artifact / "accullm.json").unlink()
    without = compare(artifact, llama)
    for with_it, alone in zip(found.linears, without.linears, strict=True):
        assert with_it.relative_difference < alone.relative_difference
    assert found.a.bits_per_weight == converted.bits_per_weight
    assert found.a.tensor_bytes > without.a.tensor_bytes


def test_verify_looks_at_its_files_and_values(artifact: Path) -> None:
    found = verify(artifact)
    assert found.problems == ()
    file = artifact / FOLDER / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert verify(artifact).problems == (
        f"{FOLDER}/adapter_model.safetensors differs: its SHA-256 is not the manifest's",
        f"{file}: is not what the artifact was made with: it is damaged, or another artifact's; copy the artifact "
        "again",
    )
    assert verify(artifact).tensors_checked == 0
    assert found.tensors_checked == len(open_artifact_tensors(artifact)) + 28


def open_artifact_tensors(artifact: Path) -> dict[str, str]:
    return json.loads((artifact / "model.safetensors.index.json").read_text())["weight_map"]


# -- an average of bits ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uneven(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, but one feature of each input of attention and MLP is large."""
    directory = tmp_path_factory.mktemp("uneven") / "model"
    shutil.copytree(llama, directory)
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[11] *= 40
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_an_average_is_spent_on_features_where_they_save_more(uneven: Path, tmp_path: Path) -> None:
    settings = {**AVERAGE, "plan__bits": 5.5, "plan__symmetric": True}
    report = convert(fast_config(uneven, tmp_path / "out", **ADAPTED, **settings))
    assert report.bits_per_weight <= 5.5
    opened = open_artifact(tmp_path / "out")
    assert opened.adapter is not None
    assert opened.bits_per_weight == report.bits_per_weight
    chosen = [row.outlier_index for name, row in opened.plan.linears.items() if name.endswith(("q_proj", "up_proj"))]
    assert (11,) in chosen
    (sentence,) = (record for record in report.records if record.startswith("the outlier adapter"))
    assert " below that of the best plan of the same bits without it" in sentence


def test_no_adapter_is_written_where_none_pays(llama: Path, tmp_path: Path) -> None:
    settings = {**AVERAGE, "plan__bits": 4.53, "plan__symmetric": True}
    report = convert(fast_config(llama, tmp_path / "out", **ADAPTED, **settings))
    told = "the outlier adapter was left out: no feature saves as much loss in it as its bits save elsewhere"
    assert told in report.records
    assert not (tmp_path / "out" / FOLDER).exists()
    assert open_artifact(tmp_path / "out").adapter is None
    assert verify(tmp_path / "out").intact
    assert report.figure("mean_kl") == report.figure("mean_kl", "without adapter")


# -- an adapter of one rank --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"plan__outliers": 0.05}, {**AVERAGE, "plan__bits": 7.5, "plan__symmetric": True}]
)
def test_where_all_ranks_must_be_one_they_are(
    settings: dict[str, object], uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = dataclasses.replace(CAPABILITIES[FORMAT], adapter="mlx_lm", package="", module="")
    monkeypatch.setitem(CAPABILITIES, FORMAT, changed)  # type: ignore[arg-type]
    report = convert(fast_config(uneven, tmp_path / "out", **ADAPTED, **settings))
    opened = open_artifact(tmp_path / "out")
    assert opened.adapter is not None
    ranks = {len(row.outlier_index) for row in opened.plan.linears.values()}
    assert len(ranks - {0}) == 1
    assert opened.bits_per_weight == report.bits_per_weight
    assert report.figure("mean_kl").value < report.figure("mean_kl", "without adapter").value
    config = json.loads((tmp_path / "out" / FOLDER / "adapter_config.json").read_text())
    assert config["lora_parameters"]["rank"] == opened.adapter.rank


# -- what users load ---------------------------------------------------------------------------------------


def test_without_the_adapters_loader_the_rest_is_still_compared(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = shipped._missing
    monkeypatch.setattr(shipped, "_missing", lambda package: "it needs peft" if package == "peft" else missing(package))
    report = convert(fast_config(llama, tmp_path / "out", **ADAPTED))
    assert (
        f"the {FORMAT} artifact was run as users load it without its adapter, for which it needs peft" in report.records
    )


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_with_it_both_are(converted: Report) -> None:
    assert not [record for record in converted.records if "as users load it" in record]


# -- what is refused ---------------------------------------------------------------------------------------

CASES = [
    (
        ["--outlier-adapter"],
        "--format accullm: accullm holds outlier features in its own files, and not in an adapter; leave out "
        "--outlier-adapter",
    ),
    (
        ["--outlier-adapter", "--format", FORMAT, "--outliers", "0"],
        "--outlier-adapter: --outliers 0 leaves nothing for an adapter to hold; leave out one of the two",
    ),
    (
        ["--format", FORMAT, "--outliers", "1%"],
        "--format compressed-tensors: compressed-tensors holds outlier features in an adapter only, which --outliers "
        "does not ask for; add --outlier-adapter, or use --outliers 0, or export to the format accullm",
    ),
]


@pytest.mark.parametrize(("arguments", "line"), CASES)
def test_what_cannot_be_is_refused_in_one_line(
    arguments: list[str], line: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["convert", str(llama), "--out", str(tmp_path / "out"), *arguments])
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: {line}\n"
    assert not (tmp_path / "out.run").exists()


def test_a_format_without_outliers_is_refused(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = dataclasses.replace(CAPABILITIES["accullm"], outliers="not at all")
    monkeypatch.setitem(CAPABILITIES, "accullm", none)  # type: ignore[arg-type]
    assert refusal(lambda: convert(fast_config(llama, tmp_path / "out", plan__outlier_adapter=True))) == (
        "--format accullm: accullm holds no outlier features, in an adapter neither; leave out "
        "--outlier-adapter, or export to the format compressed-tensors"
    )


def test_every_kind_has_room_for_its_largest_rank() -> None:
    for kind in ADAPTERS.values():
        assert list(kind.ranks) == sorted(set(kind.ranks))
        assert [kind.room(rank) for rank in (1, 2, 8, 9, 257, 512)] == [1, 8, 8, 16, 320, 512]
