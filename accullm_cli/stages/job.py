"""What every stage gets: the configuration, the run directory, the source, and who is told about progress."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import transformers

from accullm_cli.config import Config, Section
from accullm_cli.formats import NATIVE
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.checkpoint import Checkpoint
from accullm_cli.model.skeleton import build_skeleton
from accullm_cli.model.source import ModelSource
from accullm_cli.model.structure import read_structure
from accullm_cli.model.text import Windows
from accullm_cli.model.tokenizer import load_tokenizer
from accullm_cli.places import artifact_paths
from accullm_cli.progress import Progress
from accullm_cli.run import RunDirectory
from accullm_cli.stages.compute import Compute, compute_of

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One conversion, or the validation of an artifact.

    only: the command whose stages alone may run, where it was not `convert`; all others must be up to date.
    fresh: those that may run do so, whatever is finished.
    windows: the texts that were cut into tokens so far, by name; see `stages.texts`.
    format: the artifact format that plan and shards are for; the first that was asked for, if nobody says.
    made: what else was made once for this job, by name; see `kept`.
    """

    config: Config
    run: RunDirectory
    source: ModelSource
    progress: Progress
    only: str | None = None
    fresh: bool = False
    windows: dict[str, Windows] = field(default_factory=dict, repr=False, compare=False)
    format: str = ""
    made: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", self.format or self.config.export.format[0])

    def of(self, format: str) -> Job:
        """The same conversion, to one of its formats: each has a plan and shards of its own."""
        return replace(self, format=format)

    def own(self, name: str) -> Path:
        """A file of the run that belongs to one format: the native one's lie in the run directory itself."""
        return self.run.file(place_of(self.format) + name)

    def kept(self, name: str, make: Callable[[], T]) -> T:
        """What `make` gives, made once for this job."""
        if name not in self.made:
            self.made[name] = make()
        return cast("T", self.made[name])

    @cached_property
    def tokenizer(self) -> transformers.PreTrainedTokenizerBase:
        """The source's."""
        return load_tokenizer(self.source.directory)

    @property
    def positions(self) -> int | None:
        """How many the model has; None where its configuration does not say."""
        text = self.source.config.get("text_config", self.source.config)
        found: int | None = text.get("max_position_embeddings", text.get("n_positions"))
        return found

    @property
    def compute(self) -> Compute:
        """Where and how it computes."""
        return self.kept("compute", lambda: compute_of(self.config))

    @property
    def artifacts(self) -> dict[str, Path]:
        """Where the artifact of each format goes."""
        return artifact_paths(self.config)


def place_of(format: str) -> str:
    """Where files that belong to a format lie in a run directory: "", or a directory with / behind it."""
    return "" if format == NATIVE else f"{format}/"


def open_decoder(job: Job) -> Decoder:
    """The source's decoder, without weights yet; refuses a checkpoint that does not fit its configuration."""
    model = build_skeleton(job.source.directory, job.source.untied)
    structure = job.kept("structure", lambda: read_structure(model))
    return Decoder(model, Checkpoint(job.source, model), structure, job.compute.device, job.compute.tokens)


def section_inputs(section: str, values: Section, *fields: str) -> dict[str, str]:
    """The stage inputs that a configuration section gives: `config:SECTION.FIELD` to its value."""
    chosen = fields or tuple(type(values).model_fields)
    return {f"config:{section}.{field}": repr(getattr(values, field)) for field in chosen}


def versions() -> dict[str, str]:
    """Versions of what computes, for the manifest."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
