"""GGUF files become Hugging Face directories: the same model that transformers loads from the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from accullm_cli.errors import AccullmError
from accullm_cli.model.source import ModelSource, open_source
from accullm_cli.progress import Event

HIDDEN, HEADS, KV_HEADS, MLP, LAYERS = 64, 4, 2, 96, 2
TOKENS = [*map(chr, range(33, 127)), "th", "er"]
Q4_0, Q8_0, F16, BF16, F32 = (getattr(gguf.GGMLQuantizationType, name) for name in "Q4_0 Q8_0 F16 BF16 F32".split())


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of a llama in GGUF's names."""
    head = HIDDEN // HEADS
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        found |= {
            f"blk.{layer}.attn_norm.weight": (HIDDEN,),
            f"blk.{layer}.ffn_norm.weight": (HIDDEN,),
            f"blk.{layer}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k.weight": (KV_HEADS * head, HIDDEN),
            f"blk.{layer}.attn_v.weight": (KV_HEADS * head, HIDDEN),
            f"blk.{layer}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_gate.weight": (MLP, HIDDEN),
            f"blk.{layer}.ffn_up.weight": (MLP, HIDDEN),
            f"blk.{layer}.ffn_down.weight": (HIDDEN, MLP),
        }
    return found


def write(
    path: Path,
    matrices: gguf.GGMLQuantizationType = F16,
    extra: dict[str, np.ndarray] | None = None,
    without: str | None = None,
    architecture: str = "llama",
    tokenizer: bool = True,
    scale: float = 1.0,
    metadata: dict[str, Any] | None = None,
    tokens: Sequence[str] = TOKENS,
    merges: Sequence[str] = ("t h", "e r"),
    kinds: Sequence[int] = (),
) -> Path:
    """A random two-layer llama; its norms are float32, as llama.cpp writes them."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types(kinds or [1] * len(tokens))
        writer.add_token_merges(merges)
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_chat_template("{{ messages[0]['content'] }}")
    for key, value in (metadata or {}).items():
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kinds.get(type(value), writer.add_array)(key, value)
    rng = np.random.default_rng(0)
    for name, shape in shapes().items():
        values = (rng.standard_normal(shape) * scale).astype(np.float32)
        if name == without:
            continue
        kind = F32 if len(shape) == 1 else matrices
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def open_gguf(path: Path) -> ModelSource:
    return open_source(str(path), path.parent / "cache")


def refusal(path: Path) -> str:
    with pytest.raises(AccullmError) as caught:
        open_gguf(path)
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.line()
    assert not list((path.parent / "cache").glob("imported/[!.]*"))  # nothing half-written
    return caught.value.line()


def reference(path: Path) -> Any:
    """The model as transformers loads it from the file, in float32."""
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(F32, torch.float32), (F16, torch.float16), (BF16, torch.bfloat16), (Q4_0, torch.float16), (Q8_0, torch.float16)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_holds_what_transformers_reads_from_the_file_in_one_dtype(
    tmp_path: Path, kind: gguf.GGMLQuantizationType, dtype: torch.dtype
) -> None:
    path = write(tmp_path / "tiny.gguf", kind)
    source = open_gguf(path)
    expected = {name: tensor.to(dtype) for name, tensor in reference(path).state_dict().items()}
    stored = load_file(source.directory / "model.safetensors")
    assert set(stored) == set(expected) - {"lm_head.weight"}  # tied
    for name, tensor in stored.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name]), name
    assert source.config["dtype"] == str(dtype).removeprefix("torch.")


def test_loads_in_transformers_with_the_logits_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", F32)
    source = open_gguf(path)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float32).eval()(ids).logits
        expected = reference(path)(ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_an_architecture_that_is_not_written_is_read_as_transformers_reads_it(tied: bool, tmp_path: Path) -> None:
    """GPT-2, whose matrices it turns around."""
    path = write_gpt2(tmp_path / "tiny.gguf", tied)
    source = open_gguf(path)
    expected = reference(path).state_dict()
    stored = load_file(source.directory / "model.safetensors")
    assert set(stored) == set(expected) - ({"lm_head.weight"} if tied else set())
    for name, tensor in stored.items():
        assert torch.equal(tensor, expected[name]), name
    assert (source.config["model_type"], source.config["tie_word_embeddings"]) == ("gpt2", tied)


def write_gpt2(path: Path, tied: bool) -> Path:
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(1024)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(4 * HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["t h", "e r"])
    wide = {"attn_qkv": (3 * HIDDEN, HIDDEN), "attn_output": (HIDDEN, HIDDEN),
            "ffn_up": (4 * HIDDEN, HIDDEN), "ffn_down": (HIDDEN, 4 * HIDDEN)}  # fmt: skip
    found = {"token_embd.weight": (len(TOKENS), HIDDEN), "position_embd.weight": (1024, HIDDEN)}
    found |= {} if tied else {"output.weight": (len(TOKENS), HIDDEN)}
    for name, shape in wide.items():
        found |= {f"blk.0.{name}.weight": shape, f"blk.0.{name}.bias": shape[:1]}
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        found |= {f"{name}.weight": (HIDDEN,), f"{name}.bias": (HIDDEN,)}
    rng = np.random.default_rng(0)
    for name, shape in found.items():
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_untied_head_is_kept(tmp_path: Path) -> None:
    head = np.random.default_rng(1).standard_normal((len(TOKENS), HIDDEN)).astype(np.float16)
    source = open_gguf(write(tmp_path / "tiny.gguf", F16, extra={"output.weight": head}))
    assert source.config["tie_word_embeddings"] is False
    stored = load_file(source.directory / "model.safetensors")["lm_head.weight"]
    assert torch.equal(stored, torch.from_numpy(head))


def test_tokenizer_and_chat_template_come_along(tmp_path: Path) -> None:
    source = open_gguf(write(tmp_path / "tiny.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(source.directory)
    assert tokenizer.convert_ids_to_tokens(tokenizer("hat")["input_ids"]) == ["h", "a", "t"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hat"}], tokenize=False) == "hat"
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} == set(
        source.companions
    )


def test_says_what_was_dequantized_rounded_and_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "My Model.Q4_0.gguf", Q4_0, extra={"stray.weight": np.ones(4, np.float32)})
    source = open_gguf(path)
    assert source.records == (
        "source weights are Q4_0 (15 tensors) in the GGUF file; dequantized to float16",
        "1 tensors of the GGUF file are not part of the model: stray.weight",
        "5 float32 tensors of the GGUF file rounded to float16",
    )
    assert (source.name, source.origin) == ("My-Model.Q4_0", str(path))


def test_a_finished_import_is_used_again_with_its_records(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", Q4_0)
    first = open_gguf(path)
    weights = first.directory / "model.safetensors"
    before = weights.stat().st_mtime_ns
    second = open_gguf(path)
    assert weights.stat().st_mtime_ns == before
    assert (second.records, second.sha256) == (first.records, first.sha256)


def test_an_interrupted_import_leaves_nothing_and_starts_again(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf")

    def interrupt(event: Event) -> None:
        if event.kind == "step" and event.label == "blk.1.attn_q.weight":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_source(str(path), tmp_path / "cache", interrupt)
    assert [entry.name for entry in (tmp_path / "cache" / "imported").iterdir() if entry.is_dir()] == []
    assert len(open_gguf(path).tensors) == len(shapes())


def test_another_file_of_the_same_name_is_another_import(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf")
    first = open_gguf(path)
    write(path, scale=2.0)
    second = open_gguf(path)
    assert first.directory != second.directory
    assert first.sha256 != second.sha256


def test_llama_3_rope_scaling_is_recognized_from_its_frequency_factors(tmp_path: Path) -> None:
    # Llama 3.1's formula, with llama.cpp's names (convert_hf_to_gguf.py): wavelengths beyond 8192 are stretched by 8,
    # those below 2048 are left, and in between it is interpolated.
    size = HIDDEN // HEADS
    wavelengths = 2 * np.pi * 10000.0 ** (np.arange(0, size, 2) / size)
    smooth = np.clip((8192 / wavelengths - 1) / (4 - 1), 0, 1)
    factors = (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)
    assert factors.min() == 1 < factors.max() == 8
    source = open_gguf(write(tmp_path / "tiny.gguf", extra={"rope_freqs.weight": factors}))
    assert source.config["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_the_file_s_rotary_scaling_is_in_the_model_s_angles(tmp_path: Path) -> None:
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    source = open_gguf(write(tmp_path / "tiny.gguf", F32, metadata=scaling))
    assert source.config["rope_parameters"] == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    model = AutoModelForCausalLM.from_pretrained(source.directory)
    size = HIDDEN // HEADS
    angles = 10.0 * 10000.0 ** (-np.arange(0, size, 2) / size) / 4  # at position 10
    cosine, _ = model.model.rotary_emb(torch.zeros(1, 1, HIDDEN), torch.tensor([[10]]))
    np.testing.assert_allclose(cosine[0, 0, : size // 2].numpy(), np.cos(angles), rtol=1e-5)


def test_metadata_that_cannot_be_followed_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", metadata={"llama.attention.clamp_kqv": 8.0})
    assert refusal(path) == (
        f"{path}: metadata llama.attention.clamp_kqv = 8.0 cannot be followed by transformers' class; "
        "give the model's safetensors checkpoint"
    )


def test_metadata_that_nothing_follows_are_named(tmp_path: Path) -> None:
    metadata = {"tokenizer.ggml.eot_token_id": 3, "general.sampling.temp": 0.7, "general.author": "us", "my.key": 1}
    assert open_gguf(write(tmp_path / "tiny.gguf", metadata=metadata)).records[0] == (
        "metadata of the GGUF file that is not carried over: general.sampling.temp, my.key, tokenizer.ggml.eot_token_id"
    )


@pytest.mark.parametrize(
    ("pre", "records"),
    [
        (
            "superbpe",
            (
                "the tokenizer splits text in a way that is not known here (tokenizer.ggml.pre = superbpe); GPT-2's is "
                "taken for it, and tokens may differ from llama.cpp's",
            ),
        ),
        ("llama-bpe", ()),
        ("smollm", ()),
        ("default", ()),
    ],
)
def test_a_splitting_of_text_that_is_not_known_is_named(tmp_path: Path, pre: str, records: tuple[str, ...]) -> None:
    path = write(tmp_path / "tiny.gguf", metadata={"tokenizer.ggml.pre": pre})
    assert open_gguf(path).records[:-1] == records  # the last one is of norms that were rounded


@pytest.mark.parametrize(
    "name",
    [
        "blk.1.ffn_down.bias",
        "output.bias",
        "blk.0.attn_q_norm.weight",
        "blk.0.attn_q.weight.lora_a",
        "blk.0.ffn_gate.scale",
        "position_embd.weight",
    ],
)
def test_a_tensor_that_changes_the_function_and_has_no_place_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "tiny.gguf", extra={name: np.ones(HIDDEN, np.float32)})
    assert refusal(path) == (
        f"{path}: tensor {name} has no place in transformers' class for architecture llama; "
        "give the model's safetensors checkpoint"
    )


def test_biases_are_wanted_of_all_projections_where_one_has_them(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", extra={"blk.0.attn_q.bias": np.ones(HIDDEN, np.float32)})
    assert refusal(path) == (
        f"{path}: holds no tensor for model.layers.0.self_attn.k_proj.bias; give the model's safetensors checkpoint"
    )


@pytest.mark.parametrize("name", ["blk.2.attn_q.weight", "blk.1.nextn.eh_proj.weight", "blk.0.attn_rot_embd.weight"])
def test_a_tensor_beyond_the_model_is_named(tmp_path: Path, name: str) -> None:
    source = open_gguf(write(tmp_path / "tiny.gguf", extra={name: np.ones(HIDDEN, np.float32)}))
    assert source.records[0] == f"1 tensors of the GGUF file are not part of the model: {name}"


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_imported(
    tmp_path: Path,
) -> None:
    source = open_gguf(write(tmp_path / "tiny.gguf", tokens=[*TOKENS, "<added>"]))
    assert source.config["vocab_size"] == len(TOKENS)
    assert AutoTokenizer.from_pretrained(source.directory).convert_tokens_to_ids("<added>") == len(TOKENS)


def test_an_import_of_an_earlier_version_is_made_again(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf")
    marker = open_gguf(path).directory / "imported.json"
    marker.write_text('{"source": "tiny.gguf", "records": ["old"]}')
    assert "old" not in open_gguf(path).records


def test_other_frequency_factors_are_refused(tmp_path: Path) -> None:
    factors = np.linspace(1, 3, HIDDEN // HEADS // 2, dtype=np.float32)
    path = write(tmp_path / "tiny.gguf", extra={"rope_freqs.weight": factors})
    assert refusal(path) == (
        f"{path}: tensor rope_freqs.weight scales the rotary frequencies in a way that cannot be imported; "
        "give the model's safetensors checkpoint"
    )


def test_frequency_factors_beside_another_scaling_are_refused(tmp_path: Path) -> None:
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    factors = np.ones(HIDDEN // HEADS // 2, np.float32)
    path = write(tmp_path / "tiny.gguf", extra={"rope_freqs.weight": factors}, metadata=metadata)
    assert refusal(path) == (
        f"{path}: tensor rope_freqs.weight scales the rotary frequencies in a way that cannot be imported; "
        "give the model's safetensors checkpoint"
    )


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:-5000])
    assert refusal(path).startswith(f"{path}: damaged or not a GGUF file (")
    assert refusal(path).endswith("); download or copy it again")


def test_a_file_that_ends_within_its_metadata_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:300])
    assert refusal(path).startswith(f"{path}: damaged or not a GGUF file (")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"GGML" + bytes(100), "it does not begin with GGUF"), (b"", "the file is empty")],
)
def test_what_is_no_gguf_file_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(content)
    assert refusal(path) == f"{path}: damaged or not a GGUF file ({reason}); download or copy it again"


def test_a_file_of_no_architecture_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes().replace(b"general.architecture", b"general.a_chitecture"))
    assert refusal(path) == f"{path}: names no architecture (general.architecture); download or copy it again"


def test_an_architecture_that_transformers_does_not_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", architecture="rwkv6")
    assert refusal(path) == (
        f"{path}: architecture rwkv6 cannot be read from GGUF by the installed transformers; "
        "give the model's safetensors checkpoint"
    )


def test_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", without="blk.1.ffn_up.weight")
    assert refusal(path) == (
        f"{path}: holds no tensor for model.layers.1.mlp.up_proj.weight; give the model's safetensors checkpoint"
    )


def test_a_file_without_tokenizer_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", tokenizer=False)
    assert refusal(path).startswith(f"{path}: holds no tokenizer that transformers can read (")


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    norm = shapes()["output_norm.weight"]
    path = write(tmp_path / "tiny.gguf", F16, without="output_norm.weight",
                 extra={"output_norm.weight": np.full(norm, 7e4, np.float32)})  # fmt: skip
    assert refusal(path) == f"{path}: tensor output_norm.weight holds values beyond the range of float16"
