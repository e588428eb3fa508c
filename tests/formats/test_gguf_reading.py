"""GGUF files that stand alone are read again, of every architecture that is written: as artifacts and as sources."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize
from gguf.quants import quantize
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from accullm_cli.errors import AccullmError
from accullm_cli.formats import FORMATS, open_artifact
from accullm_cli.model.gguf_programs import ARCHITECTURES
from accullm_cli.model.source import open_source
from tests.artifacts import empty
from tests.formats.test_gguf import SCALED, TEXT, build, ids, parts_of, written
from tests.llama_cpp import byte_tokenizer, llama_cpp

Q4_0, Q8_0 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0
# What the script of llama.cpp as vendored in llama-cpp-python 0.3.36 leaves out of what is written here of the models
# of `tests.formats.test_gguf`; it has nothing beyond, and the same values. Of nemotron it asks for a file that is no
# longer saved, of gpt_neox for a setting; of exaone it knows the names of the first checkpoints alone;
# bloom, mpt, gpt_bigcode and internlm3 were not held against it.
_HEAD = "attention.key_length attention.value_length"
LEFT_OUT = {
    "llama": "",
    "mistral": "",
    "mixtral": _HEAD,
    "qwen2": f"{_HEAD} rope.dimension_count vocab_size",
    "qwen3": "rope.dimension_count vocab_size",
    "qwen2_moe": f"{_HEAD} rope.dimension_count vocab_size",
    "qwen3_moe": "rope.dimension_count vocab_size",
    "gemma": "rope.dimension_count rope.freq_base vocab_size",
    "gemma2": "rope.dimension_count rope.freq_base vocab_size",
    "gemma3_text": "rope.dimension_count vocab_size",
    "phi3": f"{_HEAD} vocab_size",
    "olmo": f"{_HEAD} rope.dimension_count vocab_size",
    "olmo2": f"{_HEAD} rope.dimension_count vocab_size",
    "olmo3": f"{_HEAD} rope.dimension_count vocab_size",
    "olmoe": f"{_HEAD} rope.dimension_count vocab_size",
    "granite": _HEAD,
    "starcoder2": f"{_HEAD} rope.dimension_count vocab_size",
    "stablelm": f"{_HEAD} rope.freq_base vocab_size",
    "cohere": f"{_HEAD} rope.dimension_count vocab_size",
    "smollm3": _HEAD,
    "seed_oss": "rope.dimension_count vocab_size",
    "arcee": "",
    "ernie4_5": "rope.dimension_count vocab_size",
    "nemotron": "vocab_size",
    "glm4_moe": "vocab_size",
    "granitemoe": _HEAD,
    "granitemoeshared": _HEAD,
    "ernie4_5_moe": f"{_HEAD} rope.dimension_count vocab_size",
    "dots1": "rope.dimension_count vocab_size",
    "minimax_m2": "vocab_size",
    "hunyuan_v1_moe": "rope.dimension_count vocab_size",
    "exaone_moe": "rope.dimension_count",
    "afmoe": "",
    "cohere2": "",
    "glm": f"{_HEAD} vocab_size",
    "glm4": "vocab_size",
    "exaone": "",
    "exaone4": f"{_HEAD} rope.dimension_count",
    "hunyuan_v1_dense": "rope.dimension_count vocab_size",
    "phi": f"{_HEAD} rope.freq_base vocab_size",
    "jais2": "vocab_size",
    "iquestcoder": "",
    "ministral3": "",
    "gpt_neox": f"{_HEAD} attention.head_count_kv rope.freq_base vocab_size",
    "bloom": "",
    "mpt": "",
    "gpt_bigcode": "",
    "internlm3": "",
    "falcon": f"{_HEAD} rope.dimension_count rope.freq_base vocab_size",
}
# Of a configuration, what says nothing of the function, or the same in another way.
SILENT = {"architectures", "dtype", "transformers_version", "_name_or_path", "quantization_config", "use_cache"}


def alone(model: Any, tmp_path: Path) -> Path:
    """The file of a model, in a directory of its own."""
    path = written(model, tmp_path) / "Tiny-Model.gguf"
    return path.rename(empty(tmp_path / "downloads") / "downloaded.gguf")


def without(file: Path, keys: str, architecture: str) -> Path:
    """A file as it would be without some keys of its architecture: they are of a room that nobody reads."""
    content = file.read_bytes()
    for key in keys.split():
        own, other = f"{architecture}.{key}".encode(), f"{'x' * len(architecture)}.{key}".encode()
        assert content.count(own) == 1
        content = content.replace(own, other)
    path = file.with_name("fewer.gguf")
    path.write_bytes(content)
    return path


def check_configuration(directory: Path, model: Any) -> None:
    found, expected = AutoConfig.from_pretrained(directory).to_dict(), model.config.to_dict()
    names = {*found, *expected} - SILENT
    if model.config.model_type in (
        "mistral",
        "iquestcoder",
        "internlm3",
    ):  # which no key tells from a llama, without a window
        assert found["model_type"] == "llama"
        names = {*found} & {*expected} - SILENT - {"model_type"}
    if not hasattr(type(model.config)(), "num_key_value_heads"):
        names -= {"num_key_value_heads"}  # which means nothing to the class
    # Without the key, a size of heads that goes without saying.
    head = model.config.hidden_size // model.config.num_attention_heads
    for values in (found, expected):
        values["head_dim"] = values.get("head_dim") or head
        values.get("attn_config", {}).pop("dtype", None)  # MPT's
    assert {name: found.get(name) for name in names} == {name: expected.get(name) for name in names}


def check_tokenizer(directory: Path) -> None:
    found = AutoTokenizer.from_pretrained(directory)
    for text in (TEXT, "<s>te</s>"):
        assert found(text).input_ids == byte_tokenizer()(text).input_ids
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (259, 260, 261)


# -- every architecture ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_file_of_an_architecture_is_an_artifact_and_a_source(model_type: str, tmp_path: Path) -> None:
    model = build(model_type, torch.bfloat16)
    file = alone(model, tmp_path)
    weights = {name: value for name, value in model.state_dict().items() if name not in model.all_tied_weights_keys}
    artifact = open_artifact(file)
    fewer = without(file, LEFT_OUT[model_type], ARCHITECTURES[model_type].name)
    source = open_source(str(fewer), tmp_path / "cache")
    imported = load_file(source.directory / "model.safetensors")
    assert set(artifact.names()) == set(imported) == set(weights)
    shifted = ARCHITECTURES[model_type].norm_shift
    for name, expected in weights.items():
        # A norm is stored with one added, in float32.
        tolerance = 2.0**-23 if shifted and expected.dim() == 1 else 0.0
        assert (artifact.tensor(name).double() - expected.double()).abs().max() <= tolerance, name
        assert torch.equal(imported[name], artifact.tensor(name).to(torch.bfloat16)), name
    assert not list(artifact.problems())
    for directory in (artifact.path, source.directory):
        check_configuration(directory, model)
        check_tokenizer(directory)


@pytest.mark.parametrize("name", ["linear", "yarn", "yarn within other bounds"])
def test_scaled_rotary_positions_are_read_again(name: str, tmp_path: Path) -> None:
    artifact = open_artifact(alone(build("llama", head_dim=16, rope_parameters=SCALED[name]), tmp_path))
    assert AutoConfig.from_pretrained(artifact.path).rope_parameters == SCALED[name]


def test_blocks_that_predict_further_tokens_are_named_and_not_read(tmp_path: Path) -> None:
    model = build("glm4_moe", torch.bfloat16)
    blocks, shape = model.config.num_hidden_layers, (64, 64)
    further = {f"blk.{blocks}.{name}.weight": torch.zeros(shape).numpy() for name in ("attn_q", "nextn.eh_proj")}
    file = edited(alone(model, tmp_path), further, block_count=blocks + 1, nextn_predict_layers=1)
    artifact = open_artifact(file)
    source = open_source(str(file), tmp_path / "cache")
    assert artifact.manifest is not None
    said = "2 tensors of the GGUF file predict further tokens and are not read"
    assert artifact.manifest.provenance["records"] == [said]
    assert any(record.startswith("2 tensors of the GGUF file are not part of the model") for record in source.records)
    for directory in (artifact.path, source.directory):
        check_configuration(directory, model)


def test_experts_and_gates_are_where_they_were(tmp_path: Path) -> None:
    """By what the model makes of a text; a stack is one parameter of two of the file's tensors."""
    model = build("qwen2_moe", torch.float32)
    source = open_source(str(alone(model, tmp_path)), tmp_path / "cache")
    read = AutoModelForCausalLM.from_pretrained(source.directory, experts_implementation="eager")
    with torch.no_grad():
        assert torch.equal(read(ids()[None]).logits, model(ids()[None]).logits)


