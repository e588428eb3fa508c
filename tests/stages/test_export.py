"""export: an artifact appears whole or not at all, replaces only artifacts, and later runs leave it alone."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from accullm_cli.errors import AccullmError
from accullm_cli.formats import FORMATS, open_artifact
from accullm_cli.formats.accullm import AccullmFormat
from accullm_cli.run import Reason
from accullm_cli.stages.export import check_output, exporting
from tests.streaming import fast_config, opened, run_alone, run_to
from tests.tiny import make_checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def finished(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory in which everything up to export is done."""
    place = tmp_path_factory.mktemp("finished")
    with opened(fast_config(llama, place / "out")) as job:
        run_to(job, "export")
    return place / "out.run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy, whose artifact is `tmp_path`/out."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def export_to(llama: Path, run: Path, out: Path, force: bool = False, **settings: object) -> Reason:
    with opened(fast_config(llama, out, machine__run=run, **settings), fresh=force) as job:
        return run_alone(job, exporting(job.artifacts)).reason


def contents(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# -- what appears ------------------------------------------------------------------------------------------


def test_the_same_run_exports_the_same_bytes_anywhere(llama: Path, run: Path, finished: Path, tmp_path: Path) -> None:
    assert export_to(llama, run, tmp_path / "elsewhere").code == "config changed"
    assert contents(tmp_path / "elsewhere") == contents(finished.with_name("out"))
    assert names(tmp_path) == ["elsewhere", "run"]


def test_every_file_is_on_record(finished: Path) -> None:
    out = finished.with_name("out")
    recorded = json.loads((finished / "manifest.json").read_text())["stages"]["export"]["outputs"]
    assert recorded == {str(out / name): digest for name, digest in contents(out).items()}


def test_nothing_of_the_machine_is_in_the_artifact(llama: Path, finished: Path) -> None:
    """Paths would make artifacts of two machines differ, and tell where somebody keeps his models."""
    for path in finished.with_name("out").iterdir():
        assert str(llama.parent).encode() not in path.read_bytes()
        assert str(finished.parent).encode() not in path.read_bytes()


def test_provenance_holds_what_made_the_artifact_and_nothing_else(llama: Path, tmp_path: Path) -> None:
    """Not what measures it, nor where it was made; a text is named without its place."""
    settings = {"validation__other_text": tmp_path / "letters.txt", "validation__require": "[mean_kl<=9]"}
    (tmp_path / "letters.txt").write_text("dear sir " * 60)
    with opened(fast_config(llama, tmp_path / "out", **settings)) as job:
        run_to(job, "export")
    provenance = json.loads((tmp_path / "out/accullm.json").read_text())["provenance"]
    assert provenance.keys() == {"source", "source_sha256", "config", "seed", "versions", "records"}
    assert provenance["config"].keys() == {"calibration", "plan", "rounding"}
    assert provenance["config"]["calibration"] == {
        "text": "calibration.txt",
        "samples": 1,
        "seq_len": 48,
        "gradient_samples": None,
    }


def test_several_formats_get_a_directory_each(llama: Path, tmp_path: Path) -> None:
    settings = {"export__format": "[accullm,compressed-tensors]", "plan__outliers": 0}
    with opened(fast_config(llama, tmp_path / "out", **settings)) as job:
        assert job.artifacts == {
            "accullm": tmp_path / "out" / "accullm",
            "compressed-tensors": tmp_path / "out" / "compressed-tensors",
        }
        run_to(job, "export")
    assert names(tmp_path / "out") == ["accullm", "compressed-tensors"]
    for name in ("accullm", "compressed-tensors"):
        assert open_artifact(tmp_path / "out" / name).format == name


def test_one_format_gets_the_directory_itself(llama: Path, tmp_path: Path) -> None:
    with opened(fast_config(llama, tmp_path / "out")) as job:
        assert job.artifacts == {"accullm": tmp_path / "out"}


@pytest.mark.parametrize(("name", "embeddings"), [("llama", ["embedding", "head"]), ("llama-tied", ["head"])])
def test_quantized_embeddings_are_shards_behind_the_blocks(name: str, embeddings: list[str], tmp_path: Path) -> None:
    source = make_checkpoint(name, tmp_path / "model")
    with opened(fast_config(source, tmp_path / "out", plan__embedding_bits=8)) as job:
        run_to(job, "export")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    units = ["block-00000", "block-00001", *embeddings]
    assert len(shards) == len(units) + 1
    for unit, shard in zip(units, shards, strict=False):
        assert (tmp_path / f"out.run/quantize/{unit}.safetensors").samefile(shard)
    assert list(load_file(shards[-1])) == ["model.norm.weight"]


# -- replacing ---------------------------------------------------------------------------------------------


def earlier_artifact(out: Path) -> None:
    """Stands for an artifact of some other conversion."""
    out.mkdir()
    (out / "accullm.json").write_text("{}")
    (out / "model-00009-of-00009.safetensors").write_text("old")


def test_an_earlier_artifact_is_replaced_as_a_whole(llama: Path, run: Path, finished: Path, tmp_path: Path) -> None:
    earlier_artifact(tmp_path / "out")
    export_to(llama, run, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(finished.with_name("out"))
    assert names(tmp_path) == ["out", "run"]


class KilledError(Exception):
    pass


def test_killed_while_writing_it_leaves_the_earlier_artifact(
    llama: Path, run: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier_artifact(tmp_path / "out")
    before = contents(tmp_path / "out")

    def killed(self: AccullmFormat, directory: Path, parts: object) -> None:
        (directory / "half.safetensors").write_text("half")
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(AccullmFormat, "write", killed)
        with pytest.raises(KilledError):
            export_to(llama, run, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert names(tmp_path) == ["out", "run"]
    export_to(llama, run, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(finished.with_name("out"))


@pytest.mark.parametrize("renames", [0, 1], ids=["before both", "between them"])
def test_killed_around_the_renames_the_next_call_restores(
    renames: int, llama: Path, run: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies: nothing cleans up behind it."""
    out = tmp_path / "out"
    earlier_artifact(out)
    done: list[str] = []
    rename = Path.rename

    def dying(self: Path, target: Path) -> Path:
        if len(done) == renames:
            raise KilledError
        done.append(self.name)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying)
        with pytest.raises(KilledError):
            export_to(llama, run, out)
    assert out.exists() == (renames == 0)
    assert (tmp_path / ".out.partial").exists()
    export_to(llama, run, out)
    assert contents(out) == contents(finished.with_name("out"))
    assert names(tmp_path) == ["out", "run"]


@pytest.mark.parametrize("moment", range(1, 7))
@pytest.mark.parametrize("earlier", [False, True], ids=["nothing there", "an artifact there"])
def test_killed_at_any_step_it_neither_refuses_nor_loses_the_earlier_artifact(
    moment: int,
    earlier: bool,
    llama: Path,
    run: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process dies right before the nth thing that it does to a directory, in the check or in the export."""
    out = tmp_path / "out"
    if earlier:
        earlier_artifact(out)
    before = contents(out)
    steps: list[str] = []

    def die_at(name: str, moments: int, call):  # type: ignore[no-untyped-def]
        def dying(path, *args, **kwargs):  # type: ignore[no-untyped-def]
            if len(steps) + 1 >= moments:
                raise KilledError
            if ".out." in str(path) or path == out:
                steps.append(f"{name} {Path(path).name}")
            return call(path, *args, **kwargs)

        return dying

    def checked_export() -> None:
        with opened(fast_config(llama, out, machine__run=run)) as job:
            check_output(job, out)
        export_to(llama, run, out)

    for dies_at in (moment, moment + 1):  # the second time in what the first time left
        steps.clear()
        with monkeypatch.context() as patch:
            for name in ("mkdir", "rmdir", "rename"):
                patch.setattr(Path, name, die_at(name, dies_at, getattr(Path, name)))
            patch.setattr(shutil, "rmtree", die_at("rmtree", dies_at, shutil.rmtree))
            try:
                checked_export()
            except KilledError:
                held = [contents(place) for place in (out, tmp_path / ".out.old") if place.exists()]
                assert not earlier or before in held or contents(out) == contents(finished.with_name("out"))
    checked_export()
    assert contents(out) == contents(finished.with_name("out"))
    assert names(tmp_path) == ["out", "run"]


@pytest.mark.parametrize("kind", ["probe", "partial", "old"])
@pytest.mark.parametrize("what", ["empty", "full", "file", "link"])
def test_a_leftover_of_any_kind_is_no_obstacle(
    kind: str, what: str, llama: Path, run: Path, finished: Path, tmp_path: Path
) -> None:
    leftover = tmp_path / f".out.{kind}"
    if what == "link":
        leftover.symlink_to(finished)
    elif what == "file":
        leftover.write_text("")
    else:
        leftover.mkdir()
        if what == "full":
            (leftover / "half.safetensors").write_text("half")
    with opened(fast_config(llama, tmp_path / "out", machine__run=run)) as job:
        check_output(job, tmp_path / "out")
    export_to(llama, run, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(finished.with_name("out"))
    assert [name for name in names(tmp_path) if name != f".out.{kind}"] == ["out", "run"]
    assert (finished / "manifest.json").exists()


def test_a_leftover_of_several_exports_is_no_file_of_others(llama: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for kind in ("partial", "old"):
        (out / f".accullm.{kind}").mkdir(parents=True)
    with opened(fast_config(llama, out, machine__run=run)) as job:
        check_output(job, out)
        (out / ".mine").mkdir()
        with pytest.raises(AccullmError, match=r"holds something else than an artifact"):
            check_output(job, out)


@pytest.mark.parametrize("lost", ["config.json", "accullm.json"])
def test_an_artifact_that_lost_a_file_is_made_again(
    lost: str, llama: Path, run: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export_to(llama, run, out)
    assert export_to(llama, run, out) == Reason("up to date")
    (out / lost).unlink()
    assert export_to(llama, run, out) == Reason("output missing", str(out / lost))
    assert contents(out) == contents(finished.with_name("out"))


# -- links between run and artifact ------------------------------------------------------------------------


def test_a_later_run_does_not_change_an_exported_artifact(llama: Path, tmp_path: Path) -> None:
    """Blocks are linked, not copied; what quantize writes next is another file."""
    run = tmp_path / "run"
    with opened(fast_config(llama, tmp_path / "first", machine__run=run)) as job:
        run_to(job, "export")
    before = contents(tmp_path / "first")
    assert (run / "quantize" / "block-00000.safetensors").stat().st_nlink == 2
    with opened(fast_config(llama, tmp_path / "second", machine__run=run, plan__bits=3)) as job:
        run_to(job, "export")
    assert contents(tmp_path / "first") == before
    assert contents(tmp_path / "second") != before


def test_deleting_the_run_leaves_the_artifact(llama: Path, run: Path, finished: Path, tmp_path: Path) -> None:
    export_to(llama, run, tmp_path / "out")
    shutil.rmtree(run)
    assert contents(tmp_path / "out") == contents(finished.with_name("out"))


def test_damage_to_a_linked_block_is_not_exported_again(llama: Path, run: Path, tmp_path: Path) -> None:
    """Its hash in a new manifest would make the damage look genuine."""
    export_to(llama, run, tmp_path / "out")
    linked = tmp_path / "out" / "model-00001-of-00003.safetensors"
    with open(linked, "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(AccullmError) as refusal:
        export_to(llama, run, tmp_path / "out", force=True)
    assert refusal.value.line() == (
        f"{run}/quantize/block-00000.safetensors: is not as quantize wrote it; delete it and run the same command again"
    )
    assert linked.exists()
    assert names(tmp_path) == ["out", "run"]


# -- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("{source}", "{out}: is the model that is being read; give another directory with --out"),
        ("{source}/int4", "{out}: is the model that is being read; give another directory with --out"),
        ("{tmp}/link", "{out}: is the model that is being read; give another directory with --out"),
        ("{tmp}/file", "{out}: is a file, not a directory; give another directory with --out"),
        (
            "{tmp}/mine",
            "{out}: holds something else than an artifact; give an empty or new directory with --out",
        ),
        ("{tmp}/empty", None),
        ("{tmp}/artifact", None),
        ("{tmp}/new/deep/inside", None),
    ],
)
def test_where_an_artifact_may_go(
    place: str, line: str | None, llama: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (tmp_path / "link").symlink_to(llama)
    (tmp_path / "file").write_text("")
    for name in ("mine", "empty", "artifact"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    (tmp_path / "artifact" / "accullm.json").write_text("{}")
    before = sorted(path for path in tmp_path.rglob("*"))
    out = Path(place.format(source=llama, tmp=tmp_path))
    with opened(fast_config(llama, out, machine__run=tmp_path_factory.mktemp("run"))) as job:
        if line is None:
            check_output(job, out)
        else:
            with pytest.raises(AccullmError) as refusal:
                check_output(job, out)
            assert refusal.value.line() == line.format(out=out)
            assert refusal.value.exit_code == 2
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_every_format_that_can_be_asked_for_is_one() -> None:
    assert list(FORMATS) == ["accullm", "compressed-tensors", "mlx", "gguf", "gptq_v2", "gptq", "awq"]
