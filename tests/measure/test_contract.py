"""Contracts: how a condition is read, what it is held against, and every refusal word for word."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from accullm_cli.errors import EXIT_USAGE, AccullmError
from accullm_cli.measure.contract import METRICS, Requirement, judge, parse_requirement
from accullm_cli.measure.fidelity import divergence_found
from accullm_cli.measure.measurement import Figure, exactly, judged_figures
from accullm_cli.measure.result import Clause, Estimate, Fidelity

FIDELITY = Fidelity(
    text="default",
    windows=2,
    tokens=100,
    perplexity_original=Estimate(10.0, 9.0, 11.0),
    perplexity=Estimate(12.0, 11.5, 12.5),
    mean_kl=Estimate(0.02, 0.015, 0.03),
    kl_p99=Estimate(0.4, 0.3, 0.5),
    kl_p999=Estimate(0.8, 0.7, 0.9),
    kl_max=1.5,
    top1_agreement=Estimate(0.85, 0.8, 0.9),
    mean_kl_floor=Estimate(0.00003, 0.00002, 0.00004),
    kl_of_window=(0.01, 0.03),
    kl_histogram=((1e-6, 100),),
)


def clause(text: str, fidelity: Fidelity = FIDELITY) -> Clause:
    (result,) = judge([parse_requirement(text)], figures(fidelity))
    return result


def figures(fidelity: Fidelity = FIDELITY) -> dict[str, Figure]:
    sizes = {"bits_per_weight": 4.5, "artifact_bytes": 1000, "fallbacks": 2}
    sized = {name: Figure(name, exactly(value), has_interval=False) for name, value in sizes.items()}
    shares = {"retention": Estimate(0.97, 0.94, 0.99), "retention.sql": Estimate(0.9, 0.8, 0.95)}
    shares["exact_match"] = Estimate(0.6, 0.5, 0.7)
    shares["agreement"] = Estimate(0.6, 0.5, 0.7)
    told = {name: Figure(name, estimate, best=1.0) for name, estimate in shares.items()}
    return judged_figures([divergence_found(fidelity)]) | sized | told


def refusal(text: str) -> str:
    with pytest.raises(AccullmError) as error:
        parse_requirement(text)
    assert error.value.exit_code == EXIT_USAGE
    return error.value.line()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mean_kl<=0.02", ("mean_kl", "", "<=", 0.02)),
        ("  mean_kl  <=  2e-2 ", ("mean_kl", "", "<=", 0.02)),
        ("mean_kl.high<0.02", ("mean_kl", "high", "<", 0.02)),
        ("top1_agreement>=0.85", ("top1_agreement", "", ">=", 0.85)),
        ("top1_agreement>=85%", ("top1_agreement", "", ">=", 0.85)),
        ("top1_agreement.low > 85.5%", ("top1_agreement", "low", ">", 0.855)),
        ("artifact_bytes<=80e6", ("artifact_bytes", "", "<=", 80_000_000)),
        ("fallbacks<=0", ("fallbacks", "", "<=", 0)),
    ],
)
def test_condition_is_read(text, expected):
    assert parse_requirement(text) == Requirement(text, *expected)


@pytest.mark.parametrize(
    ("metric", "measured"),
    [
        ("mean_kl", 0.02),
        ("mean_kl.low", 0.015),
        ("mean_kl.high", 0.03),
        ("kl_p99", 0.4),
        ("kl_p999", 0.8),
        ("kl_max", 1.5),
        ("top1_agreement", 0.85),
        ("top1_agreement.low", 0.8),
        ("perplexity", 12.0),
        ("perplexity_ratio", 1.2),
        ("retention", 0.97),
        ("retention.low", 0.94),
        ("retention.sql", 0.9),
        ("retention.sql.low", 0.8),
        ("exact_match.high", 0.7),
        ("bits_per_weight", 4.5),
        ("artifact_bytes", 1000),
        ("fallbacks", 2),
    ],
)
def test_metric_is_measured(metric, measured):
    assert clause(f"{metric}<=1").measured == pytest.approx(measured)
    assert clause(f"{metric}<=1").metric == metric


def test_every_metric_can_be_judged():
    assert [clause(f"{metric}<=1").metric for metric in METRICS] == list(METRICS)


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("mean_kl<=0.02", True),
        ("mean_kl<0.02", False),
        ("mean_kl>=0.02", True),
        ("mean_kl>0.02", False),
        ("mean_kl<=0.019", False),
        ("mean_kl<0.021", True),
        ("mean_kl>=0.021", False),
        ("mean_kl>0.019", True),
        ("mean_kl.high<=0.02", False),
        ("mean_kl.low<=0.015", True),
        ("top1_agreement>=85%", True),
        ("fallbacks<=1", False),
    ],
)
def test_verdict(text, met):
    assert clause(text).met is met


def test_what_is_not_a_number_meets_no_condition():
    broken = replace(FIDELITY, mean_kl=Estimate(float("nan"), float("nan"), float("nan")))
    assert not clause("mean_kl<=1000", broken).met
    assert not clause("mean_kl>=0", broken).met


def test_clauses_keep_the_order_and_the_words_of_the_user():
    texts = ["perplexity <= 20", "mean_kl.high<=0.05", "top1_agreement >= 80%"]
    clauses = judge([parse_requirement(text) for text in texts], figures())
    assert [entry.text for entry in clauses] == texts
    assert clauses[2] == Clause("top1_agreement >= 80%", "top1_agreement", ">=", 0.8, 0.85, True)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("mean_lk<=0.02", "unknown metric 'mean_lk' in 'mean_lk<=0.02'; did you mean mean_kl?"),
        ("KL_P99<=1", "unknown metric 'KL_P99' in 'KL_P99<=1'; did you mean kl_p99?"),
        ("ppl_ratio<=1.1", "unknown metric 'ppl_ratio' in 'ppl_ratio<=1.1'; did you mean perplexity_ratio?"),
        (
            "zzz<=1",
            "unknown metric 'zzz' in 'zzz<=1'; choose one of mean_kl, kl_p99, kl_p999, top1_agreement, perplexity, "
            "retention, exact_match, agreement, kl_max, perplexity_ratio, bits_per_weight, artifact_bytes, fallbacks",
        ),
        ("mean_kl", "'mean_kl' is not a condition; write METRIC<=VALUE or METRIC>=VALUE, such as mean_kl<=0.02"),
        (
            "mean_kl=0.02",
            "'mean_kl=0.02' is not a condition; write METRIC<=VALUE or METRIC>=VALUE, such as mean_kl<=0.02",
        ),
        ("", "'' is not a condition; write METRIC<=VALUE or METRIC>=VALUE, such as mean_kl<=0.02"),
        (
            "mean_kl<=small",
            "'small' is not a number, in 'mean_kl<=small'; write METRIC<=VALUE or METRIC>=VALUE, such as mean_kl<=0.02",
        ),
        (
            "mean_kl<=5%",
            "'5%' is not a number, in 'mean_kl<=5%'; write METRIC<=VALUE or METRIC>=VALUE, such as mean_kl<=0.02",
        ),
        ("mean_kl<=nan", "nan is not a possible value of mean_kl, in 'mean_kl<=nan'; give 0 or more"),
        ("mean_kl<=inf", "inf is not a possible value of mean_kl, in 'mean_kl<=inf'; give 0 or more"),
        ("mean_kl<=-1", "-1 is not a possible value of mean_kl, in 'mean_kl<=-1'; give 0 or more"),
        (
            "top1_agreement>=85",
            "85 is not a share, in 'top1_agreement>=85'; write a share such as top1_agreement>=0.85 or "
            "top1_agreement>=85%",
        ),
        ("mean_kl.p99<=1", "unknown bound 'p99' in 'mean_kl.p99<=1'; write mean_kl.low or mean_kl.high"),
        ("mean_kl.<=1", "unknown bound '' in 'mean_kl.<=1'; write mean_kl.low or mean_kl.high"),
        ("kl_max.high<=1", "kl_max has no confidence interval, in 'kl_max.high<=1'; write kl_max without .high"),
        (
            "fallbacks.mid<=1",
            "fallbacks has no confidence interval, in 'fallbacks.mid<=1'; write fallbacks without .mid",
        ),
    ],
)
def test_refusal(text, line):
    assert refusal(text) == f"--require: {line}"


def test_conditions_are_read_without_torch():
    program = "import sys, accullm_cli.measure.contract; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_every_metric_is_documented():
    text = (Path(__file__).resolve().parents[2] / "docs" / "measures.md").read_text(encoding="utf-8")
    figures = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    documented = [name for cell in figures for name in re.findall(r"`([^`]+)`", cell)]
    assert sorted(documented) == sorted(METRICS)