# -- quantized by others -----------------------------------------------------------------------------------

WIDE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 256, "head_dim": 64, "num_experts": 2},
    "phi3": {},
}


def copy_of(file: Path, target: Path, kinds: dict[str, GGMLQuantizationType]) -> Path:
    """A file with some tensors in other types, of their values."""
    reader = GGUFReader(file)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        kind = kinds.get(tensor.name)
        values = tensor.data if kind is None else quantize(dequantize(tensor.data, tensor.tensor_type), kind)
        writer.add_tensor(tensor.name, values, raw_dtype=kind or tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize("model_type", WIDE)
def test_what_llama_cpp_quantizes_is_read_as_it_dequantizes_it(model_type: str, tmp_path: Path) -> None:
    """Its mix gives tensors of a block several types, and blocks different ones."""
    fields = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, **WIDE[model_type]}
    file = alone(build(model_type, torch.bfloat16, **fields), tmp_path)
    llama_cpp().quantize(file, tmp_path / "Q4_K_M.gguf", "Q4_K_M")
    llama_cpp().quantize(tmp_path / "Q4_K_M.gguf", tmp_path / "plain.gguf", "F32")
    artifact, plain = (open_artifact(tmp_path / f"{name}.gguf") for name in ("Q4_K_M", "plain"))
    source = load_file(open_source(str(tmp_path / "Q4_K_M.gguf"), tmp_path / "cache").directory / "model.safetensors")
    rows = artifact.plan.quantized
    assert {row.encoding for row in rows.values()} == {"Q4_K", "Q6_K"}
    expected = {name: plain.tensor(name) for name in plain.names()}
    for name in rows:
        stack, _, number = name.rpartition(".")
        parameter, at = (stack, int(number)) if number.isdigit() else (f"{name}.weight", ...)
        values = artifact.linear(name).dequantize()
        assert torch.equal(values, expected[parameter][at])
        assert torch.equal(values.half(), source[parameter][at])


