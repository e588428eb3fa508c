"""Every option of a conversion, declared once: the field is the YAML key, the flag, the help text and the docs row."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def option(default: Any, help: str, flag: str | None = None, example: str | None = None, **constraints: Any) -> Any:
    """A field that is also a command-line flag.

    Args:
        flag: the flag's name where it is not `--` and the field's name with dashes.
        example: a value for the docs, where the default does not explain itself.
        constraints: pydantic's (ge, le, ...).
    """
    extra = {"flag": flag, "example": example}
    if isinstance(default, list):
        return Field(default_factory=lambda: list(default), description=help, json_schema_extra=extra, **constraints)
    return Field(default, description=help, json_schema_extra=extra, **constraints)


def parse_fraction(value: object) -> object:
    """'0.5%' and 0.005 mean the same."""
    if isinstance(value, str) and value.strip().endswith("%"):
        return float(value.strip()[:-1]) / 100
    return value


Fraction = Annotated[float, BeforeValidator(parse_fraction)]


class Section(BaseModel):
    """A part of the configuration. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Calibration(Section):
    """The text that the weights are rounded for."""

    text: str = option(
        "default",
        "Calibration text: 'default' (prose, code and generated documents that need no download), 'self' (text that "
        "the model samples), a UTF-8 file, or a dataset on the hub as 'hub:NAME[:COLUMN]'.",
        flag="--calibration",
        example="corpus.txt",
    )
    samples: int = option(128, "Number of calibration windows.", ge=1)
    seq_len: int = option(512, "Tokens in a window, for calibration and validation.", ge=16)


class PlanOptions(Section):
    """How the linears are to be stored."""

    bits: int = option(4, "Bits of a weight.", ge=2, le=8)
    group_size: int = option(64, "Input features that share a scale; -1 for one scale per output row.", ge=-1)
    symmetric: bool = option(False, "Fix the zero point in the middle of the grid, so that none is stored.")
    outliers: Fraction = option(
        0.005,
        "Fraction of each linear's input features that stay in the source's dtype: 0.005 or 0.5%.",
        example="0.5%",
        ge=0,
        le=0.5,
    )


class Rounding(Section):
    """How weights are rounded to their grid."""

    method: Literal["nearest", "feedback", "stochastic"] = option(
        "feedback",
        "'nearest'; 'feedback' carries each column's rounding error into the next (GPTQ); 'stochastic' does the same "
        "with an unbiased random round.",
        flag="--rounding",
    )
    outlier_mode: Literal["untouched", "compensating"] = option(
        "untouched",
        "'untouched' keeps the outlier features' weights bit for bit; 'compensating' lets them take up the rounding "
        "error of the rest.",
    )
    target: Literal["corrected", "original"] = option(
        "corrected",
        "'corrected' moves each linear's target to make up for what earlier layers lost (Qronos); 'original' rounds "
        "towards the weights themselves (GPTQ).",
    )
    grid: Literal["search", "minmax"] = option(
        "search",
        "'search' picks each group's scale for the least activation-weighted error; 'minmax' spans the group's range.",
    )
    damping: float = option(
        0.01, "Added to the Hessian's diagonal, as a fraction of its mean.", gt=0, le=1, example="0.01"
    )


class Export(Section):
    """What is written."""

    format: list[Literal["accullm", "compressed-tensors"]] = option(
        ["accullm"], "Artifact format; give it again for several.", min_length=1
    )
    out: Path | None = option(None, "Directory of the artifact. Default: MODEL's name with -int4 (the bits) behind it.")


class Validation(Section):
    """What the artifact is measured on, and the contract it must meet."""

    text: str = option(
        "default",
        "Held-out text: 'default' (prose and code that calibration never sees) or a UTF-8 file.",
        flag="--validation-text",
        example="held-out.txt",
    )
    windows: int = option(16, "Number of validation windows.", flag="--validation-windows", ge=2)
    require: list[str] = option(
        [],
        "A condition the artifact must meet, as METRIC<=VALUE or METRIC>=VALUE; give it again for several. "
        "Not met: exit code 3.",
        example="mean_kl<=0.02",
    )


class Machine(Section):
    """Where and how the work is done."""

    run: Path | None = option(None, "Run directory, for resuming. Default: the artifact's directory with .run behind.")
    device: str = option("auto", "'auto', 'cpu' or 'cuda:N'.", example="cuda:0", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    threads: int | None = option(None, "CPU threads; fixed for a run. Default: all that this process may use.", ge=1)
    seed: int = option(0, "Seed of every random choice.", ge=0, lt=2**63)


class Config(Section):
    """A conversion: the model, and a section for each concern."""

    model: str = Field(description="A directory, a GGUF file, a hub id (owner/name[@revision]) or an alias.")
    calibration: Calibration = Field(default_factory=Calibration)
    plan: PlanOptions = Field(default_factory=PlanOptions)
    rounding: Rounding = Field(default_factory=Rounding)
    export: Export = Field(default_factory=Export)
    validation: Validation = Field(default_factory=Validation)
    machine: Machine = Field(default_factory=Machine)
