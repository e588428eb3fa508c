"""Where a block's linear weights are: found from the module graph, read, written, and seen in use."""

from __future__ import annotations

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.pytorch_utils import Conv1D

from accullm_cli.errors import AccullmError
from accullm_cli.model.slots import CaptureInputs, InputIdentity, LinearSlot, find_blocks, find_slots, share_weights
from tests.tiny import CONFIGS


def skeleton(name: str) -> nn.Module:
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(CONFIGS[name]())


class Experts(nn.Module):
    def __init__(self, count: int, rows: int, columns: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(count, rows, columns))


class Mixture(nn.Module):
    """Experts with what scores them beside them, and a linear that only happens to lie there."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4, bias=False)
        self.gate = nn.Linear(8, 1, bias=False)
        self.shared = nn.Linear(8, 6, bias=False)
        self.experts = Experts(4, 5, 8)


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
def test_blocks_are_the_outermost_list_of_linears(name: str, blocks: list[str]) -> None:
    assert find_blocks(skeleton(name)) == blocks


def test_of_several_lists_the_one_with_most_weights_counts() -> None:
    model = nn.Module()
    model.vision = nn.ModuleList([nn.Linear(4, 4) for _ in range(9)])
    model.text = nn.ModuleList([nn.Linear(16, 16)])
    assert find_blocks(model) == ["text.0"]


def test_a_list_inside_a_block_is_not_the_blocks() -> None:
    """As in checkpoints of experts as modules: the inner list of one block alone must not win, whatever its size."""
    block = nn.Module()
    block.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(8)])
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    assert find_blocks(model) == ["layers.0"]


def test_a_model_without_a_list_of_linears_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleList([nn.LayerNorm(4)]))
    with pytest.raises(AccullmError) as refusal:
        find_blocks(model)
    assert refusal.value.line() == "Sequential: no list of decoder blocks with linear layers in this architecture"


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
    model = skeleton(name)
    block = find_blocks(model)[1]
    slots = find_slots(model.get_submodule(block), block)
    found = {slot.name: (slot.kind, slot.out_features, slot.in_features) for slot in slots}
    assert found == {f"{block}.{name}": shape for name, shape in expected.items()}


def test_what_scores_experts_is_no_slot_but_its_neighbours_are() -> None:
    names = [slot.name for slot in find_slots(Mixture(), "b")]
    assert names == ["b.shared", *(f"b.experts.up.{e}" for e in range(4))]


def test_experts_stored_the_other_way_round_are_refused() -> None:
    config = GptOssConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        vocab_size=32,
    )
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(AccullmError) as refusal:
        find_blocks(model)
    assert refusal.value.line() == "mlp.experts.gate_up_proj: experts stored [experts, in, out] are not supported"


# -- reading and writing -----------------------------------------------------------------------------------


def test_conv1d_reads_and_writes_its_transpose() -> None:
    block = nn.ModuleDict({"c": Conv1D(6, 4)})
    (slot,) = find_slots(block, "b")
    stored = block["c"].weight.detach().clone()
    assert torch.equal(slot.read(block), stored.T)
    wanted = torch.randn(6, 4)
    slot.write(block, wanted)
    assert torch.equal(block["c"].weight, wanted.T)
    assert block["c"].weight.is_contiguous()
    x = torch.randn(3, 4)
    torch.testing.assert_close(block["c"](x), x @ wanted.T + block["c"].bias)


def test_writing_one_expert_leaves_the_others() -> None:
    block = Mixture()
    slots = {slot.name: slot for slot in find_slots(block, "b")}
    before = block.experts.up.detach().clone()
    wanted = torch.randn(5, 8)
    slots["b.experts.up.2"].write(block, wanted)
    assert torch.equal(block.experts.up[2], wanted)
    assert torch.equal(block.experts.up[[0, 1, 3]], before[[0, 1, 3]])


def test_a_shared_block_can_be_written_without_touching_the_original() -> None:
    block = Mixture()
    slots = find_slots(block, "b")
    before = {name: value.clone() for name, value in block.state_dict().items()}
    other = share_weights(block, slots)
    for slot in slots:
        slot.write(other, torch.zeros(slot.out_features, slot.in_features))
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert all(not bool(slot.read(other).any()) for slot in slots)


def test_a_shared_block_takes_memory_for_its_experts_alone() -> None:
    block = Mixture()
    other = share_weights(block, find_slots(block, "b"))
    shared = {name for name, value in block.named_parameters() if other.get_parameter(name) is value}
    assert shared == {"router.weight", "gate.weight", "shared.weight"}


def test_a_shared_block_computes_the_same_before_it_is_written() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    x = torch.randn(2, 4)
    assert torch.equal(share_weights(block, find_slots(block, "b"))(x), block(x))


# -- inputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: nn.functional.linear(x, w),
        lambda x, w: nn.functional.linear(x, w, torch.zeros(3)),
        lambda x, w: x @ w.T,
        lambda x, w: x.matmul(w.T),
        lambda x, w: torch.matmul(x, w.T),
        lambda x, w: torch.addmm(torch.zeros(3), x, w.T),
    ],
    ids=["linear", "linear with bias", "@", "Tensor.matmul", "torch.matmul", "addmm"],
)
def test_every_way_to_multiply_by_a_weight_is_seen(product) -> None:  # type: ignore[no-untyped-def]
    block = nn.Linear(5, 3, bias=False)
    slots = [LinearSlot("b.w", "weight", "linear", 3, 5)]
    seen: list[tuple[str, torch.Tensor]] = []
    x = torch.randn(2, 5)
    with torch.no_grad(), CaptureInputs(block, slots, lambda name, value: seen.append((name, value))):
        result = product(x, block.weight)
        product(x, torch.randn(3, 5))  # no slot's weight
    ((name, value),) = seen
    assert name == "b.w"
    assert value is x
    torch.testing.assert_close(result, x @ block.weight.T)


def test_experts_are_told_apart_by_their_slices() -> None:
    block = Mixture()
    seen: list[tuple[str, float]] = []
    with CaptureInputs(block, find_slots(block, "b"), lambda name, value: seen.append((name, float(value[0, 0])))):
        for expert in (2, 0):
            nn.functional.linear(torch.full((1, 8), float(expert)), block.experts.up[expert])
    assert seen == [("b.experts.up.2", 2.0), ("b.experts.up.0", 0.0)]


def test_nothing_is_seen_outside_of_the_capture() -> None:
    block = nn.Linear(5, 3)
    seen: list[str] = []
    with CaptureInputs(block, find_slots(block, "b"), lambda name, value: seen.append(name)):
        pass
    block(torch.zeros(1, 5))
    assert seen == []


# -- sums --------------------------------------------------------------------------------------------------


def sums_of(then) -> list[tuple[str, torch.Tensor]]:  # type: ignore[no-untyped-def]
    """What is seen of `then(product, other)`, other being of the product's shape."""
    block = nn.Linear(5, 3, bias=False)
    seen: list[tuple[str, torch.Tensor]] = []
    x, other = torch.ones(2, 5), torch.full((2, 3), 10.0)
    with (
        torch.no_grad(),
        CaptureInputs(
            block,
            [LinearSlot("b.w", "weight", "linear", 3, 5)],
            lambda *_: None,
            lambda name, value: seen.append((name, value.clone())),
        ),
    ):
        block.weight.fill_(1.0)
        then(block(x), other)
    return seen


