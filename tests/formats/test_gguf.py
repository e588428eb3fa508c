"""GGUF: held against llama.cpp's own library, for every architecture that is written."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from accullm_cli.errors import AccullmError
from accullm_cli.formats import FORMATS, open_artifact
from accullm_cli.formats.base import ModelShape, Parts
from accullm_cli.formats.capabilities import CAPABILITIES
from accullm_cli.formats.gguf import model_objections
from accullm_cli.model.gguf_file import read_gguf
from accullm_cli.model.gguf_model import read_model
from accullm_cli.model.gguf_programs import ARCHITECTURES
from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.encodings.base import StoredLinear
from accullm_cli.quant.plan import LinearPlan, Plan
from tests.artifacts import empty
from tests.llama_cpp import byte_tokenizer, llama_cpp

TEXT = "Hello wörld, 12 tests\n  it's the best"
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "max_position_embeddings": 256,
    "bos_token_id": 259,
    "eos_token_id": 260,
    "pad_token_id": 261,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_LOCAL = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
# What a configuration needs beside the shape, to be one that llama.cpp runs and to show each number that it may lose.
FIELDS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "head_dim": 24},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3": {"head_dim": 24},
    "qwen2_moe": {**_EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
    "qwen3_moe": {**_EXPERTS, "moe_intermediate_size": 32, "head_dim": 16, "norm_topk_prob": True},
    "gemma": {"head_dim": 24},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, **_LOCAL},
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 16,
        "num_hidden_layers": 6,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "olmo": {"clip_qkv": 1.0},
    "olmo3": _LOCAL,
    "olmoe": {**_EXPERTS, "num_key_value_heads": 4},
    "granite": {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 3.0,
    },
    "cohere": {"logit_scale": 0.5},
    "smollm3": {"num_hidden_layers": 4},
    "seed_oss": {"head_dim": 16},
}
_ROUTED: dict[str, Any] = {
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
}
FIELDS |= {
    "glm4_moe": {**_ROUTED, "head_dim": 24, "use_qk_norm": True, "attention_bias": True},
    "dots1": {**_ROUTED, "num_key_value_heads": 4, "head_dim": 24, "n_group": 2, "topk_group": 1},
    "granitemoe": {**FIELDS["mixtral"], **FIELDS["granite"]},
    "granitemoeshared": {**FIELDS["mixtral"], **FIELDS["granite"], "shared_intermediate_size": 48},
    "ernie4_5_moe": {
        "moe_num_experts": 6,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "num_hidden_layers": 3,
    },
    "minimax_m2": {
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "head_dim": 24,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 24},
    "exaone_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "num_shared_experts": 2,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
        "num_hidden_layers": 4,
        "head_dim": 24,
        "sliding_window": 16,
    },
    "afmoe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "num_shared_experts": 2,
        "num_dense_layers": 1,
        "num_hidden_layers": 5,
        "head_dim": 24,
        "sliding_window": 16,
        "mup_enabled": True,
        "route_scale": 1.5,
    },
}
FIELDS |= {
    "cohere2": {"logit_scale": 0.5, "sliding_window": 16, "num_hidden_layers": 5, "head_dim": 16},
    "glm": {"head_dim": 16, "attention_bias": True},
    "glm4": {"head_dim": 24, "attention_bias": True},
    "exaone": {"head_dim": 24},
    "exaone4": {"sliding_window": 16, "num_hidden_layers": 64},
    "hunyuan_v1_dense": {"head_dim": 24},
    "phi": {"num_key_value_heads": 4},
    "jais2": {"head_dim": 24},
    "iquestcoder": {"head_dim": 24, "attention_bias": True},
    "ministral3": {
        "head_dim": 24,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e5,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "max_position_embeddings": 256,
            "beta_fast": 16.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "llama_4_scaling_beta": 0.25,
        },
    },
    "gpt_neox": {
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "gpt_bigcode": {
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 256,
        "n_inner": 96,
        "num_key_value_heads": 1,
    },
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 96},
}
LAYERS = {
    "gpt_neox": "gpt_neox.layers",
    "falcon": "transformer.h",
    "bloom": "transformer.h",
    "gpt_bigcode": "transformer.h",
    "mpt": "transformer.blocks",
}
# GELU is a table of float16 in llama.cpp.
WITH_GELU = ("gemma", "gemma2", "gemma3_text", "starcoder2", "phi", "gpt_neox", "falcon", "bloom", "mpt", "gpt_bigcode")


def build(model_type: str, dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
    """A random model whose every parameter matters."""
    torch.manual_seed(sum(map(ord, model_type)))
    usual = CONFIG_MAPPING[model_type]()
    shape = {name: value for name, value in SHAPE.items() if hasattr(usual, name)}
    settings = {**shape, **FIELDS.get(model_type, {}), **fields}
    config = CONFIG_MAPPING[model_type](**settings)
    config.dtype = dtype
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")
    with torch.no_grad():
        kept = model.state_dict()
        corrections = (value for name, value in model.named_buffers() if name in kept)
        for parameter in itertools.chain(model.parameters(), corrections):
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.tie_weights()
    return model.to(dtype).eval()


def encoded(row: LinearPlan, weight: torch.Tensor, encoding: str) -> tuple[LinearPlan, StoredLinear]:
    """A weight rounded to the nearest values of an encoding's grid."""
    storable = next(entry for entry in CAPABILITIES["gguf"].linears if entry.encoding == encoding)
    own = dataclasses.replace(
        row,
        encoding=encoding,
        bits=storable.bits[0],
        group_size=storable.group_sizes[0],
        symmetric=storable.symmetric[0],
    )
    grid, _ = ENCODINGS[encoding].grid(weight.float(), own, "float16", torch.ones(weight.shape[1]))
    codes = grid.round_to_nearest(weight.float()).to(torch.uint8)
    none = torch.zeros(0, dtype=torch.int64)
    return own, ENCODINGS[encoding].store(grid, codes, own, none, weight[:, none])


