"""What each artifact format can hold, as data: the one declaration that all else is derived from.

Derived are the objections to a plan (`formats.objections`), what the planner may choose (`stages.profile`), how an
artifact is loaded, and the table in docs/formats.md. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
    on_request: a plan does not choose it of itself.
    """

    encoding: str
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...] = ()
    whole_groups: bool = True
    scale_bits: tuple[int, ...] = (16,)
    symmetric: tuple[bool, ...] = (False, True)
    in_multiple: int = 1
    out_multiple: int = 1
    on_request: bool = False

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

    def holds(self, row: LinearPlan) -> bool:
        """Whether a row is one of these."""
        return (
            (row.encoding, row.bits) in {(self.encoding, bits) for bits in self.bits}
            and self.holds_group_size(row.group_size, row.in_features)
            and self.holds_scales(row)
        )


@dataclass(frozen=True)
class Reader:
    """A program that reads a format, and how much of it; `formats.readers` says so of an artifact.

    name: and where it runs, with the version that was looked at.
    linears, experts, embeddings: what it takes of each. head: of an output head with a matrix of its own.
    tied: whether a quantized embedding may be the output head, too.
    alike: what it takes only where all that is quantized, but for experts, is stored in one way.
    multiple: of which the sizes of linears must be.
    is_transformers: what an artifact is held against after it was written.
    """

    name: str
    linears: tuple[Storable, ...]
    experts: tuple[Storable, ...] = ()
    embeddings: tuple[Storable, ...] = ()
    head: tuple[Storable, ...] = ()
    tied: bool = False
    alike: tuple[Literal["zero points", "embeddings"], ...] = ()
    multiple: int = 1
    is_transformers: bool = False


@dataclass(frozen=True)
class AdapterKind:
    """Files beside an artifact that hold outlier features as a low-rank adapter, and what the runtimes take of them.

    ranks: of its matrices, ascending: a runtime makes room for the first of these that is enough for every linear, and
        all linears take the time of that one. Up to it a linear may have any rank.
    one_rank: all linears that have one must have the same.
    package: what transformers needs to load it; "" where that does not.
    loading: lines of Python that load artifact and adapter; {folder} is the adapter's, {rank} the one of `ranks`.
    """

    ranks: tuple[int, ...]
    one_rank: bool = False
    package: str = ""
    loading: tuple[str, ...] = ()

    def room(self, rank: int) -> int:
        """The first of `ranks` that is enough."""
        return next(size for size in self.ranks if size >= rank)


