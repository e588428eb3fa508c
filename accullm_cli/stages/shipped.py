"""shipped: is what was measured what users get? The artifact by `from_pretrained`, against the blocks of validate.

Validation dequantizes weights and runs a block at a time; users load the whole artifact, on modules that multiply
packed weights. Where modeling code and those modules do not fit each other, only this shows it.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from contextlib import redirect_stderr
from io import StringIO

import torch

from accullm_cli.errors import NotSoError, is_out_of_memory
from accullm_cli.formats.capabilities import CAPABILITIES
from accullm_cli.formats.stored import StoredArtifact
from accullm_cli.kernels.packed import PACKED_TOKENS
from accullm_cli.measure.agreement import largest_difference
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.plain import plain_model
from accullm_cli.model.skeleton import build_skeleton
from accullm_cli.model.structure import read_structure
from accullm_cli.run import available_memory
from accullm_cli.stages.artifact_weights import ArtifactWeights
from accullm_cli.stages.reading import logits_by_blocks
from accullm_cli.units import size

# Of a validation window. Up to PACKED_TOKENS of them are multiplied by packed weights, more by dequantized ones.
TOKENS = 2 * PACKED_TOKENS
# Of the memory that is free, what the artifact in float32 may take.
SHARE_OF_MEMORY = 0.5
_HINT = "do not use it; report it with the model's config.json"


def check_shipped(artifact: StoredArtifact, ids: torch.Tensor, measured: torch.Tensor) -> tuple[str, ...]:
    """Load an artifact as its users do, and run the beginning of a window.

    Args:
        ids: int64 [T], the beginning of a window.
        measured: what validate's blocks make of them, logits [T, vocabulary].

    Returns: a sentence where it could not be done here.

    Raises:
        NotSoError: transformers cannot load or run it, or its logits are others.
    """
    if obstacle := _obstacle(artifact):
        return (f"the {artifact.format} artifact was not run as users load it: {obstacle}",)
    try:
        shipped = _logits(artifact, ids)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise NotSoError(f"transformers cannot run the artifact ({reason})", artifact.path, _HINT) from error
    differences = [largest_difference(measured[: len(logits)], logits) for logits in shipped]
    if not all(difference.is_arithmetic for difference in differences):
        differences = [largest_difference(_run_alone(artifact, ids[: len(logits)]), logits) for logits in shipped]
    for logits, difference in zip(shipped, differences, strict=True):
        if not difference.is_arithmetic:
            raise NotSoError(
                f"the artifact as users load it is not what was measured: of {len(logits)} tokens, log-probabilities "
                f"differ by up to {difference}",
                artifact.path,
                _HINT,
            )
    return ()


def _run_alone(artifact: StoredArtifact, ids: torch.Tensor) -> torch.Tensor:
    """By blocks, from these tokens alone, and from weights as the format's readers round them; [T, vocabulary].

    A window's length may choose its rotary frequencies (longrope, dynamic NTK), and where attention looks ahead, as
    over PaliGemma's prompts, the tokens behind count.
    """
    model = build_skeleton(artifact.path)
    structure = read_structure(model)
    weights = ArtifactWeights(artifact, model, structure, artifact.reader_dtype)
    return logits_by_blocks(Decoder(model, weights, structure), ids[None])[0]


def _logits(artifact: StoredArtifact, ids: torch.Tensor) -> list[torch.Tensor]:
    """By transformers, of all tokens and of those that are multiplied by packed weights; [n, vocabulary] each."""
    if module := CAPABILITIES[artifact.format].module:
        importlib.import_module(module)
    # Some readers draw bars, also while the model runs.
    with redirect_stderr(StringIO()), plain_model(artifact.path) as plain, torch.no_grad():
        prompts = (ids[None], ids[None, :PACKED_TOKENS])
        return [plain.model(input_ids=prompt, use_cache=False).logits[0].float() for prompt in prompts]


def _obstacle(artifact: StoredArtifact) -> str:
    """Why it cannot be loaded here; "" where it can."""
    format = CAPABILITIES[artifact.format]
    if format.loader:
        return f"{format.loader} compiles its kernels before it loads one"
    if not format.module and not format.package:
        return "transformers does not read this format"
    if format.package and importlib.util.find_spec(format.package.replace("-", "_")) is None:
        return f"it needs the package {format.package}"
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
