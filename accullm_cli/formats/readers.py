"""Where an artifact runs: which of its format's readers take it, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from accullm_cli.formats.capabilities import CAPABILITIES, WHOLE_ROWS, Reader, Storable
from accullm_cli.quant.plan import KEPT_BITS, LinearPlan, Plan


@dataclass(frozen=True)
class Reading:
    """One reader of a format, and why it does not take an artifact; "" where it does."""

    reader: str
    obstacle: str
    is_transformers: bool

    @property
    def verdict(self) -> str:
        """For people."""
        return f"no: {self.obstacle}" if self.obstacle else "yes"


def readings(format_name: str, plan: Plan, kinds: Mapping[str, str]) -> tuple[Reading, ...]:
    """What the readers of a format make of a plan, in the order in which they are declared.

    Args:
        kinds: as in `ModelShape`.
    """
    return tuple(
        Reading(reader.name, next(_obstacles(reader, plan, kinds), ""), reader.is_transformers)
        for reader in CAPABILITIES[format_name].readers
    )


def _obstacles(reader: Reader, plan: Plan, kinds: Mapping[str, str]) -> Iterator[str]:
    linears = {name: row for name, row in plan.linears.items() if row.bits != KEPT_BITS}
    experts = [row for name, row in linears.items() if kinds.get(name) == "expert"]
    dense = [row for name, row in linears.items() if kinds.get(name) != "expert"]
    looked_up = [row for name, row in plan.embeddings.items() if kinds.get(name) != "head"]
    heads = [row for name, row in plan.embeddings.items() if kinds.get(name) == "head"]
    yield from _unheld(reader.linears, dense, "linear", "linears")
    yield from _unheld(reader.experts, experts, "expert", "experts")
    yield from _unheld(reader.embeddings, looked_up, "token embedding", "quantized embeddings")
    yield from _unheld(reader.head, heads, "output head", "a quantized output head")
    if not reader.tied and any(kinds.get(row.name) == "tied" for row in looked_up):
        yield "it takes no quantized embedding that is the output head, too"
    for row in (*dense, *heads):
        if row.in_features % reader.multiple or row.out_features % reader.multiple:
            shape = f"{row.out_features} x {row.in_features}"
            yield f"it takes sizes that are multiples of {reader.multiple}, and {row.name} is {shape}"
    ways = {(row.bits, row.group_size, row.symmetric) for row in (*dense, *looked_up, *heads)}
    if len(ways) > 1 and "zero points" in reader.alike and not all(symmetric for _, _, symmetric in ways):
        yield "it takes zero points only where all linears (and embeddings) are stored in one way"
    if len(ways) > 1 and "embeddings" in reader.alike and looked_up:
        yield "it takes a quantized embedding only where all linears are stored in the same way"


def _unheld(storables: Sequence[Storable], rows: Sequence[LinearPlan], one: str, many: str) -> Iterator[str]:
    """Why a reader does not take the first of some rows that it does not."""
    if rows and not storables:
        yield f"it takes no {many}" if not many.startswith("a ") else f"it does not take {many}"
        return
    row = next((row for row in rows if not any(storable.holds(row) for storable in storables)), None)
    if row is None:
        return
    widths = sorted({bits for storable in storables for bits in storable.bits})
    if row.bits not in widths:
        yield f"it takes {many} of {_listed(widths)} bits, and {row.name} has {row.bits}"
    elif not any(row.symmetric in storable.symmetric for storable in storables):
        yield f"it takes {many} without zero points only, and {row.name} has some"
    else:
        size = "one scale per row" if row.group_size == WHOLE_ROWS else f"groups of {row.group_size}"
        yield f"it does not take {size} of a{'n' if one[0] in 'aeiou' else ''} {one}, as {row.name} has"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