@dataclass(frozen=True)
class Capabilities:
    """What a format can hold.

    linears: how it stores linears; the first is what a plan begins with. experts: the same of experts in a stacked
        parameter, where these are stored otherwise. embeddings: of token embedding and output head; empty where both
        are kept as they are.
    counts_embeddings: who uses it counts the whole file, so that an average of bits goes over embedding and head, too.
    kinds: of linears that it stores, see `ModelShape.kinds`.
    outliers: "in the file", "as an adapter" beside it, or "not at all".
    adapter: which one of ADAPTERS, where it is an adapter.
    scale_dtype: what its scales of 16 bits are: "float16", or "of the model".
    fused: the linears of one module that a runtime multiplies by at once, by the last part of their names: they need
        one scheme. fused_experts: the same of experts: of all in the model or a layer, of those in one parameter, or of
        none.
    runtime: who fuses, for people.
    names: what tensors are called: as in the module tree, or as in checkpoints, where experts are one by one.
    readers: who reads it, and how much of it.
    all_alike: all linears that are quantized have one scheme, since there is room for one alone.
    config_key: what only its artifacts have in config.json; where it is empty, the quant_method of quantization_config
        is `quant_method`, by default the format's name, and its checkpoint_format is that, where there is one.
    other_kinds: its runtimes also read kinds of linears that it does not store, as they are in the source.
    module: what teaches transformers the format when it is imported. package: what transformers needs for it. With
        neither, transformers does not read it.
    loader: a package with which transformers reads it, and that accullm does not use: it compiles kernels when it is
        first used, which takes minutes.
    unpacks: its weights may be unpacked while they are loaded.
    kernels: accullm's own kernels multiply by its linears.
    suffix: of the one file that artifacts of others are; "" where they are directories.
    keeps_others: its artifacts hold what the model has no place for, as the source does (see model.accounting).
    names_models: the module whose `model_objections` say why a model cannot be stored whatever its plan; "" where the
        format holds any.
    """

    linears: tuple[Storable, ...]
    kinds: tuple[str, ...]
    outliers: Literal["in the file", "as an adapter", "not at all"]
    experts: tuple[Storable, ...] = ()
    adapter: Literal["", "peft", "mlx_lm"] = ""
    embeddings: tuple[Storable, ...] = ()
    counts_embeddings: bool = False
    scale_dtype: Literal["float16", "of the model"] = "float16"
    fused: tuple[tuple[str, ...], ...] = ()
    fused_experts: Literal["of the model", "of a layer", "of a parameter", "none"] = "none"
    runtime: str = ""
    names: Literal["of the module tree", "of the checkpoint"] = "of the module tree"
    readers: tuple[Reader, ...] = ()
    all_alike: bool = False
    config_key: str = ""
    quant_method: str = ""
    checkpoint_format: str = ""
    other_kinds: bool = True
    module: str = ""
    package: str = ""
    loader: str = ""
    unpacks: bool = False
    kernels: bool = False
    suffix: str = ""
    keeps_others: bool = True
    names_models: str = ""

    def wrote(self, name: str, config: Mapping[str, Any]) -> bool:
        """Whether a config.json is that of an artifact of this format, whose name is given."""
        if self.config_key:
            return isinstance(config.get(self.config_key), dict)
        described = quantization_of(config)
        if described.get("quant_method") != (self.quant_method or name):
            return False
        found = described.get("checkpoint_format", described.get("format"))
        return self.checkpoint_format in ("", found)

    @property
    def bits(self) -> tuple[int, ...]:
        """All widths of its linears, ascending."""
        return tuple(sorted({bits for storable in self.linears for bits in storable.bits}))

    @property
    def prefers_one_way(self) -> bool:
        """Whether some reader takes zero points only where everything is stored in one way."""
        return any("zero points" in reader.alike for reader in self.readers)

    def of_encodings(self, names: Sequence[str]) -> Capabilities:
        """The same, of some encodings alone; with no names, without those on request."""

        return self.without(lambda way: way.encoding not in names if names else way.on_request)

    def without(self, unwanted: Callable[[Storable], bool]) -> Capabilities:
        """The same without some ways to store linears, experts and embeddings; of each where that leaves any."""

        def wanted(ways: tuple[Storable, ...]) -> tuple[Storable, ...]:
            return tuple(way for way in ways if not unwanted(way)) or ways

        return replace(
            self, linears=wanted(self.linears), experts=wanted(self.experts), embeddings=wanted(self.embeddings)
        )

    def storables(self, kind: str) -> tuple[Storable, ...]:
        """How it stores linears of a kind, see `ModelShape.kinds`, or with "embedding" those."""
        if kind == "embedding":
            return self.embeddings
        return (self.experts if kind == "expert" else ()) or self.linears

    def storable(self, row: LinearPlan, kind: str) -> Storable | None:
        """What is said of the encoding that a row has, with its width if possible; None where it has not that one.

        Args:
            kind: of a linear, or "embedding".
        """
        own = [entry for entry in self.storables(kind) if entry.encoding == row.encoding]
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
                owner = {"of the model": "", "of a layer": parameter.rpartition(".")[0], "of a parameter": parameter}
                if self.fused_experts in owner:
                    found.setdefault((owner[self.fused_experts],), []).append(name)
                continue
            for names in self.fused:
                if last in names:
                    found.setdefault((parameter, *names), []).append(name)
        return tuple(tuple(names) for names in found.values() if len(names) > 1)


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The quantization_config of a config.json; empty where there is none.

    AutoRound by itself stores integers as GPTQ or AWQ lays them out, under a quant_method of its own. Here it has that
    of the layout.
    """
    found = config.get("quantization_config")
    found = found if isinstance(found, dict) else {}
    if found.get("quant_method") not in ("auto-round", "intel/auto-round"):
        return found
    packing = str(found.get("packing_format", found.get("backend", "")))
    if found.get("data_type", "int") != "int" or found.get("act_bits", 16) != 16 or "auto_round" not in packing:
        return found
    if "awq" in packing:
        return {**found, "quant_method": "awq", "version": "gemm"}
    less_one = "gptq" in packing and "gptqmodel" not in packing  # what of zero points is stored
    return {**found, "quant_method": "gptq", "checkpoint_format": "gptq" if less_one else "gptq_v2"}


_ALL_WIDTHS = (2, 3, 4, 5, 6, 7, 8)
_WORDS = Storable("integer", bits=_ALL_WIDTHS)
_SYMMETRIC_WORDS = Storable("integer", bits=_ALL_WIDTHS, symmetric=(True,))
# vLLM has room for ranks of these sizes (vllm/config/lora.py, 0.32), and the last one is the largest; peft takes any.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
ADAPTERS: Mapping[str, AdapterKind] = {
    "peft": AdapterKind(
        ranks=_RANKS,
        package="peft",
        loading=(
            "from peft import PeftModel",
            "",
            'model(model.dummy_inputs["input_ids"])  # some readers unpack weights only now, and peft looks for them',
            'model = PeftModel.from_pretrained(model, "path/of/this/directory/{folder}")',
            "",
            "# vLLM; ask for the model `exact`:",
            "# vllm serve DIRECTORY --enable-lora --max-lora-rank {rank} --lora-modules exact=DIRECTORY/{folder}",
        ),
    ),
    "mlx_lm": AdapterKind(
        ranks=_RANKS,
        one_rank=True,
        loading=(
            "import mlx_lm",
            "",
            'directory = "path/of/this/directory"',
            'model, tokenizer = mlx_lm.load(directory, adapter_path=directory + "/{folder}")',
        ),
    ),
}


def _blocks(name: str, bits: int, group_size: int, symmetric: bool) -> Storable:
    """One of ggml's types."""
    # A plan gains little by these, and on CPUs llama.cpp takes longest to multiply by them (docs/gguf.md).
    return Storable(name, (bits,), (group_size,), symmetric=(symmetric,), on_request=name in ("Q4_1", "Q5_1"))