def parts_of(
    model: PreTrainedModel,
    run: Path,
    kept: tuple[str, ...] = (),
    encodings: tuple[str, ...] = (),
    stored: dict[str, StoredLinear] | None = None,
) -> Parts:
    """What quantize leaves of a model whose linears stay as they are, or have these encodings in turn.

    Args:
        stored: where the quantized ones go by name, the embedding among them.
    """
    run.mkdir(parents=True)
    turn = itertools.cycle(encodings)
    stored = {} if stored is None else stored
    plans: dict[str, LinearPlan] = {}
    kinds: dict[str, str] = {}
    tied = set(model.all_tied_weights_keys)
    tensors = {name: value.clone() for name, value in model.state_dict().items() if name not in tied}
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    blocks = []
    layers = LAYERS.get(model.config.model_type, "model.layers")
    for number in range(model.config.num_hidden_layers):
        own = {name: value for name, value in tensors.items() if name.startswith(f"{layers}.{number}.")}
        blocks.append(run / f"block-{number}.safetensors")
        for name, value in list(own.items()):
            linears = (
                {name.removesuffix(".weight"): value}
                if value.dim() == 2 and name.endswith(".weight") and not name.endswith("gate.weight")
                else {}
            )
            if value.dim() == 3:
                linears = {f"{name}.{expert}": weight for expert, weight in enumerate(value)}
            for linear, weight in linears.items():
                plans[linear] = LinearPlan(linear, *weight.shape, 16, -1, False, (), weight.itemsize)
                kinds[linear] = "expert" if value.dim() == 3 else "linear"
            # Experts of one parameter are stored alike.
            encoding = next(turn) if encodings and linears else ""
            for linear, weight in linears.items() if encoding else ():
                plans[linear], stored[linear] = encoded(plans[linear], weight, encoding)
                own |= {f"{linear}.{key}": tensor for key, tensor in stored[linear].to_tensors().items()}
                own.pop(name, None)
        save_file(own, blocks[-1])
    embeddings: dict[str, LinearPlan] = {}
    shards: tuple[Path, ...] = ()
    if encodings:
        weight, name = tensors.pop("model.embed_tokens.weight"), "model.embed_tokens"
        row = LinearPlan(name, *weight.shape, 16, -1, False, (), weight.itemsize)
        embeddings[name], stored[name] = encoded(row, weight, encodings[-1])
        shards = (run / "embedding.safetensors",)
        save_file({f"{name}.{key}": tensor for key, tensor in stored[name].to_tensors().items()}, shards[0])
    byte_tokenizer().save_pretrained(run / "tokenizer")
    config = model.config.to_dict() | {"dtype": str(model.dtype).removeprefix("torch.")}
    companions = {file.name: file for file in (run / "tokenizer").iterdir()}
    shape = ModelShape(
        model.config.model_type, model.dtype, kinds, config=config, companions=companions, parameters=shapes, kept=kept
    )
    outside = ((name, value) for name, value in tensors.items() if not name.startswith(f"{layers}."))
    provenance = {"source": "owner/Tiny Model@abc", "source_sha256": "12ab", "config": {}, "records": []}
    plan = Plan(plans, embeddings=embeddings)
    return Parts(config, companions, plan, shape, tuple(blocks), outside, provenance, shards)