def test_two_types_in_one_matrix_are_an_imported_source_and_no_artifact(tmp_path: Path) -> None:
    model = build("qwen3_moe", torch.bfloat16)
    gate, up = "blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"
    file = copy_of(alone(model, tmp_path), tmp_path / "mixed.gguf", {gate: Q4_0, up: Q8_0})
    with pytest.raises(AccullmError) as caught:
        open_artifact(file)
    assert caught.value.line() == f"{file}: {gate} is Q4_0 and {up} is Q8_0, and both are one matrix of the model"
    source = load_file(open_source(str(file), tmp_path / "cache").directory / "model.safetensors")
    read = {
        tensor.name: torch.tensor(dequantize(tensor.data, tensor.tensor_type)) for tensor in GGUFReader(file).tensors
    }
    both = torch.cat([read[gate], read[up]], 1)
    assert torch.equal(source["model.layers.0.mlp.experts.gate_up_proj"], both.to(torch.bfloat16))


# -- tokenizers --------------------------------------------------------------------------------------------


def sentencepiece(space_in_front: bool) -> PreTrainedTokenizerFast:
    """SentencePiece's BPE with tokens for bytes."""
    special = ("<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256)))
    replace = normalizers.Replace(" ", "▁")
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trained.train_from_iterator(
        ["▁Hello wörld, 12 tests it's the best", "▁two  spaces   three times the test  and rests"],
        trainers.BpeTrainer(vocab_size=340, special_tokens=[*special], show_progress=False),
    )
    vocabulary = json.loads(trained.to_str())["model"]["vocab"]
    # SentencePiece makes a token of any two that it is made of; those that were made first come first.
    merges = generate_merges(vocabulary, {token: -float(number) for token, number in vocabulary.items()})
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if space_in_front else replace
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("model_type", "space_in_front"),
    [("llama", True), ("llama", False), ("gemma", False), ("phi3", True), ("ernie4_5", True), ("ernie4_5", False)],
)
def test_sentencepiece_s_tokenizer_is_read_again(model_type: str, space_in_front: bool, tmp_path: Path) -> None:
    expected = sentencepiece(space_in_front)
    ids_of = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    model = build(model_type, torch.bfloat16, vocab_size=len(expected), **ids_of)
    parts = parts_of(model, tmp_path / "run")
    expected.save_pretrained(tmp_path / "tokenizer")
    companions = {path.name: path for path in (tmp_path / "tokenizer").iterdir()}
    shape = dataclasses.replace(parts.shape, companions=companions)
    FORMATS["gguf"].write(empty(tmp_path / "artifact"), dataclasses.replace(parts, companions=companions, shape=shape))
    file = (tmp_path / "artifact" / "Tiny-Model.gguf").rename(tmp_path / "downloaded.gguf")
    artifact = open_artifact(file)  # whose directory lives as long as it
    found = AutoTokenizer.from_pretrained(artifact.path)
    with llama_cpp().model(file) as loaded:
        for text in (TEXT, "two  spaces   three 日本", "it's the   ", "\n\tbest"):
            assert found(text).input_ids == expected(text).input_ids == loaded.tokenize(text, add_special=True)
            assert found.decode(found(text).input_ids, skip_special_tokens=True) == text


