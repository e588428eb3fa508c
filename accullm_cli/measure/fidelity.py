"""What was found on a text, and how fast an artifact is, as measurements."""

from __future__ import annotations

from pathlib import Path

from accullm_cli.measure.measurement import (
    Dots,
    Estimate,
    Figure,
    Histogram,
    Mark,
    Measurement,
    Samples,
    Table,
    exactly,
)
from accullm_cli.measure.result import Fidelity, Speed

DIVERGENCE = "kl"
DIVERGENCE_WITHOUT_ADAPTER = "without adapter"
SPEED = "speed"
# Below this, 95% intervals hold the truth less often than they say (docs/measures.md).
_FEW_WINDOWS = 6


def divergence_found(found: Fidelity) -> Measurement:
    """On the text that the contract is judged on."""
    change = found.perplexity.value / found.perplexity_original.value - 1
    facts = [("measured on", f"{found.tokens} tokens: {found.text}")]
    if found.arithmetic != "float32":
        facts.append(("computed in", found.arithmetic))
    return Measurement(
        measure=DIVERGENCE,
        heading="Fidelity",
        about=_about(found, "held-out text"),
        figures=_figures(found),
        counts=_counts(found),
        facts=tuple(facts),
        summary=(
            f"On {found.tokens:,} held-out tokens the artifact puts the original's most likely token first "
            f"{found.top1_agreement.value:.1%} of the time, and its perplexity is {found.perplexity.value:#.4g} "
            f"instead of {found.perplexity_original.value:#.4g} ({change:+.1%})."
        ),
        note=_note(found),
        samples=(_samples(found),),
        histograms=(_histogram(found),),
        dots=(_windows(found),),
    )


def divergence_found_elsewhere(name: str, found: Fidelity) -> Measurement:
    """On text of another kind, named "other text" or "other text, chat".

    Of its figures the console shows two, and no condition names any.
    """
    kind = name.partition(", ")[2]
    labels = {"mean_kl": f"mean KL, {kind or name}", "top1_agreement": f"top-1, {kind or name}"}
    of_kind = f": {kind}" if kind else ""
    return Measurement(
        measure=name,
        heading=f"Fidelity on text of another kind{of_kind}",
        about=_about(found, f"text of another kind{of_kind}"),
        figures=_figures(found, labels, aside=False),
        judged=False,
        counts=_counts(found),
        facts=((f"the {name}", f"{found.tokens} tokens: {found.text}"),),
        note=_note(found),
        samples=(_samples(found),),
    )


def divergence_found_alone(found: Fidelity) -> Measurement:
    """Of the artifact's own weights, as who does not load the adapter has them; no condition names a figure."""
    labels = {"mean_kl": "mean KL, no adapter"}
    return Measurement(
        measure=DIVERGENCE_WITHOUT_ADAPTER,
        heading="Fidelity without the outlier adapter",
        about="Without the adapter. " + _about(found, "held-out text"),
        figures=_figures(found, labels, aside=False),
        judged=False,
        counts=_counts(found),
        note=_note(found),
        samples=(_samples(found),),
    )


# As the console names the figures, in its order.
_LABELS = {
    "perplexity_original": "perplexity, original",
    "perplexity": "perplexity, artifact",
    "mean_kl": "mean KL",
    "kl_p99": "KL, 99th percentile",
    "kl_p999": "KL, 99.9th percentile",
    "kl_max": "KL, maximum",
    "top1_agreement": "top-1 agreement",
}


def _figures(found: Fidelity, labels: dict[str, str] = _LABELS, aside: bool = True) -> tuple[Figure, ...]:
    floor = found.mean_kl_floor
    ratio = found.perplexity.value / found.perplexity_original.value

    def kl(name: str, estimate: Estimate, digits: str, title: str, note: str, has_interval: bool = True) -> Figure:
        beside = f"noise floor {floor.value:.2g}" if name == "mean_kl" and aside else ""
        return Figure(
            name, estimate, has_interval, labels.get(name, ""), title, digits, "nats", beside, note=note, best=0.0
        )

    over_floor = f"; {_factor(found.mean_kl.value / floor.value)} times the noise floor" if floor.value > 0 else ""
    agreement, perplexity, original = found.top1_agreement, found.perplexity, found.perplexity_original
    return (
        Figure(
            "perplexity_original",
            original,
            label=labels.get("perplexity_original", ""),
            title="Perplexity of the original",
            digits=".3f",
            form="#.4g",
        ),
        Figure(
            "perplexity",
            perplexity,
            label=labels.get("perplexity", ""),
            title="Perplexity of the artifact",
            digits=".3f",
            form="#.4g",
            note=f"{ratio:.4f} times the original's",
            best=original.value,
        ),
        kl("mean_kl", found.mean_kl, ".5f", "Mean KL divergence", f"nats per token{over_floor}"),
        Figure(
            "mean_kl_floor",
            floor,
            title="Its noise floor",
            note="the original against itself with one bfloat16 rounding per block",
        ),
        kl("kl_p99", found.kl_p99, ".4f", "KL, 99th percentile", "one token in 100 is further off"),
        kl("kl_p999", found.kl_p999, ".4f", "KL, 99.9th percentile", "one token in 1,000 is further off"),
        kl("kl_max", exactly(found.kl_max), ".4f", "KL, largest", "the worst token", has_interval=False),
        Figure(
            "top1_agreement",
            agreement,
            label=labels.get("top1_agreement", ""),
            title="Top-1 agreement",
            digits=".2%",
            form=".2%",
            note="the same most likely next token",
            best=1.0,
        ),
        Figure("perplexity_ratio", exactly(ratio), has_interval=False, form=".4f", best=1.0),
    )