def written(model: PreTrainedModel, tmp_path: Path) -> Path:
    FORMATS["gguf"].write(empty(tmp_path / "artifact"), parts_of(model, tmp_path / "run"))
    return tmp_path / "artifact"


def logits_of(path: Path, ids: torch.Tensor) -> torch.Tensor:
    with llama_cpp().model(path, len(ids), exact=True) as loaded:
        return torch.from_numpy(loaded.logits(ids.tolist()))


def ids(count: int = 40) -> torch.Tensor:
    """More tokens than a window of the models with windows."""
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(1))


# -- llama.cpp ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_llama_cpp_computes_what_transformers_computes(model_type: str, tmp_path: Path) -> None:
    model = build(model_type)
    path = written(model, tmp_path) / "Tiny-Model.gguf"
    with torch.no_grad():
        expected = model(ids()[None]).logits[0]
    difference = (logits_of(path, ids()) - expected).abs().max()
    assert difference < (1e-2 if model_type in WITH_GELU else 2e-4)
    assert expected.std() > 0.3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_keep_the_dtype_of_the_source(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build("llama", dtype)
    path = written(model, tmp_path) / "Tiny-Model.gguf"
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == {torch.float16: "F16"}.get(dtype, "BF16")
    assert kinds["blk.0.attn_q.bias"] == kinds["output_norm.weight"] == "F32"
    with torch.no_grad():
        expected = model.float()(ids()[None]).logits[0]
    # llama.cpp rounds what it multiplies by such weights to their dtype.
    assert (logits_of(path, ids()) - expected).abs().mean() < (0.003 if dtype == torch.float16 else 0.03)


SCALED: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 1e4,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4},
    "yarn within other bounds": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 1e4,
        "beta_fast": 16.0,
    },
}


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        *itertools.product(["llama"], SCALED),
        *itertools.product(["exaone"], ["linear", "llama3", "yarn"]),
        *itertools.product(["cohere", "cohere2", "hunyuan_v1_dense", "jais2"], ["linear", "yarn"]),
    ],
)
def test_scaled_rotary_positions_are_those_of_transformers(model_type: str, name: str, tmp_path: Path) -> None:
    model = build(model_type, head_dim=16, rope_parameters=SCALED[name])
    path = written(model, tmp_path) / "Tiny-Model.gguf"
    with torch.no_grad():
        expected = model(ids()[None]).logits[0]
    assert (logits_of(path, ids()) - expected).abs().max() < 2e-4


