"""A block's linear weights: read, written, and seen in use."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from accullm_cli.model.slots import CaptureInputs, InputIdentity, LinearSlot, share_weights


class Experts(nn.Module):
    def __init__(self, count: int, rows: int, columns: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(count, rows, columns))


class Mixture(nn.Module):
    """Experts with what scores them beside them, and a linear that only happens to lie there."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4, bias=False)
        self.shared = nn.Linear(8, 6, bias=False)
        self.experts = Experts(4, 5, 8)


def linear_slot(block: nn.Module, parameter: str = "weight") -> LinearSlot:
    return LinearSlot("b.w", parameter, "linear", *block.get_parameter(parameter).shape)


MIXTURE_SLOTS = [
    LinearSlot("b.shared", "shared.weight", "linear", 6, 8),
    *(LinearSlot(f"b.experts.up.{e}", "experts.up", "expert", 5, 8, e, 4) for e in range(4)),
]


# -- reading and writing -----------------------------------------------------------------------------------


def test_conv1d_reads_and_writes_its_transpose() -> None:
    block = nn.ModuleDict({"c": Conv1D(6, 4)})
    slot = LinearSlot("b.c", "c.weight", "conv1d", 6, 4, transposed=True)
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
    slots = {slot.name: slot for slot in MIXTURE_SLOTS}
    before = block.experts.up.detach().clone()
    wanted = torch.randn(5, 8)
    slots["b.experts.up.2"].write(block, wanted)
    assert torch.equal(block.experts.up[2], wanted)
    assert torch.equal(block.experts.up[[0, 1, 3]], before[[0, 1, 3]])


def test_a_shared_block_can_be_written_without_touching_the_original() -> None:
    block = Mixture()
    slots = MIXTURE_SLOTS
    before = {name: value.clone() for name, value in block.state_dict().items() if "experts" not in name}
    other = share_weights(block)
    for slot in slots:
        slot.write(other, torch.zeros(slot.out_features, slot.in_features))
    assert all(torch.equal(block.state_dict()[name], value) for name, value in before.items())
    assert all(not bool(slot.read(other).any()) for slot in slots)


def test_a_shared_block_takes_no_memory_and_its_experts_are_written_in_both() -> None:
    block = Mixture()
    other = share_weights(block)
    assert all(other.get_parameter(name) is value for name, value in block.named_parameters())
    slots = {slot.name: slot for slot in MIXTURE_SLOTS}
    slots["b.experts.up.2"].write(other, torch.zeros(5, 8))
    assert not bool(slots["b.experts.up.2"].read(block).any())


def test_a_shared_block_computes_the_same_before_it_is_written() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    x = torch.randn(2, 4)
    assert torch.equal(share_weights(block)(x), block(x))


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
    with CaptureInputs(block, MIXTURE_SLOTS, lambda name, value: seen.append((name, float(value[0, 0])))):
        for expert in (2, 0):
            nn.functional.linear(torch.full((1, 8), float(expert)), block.experts.up[expert])
    assert seen == [("b.experts.up.2", 2.0), ("b.experts.up.0", 0.0)]


@pytest.mark.parametrize("is_stored_transposed", [False, True])
def test_experts_of_one_product_are_told_apart(is_stored_transposed: bool) -> None:
    """As Llama 4 multiplies: every expert's input by its weight, in one function."""
    block = nn.Module()
    block.up = nn.Parameter(torch.randn(4, 8, 5) if is_stored_transposed else torch.randn(4, 5, 8))
    slots = [LinearSlot(f"b.up.{e}", "up", "expert", 5, 8, e, 4, is_stored_transposed) for e in range(4)]
    seen: dict[str, torch.Tensor] = {}
    gradients: dict[str, torch.Tensor] = {}
    inputs: dict[str, torch.Tensor] = {}

    def keep(name: str, gradient: torch.Tensor, value: torch.Tensor) -> None:
        gradients[name], inputs[name] = gradient, value

    x = torch.randn(4, 3, 8, requires_grad=True)
    weight = block.up if is_stored_transposed else block.up.mT
    with CaptureInputs(block, slots, seen.__setitem__, on_gradient=keep):
        output = torch.bmm(x, weight)
    scale = torch.arange(12.0).view(4, 3, 1)
    (output * scale).sum().backward()
    for e, slot in enumerate(slots):
        assert torch.equal(slot.read(block), weight[e].T)
        assert torch.equal(seen[slot.name], x[e])
        assert torch.equal(gradients[slot.name], scale[e].expand(3, 5))
        assert torch.equal(inputs[slot.name], x[e])


