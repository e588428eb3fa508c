"""How each linear of a model may be stored in a format: the rows that a plan is made of, or chooses from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

from accullm_cli.errors import AccullmError
from accullm_cli.formats.capabilities import CAPABILITIES, WHOLE_ROWS, Capabilities, Storable
from accullm_cli.formats.objections import nearest_group_sizes
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.embeddings import EmbeddingSlot, find_embeddings
from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.quant.encodings.base import MEASURED_BITS
from accullm_cli.quant.plan import KEPT_BITS, LinearPlan, Plan
from accullm_cli.stages.job import Job
from accullm_cli.stages.kept import kept_names

# What a linear may get where --bits is an average. On a grid of 2 bits rounding is no longer the small change that
# losses are measured for.
WIDTHS = {"widths": (3, 4, 5, 6, 8), "outliers": (4,)}
# Where nobody says otherwise.
USUAL_EMBEDDING_BITS = 8


def capabilities_of(job: Job) -> Capabilities:
    """What the format holds of the encodings that may be chosen from: as asked for, and as rounding and grids can be.

    Raises:
        AccullmError: it has not the one that was asked for.
    """
    format, options = CAPABILITIES[job.format], job.config.plan
    asked = options.encodings
    known = dict.fromkeys(way.encoding for way in format.linears)
    for name in asked:
        if name not in known:
            raise AccullmError(f"{job.format} has no encoding {name!r}", "--encodings", f"give {', '.join(known)}")
    format = format.of_encodings(asked)
    if job.config.rounding.method == "stochastic":
        format = format.without(lambda way: not ENCODINGS[way.encoding].rounds_at_random)
    if options.symmetric is not None:
        format = format.without(lambda way: options.symmetric not in way.symmetric)
    return format


def kept_linears(job: Job, decoder: Decoder) -> Mapping[str, tuple[str, ...]]:
    """For each pattern of `--keep` the linears that it leaves in 16 bits; embedding and output head are among them.

    Raises:
        AccullmError: a pattern matches nothing.
    """
    patterns = job.config.plan.keep
    if not patterns:
        return {}
    linears = [slot.name for slots in decoder.slots for slot in slots]
    return kept_names(patterns, [*linears, *_outer_names(decoder).values()])


def _outer_names(decoder: Decoder) -> dict[str, str]:
    """The names of the token embedding ("looked up") and of the output head ("head")."""
    name_of = {module: name for name, module in decoder.model.named_modules()}
    modules = {"looked up": decoder.model.get_input_embeddings(), "head": decoder.model.get_output_embeddings()}
    return {use: name_of[module] for use, module in modules.items() if module in name_of}


def _kept(job: Job, decoder: Decoder) -> set[str]:
    return set(chain.from_iterable(kept_linears(job, decoder).values()))


def embedding_rows(job: Job, decoder: Decoder) -> dict[str, LinearPlan]:
    """How embedding and output head are quantized; empty where they are kept.

    They are rounded in parts, and each would have a table of its own: their scales are float16.
    """
    asked, format = job.config.plan.embedding_bits, capabilities_of(job)
    bits = asked or (_usual_embedding_bits(format) if format.counts_embeddings else KEPT_BITS)
    if bits == KEPT_BITS or counted_embeddings(job, decoder):
        return {}
    # One that holds none objects to what was asked for, whatever it is.
    ways = format.embeddings or format.linears
    return {slot.name: embedding_row(job, decoder, slot, ways, bits) for slot in _rounded_embeddings(job, decoder)}


def _usual_embedding_bits(format: Capabilities) -> int:
    """Or what is nearest to it among the encodings that were asked for."""
    widths = {bits for way in format.embeddings for bits in way.bits}
    return min(widths, key=lambda bits: abs(bits - USUAL_EMBEDDING_BITS))


def _rounded_embeddings(job: Job, decoder: Decoder) -> list[EmbeddingSlot]:
    """Those that no --keep leaves as they are."""
    kept, outer = _kept(job, decoder), _outer_names(decoder)
    return [
        slot
        for slot in find_embeddings(decoder.model)
        if not ((slot.is_looked_up and outer["looked up"] in kept) or (slot.is_head and outer["head"] in kept))
    ]


def counted_embeddings(job: Job, decoder: Decoder) -> tuple[str, ...]:
    """The embeddings that are planned with the linears: where bits are an average over all that a format stores."""
    options = job.config.plan
    if not (options.is_average and options.embedding_bits is None and capabilities_of(job).counts_embeddings):
        return ()
    return tuple(slot.name for slot in _rounded_embeddings(job, decoder))


def embedding_row(job: Job, decoder: Decoder, slot: EmbeddingSlot, ways: Sequence[Storable], bits: int) -> LinearPlan:
    row = LinearPlan(
        name=slot.name,
        out_features=slot.out_features,
        in_features=slot.in_features,
        bits=bits,
        group_size=job.config.plan.uniform_group_size,
        symmetric=False,
        source_itemsize=decoder.weights.dtype(slot.parameter).itemsize,
    )
    return _stored_like(job, row, ways)


def _stored_like(job: Job, row: LinearPlan, ways: Sequence[Storable]) -> LinearPlan:
    """A row by the first way of its width that it can be stored in; where there is none, by one that is objected to."""
    found = [
        replace(
            row,
            encoding=way.encoding,
            group_size=_group_size(job, way, row.in_features),
            symmetric=_symmetric(job, way),
        )
        for way in [way for way in ways if row.bits in way.bits] or ways[:1]
    ]
    return next((own for own in found if not ENCODINGS[own.encoding].problem(own)), found[0])


def uniform_rows(job: Job, decoder: Decoder, bits: int = MEASURED_BITS) -> dict[str, LinearPlan]:
    """Every linear with the same bits, without outliers; or at KEPT_BITS."""
    kept, format, kinds = _kept(job, decoder), capabilities_of(job), kinds_of(decoder)
    linears = {
        slot.name: _stored_like(
            job,
            LinearPlan(
                name=slot.name,
                out_features=slot.out_features,
                in_features=slot.in_features,
                bits=bits,
                group_size=job.config.plan.uniform_group_size,
                symmetric=False,
                source_itemsize=decoder.weights.dtype(f"{block}.{slot.parameter}").itemsize,
                adapter=format.adapter if job.config.plan.outlier_adapter else "",
            ),
            format.storables(slot.kind),
        )
        for block, slots in zip(decoder.block_names, decoder.slots, strict=True)
        for slot in slots
    }
    shared = shared_features(linears, partners_of(job, decoder))
    storable = {name: format.storable(plan, kinds[name]) or format.linears[0] for name, plan in linears.items()}
    return _alike(
        job,
        {
            name: replace(
                plan,
                bits=KEPT_BITS if name in kept else bits,
                group_size=_group_size(job, storable[name], shared[name]),
                scale_bits=_scale_bits(job, storable[name]),
            )
            for name, plan in linears.items()
        },
        kinds,
    )


def _alike(job: Job, linears: dict[str, LinearPlan], kinds: Mapping[str, str]) -> dict[str, LinearPlan]:
    """The same, without zero points where a reader takes them only of linears that are all stored alike."""
    format = capabilities_of(job)
    dense = [plan for name, plan in linears.items() if plan.bits != KEPT_BITS and kinds[name] != "expert"]
    several = len({plan.group_size for plan in dense}) > 1
    if job.config.plan.symmetric is not None or not (several and format.prefers_one_way):
        return linears
    return {name: replace(plan, symmetric=True) for name, plan in linears.items()}


def zero_point_sentences(job: Job, plan: Plan) -> Iterator[str]:
    """What the report says where zero points are left out for a reader's sake, and nobody asked for that."""
    format, options = capabilities_of(job), job.config.plan
    readers = [reader.name for reader in format.readers if "zero points" in reader.alike]
    quantized = [row for row in plan.linears.values() if row.bits != KEPT_BITS]
    could = any(False in way.symmetric for way in format.linears)
    if options.symmetric is None and readers and could and all(row.symmetric for row in quantized):
        # Embeddings have none in any case.
        otherwise = "" if options.embedding_bits else "; --no-symmetric stores them"
        yield (
            f"no zero points are stored: {readers[0]} takes them only where all linears and embeddings are stored in "
            f"one way{otherwise}"
        )


