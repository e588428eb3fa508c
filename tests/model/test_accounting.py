"""What becomes of tensors that a model has no place for, and of tied weights that are stored twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from accullm_cli.errors import AccullmError
from accullm_cli.model.source import ModelSource, open_source
from tests.model.checkpoints import refusal
from tests.streaming import random_ids, reference_model, streamed
from tests.tiny import edit_checkpoint, edit_config, make_checkpoint

LLAMA = "LlamaForCausalLM"
NO_PLACE = f"has no place in {LLAMA} as config.json describes it"
DELETE = "correct config.json if the model was made with it; else delete it from the checkpoint"
MERGE = "merge the adapter into the weights first (peft: merge_and_unload)"
BIAS = "if the model was made with it, set attention_bias or mlp_bias to true in config.json; else delete it"
HIDDEN = 64


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_checkpoint("llama", tmp_path / "model")


def matrix(rows: int = HIDDEN, columns: int = HIDDEN) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, columns, generator=generator).bfloat16()


def opened(directory: Path) -> ModelSource:
    return open_source(str(directory), directory.parent / "cache")


def logits(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    """By our own chain of blocks."""
    decoder = streamed(directory, directory.parent / "cache")
    decoder.load_outside()
    hidden = decoder.embed(ids)
    for index in range(len(decoder.block_names)):
        hidden = decoder.run(index, decoder.load_block(index), hidden)
    return decoder.logits(hidden)


# -- refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "what", "hint"),
    [
        ("model.layers.0.self_attn.q_proj.bias", NO_PLACE, BIAS),
        ("model.layers.1.mlp.down_proj.bias", NO_PLACE, BIAS),
        ("model.norm.bias", NO_PLACE, BIAS),
        ("lm_head.bias", NO_PLACE, BIAS),
        ("model.layers.0.self_attn.q_norm.weight", NO_PLACE, DELETE),
        ("model.layers.0.post_feedforward_layernorm.weight", NO_PLACE, DELETE),
        ("model.layers.0.layer_scalar", NO_PLACE, DELETE),
        ("model.layers.0.self_attn.q_proj.weight_scale", NO_PLACE, DELETE),
        ("model.embed_norm.weight", NO_PLACE, DELETE),
        ("embed_norm.weight", NO_PLACE, DELETE),
        ("logit_scale", NO_PLACE, DELETE),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "is part of an adapter", MERGE),
        ("model.layers.0.self_attn.q_proj.base_layer.weight", "is part of an adapter", MERGE),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight", "is part of an adapter", MERGE),
        (
            "model.layers.2.mlp.up_proj.weight",
            "belongs to layer 2, but config.json makes 2 layers",
            "correct config.json, or take it and the weights from one place",
        ),
    ],
)
def test_what_changes_the_model_is_refused(name: str, what: str, hint: str, llama: Path) -> None:
    edit_checkpoint(llama, {name: matrix()[0] if "A" not in name and "B" not in name else matrix(4)})
    assert refusal(llama) == f"{llama}: tensor {name} {what}; {hint}"


def test_a_norms_weight_of_ones_is_refused_where_the_norm_itself_is_not_there(llama: Path) -> None:
    name = "model.layers.0.self_attn.q_norm.weight"
    edit_checkpoint(llama, {name: torch.ones(16)})
    assert refusal(llama) == f"{llama}: tensor {name} {NO_PLACE}; {DELETE}"


def test_the_first_tensor_is_named_and_the_others_are_counted(llama: Path) -> None:
    names = [f"model.layers.{index}.self_attn.{part}_proj.bias" for index in range(2) for part in "kqv"]
    edit_checkpoint(llama, {name: matrix()[0] for name in names})
    assert refusal(llama) == f"{llama}: tensor {names[0]} (and 5 more) {NO_PLACE}; {BIAS}"


def test_a_checkpoint_that_peft_saved_unmerged_is_named_for_it(llama: Path) -> None:
    tensors = edit_checkpoint(llama, {})
    renamed = {f"base_model.model.{name}": value for name, value in tensors.items()}
    adapter = "base_model.model.model.layers.1.mlp.up_proj.lora_A.default.weight"
    edit_checkpoint(llama, {**renamed, adapter: matrix(4)}, drop=[*tensors])
    assert refusal(llama) == f"{llama}: tensor {adapter} is part of an adapter; {MERGE}"


def test_biases_that_config_json_announces_are_used(llama: Path) -> None:
    sizes = {"q": 64, "k": 32, "v": 32, "o": 64}
    biases = {
        f"model.layers.{index}.self_attn.{part}_proj.bias": matrix(1, size)[0]
        for index in range(2)
        for part, size in sizes.items()
    }
    edit_checkpoint(llama, biases)
    edit_config(llama, attention_bias=True)
    assert opened(llama).records == ()
    ids = random_ids(1, 12)
    torch.testing.assert_close(logits(llama, ids), reference_model(llama)(ids).logits, rtol=0, atol=1e-5)


def test_experts_beyond_the_number_in_config_json_are_refused(tmp_path: Path) -> None:
    directory = make_checkpoint("mixtral", tmp_path / "model")
    edit_config(directory, num_local_experts=3)
    with pytest.raises(AccullmError) as caught:
        streamed(directory, tmp_path / "cache")
    assert caught.value.line() == (
        f"{directory}: tensor model.layers.0.block_sparse_moe.gate.weight has shape [4, 64], but config.json makes it "
        "[3, 64] (and 1 more); config.json and weights belong to different models: take both from one place"
    )


def test_fewer_layers_in_config_json_than_stored_are_refused(llama: Path) -> None:
    edit_config(llama, num_hidden_layers=1)
    assert refusal(llama) == (
        f"{llama}: tensor model.layers.1.input_layernorm.weight (and 8 more) belongs to layer 1, but config.json makes "
        "1 layers; correct config.json, or take it and the weights from one place"
    )


# -- kept and left out -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "branch"),
    [
        ("mtp.fc.weight", "mtp"),
        ("model.mtp.layers.0.mlp.up_proj.weight", "model.mtp"),
        ("score.weight", "score"),
        ("v_head.summary.weight", "v_head"),
        ("anything_new.dense.weight", "anything_new"),
        ("visual.blocks.0.attn.qkv.weight", "visual"),
        ("model.vision_tower.patch.weight", "model.vision_tower"),
        ("model.image_newline", "model.image_newline"),
    ],
)
def test_what_hangs_beside_the_blocks_is_kept(name: str, branch: str, llama: Path) -> None:
    edit_checkpoint(llama, {name: matrix()})
    source = opened(llama)
    assert source.kept == (name,)
    assert source.records == (f"{LLAMA} does not run {branch}: tensor {name} kept in the artifact as stored, 8.19 kB",)


def test_layers_of_multi_token_prediction_are_kept_where_config_json_announces_them(llama: Path) -> None:
    names = ("model.layers.2.eh_proj.weight", "model.layers.2.mlp.up_proj.weight")
    edit_checkpoint(llama, {name: matrix() for name in names})
    edit_config(llama, num_nextn_predict_layers=1)
    source = opened(llama)
    assert source.kept == names
    assert source.records == (
        f"{LLAMA} does not run model.layers.2: 2 tensors kept in the artifact as stored, 16.4 kB",
    )


def test_no_more_layers_are_kept_than_config_json_announces(llama: Path) -> None:
    edit_checkpoint(llama, {f"model.layers.{index}.eh_proj.weight": matrix() for index in (2, 3)})
    edit_config(llama, num_nextn_predict_layers=1)
    assert refusal(llama) == (
        f"{llama}: tensor model.layers.3.eh_proj.weight belongs to layer 3, but config.json makes 2 layers; "
        "correct config.json, or take it and the weights from one place"
    )


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8), f"{LLAMA} computes it or does not use it"),
        ("model.layers.0.self_attn.bias", torch.ones(1, 1, 8, 8), f"{LLAMA} computes it or does not use it"),
        ("model.layers.0.self_attn.masked_bias", torch.tensor(-1e9), f"{LLAMA} computes it or does not use it"),
        ("model.layers.0.self_attn.q_proj.bias", torch.zeros(64), "a bias of zeros changes nothing"),
        ("model.layers.0.input_layernorm.bias", torch.zeros(64), "a bias of zeros changes nothing"),
    ],
)
def test_what_changes_nothing_is_left_out(name: str, value: torch.Tensor, reason: str, llama: Path) -> None:
    edit_checkpoint(llama, {name: value})
    source = opened(llama)
    assert source.kept == ()
    assert source.records == (f"{name} left out: {reason}",)


def test_the_masks_of_old_gpt2_checkpoints_are_left_out(tmp_path: Path) -> None:
    directory = make_checkpoint("gpt2", tmp_path / "model")
    edit_checkpoint(directory, {f"transformer.h.{index}.attn.bias": torch.ones(1, 1, 8, 8) for index in (0, 1)})
    assert opened(directory).records == (
        "transformer.h.0.attn.bias (and 1 more) left out: GPT2LMHeadModel computes it or does not use it",
    )


def test_scales_of_ones_are_left_out_where_the_norm_has_none(tmp_path: Path) -> None:
    directory = make_checkpoint("olmo", tmp_path / "model")
    name = "model.layers.0.input_layernorm.weight"
    edit_checkpoint(directory, {name: torch.ones(64)})
    assert opened(directory).records == (f"{name} left out: a scale by one changes nothing",)
    edit_checkpoint(directory, {name: torch.full((64,), 2.0)})
    assert f"tensor {name} has no place in OlmoForCausalLM" in refusal(directory)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "mixtral", "qwen2", "phi3", "gemma3", "gpt-neox"])
def test_of_a_plain_checkpoint_nothing_is_left(name: str, tmp_path: Path) -> None:
    source = opened(make_checkpoint(name, tmp_path / "model"))
    assert (source.records, source.kept, source.untied) == ((), (), False)


# -- tied weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-tied", "gemma3"])
def test_tied_weights_that_differ_are_both_used(name: str, tmp_path: Path) -> None:
    directory = make_checkpoint(name, tmp_path / "model")
    edit_checkpoint(directory, {"lm_head.weight": matrix(260)})
    source = opened(directory)
    assert source.untied
    assert source.config["tie_word_embeddings"] is False
    assert source.records == (
        "config.json ties lm_head.weight to model.embed_tokens.weight, but the checkpoint stores other values for it: "
        "they are used, and the artifact's config.json says tie_word_embeddings false",
    )
    ids = random_ids(1, 12)
    torch.testing.assert_close(logits(directory, ids), reference_model(directory)(ids).logits, rtol=0, atol=1e-4)


def test_one_value_is_enough_to_differ(tmp_path: Path) -> None:
    directory = make_checkpoint("llama-tied", tmp_path / "model")
    head = edit_checkpoint(directory, {})["model.embed_tokens.weight"].clone()
    edit_checkpoint(directory, {"lm_head.weight": head})
    assert not opened(directory).untied
    head[-1, -1] += 1
    edit_checkpoint(directory, {"lm_head.weight": head})
    assert opened(directory).untied


def test_tied_weights_that_are_equal_stay_tied(tmp_path: Path) -> None:
    directory = make_checkpoint("llama-tied", tmp_path / "model")
    embedding = edit_checkpoint(directory, {})["model.embed_tokens.weight"]
    edit_checkpoint(directory, {"lm_head.weight": embedding.float()})
    source = opened(directory)
    assert (source.untied, source.records, source.config["tie_word_embeddings"]) == (False, (), True)
    ids = random_ids(1, 12)
    torch.testing.assert_close(logits(directory, ids), reference_model(directory)(ids).logits, rtol=0, atol=1e-5)


def test_of_tied_weights_the_head_alone_may_be_stored(tmp_path: Path) -> None:
    directory = make_checkpoint("llama-tied", tmp_path / "model")
    ids = random_ids(1, 12)
    expected = reference_model(directory)(ids).logits
    embedding = edit_checkpoint(directory, {}, drop=["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    edit_checkpoint(directory, {"lm_head.weight": embedding})
    assert opened(directory).records == ()
    torch.testing.assert_close(reference_model(directory)(ids).logits, expected, rtol=0, atol=0)
    torch.testing.assert_close(logits(directory, ids), expected, rtol=0, atol=1e-5)


def test_a_part_for_text_is_untied_as_well() -> None:
    from accullm_cli.model.accounting import _without_ties

    config = {"model_type": "x", "text_config": {"hidden_size": 8}, "vision_config": {"depth": 2}}
    assert _without_ties(config) == {
        "model_type": "x",
        "text_config": {"hidden_size": 8, "tie_word_embeddings": False},
        "vision_config": {"depth": 2},
        "tie_word_embeddings": False,
    }
    assert config["text_config"] == {"hidden_size": 8}


# -- stored twice ------------------------------------------------------------------------------------------


def test_one_parameter_under_two_names_must_have_one_value(llama: Path) -> None:
    weight = edit_checkpoint(llama, {})["model.norm.weight"]
    edit_checkpoint(llama, {"norm.weight": weight})
    ids = random_ids(1, 12)
    torch.testing.assert_close(logits(llama, ids), reference_model(llama)(ids).logits, rtol=0, atol=1e-5)
    edit_checkpoint(llama, {"norm.weight": weight + 1})
    assert refusal(llama) == (
        f"{llama}: tensors model.norm.weight and norm.weight are one parameter of {LLAMA}, but hold different values; "
        "delete the one that is not meant"
    )
