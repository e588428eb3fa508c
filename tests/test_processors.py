"""The default number of threads: affinity, and the quota of control groups of either version."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from accullm_cli.processors import usable_cores


def files(root: Path, content: dict[str, str]) -> Path:
    for name, text in content.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = "0::/kubepods/pod7/c3\n"
V1 = "9:name=systemd:/\n4:cpu,cpuacct:/docker/c3\n3:cpuset:/\n"


@pytest.mark.parametrize(
    ("content", "cores"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "10000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "1600000 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 50000\n"}, 3),
        # The process's own group has no limit, that of the pod has one.
        (
            {
                "proc/self/cgroup": V2,
                "sys/fs/cgroup/kubepods/pod7/c3/cpu.max": "max 100000\n",
                "sys/fs/cgroup/kubepods/pod7/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/kubepods/cpu.max": "600000 100000\n",
            },
            3,
        ),
        # The path is the host's, which the container does not see: its own group is the top.
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/docker/c3/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu/docker/c3/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "100000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
        # A hybrid: the quota is in version 1, version 2 is mounted below and limits nothing.
        (
            {
                "proc/self/cgroup": V1 + "0::/\n",
                "sys/fs/cgroup/cpu/docker/c3/cpu.cfs_quota_us": "500000\n",
                "sys/fs/cgroup/cpu/docker/c3/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/unified/cpu.max": "max 100000\n",
            },
            5,
        ),
        ({"proc/self/cgroup": "?\n0::/\n", "sys/fs/cgroup/cpu.max": "plenty\n"}, 8),
    ],
)
def test_a_quota_below_the_cores_is_the_number_of_threads(
    content: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert usable_cores(files(tmp_path, content)) == cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_a_process_bound_to_one_core_uses_one() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from accullm_cli.processors import usable_cores; print(usable_cores())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


def test_where_nobody_tells_an_affinity_all_cores_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert usable_cores(tmp_path) == 1