# -- refusals ----------------------------------------------------------------------------------------------


def edited(file: Path, beyond: dict[str, Any] | None = None, **values: Any) -> Path:
    """A file with other values under keys of its architecture, None for none, and with tensors beyond its own."""
    reader = GGUFReader(file)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(file.with_name("edited.gguf"), architecture)
    for field in reader.fields.values():
        name = field.name.removeprefix(f"{architecture}.").replace(".", "__")
        if field.name.startswith("GGUF.") or field.name == "general.architecture" or name in values:
            continue
        writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1])
    for name, value in values.items():
        if value is not None:
            add = {bool: writer.add_bool, float: writer.add_float32, int: writer.add_uint32}
            add[type(value)](f"{architecture}.{name.replace('__', '.')}", value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, tensor_values in (beyond or {}).items():
        writer.add_tensor(name, tensor_values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.with_name("edited.gguf")


UNFOLLOWED = "cannot be followed by transformers' class; give the model's safetensors checkpoint"


@pytest.mark.parametrize(
    ("model_type", "values", "what"),
    [
        ("qwen3_moe", {"expert_gating_func": 2}, f"metadata qwen3moe.expert_gating_func = 2 {UNFOLLOWED}"),
        ("mixtral", {"expert_shared_count": 1}, f"metadata llama.expert_shared_count = 1 {UNFOLLOWED}"),
        ("granite", {"rope__scaling__finetuned": False},
         f"metadata granite.rope.scaling.finetuned = False {UNFOLLOWED}"),
        ("olmo", {"attention__layer_norm_epsilon": 0.5},
         f"metadata olmo.attention.layer_norm_epsilon = 0.5 {UNFOLLOWED}"),
        ("olmo2", {"block_count": 1_000_000}, f"metadata olmo2.block_count = 1000000 {UNFOLLOWED}"),
        ("olmo2", {"attention__head_count": 0}, f"metadata olmo2.attention.head_count = 0 {UNFOLLOWED}"),
        ("olmo2", {"attention__layer_norm_rms_epsilon": None},
         "says no olmo2.attention.layer_norm_rms_epsilon; download or copy it again"),
        ("mixtral", {"expert_used_count": None}, "says no llama.expert_used_count; download or copy it again"),
        ("olmo2", {"attention__head_count_kv": 4},
         "tensor blk.0.attn_k.weight has shape [32, 64], but the model's model.layers.0.self_attn.k_proj.weight has "
         "[64, 64]"),
        ("qwen3_moe", {"expert_feed_forward_length": 16},
         "tensor blk.0.ffn_gate_exps.weight has shape [4, 32, 64], but the model's "
         "model.layers.0.mlp.experts.gate_up_proj has [4, 16, 64] of [4, 32, 64]"),
    ],
)  # fmt: skip
def test_metadata_that_cannot_be_followed_are_refused(
    model_type: str, values: dict[str, Any], what: str, tmp_path: Path
) -> None:
    file = edited(alone(build(model_type, torch.bfloat16), tmp_path), **values)
    for open_it in (open_artifact, lambda path: open_source(str(path), tmp_path / "cache")):
        with pytest.raises(AccullmError) as caught:
            open_it(file)
        assert caught.value.line() == f"{file}: {what}"


@pytest.mark.parametrize(
    ("model_type", "values", "setting", "expected"),
    [
        ("cohere", {"logit_scale": None}, "logit_scale", 1.0),
        ("granite", {"embedding_scale": 0.0}, "embedding_multiplier", 1.0),
        ("granite", {"attention__scale": None}, "attention_multiplier", 0.25),
        ("qwen2_moe", {"expert_feed_forward_length": None}, "moe_intermediate_size", 32),
        ("qwen2_moe", {"expert_shared_feed_forward_length": None}, "shared_expert_intermediate_size", 48),
        ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual", False),  # by the norms that are there
        ("mistral", {"attention__sliding_window": 64}, "sliding_window", 64),
        ("mixtral", {"rope__freq_base": None}, "rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}),
        ("olmo2", {"attention__head_count_kv": None}, "num_key_value_heads", 4),
    ],
)
def test_what_a_file_does_not_say_is_as_llama_cpp_takes_it(
    model_type: str, values: dict[str, Any], setting: str, expected: Any, tmp_path: Path
) -> None:
    fields = {"num_key_value_heads": 4} if "attention__head_count_kv" in values else {}
    file = edited(alone(build(model_type, torch.bfloat16, **fields), tmp_path), **values)
    artifact = open_artifact(file)
    assert getattr(AutoConfig.from_pretrained(artifact.path), setting) == expected
