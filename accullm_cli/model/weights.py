"""The safetensors files of a model: one, or shards with an index. Where these disagree harmlessly, the shards count."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from accullm_cli.errors import AccullmError
from accullm_cli.json_text import parse_json
from accullm_cli.model.files import inside
from accullm_cli.model.integrity import TensorInfo, read_header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_CHUNK = 1 << 22  # bytes read at a time of tensors that are compared


@dataclass(frozen=True)
class Weights:
    """The tensors of a model by name.

    files: what was read, the index included; names relative to the model's directory.
    records: sentences about what index and shards disagree in.
    """

    tensors: Mapping[str, TensorInfo]
    files: frozenset[str]
    records: tuple[str, ...] = ()


def read_weights(directory: Path, names: Collection[str]) -> Weights:
    """The headers of a model's weight files, found as transformers finds them.

    Args:
        names: of the files in the directory.

    Raises:
        AccullmError: no weights, or none in safetensors; a damaged file; shards that hold different tensors of one
            name, or lack what the index promises.
    """
    refuse_pickled(names, directory, str(directory))
    if WEIGHTS in names:
        both = (f"beside {WEIGHTS} there is {INDEX}; the former is read, as transformers does",)
        file = inside(directory, WEIGHTS, directory)
        return Weights(read_header(file), frozenset({WEIGHTS}), both if INDEX in names else ())
    return _read_shards(directory, directory / INDEX)


def shard_names(index: Path) -> dict[str, str]:
    """An index's shard by tensor, as it is written.

    Raises:
        AccullmError: not an index.
    """
    try:
        weight_map: Mapping[str, str] = parse_json(index.read_bytes())["weight_map"]
        weight_map = {name: shard for name, shard in weight_map.items() if name != "__metadata__"}
        if not weight_map or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise TypeError("weight_map names no files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AccullmError(f"not an index of shards ({error})", index, "download it again") from None
    return dict(weight_map)


def _read_shards(directory: Path, index: Path) -> Weights:
    """The tensors of a sharded checkpoint. As in transformers, the index says which files there are, and no more."""
    weight_map = shard_names(inside(directory, index.name, directory))
    tensors: dict[str, TensorInfo] = {}
    unnamed, misplaced, twice = [], [], []
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        file = inside(directory, shard, index)
        if not file.is_file():
            raise AccullmError(f"names {shard}, which is absent", index, "download the missing file")
        for name, tensor in read_header(file).items():
            if name in tensors:
                if not _same(tensors[name], tensor):
                    raise AccullmError(
                        f"tensor {name} differs between {tensors[name].file.name} and {shard}",
                        index,
                        "download both again",
                    )
                twice.append(name)
                continue
            tensors[name] = tensor
            if name not in weight_map:
                unnamed.append(name)
            elif weight_map[name] != shard:
                misplaced.append(name)
    for name, shard in weight_map.items():
        if name not in tensors:
            raise AccullmError(f"puts tensor {name} into {shard}, which does not hold it", index, "download both again")
    misplaced = [name for name in misplaced if name not in twice]
    records = (
        *_record(unnamed, "are in the shards, but not in the index; they are read"),
        *_record(misplaced, "are in other shards than the index says; they are read from there"),
        *_record(twice, "are in two shards, the same in both"),
    )
    order = [*weight_map, *unnamed]
    return Weights({name: tensors[name] for name in order}, frozenset({index.name, *shards}), records)


def _record(names: list[str], what: str) -> tuple[str, ...]:
    if not names:
        return ()
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return (f"tensors {', '.join(names[:3])}{more} {what}",)


def _same(a: TensorInfo, b: TensorInfo) -> bool:
    """Whether two stored tensors are equal bit for bit."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with open(a.file, "rb") as left, open(b.file, "rb") as right:
        left.seek(a.begin)
        right.seek(b.begin)
        remaining = a.end - a.begin
        while remaining:
            size = min(remaining, _CHUNK)
            if left.read(size) != right.read(size):
                return False
            remaining -= size
    return True


def refuse_pickled(names: Collection[str], where: object, load_from: str) -> None:
    """Refuse a model that has weights, but none in safetensors.

    Args:
        names: of the files in its directory; those in directories below are no concern.

    Raises:
        AccullmError: only pickled weights, or none at all.
    """
    if WEIGHTS in names or INDEX in names:
        return
    names = [name for name in names if "/" not in name]
    pickled = sorted(name for name in names if name.endswith(PICKLED))
    if pickled:
        raise AccullmError(
            f"the weights are pickled ({pickled[0]}), and loading a pickle can run any code in it",
            where,
            'convert it once where you trust it: python -c "from transformers import AutoModelForCausalLM as M, '
            f"AutoTokenizer as T; M.from_pretrained('{load_from}', dtype='auto').save_pretrained('converted'); "
            f"T.from_pretrained('{load_from}').save_pretrained('converted')\"",
        )
    loose = sorted(name for name in names if name.endswith(".safetensors"))
    if loose:
        raise AccullmError(
            f"holds {loose[0]}, but neither {WEIGHTS} nor {INDEX}", where, "give a Hugging Face model directory"
        )
    gguf = sorted(name for name in names if name.endswith(".gguf"))
    if gguf:
        hint = f"give one of them: {where / gguf[0]}" if isinstance(where, Path) else "download one and give its path"
        raise AccullmError("holds GGUF files only", where, hint)
    raise AccullmError(f"holds no weights ({WEIGHTS})", where, "give a Hugging Face model directory")
