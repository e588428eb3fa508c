"""A decoder with one block in memory at a time: the same logits, the inputs that its linears share, and refusals."""

from __future__ import annotations

from collections.abc import Container, Iterable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, FalconConfig, LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from accullm_cli.model.blocks import Decoder, batches
from tests.streaming import random_ids, reference_model, streamed
from tests.tiny import CONFIGS, make_checkpoint


class InMemory:
    """Weights of a model that has them already."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def load(self, prefixes: Iterable[str]) -> None: ...

    def load_outside(self, blocks: Iterable[str], without: Container[str] = frozenset()) -> None: ...

    def warm(self, prefix: str, device: torch.device) -> None: ...

    def release(self, prefix: str) -> None: ...

    def dtype(self, name: str) -> torch.dtype:
        return self.model.get_parameter(name).dtype


def tiny_llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **shape, **changes)).eval()


def in_memory(model: nn.Module) -> Decoder:
    return Decoder(model, InMemory(model))


def block_by_block(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a streamed decoder, as the stages make them."""
    decoder.load_outside()
    hidden = decoder.embed(ids)
    decoder.release_outside()
    for index in range(len(decoder.block_names)):
        block = decoder.load_block(index)
        hidden = decoder.run(index, block, hidden)
        decoder.release_block(index)
    decoder.load_outside()
    return decoder.logits(hidden)


# -- forward passes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_streamed_logits_are_exactly_those_of_transformers(name: str, tmp_path: Path) -> None:
    directory = make_checkpoint(name, tmp_path / "model")
    ids = random_ids(3, 40)
    expected = reference_model(directory)(ids).logits
    assert expected.std() > 0.1
    assert torch.equal(block_by_block(streamed(directory, tmp_path), ids), expected)


