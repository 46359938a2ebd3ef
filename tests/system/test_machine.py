"""machine: what a process may use, also inside control groups of either version."""

import pytest

import bigq.system.machine
from bigq.system.machine import processes_of_job, usable_cores, usable_memory_nbytes


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """cgroups(lines of /proc/self/cgroup, {file below /sys/fs/cgroup: text}) on a machine of 64 cores and 100 GB."""
    monkeypatch.setattr(bigq.system.machine, "_CGROUP_OF_PROCESS", tmp_path / "cgroup")
    monkeypatch.setattr(bigq.system.machine, "_CGROUP_ROOT", tmp_path / "sys")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 100_000_000_000}))

    def write(lines, files):
        (tmp_path / "cgroup").write_text(lines)
        for name, text in files.items():
            path = tmp_path / "sys" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


@pytest.mark.parametrize(
    "lines, files, cores",
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 3),
        ("0::/pod/box\n", {"pod/cpu.max": "400000 100000", "pod/box/cpu.max": "max 100000"}, 4),
        ("0::/\n", {"cpu.max": "1000 100000\n"}, 1),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        (
            "3:cpu,cpuacct:/a\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "200000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            2,
        ),
        ("3:memory:/\n", {"memory/cpu.cfs_quota_us": "1"}, 64),
    ],
    ids=["v2 none", "v2", "v2 of a parent", "v2 below one", "v1 none", "v1 of a parent", "another controller"],
)
def test_cores(cgroups, lines, files, cores):
    cgroups(lines, files)
    assert usable_cores() == cores


@pytest.mark.parametrize(
    "lines, files, nbytes",
    [
        ("0::/\n", {"memory.max": "max\n", "memory.current": "5"}, 100_000_000_000),
        ("0::/a\n", {"a/memory.max": "3000\n", "a/memory.current": "1000\n"}, 2000),
        ("0::/\n", {"memory.max": "3000", "memory.current": "2900", "memory.stat": "anon 5\ninactive_file 700\n"}, 800),
        ("4:memory:/x\n", {"memory/memory.limit_in_bytes": "9000", "memory/memory.usage_in_bytes": "1000"}, 8000),
        ("0::/\n", {"memory.max": "3000", "memory.current": "4000"}, 0),
    ],
    ids=["v2 none", "v2", "v2 with page cache", "v1", "over the limit"],
)
def test_memory(cgroups, lines, files, nbytes):
    cgroups(lines, files)
    assert usable_memory_nbytes() == nbytes


def test_a_system_without_control_groups(cgroups, monkeypatch, tmp_path):
    monkeypatch.setattr(bigq.system.machine, "_CGROUP_OF_PROCESS", tmp_path / "absent")
    assert usable_cores() == 64
    assert usable_memory_nbytes() == 100_000_000_000


def test_this_machine():
    assert usable_cores() >= 1
    assert usable_memory_nbytes() > 1 << 20


@pytest.mark.parametrize("said, count", [(None, 1), ("", 1), ("8", 8), ("0", 1), ("two", 1)], ids=repr)
def test_processes_are_those_that_torchrun_says(monkeypatch, said, count):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if said is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", said)
    assert processes_of_job() == count
