"""Every option of a conversion, declared once: the field is the YAML key, the flag, the help text and the docs row.

`Config` and its sections are the declaration; `config_options` has it as data for whoever derives something from it
(flags, docs, the JSON Schema). `config_file.load_config` fills it from files, `--set` and flags.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from accullm_cli.values import Bits, Distinct, EmbeddingBits, Fraction, GroupSize, ScaleBits


def option(
    default: Any,
    help: str,
    flag: str | None = None,
    example: str | None = None,
    allowed: str | None = None,
    **constraints: Any,
) -> Any:
    """A field that is also a command-line flag.

    Args:
        flag: the flag's name where it is not `--` and the field's name with dashes.
        example: a value for the docs, where the default does not explain itself.
        allowed: the values in words, where the constraints alone don't say them.
        constraints: pydantic's (ge, le, ...).
    """
    extra: dict[str, Any] = {"flag": flag, "example": example, "allowed": allowed}
    if isinstance(default, list):
        return Field(default_factory=lambda: list(default), description=help, json_schema_extra=extra, **constraints)
    return Field(default, description=help, json_schema_extra=extra, **constraints)


# Windows with gradients where a plan needs some, and nobody said how many.
DEFAULT_GRADIENT_SAMPLES = 64

FormatName = Literal["accullm", "compressed-tensors", "mlx", "gguf", "gptq_v2", "gptq", "awq"]


class Section(BaseModel):
    """A part of the configuration. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _text_is_printable(cls, value: object) -> object:
        # Paths on the command line may hold bytes that are no UTF-8, which Python keeps as surrogates.
        if isinstance(value, str):
            try:
                encoded = value.encode("utf-8", "surrogateescape")
            except UnicodeEncodeError:
                encoded = b"\0"
            if b"\0" in encoded:
                raise ValueError("the text holds a character that is none; take it out")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        # pydantic reads true as 1, and YAML 1.1 reads yes and on as true.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation not in (bool, bool | None):
            raise ValueError("true and false are not values of this key (YAML reads yes, no, on and off as these)")
        return value


class Calibration(Section):
    """The text that the weights are rounded for."""

    text: str = option(
        "default",
        "Calibration text: 'default' ('packaged', 6% other languages, and 12% chats and tool calls where the tokenizer "
        "has a chat template; needs no download), 'packaged' (prose, code and generated documents), 'self' "
        "(text that the model samples), "
        "'self-chat' (chats that it samples through its template), 'chat', 'tools', 'languages', 'documents' (as in "
        "--other-text, but none that is held out there), a file, or a dataset on the hub as 'hub:NAME[:COLUMN]'. "
        "Several by commas share the windows; 'default,self-chat=25%' gives one a quarter. "
        "A file is UTF-8: plain text, or JSON Lines with messages (through the model's chat template), text, or prompt "
        "and completion.",
        flag="--calibration",
        example="default,self-chat=25%",
    )
    samples: int = option(128, "Number of calibration windows.", ge=1)
    seq_len: int = option(512, "Tokens in a window, for calibration and validation.", ge=16)
    gradient_samples: int | None = option(
        None,
        "Number of calibration windows that give gradients (all of them, if there are fewer). With gradients, rounding "
        "also carries errors from one output row into the next (YAQA). Default: 0; 64 for an average of bits or "
        "--golden.",
        ge=0,
        example="64",
    )