def test_a_rotary_base_that_is_stretched_for_good_is_written_as_it_is(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "alpha": 30.0, "factor": 1.0, "rope_theta": 1e4}
    model = build("hunyuan_v1_moe", rope_parameters=rope)
    path = written(model, tmp_path) / "Tiny-Model.gguf"
    with torch.no_grad():
        expected = model(ids()[None]).logits[0]
    assert (logits_of(path, ids()) - expected).abs().max() < 2e-4


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gpt_neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3}}),
        ("falcon", {"new_decoder_architecture": False}),  # the 7B: one head of keys
        ("falcon", {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4}),
        ("falcon", {"num_ln_in_parallel_attn": 1}),  # the 11B
    ],
    ids=["one after the other", "another base", "one head of keys", "as many heads of keys", "one norm"],
)
def test_blocks_of_another_kind_are_those_of_transformers(
    model_type: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = build(model_type, **fields)
    path = written(model, tmp_path) / "Tiny-Model.gguf"
    with torch.no_grad():
        expected = model(ids()[None]).logits[0]
    assert (logits_of(path, ids()) - expected).abs().max() < 1e-2
    file = read_gguf(path.rename(empty(tmp_path / "alone") / path.name))
    found = read_model(file)
    with torch.no_grad():
        read = AutoModelForCausalLM.from_config(found.model.config, dtype=torch.float32).eval()
        for name in found.parameters:
            read.get_parameter(name).copy_(found.values(name))
        read.tie_weights()
        assert torch.equal(read(ids()[None]).logits[0], expected)


def test_llama_cpp_cuts_text_into_the_same_tokens(tmp_path: Path) -> None:
    path = written(build("llama"), tmp_path) / "Tiny-Model.gguf"
    with llama_cpp().model(path) as loaded:
        assert loaded.tokenize(TEXT) == byte_tokenizer()(TEXT).input_ids
        assert loaded.tokenize("<s>test", special=True) == byte_tokenizer()("<s>test").input_ids
        assert len(loaded.tokenize("<s>", special=False)) == 3


# -- the file itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mixtral"])
def test_what_was_written_is_read_back(model_type: str, tmp_path: Path) -> None:
    model = build(model_type, torch.bfloat16)
    artifact = open_artifact(written(model, tmp_path))
    weights = model.state_dict()
    assert set(artifact.names()) == {name for name in weights if name not in model.all_tied_weights_keys}
    for name in artifact.names():
        # A norm of Gemma is stored with one added, in float32.
        tolerance = 2.0**-24 if weights[name].dim() == 1 and model_type == "gemma3_text" else 0.0
        difference = (artifact.tensor(name).double() - weights[name].double()).abs().max()
        assert difference <= tolerance
    assert not list(artifact.problems())


def test_the_file_says_what_it_is_and_how_it_was_made(tmp_path: Path) -> None:
    fields = GGUFReader(written(build("llama"), tmp_path) / "Tiny-Model.gguf").fields
    read = {name: field.contents() for name, field in fields.items() if not name.startswith("tokenizer.ggml.t")}
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "Tiny Model",
        "accullm.source": "owner/Tiny Model@abc",
        "general.quantization_version": 2,
        "general.file_type": 0,
        "llama.block_count": 2,
        "llama.context_length": 256,
        "llama.attention.key_length": 24,
        "llama.rope.dimension_count": 24,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 259,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.merges": ["t e", "s t", "te st"],
        "accullm.source_sha256": "12ab",
    }
    assert {name: read[name] for name in expected} == expected


# -- quantized ---------------------------------------------------------------------------------------------

MIXES = {
    "blocks of 32": (64, ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")),
    "blocks of 256": (256, ("Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")),
}


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "phi3"])
@pytest.mark.parametrize("mix", MIXES)
def test_quantized_tensors_are_what_was_rounded(mix: str, model_type: str, tmp_path: Path) -> None:
    width, encodings = MIXES[mix]
    model = build(model_type, torch.bfloat16, hidden_size=width, intermediate_size=2 * width, head_dim=width // 4)
    stored: dict[str, StoredLinear] = {}
    parts = parts_of(model, tmp_path / "run", encodings=encodings, stored=stored)
    FORMATS["gguf"].write(empty(tmp_path / "artifact"), parts)
    artifact = open_artifact(tmp_path / "artifact")
    assert artifact.plan.quantized == parts.plan.quantized
    reference = copy.deepcopy(model).float()
    for name, linear in stored.items():
        assert torch.equal(artifact.linear(name).dequantize(), linear.dequantize())
        assert artifact.linear_bytes(name) == ENCODINGS[parts.plan.quantized[name].encoding].stored_bytes(
            parts.plan.quantized[name]
        )
        stack, _, number = name.rpartition(".")
        if number.isdigit():
            reference.get_parameter(stack).data[int(number)] = linear.dequantize()
        else:
            reference.get_parameter(f"{name}.weight").data.copy_(linear.dequantize())
    assert not list(artifact.problems())
    # By the package: a tensor whose rows are in the model's order, and one whose rows are not.
    read = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in GGUFReader(
        tmp_path / "artifact" / "Tiny-Model.gguf").tensors}  # fmt: skip
    embedding = stored["model.embed_tokens"].dequantize()
    assert torch.equal(torch.from_numpy(read["token_embd.weight"]), embedding)
    if model_type == "llama":
        rows = stored["model.layers.0.self_attn.q_proj"].dequantize()
        pairs = rows.view(4, 2, -1, width).transpose(1, 2).reshape(-1, width)
        assert torch.equal(torch.from_numpy(read["blk.0.attn_q.weight"]), pairs)
    with torch.no_grad():
        expected = reference(ids()[None]).logits[0]
        original = model.float()(ids()[None]).logits[0]
    # llama.cpp rounds what it multiplies by blocks to 8 bits.
    difference = (logits_of(tmp_path / "artifact" / "Tiny-Model.gguf", ids()) - expected).square().mean().sqrt()
    assert difference < 0.35 * (expected - original).square().mean().sqrt()


