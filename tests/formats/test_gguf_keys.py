"""What llama.cpp's own convert_hf_to_gguf.py writes into a file, key by key.

The values below are what the script of llama.cpp as vendored in llama-cpp-python 0.3.36 wrote (--outtype bf16) of the
models of scripts/prepare_demo_model.py, and of tiny models of `tests.formats.test_gguf`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from accullm_cli.errors import AccullmError
from accullm_cli.formats.gguf import write_head
from accullm_cli.formats.gguf_layout import Layout
from accullm_cli.model.gguf_programs import architecture_of
from accullm_cli.quant.plan import LinearPlan, Plan
from tests.formats.test_gguf import FIELDS, SHAPE

SMOLLM2 = ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192,
    "rms_norm_eps": 9.999999747378752e-06, "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "vocab_size": 49152, "tie_word_embeddings": True,
})  # fmt: skip
QWEN = ("qwen2.5-coder-0.5b", "Qwen/Qwen2.5-Coder-0.5B-Instruct", {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768,
    "rms_norm_eps": 9.999999974752427e-07, "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "vocab_size": 151936, "tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": None,
})  # fmt: skip
WRITTEN: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "Smollm2 135m",
        "general.basename": "smollm2",
        "general.size_label": "135M",
        "general.license": "apache-2.0",
        "general.base_model.count": 1,
        "general.base_model.0.name": "SmolLM2 135M Instruct",
        "general.base_model.0.organization": "HuggingFaceTB",
        "general.base_model.0.repo_url": "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        "general.file_type": 32,
        "general.quantization_version": 2,
        "llama.block_count": 30,
        "llama.context_length": 8192,
        "llama.embedding_length": 576,
        "llama.feed_forward_length": 1536,
        "llama.attention.head_count": 9,
        "llama.attention.head_count_kv": 3,
        "llama.attention.key_length": 64,
        "llama.attention.value_length": 64,
        "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
        "llama.rope.freq_base": 100000.0,
        "llama.rope.dimension_count": 64,
        "llama.vocab_size": 49152,
    },
    "qwen2.5-coder-0.5b": {
        "general.architecture": "qwen2",
        "general.type": "model",
        "general.name": "Qwen2.5 Coder 0.5b",
        "general.basename": "qwen2.5-coder",
        "general.size_label": "0.5B",
        "general.license": "apache-2.0",
        "general.base_model.count": 1,
        "general.base_model.0.name": "Qwen2.5 Coder 0.5B Instruct",
        "general.base_model.0.organization": "Qwen",
        "general.base_model.0.repo_url": "https://huggingface.co/Qwen/Qwen2.5-Coder-0.5B-Instruct",
        "general.file_type": 32,
        "general.quantization_version": 2,
        "qwen2.block_count": 24,
        "qwen2.context_length": 32768,
        "qwen2.embedding_length": 896,
        "qwen2.feed_forward_length": 4864,
        "qwen2.attention.head_count": 14,
        "qwen2.attention.head_count_kv": 2,
        "qwen2.attention.layer_norm_rms_epsilon": 9.999999974752427e-07,
        "qwen2.rope.freq_base": 1000000.0,
    },
}
OURS = ("accullm.config", "accullm.plan", "accullm.source", "accullm.source_sha256")
# What llama.cpp reckons by itself where nothing is said; of other architectures its script writes them, too.
SAID_ALWAYS = ("attention.key_length", "attention.value_length", "rope.dimension_count", "vocab_size")
BLOCK = ("attn_k", "attn_norm", "attn_output", "attn_q", "attn_v", "ffn_down", "ffn_gate", "ffn_norm", "ffn_up")


def layout_of(config: PreTrainedConfig) -> Layout:
    """Of a model without weights, of which nothing is quantized."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {
        name: tuple(value.shape) for name, value in model.named_parameters() if name not in model.all_tied_weights_keys
    }
    row = LinearPlan("model.layers.0.mlp.up_proj", 1, 1, 16, -1, False)
    return Layout(shapes, config, architecture_of(config), Plan({row.name: row}))


def head_of(layout: Layout, source: str = "model", *companions: Path) -> dict[str, Any]:
    """Values by key."""
    writer = GGUFWriter(None, layout.architecture.name)
    files = {path.name: path for path in companions}
    write_head(writer, {"source": source, "source_sha256": "12ab"}, files, torch.bfloat16, layout)
    (found,) = writer.kv_data
    return {name: entry.value for name, entry in found.items()}


def configuration(fields: dict[str, Any]) -> PreTrainedConfig:
    return CONFIG_MAPPING[fields["model_type"]](**{key: value for key, value in fields.items() if key != "model_type"})


