"""The format of mlx and mlx_lm: codes in groups, each group with a scale and a real offset.

For a linear or an embedding P with weight [N, K], b bits and group size g (mlx.core.quantize, mode "affine"):

- P.weight uint32 [N, K*b/32]: codes packed densely along K, least significant bits first.
- P.scales, P.biases [N, K/g] in the model's dtype: value = code * scale + bias. (A bias of the linear is P.bias.)

The experts of a layer, OWNER.experts.0.up_proj and so on in checkpoints, lie one behind the other in the tensors of
OWNER.switch_mlp.up_proj, whose first dimension is theirs: [E, N, ...].

config.json has "quantization": the usual bits and group_size, and under the full name of each module that differs its
own. mlx rounds the product and the sum each to the dtype of the scales where it dequantizes; what is measured here are
the values themselves, so that each of its weights in a dtype of unit roundoff u (2**-8 in bfloat16, 2**-11 in float16)
lies within u * (|code * scale| * (1 + u) + |value|) of ours. In float32 they are the same, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.formats.assemble import assemble, read_shard, refuse
from accullm_cli.formats.base import ModelShape, Parts
from accullm_cli.formats.capabilities import CAPABILITIES
from accullm_cli.formats.earlier_keys import with_earlier_keys
from accullm_cli.formats.manifest import Manifest, manifest_of
from accullm_cli.formats.objections import SCALE_DTYPES
from accullm_cli.formats.placing import PARTS_OF_EXPERTS, placed_plan
from accullm_cli.formats.shards import TensorFiles, dtype_name, read_json, write_shard
from accullm_cli.formats.stored import StoredArtifact, TensorSchema, not_finite, schema_bytes
from accullm_cli.formats.words import to_octets, to_words, word_count
from accullm_cli.quant.encodings.affine import AffineLinear
from accullm_cli.quant.packing import pack, unpack
from accullm_cli.quant.plan import KEPT_BITS, LinearPlan, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from accullm_cli.model.structure import Structure

CONFIG_KEY = "quantization"
# What mlx_lm calls the experts of a layer.
_STACKS = "switch_mlp"


class MlxFormat:
    """Writer and reader of mlx's affine groups."""

    name = "mlx"

    def linear_bytes(self, linear: LinearPlan, dtype: torch.dtype) -> int:
        """Bytes that are stored for a linear: scale and offset are in the model's dtype."""
        if linear.bits == KEPT_BITS:
            return linear.stored_bytes
        return schema_bytes(linear_schema(linear, dtype))

    def write(self, directory: Path, parts: Parts) -> None:
        """Write an artifact: codes are packed anew, never rounded anew.

        Raises:
            AccullmError: the plan is impossible, or a scale or offset cannot be stored exactly in the model's dtype.
        """
        refuse(self.name, parts, directory)
        shape = parts.shape
        places = {name: place_of(name, shape.kinds, shape.stored_as) for name in parts.plan.quantized}

        def place(source: Path, target: Path) -> None:
            write_shard(target, dict(_converted(source, parts.plan, shape, places)))

        outside = ((_stored_name(name, shape), tensor) for name, tensor in parts.outside)
        described = quantization(parts.plan, places)
        # mlx_lm writes it twice; other programs look under the second key, and refuse what they do not know.
        config = {**with_earlier_keys(parts.config), CONFIG_KEY: described, "quantization_config": described}
        assemble(directory, replace(parts, outside=outside), self.name, config, place)
        self.open(directory)

    def open(self, directory: Path) -> MlxArtifact:
        """Open an artifact of this format, from accullm or from mlx_lm.

        Raises:
            AccullmError: a file is missing, truncated or not as its schema says, or the scheme is not supported.
        """
        files = TensorFiles.open(directory)
        manifest = manifest_of(directory, self.name)
        if manifest is None:
            return MlxArtifact(directory, derived_plan(directory, files), files, None, {})
        return MlxArtifact(directory, manifest.plan, files, manifest, manifest.stored_as)