def test_the_size_of_a_file_is_foreseen_to_the_byte(tmp_path: Path) -> None:
    model = build("llama", torch.bfloat16)
    parts = parts_of(model, tmp_path / "run", encodings=MIXES["blocks of 32"][1])
    size_of = FORMATS["gguf"].file_size(parts.shape, parts.provenance)  # type: ignore[attr-defined]
    expected = [size_of(parts.plan), size_of(dataclasses.replace(parts.plan, embeddings={}))]
    FORMATS["gguf"].write(empty(tmp_path / "artifact"), parts)
    assert (tmp_path / "artifact" / "Tiny-Model.gguf").stat().st_size == expected[0]
    assert expected[1] - expected[0] > 264 * 64  # of an embedding in bfloat16


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])  # the latter with biases that no key speaks of
def test_a_file_of_others_is_an_artifact(model_type: str, tmp_path: Path) -> None:
    model = build(model_type, torch.bfloat16, tie_word_embeddings=True)
    stored: dict[str, StoredLinear] = {}
    parts = parts_of(model, tmp_path / "run", encodings=MIXES["blocks of 32"][1], stored=stored)
    FORMATS["gguf"].write(empty(tmp_path / "artifact"), parts)
    file = tmp_path / "downloaded.gguf"
    (tmp_path / "artifact" / "Tiny-Model.gguf").rename(file)
    artifact = open_artifact(file)
    assert {name: row.encoding for name, row in artifact.plan.quantized.items()} == {
        name: row.encoding for name, row in parts.plan.quantized.items()
    }
    for name, linear in stored.items():
        assert torch.equal(artifact.linear(name).dequantize(), linear.dequantize())
    for name in artifact.names():
        if name.endswith(".bias"):
            assert torch.equal(artifact.tensor(name), model.state_dict()[name])
    assert artifact.manifest is not None
    assert artifact.manifest.provenance["metadata"]["general.quantized_by"] == "AccuLLM"


# -- refusals ----------------------------------------------------------------------------------------------