def test_a_weight_on_the_left_reads_columns() -> None:
    """As Mamba multiplies: the input's features lie in rows."""
    block = nn.Linear(5, 3, bias=False)
    seen: dict[str, torch.Tensor] = {}
    gradients: dict[str, torch.Tensor] = {}
    inputs: dict[str, torch.Tensor] = {}

    def keep(name: str, gradient: torch.Tensor, value: torch.Tensor) -> None:
        gradients[name], inputs[name] = gradient, value

    x = torch.randn(2, 7, 5, requires_grad=True)
    with CaptureInputs(block, [linear_slot(block)], seen.__setitem__, on_gradient=keep):
        output = block.weight @ x.mT
    factor = torch.randn(2, 7, 3)
    (output * factor.mT).sum().backward()
    assert torch.equal(seen["b.w"], x)
    assert torch.equal(gradients["b.w"], factor)
    assert torch.equal(inputs["b.w"], x)


def test_each_use_of_a_weight_is_told_with_its_own_input() -> None:
    """Uses of unequal length, one behind the other; what is told of inputs holds no graph."""
    block = nn.Linear(4, 4, bias=False)
    told: list[tuple[torch.Tensor, torch.Tensor]] = []
    x = torch.randn(3, 4, requires_grad=True)
    with CaptureInputs(
        block,
        [linear_slot(block)],
        lambda name, value: None,
        on_gradient=lambda name, g, value: told.append((g, value)),
    ):
        first = block(x)
        (block(first[:2]) * 2).sum().backward()
    (last_gradient, last_input), (gradient, value) = told
    assert torch.equal(last_gradient, torch.full((2, 4), 2.0))
    assert torch.equal(last_input, first[:2])
    assert torch.equal(value, x)
    assert torch.allclose(gradient[:2], last_gradient @ block.weight)
    assert not gradient[2].any()
    assert not any(tensor.requires_grad for pair in told for tensor in pair)


def test_parts_of_a_parameter_of_two_dimensions_are_experts() -> None:
    """As DBRX stores them: [E N, K], the last ones used from the other side."""
    block = nn.Module()
    block.w1, block.w2 = nn.Parameter(torch.randn(12, 5)), nn.Parameter(torch.randn(12, 5))
    slots = [LinearSlot(f"b.w1.{e}", "w1", "expert", 3, 5, e, 4) for e in range(4)]
    slots += [LinearSlot(f"b.w2.{e}", "w2", "expert", 5, 3, e, 4, transposed=True) for e in range(4)]
    seen: list[str] = []
    with CaptureInputs(block, slots, lambda name, value: seen.append(name)):
        for e in (3, 0):
            hidden = torch.ones(1, 5) @ block.w1.view(4, 3, 5)[e].T
            hidden @ block.w2.view(4, 3, 5)[e]
    assert seen == ["b.w1.3", "b.w2.3", "b.w1.0", "b.w2.0"]
    slots[2].write(block, torch.full((3, 5), 7.0))
    slots[4].write(block, torch.arange(15.0).view(5, 3))
    assert bool((block.w1[6:9] == 7).all())
    assert torch.equal(block.w2[:3], torch.arange(15.0).view(5, 3).T)


def test_a_weight_that_is_used_in_another_shape_is_not_seen() -> None:
    block = nn.Linear(6, 4, bias=False)
    seen: list[str] = []
    with torch.no_grad(), CaptureInputs(block, [linear_slot(block)], lambda name, value: seen.append(name)):
        nn.functional.linear(torch.ones(1, 6), block.weight[:2])
        torch.ones(1, 4) @ block.weight
    assert seen == []


def test_nothing_is_seen_outside_of_the_capture() -> None:
    block = nn.Linear(5, 3)
    seen: list[str] = []
    with CaptureInputs(block, [linear_slot(block)], lambda name, value: seen.append(name)):
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
