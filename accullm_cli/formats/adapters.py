"""Outlier features as a low-rank adapter in a folder of the artifact, in the files that runtimes load.

The adapter adds B A to the weight that the artifact's own files give (quant.correction): A selects the features, B is
what their columns lost. Its factor is 1 wherever runtimes have one. A holds ones and zeros alone, and so takes the
smallest type that the runtime's loader converts: 8 bits.

peft (https://github.com/huggingface/peft, also read by vLLM and SGLang): adapter_config.json and
adapter_model.safetensors with, for a linear P [N, K] and n features,

- base_model.model.P.lora_A.weight float8_e4m3fn [n, K]; base_model.model.P.lora_B.weight float16 [N, n].

`r` is the largest rank, `rank_pattern` has the others. vLLM takes lora_alpha / r for all linears, peft
`alpha_pattern` / `rank_pattern` of each: all are 1.

mlx_lm (mlx_lm/tuner/utils.py, `load_adapters`): adapter_config.json and adapters.safetensors with

- P.lora_a int8 [K, r]; P.lora_b float16 [r, N], of one rank r for all linears that the config names.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.formats.base import Format, Parts
from accullm_cli.formats.shards import TensorFiles, dtype_name, read_json, tensors_of, write_shard
from accullm_cli.model.integrity import TensorInfo
from accullm_cli.quant.correction import CORRECTION_DTYPE, SUFFIXES
from accullm_cli.quant.plan import LinearPlan, Plan
from accullm_cli.run import file_sha256, sync_directory, write_text

FOLDER = "outlier-adapter"
CONFIG_NAME = "adapter_config.json"
# What the adapter belongs to. No name that a loader could find: on the original it would be wrong.
BASE = "the directory above this one"
_HINT = "copy the artifact again"
_MISSING = "file is missing, which holds the artifact's outlier features"


@dataclass(frozen=True)
class Selected:
    """The outlier features of one linear, as an adapter holds them.

    index: int32 [n], ascending. correction: B, float16 [N, n]. in_features: K.
    """

    index: torch.Tensor
    correction: torch.Tensor
    in_features: int

    @property
    def selector(self) -> torch.Tensor:
        """A, float32 [n, K]: a single 1 in each row."""
        rows = torch.zeros(len(self.index), self.in_features)
        rows[torch.arange(len(self.index)), self.index.long()] = 1
        return rows


class AdapterFiles(ABC):
    """How one kind of adapter names and lays out its tensors, and what its configuration says."""

    tensors_name: str
    selector_dtype: torch.dtype
    # Of the tensors that hold A and B of a linear; {} is its name.
    selector: str
    correction: str
    # Whether A is stored as [K, n], and B as [n, N].
    transposed: bool

    @abstractmethod
    def config(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        """adapter_config.json for these numbers of features by linear."""

    def tensors(self, name: str, selected: Selected) -> dict[str, torch.Tensor]:
        """What is stored of a linear."""
        a, b = selected.selector.to(self.selector_dtype), selected.correction
        pair = (a.T, b.T) if self.transposed else (a, b)
        return dict(zip((self.selector.format(name), self.correction.format(name)), pair, strict=True))

    def owner(self, tensor: str) -> str | None:
        """The linear that a tensor belongs to; None for a tensor of no adapter."""
        for pattern in (self.selector, self.correction):
            start, end = pattern.split("{}")
            if tensor.startswith(start) and tensor.endswith(end):
                return tensor[len(start) : len(tensor) - len(end)]
        return None


class PeftFiles(AdapterFiles):
    """As `PeftModel.from_pretrained` and vLLM read them."""

    tensors_name = "adapter_model.safetensors"
    selector_dtype = torch.float8_e4m3fn
    selector = "base_model.model.{}.lora_A.weight"
    correction = "base_model.model.{}.lora_B.weight"
    transposed = False

    def config(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        largest = max(ranks.values())
        others = {name: rank for name, rank in ranks.items() if rank != largest}
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": BASE,
            "inference_mode": True,
            "r": largest,
            "lora_alpha": largest,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": sorted(ranks),
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": False,
            "use_dora": False,
            "modules_to_save": None,
        }


class MlxLmFiles(AdapterFiles):
    """As `mlx_lm.load(..., adapter_path=...)` reads them."""

    tensors_name = "adapters.safetensors"
    selector_dtype = torch.int8
    selector = "{}.lora_a"
    correction = "{}.lora_b"
    transposed = True

    def config(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        # `keys` are looked up in the layers and in the model as a whole, where these full names are found.
        parameters = {"rank": max(ranks.values()), "scale": 1.0, "dropout": 0.0, "keys": sorted(ranks)}
        return {"model": BASE, "fine_tune_type": "lora", "num_layers": 0, "lora_parameters": parameters}


FILES: Mapping[str, AdapterFiles] = {"peft": PeftFiles(), "mlx_lm": MlxLmFiles()}


def linear_bytes(format: Format, linear: LinearPlan, dtype: torch.dtype) -> int:
    """Bytes that are stored for a linear in a format, those in an adapter included; see `Format.linear_bytes`."""
    if not linear.adapter:
        return format.linear_bytes(linear, dtype)
    beside = linear.outlier_bytes * len(linear.outlier_index)
    return format.linear_bytes(replace(linear, outlier_index=()), dtype) + beside


def adapter_of(plan: Plan) -> str:
    """The kind of adapter that the plan needs; "" for none."""
    return next((linear.adapter for linear in plan.linears.values() if linear.outlier_index), "")


def largest_rank(plan: Plan) -> int:
    """Of the plan's adapter."""
    return max(len(linear.outlier_index) for linear in plan.linears.values())


