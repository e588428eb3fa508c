"""What formats ask about a model before any weight is read: kinds of linears, dtype, names in checkpoints."""

from __future__ import annotations

import torch

from accullm_cli.formats.base import ModelShape, Stack
from accullm_cli.formats.capabilities import CAPABILITIES
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.embeddings import find_embeddings
from accullm_cli.model.names import checkpoint_modules, checkpoint_names, expert_names
from accullm_cli.model.skeleton import stored_shapes
from accullm_cli.quant.plan import Plan
from accullm_cli.stages.job import Job


def model_shape(job: Job, decoder: Decoder, plan: Plan) -> ModelShape:
    """What formats ask about the model before any weight is read."""
    kinds: dict[str, str] = {slot.name: slot.kind for slots in decoder.slots for slot in slots}
    for slot in find_embeddings(decoder.model) if plan.embeddings else ():
        kinds[slot.name] = "tied" if slot.is_looked_up and slot.is_head else "head" if slot.is_head else "embedding"
    stacks = {
        f"{block}.{slot.parameter}": Stack(slot.experts, slot.transposed)
        for block, slots in zip(decoder.block_names, decoder.slots, strict=True)
        for slot in slots
        if slot.expert == 0 and (slot.transposed or decoder.model.get_parameter(f"{block}.{slot.parameter}").dim() == 2)
    }
    # A head that is tied to an embedding is stored with it.
    tied = {name.removesuffix(".weight") for name in decoder.model.all_tied_weights_keys} if plan.embeddings else set()
    others = [
        name
        for name, module in decoder.model.named_modules()
        if not isinstance(module, torch.nn.Embedding) and name not in {*kinds, *tied} and _has_matrix(module)
    ]
    stored_as = _stored_as(decoder, [*kinds, *others]) if CAPABILITIES[job.format].names == "of the checkpoint" else {}
    model_type = str(job.source.config.get("model_type", ""))
    return ModelShape(
        model_type,
        source_dtype(job),
        kinds,
        stacks,
        stored_as,
        tuple(others),
        config={key: value for key, value in job.source.config.items() if key != "quantization_config"},
        companions=job.source.companions,
        parameters=stored_shapes(decoder.model),
        kept=job.source.kept,
    )


def _has_matrix(module: torch.nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2


def _stored_as(decoder: Decoder, modules: list[str]) -> dict[str, tuple[str, ...]]:
    """See `ModelShape.stored_as`."""
    model = decoder.model
    renamed = checkpoint_names(model, model.state_dict()) | checkpoint_modules(model, modules)
    found: dict[str, tuple[str, ...]] = {name: (other,) for name, other in renamed.items()}
    for block, slots in zip(decoder.block_names, decoder.slots, strict=True):
        found |= expert_names(model, block, slots)
    return found


def source_dtype(job: Job) -> torch.dtype:
    """The dtype of most of the source's weights."""
    count: dict[torch.dtype, int] = {}
    for info in job.source.tensors.values():
        count[info.torch_dtype] = count.get(info.torch_dtype, 0) + int(torch.tensor(info.shape).prod())
    return max(count, key=lambda dtype: count[dtype])
