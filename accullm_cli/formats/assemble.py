"""What writing an artifact has in common for all formats: shards, index, companions, config, card, manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.formats.adapters import write_adapter
from accullm_cli.formats.base import Parts
from accullm_cli.formats.manifest import CARD_NAME, MANIFEST_NAME, write_card, write_manifest
from accullm_cli.formats.objections import objections
from accullm_cli.formats.shards import (
    INDEX_NAME,
    SHARD_BYTES,
    TensorFiles,
    rename,
    shards_of,
    tensors_of,
    write_index,
    write_shard,
)
from accullm_cli.quant.correction import SUFFIXES, read_linear, without_correction
from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.encodings.base import StoredLinear
from accullm_cli.quant.plan import Plan
from accullm_cli.run import sync_directory, write_file, write_text

_OWN_NAMES = ("config.json", INDEX_NAME, CARD_NAME, MANIFEST_NAME)


def assemble(
    directory: Path,
    parts: Parts,
    format_name: str,
    config: Mapping[str, Any],
    place_block: Callable[[Path, Path], None],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write an artifact into an empty directory. `accullm.json` appears last: without it there is no artifact.

    Args:
        config: keys to add to the source's config.json.
        place_block: makes the shard of a block or an embedding (second path) from that of the quantize stage (first).
        shard_bytes: limit for the shards of what is outside the blocks.

    Raises:
        AccullmError: a companion has the name of a file of the artifact, or a tensor comes twice.
    """
    outside = []
    for number, tensors in enumerate(shards_of(parts.outside, shard_bytes)):
        # The names hold the number of shards, which is known only when the stream has ended.
        outside.append(directory / f".outside-{number:05d}.safetensors")
        write_shard(outside[-1], tensors)
    quantized = (*parts.blocks, *parts.embeddings)
    count = len(quantized) + len(outside)
    shards = [directory / f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    for source, shard in zip(quantized, shards, strict=False):
        place_block(source, shard)
    for source, shard in zip(outside, shards[len(quantized) :], strict=True):
        rename(source, shard)
    write_index(directory, shards)
    tensor_bytes = sum(shard.stat().st_size for shard in shards) + write_adapter(directory, parts)
    copy_companions(directory, parts)
    write_text(directory / "config.json", json.dumps({**parts.config, **config}, indent=2) + "\n")
    write_card(directory, parts, format_name, tensor_bytes)
    write_manifest(directory, parts, format_name)
    sync_directory(directory)


def placing(
    plan: Plan, encode: Callable[[str, StoredLinear], Mapping[str, torch.Tensor]]
) -> Callable[[Path, Path], None]:
    """What makes the shard of a block or an embedding for `assemble`: linears packed anew, the rest as it is.

    Args:
        encode: the format's tensors of a linear, by suffix, from its name and what quantize stored.
    """

    def tensors(source: Path) -> Iterator[tuple[str, torch.Tensor]]:
        for name, stored in read_shard(source, plan):
            if isinstance(stored, torch.Tensor):
                yield name, stored
            else:
                yield from ((f"{name}.{suffix}", tensor) for suffix, tensor in encode(name, stored).items())

    return lambda source, target: write_shard(target, dict(tensors(source)))


def read_shard(path: Path, plan: Plan) -> Iterator[tuple[str, torch.Tensor | StoredLinear]]:
    """What quantize wrote into a shard: each quantized linear or embedding as a whole, all other tensors as they are.

    Of a linear whose outlier features go into an adapter, what the artifact's own files store of it.

    Args:
        plan: that the shard was made for.
    """
    files = TensorFiles(path.parent, tensors_of(path))
    quantized = plan.quantized
    of_linear: dict[str, list[str]] = {}
    for name in files.infos:
        owner, _, suffix = name.rpartition(".")
        if owner in quantized and suffix in (*ENCODINGS[quantized[owner].encoding].suffixes, *SUFFIXES):
            of_linear.setdefault(owner, []).append(name)
        else:
            yield name, files.tensor(name)
    for owner, names in of_linear.items():
        tensors = {name.removeprefix(f"{owner}."): tensor for name, tensor in files.tensors(names).items()}
        yield owner, without_correction(read_linear(tensors, quantized[owner]))


def _free_name(name: str, companions: Container[str]) -> str:
    """What a companion is called in the artifact, which has a model card of its own."""
    if name.lower() != CARD_NAME.lower():
        return name
    stem, suffix = Path(name).stem, Path(name).suffix
    while (name := f"{(stem := f'{stem}.original')}{suffix}") in companions:
        pass
    return name


def copy_companions(directory: Path, parts: Parts) -> None:
    """Copy all that the artifact takes from the source as it is."""
    for name, companion in parts.companions.items():
        copy_companion(companion, directory / _free_name(name, parts.companions))


def copy_companion(source: Path, target: Path) -> None:
    """Copy a file that the artifact takes from the source as it is."""
    if target.name in _OWN_NAMES or target.suffix == ".safetensors":
        raise AccullmError("cannot be copied into the artifact, which has a file of that name", source)
    write_file(target, lambda temporary: shutil.copyfile(source, temporary))


def refuse(format_name: str, parts: Parts, directory: Path) -> None:
    """Refuse to write a plan that the format cannot hold.

    Raises:
        AccullmError: with the first objection.
    """
    for objection in objections(format_name, parts.plan, parts.shape):
        raise AccullmError(objection.what, directory, objection.hint)