@pytest.mark.parametrize(("windows", "sizes"), [(1, [1]), (2, [2]), (8, [2, 2]), (7, [2, 1]), (2050, [2, 2])])
def test_calls_of_all_batches_are_learned_from_two(
    windows: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of two windows of 256 tokens; the last may hold one."""
    decoder = in_memory(tiny_llama())
    ids = random_ids(windows, 256) % 64
    embedded: list[int] = []
    embed = decoder.embed
    monkeypatch.setattr(decoder, "embed", lambda some: embedded.append(len(some)) or embed(some))
    decoder.learn_calls(ids)
    assert embedded == sizes
    for size in sizes:
        assert decoder.run(0, decoder.load_block(0), torch.zeros(size, 256, 32)).shape == (size, 256, 32)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gemma2", "opt", "gpt-neox"])
def test_the_heads_input_is_what_hooks_see(name: str, tmp_path: Path) -> None:
    directory = make_checkpoint(name, tmp_path / "model")
    ids = random_ids(3, 40)
    model = reference_model(directory)
    seen: list[torch.Tensor] = []
    model.get_output_embeddings().register_forward_hook(lambda head, args, result: seen.append(args[0]))
    model(ids)
    decoder = streamed(directory, tmp_path)
    decoder.load_outside()
    hidden = decoder.embed(ids)
    for index in range(len(decoder.block_names)):
        hidden = decoder.run(index, decoder.load_block(index), hidden)
    assert torch.equal(decoder.head_input(hidden), seen[0])
    assert torch.equal(decoder.logits(hidden), model(ids).logits)  # no hook is left


@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_shards_make_no_difference(name: str, tmp_path: Path) -> None:
    directory = make_checkpoint(name, tmp_path / "model", shard_size="40KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    ids = random_ids(2, 24)
    expected = reference_model(directory)(ids).logits
    assert torch.equal(block_by_block(streamed(directory, tmp_path), ids), expected)


def test_windows_of_several_batches_are_independent(tmp_path: Path) -> None:
    """Each shape that blocks are called with is learnt from `embed` and kept apart."""
    directory = make_checkpoint("gemma2", tmp_path / "model")
    decoder = streamed(directory, tmp_path)
    decoder.load_outside()
    ids = random_ids(5, 24)
    parts = [decoder.embed(ids[:2]), decoder.embed(ids[2:4]), decoder.embed(ids[4:]), decoder.embed(ids[:1, :9])]
    for index in range(2):
        block = decoder.load_block(index)
        parts = [decoder.run(index, block, part) for part in parts]
    model = reference_model(directory)
    assert torch.equal(decoder.logits(parts[1]), model(ids[2:4]).logits)
    assert torch.equal(decoder.logits(parts[2]), model(ids[4:]).logits)
    assert torch.equal(decoder.logits(parts[3]), model(ids[:1, :9]).logits)


def test_hidden_states_are_float32_whatever_is_stored(tmp_path: Path) -> None:
    decoder = streamed(make_checkpoint("gpt2", tmp_path / "model", torch.float16), tmp_path)
    decoder.load_outside()
    hidden = decoder.embed(random_ids(1, 8))
    assert hidden.dtype == torch.float32
    assert {parameter.dtype for parameter in decoder.load_block(0).parameters()} == {torch.float32}


def test_the_model_is_itself_again_after_a_pass() -> None:
    model = tiny_llama()
    ids = random_ids(1, 8).clamp(max=63)
    expected = model(ids).logits
    decoder = in_memory(model)
    decoder.logits(decoder.embed(ids))
    assert torch.equal(model(ids).logits, expected)


def test_what_goes_into_the_first_block_belongs_to_the_caller() -> None:
    """Streams are written in place; a second pass must not see that."""
    decoder = in_memory(tiny_llama())
    ids = random_ids(1, 8).clamp(max=63)
    hidden = decoder.embed(ids)
    expected = hidden.clone()
    hidden.zero_()
    assert torch.equal(decoder.embed(ids), expected)


# -- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "gpt2"])
def test_one_block_is_in_memory_at_a_time(name: str, tmp_path: Path) -> None:
    decoder = streamed(make_checkpoint(name, tmp_path / "model"), tmp_path)

    def places() -> set[str]:
        """The blocks (and "outside") that hold weights."""
        real = [key for key, value in decoder.model.named_parameters() if value.device.type != "meta"]
        return {next((b for b in decoder.block_names if key.startswith(f"{b}.")), "outside") for key in real}

    assert places() == set()
    decoder.load_outside()
    hidden = decoder.embed(random_ids(1, 16))
    assert places() == {"outside"}
    decoder.release_outside()
    for index, block_name in enumerate(decoder.block_names):
        block = decoder.load_block(index)
        assert places() == {block_name}
        hidden = decoder.run(index, block, hidden)
        decoder.release_block(index)
        assert places() == set()
    decoder.load_outside()
    decoder.logits(hidden)
    assert places() == {"outside"}


def test_tied_weights_are_one_tensor_when_loaded_again(tmp_path: Path) -> None:
    decoder = streamed(make_checkpoint("llama-tied", tmp_path / "model"), tmp_path)
    for _ in range(2):
        decoder.load_outside()
        embedding = decoder.model.get_input_embeddings().weight
        assert decoder.model.get_output_embeddings().weight is embedding
        assert embedding.device.type == "cpu"
        decoder.release_outside()


@pytest.mark.parametrize(("windows", "tokens", "size"), [(7, 64, 3), (4, 1000, 1), (2, 16, 100), (0, 16, 5)])
def test_batches_cover_every_window_once(windows: int, tokens: int, size: int) -> None:
    slices = batches(windows, tokens, together=64 * 3 + 1)
    assert [window for rows in slices for window in range(windows)[rows]] == list(range(windows))
    limit = max(1, (64 * 3 + 1) // tokens)
    assert all(rows.stop - rows.start <= limit for rows in slices)
    assert len(slices) == -(-windows // limit)


# -- inputs ------------------------------------------------------------------------------------------------


def groups_of(decoder: Decoder, tokens: int = 16) -> list[list[tuple[str, ...]]]:
    decoder.load_outside()
    hidden = decoder.embed(random_ids(1, tokens))
    hidden = decoder.run(0, decoder.load_block(0), hidden)
    prefix = f"{decoder.block_names[1]}."
    steps = decoder.trace(1, decoder.load_block(1), hidden).steps
    return [[tuple(name.removeprefix(prefix) for name in group) for group in step] for step in steps]


LLAMA_GROUPS = [
    [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")],
    [("self_attn.o_proj",)],
    [("mlp.gate_proj", "mlp.up_proj")],
    [("mlp.down_proj",)],
]
ATTENTION_GROUPS = LLAMA_GROUPS[:2]


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        *((name, LLAMA_GROUPS) for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")),
        (
            "phi3",
            [[("self_attn.qkv_proj",)], [("self_attn.o_proj",)], [("mlp.gate_up_proj",)], [("mlp.down_proj",)]],
        ),
        ("gpt2", [[("attn.c_attn",)], [("attn.c_proj",)], [("mlp.c_fc",)], [("mlp.c_proj",)]]),
        (
            "opt",
            [
                [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")],
                [("self_attn.out_proj",)],
                [("fc1",)],
                [("fc2",)],
            ],
        ),
        (
            "gpt-neox",
            [
                [("attention.query_key_value",)],
                [("attention.dense",)],
                [("mlp.dense_h_to_4h",)],
                [("mlp.dense_4h_to_h",)],
            ],
        ),
        (
            "mixtral",
            [
                *ATTENTION_GROUPS,
                [(f"mlp.experts.gate_up_proj.{e}",) for e in range(4)],
                [(f"mlp.experts.down_proj.{e}",) for e in range(4)],
            ],
        ),
        (
            "qwen2-moe",
            [
                *ATTENTION_GROUPS,
                [("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")],
                [("mlp.shared_expert.down_proj",)],
                [(f"mlp.experts.gate_up_proj.{e}",) for e in range(4)],
                [(f"mlp.experts.down_proj.{e}",) for e in range(4)],
            ],
        ),
    ],
)
def test_linears_that_share_an_input(name: str, groups: list[list[tuple[str, ...]]], tmp_path: Path) -> None:
    """In the order that the block computes them; an expert has a group of its own."""
    assert groups_of(streamed(make_checkpoint(name, tmp_path / "model"), tmp_path)) == groups


def test_experts_that_no_token_reaches_have_their_groups_too(tmp_path: Path) -> None:
    """One token reaches two of four experts."""
    steps = groups_of(streamed(make_checkpoint("mixtral", tmp_path / "model"), tmp_path), tokens=1)
    assert [len(step) for step in steps] == [1, 1, 4, 4]


def save_random(config: PreTrainedConfig, directory: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("parallel", [True, False])
def test_falcon_multiplies_without_a_linear_function(parallel: bool, tmp_path: Path) -> None:
    """Its FalconLinear computes x @ W.T."""
    config = FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=256, parallel_attn=parallel
    )
    directory = save_random(config, tmp_path / "model")
    decoder = streamed(directory, tmp_path)
    attention, mlp = "self_attention.query_key_value", "mlp.dense_h_to_4h"
    if parallel:
        expected = [[(attention, mlp)], [("self_attention.dense",)], [("mlp.dense_4h_to_h",)]]
    else:
        expected = [[(attention,)], [("self_attention.dense",)], [(mlp,)], [("mlp.dense_4h_to_h",)]]
    assert groups_of(decoder) == expected
    ids = random_ids(2, 12)
    assert torch.equal(block_by_block(decoder, ids), reference_model(directory)(ids).logits)


def test_inputs_are_those_that_hooks_see(tmp_path: Path) -> None:
    directory = make_checkpoint("llama", tmp_path / "model")
    ids = random_ids(2, 12)
    expected: dict[str, torch.Tensor] = {}
    model = reference_model(directory)
    for name, module in model.model.layers[1].named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: expected.update({name: args[0].clone()}))
    model(ids)
    decoder = streamed(directory, tmp_path)
    decoder.load_outside()
    hidden = decoder.embed(ids)
    hidden = decoder.run(0, decoder.load_block(0), hidden)
    found: dict[str, torch.Tensor] = {}
    block = decoder.load_block(1)
    output = decoder.run_capturing(1, block, hidden, lambda name, value: found.update({name: value.clone()}))
    assert output is not None
    assert torch.equal(output, decoder.run(1, block, hidden))
    assert found.keys() == {f"model.layers.1.{name}" for name in expected}
    assert all(torch.equal(found[f"model.layers.1.{name}"], value) for name, value in expected.items())


def test_capturing_ends_with_the_last_linear_that_is_wanted() -> None:
    decoder = in_memory(tiny_llama())
    hidden = decoder.embed(random_ids(1, 8).clamp(max=63))
    seen: list[str] = []
    last = frozenset(("input", f"model.layers.0.self_attn.{name}_proj") for name in "ok")
    output = decoder.run_capturing(0, decoder.load_block(0), hidden, lambda name, _: seen.append(name), last=last)
    assert output is None
    assert seen == [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]


def test_capturing_waits_for_a_sum_that_is_wanted() -> None:
    decoder = in_memory(tiny_llama())
    hidden = decoder.embed(random_ids(1, 8).clamp(max=63))
    seen: list[str] = []
    last = frozenset({("sum", "model.layers.0.self_attn.o_proj")})
    output = decoder.run_capturing(
        0,
        decoder.load_block(0),
        hidden,
        lambda name, _: seen.append(f"input {name[-6:]}"),
        lambda name, _: seen.append(f"sum {name[-6:]}"),
        last,
    )
    assert output is None
    assert seen == ["input q_proj", "input k_proj", "input v_proj", "input o_proj", "sum o_proj"]


@pytest.mark.parametrize(
    ("name", "summed"),
    [
        ("llama", {"self_attn.o_proj", "mlp.down_proj"}),
        ("phi3", {"self_attn.o_proj", "mlp.down_proj"}),
        ("gpt2", {"attn.c_proj", "mlp.c_proj"}),
        ("opt", {"self_attn.out_proj", "fc2"}),
        ("gpt-neox", {"attention.dense", "mlp.dense_4h_to_h"}),
        ("gemma2", set()),  # a norm comes between a linear and the residual stream
        ("mixtral", {"self_attn.o_proj"}),  # an expert's output reaches only some rows
    ],
)
def test_linears_that_write_to_the_residual_stream_are_found(name: str, summed: set[str], tmp_path: Path) -> None:
    decoder = streamed(make_checkpoint(name, tmp_path / name), tmp_path)
    decoder.load_outside()
    hidden = decoder.embed(random_ids(1, 16))
    trace = decoder.trace(0, decoder.load_block(0), hidden)
    assert trace.summed == {f"{decoder.block_names[0]}.{linear}" for linear in summed}


def test_the_sum_is_what_the_residual_stream_becomes() -> None:
    decoder = in_memory(tiny_llama())
    hidden = decoder.embed(random_ids(2, 8).clamp(max=63))
    sums: dict[str, torch.Tensor] = {}
    block = decoder.load_block(0)
    output = decoder.run_capturing(
        0, block, hidden, lambda *_: None, lambda name, value: sums.update({name: value.clone()})
    )
    assert output is not None
    assert torch.equal(sums["model.layers.0.mlp.down_proj"], output)
    attention = block.self_attn.o_proj  # type: ignore[union-attr]
    written: list[torch.Tensor] = []
    handle = attention.register_forward_hook(lambda _, __, result: written.append(result.clone()))
    decoder.run(0, block, hidden)
    handle.remove()
    assert torch.equal(sums["model.layers.0.self_attn.o_proj"], hidden + written[0])


# -- refusals ----------------------------------------------------------------------------------------------


def test_the_same_values_for_other_tokens_are_no_reason_to_refuse() -> None:
    decoder = in_memory(tiny_llama())
    for seed in range(3):
        decoder.embed(random_ids(2, 8, seed=seed).clamp(max=63))
