"""examine: the whole examination of this machine, and what to do about each problem."""

import os
import resource
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bigq.doctor.gpu import GpuFacts, Switch, examine_gpu, gluon_switch, has_nvidia_driver, replay_switch
from bigq.doctor.kernels import KernelChoice, examine_kernels
from bigq.doctor.releases import Library, examine_releases
from bigq.doctor.self_test import Check, self_test
from bigq.measuring.environment import Environment
from bigq.measuring.page_cache import file_system
from bigq.measuring.rates import disk_rate, link_rate
from bigq.system.machine import usable_memory_nbytes

__all__ = ["Diagnosis", "Problem", "Rate", "examine"]

_SLOW_LINK = 8e9  # bytes a second: PCIe 4.0 x16 gives 25, PCIe 5.0 55; a card in a slot of 4 lanes gives 7


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that is wrong or slow.

    Args:
        what: it is.
        advice: what to do.
    """

    what: str
    advice: str


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How fast bytes move.

    Args:
        what: from where to where.
        bytes_per_s: measured.
    """

    what: str
    bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What `examine` found.

    Args:
        environment: the machine.
        libraries: with their releases.
        gpu: None without one.
        kernels: which kernel runs for which product.
        switches: what is on and off on the GPU.
        checks: of the self-test.
        rates: of the link and the drive.
        usable_memory_nbytes: of the host, that this process may still take.
        locked_memory_nbytes: that the system lets this process lock (`ulimit -l`); None: as much as there is.
        problems: and what to do.
    """

    environment: Environment
    libraries: tuple[Library, ...]
    gpu: GpuFacts | None
    kernels: tuple[KernelChoice, ...]
    switches: tuple[Switch, ...]
    checks: tuple[Check, ...]
    rates: tuple[Rate, ...]
    usable_memory_nbytes: int
    locked_memory_nbytes: int | None
    problems: tuple[Problem, ...]

    @property
    def is_right(self) -> bool:
        """Whether every check of the self-test has passed."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, object]:
        """The diagnosis as JSON can hold it."""
        return {"is_right": self.is_right, **asdict(self)}


def examine(device: torch.device, *, folder: Path | None = None) -> Diagnosis:
    """Examine this machine: releases, the GPU, the choice of kernels, a self-test, and rates.

    Args:
        device: that the self-test runs on, a GPU or the CPU.
        folder: of which drive the rate of reads is measured, with a file of 256 MB that is removed. None: none.

    Raises:
        OSError: `folder` cannot be written.
    """
    problems: list[Problem] = []
    libraries = examine_releases()
    for library in libraries:
        if library.advice is not None:
            version = library.version or library.status
            problems.append(Problem(what=f"{library.name} {version} is {library.status}", advice=library.advice))
    on_gpu = device.type == "cuda"
    switches = (gluon_switch(device), replay_switch()) if on_gpu else ()
    for switch in switches:
        if switch.advice is not None:
            problems.append(Problem(what=f"{switch.name} are off: {switch.why}", advice=switch.advice))
    problems += _settings(on_gpu)
    checks = self_test(device)
    failed = [check for check in checks if not check.passed]
    problems += [
        Problem(
            what=f"self-test: {check.what}: {check.detail}",
            advice="results are wrong here: install tested releases, and report this with the output of --json",
        )
        for check in failed
    ]
    rates = _rates(device, folder, problems)
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Diagnosis(
        environment=Environment.of(device),
        libraries=libraries,
        gpu=examine_gpu(device) if on_gpu else None,
        kernels=examine_kernels(device),
        switches=switches,
        checks=checks,
        rates=rates,
        usable_memory_nbytes=usable_memory_nbytes(),
        locked_memory_nbytes=None if limit == resource.RLIM_INFINITY else limit,
        problems=tuple(problems),
    )


def _settings(on_gpu: bool) -> list[Problem]:
    """Problems of the machine and of environment variables."""
    problems = []
    if not on_gpu and not torch.cuda.is_available() and has_nvidia_driver():
        what = f"this machine has a driver of NVIDIA, and torch {torch.__version__} sees no GPU"
        advice = "install a build of torch for CUDA, and check CUDA_VISIBLE_DEVICES and the age of the driver"
        problems.append(Problem(what=what, advice=advice))
    if on_gpu and os.environ.get("BIGQ_REFERENCE") == "1":
        problems.append(
            Problem(what="BIGQ_REFERENCE=1 runs torch's ops, which are slow", advice="unset BIGQ_REFERENCE")
        )
    if on_gpu and os.environ.get("TRITON_INTERPRET") == "1":
        problems.append(Problem(what="TRITON_INTERPRET=1 runs kernels in Python", advice="unset TRITON_INTERPRET"))
    return problems


def _rates(device: torch.device, folder: Path | None, problems: list[Problem]) -> tuple[Rate, ...]:
    rates = []
    if device.type == "cuda":
        try:
            link = link_rate(device).value
        except RuntimeError as error:
            advice = "raise the limit of locked memory (`ulimit -l`; for a container --ulimit memlock=-1)"
            problems.append(Problem(what=f"host memory cannot be pinned: {error}", advice=advice))
        else:
            rates.append(Rate(what="pinned host memory to the GPU", bytes_per_s=link))
            if link < _SLOW_LINK:
                what = f"the link to the GPU moves {link / 1e9:.1f} GB/s"
                advice = "look for a slot with more lanes, or for another process that uses it; offloading waits for it"
                problems.append(Problem(what=what, advice=advice))
    if folder is not None:
        kind = file_system(folder)
        where = "a file system in memory" if kind in ("tmpfs", "ramfs") else kind
        rates.append(Rate(what=f"reads from {folder} ({where})", bytes_per_s=disk_rate(folder).value))
    return tuple(rates)