FORMAT = MlxFormat()


class MlxArtifact(StoredArtifact):
    """An opened artifact of mlx's format."""

    format = "mlx"

    def __init__(
        self,
        path: Path,
        plan: Plan,
        files: TensorFiles,
        manifest: Manifest | None,
        stored_as: Mapping[str, tuple[str, ...]],
    ) -> None:
        if manifest is None:
            # What is not there by itself is an expert in a stack.
            names = {name: stored_as.get(name, (name,))[0] for name in plan.quantized}
            self._kinds = {name: "expert" for name, first in names.items() if f"{first}.scales" not in files.infos}
        else:
            self._kinds = dict(manifest.kinds)
        self._places = {name: place_of(name, self._kinds, stored_as) for name in plan.quantized}
        self._experts = Counter(place.modules for place in self._places.values() if place.number is not None)
        # Experts are read one after the other, and their stack once.
        self._stack: tuple[tuple[str, ...], dict[str, torch.Tensor]] = ((), {})
        schema: dict[str, dict[str, TensorSchema]] = {}
        for name, row in plan.quantized.items():
            modules = self._places[name].modules
            own = replace(row, out_features=row.out_features // len(modules))
            schema[name] = {}
            for module in modules:
                dtype = scale_dtype(path, files, module)
                schema[name] |= linear_schema(replace(own, name=module), dtype, self._experts.get(modules))
        others = {name: names[0] for name, names in stored_as.items() if name not in schema and len(names) == 1}
        super().__init__(path, plan, files.renamed(others), schema, manifest)

    @property
    def kinds(self) -> Mapping[str, str]:
        """See `StoredArtifact.kinds`."""
        return self._kinds

    def placed(self, model: PreTrainedModel, structure: Structure) -> StoredArtifact:
        """See `StoredArtifact.placed`."""
        if self.manifest is not None:
            return self
        plan, stored_as = placed_plan(self, model, structure)
        return MlxArtifact(self.path, plan, self.files, None, stored_as)

    def linear_bytes(self, name: str) -> int:
        """See `StoredArtifact.linear_bytes`; an expert has its share of the stack."""
        place = self._places.get(name)
        return super().linear_bytes(name) // (1 if place is None else self._experts.get(place.modules, 1))

    def _stored(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a quantized linear by suffix, those of several modules one below the other."""
        if name not in self.schema:
            return super()._stored(name)
        place = self._places[name]
        stored = self._stack[1] if self._stack[0] == place.modules else self.files.tensors(self.schema[name])
        if place.number is not None:
            self._stack = place.modules, stored
            stored = {tensor: stack[place.number] for tensor, stack in stored.items()}
        suffixes = dict.fromkeys(tensor.rpartition(".")[2] for tensor in stored)
        return {suffix: torch.cat([stored[f"{module}.{suffix}"] for module in place.modules]) for suffix in suffixes}

    def _linear(self, name: str, stored: Mapping[str, torch.Tensor]) -> AffineLinear:
        return decode(stored, self.plan.quantized[name])

    def _linear_problems(self, name: str, stored: Mapping[str, torch.Tensor]) -> Iterator[str]:
        for suffix in ("scales", "biases"):
            yield from not_finite(suffix, stored[suffix])


# -- writing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a linear lies: the modules whose rows are its own, in order; of an expert, its number in their stacks."""

    modules: tuple[str, ...]
    number: int | None


def place_of(name: str, kinds: Mapping[str, str], stored_as: Mapping[str, tuple[str, ...]]) -> Place:
    """The place of a linear or an embedding.

    Args:
        kinds, stored_as: as in `ModelShape`.
    """
    names = stored_as.get(name, (name,))
    if kinds.get(name) != "expert":
        return Place(names, None)
    modules, number = [], ""
    for expert in names:
        owner, _, rest = expert.partition(".experts.")
        number, _, last = rest.partition(".")
        modules.append(f"{owner}.{_STACKS}.{PARTS_OF_EXPERTS.get(last, last)}")
    return Place(tuple(modules), int(number))


def experts_of(module: str, count: int) -> list[str]:
    """The names in checkpoints of the experts in a stack: the inverse of `place_of`."""
    owner, _, part = module.partition(f".{_STACKS}.")
    if owner.endswith(".block_sparse_moe"):
        part = next(other for other, own in PARTS_OF_EXPERTS.items() if own == part)
    return [f"{owner}.experts.{number}.{part}" for number in range(count)]


def quantization(plan: Plan, places: Mapping[str, Place]) -> dict[str, Any]:
    """What mlx_lm reads of config.json: the scheme that most have, and each that differs by its full name."""
    schemes = {
        module: (row.group_size, row.bits) for name, row in plan.quantized.items() for module in places[name].modules
    }
    usual = max(dict.fromkeys(schemes.values()), key=list(schemes.values()).count)
    described = {name: _scheme(*scheme) for name, scheme in schemes.items() if scheme != usual}
    return {**_scheme(*usual), **described}


def _scheme(group_size: int, bits: int) -> dict[str, int]:
    return {"group_size": group_size, "bits": bits}


def _converted(
    source: Path, plan: Plan, shape: ModelShape, places: Mapping[str, Place]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a block: quantized linears in this format, their experts stacked, the rest as it is."""
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for name, stored in read_shard(source, plan):
        if isinstance(stored, torch.Tensor):
            yield _stored_name(name, shape), stored
            continue
        assert isinstance(stored, AffineLinear)
        place = places[name]
        for suffix, tensor in encode(stored, shape.dtype, name).items():
            for module, rows in zip(place.modules, tensor.chunk(len(place.modules)), strict=True):
                if place.number is None:
                    yield f"{module}.{suffix}", rows
                else:
                    stacks.setdefault(f"{module}.{suffix}", {})[place.number] = rows
    for name, experts in stacks.items():
        yield name, torch.stack([experts[number] for number in range(len(experts))])


def _stored_name(name: str, shape: ModelShape) -> str:
    """What a tensor that is stored as it is is called."""
    return name if name in shape.kept else shape.stored_as.get(name, (name,))[0]


def encode(linear: AffineLinear, dtype: torch.dtype, where: object) -> dict[str, torch.Tensor]:
    """The format's tensors, by suffix, of a linear without outliers.

    Raises:
        AccullmError: a scale or an offset is not exactly representable in `dtype`.
    """
    tensors = {"weight": to_words(pack(linear.codes, linear.bits)).view(torch.uint32)}
    for suffix, numbers in (("scales", linear.scales), ("biases", linear.offsets)):
        tensors[suffix] = numbers.to(dtype)
        if not torch.equal(tensors[suffix].double(), numbers.double()):
            raise AccullmError(
                f"one of the {suffix} is not exactly representable in {dtype_name(dtype)}",
                where,
                f"run profile again with --format {MlxFormat.name}",
            )
    return tensors


# -- reading -----------------------------------------------------------------------------------------------


def decode(tensors: Mapping[str, torch.Tensor], plan: LinearPlan) -> AffineLinear:
    """The inverse of `encode`. Scales and offsets stay in their stored dtype."""
    return AffineLinear(
        codes=unpack(to_octets(tensors["weight"]), plan.bits, plan.in_features),
        scales=tensors["scales"],
        offsets=tensors["biases"],
        outlier_index=torch.zeros(0, dtype=torch.int32),
        outlier_weight=tensors["scales"].new_zeros(plan.out_features, 0),
        bits=plan.bits,
        group_size=plan.group_size,
    )


def linear_schema(linear: LinearPlan, dtype: torch.dtype, experts: int | None = None) -> dict[str, TensorSchema]:
    """The tensors of one quantized linear or embedding by full name, or of so many experts of its shape."""
    rows, name, stack = linear.out_features, linear.name, () if experts is None else (experts,)
    return {
        f"{name}.weight": TensorSchema(torch.uint32, (*stack, rows, word_count(linear.in_features, linear.bits))),
        f"{name}.scales": TensorSchema(dtype, (*stack, rows, linear.groups)),
        f"{name}.biases": TensorSchema(dtype, (*stack, rows, linear.groups)),
    }


def scale_dtype(path: Path, files: TensorFiles, name: str) -> torch.dtype:
    """The dtype of a linear's scales: any that weights come in."""
    info = files.infos.get(f"{name}.scales")
    if info is None:
        raise AccullmError(f"tensor {name}.scales is missing", path, "copy the artifact again")
    if info.torch_dtype not in SCALE_DTYPES:
        raise AccullmError(f"tensor {name}.scales is {dtype_name(info.torch_dtype)}", info.file)
    return info.torch_dtype


def derived_plan(path: Path, files: TensorFiles) -> Plan:
    """The plan of an artifact that mlx_lm wrote, from its config.json and the shapes of its tensors.

    Modules that are in no numbered block are embeddings.

    Raises:
        AccullmError: it is not affine, or not as the two agree on.
    """
    config_path = path / "config.json"
    config = read_json(config_path).get(CONFIG_KEY)
    if not isinstance(config, dict):
        raise AccullmError(f"has no {CONFIG_KEY}", config_path, "copy the artifact again")
    linears: dict[str, LinearPlan] = {}
    embeddings: dict[str, LinearPlan] = {}
    for name in files.infos:
        owner, _, suffix = name.rpartition(".")
        if suffix != "scales":
            continue
        group_size, bits = _scheme_of(config, owner, config_path)
        in_block = any(part.isdigit() for part in owner.split("."))
        for row in _derived_linears(path, files, owner, group_size, bits):
            (linears if in_block else embeddings)[row.name] = row
    return Plan(linears, embeddings=embeddings)


def _scheme_of(config: Mapping[str, Any], name: str, where: Path) -> tuple[int, int]:
    """Group size and bits of a module, its own or the usual ones."""
    own = config.get(name)
    own = own if isinstance(own, dict) else config
    mode = own.get("mode", "affine")
    if mode != "affine":
        raise AccullmError(f"quantizes {name} in mode {mode}, of which only affine is supported", where)
    group_size, bits = own.get("group_size"), own.get("bits")
    (storable,) = CAPABILITIES[MlxFormat.name].linears
    if group_size not in storable.group_sizes or bits not in storable.bits:
        raise AccullmError(f"gives {name} {bits} bits in groups of {group_size}, which is not supported", where)
    return int(group_size), int(bits)


def _derived_linears(path: Path, files: TensorFiles, name: str, group_size: int, bits: int) -> list[LinearPlan]:
    """The row of a linear, or of each expert in a stack."""
    dtype = scale_dtype(path, files, name)  # the model's
    weight, scales = files.infos.get(f"{name}.weight"), files.infos[f"{name}.scales"]
    if weight is None:
        raise AccullmError(f"tensor {name}.weight is missing", path, "copy the artifact again")
    is_stack = f".{_STACKS}." in name
    if not len(weight.shape) == len(scales.shape) == 2 + is_stack:
        raise AccullmError(
            f"tensor {name}.weight has shape {list(weight.shape)}, and only linears [N, K] and experts "
            f"{_STACKS} [E, N, K] are supported",
            weight.file,
        )
    columns = scales.shape[-1] * group_size
    if weight.shape[-1] != word_count(columns, bits):
        raise AccullmError(
            f"tensor {name}.weight has {weight.shape[-1]} words for {scales.shape[-1]} groups, and {bits} bits in "
            f"groups of {group_size} take {word_count(columns, bits)}",
            weight.file,
            "copy the artifact again",
        )
    return [
        LinearPlan(
            name=own,
            out_features=weight.shape[-2],
            in_features=columns,
            bits=bits,
            group_size=group_size,
            symmetric=False,
            source_itemsize=dtype.itemsize,
            encoding="affine",
        )
        for own in (experts_of(name, weight.shape[0]) if is_stack else [name])
    ]
