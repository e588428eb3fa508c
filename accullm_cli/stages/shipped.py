"""shipped: is what was measured what users get? The artifact by `from_pretrained`, against the blocks of validate.

Validation dequantizes weights and runs a block at a time; users load the whole artifact, on modules that multiply
packed weights. Where modeling code and those modules do not fit each other, only this shows it. On a GPU the kernels
multiply, in 16 bits.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import math
from contextlib import redirect_stderr
from io import StringIO

import torch
from torch import nn

from accullm_cli.errors import NotSoError, is_out_of_memory
from accullm_cli.formats.capabilities import ADAPTERS, CAPABILITIES
from accullm_cli.formats.shards import dtype_name
from accullm_cli.formats.stored import StoredArtifact
from accullm_cli.kernels.launch import GEMV_TOKENS
from accullm_cli.kernels.packed import PACKED_TOKENS
from accullm_cli.measure.agreement import largest_difference
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.plain import plain_model
from accullm_cli.model.skeleton import build_skeleton
from accullm_cli.model.structure import read_structure
from accullm_cli.run import available_memory
from accullm_cli.stages.artifact_weights import ArtifactWeights
from accullm_cli.stages.compute import Compute
from accullm_cli.stages.device import describe_device
from accullm_cli.stages.reading import logits_by_blocks
from accullm_cli.stages.whole_model import load_artifact
from accullm_cli.units import size

# Of a validation window. Up to PACKED_TOKENS of them are multiplied by packed weights, more by dequantized ones.
TOKENS = 2 * PACKED_TOKENS
# Of the memory that is free, what the artifact in float32 may take.
SHARE_OF_MEMORY = 0.5
# Mean KL divergence that products in 16 bits may bring, in nats: they bring some thousandths, and wrong ones several.
KERNELS_KL = 0.03
_HINT = "do not use it; report it with the model's config.json"


def check_shipped(artifact: StoredArtifact, ids: torch.Tensor, measured: torch.Tensor) -> tuple[str, ...]:
    """Load an artifact as its users do, and run the beginning of a window.

    Args:
        ids: int64 [T], the beginning of a window.
        measured: what validate's blocks make of them, logits [T, vocabulary].

    Returns: a sentence where it could not be done here, or not with its adapter.

    Raises:
        NotSoError: transformers cannot load or run it, or its logits are others.
    """
    if obstacle := _obstacle(artifact):
        return (f"the {artifact.format} artifact was not run as users load it: {obstacle}",)
    records: tuple[str, ...] = ()
    comparable: torch.Tensor | None = measured
    if artifact.adapter is not None and (missing := _missing(ADAPTERS[artifact.adapter.kind].package)):
        what = f"the {artifact.format} artifact was run as users load it without its adapter, for which {missing}"
        records, artifact, comparable = (what,), artifact.without_adapter(), None
    try:
        shipped = _logits(artifact, ids)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise NotSoError(f"transformers cannot run the artifact ({reason})", artifact.path, _HINT) from error
    differences = []
    if comparable is not None:
        differences = [largest_difference(comparable[: len(logits)], logits) for logits in shipped]
    if comparable is None or not all(difference.is_arithmetic for difference in differences):
        differences = [largest_difference(_run_alone(artifact, ids[: len(logits)]), logits) for logits in shipped]
    for logits, difference in zip(shipped, differences, strict=True):
        if not difference.is_arithmetic:
            raise NotSoError(
                f"the artifact as users load it is not what was measured: of {len(logits)} tokens, log-probabilities "
                f"differ by up to {difference}",
                artifact.path,
                _HINT,
            )
    return records


def check_kernels(
    artifact: StoredArtifact, compute: Compute, dtype: torch.dtype, ids: torch.Tensor, measured: torch.Tensor
) -> tuple[str, ...]:
    """Run the beginning of a window by the kernels, on the GPU and in the dtype that the artifact is used in there.

    Args:
        ids, measured: as for `check_shipped`.

    Returns: what that came to, or why it could not be done; nothing where `check_shipped` has said so.

    Raises:
        NotSoError: the kernels make something else of it.
    """
    if _obstacle(artifact):
        return ()
    who = f"in {dtype_name(dtype)} on {describe_device(compute.device)}"
    needed, free = sum(info.bytes for info in artifact.files.infos.values()), compute.free_memory()
    if free is not None and needed > SHARE_OF_MEMORY * free:
        return (f"the kernels did not run it {who}: it takes {size(needed)} of memory, of which {size(free)} are free",)
    model = load_artifact(artifact.path, compute.device, dtype)
    differences = []
    # By the kernels for a prompt, and for a few tokens.
    for prompt in (ids, ids[:GEMV_TOKENS]):
        with torch.no_grad():
            logits = model(prompt[None].to(compute.device), use_cache=False).logits[0].float().cpu()
        differences.append(_mean_kl(measured[: len(prompt)], logits))
        if not differences[-1] <= KERNELS_KL:
            differences[-1] = _mean_kl(_run_alone(artifact, prompt), logits)
    # A model's modules refer to each other in circles.
    del model
    gc.collect()
    worst = max(differences, key=lambda kl: (math.isnan(kl), kl))
    if not worst <= KERNELS_KL:
        what = f"the kernels make something else of the artifact {who} than was measured: a mean KL of {worst:.3g} nats"
        raise NotSoError(what, artifact.path, "give --device cpu, and report it")
    return (f"the kernels multiplied by it {who}: a mean KL of {worst:.2g} nats from what was measured",)


def _mean_kl(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Of distributions given by logits [T, vocabulary]."""
    known = expected.double().log_softmax(-1)
    terms = known.exp() * (known - found.double().log_softmax(-1))
    return float(terms.where(known > -torch.inf, 0.0).sum(-1).mean())