OBSTACLES: dict[str, tuple[str, dict[str, Any], str]] = {
    "another model": ("gpt2", {}, "models of type gpt2 cannot be written for llama.cpp"),
    "rope": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "llama.cpp's architecture llama scales rotary positions otherwise than the model (dynamic)",
    ),
    "yarn": (
        "llama",
        {"rope_parameters": {**SCALED["yarn"], "attention_factor": 1.5}},
        "llama.cpp's architecture llama has an attention_factor and a beta_slow of its own for YaRN, and the model has "
        "others",
    ),
    "bounds of yarn": (
        "llama",
        {"rope_parameters": {**SCALED["yarn"], "truncate": False}},
        "llama.cpp's architecture llama rounds the bounds between which YaRN scales, and the model does not (truncate)",
    ),
    "factors": (
        "qwen2",
        {"rope_parameters": SCALED["llama3"]},
        "llama.cpp's architecture qwen2 scales rotary positions otherwise than the model (llama3)",
    ),
    "width of heads": (
        "cohere2",
        {"head_dim": 24},
        "llama.cpp's architecture cohere2 has heads that are together as wide as the model, and the model has others "
        "(head_dim)",
    ),
    "biases of queries": (
        "cohere2",
        {"attention_bias": True},
        "llama.cpp's architecture cohere2 has no bias behind its attention, and the model has (attention_bias)",
    ),
    "biases of the MLP": (
        "exaone",
        {"mlp_bias": True},
        "llama.cpp's architecture exaone has no biases, and the model has (mlp_bias)",
    ),
    "windows of small models": (
        "exaone4",
        {"num_hidden_layers": 4},
        "llama.cpp's architecture exaone4 has no windows but in models of 64 blocks, and the model does otherwise",
    ),
    "an embedding for both": (
        "phi",
        {"tie_word_embeddings": True},
        "llama.cpp's architecture phi2 has an output head of its own, and the model has not",
    ),
    "other attention": (
        "mpt",
        {"attn_config": {"clip_qkv": 8.0}},
        "llama.cpp's architecture mpt neither clips nor scales nor has biases, and the model does (attn_config, "
        "logit_scale, no_bias)",
    ),
    "other positions than ALiBi": (
        "mpt",
        {"attn_config": {"alibi": False}},
        "llama.cpp's architecture mpt has ALiBi of up to 8, and the model other positions (attn_config)",
    ),
    "heads of keys in one projection": (
        "gpt_bigcode",
        {"multi_query": False},
        "llama.cpp's architecture starcoder has one head of keys, and the model has more (multi_query)",
    ),
    "a norm in front of the sum": (
        "bloom",
        {"apply_residual_connection_post_layernorm": True},
        "llama.cpp's architecture bloom adds what comes in front of norms, and the model what comes behind",
    ),
    "scale of yarn": (
        "llama",
        {"rope_parameters": {**SCALED["yarn"], "mscale": 1.0, "mscale_all_dim": 1.0}},
        "llama.cpp's architecture llama has no scale of its own for YaRN, and the model has (mscale_all_dim)",
    ),
    "experts": (
        "qwen2_moe",
        {"norm_topk_prob": True},
        "llama.cpp's architecture qwen2moe leaves them as they are, and the model does otherwise (norm_topk_prob)",
    ),
    "pattern": (
        "gemma2",
        {"layer_types": ["full_attention", "full_attention"]},
        "llama.cpp's architecture gemma2 has sliding_attention in block 0, and the model full_attention",
    ),
    "head": (
        "gemma2",
        {"tie_word_embeddings": False},
        "llama.cpp's architecture gemma2 has no tensor for lm_head.weight",
    ),
    "activation": (
        "llama",
        {"hidden_act": "gelu"},
        "llama.cpp's architecture llama has silu in its MLP, and the model gelu",
    ),
    "groups": (
        "glm4_moe",
        {"n_group": 2, "topk_group": 2},
        "llama.cpp's architecture glm4moe takes fewer groups of experts than there are, and the model all of them "
        "(topk_group)",
    ),
    "a head of its own": (
        "dots1",
        {"tie_word_embeddings": True},
        "llama.cpp's architecture dots1 has an output head of its own, and the model has not",
    ),
    "windows": (
        "dots1",
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "llama.cpp's architecture dots1 has no windows, and the model has (layer_types)",
    ),
    "heads of keys": (
        "dots1",
        {"num_key_value_heads": 2},
        "llama.cpp's architecture dots1 has as many heads of keys as of queries, and the model has fewer",
    ),
    "bias": (
        "hunyuan_v1_moe",
        {"attention_bias": True},
        "llama.cpp's architecture hunyuan-moe has no bias behind its attention, and the model has (attention_bias)",
    ),
    "biases": (
        "ernie4_5_moe",
        {"use_bias": True},
        "llama.cpp's architecture ernie4_5-moe has no biases, and the model has (use_bias)",
    ),
    "blocks with experts": (
        "ernie4_5_moe",
        {"moe_layer_end_index": 1},
        "llama.cpp's architecture ernie4_5-moe has experts in every block behind the first of them, and the model has "
        "not",
    ),
    "other blocks with experts": (
        "exaone_moe",
        {"mlp_layer_types": ["sparse", "dense", "sparse", "sparse"]},
        "llama.cpp's architecture exaone-moe has experts in all blocks but the first, and the model in others "
        "(mlp_layer_types)",
    ),
    "rope that is scaled": (
        "exaone_moe",
        {"rope_parameters": SCALED["linear"]},
        "llama.cpp's architecture exaone-moe does not scale rotary positions, and the model does (linear)",
    ),
    "embeddings as they are": (
        "afmoe",
        {"mup_enabled": False},
        "llama.cpp's architecture afmoe multiplies embeddings by the square root of their width, and the model does "
        "not (mup_enabled)",
    ),
    "every fourth block": (
        "afmoe",
        {"global_attn_every_n_layers": 3},
        "llama.cpp's architecture afmoe has a window in all blocks but every fourth, and the model in others "
        "(layer_types)",
    ),
    "pattern of Command R7B": (
        "cohere2",
        {"layer_types": ["full_attention"] * 5},
        "llama.cpp's architecture cohere2 has sliding_attention in block 0, and the model full_attention",
    ),
    "heads of GLM": (
        "glm",
        {"head_dim": 24},
        "llama.cpp's architecture chatglm has heads that are together as wide as the model, and the model has others "
        "(head_dim)",
    ),
    "biases of EXAONE": (
        "exaone",
        {"mlp_bias": True},
        "llama.cpp's architecture exaone has no biases, and the model has (mlp_bias)",
    ),
    "windows of EXAONE 4": (
        "exaone4",
        {"num_hidden_layers": 4},
        "llama.cpp's architecture exaone4 has no windows but in models of 64 blocks, and the model does otherwise",
    ),
    "head of Phi-2": (
        "phi",
        {"tie_word_embeddings": True},
        "llama.cpp's architecture phi2 has an output head of its own, and the model has not",
    ),
    "queries of Ministral 3": (
        "ministral3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1}},
        "llama.cpp's architecture mistral3 has YaRN and queries that grow with their position, and the model has not "
        "(llama_4_scaling_beta)",
    ),
    "scale of Ministral 3": (
        "ministral3",
        {"rope_parameters": {**FIELDS["ministral3"]["rope_parameters"], "mscale": 0.5}},
        "llama.cpp's architecture mistral3 has a scale of 1 for YaRN, and the model 0.5 (mscale)",
    ),
    "no rotary positions": (
        "falcon",
        {"alibi": True},
        "llama.cpp's architecture falcon has rotary positions, and the model has not (alibi)",
    ),
    "biases of Falcon": (
        "falcon",
        {"bias": True},
        "llama.cpp's architecture falcon has no biases, and the model has (bias)",
    ),
    "another activation": (
        "falcon",
        {"activation": "relu"},
        "llama.cpp's architecture falcon has gelu in its MLP, and the model relu",
    ),
    "no bias": (
        "gpt_neox",
        {"attention_bias": False},
        "llama.cpp's architecture gptneox has a bias behind its attention, and the model has not (attention_bias)",
    ),
    "scale": (
        "gemma2",
        {"query_pre_attn_scalar": 144},
        "llama.cpp's architecture gemma2 scales attention by 16, and the model by 144",
    ),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_a_model_that_llama_cpp_does_not_run_is_refused_by_name(name: str, tmp_path: Path) -> None:
    model_type, fields, message = OBSTACLES[name]
    shape = parts_of_shape(build(model_type, **fields), tmp_path)
    assert [objection.what for objection in model_objections(shape)] == [message]


def parts_of_shape(model: PreTrainedModel, tmp_path: Path) -> ModelShape:
    byte_tokenizer().save_pretrained(tmp_path)
    tied = model.all_tied_weights_keys
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}
    companions = {file.name: file for file in tmp_path.iterdir()}
    return ModelShape(
        model.config.model_type, torch.float32, {}, config=model.config.to_dict(), companions=companions,
        parameters=shapes,
    )  # fmt: skip


def test_tensors_that_the_model_has_no_place_for_are_refused(tmp_path: Path) -> None:
    parts = parts_of(build("llama"), tmp_path / "run", kept=("extra.weight",))
    with pytest.raises(AccullmError, match=r"architecture llama has no tensor for extra\.weight"):
        FORMATS["gguf"].write(empty(tmp_path / "artifact"), parts)