# -- writing -----------------------------------------------------------------------------------------------


def write_adapter(directory: Path, parts: Parts) -> int:
    """Write the adapter of an artifact, if its plan has one, from the shards that quantize wrote.

    Returns: bytes of its file of tensors.
    """
    kind = adapter_of(parts.plan)
    if not kind:
        return 0
    selected: dict[str, Selected] = {}
    for shard in parts.blocks:
        selected |= _selected(shard, parts.plan)
    return write_files(directory / FOLDER, kind, selected)


def write_files(folder: Path, kind: str, selected: Mapping[str, Selected]) -> int:
    """Write an adapter into a new folder.

    Args:
        kind: one of FILES. selected: by linear, none without features.

    Returns: bytes of its file of tensors.
    """
    files = FILES[kind]
    tensors: dict[str, torch.Tensor] = {}
    for name, own in selected.items():
        tensors |= files.tensors(name, own)
    folder.mkdir()
    write_shard(folder / files.tensors_name, tensors)
    config = files.config({name: len(own.index) for name, own in selected.items()})
    write_text(folder / CONFIG_NAME, json.dumps(config, indent=1) + "\n")
    sync_directory(folder)
    return (folder / files.tensors_name).stat().st_size


def _selected(shard: Path, plan: Plan) -> dict[str, Selected]:
    """The outlier features of the linears of a shard."""
    files = TensorFiles(shard.parent, tensors_of(shard))
    found = {}
    for name, linear in plan.linears.items():
        names = tuple(f"{name}.{suffix}" for suffix in SUFFIXES)
        if linear.adapter and names[0] in files.infos:
            tensors = files.tensors(names)
            found[name] = Selected(tensors[names[0]], tensors[names[1]], linear.in_features)
    return found