# Of each width the first that a linear can have is what it gets where widths are not chosen one by one.
_GGML = (
    _blocks("Q3_K", 3, 16, symmetric=True),
    _blocks("Q4_K", 4, 32, symmetric=False),
    _blocks("IQ4_NL", 4, 32, symmetric=True),
    _blocks("IQ4_XS", 4, 32, symmetric=True),
    _blocks("Q4_0", 4, 32, symmetric=True),
    _blocks("Q4_1", 4, 32, symmetric=False),
    _blocks("Q5_K", 5, 32, symmetric=False),
    _blocks("Q5_1", 5, 32, symmetric=False),
    _blocks("Q5_0", 5, 32, symmetric=True),
    _blocks("Q6_K", 6, 16, symmetric=True),
    _blocks("Q8_0", 8, 32, symmetric=True),
)

_GPTQ = Capabilities(
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
)

_TRELLIS = Storable("trellis", bits=(2, 3, 4, 5), whole_groups=False, scale_bits=(4, 5, 6, 7, 8, 16), symmetric=(True,))

CAPABILITIES: Mapping[str, Capabilities] = {
    "accullm": Capabilities(
        linears=(
            _TRELLIS,
            replace(_TRELLIS, encoding="levels", on_request=True),
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
        linears=(_WORDS,),
        # transformers knows no zero points of experts, and takes all experts of a model for one scheme.
        experts=(_SYMMETRIC_WORDS,),
        embeddings=(_SYMMETRIC_WORDS,),
        kinds=("linear", "expert"),
        outliers="as an adapter",
        adapter="peft",
        scale_dtype="of the model",
        fused=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
        fused_experts="of the model",
        runtime="vLLM",
        names="of the checkpoint",
        readers=(
            Reader(
                "transformers 5.24 with compressed-tensors 0.20",
                linears=(_WORDS,),
                experts=(_SYMMETRIC_WORDS,),
                embeddings=(_SYMMETRIC_WORDS,),
                head=(_SYMMETRIC_WORDS,),
                tied=True,
                alike=("zero points", "embeddings"),
                is_transformers=True,
            ),
            Reader(
                "vLLM 0.32 on GPUs of compute capability 7.5 or more",
                linears=(_WORDS,),
                experts=(_WORDS,),
                # Its kernel for embeddings fills words with whole codes, so that other widths lie elsewhere.
                embeddings=(replace(_SYMMETRIC_WORDS, bits=(2, 4, 8)),),
                head=(_WORDS,),
            ),
            Reader(
                "vLLM 0.32 on CPUs",
                linears=(replace(_WORDS, bits=(4,)),),
                experts=(replace(_WORDS, bits=(4,), group_sizes=(32, 64, 128)),),
                head=(replace(_WORDS, bits=(4,)),),
                multiple=32,
            ),
        ),
        package="compressed-tensors",
        unpacks=True,
    ),
    "mlx": Capabilities(
        linears=(Storable("affine", bits=(2, 3, 4, 5, 6, 8), group_sizes=(32, 64, 128), symmetric=(False,)),),
        embeddings=(Storable("affine", bits=(2, 3, 4, 5, 6, 8), group_sizes=(32, 64, 128), symmetric=(False,)),),
        kinds=("linear", "expert"),
        outliers="as an adapter",
        adapter="mlx_lm",
        scale_dtype="of the model",
        fused_experts="of a parameter",
        runtime="mlx_lm",
        names="of the checkpoint",
        config_key="quantization",
        other_kinds=False,
    ),
    "gguf": Capabilities(
        linears=_GGML,
        embeddings=_GGML,
        counts_embeddings=True,
        kinds=("linear", "expert"),
        outliers="not at all",
        fused_experts="of a parameter",
        runtime="llama.cpp",
        suffix=".gguf",
        keeps_others=False,
        names_models="accullm_cli.formats.gguf",
    ),
    # Before the first version, which takes all other artifacts of GPTQ for its own.
    "gptq_v2": replace(
        _GPTQ,
        linears=(replace(_GPTQ.linears[0], encoding="integer"),),
        quant_method="gptq",
        checkpoint_format="gptq_v2",
    ),
    "gptq": _GPTQ,
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