@pytest.mark.parametrize(("name", "base", "fields"), [SMOLLM2, QWEN], ids=["llama", "qwen2"])
def test_every_key_of_llama_cpp_s_own_converter_is_written(
    name: str, base: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    card = tmp_path / "README.md"
    card.write_text(f"---\nlicense: apache-2.0\nbase_model: {base}\n---\n# Title\n")
    found = head_of(layout_of(configuration(fields)), name, card)
    wanted = WRITTEN[name]
    architecture = wanted["general.architecture"]
    assert {key: found[key] for key in wanted} == wanted
    beyond = {*OURS, *(f"{architecture}.{key}" for key in SAID_ALWAYS)}
    assert found.keys() - wanted.keys() == beyond - wanted.keys()


@pytest.mark.parametrize(
    ("fields", "block", "count"),
    [
        (SMOLLM2[2], {f"{name}.weight" for name in BLOCK}, 272),
        (QWEN[2], {*(f"{name}.weight" for name in BLOCK), *(f"attn_{name}.bias" for name in "qkv")}, 290),
    ],
    ids=["llama", "qwen2"],
)
def test_tensors_are_called_as_llama_cpp_s_own_converter_calls_them(
    fields: dict[str, Any], block: set[str], count: int
) -> None:
    layout = layout_of(configuration(fields))
    pieces = {piece.name: shape for name, shape in layout.parameters.items() for piece in layout.pieces[name]}
    assert len(pieces) == count
    first = {name.removeprefix("blk.0."): shape for name, shape in pieces.items() if name.startswith("blk.0.")}
    assert first.keys() == block
    heads, key_heads, width = fields["num_attention_heads"], fields["num_key_value_heads"], fields["hidden_size"]
    assert first["attn_q.weight"] == (heads * 64, width)
    assert first["attn_k.weight"] == (key_heads * 64, width)
    assert first["ffn_down.weight"] == (width, fields["intermediate_size"])
    outside = {name: shape for name, shape in pieces.items() if not name.startswith("blk.")}
    assert outside == {"token_embd.weight": (fields["vocab_size"], width), "output_norm.weight": (width,)}


@pytest.mark.parametrize(
    ("model_type", "label"), [("mixtral", "4x96K"), ("qwen2_moe", "4x90K"), ("qwen3_moe", "4x72K"), ("olmoe", "4x105K")]
)
def test_the_size_of_a_model_with_experts_is_that_of_one_of_them_and_how_many(model_type: str, label: str) -> None:
    config = CONFIG_MAPPING[model_type](**{**SHAPE, **FIELDS[model_type]})
    assert head_of(layout_of(config), "hf")["general.size_label"] == label


def test_command_r_is_as_long_as_it_was_trained_to_read() -> None:
    layout = layout_of(CONFIG_MAPPING["cohere"](**SHAPE, model_max_length=4096))
    assert head_of(layout)["command-r.context_length"] == 4096


def olmo3(window: float) -> PreTrainedConfig:
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": window},
    }
    return CONFIG_MAPPING["olmo3"](**SHAPE, **FIELDS["olmo3"], rope_parameters=rope)


def test_olmo_3_has_a_rotary_base_for_its_windows() -> None:
    found = head_of(layout_of(olmo3(5e5)))
    assert (found["olmo2.rope.freq_base"], found["olmo2.rope.freq_base_swa"]) == (5e5, 5e5)


def test_olmo_3_with_another_base_in_its_windows_is_refused_for_llama_cpp_has_one_for_all() -> None:
    with pytest.raises(AccullmError) as caught:
        architecture_of(olmo3(1e4))
    assert caught.value.what == (
        "llama.cpp's architecture olmo2 has one base of rotary positions for all blocks, and the model another in its "
        "windows (rope_theta)"
    )


# -- card and generation settings --------------------------------------------------------------------------

CARD = """---
license: [apache-2.0, mit]
language:
- en
- no
tags: [chat, 7]
datasets: owner/texts
base_model: [owner/Model-7B, {a: 1}, true]
version: 1.5
author: {a: 1}
---
# Title
"""


def tiny() -> Layout:
    return layout_of(CONFIG_MAPPING["qwen2"](**SHAPE))


def general(companion: Path) -> dict[str, Any]:
    """What a companion adds to what is said without any."""
    without = head_of(tiny())
    found = head_of(tiny(), "model", companion)
    assert without.items() <= found.items()
    return {key.removeprefix("general."): value for key, value in found.items() if key not in without}


def test_what_a_card_says_in_text_and_lists_of_text_is_written(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD)
    assert general(tmp_path / "README.md") == {
        "version": "1.5",
        "license": "apache-2.0,mit",
        "tags": ["chat", "7"],
        "languages": ["en", "no"],
        "dataset.count": 1,
        "dataset.0.name": "Texts",
        "dataset.0.organization": "Owner",
        "dataset.0.repo_url": "https://huggingface.co/owner/texts",
        "base_model.count": 1,
        "base_model.0.name": "Model 7B",
        "base_model.0.organization": "Owner",
        "base_model.0.repo_url": "https://huggingface.co/owner/Model-7B",
    }


@pytest.mark.parametrize("text", ["", "# Title\n", "---\n- [\n---\n", "---\n- a\n---\n", "---\n\x00: é\n---\n"])
def test_a_card_whose_head_says_nothing_adds_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert general(tmp_path / "README.md") == {}


def test_a_card_that_is_no_text_adds_nothing(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert general(tmp_path / "README.md") == {}


def test_generation_settings_are_what_llama_cpp_samples_by(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.7, "top_k": 20, "top_p": 1, "repetition_penalty": 1.1, "eos": 2}))
    assert general(path) == {
        "sampling.temp": 0.7,
        "sampling.top_k": 20,
        "sampling.top_p": 1.0,
        "sampling.penalty_repeat": 1.1,
    }


@pytest.mark.parametrize("text", ["", "[]", '{"temperature": "hot", "top_k": 2.5, "top_p": true, "min_p": null}'])
def test_generation_settings_that_are_none_add_nothing(text: str, tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(text)
    assert general(path) == {}
