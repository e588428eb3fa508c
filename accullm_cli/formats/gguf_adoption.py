"""A GGUF file that somebody downloaded, as an artifact: a directory with a link to it, and what it says about itself.

Configuration and tokenizer are made of its metadata, the plan is what its tensors are stored as. What it was made from
it does not say.
"""

from __future__ import annotations

import json
from pathlib import Path

from gguf import GGMLQuantizationType
from transformers import AutoConfig

from accullm_cli.errors import AccullmError
from accullm_cli.formats.base import ModelShape, Parts
from accullm_cli.formats.manifest import write_card, write_manifest
from accullm_cli.formats.shards import read_json
from accullm_cli.model.embeddings import find_embeddings
from accullm_cli.model.gguf import describe_gguf
from accullm_cli.model.gguf_architectures import Architecture
from accullm_cli.model.gguf_configuration import is_written
from accullm_cli.model.gguf_file import PLAIN, GgufFile, read_gguf
from accullm_cli.model.gguf_programs import ARCHITECTURES, architecture_of
from accullm_cli.model.skeleton import build_skeleton
from accullm_cli.model.structure import read_structure
from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.plan import KEPT_BITS, LinearPlan, Plan
from accullm_cli.run import write_text

# By ggml's name of a type: the encoding, and the bits, group size and symmetry that its rows have.
_Scheme = tuple[str, int, int, bool]


def adopt(path: Path, directory: Path, format_name: str, schemes: dict[str, _Scheme]) -> None:
    """Make an artifact of a file, in an empty directory.

    Args:
        schemes: what each of ggml's types is as rows of a plan.

    Raises:
        AccullmError: the file is damaged, of an architecture or a type that is not read, or holds no whole model.
    """
    file = read_gguf(path)
    name = file.metadata.get("general.architecture")
    if isinstance(name, str) and not is_written(name):
        known = ", ".join(sorted({own.name for own in ARCHITECTURES.values()}))
        raise AccullmError(f"architecture {name} is not read as an artifact", path, f"those that are: {known}")
    dtype, records = describe_gguf(file, directory)
    content = read_json(directory / "config.json")
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    architecture = architecture_of(config)
    files = path, *file.others
    for part in files:
        (directory / part.name).symlink_to(part.resolve())
    own = {"quantization_config": {"quant_method": format_name, "file": path.name}}
    write_text(directory / "config.json", json.dumps({**content, **own}, indent=2) + "\n")
    model = build_skeleton(directory)
    kinds: dict[str, str] = {}
    linears: dict[str, LinearPlan] = {}
    structure = read_structure(model)
    for block, slots in zip(structure.blocks, structure.slots, strict=True):
        for slot in slots:
            parameter = f"{block}.{slot.parameter}"
            stored = _kind(file, architecture, config, parameter, slot.out_features)
            kinds[slot.name] = slot.kind
            linears[slot.name] = _row(path, slot.name, slot.out_features, slot.in_features, stored, schemes)
    embeddings = {}
    for embedding in find_embeddings(model):
        stored = _kind(file, architecture, config, embedding.parameter, embedding.out_features)
        row = _row(path, embedding.name, embedding.out_features, embedding.in_features, stored, schemes)
        if row.bits != KEPT_BITS:
            embeddings[embedding.name] = row
    facts = {
        "file": path.name,
        "metadata": {key: value for key, value in file.metadata.items() if _is_fact(key, value)},
        "records": list(records),
    }
    shape = ModelShape(str(content.get("model_type", "")), dtype, kinds)
    plan = Plan(linears, embeddings=embeddings)
    parts = Parts(content, {}, plan, shape, (), iter(()), facts)
    write_card(directory, parts, format_name, sum(part.stat().st_size for part in files))
    write_manifest(directory, parts, format_name)


def _is_fact(key: str, value: object) -> bool:
    return key.startswith(("general.", "quantize.")) and isinstance(value, str | int | float)


def _kind(
    file: GgufFile, architecture: Architecture, config: object, parameter: str, rows: int
) -> GGMLQuantizationType:
    """The type that the pieces of a parameter have.

    Raises:
        AccullmError: one is missing, or they have several types.
    """
    kinds = {}
    for piece in architecture.pieces(config, parameter, rows):
        if piece.name not in file.tensors:
            raise AccullmError(f"tensor {piece.name} is missing", file.path, "download or copy it again")
        kinds[piece.name] = file.tensors[piece.name].kind
    if len(set(kinds.values())) > 1:
        told = " and ".join(f"{name} is {kind.name}" for name, kind in kinds.items())
        raise AccullmError(f"{told}, and both are one matrix of the model", file.path)
    return next(iter(kinds.values()))


def _row(
    path: Path, name: str, rows: int, columns: int, kind: GGMLQuantizationType, schemes: dict[str, _Scheme]
) -> LinearPlan:
    if kind in PLAIN:
        return LinearPlan(name, rows, columns, KEPT_BITS, -1, False, (), PLAIN[kind].itemsize)
    if kind.name not in schemes:
        known = ", ".join(schemes)
        raise AccullmError(f"{name} is stored as {kind.name}, which is not read", path, f"those that are: {known}")
    encoding, bits, group_size, symmetric = schemes[kind.name]
    row = LinearPlan(name, rows, columns, bits, group_size, symmetric, encoding=encoding)
    if problem := ENCODINGS[encoding].problem(row):
        raise AccullmError(f"{name} {problem}", path)
    return row