def _run_alone(artifact: StoredArtifact, ids: torch.Tensor) -> torch.Tensor:
    """By blocks, from these tokens alone; [T, vocabulary].

    A window's length may choose its rotary frequencies (longrope, dynamic NTK), and where attention looks ahead, as
    over PaliGemma's prompts, the tokens behind count.
    """
    model = build_skeleton(artifact.path)
    structure = read_structure(model)
    return logits_by_blocks(Decoder(model, ArtifactWeights(artifact, model, structure), structure), ids[None])[0]


def _logits(artifact: StoredArtifact, ids: torch.Tensor) -> list[torch.Tensor]:
    """By transformers, of all tokens and of those that are multiplied by packed weights; [n, vocabulary] each."""
    if module := CAPABILITIES[artifact.format].module:
        importlib.import_module(module)
    # Some readers draw bars, also while the model runs.
    with (
        redirect_stderr(StringIO()),
        plain_model(artifact.path, own_experts=bool(module)) as plain,
        torch.no_grad(),
    ):
        model: nn.Module = plain.model
        if artifact.adapter is not None:
            plain.model(input_ids=ids[None, :1])  # some readers unpack weights only now, and peft looks for them
            peft = importlib.import_module(ADAPTERS[artifact.adapter.kind].package)
            model = peft.PeftModel.from_pretrained(model, artifact.adapter.folder)
        prompts = (ids[None], ids[None, :PACKED_TOKENS])
        return [model(input_ids=prompt, use_cache=False).logits[0].float() for prompt in prompts]


def _obstacle(artifact: StoredArtifact) -> str:
    """Why it cannot be loaded here; "" where it can."""
    format = CAPABILITIES[artifact.format]
    if format.loader:
        return f"{format.loader} compiles its kernels before it loads one"
    if not format.module and not format.package:
        return "transformers does not read this format"
    for reading in artifact.readings:
        if reading.is_transformers and reading.obstacle:
            return f"{reading.reader} cannot, as {reading.obstacle}"
    if missing := _missing(format.package):
        return missing
    # Linears as they are packed, or (readers may unpack them while loading) in float32; the rest in float32.
    linears = artifact.plan.quantized.values()
    weights = sum(linear.weights for linear in linears)
    packed = sum(artifact.linear_bytes(linear.name) for linear in linears)
    rest = sum(math.prod(artifact.files.infos[name].shape) for name in artifact.names())
    needed = 4 * rest + packed + (4 * weights if format.unpacks else 0)
    free = available_memory()
    if free is not None and needed > SHARE_OF_MEMORY * free:
        return f"it takes {size(needed)} of memory, of which {size(free)} are free"
    return ""


def _missing(package: str) -> str:
    """What it needs that is not here; "" where nothing is missing."""
    if package and importlib.util.find_spec(package.replace("-", "_")) is None:
        return f"it needs the package {package}"
    return ""
