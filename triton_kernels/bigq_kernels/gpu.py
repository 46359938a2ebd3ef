"""What a GPU can do, as far as the choice and the configuration of kernels depend on it."""

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton

from bigq_kernels.internals import TESTED_TRITON

__all__ = ["BULK_RELEASES", "GLUON_RELEASES", "Gpu"]

GLUON_RELEASES = TESTED_TRITON  # no other has to compile the Gluon kernels
# From 3.9 on, all warps of a program wait for each other behind each wait for wgmma, if there is more than one group of
# them. In `bulk`, halves of the warps may run different numbers of steps, so they would wait in vain.
BULK_RELEASES = tuple(release for release in GLUON_RELEASES if release < (3, 9))
_KIB = 1 << 10
_NAMED = {  # compute capability, multiprocessors, shared memory of a program
    "h100": ((9, 0), 132, 227 * _KIB),
    "h200": ((9, 0), 132, 227 * _KIB),
    "a100": ((8, 0), 108, 163 * _KIB),
    "rtx4090": ((8, 9), 128, 99 * _KIB),
}


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The properties of a GPU: `Gpu.of(device)` asks a device for them, and `Gpu.named("h100")` needs none."""

    capability: tuple[int, int]  # compute capability
    multiprocessors: int
    shared_nbytes: int  # the most shared memory that a program may have
    ptx: bool  # takes inline PTX
    pdl: bool  # programmatic dependent launch: a kernel may start before the one ahead of it has ended
    gluon: bool  # runs the Gluon kernels, which depends on the release of Triton too
    bulk: bool  # runs `bulk`, which is one of them

    @staticmethod
    @cache
    def of(device: torch.device) -> "Gpu":
        """The GPU `device` under the installed release of Triton; for a CPU, an H100 that takes no PTX."""
        if device.type != "cuda":
            return replace(Gpu.named("h100"), ptx=False, pdl=False, gluon=False, bulk=False)
        properties = torch.cuda.get_device_properties(device)
        capability = properties.major, properties.minor
        ptx = torch.version.cuda is not None and not triton.knobs.runtime.interpret
        release = tuple(int(part) for part in triton.__version__.split(".")[:2])
        return Gpu(
            capability=capability,
            multiprocessors=properties.multi_processor_count,
            # AMD's have no other limit than that of every program.
            shared_nbytes=getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block),
            ptx=ptx,
            pdl=ptx and capability >= (9, 0),
            gluon=ptx and capability >= (8, 0) and release in GLUON_RELEASES,  # 8.0 has cp.async and bfloat16
            bulk=ptx and capability == (9, 0) and release in BULK_RELEASES,
        )

    @staticmethod
    def named(name: str) -> "Gpu":
        """An "h100" or "h200" (SXM), "a100" or "rtx4090", with a release of Triton in BULK_RELEASES."""
        if name not in _NAMED:
            raise ValueError(f"{name!r} is no GPU that is described here; expected one of {', '.join(_NAMED)}")
        capability, multiprocessors, shared_nbytes = _NAMED[name]
        return Gpu(
            capability=capability,
            multiprocessors=multiprocessors,
            shared_nbytes=shared_nbytes,
            ptx=True,
            pdl=capability >= (9, 0),
            gluon=True,
            bulk=capability == (9, 0),
        )
