"""The commands that ask: what is in a model or an artifact, and what the machine has. None of them converts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from accullm_cli.config_options import config_schema
from accullm_cli.errors import EXIT_NOT_SO, EXIT_OK, AccullmError
from accullm_cli.flags import (
    DiagnoseBy,
    DiagnoseTokens,
    DiagnoseWindows,
    Json,
    MaxMeanKl,
    Original,
    Quiet,
    Verbose,
    complete_model,
)
from accullm_cli.outcome import Outcome, result_of


def inspect_command(
    ctx: typer.Context,
    path: Annotated[str, typer.Argument(metavar="PATH", autocompletion=complete_model, help="A model or an artifact.")],
    as_json: Json = False,
    verbose: Verbose = False,
) -> Outcome:
    """What is in a model or an artifact: bits per weight by layer, outliers, provenance."""
    ctx.obj.verbose = verbose
    from accullm_cli.commands.inspect import inspect

    return result_of(as_json, "inspection", inspect(Path(path)))


def compare_command(
    ctx: typer.Context,
    first: Annotated[str, typer.Argument(metavar="A", help="The directory of an artifact.")],
    second: Annotated[str, typer.Argument(metavar="B", help="That of another artifact, or of the original.")],
    max_mean_kl: MaxMeanKl = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> Outcome:
    """Two artifacts, or an artifact and its original, side by side."""
    ctx.obj.verbose = verbose
    from accullm_cli.commands.compare import compare

    comparison = compare(Path(first), Path(second), max_mean_kl=max_mean_kl)
    return result_of(as_json, "comparison", comparison, EXIT_NOT_SO if comparison.exceeded else EXIT_OK)


def diagnose_command(
    ctx: typer.Context,
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help="The artifact's directory.")],
    original: Original = None,
    by: DiagnoseBy = "block",
    windows: DiagnoseWindows = 4,
    seq_len: DiagnoseTokens = 256,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> Outcome:
    """Where an artifact's loss comes from: each block or linear back to full precision, what that gains, what it costs.

    The parts are ranked by their gain in mean KL; the advice is the change that gains most per bit.
    """
    ctx.obj.verbose, ctx.obj.quiet = verbose, quiet
    if by not in ("block", "linear"):
        raise AccullmError(f"{by!r} is no part of a model", "--by", "give block or linear")
    from accullm_cli.commands.diagnose import diagnose

    part: Literal["block", "linear"] = "block" if by == "block" else "linear"
    found = diagnose(Path(artifact), original, part, windows, seq_len, progress=ctx.obj.progress)
    return result_of(as_json, "diagnosis_of_loss", found)


def verify_command(
    ctx: typer.Context,
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help="The artifact's directory.")],
    as_json: Json = False,
    verbose: Verbose = False,
) -> Outcome:
    """Hold every file of an artifact against its manifest, and every tensor against its schema."""
    ctx.obj.verbose = verbose
    from accullm_cli.commands.verify import verify

    verification = verify(Path(artifact))
    return result_of(as_json, "verification", verification, EXIT_NOT_SO if verification.problems else EXIT_OK)


def doctor_command(ctx: typer.Context, as_json: Json = False, verbose: Verbose = False) -> Outcome:
    """What this machine has and lacks: Python, torch, GPU, kernels; and how to get what is missing."""
    ctx.obj.verbose = verbose
    from accullm_cli.commands.doctor import doctor

    diagnosis = doctor()
    failed = any(check.required and not check.ok for check in diagnosis.checks)
    return result_of(as_json, "diagnosis", diagnosis, EXIT_NOT_SO if failed else EXIT_OK)


def models_command(ctx: typer.Context, as_json: Json = False, verbose: Verbose = False) -> Outcome:
    """The model names that stand for a source, with size and origin."""
    ctx.obj.verbose = verbose
    from accullm_cli.commands.models import models

    return result_of(as_json, "models", models())


def schema_command() -> Outcome:
    """The JSON Schema of the configuration file, for editors and other programs."""
    import json

    return Outcome(json.dumps(config_schema(), indent=1))