class PlanOptions(Section):
    """How the weights are to be stored."""

    bits: Bits = option(
        4,
        "Bits of a weight: 4 is the width of every linear. A number with a decimal point, such as 4.4 or 5.0, is an "
        "average, everything stored counted: bits and outliers of each linear are then chosen for the least loss.",
        example="4.4",
        ge=2,
        le=8,
    )
    file_size: str | None = option(
        None,
        "The largest size that the file may have, in the place of --bits: 105MB, or a file that it is to be no larger "
        "than, and if that is a GGUF no slower on a CPU. For a format whose artifact is one file.",
        example="105MB",
    )
    spend: Literal["widths", "outliers"] = option(
        "widths",
        "What an average for --bits is spent on: 'widths' gives each linear 3, 4, 5, 6 or 8 bits, and outliers; "
        "'outliers' gives all of them 4 bits, which GPUs multiply by fastest, and chooses outliers only.",
    )
    group_size: GroupSize | None = option(
        None,
        "Input features that share a scale; -1 for one scale per output row. Default: 64, or what is nearest to it "
        "where a format needs groups that divide the inputs; with an average of bits, 32, 64 or 128, whichever serves "
        "a linear best.",
        example="128",
        allowed="-1, or 1 or more",
        ge=-1,
    )
    scale_bits: ScaleBits | None = option(
        None,
        "Bits of a scale. With 6 it is one of 64 in a table that each linear has; 16 stores scales of 16 bits. "
        "Default: 6; 7 with levels, whose scales have a sign; 16 in a format without tables.",
        example="16",
        allowed="4 to 8, or 16",
        ge=4,
        le=16,
    )
    symmetric: bool | None = option(
        None,
        "Fix the zero point in the middle of the grid, so none is stored. Default: no; yes where a format's readers "
        "take no zero points, or none where linears are stored in several ways.",
        example="true",
    )
    outliers: Fraction | None = option(
        None,
        "Fraction of each linear's input features that stay in the source's dtype: 0.005 or 0.5%. With an average for "
        "--bits, the plan chooses them, up to 3% in any linear; 0 still means none. Default: 0.5%; none in a format "
        "that holds none, but for --outlier-adapter.",
        example="0.5%",
        ge=0,
        le=0.5,
    )
    outlier_adapter: bool = option(
        False,
        "Keep outlier features in a low-rank adapter (LoRA) beside the artifact, for a format that holds none in its "
        "own files. Its bits count in --bits; an average spends them only where that saves more loss than bits do.",
    )
    embedding_bits: EmbeddingBits | None = option(
        None,
        "Bits of a weight of the token embedding and the output head, in groups as the linears; 16 keeps both as in "
        "the source. They count in the artifact's size, not in --bits. Default: 16; in a format whose users count the "
        "whole file they are planned with the linears, or have 8.",
        example="8",
    )
    encodings: Annotated[list[str], Distinct] = option(
        [],
        "The ways to store a linear that a plan may choose from, by the names in docs/formats.md; give it again for "
        "several. Default: all that the format has, but for those marked 'on request', which save little and are slow.",
        example="Q4_K",
    )
    keep: Annotated[list[str], Distinct] = option(
        [],
        "Linears that stay in 16 bits, by a pattern on their full names, in which * stands for anything; give it again "
        "for several. They count in --bits.",
        example="*.down_proj",
    )

    @property
    def is_average(self) -> bool:
        """Whether `bits` is to be reached over all linears, rather than in each: 5.0 is, and 5 is not."""
        return isinstance(self.bits, float) or self.file_size is not None

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """What a linear's group size may be."""
        if self.group_size is not None:
            return (self.group_size,)
        return (32, 64, 128) if self.is_average else (self.uniform_group_size,)

    @property
    def uniform_group_size(self) -> int:
        """The group size of a linear for which none is chosen."""
        return 64 if self.group_size is None else self.group_size


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
    grid: Literal["fit", "search", "minmax"] = option(
        "fit",
        "'minmax' spans each group's range; 'search' picks the scale of least activation-weighted error; 'fit' goes on "
        "from there: it rounds with feedback, fits the scales to the codes by least squares, and does both again.",
    )
    damping: float | None = option(
        None,
        "Added to the Hessian's diagonal, as a fraction of its mean. Default: what loses least on calibration text "
        "that is held out, and 0.3 in the target.",
        gt=0,
        le=1,
        example="0.01",
    )


class Export(Section):
    """What is written."""

    format: Annotated[list[FormatName], Distinct] = option(
        ["accullm"], "Artifact format; give it again for several.", example="compressed-tensors", min_length=1
    )
    out: Path | None = option(
        None,
        "Directory of the artifact. Default: MODEL's name followed by -int4 (or what --bits says).",
        example="smollm2-int4",
    )


