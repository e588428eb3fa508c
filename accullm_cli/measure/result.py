"""What validation found, as values: the report that is printed, drawn, written as JSON and held against a contract."""

from __future__ import annotations

from dataclasses import dataclass

from accullm_cli.measure.measurement import Estimate, Measurement

__all__ = ["Estimate", "Fidelity", "Report", "Speed"]

REPORT_SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Fidelity:
    """How far the artifact's next-token distributions are from the original's, on held-out text.

    KL divergence is KL(original || artifact) in nats per token; shares are between 0 and 1.
    """

    text: str  # "default", or the path of the user's file
    windows: int
    tokens: int  # positions that were compared
    perplexity_original: Estimate
    perplexity: Estimate
    mean_kl: Estimate
    kl_p99: Estimate
    kl_p999: Estimate
    kl_max: float
    top1_agreement: Estimate
    mean_kl_floor: Estimate  # the original against itself with one bfloat16 rounding per block
    kl_of_window: tuple[float, ...]  # mean KL of each window, for paired comparisons
    kl_histogram: tuple[tuple[float, int], ...]  # (upper edge in nats, tokens), logarithmic bins
    text_sha256: str = ""  # of the windows' tokens
    arithmetic: str = "float32"  # what the artifact was run in; the original in float32 always


@dataclass(frozen=True)
class Throughput:
    """Tokens per second of one model, medians of several runs."""

    prefill: float  # all tokens of a prompt at once
    decode: float  # one token after the other, with a cache of keys and values


@dataclass(frozen=True)
class Speed:
    """How fast the artifact is beside the original, in the same precision on the same device."""

    device: str
    dtype: str  # "float32", "float16" or "bfloat16"
    prompt_tokens: int
    decoded_tokens: int
    original: Throughput
    artifact: Throughput
    prefill_engine: str  # what multiplied by the artifact's quantized linears, and by how many of them
    decode_engine: str


@dataclass(frozen=True)
class Clause:
    """One `--require` condition and what was measured."""

    text: str  # as the user wrote it
    metric: str
    comparison: str  # "<=" or ">="
    limit: float
    measured: float | None  # None where too little was measured to say
    met: bool

    @property
    def told(self) -> str:
        """What was measured, as text."""
        return "too little to say" if self.measured is None else f"{self.measured:.6g}"


@dataclass(frozen=True)
class StageSummary:
    """One stage of the run: why it ran or was skipped, how long it took, and its peak resident memory."""

    name: str
    reason: str
    ran: bool
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class LinearSummary:
    """One linear in the artifact.

    relative_error: ||Y (W - Q)^T|| / ||Y W^T|| on the calibration rows Y; None where the linear was not quantized.
    """

    name: str
    out_features: int
    in_features: int
    bits: int
    group_size: int
    outliers: int
    bits_per_weight: float
    relative_error: float | None


@dataclass(frozen=True)
class Trial:
    """A plan that a golden search tried.

    clauses: what it was held against, measured on the search's own text.
    """

    bits_per_weight: float
    artifact_bytes: int
    clauses: tuple[Clause, ...]
    met: bool


@dataclass(frozen=True)
class Report:
    """The result of a conversion or validation."""

    schema_version: int
    model: str
    source_sha256: str
    artifact: str
    format: str
    artifact_sha256: str
    bits_per_weight: float  # everything stored for the quantized linears over their weights; embeddings do not count
    artifact_bytes: int
    source_bytes: int
    measurements: tuple[Measurement, ...]
    contract: tuple[Clause, ...]
    contract_met: bool
    records: tuple[str, ...]  # everything that was treated differently from the plan
    stages: tuple[StageSummary, ...]
    linears: tuple[LinearSummary, ...]
    versions: dict[str, str]
    search: tuple[Trial, ...] = ()  # of a golden search, the plans that it measured
    directory: str = ""  # where report.html and report.json lie; empty where none were written

    def measurement(self, measure: str) -> Measurement | None:
        """What the measure of this name found; None where it was not asked for."""
        return next((found for found in self.measurements if found.measure == measure), None)

    def figure(self, name: str, measure: str | None = None) -> Estimate:
        """A figure of a measure by its name; without a measure one of those that conditions may name.

        Raises:
            KeyError: it was not measured.
        """
        for found in self.measurements:
            if found.judged if measure is None else found.measure == measure:
                for figure in found.figures:
                    if figure.name == name and figure.estimate is not None:
                        return figure.estimate
        raise KeyError(name)


@dataclass(frozen=True)
class ModelResult:
    """What became of one model of a zoo.

    name: that of its artifact's directory. exit_code: that of its conversion, by itself. seconds: wall clock.
    error: why there are no reports, in one line. traceback: of a fault of ours.
    """

    name: str
    model: str
    exit_code: int
    error: str
    seconds: float
    reports: tuple[Report, ...]  # one for each format
    traceback: str = ""
