"""A zoo on a real Ray cluster of two nodes on this machine, one of which is lost in the middle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from accullm_cli.errors import AccullmError, MachineError
from accullm_cli.pipeline import convert
from accullm_cli.progress import Event
from accullm_cli.stages.estimate import Estimated
from accullm_cli.zoo import cluster as cluster_module
from accullm_cli.zoo.cluster import SPEAKER, convert_on_ray, resources_of, said_by_ray, signals_wait
from accullm_cli.zoo.conversions import check_zoo, convert_zoo
from accullm_cli.zoo.file import read_zoo
from tests.end_to_end.test_resume import contents
from tests.tiny import make_checkpoint

# Long enough that a node is lost in the middle of a conversion.
SHARED = """
calibration: {samples: 64, seq_len: 128}
plan: {group_size: 32}
validation: {windows: 32, other_text: none, require: [mean_kl<=9]}
machine: {threads: 1}
"""


def write_zoo(directory: Path, text: str) -> Path:
    path = directory / "zoo.yaml"
    path.write_text(text)
    return path


# -- without a cluster ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "needed"),
    [
        ("{threads: 3}", {"num_cpus": 3, "num_gpus": 0, "memory": 7}),
        ("{threads: 2, device: cuda}", {"num_cpus": 2, "num_gpus": 1, "memory": 7}),
        ("{device: 'cuda:0'}", {"num_cpus": 1, "num_gpus": 1, "memory": 7}),
    ],
)
def test_a_task_asks_for_what_its_conversion_needs(machine: str, needed: dict[str, float], tmp_path: Path) -> None:
    (entry,) = read_zoo(write_zoo(tmp_path, f"machine: {machine}\nmodels: [llama-7b]\n")).entries
    estimated = {name: Estimated(4.2, 1, True, peak, 1, 1.0) for name, peak in (("accullm", 5), ("gguf", 7))}
    assert resources_of(entry, estimated) == needed
    assert "memory" not in resources_of(entry, None)


def test_ray_chooses_the_gpu(tmp_path: Path) -> None:
    path = write_zoo(tmp_path, "machine: {device: 'cuda:1'}\nmodels: [llama-7b]\n")
    with pytest.raises(AccullmError) as refused:
        resources_of(read_zoo(path).entries[0], None)
    assert refused.value.line() == f"{path}:2: machine.device: Ray chooses the GPU, and cuda:1 names one; give cuda"


def test_without_ray_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(AccullmError) as refused:
        list(convert_on_ray("auto", {})((), lambda event: None))
    assert refused.value.line() == "--ray: ray is not installed; pip install 'accullm[ray]'"


def test_a_signal_waits_until_it_may_interrupt() -> None:
    seen: list[int] = []

    def handler(number: int, frame: object) -> None:
        seen.append(number)

    before = signal.signal(signal.SIGINT, handler)
    try:
        with signals_wait() as interrupt:
            interrupt()
            os.kill(os.getpid(), signal.SIGINT)
            assert seen == []
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # a second one does not wait
            interrupt()
            assert seen == [signal.SIGINT]
        signal.signal(signal.SIGINT, handler)
        with signals_wait():
            assert signal.getsignal(signal.SIGINT) is not handler
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_ray_prints_is_no_result(capsys: pytest.CaptureFixture[str]) -> None:
    message = "\x1b[33m(raylet)\x1b[0m A node was lost.\n    [state-dump]\n"
    with said_by_ray() as said:
        thread = threading.Thread(target=print, args=(message,), name=SPEAKER)
        thread.start()
        thread.join()
        print("a result")
    assert said == ["(raylet) A node was lost."]
    assert capsys.readouterr().out == "a result\n"


def test_a_cluster_that_is_lost_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class RayError(Exception):
        pass

    @contextmanager
    def connected(address: str) -> Iterator[Any]:
        yield SimpleNamespace(exceptions=SimpleNamespace(RayError=RayError))

    def lost(*args: object) -> None:
        raise RayError("The actor died.\nIts node is dead.")

    monkeypatch.setattr(cluster_module, "_connected", connected)
    monkeypatch.setattr(cluster_module, "_convert_all", lost)
    with pytest.raises(MachineError) as refused:
        list(convert_on_ray("here:1", {})((), lambda event: None))
    assert refused.value.line() == (
        "--ray here:1: the cluster, or this machine's place in it, was lost (The actor died); run the same command "
        "again to resume"
    )


# -- on a cluster --------------------------------------------------------------------------------------------------


@pytest.fixture
def ray() -> Any:
    return pytest.importorskip("ray", reason="ray is not installed (pip install 'accullm[ray]')")


@pytest.fixture
def cluster(ray: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without CPUs, on which this process is, and two nodes with one each."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    small = {"object_store_memory": 80_000_000, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    made.two = [made.add_node(num_cpus=1, **small) for _ in range(2)]
    made.wait_for_nodes()
    try:
        yield made
    finally:
        made.shutdown()


def test_an_address_without_a_cluster_is_one_line(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(AccullmError) as refused:
        list(convert_on_ray("auto", {})((), lambda event: None))
    assert refused.value.exit_code == 2
    assert refused.value.line().startswith("--ray auto: no Ray cluster there (")
    assert refused.value.line().endswith("; start one with ray start --head, or leave out --ray")


def test_conversions_go_on_from_their_run_directories_when_a_node_is_lost(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four models on two nodes; the fourth misses its contract, and the third cannot be converted."""
    monkeypatch.chdir(tmp_path)
    model = make_checkpoint("llama", tmp_path / "models" / "a")
    for name in ("b", "c", "d"):
        shutil.copytree(model, tmp_path / "models" / name)
    own = "  - models/a\n  - models/b\n  - models/c\n  - {model: models/d, validation: {require: [mean_kl<=0]}}\n"
    zoo = read_zoo(write_zoo(tmp_path, f"{SHARED}models:\n{own}"))
    estimates = check_zoo(zoo)
    (tmp_path / "models" / "c" / "tokenizer.json").write_text("{")  # since it was checked
    lost: list[str] = []
    events: list[tuple[str, str]] = []

    def lose_a_node(event: Event) -> None:
        events.append((event.stage, event.kind))
        if event.stage.endswith(": reading") and event.kind == "end" and not lost:
            lost.append(event.stage.partition(":")[0])
            cluster.remove_node(_node_of(cluster, lost[0]), allow_graceful=False)

    results = convert_zoo(zoo, convert_on_ray(cluster.address, estimates), lose_a_node)
    assert [(result.name, result.exit_code) for result in results] == [
        ("a-int4", 0),
        ("b-int4", 0),
        ("c-int4", 2),
        ("d-int4", 3),
    ]
    assert "tokenizer" in results[2].error
    assert lost
    # What was done on the node that was lost is not done again.
    assert events.count((f"{lost[0]}: reading", "start")) == 1
    assert events.count((f"{lost[0]}: reading", "skip")) == 1
    (entry,) = (entry for entry in zoo.entries if entry.name == lost[0])
    out = entry.config.export.model_copy(update={"out": tmp_path / "alone"})
    convert(entry.config.model_copy(update={"export": out}))
    assert contents(tmp_path / "alone") == contents(tmp_path / "zoo-out" / lost[0])


def test_ctrl_c_ends_all_tasks_and_the_same_command_resumes_them(cluster: Any, tmp_path: Path) -> None:
    model = make_checkpoint("llama", tmp_path / "models" / "a")
    shutil.copytree(model, tmp_path / "models" / "b")
    write_zoo(tmp_path, f"{SHARED}models: [models/*]\n")
    command = [sys.executable, "-m", "accullm_cli", "zoo", "zoo.yaml", "--ray", cluster.address]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        while not any((tmp_path / "zoo-out" / f"{name}-int4.run" / "plan.json").exists() for name in "ab"):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert (out, err.splitlines()[-1]) == ("", "interrupted; run the same command again to resume")
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert again.stdout == "zoo-out/a-int4\nzoo-out/b-int4\n"
    assert "calibrate: up to date" in again.stderr


def _node_of(cluster: Any, name: str) -> Any:
    """The node on which this model is converted: it started the process that holds the run directory."""
    pid = json.loads(Path("zoo-out", f"{name}.run", ".lock").read_text())["pid"]
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return next(node for node in cluster.two if node.all_processes["raylet"][0].process.pid == parent)
