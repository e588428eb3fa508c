"""What tests of output start from: a report with something in every section, and statistics with a strong feature."""

from __future__ import annotations

from dataclasses import replace

import torch

from accullm_cli.measure.fidelity import divergence_found
from accullm_cli.measure.measurement import Measurement
from accullm_cli.measure.result import (
    REPORT_SCHEMA_VERSION,
    Clause,
    Estimate,
    Fidelity,
    LinearSummary,
    Report,
    Speed,
    StageSummary,
    Throughput,
)
from accullm_cli.quant.plan import LinearPlan, Plan
from accullm_cli.quant.stats import InputStats

MET = Clause("mean_kl<=0.1", "mean_kl", "<=", 0.1, 0.0664, True)
MISSED = Clause("top1_agreement.low >= 85%", "top1_agreement.low", ">=", 0.85, 0.81267, False)

FIDELITY = Fidelity(
    text="default",
    windows=3,
    tokens=1536,
    perplexity_original=Estimate(15.61, 14.0, 17.0),
    perplexity=Estimate(16.4, 14.9, 18.1),
    mean_kl=Estimate(0.0664, 0.05, 0.083),
    kl_p99=Estimate(0.61, 0.5, 0.72),
    kl_p999=Estimate(1.4, 1.1, 1.9),
    kl_max=2.25,
    top1_agreement=Estimate(0.8459, 0.81267, 0.874),
    mean_kl_floor=Estimate(0.0000332, 0.00003, 0.00004),
    kl_of_window=(0.05, 0.06, 0.09),
    kl_histogram=((1e-6, 36), (1e-3, 500), (0.1, 800), (10.0, 200)),
)


SPEED = Speed(
    device="CPU with AVX512, 2 threads",
    dtype="float32",
    prompt_tokens=512,
    decoded_tokens=32,
    original=Throughput(prefill=400.0, decode=20.0),
    artifact=Throughput(prefill=220.0, decode=25.0),
    prefill_engine="torch: dequantize, then multiply (210 linears)",
    decode_engine="CPU: packed 4-bit (210 linears)",
)


def linear(name: str, bits: int = 4, relative_error: float | None = 0.08) -> LinearSummary:
    return LinearSummary(name, 96, 64, bits, 64, 2, bits + 0.4, relative_error)


def a_report(
    contract: tuple[Clause, ...] = (MET, MISSED), records: tuple[str, ...] = (), artifact: str = "out/name-int4"
) -> Report:
    return Report(
        schema_version=REPORT_SCHEMA_VERSION,
        model="owner/name",
        source_sha256="3f" * 32,
        artifact=artifact,
        format="accullm",
        artifact_sha256="ab" * 32,
        bits_per_weight=4.4021,
        artifact_bytes=113_000_000,
        source_bytes=269_060_552,
        measurements=(divergence_found(FIDELITY),),
        contract=contract,
        contract_met=all(clause.met for clause in contract),
        records=records,
        stages=(
            StageSummary("calibrate", "up to date", False, 61.0, 900_000_000),
            StageSummary("quantize", "config changed (plan.bits)", True, 311.0, 1_300_000_000),
        ),
        linears=(
            linear("model.layers.0.self_attn.q_proj"),
            linear("model.layers.0.mlp.up_proj", bits=6),
            linear("model.layers.1.self_attn.q_proj", relative_error=0.09),
            linear("model.layers.1.mlp.up_proj", bits=16, relative_error=None),
            linear("lm_head"),
        ),
        versions={"torch": "2.13.0", "accullm": "0.1.0"},
    )


def report_of(mean_kl: float = 0.05, windows: tuple[float, ...] = (0.04, 0.05, 0.06)) -> Report:
    """A report of this mean KL, held against 0.02 nats, whose paths are nobody else's concern."""
    fidelity = replace(
        FIDELITY,
        text="/home/somebody/held-out.txt",
        windows=len(windows),
        mean_kl=Estimate(mean_kl, mean_kl * 0.9, mean_kl * 1.1),
        kl_of_window=windows,
    )
    contract = (Clause("mean_kl<=0.02", "mean_kl", "<=", 0.02, mean_kl, mean_kl <= 0.02),)
    return measuring(a_report(contract, artifact="/home/somebody/name-int4"), divergence_found(fidelity))


def measuring(report: Report, *measurements: Measurement) -> Report:
    """A report of these measurements."""
    return replace(report, measurements=measurements)


STRONG_FEATURE = 5


def inputs(features: int = 64, blocks: int = 3) -> list[InputStats]:
    """For each block the input of q and k and that of down; feature 5 is 1000 times the others and beyond 6.0."""
    result = []
    for block in range(blocks):
        moment = torch.ones(features)
        moment[STRONG_FEATURE] = 1000.0
        share = torch.zeros(features)
        share[STRONG_FEATURE] = 0.5
        for names in (("self_attn.q_proj", "self_attn.k_proj"), ("mlp.down_proj",)):
            linears = tuple(f"model.layers.{block}.{name}" for name in names)
            result.append(InputStats(linears, 4096, moment, 2 * moment.sqrt(), share, {}))
    return result


def plan_of(stats: list[InputStats], outliers: tuple[int, ...] = (STRONG_FEATURE,)) -> Plan:
    return Plan(
        {
            name: LinearPlan(name, 32, len(entry.second_moment), 4, 64, False, outliers)
            for entry in stats
            for name in entry.linears
        }
    )
