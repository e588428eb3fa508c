"""How many CPU cores this process may use: what it may run on, and what its control groups' quota leaves of it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def usable_cores(root: Path = Path("/")) -> int:
    """The cores of this process's affinity (`taskset`, cpusets), but no more than its control groups' CPU quota.

    A quota of one and a half cores counts as two: with one thread a third of it could not be used.

    Args:
        root: where /proc and /sys lie.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(math.ceil(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """The CPU quotas, in cores, of every control group that this process is in.

    Version 2: https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files, where `max` is none; version 1:
    https://docs.kernel.org/scheduler/sched-bwc.html, where -1 is none. A group's limit holds for all groups in it, so
    those above count too. In a container, a group's path may be that of the host, and its own files lie at the top.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        group = PurePosixPath("/", path)
        mounts = ("cpu", "cpu,cpuacct") if "cpu" in controllers.split(",") else ("", "unified") if number == "0" else ()
        for directory in (root / "sys/fs/cgroup" / mount for mount in mounts):
            for above in (group, *group.parents):
                place = directory / str(above).lstrip("/")
                limit = _read(place / "cpu.max").split() or [
                    *_read(place / "cpu.cfs_quota_us").split(),
                    *_read(place / "cpu.cfs_period_us").split(),
                ]
                if len(limit) == 2 and limit[0].isdecimal() and limit[1].isdecimal() and int(limit[1]):
                    yield int(limit[0]) / int(limit[1])


def _read(path: Path) -> str:
    """A file's text; nothing where there is none, or nobody may read it."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
