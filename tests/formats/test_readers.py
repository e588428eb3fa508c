"""Where an artifact runs, from the one declaration."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from accullm_cli.formats.readers import readings
from accullm_cli.quant.plan import LinearPlan, Plan

TRANSFORMERS = "transformers 5.24 with compressed-tensors 0.20"
GPU = "vLLM 0.32 on GPUs of compute capability 7.5 or more"
CPU = "vLLM 0.32 on CPUs"


def row(name: str = "p", bits: int = 4, size: int = 64, symmetric: bool = True, rows: int = 96) -> LinearPlan:
    return LinearPlan(name, rows, 128, bits, size, symmetric)


def verdicts(
    *linears: LinearPlan, embeddings: tuple[LinearPlan, ...] = (), kinds: Mapping[str, str] | None = None
) -> dict[str, str]:
    plan = Plan({own.name: own for own in linears}, embeddings={own.name: own for own in embeddings})
    return {found.reader: found.verdict for found in readings("compressed-tensors", plan, kinds or {})}


@pytest.mark.parametrize("symmetric", [True, False])
def test_four_bits_alike_run_everywhere(symmetric: bool) -> None:
    found = verdicts(row("a", symmetric=symmetric), row("b", symmetric=symmetric), row("kept", bits=16))
    assert found == {TRANSFORMERS: "yes", GPU: "yes", CPU: "yes"}


def test_other_widths_do_not_run_on_cpus() -> None:
    assert verdicts(row("a"), row("b", bits=3)) == {
        TRANSFORMERS: "yes",
        GPU: "yes",
        CPU: "no: it takes linears of 4 bits, and b has 3",
    }


def test_zero_points_of_several_schemes_are_not_for_transformers() -> None:
    assert verdicts(row("a", symmetric=False), row("b", bits=3, symmetric=False)) == {
        TRANSFORMERS: "no: it takes zero points only where all linears (and embeddings) are stored in one way",
        GPU: "yes",
        CPU: "no: it takes linears of 4 bits, and b has 3",
    }


def test_sizes_that_a_cpu_does_not_take() -> None:
    assert verdicts(row("a", rows=100))[CPU] == "no: it takes sizes that are multiples of 32, and a is 100 x 128"


@pytest.mark.parametrize(
    ("kind", "bits", "found"),
    [
        ("embedding", 4, {TRANSFORMERS: "yes", GPU: "yes", CPU: "no: it takes no quantized embeddings"}),
        (
            "embedding",
            6,
            {
                TRANSFORMERS: "no: it takes a quantized embedding only where all linears are stored in the same way",
                GPU: "no: it takes quantized embeddings of 2, 4, 8 bits, and t has 6",
                CPU: "no: it takes no quantized embeddings",
            },
        ),
        (
            "tied",
            4,
            {
                TRANSFORMERS: "yes",
                GPU: "no: it takes no quantized embedding that is the output head, too",
                CPU: "no: it takes no quantized embeddings",
            },
        ),
        (
            "head",
            6,
            {
                TRANSFORMERS: "yes",
                GPU: "yes",
                CPU: "no: it takes a quantized output head of 4 bits, and t has 6",
            },
        ),
    ],
)
def test_embeddings_and_heads(kind: str, bits: int, found: dict[str, str]) -> None:
    assert verdicts(row("a"), embeddings=(row("t", bits),), kinds={"t": kind}) == found


@pytest.mark.parametrize(
    ("expert", "transformers", "cpu"),
    [
        (row("e"), "yes", "yes"),
        (row("e", bits=3), "yes", "no: it takes experts of 4 bits, and e has 3"),
        (row("e", symmetric=False), "no: it takes experts without zero points only, and e has some", "yes"),
        (row("e", size=16), "yes", "no: it does not take groups of 16 of an expert, as e has"),
        (row("e", size=-1), "yes", "no: it does not take one scale per row of an expert, as e has"),
    ],
)
def test_experts(expert: LinearPlan, transformers: str, cpu: str) -> None:
    found = verdicts(row("a"), expert, kinds={"e": "expert"})
    assert found == {TRANSFORMERS: transformers, GPU: "yes", CPU: cpu}


def test_a_format_that_declares_no_readers_says_nothing() -> None:
    assert readings("accullm", Plan({"p": row()}), {}) == ()
