"""export: from the shards that quantize wrote to an artifact in each requested format."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accullm_cli.errors import AccullmError
from accullm_cli.formats import FORMATS
from accullm_cli.formats.base import Parts
from accullm_cli.formats.manifest import MANIFEST_NAME, artifact_files
from accullm_cli.model.blocks import Decoder
from accullm_cli.model.checkpoint import Checkpoint
from accullm_cli.progress import Event
from accullm_cli.run import existing_parent, file_sha256, machine_errors, sync_directory
from accullm_cli.stages.file_size import made_from
from accullm_cli.stages.job import Job, open_decoder, versions
from accullm_cli.stages.model_shape import model_shape
from accullm_cli.stages.profile import load_plan
from accullm_cli.stages.stage import Before, Decision, Stage, Work, named
from accullm_cli.stages.units import load_record, shard_path, units_of

VERSION = 4
# The input that says where the artifact of a format goes.
PLACE = "config:export.out ({})"
# What lies beside an artifact while a run works on it: directories of a check, of the artifact that is being written
# and of the one before it, and the lock.
_BESIDE = ("probe", "partial", "old", "lock")


def export(job: Job, decision: Decision) -> Work:
    """Assemble the artifact of each requested format; a directory appears whole or not at all."""
    decoder = open_decoder(job)
    files: list[Path] = []
    for number, (name, directory) in enumerate(job.artifacts.items(), 1):
        _write_artifact(job, decoder, name, directory)
        files += [directory / file for file in artifact_files(directory)] + [directory / MANIFEST_NAME]
        told = f"{name} to {directory}"
        job.progress(Event(decision.stage, "step", told, decision.reason, number, len(job.artifacts)))
    return Work(tuple(files))


def export_inputs(job: Job, before: Before) -> dict[str, str]:
    """What the artifacts depend on."""
    return {
        **{f"input:{stage}": before[stage].key for stage in (named("quantize", name) for name in job.artifacts)},
        "source:companions": job.source.companions_sha256,
        "version:export": str(VERSION),
        **{PLACE.format(name): str(path.absolute()) for name, path in job.artifacts.items()},
    }


def exporting(formats: Iterable[str]) -> Stage:
    """The stage that writes the artifacts of these formats."""
    return Stage("export", export_inputs, export, tuple(named("quantize", name) for name in formats), ("export",))


def known_files(job: Job, inputs: Mapping[str, str], name: str) -> dict[str, str] | None:
    """The files (SHA-256 by relative name) that the artifact of a format will have, where an earlier export tells.

    The same inputs give the same bytes, wherever they are written to. None where these inputs are new.
    """
    place = PLACE.format(name)
    record = job.run.stages().get("export")
    if record is None or place not in record.inputs or _but_places(record.inputs, name) != _but_places(inputs, name):
        return None
    directory = Path(record.inputs[place])
    paths = {job.run.file(output).absolute(): digest for output, digest in record.outputs.items()}
    return {
        path.relative_to(directory).as_posix(): digest
        for path, digest in paths.items()
        if path.is_relative_to(directory)
    }


def _but_places(inputs: Mapping[str, str], name: str) -> dict[str, str]:
    """What the bytes of a format's artifact depend on."""
    of_others = {f"input:{named('quantize', other)}" for other in FORMATS if other != name}
    places = PLACE.format("")[:-1]
    return {key: value for key, value in inputs.items() if key not in of_others and not key.startswith(places)}


def check_output(job: Job, directory: Path) -> None:
    """Refuse an output directory that holds something else than an artifact, or that is being read.

    Raises:
        AccullmError: it is the source, or inside it, or holds other files; MachineError: it cannot be written.
    """
    source = job.source.directory.resolve()
    if directory.resolve() == source or source in directory.resolve().parents:
        raise AccullmError("is the model that is being read", directory, "give another directory with --out")
    if directory.is_file():
        raise AccullmError("is a file, not a directory", directory, "give another directory with --out")
    # What a killed export of several formats, each in a directory of its own below this one, may have left.
    leftovers = {_beside(directory / name, kind) for name in FORMATS for kind in _BESIDE}
    holds = directory.is_dir() and any(path not in leftovers for path in directory.iterdir())
    if holds and not (directory / MANIFEST_NAME).exists():
        raise AccullmError(
            "holds something else than an artifact", directory, "give an empty or new directory with --out"
        )
    with machine_errors(directory):
        probe = existing_parent(directory.parent) / _beside(directory, "probe").name
        _remove(probe)
        probe.mkdir()
        probe.rmdir()


def _write_artifact(job: Job, decoder: Decoder, name: str, directory: Path) -> None:
    """Write beside `directory` and rename: an artifact that was there is replaced in one step."""
    partial, old = _beside(directory, "partial"), _beside(directory, "old")
    with machine_errors(directory):
        if old.is_dir() and not directory.exists():
            # Killed between the two renames below: the earlier artifact stays until there is a new one.
            old.rename(directory)
        for leftover in (partial, old):
            _remove(leftover)
        partial.mkdir(parents=True)
        try:
            FORMATS[name].write(partial, _parts(job.of(name), decoder))
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if directory.exists():
            directory.rename(old)
        partial.rename(directory)
        sync_directory(directory.parent)
        shutil.rmtree(old, ignore_errors=True)


def _beside(directory: Path, kind: str) -> Path:
    """What an export has beside the artifact's own directory."""
    return directory.with_name(f".{directory.name}.{kind}")


def _remove(leftover: Path) -> None:
    """Remove what a killed export left under this name; nothing else has one like it."""
    if leftover.is_dir() and not leftover.is_symlink():
        shutil.rmtree(leftover)
    else:
        leftover.unlink(missing_ok=True)


def _parts(job: Job, decoder: Decoder) -> Parts:
    plan = load_plan(job.own("plan.json"))
    checkpoint = decoder.weights
    assert isinstance(checkpoint, Checkpoint)
    units = units_of(decoder, plan)
    shards = {unit.name: _checked_shard(job, unit.name) for unit in units}
    return Parts(
        config={key: value for key, value in job.source.config.items() if key != "quantization_config"},
        companions=job.source.companions,
        plan=plan,
        shape=model_shape(job, decoder, plan),
        blocks=tuple(shards[unit.name] for unit in units if unit.block is not None),
        outside=checkpoint.outside(decoder.block_names, {f"{name}.weight" for name in plan.embeddings}),
        provenance=_provenance(job, decoder, [unit.name for unit in units]),
        embeddings=tuple(shards[unit.name] for unit in units if unit.block is None),
        kept=job.source.kept,
    )


def _checked_shard(job: Job, unit: str) -> Path:
    """A unit's shard. An earlier artifact may hold a link to it, so what was done to that was done to this.

    Raises:
        AccullmError: it is not as quantize wrote it.
    """
    path, record = shard_path(job, unit), load_record(job, unit)
    if record is None or file_sha256(path) != record.sha256:
        raise AccullmError("is not as quantize wrote it", path, "delete it and run the same command again")
    return path


def _provenance(job: Job, decoder: Decoder, units: list[str]) -> Mapping[str, Any]:
    """Where the artifact comes from, without anything that differs between two runs of the same conversion."""
    records = [*job.source.records, *decoder.structure.records]
    for unit in units:
        record = load_record(job, unit)
        records += record.records if record else []
    return {
        **made_from(job),
        "seed": job.config.machine.seed,
        "versions": versions(),
        "records": records,
    }
