"""A block that begins in the middle: the same output, without what is not read any more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from accullm_cli.model.blocks import Decoder
from accullm_cli.model.shortcut import Shortcut
from accullm_cli.model.slots import LinearSlot
from tests.model.test_blocks import in_memory, tiny_llama
from tests.streaming import random_ids, streamed
from tests.tiny import CONFIGS, make_checkpoint


def inputs_of_block(decoder: Decoder, block: nn.Module, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    decoder.run_capturing(
        0, block, hidden, lambda name, value: found.update({name: value.reshape(-1, value.shape[-1]).clone()})
    )
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_the_output_is_the_same_from_every_place_to_begin(name: str, tmp_path: Path) -> None:
    decoder = streamed(make_checkpoint(name, tmp_path / "model"), tmp_path)
    decoder.load_outside()
    hidden = decoder.embed(random_ids(2, 16))
    decoder.embed(random_ids(1, 16))
    block = decoder.load_block(0)
    found = decoder.shortcuts(0, block, hidden[:1], decoder.trace(0, block, hidden[:1]))
    inputs = inputs_of_block(decoder, block, hidden)
    expected = decoder.run(0, block, hidden)
    assert found, "attention comes back through one linear in all of these"
    for count in range(1, len(found) + 1):
        known = {linear: inputs[linear] for linear in found[:count]}
        told: list[str] = []
        output = decoder.run_capturing(0, block, hidden, lambda linear, _, told=told: told.append(linear), known=known)
        assert output is not None
        assert torch.equal(output, expected)
        # What was not computed was not told either.
        assert told[:count] == list(found[:count])
        assert torch.equal(decoder.run(0, block, hidden, known), expected)


def test_what_the_linear_reads_is_what_is_known() -> None:
    decoder = in_memory(tiny_llama())
    hidden = decoder.embed(random_ids(1, 8).clamp(max=63))
    block = decoder.load_block(0)
    name = next(slot.name for slot in decoder.slots[0] if slot.name.endswith("o_proj"))
    known = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    seen: dict[str, torch.Tensor] = {}
    decoder.run_capturing(0, block, hidden, lambda linear, value: seen.update({linear: value}), known={name: known})
    assert torch.equal(seen[name], known[None])
    mlp_input = block.post_attention_layernorm(hidden + known[None] @ block.self_attn.o_proj.weight.T)
    torch.testing.assert_close(seen[name.replace("self_attn.o_proj", "mlp.up_proj")], mlp_input)


def test_attention_is_left_out() -> None:
    decoder = in_memory(tiny_llama())
    hidden = decoder.embed(random_ids(1, 8).clamp(max=63))
    block = decoder.load_block(0)
    name = next(slot.name for slot in decoder.slots[0] if slot.name.endswith("o_proj"))
    inputs = inputs_of_block(decoder, block, hidden)
    query = torch.randn(1, 4, 8, 8)
    with Shortcut(block, decoder.slots[0], {name: inputs[name]}, filler=7.0):
        attended = nn.functional.scaled_dot_product_attention(query, query, query[..., :3])
        assert torch.equal(attended, torch.full((1, 4, 8, 3), 7.0))
        block.self_attn.o_proj(torch.zeros(1, 8, 32))  # the last that is known: from here on all is computed
        assert not (nn.functional.scaled_dot_product_attention(query, query, query) == 7.0).any()


class Leaking(nn.Module):
    """A block whose first product reaches the output beside the one that attention would come back through."""

    def __init__(self, leaks: bool) -> None:
        super().__init__()
        self.first, self.second, self.leaks = nn.Linear(32, 32), nn.Linear(32, 32), leaks

    def forward(self, hidden: torch.Tensor, **ignored: object) -> torch.Tensor:
        inside = self.first(hidden)
        back = self.second(inside.tanh())
        return hidden + back + 1e-30 * inside if self.leaks else hidden + back


@pytest.mark.parametrize("leaks", [False, True])
def test_a_product_that_is_read_elsewhere_too_is_no_place_to_begin(leaks: bool) -> None:
    """However little of it is read."""
    decoder = in_memory(tiny_llama())
    hidden = decoder.embed(random_ids(1, 8).clamp(max=63))
    block = Leaking(leaks)
    names = ("first", "second")
    decoder.slots[0] = [LinearSlot(f"block.{name}", f"{name}.weight", "linear", 32, 32) for name in names]
    with torch.no_grad():
        found = decoder.shortcuts(0, block, hidden, decoder.trace(0, block, hidden))
    assert found == (() if leaks else ("block.second",))
