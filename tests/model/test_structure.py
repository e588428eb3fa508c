"""How decoders are built: found from a pass without weights, for kinds of architecture that differ in it."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForCausalLM,
    DoryConfig,
    DoryForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from accullm_cli.errors import AccullmError
from accullm_cli.model.slots import CaptureInputs
from accullm_cli.model.structure import find_blocks, read_structure
from accullm_cli.run import peak_memory, reset_peak_memory
from tests.kinds import KINDS
from tests.tiny import CONFIGS


def skeleton(name: str) -> nn.Module:
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(CONFIGS[name](), experts_implementation="eager")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, hidden: torch.Tensor, extra: torch.Tensor | None = None) -> torch.Tensor:
        inside = self.up(hidden).tanh()
        return hidden + self.down(inside if extra is None else inside + extra.sum(-1, keepdim=True))


class Toy(nn.Module):
    """A decoder of three blocks; each test overrides how they are run."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(80, 8)
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(8, 80, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def run_blocks(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.head(self.run_blocks(self.embed(input_ids))))


def refusal(model: nn.Module) -> str:
    with pytest.raises(AccullmError) as refused:
        read_structure(model)
    assert refused.value.exit_code == 2
    return refused.value.line()


# -- blocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("llama", ["model.layers.0", "model.layers.1"]),
        ("gpt2", ["transformer.h.0", "transformer.h.1"]),
        ("opt", ["model.decoder.layers.0", "model.decoder.layers.1"]),
        ("gpt-neox", ["gpt_neox.layers.0", "gpt_neox.layers.1"]),
        ("mixtral", ["model.layers.0", "model.layers.1"]),
    ],
)
def test_blocks_are_those_that_the_model_calls(name: str, blocks: list[str]) -> None:
    assert find_blocks(skeleton(name)) == blocks


def test_a_larger_list_that_text_does_not_reach_is_none_of_blocks() -> None:
    model = Toy()
    model.vision = nn.ModuleList([nn.Linear(64, 64) for _ in range(9)])
    structure = read_structure(model)
    assert structure.blocks == ("layers.0", "layers.1", "layers.2")
    assert structure.unused == {f"vision.{index}.weight" for index in range(9)}
    assert structure.records == ("kept as stored: vision (not used for text; 36,864 weights)",)


def test_a_list_inside_a_block_is_not_the_blocks() -> None:
    model = Toy()
    for layer in model.layers:
        layer.steps = nn.ModuleList([nn.Linear(8, 8) for _ in range(30)])
        layer.forward = lambda hidden, layer=layer: hidden + sum(step(hidden) for step in layer.steps)
        del layer.up, layer.down
    assert read_structure(model).blocks == ("layers.0", "layers.1", "layers.2")


def test_a_model_without_a_list_of_linears_is_refused() -> None:
    model = Toy()
    model.layers = nn.ModuleList([nn.LayerNorm(8)])
    assert refusal(model) == "Toy: no list of decoder blocks with linear layers in this architecture"


def test_blocks_that_text_skips_are_left_alone() -> None:
    model = Toy()
    model.run_blocks = lambda hidden: model.layers[2](model.layers[0](hidden))
    structure = read_structure(model)
    assert structure.blocks == ("layers.0", "layers.2")
    assert structure.records == ("kept as stored: layers.* (not used for text; 192 weights)",)


def test_blocks_come_in_the_order_in_which_they_are_called() -> None:
    model = Toy()
    model.run_blocks = lambda hidden: model.layers[1](model.layers[2](model.layers[0](hidden)))
    assert read_structure(model).blocks == ("layers.0", "layers.2", "layers.1")