class Validation(Section):
    """What the artifact is measured on, and the contract it must meet."""

    text: str = option(
        "default",
        "Held-out text: 'default' (prose and code that calibration never sees) or a file, as for --calibration.",
        flag="--validation-text",
        example="held-out.txt",
    )
    windows: int = option(16, "Number of validation windows.", flag="--validation-windows", ge=2)
    other_text: str = option(
        "default",
        "Text of other kinds, on each of which the report gives the figures too: 'default' (C++, the headers that come "
        "with torch) or a file, and by commas 'chat' (through the model's template), 'tools' (calls as JSON), "
        "'languages' (letters in ten), 'documents' (long ones); or 'none'. Each takes half as many windows, and the "
        "contract is not judged on it.",
        example="default,chat,tools",
    )
    speed: bool = option(
        False,
        "Also measure tokens per second of the artifact and of the original, for a prompt and for one token after the "
        "other. Each is loaded whole, one after the other.",
    )
    tasks: str = option(
        "none",
        "Exact tasks on which the artifact's answers are held against the original's: 'default' (arithmetic, words, "
        "retrieval, sql, identifiers, code), some of these names by commas, one of them at a level (arithmetic:hard; "
        "easy, medium, hard; for retrieval also a number of tokens, as retrieval:8000), files of your own "
        "(mine.jsonl: prompt or messages, and answer), or 'none'.",
        example="default",
    )
    task_items: int = option(
        40, "Items of each task; of a file of your own all lines are used.", ge=2, le=100_000, example="200"
    )
    require: list[str] = option(
        [],
        "A condition the artifact must meet, as METRIC<=VALUE or METRIC>=VALUE; give it again for several. "
        "Not met: exit code 3.",
        example="mean_kl<=0.02",
    )
    junit: Path | None = option(
        None,
        "File of JUnit XML in which each condition and each exact task is a test.",
        example="accullm.xml",
    )
    summary: Path | None = option(
        None, "File of Markdown with the verdict and the figures, for a pull request.", example="summary.md"
    )


class Search(Section):
    """The search for the smallest artifact that meets the contract."""

    golden: bool = option(
        False,
        "Look for the smallest average of --bits with which the artifact meets the contract: plans are converted and "
        "measured on held-out text, and the one chosen is judged on text that the search never saw.",
    )
    max_bits_per_weight: float = option(
        6.0, "The largest average that the search may come to.", ge=2, le=8, example="5"
    )
    max_plans: int = option(5, "How many plans the search may try.", ge=1)


class Machine(Section):
    """Where and how the work is done."""

    run: Path | None = option(
        None, "Run directory, for resuming. Default: the artifact's directory followed by .run.", example="smollm2.run"
    )
    device: str = option(
        "auto",
        "Where everything is computed: forward passes, sums, gradients, rounding and measures, one block at a time. "
        "'auto' is the first GPU, where torch and the CUDA kernels can use one, and else the CPU; which GPU is said.",
        example="cuda:0",
        allowed="auto, cpu, cuda or cuda:N",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
    )
    threads: int | None = option(
        None,
        "CPU threads; fixed for a run. Default: as many as this process may use cores, by its affinity and its "
        "container's CPU quota.",
        example="4",
        ge=1,
    )
    precision: Literal["auto", "float32"] = option(
        "auto",
        "Precision of the matrix products in calibrate and quantize: 'auto' rounds their elements to bfloat16 on CPUs "
        "that multiply those faster (AMX, AVX512_BF16), and to TF32 on GPUs. Validation always computes in float32.",
    )
    seed: int = option(0, "Seed of every random choice.", allowed="0 to 2**63 - 1", ge=0, lt=2**63)


class Config(Section):
    """A conversion: the model, and a section for each concern."""

    model: str = Field(description="A directory, a GGUF file, a hub id (owner/name[@revision]) or an alias.")
    calibration: Calibration = Field(default_factory=Calibration)
    plan: PlanOptions = Field(default_factory=PlanOptions)
    rounding: Rounding = Field(default_factory=Rounding)
    export: Export = Field(default_factory=Export)
    validation: Validation = Field(default_factory=Validation)
    search: Search = Field(default_factory=Search)
    machine: Machine = Field(default_factory=Machine)

    @property
    def gradient_samples(self) -> int:
        """How many windows give gradients: as many as were asked for, else as what was asked for needs."""
        samples = self.calibration.gradient_samples
        if samples is None:
            samples = DEFAULT_GRADIENT_SAMPLES if self.plan.is_average or self.search.golden else 0
        return min(samples, self.calibration.samples)

    def to_yaml(self) -> str:
        """The config as a YAML file that `load_config` reads back to an equal one."""
        import yaml

        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
