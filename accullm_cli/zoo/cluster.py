"""A zoo on a Ray cluster: each conversion is a task with the CPUs, GPUs and memory that it needs.

Ray decides what runs where, and starts a task again whose node is lost; the run directory, on storage that the nodes
share, says how far it was. Nothing is kept anywhere else.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from types import ModuleType
from typing import Any

from accullm_cli.errors import EXIT_MACHINE, AccullmError, MachineError
from accullm_cli.failure import failure_of
from accullm_cli.measure.result import ModelResult
from accullm_cli.pipeline import chosen_threads
from accullm_cli.places import run_path
from accullm_cli.progress import Event, Progress
from accullm_cli.run import RunDirectory
from accullm_cli.stages.estimate import Estimated
from accullm_cli.zoo.conversions import Converter, Estimates, convert_entry, told_of
from accullm_cli.zoo.file import Entry, on_machine

# How often a conversion may lose its node.
RETRIES = 3
# Seconds for which a task waits where the one before it, on a lost node, still holds the run directory.
PATIENCE = 120.0
# Seconds between two looks at what the tasks have to tell.
POLL = 0.5
# Ray's thread that prints on stdout what the cluster has to say, and the characters of a message that are shown.
SPEAKER, SHOWN = "ray_listen_error_messages", 300


def convert_on_ray(address: str, estimates: Estimates) -> Converter:
    """Each model as a task on the cluster at `address`; "auto" is the one that this machine is in.

    Raises:
        AccullmError: Ray is not installed, or there is no cluster. MachineError: it is there no more.
    """

    def convert(entries: Sequence[Entry], progress: Progress) -> Iterable[ModelResult]:
        with _connected(address) as ray, said_by_ray() as said, signals_wait() as interrupt:
            try:
                yield from _convert_all(ray, entries, estimates, progress, said, interrupt)
            except ray.exceptions.RayError as error:
                what = f"the cluster, or this machine's place in it, was lost ({_first_line(error)})"
                raise MachineError(what, f"--ray {address}", "run the same command again to resume") from error

    return convert


def resources_of(entry: Entry, estimated: Mapping[str, Estimated] | None) -> dict[str, float]:
    """What a conversion needs of a node: its threads, a GPU where it asks for one, and its estimated peak memory.

    Raises:
        AccullmError: it names one GPU of several, where Ray chooses.
    """
    device, threads = entry.config.machine.device, entry.config.machine.threads
    if device.startswith("cuda:") and device != "cuda:0":
        where = f"{entry.where}: machine.device"
        raise AccullmError(f"Ray chooses the GPU, and {device} names one", where, "give cuda")
    needed: dict[str, float] = {"num_cpus": threads or 1, "num_gpus": int(device.startswith("cuda"))}
    if estimated is not None:
        needed["memory"] = max(its.peak_bytes for its in estimated.values())
    return needed


@contextmanager
def _connected(address: str) -> Iterator[ModuleType]:
    try:
        import ray
    except ImportError:
        raise AccullmError("ray is not installed", "--ray", "pip install 'accullm[ray]'") from None
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        hint = "start one with ray start --head, or leave out --ray"
        raise AccullmError(f"no Ray cluster there ({_first_line(error)})", f"--ray {address}", hint) from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray puts its own in this place
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def signals_wait() -> Iterator[Callable[[], None]]:
    """Keep SIGINT and SIGTERM until what this gives is called: there they do what they would have done.

    Raised in the middle of Ray's compiled code, an interruption comes out as a SystemError. A second signal ends the
    process at once.
    """
    arrived: list[int] = []

    def keep(number: int, frame: object) -> None:
        arrived.append(number)
        signal.signal(number, signal.SIG_DFL)

    def interrupt() -> None:
        if arrived:
            before[arrived[0]](arrived[0], None)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        before = {number: handler for number, handler in before.items() if callable(handler)}
    for number in before:
        signal.signal(number, keep)
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            if number not in arrived:
                signal.signal(number, handler)


@contextmanager
def said_by_ray() -> Iterator[list[str]]:
    """Keep what Ray prints on stdout, which is for results; it lands in the list, a line for each message."""
    said: list[str] = []

    class Stdout:
        """As before for all but Ray."""

        def write(self, text: str) -> int:
            if threading.current_thread().name != SPEAKER:
                return before.write(text)
            words = re.sub(r"\x1b\[\d*m", "", text).strip().splitlines()
            if words:
                said.append(words[0][:SHOWN])
            return len(text)

        def __getattr__(self, name: str) -> Any:
            return getattr(before, name)

    before = sys.stdout
    with redirect_stdout(Stdout()):
        yield said


def _convert_all(
    ray: ModuleType,
    entries: Sequence[Entry],
    estimates: Estimates,
    progress: Progress,
    said: list[str],
    interrupt: Callable[[], None],
) -> Iterator[ModelResult]:
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On this node, as it is no use without this process.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    events = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    # A process for each conversion, so that one's memory is given back before the next.
    task = ray.remote(max_calls=1, max_retries=RETRIES)(_convert_one)
    waiting: dict[Any, Entry] = {}
    try:
        for entry in _settled(ray, entries):
            needed = resources_of(entry, estimates[entry.name])
            _warn_of_no_node(ray, entry, needed, progress)
            waiting[task.options(name=entry.name, **needed).remote(entry, os.getcwd(), events)] = entry
        while waiting:
            interrupt()
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=POLL)
            while said:
                progress(Event("ray", "record", said.pop(0)))
            for event in events.get_nowait_batch(events.qsize()):
                progress(event)
            for reference in done:
                yield _result_of(ray, reference, waiting.pop(reference))
    finally:
        for reference in waiting:  # a run survives being killed
            ray.cancel(reference, force=True)
        events.shutdown()


def _convert_one(entry: Entry, directory: str, events: Any) -> ModelResult:
    """What runs on a node."""
    try:
        os.chdir(directory)
    except OSError as error:
        hint = "zoo file, models and artifacts must be on storage that all nodes share"
        line = MachineError(f"is not on this node ({error.strerror})", directory, hint).line()
        return ModelResult(entry.name, entry.config.model, EXIT_MACHINE, line, 0.0, ())
    return convert_entry(entry, told_of(entry, lambda event: events.put(event)), patience=PATIENCE)


def _settled(ray: ModuleType, entries: Sequence[Entry]) -> list[Entry]:
    """Entries that leave it to the node where they run.

    Those that say nothing of threads get those that their run began with, else all of the smallest node. Those that
    name no device get the CPU: of a GPU that a node has, Ray knows nothing that was not asked for.
    """
    cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    smallest = min([count for count in cores if count], default=1)
    found = []
    for entry in entries:
        threads = chosen_threads(RunDirectory(run_path(entry.config)), entry.config) or smallest
        device = entry.config.machine.device
        found.append(on_machine(entry, threads, "cpu" if device == "auto" else device))
    return found


def _warn_of_no_node(ray: ModuleType, entry: Entry, needed: Mapping[str, float], progress: Progress) -> None:
    """Say of a task that it waits, where no node that is there now could ever run it; a cluster may grow."""
    names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
    for node in ray.nodes():
        if node["Alive"] and all(node["Resources"].get(names[key], 0) >= value for key, value in needed.items()):
            return
    wanted = f"{needed['num_cpus']} CPUs, {needed['num_gpus']} GPUs"
    wanted += f" and {needed['memory'] / 1e9:.1f} GB" if "memory" in needed else ""
    progress(Event(entry.name, "record", f"waits for a node with {wanted}, of which the cluster has none now"))


def _result_of(ray: ModuleType, reference: Any, entry: Entry) -> ModelResult:
    try:
        result: ModelResult = ray.get(reference)
        return result
    except ray.exceptions.RayTaskError as error:
        line, code = failure_of(error.cause if isinstance(error.cause, Exception) else error)
    except ray.exceptions.RayError as error:
        what = f"was lost on the cluster, after {RETRIES} more tries ({_first_line(error)})"
        line, code = MachineError(what, None, "run the same command again to resume").line(), EXIT_MACHINE
    return ModelResult(entry.name, entry.config.model, code, line, 0.0, ())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