def kinds_of(decoder: Decoder) -> dict[str, str]:
    return {slot.name: slot.kind for slots in decoder.slots for slot in slots}


def storable_rows(job: Job, plan: LinearPlan, features: int, kind: str) -> list[LinearPlan]:
    """All rows by which the format can store a linear, of the widths and group sizes that are to choose from.

    Args:
        features: that groups must divide, where they must divide any.
    """
    options, format = job.config.plan, capabilities_of(job)
    widths = [bits for bits in WIDTHS[options.spend] if bits in format.bits] or format.bits
    found = []
    for storable in format.storables(kind):
        sizes = [size for size in options.group_sizes if storable.holds_group_size(size, features)]
        if not sizes and options.group_size is None:
            sizes = [_group_size(job, storable, features)]
        row = replace(
            plan,
            encoding=storable.encoding,
            scale_bits=_scale_bits(job, storable),
            symmetric=_symmetric(job, storable),
        )
        found += [
            replace(row, bits=bits, group_size=size)
            for size in sizes
            for bits in widths
            if bits in storable.bits and storable.holds_group_size(size, features) and storable.holds_scales(row)
        ]
    return [row for row in found if not ENCODINGS[row.encoding].problem(row)]


def partners_of(job: Job, decoder: Decoder) -> tuple[tuple[str, ...], ...]:
    """The linears that the format's runtime needs alike, or the format itself."""
    format, kinds = capabilities_of(job), kinds_of(decoder)
    if format.all_alike:
        kept = _kept(job, decoder)
        return (tuple(name for name in kinds if name not in kept),)
    return format.partners(kinds)


