"""Streamed decoders, single stages and their references on tiny models with short texts."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from accullm_cli.config import Config
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.checkpoint import Checkpoint
from accullm_cli.model.skeleton import build_skeleton
from accullm_cli.model.source import open_source
from accullm_cli.places import run_path
from accullm_cli.progress import Progress, silent
from accullm_cli.run import UP_TO_DATE, RunDirectory
from accullm_cli.stages.graph import conversion
from accullm_cli.stages.job import Job
from accullm_cli.stages.stage import Decision, Stage, StageOutcome, upstream, walk
from tests.tiny import tiny_config

FAST = {"rounding__method": "nearest", "rounding__grid": "minmax", "calibration__samples": 1}
WORDS = "the a of to in is and with or if not grid scale block input row weight error".split()


def random_ids(windows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Ordinary tokens of the tiny tokenizer."""
    return torch.randint(0, 256, (windows, tokens), generator=torch.Generator().manual_seed(seed))


def streamed(directory: Path, cache: Path) -> Decoder:
    """The decoder of a checkpoint, without weights yet."""
    source = open_source(str(directory), cache)
    model = build_skeleton(directory, source.untied)
    return Decoder(model, Checkpoint(source, model))


def reference_model(directory: Path) -> PreTrainedModel:
    """The same model as transformers loads it, in float32. Experts run one by one, so that sums have one order."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager")
    return model.eval().requires_grad_(False)


def write_text(path: Path, seed: int) -> Path:
    """Some 4,000 characters of words in random order."""
    words = random.Random(seed)
    path.write_text(" ".join(words.choice(WORDS) for _ in range(900)))
    return path


def short_config(model: Path, out: Path, **settings: object) -> Config:
    """As `tiny_config`, on texts that need no packaged ones: they lie beside the model."""
    texts = {
        "calibration__text": write_text(model.with_name("calibration.txt"), 1),
        "validation__text": write_text(model.with_name("validation.txt"), 2),
    }
    return tiny_config(model, out, **(texts | settings))


def fast_config(model: Path, out: Path, **settings: object) -> Config:
    """As `short_config`, rounded in the fastest way: where it does not matter how well."""
    return short_config(model, out, **(FAST | settings))


def copy_run(out: Path, place: Path) -> Path:
    """Copy an artifact and the run directory beside it, which a test may change: they are where their manifest says."""
    copy = shutil.copytree(out, place / out.name)
    run = shutil.copytree(out.with_name(f"{out.name}.run"), place / f"{out.name}.run")
    manifest = run / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(out), str(copy)))
    return copy


@contextmanager
def opened(config: Config, progress: Progress = silent, only: str | None = None, fresh: bool = False) -> Iterator[Job]:
    """The job of a configuration, as the pipeline opens it but without its checks."""
    run = RunDirectory(run_path(config))
    with run.locked():
        yield Job(config, run, open_source(config.model, run.path, progress), progress, only, fresh)


def run_to(job: Job, *last: str) -> dict[str, StageOutcome]:
    """Run the stages of these names or commands, and all before them."""
    stages = conversion(job)
    names = {stage.name for stage in stages if {stage.name, *stage.commands} & set(last)}
    return {outcome.name: outcome for outcome in walk(job, upstream(stages, names))}


def run_alone(job: Job, stage: Stage, **before: str) -> StageOutcome:
    """Run one stage, whatever has become of those before it; `before` gives them other keys than their records'."""
    known = {name: Decision(name, record.inputs, UP_TO_DATE) for name, record in job.run.stages().items()}
    known |= {name: Decision(name, {"key": key}, UP_TO_DATE) for name, key in before.items()}
    known.pop(stage.name, None)
    (outcome,) = walk(job, [stage], known)
    return outcome
