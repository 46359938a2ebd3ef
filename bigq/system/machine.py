"""The share of the machine that this process may use: cores and memory, within the limits of its control groups."""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

__all__ = ["processes_of_job", "usable_cores", "usable_memory_nbytes"]

_CGROUP_OF_PROCESS = Path("/proc/self/cgroup")
_CGROUP_ROOT = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """How many threads of this process can run at once: its affinity, or less where a control group has a quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _groups("cpu"):
        quota, period = _numbers(group / "cpu.max", 2)  # version 2: both in one file
        if quota is None:
            (quota,), (period,) = _numbers(group / "cpu.cfs_quota_us", 1), _numbers(group / "cpu.cfs_period_us", 1)
        if quota is not None and period and quota > 0:  # version 1 writes -1 for no quota
            cores = min(cores, -(-quota // period))
    return max(1, cores)


def usable_memory_nbytes() -> int:
    """Bytes of memory that this process can still take: what is available, or less where a control group limits it."""
    free = int(psutil.virtual_memory().available)
    for group in _groups("memory"):
        for limit_name, usage_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            (limit,), (usage,) = _numbers(group / limit_name, 1), _numbers(group / usage_name, 1)
            if limit is not None and usage is not None:
                free = min(free, limit - usage + _page_cache_nbytes(group))
    return max(0, free)


def processes_of_job() -> int:
    """How many processes of this job share the machine, as torchrun says in LOCAL_WORLD_SIZE; 1 without it."""
    count = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(count)) if count.isdecimal() else 1


def _groups(controller: str) -> Iterator[Path]:
    """The folders of the process's control groups that `controller` acts in, each with its ancestors."""
    try:
        lines = _CGROUP_OF_PROCESS.read_text().splitlines()
    except OSError:  # no Linux, or no /proc
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _CGROUP_ROOT / controllers if controllers else _CGROUP_ROOT
        inside = Path(path.lstrip("/"))
        yield root / inside
        for ancestor in inside.parents:
            yield root / ancestor


def _numbers(path: Path, count: int) -> list[int | None]:
    """The first `count` numbers of a file; None for "max" and for what is not there."""
    try:
        words = path.read_text().split()
    except OSError:
        words = []
    return [int(word) if word.lstrip("-").isdigit() else None for word in [*words, *[""] * count][:count]]


def _page_cache_nbytes(group: Path) -> int:
    """Bytes of file pages charged to a group, which the system takes back before it refuses memory."""
    try:
        entries = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(entries.get("inactive_file", entries.get("total_inactive_file", 0)))