def shared_features(linears: Mapping[str, LinearPlan], partners: tuple[tuple[str, ...], ...]) -> dict[str, int]:
    """What divides the input features of a linear and of its partners, by its name."""
    shared = {name: plan.in_features for name, plan in linears.items()}
    for names in partners:
        shared |= dict.fromkeys(names, math.gcd(*(shared[name] for name in names)))
    return shared


def _group_size(job: Job, storable: Storable, features: int) -> int:
    """The group size that was asked for; else the one of those that may be stored that is nearest to the usual."""
    options, usual = job.config.plan, job.config.plan.uniform_group_size
    if options.group_size is not None or storable.holds_group_size(usual, features):
        return usual
    sizes = storable.group_sizes or nearest_group_sizes(usual, features)
    usable = [size for size in sizes if size > 0 and storable.holds_group_size(size, features)]
    if usable:
        return min(usable, key=lambda size: (abs(size - usual), size))
    if storable.holds_group_size(WHOLE_ROWS, features):
        return WHOLE_ROWS
    return min(storable.group_sizes, key=lambda size: abs(size - usual), default=usual)  # which is objected to


def may_choose_groups(job: Job) -> bool:
    """Whether a group size that nobody asked for may differ from linear to linear."""
    return job.config.plan.group_size is None and any(entry.whole_groups for entry in capabilities_of(job).linears)


def has_larger_groups(job: Job) -> bool:
    """Whether a format holds larger groups than a plan may choose from."""
    sizes = job.config.plan.group_sizes
    return WHOLE_ROWS not in sizes and any(
        not way.group_sizes or WHOLE_ROWS in way.group_sizes or max(way.group_sizes) > max(sizes)
        for way in capabilities_of(job).linears
    )


def _symmetric(job: Job, storable: Storable) -> bool:
    """As asked for; where nobody asked, symmetric if there is nothing else, or if a reader takes nothing else.

    Rows of several widths, or embeddings beside linears, are stored in several ways.
    """
    options = job.config.plan
    if options.symmetric is not None:
        return options.symmetric
    several = options.is_average or options.embedding_bits not in (None, KEPT_BITS)
    return False not in storable.symmetric or (several and capabilities_of(job).prefers_one_way)


def _scale_bits(job: Job, storable: Storable) -> int:
    """As asked for; else those of a table, where the format has such."""
    usual = ENCODINGS[storable.encoding].table_bits
    return job.config.plan.scale_bits or (usual if usual in storable.scale_bits else 16)
