"""Outlier features in an adapter beside an artifact: what is written, what runtimes load, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from accullm_cli.errors import AccullmError
from accullm_cli.formats import FORMATS, open_artifact
from accullm_cli.formats.adapters import FILES, FOLDER, Selected, linear_bytes, open_adapter, write_files
from accullm_cli.formats.base import ModelShape, Objection
from accullm_cli.formats.capabilities import ADAPTERS, CAPABILITIES
from accullm_cli.formats.objections import objections
from accullm_cli.formats.stored import StoredArtifact
from accullm_cli.quant.correction import CorrectedLinear
from accullm_cli.quant.plan import LinearPlan, Plan
from tests.artifacts import Made, empty, make_parts
from tests.tiny import tiny_llama, tokens

Q_PROJ, K_PROJ, DOWN_PROJ = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.k_proj",
    "model.layers.1.mlp.down_proj",
)
OUTLIERS = {Q_PROJ: (3,), K_PROJ: (8, 9), DOWN_PROJ: (0, 17, 95)}
FORMAT = "compressed-tensors"


@dataclass(frozen=True)
class Corrected:
    """Parts of an artifact with an adapter, and the weights that it stands for, by linear, in float64."""

    made: Made
    weights: Mapping[str, torch.Tensor]


def make_corrected(run: Path, outliers: Mapping[str, tuple[int, ...]] = OUTLIERS, seed: int = 0) -> Corrected:
    model = tiny_llama()
    for parameter in model.parameters():
        parameter.data.mul_(1 + seed / 8)
    made = make_parts(model, run)
    linears, weights, tensors = dict(made.parts.plan.linears), {}, {}
    for name, index in outliers.items():
        linears[name] = replace(linears[name], outlier_index=index, adapter="peft")
        base, columns = made.linears[name], list(index)
        weight = base.dequantize().double()
        correction = (model.get_parameter(f"{name}.weight").double() - weight)[:, columns].half()
        weight[:, columns] += correction.double()
        linear = CorrectedLinear(base, torch.tensor(index, dtype=torch.int32), correction)
        weights[name] = weight
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in linear.to_tensors().items()}
    for number, shard in enumerate(made.parts.blocks):
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(f"model.layers.{number}.")}
        save_file({**load_file(shard), **own}, shard)
    plan = replace(made.parts.plan, linears=linears)
    return Corrected(replace(made, parts=replace(made.parts, plan=plan)), weights)


@pytest.fixture
def corrected(tmp_path: Path) -> Corrected:
    return make_corrected(tmp_path / "run")


@pytest.fixture
def artifact(corrected: Corrected, tmp_path: Path) -> Path:
    return export(corrected, tmp_path / "artifact")


def export(corrected: Corrected, directory: Path) -> Path:
    FORMATS[FORMAT].write(empty(directory), corrected.made.parts)
    return directory


def opened(directory: Path) -> StoredArtifact:
    found = open_artifact(directory)
    assert found.adapter is not None
    return found


# -- what is written ---------------------------------------------------------------------------------------


def test_the_files_are_those_of_peft(corrected: Corrected, artifact: Path) -> None:
    tensors = load_file(artifact / FOLDER / "adapter_model.safetensors")
    names = {f"base_model.model.{name}.lora_{part}.weight" for name in OUTLIERS for part in "AB"}
    assert tensors.keys() == names
    for name, index in OUTLIERS.items():
        row = corrected.made.parts.plan.linears[name]
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert (a.dtype, b.dtype) == (torch.float8_e4m3fn, torch.float16)
        assert (a.shape, b.shape) == ((len(index), row.in_features), (row.out_features, len(index)))
        assert a.float().nonzero().tolist() == [[number, feature] for number, feature in enumerate(index)]
        assert a.float().sum() == len(index)
        total = corrected.made.linears[name].dequantize().double() + b.double() @ a.double()
        assert torch.equal(total, corrected.weights[name])
    config = json.loads((artifact / FOLDER / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 3)
    assert config["rank_pattern"] == config["alpha_pattern"] == {Q_PROJ: 1, K_PROJ: 2}
    assert sorted(config["target_modules"]) == sorted(OUTLIERS)
    assert config["base_model_name_or_path"] == "the directory above this one"


def test_the_artifacts_own_files_are_those_without_outliers(
    corrected: Corrected, artifact: Path, tmp_path: Path
) -> None:
    plain = make_corrected(tmp_path / "plain run", {}).made
    other = export(Corrected(plain, {}), tmp_path / "plain")
    for file in sorted(other.glob("*.safetensors")):
        assert (artifact / file.name).read_bytes() == file.read_bytes()
    assert not (other / FOLDER).exists()
    assert open_artifact(other).adapter is None


def test_it_is_read_back_with_its_effective_weights(corrected: Corrected, artifact: Path) -> None:
    found = opened(artifact)
    for name, linear in corrected.made.linears.items():
        expected = corrected.weights.get(name, linear.dequantize().double())
        assert torch.equal(found.linear(name).dequantize().double(), expected.float().double())
        assert torch.equal(found.without_adapter().linear(name).dequantize(), linear.dequantize())
    assert {name: row.outlier_index for name, row in found.plan.linears.items() if row.outlier_index} == OUTLIERS
    assert {row.adapter for row in found.plan.linears.values() if row.outlier_index} == {"peft"}
    assert list(found.problems()) == []


def test_everything_that_it_takes_is_counted(corrected: Corrected, artifact: Path) -> None:
    found, plan = opened(artifact), corrected.made.parts.plan
    stored = sum(
        8 * tensor.numel() * tensor.element_size()
        for file in [*artifact.glob("*.safetensors"), artifact / FOLDER / "adapter_model.safetensors"]
        for name, tensor in load_file(file).items()
        if name.split(".weight_")[0].removeprefix("base_model.model.").split(".lora_")[0] in plan.linears
        and not name.endswith(".bias")
    )
    weights = sum(row.weights for row in plan.linears.values())
    assert found.bits_per_weight == stored / weights
    for name, row in plan.linears.items():
        assert found.linear_bytes(name) == linear_bytes(FORMATS[FORMAT], row, torch.float32)
    manifest = json.loads((artifact / "accullm.json").read_text())
    assert manifest["bits_per_weight"] == stored / weights
    assert {name: entry["outliers"] for name, entry in manifest["linears"].items() if entry["outliers"]} == {
        name: len(index) for name, index in OUTLIERS.items()
    }


def test_the_card_says_how_to_load_both(artifact: Path) -> None:
    card = (artifact / "README.md").read_text()
    assert 'model = PeftModel.from_pretrained(model, "path/of/this/directory/outlier-adapter")' in card
    assert "--enable-lora --max-lora-rank 8 --lora-modules exact=DIRECTORY/outlier-adapter" in card
    assert "| outlier input features in the adapter `outlier-adapter` | 6 |" in card
    assert "| largest rank of the adapter | 3 |" in card


def test_an_artifact_without_a_manifest_finds_its_adapter(corrected: Corrected, artifact: Path) -> None:
    (artifact / "accullm.json").unlink()
    found = opened(artifact)
    for name, expected in corrected.weights.items():
        assert torch.equal(found.linear(name).dequantize().double(), expected.float().double())


# -- by the runtimes' own loaders --------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_peft_loads_what_is_read_here(corrected: Corrected, artifact: Path) -> None:
    from peft import PeftModel

    plain = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32)
    ids = tokens()
    with torch.no_grad():
        without = plain(ids).logits
        adapted = PeftModel.from_pretrained(plain, artifact / FOLDER)(ids).logits
        reference = corrected.made.reference.float()
        for name, linear in corrected.made.linears.items():
            reference.get_parameter(f"{name}.weight").data.copy_(linear.dequantize())
        expected_without = reference(ids).logits
        for name, weight in corrected.weights.items():
            reference.get_parameter(f"{name}.weight").data.copy_(weight)
        expected = reference(ids).logits
    torch.testing.assert_close(without, expected_without, rtol=0, atol=1e-4)
    torch.testing.assert_close(adapted, expected, rtol=0, atol=1e-4)
    assert (expected - expected_without).abs().max() > 0.05


def selected(ranks: Mapping[str, int], columns: int = 32, rows: int = 48) -> dict[str, Selected]:
    generator = torch.Generator().manual_seed(5)
    found = {}
    for number, (name, rank) in enumerate(ranks.items()):
        index = torch.arange(rank, dtype=torch.int32) * 5 + number
        found[name] = Selected(index, torch.randn(rows, rank, generator=generator).half(), columns)
    return found


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_is_written_and_read_bit_for_bit(kind: str, tmp_path: Path) -> None:
    ranks = dict.fromkeys(("a.1", "a.11", "b"), 2) if ADAPTERS[kind].one_rank else {"a.1": 1, "a.11": 3, "b": 2}
    written = selected(ranks)
    write_files(tmp_path / FOLDER, kind, written)
    plan = Plan({name: LinearPlan(name, 48, 32, 4, 32, False) for name in (*ranks, "c")})
    found = open_adapter(tmp_path, plan, kind, None)
    assert found is not None
    assert found.rank == max(ranks.values())
    assert found.index.keys() == ranks.keys()
    for name, own in written.items():
        assert torch.equal(found.index[name], own.index)
        assert torch.equal(found.correction(name), own.correction)
        assert found.bytes_of(name) == len(own.index) * (32 + 2 * 48)
    assert found.bytes == sum(map(found.bytes_of, ranks))
    assert found.bytes_of("c") == 0


def test_mlx_lm_gets_matrices_the_other_way_round(tmp_path: Path) -> None:
    written = selected({"model.layers.0.mlp.up_proj": 2, "model.layers.1.mlp.up_proj": 2})
    write_files(tmp_path / FOLDER, "mlx_lm", written)
    tensors = load_file(tmp_path / FOLDER / "adapters.safetensors")
    for name, own in written.items():
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        assert (a.dtype, a.shape, b.dtype, b.shape) == (torch.int8, (32, 2), torch.float16, (2, 48))
        change = torch.zeros(48, 32, dtype=torch.float64)
        change[:, own.index.long()] = own.correction.double()
        assert torch.equal((a.double() @ b.double()).T, change)
    config = json.loads((tmp_path / FOLDER / "adapter_config.json").read_text())
    assert (config["fine_tune_type"], config["num_layers"]) == ("lora", 0)
    assert config["lora_parameters"] == {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": list(written)}


@pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is None, reason="mlx-lm is not installed")
def test_mlx_lm_loads_what_is_written(tmp_path: Path) -> None:
    import mlx.core as mx
    import numpy as np
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.tuner.utils import load_adapters

    shape = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4}
    model = Model(ModelArgs(model_type="llama", rms_norm_eps=1e-6, vocab_size=96, **shape))
    names = [f"model.layers.{number}.mlp.up_proj" for number in range(2)]
    written = selected(dict.fromkeys(names, 2), 64, 96)
    rows = mx.array(np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32))
    before = [layer.mlp.up_proj(rows) for layer in model.model.layers]
    write_files(tmp_path / FOLDER, "mlx_lm", written)
    model = load_adapters(model, str(tmp_path / FOLDER))
    for name, layer, own in zip(names, model.model.layers, before, strict=True):
        change = np.array(layer.mlp.up_proj(rows) - own)
        index, correction = written[name].index.numpy(), written[name].correction.numpy().astype(np.float64)
        np.testing.assert_allclose(change, np.array(rows)[:, index] @ correction.T, atol=1e-5)


# -- what is refused ---------------------------------------------------------------------------------------


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(AccullmError) as caught:
        call()
    return caught.value.line()


def edit_tensors(artifact: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = artifact / FOLDER / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def test_a_changed_file_is_refused(artifact: Path) -> None:
    edit_tensors(artifact, lambda tensors: tensors[f"base_model.model.{Q_PROJ}.lora_B.weight"].mul_(2))
    file = artifact / FOLDER / "adapter_model.safetensors"
    assert refusal(lambda: open_artifact(artifact)) == (
        f"{file}: is not what the artifact was made with: it is damaged, or another artifact's; copy the artifact again"
    )


def test_the_adapter_of_another_artifact_is_refused(artifact: Path, tmp_path: Path) -> None:
    other = export(make_corrected(tmp_path / "other run", seed=1), tmp_path / "other")
    shutil.rmtree(artifact / FOLDER)
    shutil.copytree(other / FOLDER, artifact / FOLDER)
    assert refusal(lambda: open_artifact(artifact)).endswith(
        "adapter_model.safetensors: is not what the artifact was made with: it is damaged, or another artifact's; "
        "copy the artifact again"
    )


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_missing_file_is_refused(name: str, recorded: bool, artifact: Path) -> None:
    (artifact / FOLDER / name).unlink()
    if not recorded:
        (artifact / "accullm.json").unlink()
    what = "file is missing, which holds the artifact's outlier features"
    if not recorded and name == "adapter_config.json":
        what = "file is missing"
    hint = "copy the artifact again" if what != "file is missing" else "copy or download it again"
    assert refusal(lambda: open_artifact(artifact)) == f"{artifact / FOLDER / name}: {what}; {hint}"


def test_a_missing_folder_is_refused(artifact: Path) -> None:
    shutil.rmtree(artifact / FOLDER)
    assert refusal(lambda: open_artifact(artifact)) == (
        f"{artifact / FOLDER}/adapter_config.json: file is missing, which holds the artifact's outlier features; "
        "copy the artifact again"
    )


def test_an_adapter_beside_an_artifact_that_was_made_without_one_is_refused(artifact: Path, tmp_path: Path) -> None:
    plain = export(make_corrected(tmp_path / "plain run", {}), tmp_path / "plain")
    shutil.copytree(artifact / FOLDER, plain / FOLDER)
    assert refusal(lambda: open_artifact(plain)) == f"{plain / FOLDER}: is no part of this artifact; remove it"


A, B = f"base_model.model.{DOWN_PROJ}.lora_A.weight", f"base_model.model.{DOWN_PROJ}.lora_B.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda tensors: tensors.update({A.replace("down", "side"): tensors.pop(A)}),
            f"tensor {A.replace('down', 'side')} is of no quantized linear: it is another artifact's; "
            "copy the artifact again",
        ),
        (lambda tensors: tensors.pop(B), f"tensor {B} is missing; copy the artifact again"),
        (
            lambda tensors: tensors.update({A: tensors[A][:, :64].clone()}),
            f"tensor {A} has shape [3, 64], expected [3, 96]; copy the artifact again",
        ),
        (
            lambda tensors: tensors.update({B: tensors[B][:, :2].clone()}),
            f"tensor {B} has shape [64, 2], expected [64, 3]; copy the artifact again",
        ),
        (lambda tensors: tensors.update({B: tensors[B].float()}), f"tensor {B} is float32, expected float16"),
        (
            lambda tensors: tensors.update({A: (2 * tensors[A].float()).to(torch.float8_e4m3fn)}),
            f"tensor {A} does not select single features in their order; copy the artifact again",
        ),
        (
            lambda tensors: tensors.update({A: tensors[A].float().flip(0).to(torch.float8_e4m3fn)}),
            f"tensor {A} does not select single features in their order; copy the artifact again",
        ),
        (
            lambda tensors: tensors.update({A: torch.zeros(3, 96).to(torch.float8_e4m3fn)}),
            f"tensor {A} does not select single features in their order; copy the artifact again",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    edit: Callable[[dict[str, torch.Tensor]], object], message: str, artifact: Path
) -> None:
    edit_tensors(artifact, edit)
    (artifact / "accullm.json").unlink()
    file = artifact / FOLDER / "adapter_model.safetensors"
    assert refusal(lambda: open_artifact(artifact)) == f"{file}: {message}"


@pytest.mark.parametrize(
    ("key", "value"), [("lora_alpha", 6), ("use_rslora", True), ("rank_pattern", {}), ("target_modules", [Q_PROJ])]
)
def test_a_configuration_by_which_tensors_mean_something_else_is_refused(key: str, value: Any, artifact: Path) -> None:
    file = artifact / FOLDER / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    (artifact / "accullm.json").unlink()
    assert refusal(lambda: open_artifact(artifact)) == (
        f"{file}: has another {key} than the adapter's tensors ask for; copy the artifact again"
    )


def test_a_correction_that_is_no_number_is_a_problem(artifact: Path) -> None:
    edit_tensors(artifact, lambda tensors: tensors[B].fill_(float("nan")))
    (artifact / "accullm.json").unlink()
    assert list(opened(artifact).problems()) == [f"{DOWN_PROJ}: the adapter holds NaN or infinity"]


# -- plans that a format cannot hold -----------------------------------------------------------------------


def objections_to(name: str, adapter: str) -> list[Objection]:
    row = LinearPlan("p", 96, 64, 4, 32, False, (1, 2), adapter=adapter)
    return objections(name, Plan({"p": row, "q": replace(row, name="q")}), ModelShape("llama", torch.float16, KINDS))


KINDS = {"p": "linear", "q": "linear"}


def test_outliers_are_held_where_the_format_has_them() -> None:
    assert objections_to(FORMAT, "peft") == []
    assert objections_to("accullm", "") == []
    assert objections_to(FORMAT, "") == [
        Objection(
            "compressed-tensors holds outlier features in an adapter, and those of p are to be in its own files "
            "(and 1 more)",
            "add --outlier-adapter, or use --outliers 0, or export to the format accullm",
        )
    ]
    assert objections_to("accullm", "peft") == [
        Objection(
            "accullm holds outlier features in its own files, and those of p are to be in an adapter (and 1 more)",
            "leave out --outlier-adapter",
        )
    ]


def test_every_kind_of_adapter_is_written_and_declared() -> None:
    assert FILES.keys() == ADAPTERS.keys()
    for format in CAPABILITIES.values():
        assert bool(format.adapter) == (format.outliers == "as an adapter")
