"""What blocks are passed beside hidden states, and what lies outside of blocks and is not used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from accullm_cli.errors import AccullmError
from tests.kinds import KINDS
from tests.model.test_blocks import in_memory, tiny_llama
from tests.streaming import random_ids, streamed


class TokenDependentRotation(nn.Module):
    """Passes every block something that depends on the tokens, as per-layer embeddings do."""

    def __init__(self, inner: nn.Module, for_each_token: bool) -> None:
        super().__init__()
        self.inner = inner
        self.dim = -1 if for_each_token else None

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.inner(x, position_ids)
        return cos + x.mean(self.dim, keepdim=True), sin


def test_what_blocks_are_passed_for_each_token_comes_along_with_the_hidden_states() -> None:
    model = tiny_llama()
    model.model.rotary_emb = TokenDependentRotation(model.model.rotary_emb, for_each_token=True)
    decoder = in_memory(model)
    ids = random_ids(4, 8).clamp(max=63)
    with torch.no_grad():
        expected = model(ids).logits
    for batch in (ids[:2], ids[2:]):  # the values differ from batch to batch
        decoder.embed(batch)
    stream = decoder.embed(ids)
    assert stream.shape == (4, 8, 32 + 8)  # a cosine for each feature of a head, the same tensor for both blocks
    assert torch.equal(decoder.states(stream), model.model.embed_tokens(ids))
    for index in range(2):
        stream = decoder.run(index, decoder.load_block(index), stream)
    torch.testing.assert_close(decoder.logits(stream), expected, rtol=1e-5, atol=1e-6)
    other = decoder.embed(ids.flip(0))
    assert not torch.equal(other[..., 32:], decoder.embed(ids)[..., 32:])


def test_blocks_that_are_passed_something_of_all_tokens_are_refused() -> None:
    model = tiny_llama()
    model.model.rotary_emb = TokenDependentRotation(model.model.rotary_emb, for_each_token=False)
    with pytest.raises(AccullmError) as refusal:
        in_memory(model)
    assert refusal.value.line() == (
        "LlamaForCausalLM: block model.layers.0 is passed position_embeddings.0 of shape [1, 13, 8], which depends on "
        "the text but is not one value for each token; that is not supported"
    )
    assert refusal.value.exit_code == 2


def test_what_text_does_not_reach_takes_no_memory_and_is_where_the_rest_is(tmp_path: Path) -> None:
    """Models put what they make on the device of their first parameter, which may be of a vision tower."""
    decoder = streamed(KINDS["vision tower"].save(tmp_path / "model"), tmp_path)
    decoder.load_outside()
    assert decoder.model.device.type == "cpu"
    idle = [decoder.model.get_parameter(name) for name in decoder.structure.unused]
    assert idle
    assert {parameter.untyped_storage().nbytes() for parameter in idle} == {4}
    decoder.release_outside()
    assert all(parameter.is_meta for parameter in decoder.model.parameters())
