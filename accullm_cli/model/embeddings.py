"""Where a decoder's token embedding and output head are, by transformers' own word."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from accullm_cli.errors import AccullmError


@dataclass(frozen=True)
class EmbeddingSlot:
    """A matrix [N, K] with a row for each token, outside the blocks. Tied, embedding and head are one.

    name: of the module whose parameter NAME.weight it is; tied, of the embedding.
    is_looked_up: rows are the tokens' first hidden states. is_head: the last hidden states are multiplied by it.
    """

    name: str
    out_features: int
    in_features: int
    is_looked_up: bool
    is_head: bool

    @property
    def parameter(self) -> str:
        return f"{self.name}.weight"


def find_embeddings(model: PreTrainedModel) -> tuple[EmbeddingSlot, ...]:
    """The embedding and the head, or the one matrix that is both.

    Raises:
        AccullmError: one is missing, or no torch.nn.Embedding or torch.nn.Linear.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise _refusal(model, "torch.nn.Embedding as token embedding")
    if not isinstance(head, nn.Linear):
        raise _refusal(model, "torch.nn.Linear as output head")
    name_of = {module: name for name, module in model.named_modules()}
    name, head_name = name_of[embedding], name_of[head]
    shape = (embedding.num_embeddings, embedding.embedding_dim)
    if model.all_tied_weights_keys.get(f"{head_name}.weight") == f"{name}.weight":
        return (EmbeddingSlot(name, *shape, is_looked_up=True, is_head=True),)
    return (
        EmbeddingSlot(name, *shape, is_looked_up=True, is_head=False),
        EmbeddingSlot(head_name, head.out_features, head.in_features, is_looked_up=False, is_head=True),
    )


def _refusal(model: PreTrainedModel, what: str) -> AccullmError:
    return AccullmError(
        f"{type(model).__name__} has no {what}, so that it cannot be quantized", "--embedding-bits", "leave it out"
    )
