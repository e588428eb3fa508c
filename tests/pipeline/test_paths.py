"""Where an artifact and its working files go."""

from __future__ import annotations

from pathlib import Path

import pytest

from accullm_cli.config import Config
from accullm_cli.places import artifact_path, run_path
from tests.pipeline.observe import refusal


@pytest.mark.parametrize(
    ("model", "bits", "name"),
    [
        ("work/smollm2-135m", 4, "smollm2-135m-int4"),
        ("work/smollm2-135m/", 3, "smollm2-135m-int3"),
        ("owner/Name-7B@main", 4, "Name-7B-int4"),
        ("models/tiny.gguf", 4, "tiny-int4"),
        ("llama-7b", 8, "llama-7b-int8"),
        ("llama-7b", 4.4, "llama-7b-int4.4"),
        ("llama-7b", 5.0, "llama-7b-int5.0"),
    ],
)
def test_the_artifact_is_named_after_the_model(model: str, bits: float, name: str) -> None:
    config = Config(model=model)
    config = config.model_copy(update={"plan": config.plan.model_copy(update={"bits": bits})})
    assert artifact_path(config) == Path(name)
    assert run_path(config) == Path(f"{name}.run")


def placed(out: Path, run: Path | None = None) -> Config:
    config = Config(model="m")
    return config.model_copy(
        update={
            "export": config.export.model_copy(update={"out": out}),
            "machine": config.machine.model_copy(update={"run": run}),
        }
    )


def test_the_run_directory_lies_beside_the_artifact_or_where_it_is_asked_for(tmp_path: Path) -> None:
    assert run_path(placed(tmp_path / "a")) == tmp_path / "a.run"
    assert run_path(placed(tmp_path / "a", tmp_path / "b")) == tmp_path / "b"


def test_the_current_directory_may_become_the_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no name of its own to make other names from."""
    (tmp_path / "int4").mkdir()
    monkeypatch.chdir(tmp_path / "int4")
    assert artifact_path(placed(Path("."))) == tmp_path / "int4"
    assert artifact_path(placed(Path(".."))) == tmp_path
    assert run_path(placed(Path("."))) == tmp_path / "int4.run"


def test_a_link_stays_one_and_the_artifact_lies_where_it_leads(tmp_path: Path) -> None:
    """Where nothing is yet, too; and two runs by both names are at one place, whose lock one of them gets."""
    (tmp_path / "large-disk").mkdir()
    for name in ("here", "there"):
        (tmp_path / name).symlink_to(tmp_path / "large-disk" / name)
    (tmp_path / "large-disk" / "here").mkdir()
    for name in ("here", "there"):
        assert artifact_path(placed(tmp_path / name)) == tmp_path / "large-disk" / name
        assert run_path(placed(tmp_path / name)) == tmp_path / "large-disk" / f"{name}.run"
    (tmp_path / "round").symlink_to(tmp_path / "round")
    assert artifact_path(placed(tmp_path / "round")) == tmp_path / "round"


def test_the_root_is_no_place_for_an_artifact() -> None:
    line = "/: is no place for an artifact; give another directory with --out"
    assert refusal(lambda: artifact_path(placed(Path("/")))) == line