def _counts(found: Fidelity) -> tuple[tuple[str, int], ...]:
    return ("windows", found.windows), ("tokens", found.tokens)


def _about(found: Fidelity, text: str) -> str:
    return (
        f"Measured on {found.tokens} tokens in {found.windows} windows of {text}, the artifact in {found.arithmetic}."
    )


def _samples(found: Fidelity) -> Samples:
    return Samples("mean_kl", "window", f"{Path(found.text).name}, {found.text_sha256[:16]}", found.kl_of_window)


def _note(found: Fidelity) -> str:
    note = (
        f"KL(original ‖ artifact) of the next-token distributions at {found.tokens:,} positions in {found.windows} "
        f"windows, the artifact in {found.arithmetic}. Text: {found.text}. Intervals come from resampling whole "
        "windows."
    )
    if found.windows < _FEW_WINDOWS:
        note += f" From {found.windows} windows they are too narrow: measure more."
    return note


def _histogram(found: Fidelity) -> Histogram:
    return Histogram(
        name="kl-histogram",
        caption="How far single tokens are off. The scale is logarithmic.",
        description="Histogram of the KL divergence per token",
        values="KL divergence of a token (nats)",
        counted="tokens",
        logarithmic=True,
        bins=found.kl_histogram,
        marks=(
            Mark("noise floor", found.mean_kl_floor.value, "floor"),
            Mark("mean", found.mean_kl.value, "mean"),
            Mark("99%", found.kl_p99.value, "tail"),
            Mark("99.9%", found.kl_p999.value, "far tail"),
        ),
    )


def _windows(found: Fidelity) -> Dots:
    return Dots(
        name="kl-of-windows",
        caption="Texts differ in how hard they are; a window far above the others is worth reading.",
        description="Mean KL divergence of each window",
        unit="window of text",
        values="mean KL (nats)",
        points=found.kl_of_window,
        mean=found.mean_kl,
    )


def speed_found(found: Speed) -> Measurement:
    """Tokens per second; its figures are of the artifact."""

    def figure(name: str, label: str, artifact: float, original: float) -> Figure:
        aside = f"original {original:.4g} ({artifact / original:.3g} times)"
        return Figure(
            name, exactly(artifact), has_interval=False, label=label, digits=".4g", unit="tokens/s", aside=aside
        )

    artifact, original = found.artifact, found.original
    columns = (("Tokens per second", ""), ("Artifact", "number"), ("Original", "number"), ("", "number"), ("", "quiet"))
    phases = (
        ("Prefill", artifact.prefill, original.prefill, f"{found.prompt_tokens} tokens at once", found.prefill_engine),
        (
            "Decode",
            artifact.decode,
            original.decode,
            f"{found.decoded_tokens} tokens, one after the other",
            found.decode_engine,
        ),
    )
    rows = tuple(
        (name, f"{own:.4g}", f"{others:.4g}", f"{own / others:.3g} times", f"{what}; the artifact by {engine}")
        for name, own, others, what, engine in phases
    )
    return Measurement(
        measure=SPEED,
        heading="Speed",
        about=f"Timed on {found.device}, in {found.dtype}.",
        figures=(
            figure("prefill", f"prefill, {found.prompt_tokens} tokens", artifact.prefill, original.prefill),
            figure("decode", f"decode, {found.decoded_tokens} tokens", artifact.decode, original.decode),
        ),
        judged=False,
        counts=(("prompt_tokens", found.prompt_tokens), ("decoded_tokens", found.decoded_tokens)),
        facts=(
            ("engine of prefill", found.prefill_engine),
            ("engine of decode", found.decode_engine),
            ("timed on", f"{found.device}, {found.dtype}"),
        ),
        note=f"On {found.device}, both in {found.dtype}; medians of several runs, one sequence at a time.",
        tables=(Table(columns, rows),),
    )


def _factor(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
