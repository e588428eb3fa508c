"""Why a format cannot hold a plan, and what to do instead: derived from its capabilities, without any tensor."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from accullm_cli.formats.base import ModelShape, Objection
from accullm_cli.formats.capabilities import CAPABILITIES, WHOLE_ROWS, Capabilities, Storable
from accullm_cli.formats.shards import dtype_name
from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.plan import KEPT_BITS, LinearPlan, Plan

# Of the model, in which scales of 16 bits, as plans have them, are exact (or rounded to be, for bfloat16).
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KIND_WORDS = {"conv1d": "a Conv1D layer", "expert": "an expert in a stacked parameter", "linear": "a torch.nn.Linear"}


def objections(name: str, plan: Plan, shape: ModelShape) -> list[Objection]:
    """Everything that makes a plan impossible in a format; empty where it fits.

    Args:
        name: of the format.
    """
    format = CAPABILITIES[name]
    linears = [linear for linear in plan.linears.values() if linear.bits != KEPT_BITS]
    embeddings = list(plan.embeddings.values())
    return [
        *(importlib.import_module(format.names_models).model_objections(shape) if format.names_models else ()),
        *_embedding_objections(name, format, embeddings),
        *_kind_objections(name, format, linears if format.other_kinds else list(plan.linears.values()), shape),
        *_row_objections(name, linears, shape.kinds),
        *(_row_objections(name, embeddings, dict.fromkeys(plan.embeddings, "embedding")) if format.embeddings else ()),
        *_name_objections(name, format, linears, shape),
        *(() if format.other_kinds else _kept_expert_objections(name, plan, shape)),
        *_outlier_objections(name, format, linears),
        *_scale_objections(name, format, plan, shape),
        *_fused_objections(name, format, plan, shape),
        *(_unlike_objections(name, linears) if format.all_alike else ()),
    ]


def _embedding_objections(name: str, format: Capabilities, embeddings: list[LinearPlan]) -> Iterator[Objection]:
    for embedding in embeddings if not format.embeddings else ():
        yield Objection(
            f"{name} keeps embedding and output head as they are, and {embedding.name} is to have "
            f"{embedding.bits} bits",
            f"leave out --embedding-bits{_or_another(name, lambda other: bool(other.embeddings))}",
        )


def _kind_objections(
    name: str, format: Capabilities, linears: list[LinearPlan], shape: ModelShape
) -> Iterator[Objection]:
    kinds = dict.fromkeys(kind for linear in linears if (kind := shape.kinds[linear.name]) not in format.kinds)
    for kind in kinds:
        found = [linear for linear in linears if shape.kinds[linear.name] == kind]
        only = {"linear": "torch.nn.Linear", "conv1d": "Conv1D", "expert": "stacked experts"}
        another = _or_another(name, lambda other, kind=kind: kind in other.kinds)  # type: ignore[misc]
        yield Objection(
            f"{name} holds {_words([only[own] for own in format.kinds], 'and')} only, and {found[0].name} is "
            f"{KIND_WORDS.get(kind, f'of kind {kind}')}{_more(found)}",
            another.removeprefix(", or ") or "convert another model",
        )


def _row_objections(name: str, rows: list[LinearPlan], kinds: Mapping[str, str]) -> Iterator[Objection]:
    """To the encoding of linears, or of embeddings, and to what it is to have.

    Args:
        kinds: of linears, or "embedding".
    """
    format = CAPABILITIES[name]
    storable: dict[str, Storable] = {}
    for row in rows:
        own = format.storable(row, kinds[row.name])
        if own is None:
            yield Objection(
                f"{name} does not store the encoding {row.encoding}, which {row.name} is to have",
                "run profile again for this format",
            )
            return
        storable[row.name] = own
    found = [row for row in rows if row.bits not in storable[row.name].bits]
    if found:
        yield _width_objection(name, found, kinds, storable[found[0].name])
    others = [row for row in rows if row not in found and storable[row.name].holds_scales(row)]
    reasons = [(row, reason) for row in others if (reason := ENCODINGS[row.encoding].problem(row))]
    for row, reason in reasons[:1]:
        yield Objection(
            f"{row.name} {reason}{_more(reasons)}", _encoding_hint(name, [row for row, _ in reasons], rows, kinds)
        )
    if reasons:
        return
    found = [row for row in rows if not storable[row.name].holds_shape(row.out_features, row.in_features)]
    if found:
        yield _shape_objection(name, found, rows, storable[found[0].name])
    found = [row for row in rows if not storable[row.name].holds_group_size(row.group_size, row.in_features)]
    if found:
        yield _group_objection(name, found, rows, storable[found[0].name])
    found = [row for row in rows if row.scale_bits not in storable[row.name].scale_bits]
    if found:
        first, bits = found[0], storable[found[0].name].scale_bits
        another = _or_another(name, lambda other: any(first.scale_bits in entry.scale_bits for entry in other.linears))
        yield Objection(
            f"{name} stores scales of {_widths(bits)} bits, and those of {first.name} have {first.scale_bits}"
            f"{_more(found)}",
            f"leave out --scale-bits{another}",
        )
    found = [row for row in rows if row.symmetric not in storable[row.name].symmetric]
    if found:
        only, flag = ("asymmetric", "--no-symmetric") if found[0].symmetric else ("symmetric", "--symmetric")
        of = {"embedding": " of embedding and head", "expert": " of experts"}.get(kinds[found[0].name], "")
        yield Objection(
            f"{name} holds {only} grids{of} only, and that of {found[0].name} is not{_more(found)}", f"use {flag}"
        )


def _width_objection(name: str, found: list[LinearPlan], kinds: Mapping[str, str], storable: Storable) -> Objection:
    """To a width that the encoding of a linear has not, or no encoding of the format."""
    first, format = found[0], CAPABILITIES[name]
    flag = "--embedding-bits" if kinds[first.name] == "embedding" else "--bits"
    held = sorted({bits for way in format.storables(kinds[first.name]) for bits in way.bits})
    if first.bits in held:
        what, hint = f"{storable.encoding} of {name} has {_widths(storable.bits)} bits", "leave out --encodings"
    else:
        widths = _usable_widths(format, found, kinds)
        what, hint = f"{name} holds {_widths(held)} bits", f"use {_flags(flag, widths)}" if widths else ""
    another = _or_another(name, lambda other: first.bits in other.bits)
    return Objection(f"{what}, and {first.name} has {first.bits}{_more(found)}", (hint + another).removeprefix(", or "))


def _encoding_hint(name: str, found: list[LinearPlan], rows: list[LinearPlan], kinds: Mapping[str, str]) -> str:
    """What to do where the encoding of some linears says that it cannot hold them."""
    first, format = found[0], CAPABILITIES[name]
    ways = [way for way in format.storables(kinds[first.name]) if first.bits in way.bits]
    if not any(way.group_sizes for way in ways):
        return "use another --group-size"
    fitting = [way for way in ways if all(_fits(way, row, row.bits) for row in found)]
    another = _or_another(name, lambda other: first.bits in other.bits)
    if fitting and not any(first.group_size in way.group_sizes for way in fitting):
        return f"leave out --group-size{another}"
    if fitting:
        # The others of its width keep the encoding that these cannot have.
        names = [*([first.encoding] if len(found) < len(rows) else []), *(way.encoding for way in fitting)]
        return f"use {' '.join(f'--encodings {encoding}' for encoding in names)}{another}"
    widths = _usable_widths(format, found, kinds)
    flag = "--embedding-bits" if kinds[first.name] == "embedding" else "--bits"
    use = f"use {_flags(flag, widths)}" if widths else ""
    keep = _keeping(format, found, rows) if flag == "--bits" else ""
    return ", or ".join(filter(None, (use, keep, another.removeprefix(", or "))))


def _keeping(format: Capabilities, found: list[LinearPlan], rows: list[LinearPlan]) -> str:
    """How to keep some linears in 16 bits, and the others that must be like them; "" where that leaves none."""
    lasts = {row.name.rpartition(".")[2] for row in found}
    lasts |= {last for names in format.fused if lasts & {*names} for last in names}
    kept = dict.fromkeys(last for row in rows if (last := row.name.rpartition(".")[2]) in lasts)
    if len(kept) == len({row.name.rpartition(".")[2] for row in rows}):
        return ""
    patterns = " ".join(f"--keep '*.{last}'" for last in kept)
    return f"keep {'them' if len(found) > 1 else 'it'} in 16 bits ({patterns})"


def _usable_widths(format: Capabilities, rows: list[LinearPlan], kinds: Mapping[str, str]) -> list[int]:
    """The widths that a format holds each of some linears in, in one encoding or another."""
    ways = [format.storables(kinds[row.name]) for row in rows]
    held = sorted({bits for way in ways[0] for bits in way.bits})
    return [
        bits
        for bits in held
        if all(any(_fits(way, row, bits) for way in own) for row, own in zip(rows, ways, strict=True))
    ]


def _fits(way: Storable, row: LinearPlan, bits: int) -> bool:
    """Whether a linear of this many features can have so many bits in an encoding, its groups apart."""
    sizes = way.group_sizes or (row.group_size,)
    own = replace(row, encoding=way.encoding, bits=bits, group_size=sizes[0], symmetric=way.symmetric[0])
    return bits in way.bits and not ENCODINGS[way.encoding].problem(own)


def _shape_objection(name: str, found: list[LinearPlan], rows: list[LinearPlan], storable: Storable) -> Objection:
    first = found[0]
    another = _or_another(
        name, lambda other: any(entry.holds_shape(first.out_features, first.in_features) for entry in other.linears)
    )
    return Objection(
        f"{name} holds linears whose input features are a multiple of {storable.in_multiple} and whose output features "
        f"one of {storable.out_multiple}, and {first.name} has {first.in_features} and {first.out_features}"
        f"{_more(found)}",
        (_keeping(CAPABILITIES[name], found, rows) + another).removeprefix(", or "),
    )


def _group_objection(name: str, found: list[LinearPlan], rows: list[LinearPlan], storable: Storable) -> Objection:
    first, wanted = found[0], found[0].group_size
    divisor = math.gcd(*(row.in_features for row in rows))
    if storable.group_sizes and wanted not in storable.group_sizes:
        listed = _words(list(map(str, storable.group_sizes)), "or")
        what = f"{name} holds groups of {listed} input features, and {first.name} has {wanted}"
    else:
        what = (
            f"{name} needs a group size that divides the {first.in_features} input features of {first.name}, and "
            f"{wanted} does not"
        )
    sizes = [*(storable.group_sizes or nearest_group_sizes(wanted, divisor)), WHOLE_ROWS]
    usable = [str(size) for size in dict.fromkeys(sizes) if storable.holds_group_size(size, divisor)]
    another = _or_another(
        name, lambda other: all(entry.holds_group_size(wanted, first.in_features) for entry in other.linears)
    )
    hint = f"use --group-size {_words(usable, 'or')}{another}" if usable else another.removeprefix(", or ")
    return Objection(what + _more(found), hint)


def _name_objections(
    name: str, format: Capabilities, linears: list[LinearPlan], shape: ModelShape
) -> Iterator[Objection]:
    """Where experts are stored one by one, each needs names that checkpoints of its model have."""
    if format.names == "of the module tree":
        return
    found = [row for row in linears if shape.kinds[row.name] == "expert" and row.name not in shape.stored_as]
    if found:
        parameter = found[0].name.rpartition(".")[0]
        another = _or_another(name, lambda other: "expert" in other.kinds and other.names == "of the module tree")
        keep = f"keep them (--keep '*.{parameter.rpartition('.')[2]}.*'){another}"
        yield Objection(
            f"{name} stores experts one by one, and transformers has no names of that kind for {parameter} of a "
            f"{shape.model_type} model",
            keep if format.other_kinds else another.removeprefix(", or "),
        )


def _kept_expert_objections(name: str, plan: Plan, shape: ModelShape) -> Iterator[Objection]:
    """Where only codes are stored of experts."""
    kept = [row for row in plan.linears.values() if row.bits == KEPT_BITS and shape.kinds[row.name] == "expert"]
    if kept and "expert" in CAPABILITIES[name].kinds:
        yield Objection(
            f"{name} stores experts as codes only, and {kept[0].name} is to stay in 16 bits{_more(kept)}",
            f"keep none of them{_or_another(name, lambda other: 'expert' in other.kinds and other.other_kinds)}",
        )


def _outlier_objections(name: str, format: Capabilities, linears: list[LinearPlan]) -> Iterator[Objection]:
    found = [linear for linear in linears if linear.outlier_index]
    another = _or_another(name, lambda other: other.outliers == "in the file")
    if found and format.outliers == "not at all":
        yield Objection(
            f"{name} holds no outlier features, and {found[0].name} has {len(found[0].outlier_index)}{_more(found)}",
            f"use --outliers 0{another}",
        )
        return
    found = [linear for linear in found if linear.adapter != format.adapter]
    if found:
        held, asked = "in an adapter", "in its own files"
        if not format.adapter:
            held, asked = asked, held
        yield Objection(
            f"{name} holds outlier features {held}, and those of {found[0].name} are to be {asked}{_more(found)}",
            (
                f"add --outlier-adapter, or use --outliers 0{another}"
                if format.adapter
                else "leave out --outlier-adapter"
            ),
        )


def _scale_objections(name: str, format: Capabilities, plan: Plan, shape: ModelShape) -> Iterator[Objection]:
    if format.scale_dtype == "float16":
        return
    if shape.dtype not in SCALE_DTYPES:
        another = _or_another(name, lambda other: other.scale_dtype == "float16")
        yield Objection(
            f"{name} stores scales in the model's dtype, and {dtype_name(shape.dtype)} holds none",
            f"convert the model to bfloat16 first{another}",
        )
    elif shape.dtype == torch.bfloat16 and plan.scale_dtype != "bfloat16":
        yield Objection(
            f"{name} stores scales in the model's dtype bfloat16, and the plan has {plan.scale_dtype} ones",
            f"ask for the format before profile runs, which then plans scales that both hold: --format {name}",
        )


def _fused_objections(name: str, format: Capabilities, plan: Plan, shape: ModelShape) -> Iterator[Objection]:
    """A runtime stacks partners, and refuses to load some of them quantized and some not, or in two schemes."""
    for names in format.partners({linear: shape.kinds.get(linear, "") for linear in plan.linears}):
        rows = [plan.linears[partner] for partner in names]
        schemes = {(row.bits, row.group_size, row.symmetric, row.encoding) for row in rows}
        if len({scheme if scheme[0] != KEPT_BITS else (KEPT_BITS,) for scheme in schemes}) == 1:
            continue
        experts = shape.kinds.get(names[0]) == "expert"
        lasts = [partner.rpartition(".")[2] for partner in names]
        alike = f"{format.runtime}, which reads {name}, multiplies by {', '.join(lasts)} at once"
        if experts:
            alike = f"readers of {name} take all experts {format.fused_experts} to be stored alike"
        another = _or_another(name, lambda other: not other.fused)
        kept = next((row.name for row in rows if row.bits == KEPT_BITS), None)
        if kept is None:
            yield Objection(
                f"{alike}, and {rows[0].name} and its partners are stored in several ways",
                f"give them one number of bits and one group size{another}",
            )
            return
        patterns = "--keep '*.experts.*'" if experts else " ".join(f"--keep '*.{other}'" for other in lasts)
        yield Objection(
            f"{alike}, and of these {kept} stays in 16 bits and another does not",
            f"keep all of them ({patterns}) or none{another}",
        )
        return


def _unlike_objections(name: str, linears: list[LinearPlan]) -> Iterator[Objection]:
    """To linears in several schemes, where there is room for one."""
    found = [row for row in linears if (row.bits, row.group_size) != (linears[0].bits, linears[0].group_size)]
    if found:
        first, other = linears[0], found[0]
        another = _or_another(name, lambda format: not format.all_alike)
        yield Objection(
            f"{name} has one scheme for all linears, and {first.name} has {first.bits} bits in groups of "
            f"{first.group_size}, {other.name} {other.bits} in groups of {other.group_size}",
            f"give a width for --bits, and --group-size{another}",
        )


# -- words -------------------------------------------------------------------------------------------------


def _or_another(name: str, holds: Callable[[Capabilities], bool]) -> str:
    """The first other format that has no such limit, as the end of a hint; "" where there is none."""
    others = (other for other, capabilities in CAPABILITIES.items() if other != name and holds(capabilities))
    return next((f", or export to the format {other}" for other in others), "")


def _widths(bits: Sequence[int]) -> str:
    """ "4 or 8", "2 to 8"."""
    if len(bits) > 2 and list(bits) == list(range(bits[0], bits[-1] + 1)):
        return f"{bits[0]} to {bits[-1]}"
    return _words(list(map(str, bits)), "or")


def _flags(flag: str, bits: Sequence[int]) -> str:
    """ "--bits 4 or --bits 8", "--bits 2 to 8"."""
    return f"{flag} {bits[0]} or {flag} {bits[1]}" if len(bits) == 2 else f"{flag} {_widths(bits)}"


def _words(parts: list[str], last: str) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {last} {parts[-1]}"


def _more(found: Sequence[object]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


def nearest_group_sizes(wanted: int, common_divisor: int) -> list[int]:
    """Up to three group sizes nearest to `wanted` that divide all linears' inputs, ascending.

    Multiples of 32 where there are any: readers' kernels ask for them.
    """
    divisors = [size for size in range(1, common_divisor + 1) if common_divisor % size == 0]
    usable = [size for size in divisors if size % 32 == 0] or divisors
    return sorted(sorted(usable, key=lambda size: (abs(size - wanted), size))[:3])
