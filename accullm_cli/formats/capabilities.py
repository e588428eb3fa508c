"""What each artifact format can hold, as data: the one declaration that all else is derived from.

Derived are the objections to a plan (`formats.objections`), what the planner may choose (`stages.profile`), how an
artifact is loaded, and the table in docs/formats.md. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from accullm_cli.quant.plan import LinearPlan

# The group size of one scale per output row.
WHOLE_ROWS = -1


@dataclass(frozen=True)
class Storable:
    """The rows of a plan that a format stores in one encoding.

    encoding: its name in `quant.encodings`.
    bits: of a weight.
    group_sizes: input features that share a scale, -1 for one scale per output row; empty for any.
    whole_groups: group sizes must divide a linear's input features.
    scale_bits: of a scale: 16, or of its place in a table.
    symmetric: whether zero points may be left out, or must be.
    in_multiple, out_multiple: what a linear's features must be multiples of.
    """

    encoding: str
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...] = ()
    whole_groups: bool = True
    scale_bits: tuple[int, ...] = (16,)
    symmetric: tuple[bool, ...] = (False, True)
    in_multiple: int = 1
    out_multiple: int = 1

    def holds_group_size(self, size: int, in_features: int) -> bool:
        """Whether groups of that size may be formed of so many input features."""
        if self.group_sizes and size not in self.group_sizes:
            return False
        return size == WHOLE_ROWS or not self.whole_groups or in_features % size == 0

    def holds_shape(self, out_features: int, in_features: int) -> bool:
        """Whether a linear has as many features as its runtimes ask for."""
        return in_features % self.in_multiple == 0 and out_features % self.out_multiple == 0

    def holds_scales(self, row: LinearPlan) -> bool:
        return row.scale_bits in self.scale_bits and row.symmetric in self.symmetric


@dataclass(frozen=True)
class Capabilities:
    """What a format can hold.

    linears: how it stores linears; the first is what a plan begins with. embeddings: the same of token embedding and
        output head; empty where both are kept as they are.
    kinds: of linears that it stores, see `ModelShape.kinds`.
    outliers: "in the file", "as an adapter" beside it, or "not at all".
    scale_dtype: what its scales of 16 bits are: "float16", or "of the model".
    fused: the linears of one module that a runtime multiplies by at once, by the last part of their names: they need
        one scheme. fused_experts: the same of the experts of a layer: of all, of those in one parameter, or of none.
    runtime: who fuses, for people.
    all_alike: all linears that are quantized have one scheme, since there is room for one alone.
    config_key: what only its artifacts have in config.json; where it is empty, the quant_method of quantization_config
        is the format's name.
    other_kinds: its runtimes also read kinds of linears that it does not store, as they are in the source.
    module: what teaches transformers the format when it is imported. package: what transformers needs for it. With
        neither, transformers does not read it.
    loader: a package with which transformers reads it, and that accullm does not use: it compiles kernels when it is
        first used, which takes minutes.
    unpacks: its weights may be unpacked while they are loaded.
    kernels: accullm's own kernels multiply by its linears.
    """

    linears: tuple[Storable, ...]
    kinds: tuple[str, ...]
    outliers: Literal["in the file", "as an adapter", "not at all"]
    embeddings: tuple[Storable, ...] = ()
    scale_dtype: Literal["float16", "of the model"] = "float16"
    fused: tuple[tuple[str, ...], ...] = ()
    fused_experts: Literal["of a layer", "of a parameter", "none"] = "none"
    runtime: str = ""
    all_alike: bool = False
    config_key: str = ""
    other_kinds: bool = True
    module: str = ""
    package: str = ""
    loader: str = ""
    unpacks: bool = False
    kernels: bool = False

    def wrote(self, name: str, config: Mapping[str, Any]) -> bool:
        """Whether a config.json is that of an artifact of this format, whose name is given."""
        if self.config_key:
            return isinstance(config.get(self.config_key), dict)
        described = config.get("quantization_config")
        return isinstance(described, dict) and described.get("quant_method") == name

    @property
    def bits(self) -> tuple[int, ...]:
        """All widths of its linears, ascending."""
        return tuple(sorted({bits for storable in self.linears for bits in storable.bits}))

    def storable(self, row: LinearPlan, of_embedding: bool = False) -> Storable | None:
        """What is said of the encoding that a row has, with its width if possible; None where it has not that one."""
        own = [entry for entry in (self.embeddings if of_embedding else self.linears) if entry.encoding == row.encoding]
        return next((entry for entry in own if row.bits in entry.bits), own[0] if own else None)

    def partners(self, kinds: Mapping[str, str]) -> tuple[tuple[str, ...], ...]:
        """The linears that must be stored alike; a linear without partners is in none of these.

        Args:
            kinds: of all linears of a model by name, see `ModelShape`.
        """
        found: dict[tuple[str, ...], list[str]] = {}
        for name, kind in kinds.items():
            parameter, _, last = name.rpartition(".")
            if kind == "expert":
                # An expert's name is that of the parameter, and its number.
                owner = {"of a layer": parameter.rpartition(".")[0], "of a parameter": parameter}
                if self.fused_experts in owner:
                    found.setdefault((owner[self.fused_experts],), []).append(name)
                continue
            for names in self.fused:
                if last in names:
                    found.setdefault((parameter, *names), []).append(name)
        return tuple(tuple(names) for names in found.values() if len(names) > 1)


CAPABILITIES: Mapping[str, Capabilities] = {
    "accullm": Capabilities(
        linears=(
            Storable(
                "integer",
                bits=(2, 3, 4, 5, 6, 7, 8),
                whole_groups=False,
                scale_bits=(4, 5, 6, 7, 8, 16),
            ),
        ),
        embeddings=(Storable("integer", bits=(2, 3, 4, 5, 6, 7, 8), whole_groups=False),),
        kinds=("linear", "conv1d", "expert"),
        outliers="in the file",
        module="accullm_cli.hf",
        kernels=True,
    ),
    "compressed-tensors": Capabilities(
        linears=(Storable("integer", bits=(4, 8)),),
        kinds=("linear",),
        outliers="not at all",
        scale_dtype="of the model",
        fused=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
        fused_experts="of a layer",
        runtime="vLLM",
        package="compressed-tensors",
        unpacks=True,
    ),
    "mlx": Capabilities(
        linears=(Storable("affine", bits=(2, 3, 4, 5, 6, 8), group_sizes=(32, 64, 128), symmetric=(False,)),),
        embeddings=(Storable("affine", bits=(2, 3, 4, 5, 6, 8), group_sizes=(32, 64, 128), symmetric=(False,)),),
        kinds=("linear",),
        outliers="not at all",
        scale_dtype="of the model",
        config_key="quantization",
        other_kinds=False,
    ),
    "gptq": Capabilities(
        linears=(
            Storable(
                "integer from 1",
                bits=(2, 3, 4, 8),
                group_sizes=(32, 64, 128, WHOLE_ROWS),
                in_multiple=32,
                out_multiple=32,
            ),
        ),
        kinds=("linear",),
        outliers="not at all",
        fused=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
        runtime="vLLM",
        other_kinds=False,
        loader="gptqmodel",
    ),
    "awq": Capabilities(
        linears=(
            Storable(
                "integer", bits=(4,), group_sizes=(32, 64, 128), symmetric=(False,), in_multiple=32, out_multiple=8
            ),
        ),
        kinds=("linear",),
        outliers="not at all",
        fused=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
        runtime="vLLM",
        all_alike=True,
        other_kinds=False,
        loader="gptqmodel",
    ),
}
