"""The CPU cores that this process may use: what its job was given, not what the machine has."""

import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def given() -> int:
    """Return the number of cores given to this process, at least 1.

    The smallest of its CPU affinity (taskset, SLURM's cpuset), the quota of its control groups (containers) and, in a
    SLURM step, ``SLURM_CPUS_PER_TASK``, which also holds where SLURM doesn't confine its jobs.
    """
    counts = [len(os.sched_getaffinity(0))]
    asked = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if asked.isdigit() and int(asked):
        counts.append(int(asked))
    if quota := _quota():
        counts.append(int(quota))
    return max(1, min(counts))


def _quota() -> float | None:
    """Return the cores that the quotas of this process's control groups amount to; None without a quota."""
    found = []
    try:
        lines = _OWN_CGROUP.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = _CGROUPS / controllers if controllers else _CGROUPS
        # A limit of any group above counts. In a container the own path may not exist: its group is the root there.
        folder = base / path.lstrip("/")
        found += [limit for group in (folder, *folder.parents) if (limit := _limit(group)) is not None]
    return min(found, default=None)


def _limit(group: Path) -> float | None:
    """Return a control group's quota in cores: version 2's cpu.max, or version 1's files."""
    try:
        if (both := group / "cpu.max").is_file():
            quota, period = both.read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return int(quota) / int(period) if quota.isdigit() else None
    except (OSError, ValueError):
        return None
