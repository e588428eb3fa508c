"""Token embedding and output head are found by transformers' own word, whatever an architecture calls them."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from accullm_cli.errors import AccullmError
from accullm_cli.model.embeddings import EmbeddingSlot, find_embeddings
from accullm_cli.model.skeleton import build_skeleton
from tests.tiny import CONFIGS

# (embedding, its width, head, its width); without a head where that is the embedding.
FOUND = {
    "llama": ("model.embed_tokens", 64, "lm_head", 64),
    "llama-tied": ("model.embed_tokens", 64, None, None),
    "gemma3": ("model.embed_tokens", 64, None, None),
    "gpt2": ("transformer.wte", 64, None, None),
    "opt": ("model.decoder.embed_tokens", 32, None, None),
    "gpt-neox": ("gpt_neox.embed_in", 64, "lm_head", 64),
    "mixtral": ("model.embed_tokens", 64, "lm_head", 64),
}


@pytest.mark.parametrize("name", FOUND)
def test_embedding_and_head_are_found(name: str, tmp_path: Path) -> None:
    CONFIGS[name]().save_pretrained(tmp_path)
    model = build_skeleton(tmp_path)
    embedding, width, head, head_width = FOUND[name]
    found = find_embeddings(model)
    if head is None:
        assert found == (EmbeddingSlot(embedding, 260, width, is_looked_up=True, is_head=True),)
    else:
        assert found == (
            EmbeddingSlot(embedding, 260, width, is_looked_up=True, is_head=False),
            EmbeddingSlot(head, 260, head_width, is_looked_up=False, is_head=True),
        )
    for slot in found:
        assert model.get_parameter(slot.parameter).shape == (slot.out_features, slot.in_features)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda model: setattr(model.model, "embed_tokens", nn.Identity()),
            "LlamaForCausalLM has no torch.nn.Embedding as token embedding",
        ),
        (lambda model: setattr(model, "lm_head", None), "LlamaForCausalLM has no torch.nn.Linear as output head"),
    ],
)
def test_what_is_no_plain_embedding_or_linear_is_refused(change, line: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    CONFIGS["llama"]().save_pretrained(tmp_path)
    model = build_skeleton(tmp_path)
    change(model)
    with pytest.raises(AccullmError) as refusal:
        find_embeddings(model)
    assert refusal.value.line() == f"--embedding-bits: {line}, so that it cannot be quantized; leave it out"
