"""Reading a checkpoint a part at a time: the right values, in their stored dtype, and no more than asked for."""

from __future__ import annotations

import json
import os
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from accullm_cli.errors import AccullmError
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.checkpoint import Checkpoint
from accullm_cli.model.skeleton import build_skeleton
from accullm_cli.model.source import open_source
from tests.streaming import random_ids, reference_model, streamed
from tests.tiny import CONFIGS, make_checkpoint


def checkpoint_of(decoder: Decoder) -> Checkpoint:
    assert isinstance(decoder.weights, Checkpoint)
    return decoder.weights


def edit(directory: Path, change) -> None:  # type: ignore[no-untyped-def]
    """Replace the tensors of a one-file checkpoint by `change(tensors)`."""
    tensors = change(load_file(directory / "model.safetensors"))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def real_parameters(decoder: Decoder) -> set[str]:
    return {name for name, value in decoder.model.named_parameters() if value.device.type != "meta"}


def test_a_skeleton_has_no_weights_but_real_buffers(tmp_path: Path) -> None:
    model = build_skeleton(make_checkpoint("llama", tmp_path / "model"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    buffers = dict(model.named_buffers())
    assert buffers
    assert {buffer.device.type for buffer in buffers.values()} == {"cpu"}
    assert not model.training


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma3"])
def test_every_parameter_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    directory = make_checkpoint(name, tmp_path / "model")
    decoder = streamed(directory, tmp_path)
    decoder.load_outside()
    for index in range(2):
        decoder.load_block(index)
    expected = dict(reference_model(directory).named_parameters())
    found = dict(decoder.model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_loading_keeps_the_stored_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    decoder = streamed(make_checkpoint("mixtral", tmp_path / "model", dtype), tmp_path)
    decoder.weights.load(decoder.block_names)
    decoder.weights.load_outside(decoder.block_names)
    assert {parameter.dtype for parameter in decoder.model.parameters()} == {dtype}


def test_mixed_dtypes_stay_mixed(tmp_path: Path) -> None:
    directory = make_checkpoint("llama", tmp_path / "model")
    edit(
        directory,
        lambda tensors: {name: value.float() + 2**-20 if "norm" in name else value for name, value in tensors.items()},
    )
    stored = load_file(directory / "model.safetensors")
    decoder = streamed(directory, tmp_path)
    decoder.weights.load(decoder.block_names)
    decoder.weights.load_outside(decoder.block_names)
    for name, parameter in decoder.model.named_parameters():
        assert parameter.dtype == (torch.float32 if "norm" in name else torch.bfloat16) == decoder.weights.dtype(name)
        assert torch.equal(parameter, stored[name])


def test_the_stored_dtype_is_known_before_and_after_loading(tmp_path: Path) -> None:
    decoder = streamed(make_checkpoint("llama", tmp_path / "model"), tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    assert decoder.weights.dtype(name) == torch.bfloat16
    decoder.load_block(0)  # in float32
    assert decoder.weights.dtype(name) == torch.bfloat16
    decoder.release_block(0)
    assert decoder.weights.dtype(name) == torch.bfloat16


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_released_block_is_back_on_meta_and_loads_again(name: str, tmp_path: Path) -> None:
    decoder = streamed(make_checkpoint(name, tmp_path / "model"), tmp_path)
    first = {key: value.clone() for key, value in decoder.load_block(1).named_parameters()}
    decoder.release_block(1)
    assert real_parameters(decoder) == set()
    again = dict(decoder.load_block(1).named_parameters())
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_loading_a_block_reads_nothing_else(tmp_path: Path) -> None:
    """Not even the files: those without a tensor of the block may be gone."""
    directory = make_checkpoint("llama", tmp_path / "model", shard_size="40KB")
    shard_of: dict[str, str] = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    decoder = streamed(directory, tmp_path)
    needed = {shard for name, shard in shard_of.items() if name.startswith("model.layers.1.")}
    others = set(shard_of.values()) - needed
    assert others
    for shard in others:
        (directory / shard).unlink()
    decoder.load_block(1)
    assert real_parameters(decoder) == {name for name in shard_of if name.startswith("model.layers.1.")}


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no such request on this system")
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_while_a_block_is_worked_on_just_the_bytes_of_the_next_one_are_fetched(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_checkpoint(name, tmp_path / "model", shard_size="60KB")
    decoder = streamed(directory, tmp_path)
    fetched: list[bytes] = []

    def note(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        fetched.append(os.pread(descriptor, length, offset))

    monkeypatch.setattr(os, "posix_fadvise", note)
    decoder.load_block(0)
    stored = {key: value for path in directory.glob("*.safetensors") for key, value in load_file(path).items()}
    wanted = [value for key, value in stored.items() if key.startswith("model.layers.1.")]
    assert len(wanted) > 5
    assert sorted(fetched) == sorted(value.view(torch.uint8).numpy().tobytes() for value in wanted)
    fetched.clear()
    decoder.load_block(1)
    assert fetched == []


def test_the_next_block_need_not_be_there_yet(tmp_path: Path) -> None:
    directory = make_checkpoint("llama", tmp_path / "model", shard_size="40KB")
    decoder = streamed(directory, tmp_path)
    stored = checkpoint_of(decoder).source.tensors.items()
    first, second = ({info.file for name, info in stored if f"layers.{index}." in name} for index in range(2))
    assert second - first
    for shard in second - first:
        shard.unlink()
    decoder.load_block(0)
    with pytest.raises(AccullmError, match="changed while it was being converted"):
        decoder.load_block(1)


def test_nothing_is_fetched_where_the_system_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = streamed(make_checkpoint("llama", tmp_path / "model"), tmp_path)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    decoder.load_block(0)
    assert real_parameters(decoder) == {name for name in real_parameters(decoder) if "layers.0." in name} != set()


def test_block_1_is_not_taken_for_block_10(tmp_path: Path) -> None:
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 11
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    decoder = streamed(tmp_path / "model", tmp_path)
    decoder.load_block(1)
    assert {name.split(".")[2] for name in real_parameters(decoder)} == {"1"}


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_outside_is_everything_beyond_the_blocks_once_and_as_stored(name: str, tmp_path: Path) -> None:
    directory = make_checkpoint(name, tmp_path / "model")
    stored = load_file(directory / "model.safetensors")
    decoder = streamed(directory, tmp_path)
    found = list(checkpoint_of(decoder).outside(decoder.block_names))
    expected = ["model.embed_tokens.weight", "model.norm.weight"] + ["lm_head.weight"] * (name == "llama")
    assert [key for key, _ in found] == expected
    for key, value in found:
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, stored[key])


def test_what_is_stored_otherwise_is_not_read_from_outside(tmp_path: Path) -> None:
    decoder = streamed(make_checkpoint("llama", tmp_path / "model"), tmp_path)
    without = {"model.embed_tokens.weight", "lm_head.weight"}
    assert [name for name, _ in checkpoint_of(decoder).outside(decoder.block_names, without)] == ["model.norm.weight"]


def test_one_parameter_is_read_as_stored_and_not_kept(tmp_path: Path) -> None:
    directory = make_checkpoint("llama", tmp_path / "model")
    decoder = streamed(directory, tmp_path)
    found = checkpoint_of(decoder).read("lm_head.weight")
    assert torch.equal(found, load_file(directory / "model.safetensors")["lm_head.weight"])
    assert found.dtype == torch.bfloat16
    assert real_parameters(decoder) == set()


def test_outside_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    decoder = streamed(make_checkpoint("llama", tmp_path / "model"), tmp_path)
    before: weakref.ref[torch.Tensor] | None = None
    for _, value in checkpoint_of(decoder).outside(decoder.block_names):
        assert real_parameters(decoder) == set()  # whoever gets it is the only one to have it
        assert before is None or before() is None
        before = weakref.ref(value)
        del value


def test_a_checkpoint_of_the_bare_model_has_other_names_and_the_same_logits(tmp_path: Path) -> None:
    """GPT-2's on the hub has no "transformer." in front of its names."""
    directory = make_checkpoint("gpt2", tmp_path / "model")
    expected = reference_model(directory)(random_ids(1, 8)).logits
    edit(directory, lambda tensors: {name.removeprefix("transformer."): value for name, value in tensors.items()})
    decoder = streamed(directory, tmp_path)
    decoder.load_outside()
    for index in range(2):
        decoder.load_block(index)
    assert torch.equal(decoder.model(random_ids(1, 8)).logits, expected)


def test_tensors_that_the_model_has_no_place_for_are_no_concern(tmp_path: Path) -> None:
    directory = make_checkpoint("llama", tmp_path / "model")
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.0.attn.masked_bias": torch.tensor(1, dtype=torch.uint8),
    }
    edit(directory, lambda tensors: tensors | extra)
    decoder = streamed(directory, tmp_path)
    decoder.load_block(0)
    assert not extra.keys() & real_parameters(decoder)


# -- refusals ----------------------------------------------------------------------------------------------


def test_a_missing_expert_is_refused_when_the_checkpoint_is_opened(tmp_path: Path) -> None:
    directory = make_checkpoint("mixtral", tmp_path / "model")
    experts = "model.layers.1.block_sparse_moe.experts."
    edit(directory, lambda tensors: {name: value for name, value in tensors.items() if not name.startswith(experts)})
    with pytest.raises(AccullmError) as refusal:
        streamed(directory, tmp_path)
    assert refusal.value.line() == (
        f"{directory}: tensor model.layers.1.mlp.experts.gate_up_proj is missing (and 1 more); "
        "download the weights again, or correct config.json"
    )


def test_a_missing_tensor_beside_experts_is_refused(tmp_path: Path) -> None:
    directory = make_checkpoint("mixtral", tmp_path / "model")
    edit(directory, lambda tensors: {name: v for name, v in tensors.items() if name != "model.norm.weight"})
    with pytest.raises(AccullmError) as refusal:
        streamed(directory, tmp_path)
    assert refusal.value.line() == (
        f"{directory}: tensor model.norm.weight is missing; download the weights again, or correct config.json"
    )


@pytest.mark.parametrize(
    ("part", "what"),
    [
        (
            "experts.2.w2",
            "tensor model.layers.1.mlp.experts.down_proj has shape [3, 64, 96], but config.json makes it [4, 64, 96]",
        ),
        (
            "experts.2.w1",
            "tensor model.layers.1.mlp.experts.gate_up_proj cannot be made of the 7 stored for it "
            "(Sizes of tensors must match except in dimension 1. Expected 3 in dimension 0 but got 4 for tensor number "
            "1 in the list)",
        ),
    ],
)
def test_parts_of_experts_that_do_not_fit_are_refused_before_any_weight_is_read(
    part: str, what: str, tmp_path: Path
) -> None:
    directory = make_checkpoint("mixtral", tmp_path / "model")
    edit(directory, lambda tensors: {k: v for k, v in tensors.items() if f"layers.1.block_sparse_moe.{part}" not in k})
    with pytest.raises(AccullmError) as refusal:
        streamed(directory, tmp_path)
    assert refusal.value.line() == f"{directory}: {what}; download the weights again, or correct config.json"


def test_a_config_with_another_number_of_experts_is_refused_before_any_weight_is_read(tmp_path: Path) -> None:
    directory = make_checkpoint("mixtral", tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_local_experts": 5}))
    with pytest.raises(AccullmError) as refusal:
        streamed(directory, tmp_path)
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    assert refusal.value.line() == (
        f"{directory}: tensor {gate} has shape [4, 64], but config.json makes it [5, 64] (and 1 more); "
        "config.json and weights belong to different models: take both from one place"
    )


def test_a_nan_in_one_expert_is_found_when_its_block_is_read(tmp_path: Path) -> None:
    directory = make_checkpoint("mixtral", tmp_path / "model")
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name][5, 7] = float("nan")
        return tensors

    edit(directory, spoil)
    decoder = streamed(directory, tmp_path)
    decoder.load_block(0)
    with pytest.raises(AccullmError) as refusal:
        decoder.load_block(1)
    assert refusal.value.line() == (
        f"{directory}: tensor model.layers.1.mlp.experts.down_proj holds 1 NaN or Inf value, the first at [2, 5, 7]; "
        "the checkpoint is damaged: download it again, or take another"
    )


def test_a_quantization_config_is_no_part_of_the_skeleton(tmp_path: Path) -> None:
    """As in an artifact: transformers would otherwise build the model for its own quantizer."""
    directory = make_checkpoint("llama", tmp_path / "model")
    expected = [type(module) for module in build_skeleton(directory).modules()]
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "accullm"}}))
    assert [type(module) for module in build_skeleton(directory).modules()] == expected


def test_checkpoint_and_skeleton_agree_for_every_source(tmp_path: Path) -> None:
    """One file, or shards: the same parameters."""
    one = make_checkpoint("llama", tmp_path / "one")
    many = make_checkpoint("llama", tmp_path / "many", shard_size="40KB")
    assert len(list(many.glob("*.safetensors"))) > 2
    found = []
    for directory in (one, many):
        model = build_skeleton(directory)
        checkpoint = Checkpoint(open_source(str(directory), tmp_path / "cache"), model)
        checkpoint.load(["model.layers.0", "model.layers.1"])
        checkpoint.load_outside(["model.layers.0", "model.layers.1"])
        found.append(dict(model.named_parameters()))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
