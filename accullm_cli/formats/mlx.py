"""The format of mlx and mlx_lm: codes in groups, each group with a scale and a real offset.

For a linear or an embedding P with weight [N, K], b bits and group size g (mlx.core.quantize, mode "affine"):

- P.weight uint32 [N, K*b/32]: codes packed densely along K, least significant bits first.
- P.scales, P.biases [N, K/g] in the model's dtype: value = code * scale + bias. (A bias of the linear is P.bias.)

config.json has "quantization": the usual bits and group_size, and under the full name of each module that differs its
own. mlx rounds the product and the sum each to the dtype of the scales where it dequantizes; what is measured here are
the values themselves, so that each of its weights in a dtype of unit roundoff u (2**-8 in bfloat16, 2**-11 in float16)
lies within u * (|code * scale| * (1 + u) + |value|) of ours. In float32 they are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from accullm_cli.errors import AccullmError
from accullm_cli.formats.assemble import assemble, placing, refuse
from accullm_cli.formats.base import Parts
from accullm_cli.formats.capabilities import CAPABILITIES
from accullm_cli.formats.earlier_keys import with_earlier_keys
from accullm_cli.formats.manifest import Manifest, manifest_of
from accullm_cli.formats.objections import SCALE_DTYPES
from accullm_cli.formats.shards import TensorFiles, dtype_name, read_json
from accullm_cli.formats.stored import StoredArtifact, TensorSchema, not_finite, schema_bytes
from accullm_cli.formats.words import to_octets, to_words, word_count
from accullm_cli.quant.encodings.affine import AffineLinear
from accullm_cli.quant.encodings.base import StoredLinear
from accullm_cli.quant.packing import pack, unpack
from accullm_cli.quant.plan import KEPT_BITS, LinearPlan, Plan

CONFIG_KEY = "quantization"


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

        def encoded(name: str, stored: StoredLinear) -> dict[str, torch.Tensor]:
            assert isinstance(stored, AffineLinear)
            return encode(stored, parts.shape.dtype, name)

        described = quantization(parts.plan)
        # mlx_lm writes it twice; other programs look under the second key, and refuse what they do not know.
        config = {**with_earlier_keys(parts.config), CONFIG_KEY: described, "quantization_config": described}
        assemble(directory, parts, self.name, config, placing(parts.plan, encoded))
        self.open(directory)

    def open(self, directory: Path) -> MlxArtifact:
        """Open an artifact of this format, from accullm or from mlx_lm.

        Raises:
            AccullmError: a file is missing, truncated or not as its schema says, or the scheme is not supported.
        """
        files = TensorFiles.open(directory)
        manifest = manifest_of(directory, self.name)
        plan = derived_plan(directory, files) if manifest is None else manifest.plan
        return MlxArtifact(directory, plan, files, manifest)


FORMAT = MlxFormat()


class MlxArtifact(StoredArtifact):
    """An opened artifact of mlx's format."""

    format = "mlx"

    def __init__(self, path: Path, plan: Plan, files: TensorFiles, manifest: Manifest | None) -> None:
        schema = {
            name: linear_schema(linear, scale_dtype(path, files, name)) for name, linear in plan.quantized.items()
        }
        super().__init__(path, plan, files, schema, manifest)

    def _linear(self, name: str, stored: Mapping[str, torch.Tensor]) -> AffineLinear:
        return decode(stored, self.plan.quantized[name])

    def _linear_problems(self, name: str, stored: Mapping[str, torch.Tensor]) -> Iterator[str]:
        for suffix in ("scales", "biases"):
            yield from not_finite(suffix, stored[suffix])


# -- writing -----------------------------------------------------------------------------------------------


def quantization(plan: Plan) -> dict[str, Any]:
    """What mlx_lm reads of config.json: the scheme that most have, and each that differs by its full name."""
    schemes = {name: (linear.group_size, linear.bits) for name, linear in plan.quantized.items()}
    usual = max(dict.fromkeys(schemes.values()), key=list(schemes.values()).count)
    described = {name: _scheme(*scheme) for name, scheme in schemes.items() if scheme != usual}
    return {**_scheme(*usual), **described}


def _scheme(group_size: int, bits: int) -> dict[str, int]:
    return {"group_size": group_size, "bits": bits}


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


def linear_schema(linear: LinearPlan, dtype: torch.dtype) -> dict[str, TensorSchema]:
    """The tensors of one quantized linear or embedding by full name."""
    rows, name = linear.out_features, linear.name
    return {
        f"{name}.weight": TensorSchema(torch.uint32, (rows, word_count(linear.in_features, linear.bits))),
        f"{name}.scales": TensorSchema(dtype, (rows, linear.groups)),
        f"{name}.biases": TensorSchema(dtype, (rows, linear.groups)),
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
        (linears if in_block else embeddings)[owner] = _derived_linear(path, files, owner, group_size, bits)
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


def _derived_linear(path: Path, files: TensorFiles, name: str, group_size: int, bits: int) -> LinearPlan:
    dtype = scale_dtype(path, files, name)  # the model's
    weight, scales = files.infos.get(f"{name}.weight"), files.infos[f"{name}.scales"]
    if weight is None:
        raise AccullmError(f"tensor {name}.weight is missing", path, "copy the artifact again")
    if len(weight.shape) != 2 or len(scales.shape) != 2:
        raise AccullmError(
            f"tensor {name}.weight has shape {list(weight.shape)}, and only linears [N, K] are supported", weight.file
        )
    columns = scales.shape[1] * group_size
    if weight.shape[1] != word_count(columns, bits):
        raise AccullmError(
            f"tensor {name}.weight has {weight.shape[1]} words for {scales.shape[1]} groups, and {bits} bits in groups "
            f"of {group_size} take {word_count(columns, bits)}",
            weight.file,
            "copy the artifact again",
        )
    return LinearPlan(
        name=name,
        out_features=weight.shape[0],
        in_features=columns,
        bits=bits,
        group_size=group_size,
        symmetric=False,
        source_itemsize=dtype.itemsize,
        encoding="affine",
    )