# -- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """An opened adapter. Corrections are read when they are asked for, and not kept.

    index: the features of each linear that has some, int32 [n], ascending.
    """

    kind: str
    tensors: TensorFiles
    index: Mapping[str, torch.Tensor]

    def correction(self, name: str) -> torch.Tensor:
        """B of a linear, float16 [N, n]."""
        files = FILES[self.kind]
        stored = self.tensors.tensor(files.correction.format(name))
        return stored.T.contiguous() if files.transposed else stored

    @property
    def folder(self) -> Path:
        return self.tensors.directory

    def bytes_of(self, name: str) -> int:
        """Bytes that are stored for a linear."""
        if name not in self.index:
            return 0
        files = FILES[self.kind]
        names = files.selector.format(name), files.correction.format(name)
        return sum(self.tensors.infos[tensor].bytes for tensor in names)

    @property
    def bytes(self) -> int:
        return sum(info.bytes for info in self.tensors.infos.values())

    @property
    def rank(self) -> int:
        """The largest of a linear."""
        return max(map(len, self.index.values()))


def open_adapter(directory: Path, plan: Plan, kind: str, recorded: Mapping[str, str] | None) -> Adapter | None:
    """The adapter of an artifact; None where it has none.

    Args:
        plan: of the artifact. kind: of adapter that it may have, "" for none.
        recorded: SHA-256 of the adapter's files as the artifact was made, by their names in the folder; None where
            nobody knows.

    Raises:
        AccullmError: it is missing, damaged, or another artifact's.
    """
    folder = directory / FOLDER
    if not folder.exists() and not recorded:
        return None
    if not kind or (recorded is not None and not recorded):
        raise AccullmError("is no part of this artifact", folder, "remove it")
    for name, digest in (recorded or {}).items():
        if not (folder / name).is_file():
            raise AccullmError(_MISSING, folder / name, _HINT)
        if file_sha256(folder / name) != digest:
            what = "is not what the artifact was made with: it is damaged, or another artifact's"
            raise AccullmError(what, folder / name, _HINT)
    files = FILES[kind]
    if not (folder / files.tensors_name).is_file():
        raise AccullmError(_MISSING, folder / files.tensors_name, _HINT)
    tensors = TensorFiles(folder, tensors_of(folder / files.tensors_name))
    index = _read_index(folder / files.tensors_name, files, tensors, plan)
    adapter = Adapter(kind, tensors, index)
    _check_config(folder / CONFIG_NAME, files, {name: len(own) for name, own in index.items()})
    return adapter


def _read_index(path: Path, files: AdapterFiles, tensors: TensorFiles, plan: Plan) -> dict[str, torch.Tensor]:
    """The features that the adapter selects, each linear's, in the order of the plan.

    Raises:
        AccullmError: a tensor is of no linear of the plan, or does not fit it, or A selects none or several features.
    """
    owners = {files.owner(name) for name in tensors.infos}
    for name in tensors.infos:
        owner = files.owner(name)
        if owner is None or owner not in plan.quantized:
            raise AccullmError(f"tensor {name} is of no quantized linear: it is another artifact's", path, _HINT)
    found = {}
    for linear in plan.linears.values():
        if linear.name in owners:
            found[linear.name] = _read_selector(path, files, tensors, linear)
    return found


def _read_selector(path: Path, files: AdapterFiles, tensors: TensorFiles, linear: LinearPlan) -> torch.Tensor:
    names = files.selector.format(linear.name), files.correction.format(linear.name)
    for name in names:
        if name not in tensors.infos:
            raise AccullmError(f"tensor {name} is missing", path, _HINT)
    count = tensors.infos[names[0]].shape[1 if files.transposed else 0]
    shapes = (count, linear.in_features), (linear.out_features, count)
    for name, shape, dtype in zip(names, shapes, (files.selector_dtype, CORRECTION_DTYPE), strict=True):
        _check_tensor(path, name, tensors.infos[name], shape[::-1] if files.transposed else shape, dtype)
    stored = tensors.tensor(names[0]).float()
    rows = stored.T if files.transposed else stored
    index = rows.argmax(1).to(torch.int32)
    if not torch.equal(rows, Selected(index, rows, linear.in_features).selector) or (index.diff() <= 0).any():
        raise AccullmError(f"tensor {names[0]} does not select single features in their order", path, _HINT)
    return index


def _check_tensor(path: Path, name: str, info: TensorInfo, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if info.torch_dtype != dtype:
        raise AccullmError(f"tensor {name} is {dtype_name(info.torch_dtype)}, expected {dtype_name(dtype)}", path)
    if info.shape != shape:
        raise AccullmError(f"tensor {name} has shape {list(info.shape)}, expected {list(shape)}", path, _HINT)


def _check_config(path: Path, files: AdapterFiles, ranks: Mapping[str, int]) -> None:
    """Refuse a configuration by which a runtime would make something else of the tensors.

    Raises:
        AccullmError: it differs from what is written for these ranks.
    """
    config = read_json(path)
    for key, value in files.config(ranks).items():
        if config.get(key) != value:
            raise AccullmError(f"has another {key} than the adapter's tensors ask for", path, _HINT)
