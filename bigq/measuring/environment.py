"""Environment: what a measurement was made with: the machine, the libraries and the day."""

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from bigq.system.machine import usable_cores

__all__ = ["LIBRARIES", "Environment", "installed_version"]

LIBRARIES = (
    "bigq",
    "torch",
    "triton",
    "accelerate",
    "transformers",
    "diffusers",
    "peft",
    "bitsandbytes",
    "safetensors",
)
_CPU_NAMES = Path("/proc/cpuinfo")


def installed_version(library: str) -> str | None:
    """The release of a library that is installed, without importing it; None if it is not installed."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What a measurement was made with.

    Args:
        date: UTC, as "2026-11-29T10:00:00+00:00".
        system: the operating system and its release.
        python: the release of Python.
        device: the name of the GPU, or of the processor.
        cores: that this process may use.
        versions: {library: release} of those that are installed.
    """

    date: str
    system: str
    python: str
    device: str
    cores: int
    versions: Mapping[str, str]

    @staticmethod
    def of(device: torch.device) -> "Environment":
        """The environment of this process, for measurements on `device`."""
        found = {library: installed_version(library) for library in LIBRARIES}
        found["torch"] = torch.__version__  # says whether it is a build for CUDA
        return Environment(
            date=datetime.now(timezone.utc).replace(microsecond=0).isoformat(),
            system=platform.platform(),
            python=platform.python_version(),
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
            cores=usable_cores(),
            versions={library: version for library, version in found.items() if version is not None},
        )

    def to_dict(self) -> dict[str, object]:
        """The environment as JSON can hold it."""
        return asdict(self)


def _processor() -> str:
    try:
        lines = _CPU_NAMES.read_text().splitlines()
    except OSError:  # no Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or os.uname().machine