@pytest.mark.parametrize(
    "then",
    [
        lambda product, other: product + other,
        lambda product, other: other + product,
        lambda product, other: torch.add(other, product),
        lambda product, other: other.add_(product),
        lambda product, other: product.add(other),
        lambda product, other: product.view(2, 3) + other,
        lambda product, other: other + nn.functional.dropout(product, 0.5, training=False),
    ],
    ids=["+", "right", "torch.add", "add_", "Tensor.add", "view", "dropout"],
)
def test_every_way_to_add_a_product_to_the_residual_is_seen(then) -> None:  # type: ignore[no-untyped-def]
    ((name, value),) = sums_of(then)
    assert name == "b.w"
    assert value.tolist() == [[15.0] * 3] * 2


@pytest.mark.parametrize(
    "then",
    [
        lambda product, other: product + torch.ones(3),
        lambda product, other: product + 1.0,
        lambda product, other: product * other,
        lambda product, other: 2 * product + other,
        lambda product, other: other + other,
        lambda product, other: product[:1] + other[:1],
        lambda product, other: product + 0.04 * product.pow(3),  # as in GELU
        lambda product, other: product.mul_(2) + other,
    ],
    ids=["bias", "number", "product", "scaled", "others", "some rows", "of itself", "scaled in place"],
)
def test_what_is_no_sum_with_the_whole_product_is_not_seen(then) -> None:  # type: ignore[no-untyped-def]
    assert sums_of(then) == []


def test_a_product_is_added_once() -> None:
    def twice(product: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (product + other) + (product + other)

    assert len(sums_of(twice)) == 1


# -- identity ----------------------------------------------------------------------------------------------


def test_one_tensor_read_twice_is_one_input() -> None:
    identity, x = InputIdentity(), torch.zeros(2, 3)
    assert identity.key(x) == identity.key(x)
    assert identity.key(x) == identity.key(x.view(2, 3))


def test_a_write_between_two_reads_makes_two_inputs() -> None:
    identity, x = InputIdentity(), torch.zeros(2, 3)
    before = identity.key(x)
    x.add_(1)
    assert identity.key(x) != before


def test_equal_values_in_two_places_are_two_inputs() -> None:
    identity, x = InputIdentity(), torch.zeros(2, 3)
    assert identity.key(x) != identity.key(x.clone())


def test_other_strides_on_the_same_memory_are_another_input() -> None:
    identity, x = InputIdentity(), torch.zeros(3, 3)
    assert identity.key(x) != identity.key(x.T)


def test_an_address_that_is_free_again_is_not_taken_for_the_old_input() -> None:
    identity = InputIdentity()
    keys = {identity.key(torch.zeros(64)) for _ in range(50)}
    assert len(keys) == 50
