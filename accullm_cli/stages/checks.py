"""What stops a conversion before its first forward pass."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from accullm_cli.config import Config
from accullm_cli.errors import AccullmError, MachineError
from accullm_cli.formats.capabilities import CAPABILITIES
from accullm_cli.formats.shards import read_json
from accullm_cli.measure.contract import check_needed, parse_requirement, search_demands
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.mixture import window_counts
from accullm_cli.model.text import check_text, other_sources
from accullm_cli.quant.encodings import ENCODINGS
from accullm_cli.run import RunDirectory
from accullm_cli.stages.answers import check_items
from accullm_cli.stages.calibrate import CALIBRATE
from accullm_cli.stages.device import check_device, check_format, compute_dtype
from accullm_cli.stages.export import check_output
from accullm_cli.stages.file_size import FLAG, file_bytes
from accullm_cli.stages.job import Job, open_decoder
from accullm_cli.stages.profile import make_plan, refuse_impossible
from accullm_cli.stages.reading import READING
from accullm_cli.stages.texts import check_texts
from accullm_cli.tasks import check_tasks, parse_tasks
from accullm_cli.units import size


def check_config(config: Config, run: RunDirectory, converts: bool, only_validates: bool) -> None:
    """Refuse what needs no look at the model.

    Args:
        converts: otherwise a finished artifact is validated. Both keep files of the same names, so neither goes into
            the other's run directory.
        only_validates: nothing else will be computed.
    """
    check_tasks(config.validation.tasks)
    tasks = [task.name for task in parse_tasks(config.validation.tasks)]
    check_needed([parse_requirement(text) for text in config.validation.require], tasks)
    check_result_file("--junit", config.validation.junit)
    check_result_file("--summary", config.validation.summary)
    check_device(config, only_validates)
    for name in config.export.format:
        check_format(config, name)
        _refuse_outliers(config, name)
        _refuse_randomness(config, name)
    _check_file_size(config)
    if config.search.golden:
        search_demands(config.validation.require)
        if len(config.export.format) > 1:
            raise AccullmError("searches for one artifact", "--golden", "give one --format, and another call to each")
    if config.plan.is_average or config.search.golden:
        flag = "--golden" if config.search.golden else "--bits"
        if not config.gradient_samples:
            what = "a plan needs gradients, which tell how much each linear matters"
            raise AccullmError(what, flag, "leave out --gradient-samples, or give more than 0")
    calibration = window_counts(config.calibration.text, config.calibration.samples)
    for text in (*calibration, config.validation.text, *other_sources(config.validation.other_text)):
        check_text(text)
    run.check()
    stages = run.stages().keys() - {READING.name}  # with which both begin
    if stages and (CALIBRATE.name in stages) != converts:
        what = "holds the validation of a finished artifact" if converts else "holds a conversion"
        raise AccullmError(what, run.path, "give another directory with --run")


def check_result_file(flag: str, path: Path | None) -> None:
    """Refuse a file for results that could not be written once they are there.

    Raises:
        AccullmError: it is a directory, or the directory that it would be in takes no files.
    """
    if path is None:
        return
    if path.is_dir():
        raise AccullmError("is a directory", f"{flag} {path}", "give a file")
    place = next(parent for parent in path.absolute().parents if parent.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise AccullmError(f"cannot be written in {place}", f"{flag} {path}", "give a file in a directory of yours")


def _check_file_size(config: Config) -> None:
    if config.plan.file_size is None:
        return
    file_bytes(config.plan.file_size)
    for name in config.export.format:
        if not CAPABILITIES[name].suffix:
            of_files = ", ".join(own for own, format in CAPABILITIES.items() if format.suffix)
            raise AccullmError(f"an artifact of {name} is not one file", FLAG, f"use --format {of_files}")
    if config.search.golden:
        raise AccullmError("a search finds the size by itself", FLAG, "leave out --golden")


def _refuse_outliers(config: Config, name: str) -> None:
    """Refuse outliers that were asked for in a format that has none, or elsewhere than it has them."""
    held, adapter = CAPABILITIES[name].outliers, config.plan.outlier_adapter
    if adapter and held != "as an adapter":
        what = f"{name} holds outlier features in its own files, and not in an adapter"
        hint = "leave out --outlier-adapter"
        if held == "not at all":
            what = f"{name} holds no outlier features, in an adapter neither"
            hint += f", or export to the format {_with_outliers('as an adapter')}"
        raise AccullmError(what, f"--format {name}", hint)
    if adapter and config.plan.outliers == 0:
        what = "--outliers 0 leaves nothing for an adapter to hold"
        raise AccullmError(what, "--outlier-adapter", "leave out one of the two")
    if adapter or held == "in the file":
        return
    asked = "--outliers" if config.plan.outliers else ""
    if config.plan.is_average and config.plan.spend == "outliers":
        asked = "--spend outliers"
    if asked:
        hint = "use --outliers 0" if asked == "--outliers" else "leave it out"
        another = f", or export to the format {_with_outliers('in the file')}"
        what = f"{name} holds no outlier features, which {asked} asks for"
        if held == "as an adapter":
            what = f"{name} holds outlier features in an adapter only, which {asked} does not ask for"
            hint = f"add --outlier-adapter, or {hint}"
        raise AccullmError(what, f"--format {name}", hint + another)


def _refuse_randomness(config: Config, name: str) -> None:
    """Refuse stochastic rounding where grids have no room for it."""
    if config.rounding.method != "stochastic" or _rounds_at_random(name, config.plan.encodings):
        return
    what, another = name, next(f"export to the format {own}" for own in CAPABILITIES if _rounds_at_random(own))
    if _rounds_at_random(name):
        what, another = f"--encodings {' '.join(config.plan.encodings)}", "leave out --encodings"
    raise AccullmError(
        f"{what} has grids that need not hold the range of the weights, so that they cannot be rounded at random",
        "--rounding stochastic",
        f"use another --rounding, or {another}",
    )


def _rounds_at_random(name: str, encodings: Sequence[str] = ()) -> bool:
    ways = CAPABILITIES[name].of_encodings(encodings).linears
    return any(ENCODINGS[way.encoding].rounds_at_random for way in ways)


def _with_outliers(held: str) -> str:
    """The first format that holds outliers so; "" where there is none."""
    return next((other for other, format in CAPABILITIES.items() if format.outliers == held), "")


def refuse_golden(config: Config, stage: str) -> None:
    """A search is no stage.

    Raises:
        AccullmError: the configuration asks for one.
    """
    if config.search.golden:
        raise AccullmError(f"is no part of {stage}", "--golden", "run accullm convert")


def check_positions(job: Job) -> None:
    """Refuse windows that are longer than what the model was made to read."""
    positions = job.positions
    if positions is not None and job.config.calibration.seq_len > positions:
        raise AccullmError(
            f"{job.config.calibration.seq_len} is more than the model's {positions} positions",
            "--seq-len",
            f"give {positions} or less",
        )


def check_sizes(job: Job, artifact: Path, given: Path) -> None:
    """Refuse an artifact that cannot have been made from the source, whoever made it.

    Args:
        artifact: its directory. given: what people call it.
    """
    config = read_json(artifact / "config.json")
    for key in ("hidden_size", "num_hidden_layers", "vocab_size"):
        own, original = config.get(key), job.source.config.get(key)
        if None not in (own, original) and own != original:
            raise AccullmError(
                f"was made from another model than {job.source.origin}: its {key} is {own}, and that one's {original}",
                given,
                "name its original with --original",
            )


def check_speed(job: Job, decoder: Decoder) -> None:
    """Refuse to time a model that does not fit into memory: the original and the artifact are each loaded whole.

    Raises:
        MachineError: says what it takes.
    """
    if not job.config.validation.speed:
        return
    weights = sum(parameter.numel() for parameter in decoder.model.parameters())
    needed = weights * compute_dtype(job.compute.device, job.source.config).itemsize
    free = job.compute.free_memory()
    if free is not None and needed > free:
        what = f"loads the original whole, which takes {size(needed)} of memory, of which {size(free)} are free"
        raise MachineError(what, "--speed", "leave it out, or free memory")


def preflight(job: Job) -> Decoder:
    """Refuse what cannot end well before the first forward pass: output directories, and what formats cannot hold."""
    for directory in job.artifacts.values():
        check_output(job, directory)
    check_texts(job, calibrates=True)
    check_items(job)
    decoder = open_decoder(job)
    check_speed(job, decoder)
    for own in map(job.of, job.artifacts):
        refuse_impossible(own, make_plan(own, decoder), decoder)
    return decoder