# -- weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "phi3",
            {
                "self_attn.o_proj": ("linear", 64, 64),
                "self_attn.qkv_proj": ("linear", 128, 64),
                "mlp.gate_up_proj": ("linear", 192, 64),
                "mlp.down_proj": ("linear", 64, 96),
            },
        ),
        (
            "gpt2",
            {
                "attn.c_attn": ("conv1d", 192, 64),
                "attn.c_proj": ("conv1d", 64, 64),
                "mlp.c_fc": ("conv1d", 256, 64),
                "mlp.c_proj": ("conv1d", 64, 256),
            },
        ),
        (
            "qwen2-moe",
            {
                "self_attn.q_proj": ("linear", 64, 64),
                "self_attn.k_proj": ("linear", 32, 64),
                "self_attn.v_proj": ("linear", 32, 64),
                "self_attn.o_proj": ("linear", 64, 64),
                **{f"mlp.experts.gate_up_proj.{e}": ("expert", 64, 64) for e in range(4)},
                **{f"mlp.experts.down_proj.{e}": ("expert", 64, 32) for e in range(4)},
                "mlp.shared_expert.gate_proj": ("linear", 48, 64),
                "mlp.shared_expert.up_proj": ("linear", 48, 64),
                "mlp.shared_expert.down_proj": ("linear", 64, 48),
            },
        ),
    ],
)
def test_slots_of_an_architecture(name: str, expected: dict[str, tuple[str, int, int]]) -> None:
    """With all their shapes, and without the router and the gate of the shared expert."""
    structure = read_structure(skeleton(name))
    found = {slot.name: (slot.kind, slot.out_features, slot.in_features) for slot in structure.slots[1]}
    assert found == {f"{structure.blocks[1]}.{name}": shape for name, shape in expected.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_slot_is_the_weight_that_its_block_multiplies_by(kind: str) -> None:
    """Held against the model's own functions: what goes in, times the slot's weight, is what comes out."""
    model = KINDS[kind].build()
    structure = read_structure(model)
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    seen: dict[str, int] = {}
    for block, slots in zip(structure.blocks, structure.slots, strict=True):
        module = model.get_submodule(block)
        for slot in slots:
            slot.write(module, slot.read(module).clone())  # read and write agree, or the logits change
        weights = {slot.name: slot.read(module) for slot in slots}

        def check(name: str, value: torch.Tensor, weights: dict[str, torch.Tensor] = weights) -> None:
            assert value.shape[-1] == weights[name].shape[1]
            seen[name] = value.shape[-1]

        with torch.no_grad(), CaptureInputs(module, list(slots), check):
            logits = model(input_ids=ids, use_cache=False).logits
        assert torch.equal(logits, expected)
    names = [slot for slots in structure.slots for slot in slots]
    stacks = {slot.name.rpartition(".")[0] for slot in names if slot.expert is not None}
    assert {slot.name for slot in names if slot.expert is None} <= seen.keys()
    assert stacks == {name.rpartition(".")[0] for name in seen if name.rpartition(".")[0] in stacks}


KEPT = {
    "convolution and attention mixed": ["model.layers.*.conv.conv (convolution; 192 weights)"],
    "state space, weights on the left": [
        "backbone.layers.*.mixer.A_log (not multiplied as a linear layer; 2,048 weights)",
        "backbone.layers.*.mixer.conv1d (convolution; 1,024 weights)",
    ],
    "latent attention, router with a correction": ["model.layers.*.mlp.gate (router; 256 weights)"],
    "router in a module of its own": ["model.layers.*.mlp.gate.wg (router; 512 weights)"],
    "experts in one product": ["model.layers.*.feed_forward.router (router; 256 weights)"],
    "experts in one matrix": ["transformer.blocks.*.ffn.router.layer (router; 512 weights)"],
    "embeddings for each block, scalars in buffers": [
        "model.embed_tokens_per_layer (embedding; 8,320 weights)",
        "model.per_layer_model_projection (outside of the blocks; 2,048 weights)",
    ],
    "parameters in activations": [],
    "vision tower": ["model.visual (not used for text; 45,056 weights)"],
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_is_kept_is_named_with_the_reason(kind: str) -> None:
    structure = read_structure(KINDS[kind].build())
    assert list(structure.records) == [f"kept as stored: {sentence}" for sentence in KEPT[kind]]


@pytest.mark.parametrize(
    ("kind", "parameter", "shape"),
    [
        ("experts [E, K, N]", "mlp.experts.gate_up_proj", (4, 192, 64, True)),
        ("experts [E, K, N]", "mlp.experts.down_proj", (4, 64, 96, True)),
        ("experts in one product", "feed_forward.experts.down_proj", (4, 64, 96, True)),
        ("experts in one matrix", "ffn.experts.mlp.w1", (4, 64, 64, False)),
        ("experts in one matrix", "ffn.experts.mlp.w2", (4, 64, 64, True)),
        ("latent attention, router with a correction", "mlp.experts.gate_up_proj", (4, 64, 64, False)),
    ],
)
def test_stacks_of_experts_are_told_from_how_they_are_used(
    kind: str, parameter: str, shape: tuple[int, int, int, bool]
) -> None:
    """Square ones, too, of which no shape tells."""
    last = read_structure(KINDS[kind].build()).slots[1]
    found = {
        (slot.experts, slot.out_features, slot.in_features, slot.transposed)
        for slot in last
        if slot.parameter == parameter
    }
    assert found == {shape}


def test_parameters_are_as_before_and_none_was_read() -> None:
    """A model of 140 GB, of which nothing is there."""
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    )
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(config)
    before = dict(model.named_parameters())
    reset_peak_memory()
    start, used = time.process_time(), peak_memory()
    structure = read_structure(model)
    assert sum(map(len, structure.slots)) == 80 * 7
    assert peak_memory() - used < 600e6
    assert time.process_time() - start < 20
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


# -- what is no chain of blocks ----------------------------------------------------------------------------


def test_a_looped_decoder_is_refused() -> None:
    config = DoryConfig(
        vocab_size=80,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["full_attention"] * 3,
        n_input_layers=1,
        n_recurrent_layers=1,
        n_output_layers=1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    assert refusal(DoryForCausalLM(config)) == (
        "DoryForCausalLM: block model.layers.1 runs 2 times for each token (a looped decoder), which is not supported"
    )


def test_a_decoder_that_needs_an_encoder_is_refused() -> None:
    config = BartConfig(
        vocab_size=80, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64, pad_token_id=1
    )
    assert refusal(BartForCausalLM(config)) == (
        "BartForCausalLM: its blocks need more than text: model.decoder.layers.0.encoder_attn.k_proj and others are "
        "not used without it; decoder-only language models can be converted, not the decoder of an encoder-decoder"
    )


def test_layers_in_two_lists_are_refused() -> None:
    model = Toy()
    model.first = nn.ModuleList([Block()])
    model.run_blocks = lambda hidden: Toy.run_blocks(model, model.first[0](hidden))
    assert refusal(model) == "Toy: its layers are in more than one list (layers and first), which is not supported"


def test_arithmetic_between_blocks_is_refused() -> None:
    model = Toy()
    model.run_blocks = lambda hidden: model.layers[2](2 * model.layers[1](model.layers[0](hidden)))
    assert refusal(model) == (
        "Toy: hidden states are changed between blocks layers.1 and layers.2, which is not supported"
    )


def test_a_block_that_reads_what_another_one_kept_is_refused() -> None:
    """As layers that share keys and values do, through an object that every one of them is passed."""
    model = Toy()
    shared: dict[str, torch.Tensor] = {}

    def first(hidden: torch.Tensor) -> torch.Tensor:
        shared["keys"] = hidden.exp()
        return Block.forward(model.layers[0], hidden)

    model.layers[0].forward = first
    model.layers[2].forward = lambda hidden: hidden + shared["keys"]
    assert refusal(model) == (
        "Toy: block layers.2 reads what block layers.0 computed beside its hidden states, which is not supported"
    )


def test_a_block_that_is_passed_earlier_states_is_refused() -> None:
    model = Toy()

    def run(hidden: torch.Tensor) -> torch.Tensor:
        first = model.layers[0](hidden)
        return model.layers[2](model.layers[1](first), 2 * first)

    model.run_blocks = run
    assert refusal(model) == (
        "Toy: block layers.2 is passed what earlier blocks computed (argument 1), which is not supported"
    )


def test_an_output_that_reads_the_embedding_again_is_refused() -> None:
    model = Toy()
    model.run_blocks = lambda hidden: Toy.run_blocks(model, hidden) + hidden
    assert refusal(model) == "Toy: its output reads more than what the last block returns, which is not supported"


def test_hidden_states_that_are_not_windows_by_tokens_are_refused() -> None:
    model = Toy()
    model.run_blocks = lambda hidden: Toy.run_blocks(model, hidden.transpose(0, 1)).transpose(0, 1)
    assert refusal(model) == (
        "Toy: block layers.0 reads hidden states of shape [13, 2, 8] for 2 windows of 13 tokens, which is not supported"
    )


def test_a_model_that_fails_on_text_is_refused_with_its_own_words() -> None:
    model = Toy()
    model.run_blocks = lambda hidden: hidden.no_such_thing
    assert refusal(model) == (
        "Toy: cannot be run on text alone (AttributeError: 'Tensor' object has no attribute 'no_such_thing')"
    )


# -- what blocks are passed and return ---------------------------------------------------------------------


def test_values_for_each_token_are_found_wherever_they_are_in_a_call() -> None:
    model = Toy()
    projection = nn.Linear(8, 5)  # a product hides no dependence
    model.projection = projection

    def run(hidden: torch.Tensor) -> torch.Tensor:
        extra, fixed = projection(hidden), torch.ones(hidden.shape[1], 5)
        return model.layers[2](model.layers[1](model.layers[0](hidden, extra=extra), fixed), extra=extra)

    model.run_blocks = run
    calls = read_structure(model).calls
    assert [call.per_token for call in calls] == [(("kwargs", "extra"),), (), (("kwargs", "extra"),)]
    assert [call.hidden for call in calls] == [("args", 0)] * 3


def test_what_a_block_returns_beside_hidden_states_is_left_out() -> None:
    model = Toy()
    for layer in model.layers:
        layer.forward = lambda hidden, layer=layer: [Block.forward(layer, hidden), hidden.mean(), None]
    model.run_blocks = lambda hidden: model.layers[2](model.layers[1](model.layers[0](hidden)[0])[0])[0]
    for call in read_structure(model).calls:
        hidden = torch.zeros(1)
        assert call.returned.wrap(hidden) == [hidden, None, None]
        assert call.returned.take(["hidden", 1, 2]) == "hidden"
