"""examine_gpu: the GPU, its driver and memory, and whether replays and the Gluon kernels run on it."""

import os
import shutil
import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["GpuFacts", "Switch", "examine_gpu", "gluon_switch", "has_nvidia_driver", "replay_switch"]

_DRIVER_FOLDER = Path("/proc/driver/nvidia")
_TIMEOUT_S = 20


@dataclass(frozen=True, kw_only=True)
class GpuFacts:
    """A GPU as torch and its driver describe it.

    Args:
        name: such as "NVIDIA H100 80GB HBM3".
        capability: compute capability, such as "9.0".
        multiprocessors: how many.
        memory_nbytes: of the GPU.
        free_nbytes: that no process takes now.
        driver: its release; None where nvidia-smi does not say.
        runtime: the release of CUDA (or HIP) that torch is built for.
    """

    name: str
    capability: str
    multiprocessors: int
    memory_nbytes: int
    free_nbytes: int
    driver: str | None
    runtime: str | None


@dataclass(frozen=True, kw_only=True)
class Switch:
    """Something that is on or off.

    Args:
        name: of it.
        is_on: whether it is.
        why: the reason, if it is off; what it is for, if it is on.
        advice: what to do; None if there is nothing to do.
    """

    name: str
    is_on: bool
    why: str
    advice: str | None = None


def has_nvidia_driver() -> bool:
    """Whether this machine has a driver of NVIDIA's, whatever torch sees."""
    return _DRIVER_FOLDER.exists()


def examine_gpu(device: torch.device) -> GpuFacts:
    """Describe a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return GpuFacts(
        name=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        multiprocessors=properties.multi_processor_count,
        memory_nbytes=total,
        free_nbytes=free,
        driver=_driver(),
        runtime=torch.version.cuda or torch.version.hip,
    )


def gluon_switch(device: torch.device) -> Switch:
    """Whether the Gluon kernels run on a CUDA device, and why not."""
    import triton

    from bigq_kernels.gpu import GLUON_RELEASES, Gpu

    gpu = Gpu.of(device)
    releases = ", ".join(f"{major}.{minor}" for major, minor in GLUON_RELEASES)
    if gpu.gluon:
        return Switch(name="Gluon kernels", is_on=True, why="for one to some hundred tokens times a 4-bit weight")
    if not gpu.ptx:
        why, advice = "kernels are interpreted, or the GPU takes no PTX", "unset TRITON_INTERPRET on a GPU of NVIDIA"
    elif gpu.capability < (8, 0):
        why, advice = f"compute capability {gpu.capability[0]}.{gpu.capability[1]} is below 8.0", None
    else:
        why, advice = f"Triton {triton.__version__} is none of {releases}", f"install Triton of {releases}"
    return Switch(name="Gluon kernels", is_on=False, why=why, advice=advice)


def replay_switch() -> Switch:
    """Whether launches are replayed, which is tried on a tiny kernel, and why not."""
    from bigq_kernels.replay import can_replay

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        works = can_replay()
    if works:
        return Switch(name="replays", is_on=True, why="a replayed kernel gave the bits of its launcher")
    why = (
        str(said[0].message) if said else "kernels are interpreted, someone listens to launches, or it was tried before"
    )
    return Switch(name="replays", is_on=False, why=why, advice="install a release of Triton that is tested")


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=_TIMEOUT_S, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = said.stdout.split() if said.returncode == 0 else []
    return lines[0] if lines else None
